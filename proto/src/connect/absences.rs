//! Ids that the registry did not have when it was queried, so that they are not looked up again soon.

use std::{collections::BTreeMap, time::Duration};

use rand::Rng;

use crate::{id::DeviceId, time::Instant};

/// Maximum number of ids that are remembered, about 60 bytes each. Beyond it an arbitrary one is forgotten.
const IDS_MAX: usize = 65_536;
/// Minimum time for which an id is remembered; the maximum is twice that. It is drawn, so that ids learnt together are
/// not queried together.
const REMEMBERED_FOR: Duration = Duration::from_secs(30);
/// Registrations are counted by the last byte of the id, which is random or a counter in nearly every version of UUID.
const BUCKETS: usize = 256;

/// Ids that are known to be absent. An entry never outlives the registration of its device: a lookup that was sent
/// before a registration adds none of the ids of its bucket.
#[derive(Debug)]
pub(super) struct Absences {
    /// Time until which each id is remembered.
    ids: BTreeMap<DeviceId, Instant>,
    registrations: Registrations,
    /// The last registration of each bucket.
    last_of: Box<[Registrations; BUCKETS]>,
    /// The last registration of any number of devices.
    last_of_all: Registrations,
}

/// Number of registrations that this node has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Registrations(u64);

impl Absences {
    pub fn new() -> Self {
        Self {
            ids: BTreeMap::new(),
            registrations: Registrations::default(),
            last_of: Box::new([Registrations::default(); BUCKETS]),
            last_of_all: Registrations::default(),
        }
    }

    /// Value to keep with a lookup when it is sent.
    pub const fn registrations(&self) -> Registrations {
        self.registrations
    }

    /// A lookup that was sent after `sent_after` did not find the device.
    pub fn learn(&mut self, device: DeviceId, sent_after: Registrations, now: Instant, rng: &mut impl Rng) {
        if sent_after < self.last_of_all || sent_after < self.last_of[bucket(device)] {
            return;
        }
        if self.ids.len() >= IDS_MAX {
            // The next id in order. Ids are random, unless a client invents them.
            let next = self.ids.range(device..).next().or_else(|| self.ids.iter().next());
            let next = next.map(|(id, _)| *id);
            next.map(|id| self.ids.remove(&id));
        }
        self.ids
            .insert(device, now + REMEMBERED_FOR.mul_f64(rng.random_range(1.0..=2.0)));
    }

    pub fn contains(&self, device: DeviceId, now: Instant) -> bool {
        self.ids.get(&device).is_some_and(|until| now < *until)
    }

    /// The device was registered.
    pub fn handle_registered(&mut self, device: DeviceId) {
        self.registrations.0 += 1;
        self.last_of[bucket(device)] = self.registrations;
        self.ids.remove(&device);
    }

    /// Any number of devices were registered.
    pub fn handle_many_registered(&mut self) {
        self.registrations.0 += 1;
        self.last_of_all = self.registrations;
        self.ids.clear();
    }
}

fn bucket(device: DeviceId) -> usize {
    let [.., last] = *device.as_bytes();
    usize::from(last)
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::SmallRng};
    use uuid::Uuid;

    use super::*;

    const NOW: Instant = Instant::ZERO;

    fn device(n: u128) -> DeviceId {
        DeviceId::from_uuid(Uuid::from_u128(n))
    }

    fn with(ids: impl IntoIterator<Item = u128>) -> Absences {
        let mut absences = Absences::new();
        let mut rng = SmallRng::seed_from_u64(1);
        for n in ids {
            absences.learn(device(n), absences.registrations(), NOW, &mut rng);
        }
        absences
    }

    #[test]
    fn absent_id_is_remembered_until_it_is_registered() {
        let mut absences = with([1, 2]);

        absences.handle_registered(device(1));

        assert!(!absences.contains(device(1), NOW));
        assert!(absences.contains(device(2), NOW));
        absences.handle_many_registered();
        assert!(!absences.contains(device(2), NOW));
    }

    #[test]
    fn answer_of_a_look_up_sent_before_the_registration_does_not_count() {
        let mut rng = SmallRng::seed_from_u64(1);
        for register in [
            (|absences| absences.handle_registered(device(1))) as fn(&mut Absences),
            Absences::handle_many_registered,
        ] {
            let mut absences = Absences::new();
            let sent_after = absences.registrations();

            register(&mut absences);
            absences.learn(device(1), sent_after, NOW, &mut rng);

            assert!(!absences.contains(device(1), NOW));
        }
    }

    #[test]
    fn absent_id_is_asked_for_again_after_half_a_minute_to_a_minute() {
        let absences = with(0..1_000);
        let known = |after| {
            (0..1_000)
                .filter(|n| absences.contains(device(*n), NOW + after))
                .count()
        };

        assert_eq!(known(REMEMBERED_FOR - Duration::from_millis(1)), 1_000);
        assert!((300..700).contains(&known(REMEMBERED_FOR * 3 / 2)));
        assert_eq!(known(REMEMBERED_FOR * 2 + Duration::from_millis(1)), 0);
    }

    #[test]
    fn memory_is_bounded() {
        let absences = with(0..200_000);

        assert_eq!(absences.ids.len(), IDS_MAX);
        assert!(absences.contains(device(199_999), NOW));
    }
}
