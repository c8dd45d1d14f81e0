//! Revalidation: a few of the devices that a resume token admitted are looked up afterwards. So a broken path to the
//! registry is noticed, and a change made directly in the database is found (docs/design/static-stability.md).

use std::{collections::VecDeque, time::Duration};

use rand::Rng;

use super::Grant;
use crate::{
    close::Close,
    record::{DeviceRecord, DeviceState},
    time::{Instant, WallTime},
};

/// Share of the devices admitted by token that is looked up.
pub const REVALIDATION_SHARE: f64 = 0.01;
/// Minimum time between two of these lookups.
pub const REVALIDATION_INTERVAL: Duration = Duration::from_millis(100);
/// Maximum number of devices that wait for their lookup. Further ones are not looked up.
pub const REVALIDATIONS_WAITING_MAX: usize = 4_096;

/// Devices that wait to be looked up.
#[derive(Debug)]
pub struct Revalidations<T> {
    waiting: VecDeque<T>,
    next_at: Instant,
}

/// Result of offering a device that a token admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offered {
    /// Not selected, like 99 of 100 devices.
    NotDrawn,
    Waiting,
    /// The queue is full.
    Full,
}

impl<T> Default for Revalidations<T> {
    fn default() -> Self {
        Self {
            waiting: VecDeque::new(),
            next_at: Instant::ZERO,
        }
    }
}

impl<T> Revalidations<T> {
    /// Draws whether a device that a token admitted is looked up, and queues it.
    pub fn offer(&mut self, case: impl FnOnce() -> T, rng: &mut impl Rng) -> Offered {
        if !rng.random_bool(REVALIDATION_SHARE) {
            return Offered::NotDrawn;
        }
        if self.waiting.len() >= REVALIDATIONS_WAITING_MAX {
            return Offered::Full;
        }
        self.waiting.push_back(case());
        Offered::Waiting
    }

    /// Returns the next device to look up. `is_idle`: the admission queue is empty, and the breaker is closed.
    pub fn poll(&mut self, is_idle: bool, now: Instant) -> Option<T> {
        if !is_idle || now < self.next_at {
            return None;
        }
        let case = self.waiting.pop_front()?;
        self.next_at = now + REVALIDATION_INTERVAL;
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

crate::labels! {
    /// Result of looking up a device that a token admitted.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Finding {
        /// The registry agrees with the token.
        Confirmed = "confirmed",
        /// Another tenant or model: the session stays, the token is no longer valid.
        Changed = "changed",
        /// The credential is not the device's.
        OtherCredential = "other_credential",
        Disabled = "disabled",
        /// Revoked.
        Gone = "gone",
        /// Not registered, and no deletion is recorded: the registry may be at fault.
        Absent = "absent",
    }
}

impl Finding {
    /// Compares a token's data with the registry's. `None`: the device is not registered.
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

    /// The close of the session, if it must end.
    pub fn close(self, rng: &mut impl Rng) -> Option<Close> {
        match self {
            Self::Confirmed | Self::Changed => None,
            // It reconnects, and gets the answer of any device with a wrong credential or without a registration.
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
        let mut revalidations = Revalidations::default();
        let mut rng = SmallRng::seed_from_u64(5);
        let mut drawn = 0;
        for n in 0..100_000 {
            drawn += u32::from(revalidations.offer(|| n, &mut rng) == Offered::Waiting);
        }
        assert!((850..=1_150).contains(&drawn), "{drawn}");

        assert_eq!(revalidations.poll(false, Instant::ZERO), None);
        let mut looked_up = 0;
        for ms in 0..10_000 {
            let now = Instant::from_micros(ms * 1_000);
            looked_up += u32::from(revalidations.poll(true, now).is_some());
        }

        assert_eq!(looked_up, 100, "one in 100 ms");
    }

    #[test]
    fn revalidations_that_wait_are_bounded() {
        let mut revalidations = Revalidations::default();
        let mut rng = SmallRng::seed_from_u64(5);
        let mut is_full = false;

        for n in 0..600_000 {
            is_full |= revalidations.offer(|| n, &mut rng) == Offered::Full;
        }

        assert!(is_full);
        let waited = (0..u64::MAX)
            .map_while(|n| revalidations.poll(true, Instant::from_micros(n * 1_000_000)))
            .count();
        assert_eq!(waited, REVALIDATIONS_WAITING_MAX);
        assert!(revalidations.is_empty());
    }

    #[test]
    fn device_that_the_registry_does_not_have_is_never_told_to_stay_away() {
        let finding = Finding::of(&grant(), None, WallTime::default());
        let close = finding.close(&mut SmallRng::seed_from_u64(1));

        assert_eq!(finding, Finding::Absent);
        assert_eq!(close.map(|close| close.code()), Some(4003));
    }

    #[test]
    fn revalidation_finds_what_was_changed_behind_the_gateway_s_back() {
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
