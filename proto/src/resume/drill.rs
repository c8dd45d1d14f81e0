//! The drill: a few of those who came back by token are looked up all the same, after they were let in, so that the way to the
//! registry can't rot unseen, and a change made behind the gateway's back is found (overload.md section 3).

use std::{collections::VecDeque, time::Duration};

use rand::Rng;

use super::Grant;
use crate::{
    close::Close,
    record::{DeviceRecord, DeviceState},
    time::{Instant, WallTime},
};

/// The share of returns by token that is looked up.
pub const DRILL_SHARE: f64 = 0.01;
/// Least time between two of these look-ups.
pub const DRILL_INTERVAL: Duration = Duration::from_millis(100);
/// Most that wait for their look-up. One more is not looked up.
pub const DRILLS_WAITING_MAX: usize = 4_096;

/// Those who wait to be looked up.
#[derive(Debug)]
pub struct Drills<T> {
    waiting: VecDeque<T>,
    next_at: Instant,
}

/// What became of one who came back by token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offered {
    /// As 99 of 100.
    NotDrawn,
    Waiting,
    /// Too many wait already.
    Full,
}

impl<T> Default for Drills<T> {
    fn default() -> Self {
        Self {
            waiting: VecDeque::new(),
            next_at: Instant::ZERO,
        }
    }
}

impl<T> Drills<T> {
    /// Draws whether somebody who came back by token is to be looked up.
    pub fn offer(&mut self, case: impl FnOnce() -> T, rng: &mut impl Rng) -> Offered {
        if !rng.random_bool(DRILL_SHARE) {
            return Offered::NotDrawn;
        }
        if self.waiting.len() >= DRILLS_WAITING_MAX {
            return Offered::Full;
        }
        self.waiting.push_back(case());
        Offered::Waiting
    }

    /// The next one to look up. `is_idle`: nobody waits in the admission queue, and the breaker is closed.
    pub fn poll(&mut self, is_idle: bool, now: Instant) -> Option<T> {
        if !is_idle || now < self.next_at {
            return None;
        }
        let case = self.waiting.pop_front()?;
        self.next_at = now + DRILL_INTERVAL;
        if self.waiting.is_empty() {
            self.waiting = VecDeque::new();
        }
        Some(case)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

/// What the registry says of a device that came back by token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// What the token said.
    Confirmed,
    /// Another tenant or model: the session stays, the token does not count any more.
    Changed,
    /// The credential is not the device's.
    OtherCredential,
    Disabled,
    /// Revoked.
    Gone,
    /// Not registered. Nobody has recorded why: the registry may be at fault.
    Absent,
}

impl Finding {
    pub const ALL: [Self; 6] = [
        Self::Confirmed,
        Self::Changed,
        Self::OtherCredential,
        Self::Disabled,
        Self::Gone,
        Self::Absent,
    ];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Confirmed => "confirmed",
            Self::Changed => "changed",
            Self::OtherCredential => "other_credential",
            Self::Disabled => "disabled",
            Self::Gone => "gone",
            Self::Absent => "absent",
        }
    }

    /// Compares a token's word with the registry's. `None`: the device is not registered.
    #[must_use]
    pub fn of(grant: &Grant, record: Option<&DeviceRecord>, wall: WallTime) -> Self {
        let Some(record) = record else {
            return Self::Absent;
        };
        match record.state {
            DeviceState::Revoked => Self::Gone,
            DeviceState::Disabled => Self::Disabled,
            DeviceState::Enabled if !record.accepts(&grant.credential, wall) => Self::OtherCredential,
            DeviceState::Enabled if record.tenant != grant.tenant || record.model != grant.model => Self::Changed,
            DeviceState::Enabled => Self::Confirmed,
        }
    }

    /// How the session ends, if it must.
    pub fn close(self, rng: &mut impl Rng) -> Option<Close> {
        match self {
            Self::Confirmed | Self::Changed => None,
            // It comes back, and is told as everybody whose credential is wrong, or who is not registered.
            Self::OtherCredential | Self::Absent => Some(Close::disconnected(rng)),
            Self::Disabled => Some(Close::disabled(rng)),
            Self::Gone => Some(Close::Revoked),
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;
    use crate::{
        id::{DeviceId, Label, SecretHash},
        resume::Generation,
    };

    fn label(text: &str) -> Label {
        Label::parse(text).unwrap().unwrap()
    }

    fn grant() -> Grant {
        Grant {
            device: DeviceId::from_uuid(uuid::Uuid::from_u128(1)),
            credential: SecretHash::of(b"right").into(),
            tenant: label("acme"),
            model: Some(label("camera 2")),
            generation: Generation(7),
            credential_until: None,
        }
    }

    #[test]
    fn one_return_in_a_hundred_is_looked_up_at_a_pace_and_only_while_admission_is_idle() {
        let mut drills = Drills::default();
        let mut rng = SmallRng::seed_from_u64(5);
        let mut drawn = 0;
        for n in 0..100_000 {
            drawn += u32::from(drills.offer(|| n, &mut rng) == Offered::Waiting);
        }
        assert!((850..=1_150).contains(&drawn), "{drawn}");

        assert_eq!(drills.poll(false, Instant::ZERO), None);
        let mut looked_up = 0;
        for ms in 0..10_000 {
            let now = Instant::from_micros(ms * 1_000);
            looked_up += u32::from(drills.poll(true, now).is_some());
        }

        assert_eq!(looked_up, 100, "one in 100 ms");
    }

    #[test]
    fn drills_that_wait_are_bounded() {
        let mut drills = Drills::default();
        let mut rng = SmallRng::seed_from_u64(5);
        let mut is_full = false;

        for n in 0..600_000 {
            is_full |= drills.offer(|| n, &mut rng) == Offered::Full;
        }

        assert!(is_full);
        let waited = (0..u64::MAX)
            .map_while(|n| drills.poll(true, Instant::from_micros(n * 1_000_000)))
            .count();
        assert_eq!(waited, DRILLS_WAITING_MAX);
        assert!(drills.is_empty());
    }

    #[test]
    fn device_that_the_registry_does_not_have_is_never_told_to_stay_away() {
        let finding = Finding::of(&grant(), None, WallTime::default());
        let close = finding.close(&mut SmallRng::seed_from_u64(1));

        assert_eq!(finding, Finding::Absent);
        assert_eq!(close.map(|close| close.code()), Some(4003));
    }

    #[test]
    fn drill_finds_what_was_changed_behind_the_gateway_s_back() {
        let record = DeviceRecord {
            id: grant().device,
            tenant: label("acme"),
            model: Some(label("camera 2")),
            secret: *grant().credential.hash(),
            previous_secret: None,
            state: DeviceState::Enabled,
        };
        let finding = |change: fn(&mut DeviceRecord)| {
            let mut record = record.clone();
            change(&mut record);
            let finding = Finding::of(&grant(), Some(&record), WallTime::default());
            let close = finding.close(&mut SmallRng::seed_from_u64(1));
            (finding, close.map(|close| close.code()))
        };

        assert_eq!(finding(|_| {}), (Finding::Confirmed, None));
        assert_eq!(
            finding(|record| record.state = DeviceState::Disabled),
            (Finding::Disabled, Some(4002))
        );
        assert_eq!(
            finding(|record| record.state = DeviceState::Revoked),
            (Finding::Gone, Some(4501))
        );
        assert_eq!(
            finding(|record| record.secret = SecretHash::of(b"new")),
            (Finding::OtherCredential, Some(4003))
        );
        assert_eq!(
            finding(|record| record.tenant = label("other")),
            (Finding::Changed, None)
        );
    }
}
