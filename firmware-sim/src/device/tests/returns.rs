//! When a device returns: hints, slots, backoff, and closes that keep it away.

use super::*;

#[test]
fn hint_is_obeyed_to_the_millisecond_and_the_slot_shown() {
    let mut rig = Rig::new(Profile::WellBehaved);
    rig.wake();

    rig.refuse(23_417, Some("slot-1"));

    assert_eq!(rig.wait(), Duration::from_millis(23_417));
    assert_eq!(rig.device.slot(), Some("slot-1"));
    rig.wake();
    rig.refuse(1_000, None);
    assert_eq!(
        rig.device.slot(),
        Some("slot-1"),
        "a refusal without a slot takes none away"
    );
    rig.connect();
    assert_eq!(rig.device.slot(), None, "an admission uses it up");
}

#[test]
fn profiles_that_ignore_hints_never_look_at_them() {
    for profile in Profile::ALL.into_iter().filter(|profile| !profile.obeys_hints()) {
        let mut rig = Rig::new(profile);
        rig.wake();

        rig.refuse(600_000, Some("slot"));

        assert!(rig.wait() <= 5 * SECOND, "{profile}");
        assert_eq!(rig.device.slot(), None, "{profile}");
        rig.connect();
        rig.close(4501, "revoked");
        assert_eq!(rig.device.state(), State::Waiting, "{profile}");
    }
}

#[test]
fn without_a_hint_waits_are_full_jitter_that_doubles_to_the_cap() {
    for (failures, ceiling_s) in [(1, 1), (2, 2), (4, 8), (7, 60), (30, 60)] {
        let range = waits(Profile::WellBehaved, |rig| {
            for _ in 0..failures {
                rig.wake();
                rig.fail();
            }
        });

        assert!(*range.start() < SECOND * ceiling_s / 20, "{failures}: {range:?}");
        assert!(
            (SECOND * ceiling_s * 19 / 20..=SECOND * ceiling_s).contains(range.end()),
            "{failures}: {range:?}"
        );
    }
}

#[test]
fn cap_of_the_welcome_holds() {
    let range = waits(Profile::WellBehaved, |rig| {
        rig.connect();
        let text = r#"{"type":"welcome","session":"1","heartbeat_ms":1,"backoff_cap_ms":120000,"server_time":"x"}"#;
        rig.device.handle_text(text, rig.now);
        rig.lose();
        for _ in 0..12 {
            rig.wake();
            rig.fail();
        }
    });

    assert!((115 * SECOND..=120 * SECOND).contains(range.end()), "{range:?}");
}

#[test]
fn first_return_after_a_stable_session_is_spread_over_five_seconds() {
    for code in [
        None,
        Some(1000),
        Some(1001),
        Some(1006),
        Some(1008),
        Some(1009),
        Some(1013),
    ] {
        let range = waits(Profile::WellBehaved, |rig| {
            rig.connect();
            rig.pass(STABLE);
            match code {
                None => rig.lose(),
                Some(code) => rig.close(code, "policy"),
            }
        });

        assert!(
            *range.start() < SECOND / 4 && *range.end() > 19 * SECOND / 4,
            "{code:?}: {range:?}"
        );
        assert!(*range.end() <= 5 * SECOND, "{code:?}: {range:?}");
    }
}

#[test]
fn attempts_are_reset_by_a_stable_minute_only() {
    let mut rig = Rig::new(Profile::WellBehaved);
    for _ in 0..6 {
        rig.wake();
        rig.fail();
    }
    rig.connect();
    assert_eq!(rig.device.attempts(), 6, "a connection alone resets nothing");
    rig.pass(STABLE - Duration::from_millis(1));
    rig.lose();
    assert_eq!(rig.device.attempts(), 7);

    rig.connect();
    rig.pass(STABLE);
    rig.lose();

    assert_eq!(rig.device.attempts(), 0);
}

#[test]
fn close_with_a_hint_is_obeyed_with_its_slot() {
    for code in [1012, 4000, 4001, 4002, 4003, 4499] {
        let mut rig = Rig::online(Profile::WellBehaved);

        rig.close(
            code,
            r#"{"retry_after_ms":23417,"reason":"draining","slot":"s2","new":1}"#,
        );

        assert_eq!(rig.wait(), Duration::from_millis(23_417), "{code}");
        assert_eq!(rig.device.slot(), Some("s2"), "{code}");
    }
}

#[test]
fn close_with_a_broken_hint_is_a_close_without_one() {
    for reason in [
        "",
        "policy",
        "{",
        "[]",
        r#"{"retry_after_ms":-1}"#,
        r#"{"retry_after_ms":"5"}"#,
    ] {
        let mut rig = Rig::online(Profile::WellBehaved);
        rig.pass(STABLE);

        rig.close(1012, reason);

        assert!(rig.wait() <= 5 * SECOND, "{reason}");
    }
}

#[test]
fn reconnect_frame_counts_even_where_the_close_never_arrives() {
    let mut rig = Rig::online(Profile::WellBehaved);
    rig.device.handle_text(
        r#"{"type":"reconnect","after_ms":9000,"slot":"s3","reason":"draining"}"#,
        rig.now,
    );
    rig.pass(2 * SECOND);

    rig.lose();

    assert_eq!(rig.wait(), 7 * SECOND);
    assert_eq!(rig.device.slot(), Some("s3"));
}

#[test]
fn replaced_device_stays_away_for_a_quarter_of_an_hour() {
    let range = waits(Profile::WellBehaved, |rig| {
        rig.connect();
        rig.close(4500, "replaced");
    });

    assert!(
        *range.start() >= 900 * SECOND && *range.end() <= 1800 * SECOND,
        "{range:?}"
    );
    assert!(*range.end() > *range.start() + 600 * SECOND, "no jitter: {range:?}");
}

#[test]
fn duplicate_id_comes_back_after_being_replaced_but_ever_slower() {
    let mut rig = Rig::new(Profile::DuplicateId);
    for _ in 0..20 {
        rig.connect();
        rig.close(4500, "replaced");
        assert!(rig.wait() <= 60 * SECOND);
    }
    assert_eq!(rig.device.attempts(), 20);
}

#[test]
fn revoked_device_and_unknown_final_codes_never_come_back() {
    for code in [4501, 4502, 4999] {
        let mut rig = Rig::online(Profile::WellBehaved);
        rig.welcome();

        rig.close(code, r#"{"retry_after_ms":1}"#);

        assert_eq!(rig.device.state(), State::Stopped { code });
        assert_eq!(rig.device.poll_timeout(), None);
        assert_eq!(rig.device.resume(), None);
        rig.device.handle_restart(SECOND, rig.now);
        assert_eq!(rig.device.state(), State::Stopped { code });
    }
}

#[test]
fn attempt_is_given_up_ten_seconds_before_its_connection_and_a_minute_after() {
    let mut unreachable = Rig::new(Profile::WellBehaved);
    let mut silent = Rig::new(Profile::WellBehaved);
    let give_up = |rig: &mut Rig| {
        let began = rig.now;
        assert_eq!(rig.wake(), Some(Action::Abort));
        assert_eq!(rig.device.state(), State::Waiting);
        rig.now.saturating_since(began)
    };
    unreachable.wake();
    silent.wake();
    silent.now += Duration::from_secs(9);
    silent.device.handle_opened(silent.now);

    assert_eq!(give_up(&mut unreachable), CONNECT_TIMEOUT_DEFAULT);
    assert_eq!(give_up(&mut silent), ANSWER_TIMEOUT_DEFAULT);
}
