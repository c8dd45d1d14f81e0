use rand::{SeedableRng, rngs::SmallRng};

use super::*;
use crate::{close::Restart, refusal::Hint};

/// Both clocks show the same.
fn at(ms: u64) -> Moment {
    let span = Duration::from_millis(ms);
    Moment {
        real: Instant::ZERO + span,
        observed: Observed::ZERO + span,
    }
}

/// The next time of a session that is called on time.
fn next(session: &Session, now: Moment) -> Moment {
    let real = session.poll_timeout(now).begin();
    Moment {
        real,
        observed: Observed::ZERO + real.saturating_since(Instant::ZERO),
    }
}

fn rng() -> SmallRng {
    SmallRng::seed_from_u64(3)
}

fn open(kind: SessionKind, limits: SessionLimits) -> Session {
    Session::open(
        kind,
        SessionId(0x2a),
        None,
        Arc::new(limits),
        at(0),
        WallTime::from_unix_ms(1_767_225_600_000),
        &mut rng(),
    )
}

/// A `seawall.v1` session whose welcome is out.
fn v1() -> Session {
    let mut session = open(SessionKind::V1, SessionLimits::default());
    drain(&mut session);
    session
}

fn plain() -> Session {
    open(SessionKind::Plain, SessionLimits::default())
}

fn drain(session: &mut Session) -> Vec<Action> {
    std::iter::from_fn(|| session.poll_action()).collect()
}

fn closed_with(session: &mut Session) -> Option<Close> {
    drain(session).into_iter().find_map(|action| match action {
        Action::Close(close) => Some(close),
        Action::Text(_)
        | Action::Binary(_)
        | Action::Ping
        | Action::Received(_)
        | Action::Complained(_)
        | Action::RenewToken
        | Action::Acked(_)
        | Action::Silent
        | Action::Suspect
        | Action::HeardAgain
        | Action::AskKernel
        | Action::AskGroups => None,
    })
}

fn text(json: &str) -> Action {
    Action::Text(json.to_owned())
}

#[test]
fn welcome_comes_first_and_only_in_v1() {
    let mut v1 = open(SessionKind::V1, SessionLimits::default());

    assert_eq!(
        drain(&mut v1),
        [text(
            r#"{"type":"welcome","session":"000000000000002a","heartbeat_ms":30000,"backoff_cap_ms":60000,"server_time":"2026-01-01T00:00:00.000Z"}"#
        )]
    );
    assert_eq!(drain(&mut plain()), []);
}

#[test]
fn messages_in_very_many_fragments_use_up_the_rate_sooner() {
    let messages_until_closed = |fragments: u32| {
        let mut session = plain();
        (0..10_000_u32)
            .find(|_| {
                session.handle_fragments(fragments, at(0));
                session.handle_text("x", at(0));
                session.is_closing()
            })
            .unwrap()
    };

    assert_eq!(messages_until_closed(0), 500);
    assert_eq!(messages_until_closed(1_024), 500, "64 KiB in pieces of 64 bytes");
    assert_eq!(messages_until_closed(1_025), 250);
    assert_eq!(messages_until_closed(60_000), 8, "a byte each");
    let mut session = plain();
    session.handle_fragments(10_000_000, at(0));
    assert!(matches!(drain(&mut session).last(), Some(Action::Close(Close::Policy))));
}

#[test]
fn message_is_acknowledged_only_when_stored() {
    let mut session = v1();

    session.handle_text(r#"{"type":"message","id":"7","topic":"t","payload":[1]}"#, at(1));
    let received = drain(&mut session);
    session.handle_stored("7");

    assert_eq!(
        received,
        [Action::Received(Received {
            id: Some("7".into()),
            topic: Some("t".into()),
            payload: Payload::Json("[1]".into()),
        })]
    );
    assert_eq!(drain(&mut session), [text(r#"{"type":"ack","id":"7"}"#)]);
}

#[test]
fn message_to_a_device_is_framed_and_its_ack_reported() {
    let mut session = v1();

    session
        .handle_message_out("a", OutBody::Json("{\"on\": true}"))
        .unwrap();
    session.handle_text(r#"{"type":"ack","id":"a"}"#, at(1));

    assert_eq!(
        drain(&mut session),
        [
            text(r#"{"type":"message","id":"a","payload":{"on": true}}"#),
            Action::Acked("a".into())
        ]
    );
    assert_eq!(
        session.handle_message_out("b", OutBody::Json("{")),
        Err(Unsendable::NotJson)
    );
    assert_eq!(
        session.handle_message_out("b", OutBody::Binary(b"x")),
        Err(Unsendable::BinaryInV1)
    );
}

#[test]
fn plain_session_passes_data_as_it_is_and_says_nothing_of_its_own() {
    let mut session = plain();

    session.handle_text("no json", at(1));
    session.handle_binary(&[1, 2], at(2));
    session.handle_message_out("a", OutBody::Json("hello")).unwrap();
    session.handle_message_out("b", OutBody::Binary(b"x")).unwrap();

    let opaque = |payload| {
        Action::Received(Received {
            id: None,
            topic: None,
            payload,
        })
    };
    assert_eq!(
        drain(&mut session),
        [
            opaque(Payload::Text("no json".into())),
            opaque(Payload::Binary([1, 2].into())),
            text("hello"),
            Action::Binary(b"x".to_vec())
        ]
    );
}

#[test]
fn binary_frame_ends_a_v1_session_with_1003() {
    let mut session = v1();

    session.handle_binary(b"x", at(1));

    assert_eq!(closed_with(&mut session), Some(Close::WrongKind));
}

#[test]
fn bad_frames_get_errors_without_an_echo_and_the_tenth_closes() {
    let mut session = v1();

    for n in 0..9 {
        session.handle_text("{\"type\":\"zqzq\"}", at(n));
    }
    let errors = drain(&mut session);
    session.handle_text("zqzq", at(10));

    let each = [
        Action::Complained(ErrorCode::BadFrame),
        text(r#"{"type":"error","code":"bad_frame","detail":"this type is not known"}"#),
    ];
    assert_eq!(errors, vec![each; 9].concat());
    assert_eq!(closed_with(&mut session), Some(Close::Policy));
}

#[test]
fn device_over_its_rate_is_told_then_closed() {
    let limits = SessionLimits {
        messages_burst: 3,
        ..SessionLimits::default()
    };
    let mut session = open(SessionKind::V1, limits.clone());
    drain(&mut session);
    let mut plain = open(SessionKind::Plain, limits);

    for _ in 0..5 {
        session.handle_text("{\"type\":\"heartbeat\"}", at(1));
        plain.handle_control(at(1));
    }

    assert_eq!(
        drain(&mut session),
        [
            Action::Complained(ErrorCode::RateLimited),
            text(r#"{"type":"error","code":"rate_limited","detail":"more frames than this session may send"}"#),
            Action::Close(Close::Policy)
        ]
    );
    assert_eq!(
        drain(&mut plain),
        [Action::Complained(ErrorCode::RateLimited), Action::Close(Close::Policy)]
    );
}

#[test]
fn both_kinds_are_pinged_each_heartbeat() {
    for mut session in [v1(), plain()] {
        let (mut pings, mut now) = (Vec::new(), at(0));
        for _ in 0..3 {
            now = next(&session, now);
            session.handle_timeout(now, 0);
            assert_eq!(drain(&mut session), [Action::Ping]);
            session.handle_control(now);
            pings.push(now.observed);
        }

        assert!(pings[0] <= at(30_000).observed);
        assert_eq!(pings[1].saturating_since(pings[0]), Duration::from_secs(30));
        assert_eq!(pings[2].saturating_since(pings[1]), Duration::from_secs(30));
    }
}

#[test]
fn acknowledgements_of_messages_to_the_device_are_free_and_no_others() {
    let limits = SessionLimits {
        messages_burst: 3,
        ..SessionLimits::default()
    };
    let mut session = open(SessionKind::V1, limits);
    drain(&mut session);
    for n in 0..2_000 {
        session.handle_message_out(&n.to_string(), OutBody::Json("1")).unwrap();
    }

    for n in 0..2_000 {
        session.handle_text(&format!(r#"{{"type":"ack","id":"{n}"}}"#), at(1));
    }
    let acked = drain(&mut session)
        .into_iter()
        .filter(|action| matches!(action, Action::Acked(_)));
    assert_eq!(acked.count(), 2_000);
    assert!(!session.is_closing());

    for _ in 0..4 {
        session.handle_text(r#"{"type":"ack","id":"1"}"#, at(1));
    }
    assert_eq!(closed_with(&mut session), Some(Close::Policy));
}

#[test]
fn frames_only_ever_move_the_deadline_later() {
    let mut session = plain();
    let mut last = session.poll_timeout(at(0));

    for n in 1..100 {
        session.handle_text("x", at(n * 10));

        assert!(session.poll_timeout(at(n * 10)) >= last);
        last = session.poll_timeout(at(n * 10));
    }
}

#[test]
fn draining_v1_session_is_told_before_the_close() {
    let close = Close::Restart {
        why: Restart::Draining,
        hint: Hint {
            after: Duration::from_millis(1500),
            slot: Some("s".into()),
        },
    };
    let (mut v1, mut plain) = (v1(), plain());

    v1.handle_close(close.clone());
    plain.handle_close(close.clone());

    assert_eq!(
        drain(&mut v1),
        [
            text(r#"{"type":"reconnect","after_ms":1500,"slot":"s","reason":"draining"}"#),
            Action::Close(close.clone())
        ]
    );
    assert_eq!(drain(&mut plain), [Action::Close(close)]);
}

#[test]
fn nothing_follows_a_close() {
    let mut session = v1();

    session.handle_close(Close::Replaced);
    session.handle_close(Close::Revoked);
    session.handle_text("{\"type\":\"message\",\"id\":\"1\"}", at(1));
    session.handle_binary(b"x", at(1));
    session.handle_stored("1");
    session.handle_timeout(at(1_000_000), 0);

    assert_eq!(drain(&mut session), [Action::Close(Close::Replaced)]);
    assert_eq!(
        session.handle_message_out("a", OutBody::Json("1")),
        Err(Unsendable::Closing)
    );
    assert_eq!(session.poll_timeout(at(1_000_000)), Tenths::FAR_FUTURE);
}

#[test]
fn idle_session_holds_no_queue() {
    let mut session = v1();

    session.handle_text("{\"type\":\"message\",\"id\":\"1\"}", at(1));
    drain(&mut session);

    assert_eq!(session.actions.capacity(), 0);
    assert!(
        std::mem::size_of::<Session>() <= 88,
        "{}",
        std::mem::size_of::<Session>()
    );
}

#[test]
fn farthest_wall_time_has_a_text() {
    assert_eq!(
        WallTime::from_unix_ms(u64::MAX).to_rfc3339(),
        "9999-12-31T23:59:59.999Z"
    );
}

fn minted(text: &str, renew_after: Option<Duration>) -> Minted {
    Minted {
        text: text.into(),
        renew_after,
    }
}

fn with_token(kind: SessionKind, renew_after: Option<Duration>) -> Session {
    Session::open(
        kind,
        SessionId(0x2a),
        Some(&minted("t1", renew_after)),
        Arc::new(SessionLimits::default()),
        at(0),
        WallTime::default(),
        &mut rng(),
    )
}

#[test]
fn token_is_in_the_welcome_and_renewed_when_due_for_as_long_as_the_session_lives() {
    let mut session = with_token(SessionKind::V1, Some(Duration::from_hours(13)));
    let Some(Action::Text(welcome)) = drain(&mut session).pop() else {
        panic!("a welcome");
    };
    assert!(welcome.contains(r#""resume":"t1""#), "{welcome}");

    let mut renewed_at = Vec::new();
    let mut now = at(0);
    while now.real < at(60 * 3_600_000).real {
        now = next(&session, now);
        session.handle_control(now);
        session.handle_timeout(now, 0);
        if drain(&mut session).contains(&Action::RenewToken) {
            renewed_at.push(now.real.as_micros() / 3_600_000_000);
            session.handle_token(&minted("t2", Some(Duration::from_hours(13))), now.real);
            assert_eq!(drain(&mut session), [text(r#"{"type":"resume","token":"t2"}"#)]);
        }
    }

    assert_eq!(renewed_at, [13, 26, 39, 52]);
}

#[test]
fn token_that_can_t_be_renewed_is_not() {
    let mut session = with_token(SessionKind::V1, None);

    let mut now = at(0);
    while now.real < at(60 * 3_600_000).real {
        now = next(&session, now);
        session.handle_control(now);
        session.handle_timeout(now, 0);
        assert!(!drain(&mut session).contains(&Action::RenewToken));
    }
}

#[test]
fn plain_session_is_told_no_token() {
    let mut session = with_token(SessionKind::Plain, Some(Duration::from_secs(1)));

    session.handle_token(&minted("t2", None), Instant::ZERO);
    session.handle_timeout(at(1_000), 0);

    assert!(drain(&mut session).iter().all(|action| matches!(action, Action::Ping)));
    let restart = Close::Restart {
        why: Restart::Draining,
        hint: Hint::draw(Duration::from_secs(1)..=Duration::from_secs(2), &mut rng()),
    };
    assert!(!session.wants_token_before(&restart));
}

#[test]
fn fresh_token_goes_out_before_a_device_is_asked_to_come_back() {
    let mut session = v1();
    let restart = Close::Restart {
        why: Restart::Draining,
        hint: Hint::draw(Duration::from_secs(1)..=Duration::from_secs(2), &mut rng()),
    };

    assert!(session.wants_token_before(&restart));
    assert!(!session.wants_token_before(&Close::Revoked));
    session.handle_token(&minted("t2", None), Instant::ZERO);
    session.handle_close(restart);

    let frames = drain(&mut session);
    assert_eq!(frames[0], text(r#"{"type":"resume","token":"t2"}"#));
    assert!(matches!(&frames[1], Action::Text(frame) if frame.contains("reconnect")));
    assert!(matches!(&frames[2], Action::Close(Close::Restart { .. })));
    session.handle_token(&minted("t3", None), Instant::ZERO);
    assert!(!session.has_actions());
}
