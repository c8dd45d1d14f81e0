//! What a device does while it is connected.

use super::*;

#[test]
fn device_speaks_within_each_heartbeat_and_a_quarter() {
    let mut rig = Rig::online(Profile::WellBehaved);
    rig.welcome();
    rig.pass(20 * SECOND);
    rig.device.handle_ping(rig.now);
    let pinged = rig.now;

    assert_eq!(rig.wake(), Some(Action::SendHeartbeat));

    assert_eq!(rig.now, pinged + Duration::from_millis(37_500));
}

#[test]
fn gateway_that_pings_on_time_is_sent_no_heartbeats() {
    let mut rig = Rig::online(Profile::WellBehaved);
    rig.welcome();
    for _ in 0..10 {
        rig.pass(30 * SECOND);
        rig.device.handle_timeout(rig.now, &mut rig.rng);
        assert_eq!(rig.device.poll_action(), None);
        rig.device.handle_ping(rig.now);
    }
}

#[test]
fn silent_gateway_is_left_after_three_heartbeats() {
    let mut rig = Rig::online(Profile::WellBehaved);
    rig.welcome();

    let mut actions = Vec::new();
    while rig.device.state() == State::Online {
        actions.extend(rig.wake());
    }

    assert_eq!(rig.now, Instant::ZERO + 90 * SECOND);
    assert_eq!(actions, [Action::SendHeartbeat, Action::SendHeartbeat, Action::Abort]);
}

#[test]
fn plain_session_sends_no_heartbeat() {
    let mut rig = Rig::online(Profile::WellBehaved);

    assert_eq!(
        rig.wake(),
        Some(Action::Abort),
        "the silence of 90 s is all that is due"
    );
    assert_eq!(rig.now, Instant::ZERO + 90 * SECOND);
}

#[test]
fn message_is_acked_by_its_id() {
    let mut rig = Rig::online(Profile::WellBehaved);

    rig.device
        .handle_text(r#"{"type":"message","id":"m\"1","payload":{}}"#, rig.now);

    assert_eq!(rig.device.poll_action(), Some(Action::SendAck { id: "m\"1".into() }));
}

#[test]
fn resume_token_is_kept_renewed_and_shown() {
    let mut rig = Rig::online(Profile::WellBehaved);
    rig.welcome();
    assert_eq!(rig.device.resume(), Some("r1"));

    rig.device.handle_text(r#"{"type":"resume","token":"r2"}"#, rig.now);
    rig.lose();

    assert_eq!(rig.device.resume(), Some("r2"));
}

#[test]
fn profile_that_ignores_hints_shows_no_resume_token() {
    for profile in Profile::ALL {
        let mut rig = Rig::online(profile);
        rig.welcome();

        assert_eq!(rig.device.resume().is_some(), profile.obeys_hints(), "{profile}");
    }
}

#[test]
fn patient_device_keeps_a_session_in_which_its_gateway_is_silent() {
    for (profile, ends) in [(Profile::WellBehaved, true), (Profile::Patient, false)] {
        let mut rig = Rig::online(profile);
        rig.welcome();
        let silent_until = rig.now + 600 * SECOND;

        while rig.device.state() == State::Online && rig.now < silent_until {
            rig.wake();
        }

        assert_eq!(rig.device.state() != State::Online, ends, "{profile}");
    }
}

#[test]
fn half_open_device_is_silent_for_two_minutes() {
    let mut rig = Rig::online(Profile::HalfOpen);
    rig.welcome();

    assert_eq!(rig.wake(), Some(Action::Abort));
    assert_eq!(rig.now, Instant::ZERO + HALF_OPEN_SILENCE);
}

#[test]
fn restricted_device_is_shown_its_update_and_returns_as_told() {
    let mut rig = Rig::online(Profile::WellBehaved);
    let rule = "01920000-0000-7000-8000-000000000001";

    let frame = format!(r#"{{"type":"update","rule":"{rule}","update":{{"url":"https://example.com/1"}}}}"#);
    rig.device.handle_text(&frame, rig.now);

    assert_eq!(
        rig.device.poll_action(),
        Some(Action::Update(Box::new(UpdateNotice {
            rule: seawall_proto::id::RuleId(rule.parse().unwrap()),
            update: r#"{"url":"https://example.com/1"}"#.into()
        })))
    );
    let close = CloseFrame {
        code: 4000,
        reason: r#"{"retry_after_ms":900000,"reason":"evicted"}"#,
    };
    rig.device.handle_closed(Some(close), rig.now, &mut rig.rng);
    assert_eq!((rig.device.state(), rig.device.slot()), (State::Waiting, None));
    let back = rig.device.poll_timeout().unwrap();
    assert!(back >= rig.now + 900 * SECOND, "{back:?}");
}
