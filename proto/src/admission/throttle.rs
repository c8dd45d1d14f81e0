//! The throttle of wrong credentials, by device id: a GCRA each, in bounded memory.
//!
//! It can't lock a device out: with a due slot nobody is throttled, and a throttled attempt is given a slot. But an id that
//! someone guesses at is *disputed* and loses its priority to others for a while, or guessing would be a way to the front.
//!
//! Secrets and certificates have books of their own: anybody can send a wrong secret, and it says nothing of a device that its
//! certificate proves. What counts there is a certificate of a device that the registry does not have, or no longer.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use crate::{
    id::{DeviceId, Proof},
    time::Instant,
};

/// Wrong credentials in a row that are looked up without delay.
const BURST: u32 = 10;
/// One more is forgiven each. A device that keeps to the hints of 401 (1 to 5 min) never reaches the throttle.
const FORGIVEN_EVERY: Duration = Duration::from_secs(30);
/// Ids watched, about 40 bytes each. Then the one watched longest is forgotten: an attacker with more ids than that is slowed
/// by the strangers' small queue instead.
const IDS_MAX: usize = 65_536;

/// An id, and what the claim to be it rests on.
pub(super) type Claim = (DeviceId, Proof);

#[derive(Debug, Default)]
pub(super) struct Throttle {
    /// The time at which all is forgiven.
    clean_at: BTreeMap<Claim, Instant>,
    order: VecDeque<Claim>,
}

impl Throttle {
    /// A look-up ended with a wrong credential, or no such device: the two must look the same.
    pub fn handle_wrong(&mut self, claim: Claim, now: Instant) {
        let worst = now + FORGIVEN_EVERY * BURST;
        if let Some(clean_at) = self.clean_at.get_mut(&claim) {
            *clean_at = ((*clean_at).max(now) + FORGIVEN_EVERY).min(worst);
            return;
        }
        if self.clean_at.len() >= IDS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.clean_at.remove(&oldest);
        }
        self.order.push_back(claim);
        self.clean_at.insert(claim, now + FORGIVEN_EVERY);
    }

    /// The device was registered, or given another credential: what was wrong before says nothing now.
    pub fn forgive(&mut self, device: DeviceId) {
        for claim in [(device, Proof::Secret), (device, Proof::Certificate)] {
            if self.clean_at.remove(&claim).is_some() {
                self.order.retain(|watched| *watched != claim);
            }
        }
    }

    /// Any number of devices were registered.
    pub fn forgive_all(&mut self) {
        *self = Self::default();
    }

    /// Too many, too lately.
    pub fn is_throttled(&self, claim: Claim, now: Instant) -> bool {
        self.clean_at
            .get(&claim)
            .is_some_and(|clean_at| clean_at.saturating_since(now) > FORGIVEN_EVERY * (BURST - 1))
    }

    /// More than one lately.
    pub fn is_disputed(&self, claim: Claim, now: Instant) -> bool {
        self.clean_at
            .get(&claim)
            .is_some_and(|clean_at| clean_at.saturating_since(now) > FORGIVEN_EVERY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(n: u128) -> Claim {
        (DeviceId::from_uuid(uuid::Uuid::from_u128(n)), Proof::Secret)
    }

    fn certified(n: u128) -> Claim {
        (device(n).0, Proof::Certificate)
    }

    #[test]
    fn wrong_secrets_say_nothing_of_a_certificate() {
        let mut throttle = Throttle::default();
        for _ in 0..BURST {
            throttle.handle_wrong(device(1), Instant::ZERO);
        }

        assert!(throttle.is_throttled(device(1), Instant::ZERO));
        assert!(!throttle.is_throttled(certified(1), Instant::ZERO));
        assert!(!throttle.is_disputed(certified(1), Instant::ZERO));
    }

    #[test]
    fn certificate_of_no_device_is_throttled_by_itself_and_forgiven_with_the_device() {
        let mut throttle = Throttle::default();
        for _ in 0..BURST {
            throttle.handle_wrong(certified(1), Instant::ZERO);
        }

        assert!(throttle.is_throttled(certified(1), Instant::ZERO));
        assert!(!throttle.is_throttled(device(1), Instant::ZERO));
        throttle.forgive(device(1).0);
        assert!(!throttle.is_throttled(certified(1), Instant::ZERO));
        assert!(throttle.order.is_empty());
    }

    #[test]
    fn registration_forgives_the_device_and_nobody_else() {
        let mut throttle = Throttle::default();
        for _ in 0..BURST {
            throttle.handle_wrong(device(1), Instant::ZERO);
            throttle.handle_wrong(device(2), Instant::ZERO);
        }

        throttle.forgive(device(1).0);

        assert!(!throttle.is_throttled(device(1), Instant::ZERO) && !throttle.is_disputed(device(1), Instant::ZERO));
        assert!(throttle.is_throttled(device(2), Instant::ZERO));
        assert_eq!(throttle.order.len(), throttle.clean_at.len());
        throttle.forgive_all();
        assert!(!throttle.is_throttled(device(2), Instant::ZERO));
    }

    #[test]
    fn eleventh_wrong_credential_in_a_row_is_throttled_and_forgiven_later() {
        let mut throttle = Throttle::default();
        for _ in 0..BURST {
            assert!(!throttle.is_throttled(device(1), Instant::ZERO));
            throttle.handle_wrong(device(1), Instant::ZERO);
        }

        assert!(throttle.is_throttled(device(1), Instant::ZERO));
        assert!(!throttle.is_throttled(device(2), Instant::ZERO));
        assert!(!throttle.is_throttled(device(1), Instant::ZERO + FORGIVEN_EVERY));
    }

    #[test]
    fn device_that_keeps_to_the_hint_is_never_throttled() {
        let mut throttle = Throttle::default();

        for minute in 0..1_000 {
            let now = Instant::ZERO + Duration::from_secs(60 * minute);
            assert!(!throttle.is_throttled(device(1), now));
            throttle.handle_wrong(device(1), now);
        }
    }

    #[test]
    fn memory_is_bounded() {
        let mut throttle = Throttle::default();

        for n in 0..200_000 {
            throttle.handle_wrong(device(n), Instant::ZERO);
        }

        assert_eq!(throttle.clean_at.len(), IDS_MAX);
        assert_eq!(throttle.order.len(), IDS_MAX);
    }
}
