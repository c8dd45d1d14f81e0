//! A device in virtual time. This file has the rig, and what concerns all of its life.

use std::ops::RangeInclusive;

use proptest::prelude::*;
use rand::{SeedableRng, rngs::SmallRng};

use super::*;

mod returns;
mod sessions;

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
    /// something to wait for. A patient device in a session may wait for its gateway alone.
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
            let is_patient = profile == Profile::Patient && rig.device.state() == State::Online;
            if !is_patient && !matches!(rig.device.state(), State::Stopped { .. }) {
                prop_assert!(rig.device.poll_timeout().is_some());
            }
        }
    }
}
