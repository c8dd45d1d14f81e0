use std::ops::RangeInclusive;

use proptest::prelude::*;
use rand::{SeedableRng, rngs::SmallRng};

use super::*;

/// A device, its clock and its chance.
struct Rig {
    device: Device,
    now: Instant,
    rng: SmallRng,
}

impl Rig {
    fn new(profile: Profile) -> Self {
        Self {
            device: Device::new(profile, Instant::ZERO),
            now: Instant::ZERO,
            rng: SmallRng::seed_from_u64(42),
        }
    }

    fn online(profile: Profile) -> Self {
        let mut rig = Self::new(profile);
        rig.connect();
        rig
    }

    /// Time passes until the device moves by itself.
    fn wake(&mut self) -> Option<Action> {
        self.now = self.device.poll_timeout().expect("a device that waits for something");
        self.device.handle_timeout(self.now, &mut self.rng);
        self.device.poll_action()
    }

    fn connect(&mut self) {
        assert_eq!(self.wake(), Some(Action::Connect));
        self.device.handle_connected(self.now, &mut self.rng);
    }

    fn welcome(&mut self) {
        let text = r#"{"type":"welcome","session":"1","heartbeat_ms":30000,"backoff_cap_ms":60000,"resume":"r1","server_time":"x"}"#;
        self.device.handle_text(text, self.now);
    }

    fn refuse(&mut self, after_ms: u64, slot: Option<&str>) {
        let hint = Hint {
            after: Duration::from_millis(after_ms),
            slot: slot.map(Box::from),
        };
        self.device.handle_refused(Some(hint), self.now, &mut self.rng);
    }

    fn fail(&mut self) {
        self.device.handle_failed(self.now, &mut self.rng);
    }

    fn close(&mut self, code: u16, reason: &str) {
        let frame = CloseFrame { code, reason };
        self.device.handle_closed(Some(frame), self.now, &mut self.rng);
    }

    fn lose(&mut self) {
        self.device.handle_closed(None, self.now, &mut self.rng);
    }

    fn pass(&mut self, span: Duration) {
        self.now += span;
    }

    /// From now until the next attempt.
    fn wait(&self) -> Duration {
        assert_eq!(self.device.state(), State::Waiting);
        self.device.poll_timeout().unwrap().saturating_since(self.now)
    }
}

const SECOND: Duration = Duration::from_secs(1);

/// The least and the greatest wait over many devices that lived through the same.
fn waits(profile: Profile, story: impl Fn(&mut Rig)) -> RangeInclusive<Duration> {
    let waits: Vec<Duration> = (0..500)
        .map(|seed| {
            let mut rig = Rig::new(profile);
            rig.rng = SmallRng::seed_from_u64(seed);
            story(&mut rig);
            rig.wait()
        })
        .collect();
    *waits.iter().min().unwrap()..=*waits.iter().max().unwrap()
}

#[test]
fn device_is_small_enough_for_ten_million() {
    assert!(size_of::<Device>() <= 136, "{} bytes", size_of::<Device>());
}

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
fn attempt_without_an_answer_is_given_up_after_a_minute() {
    let mut rig = Rig::new(Profile::WellBehaved);
    rig.wake();

    assert_eq!(rig.wake(), Some(Action::Abort));

    assert_eq!(rig.now, Instant::ZERO + 60 * SECOND);
    assert!(rig.wait() <= SECOND);
}

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
fn half_open_device_is_silent_for_two_minutes() {
    let mut rig = Rig::online(Profile::HalfOpen);
    rig.welcome();

    assert_eq!(rig.wake(), Some(Action::Abort));
    assert_eq!(rig.now, Instant::ZERO + HALF_OPEN_SILENCE);
}

#[test]
fn flapping_device_is_off_and_back_within_seconds_but_obeys_hints() {
    let mut rig = Rig::online(Profile::Flapping);

    assert_eq!(rig.wake(), Some(Action::Abort));
    assert!((SECOND..=5 * SECOND).contains(&rig.now.saturating_since(Instant::ZERO)));
    assert!(rig.wait() <= SECOND);
    rig.wake();
    rig.refuse(300_000, None);
    assert_eq!(rig.wait(), 300 * SECOND);
}

#[test]
fn synchronised_profiles_return_in_one_instant() {
    for (profile, wait) in [
        (Profile::Fixed { seconds: 5 }, 5 * SECOND),
        (Profile::ExponentialNoJitter, SECOND),
        (Profile::Immediate, IMMEDIATE),
    ] {
        let range = waits(profile, |rig| {
            rig.connect();
            rig.pass(STABLE);
            rig.lose();
        });

        assert_eq!(range, wait..=wait, "{profile}");
    }
}

#[test]
fn restarted_device_forgets_what_it_had_in_memory() {
    let mut rig = Rig::online(Profile::WellBehaved);
    rig.welcome();

    rig.device.handle_restart(SECOND, rig.now);

    assert_eq!(rig.device.poll_action(), Some(Action::Abort));
    assert_eq!(rig.wait(), SECOND);
    assert_eq!((rig.device.resume(), rig.device.attempts()), (None, 0));
}

#[test]
fn device_without_a_first_attempt_waits_to_be_started() {
    let mut device = Device::new(Profile::WellBehaved, Instant::FAR_FUTURE);
    assert_eq!(device.poll_timeout(), None);

    device.handle_restart(Duration::ZERO, Instant::ZERO);

    assert_eq!(device.poll_timeout(), Some(Instant::ZERO));
}

#[test]
fn same_seed_gives_the_same_life() {
    let life = || {
        let mut rig = Rig::new(Profile::WellBehaved);
        (0..50)
            .map(|n| {
                rig.wake();
                if n % 7 == 0 {
                    rig.refuse(5_000, None)
                } else {
                    rig.fail()
                }
                rig.now
            })
            .collect::<Vec<_>>()
    };

    assert_eq!(life(), life());
}

proptest! {
    /// Whatever comes, in whatever order: no panic, no action left behind, and a device that is not stopped always has
    /// something to wait for.
    #[test]
    fn no_order_of_events_strands_a_device(
        profile in prop::sample::select(Profile::ALL.to_vec()),
        events in prop::collection::vec((0_u8..10, 0_u64..100_000, any::<u16>()), 1..80),
    ) {
        let mut rig = Rig::new(profile);
        for (event, ms, code) in events {
            rig.pass(Duration::from_millis(ms));
            match event {
                0 | 1 => rig.device.handle_timeout(rig.now, &mut rig.rng),
                2 | 3 => rig.device.handle_connected(rig.now, &mut rig.rng),
                4 => rig.refuse(ms, Some("s")),
                5 => rig.fail(),
                6 => rig.close(code % 5000, &format!("{{\"retry_after_ms\":{ms}}}")),
                7 => rig.lose(),
                8 => rig.device.handle_text("{\"type\":\"message\",\"id\":\"1\",\"payload\":1}", rig.now),
                _ => rig.device.handle_restart(SECOND, rig.now),
            }
            rig.device.poll_action();
            prop_assert!(rig.device.poll_action().is_none());
            if !matches!(rig.device.state(), State::Stopped { .. }) {
                prop_assert!(rig.device.poll_timeout().is_some());
            }
        }
    }
}
