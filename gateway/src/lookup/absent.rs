//! Ids that the registry was asked for and did not have: asking again soon would be wasted.
//!
//! An entry must never outlive the registration of its device. It carries the epoch of its bucket at the time its look-up was
//! *sent*, and counts only while the bucket has the same: registering a device moves its bucket's epoch on, and with it
//! whatever look-up was under way.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use moka::{Expiry, sync::Cache};
use rand::Rng;
use seawall_proto::id::DeviceId;

/// Most ids remembered, about 100 bytes each. Then those asked for least go.
const IDS_MAX: u64 = 65_536;
/// Shortest time that an id is remembered; up to twice that is drawn, so that ids learnt together aren't asked for together.
const REMEMBERED_FOR: Duration = Duration::from_secs(30);
/// A registered device moves the epoch of one bucket: its neighbours there, one id in 256, are asked for once more.
const BUCKETS: usize = 256;

pub(super) struct Absent {
    ids: Cache<DeviceId, Entry>,
    epochs: Box<[AtomicU32]>,
}

#[derive(Clone, Copy)]
struct Entry {
    epoch: Epoch,
    remembered_for: Duration,
}

/// The state of the registry that an answer belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Epoch(u32);

struct Drawn;

impl Expiry<DeviceId, Entry> for Drawn {
    fn expire_after_create(&self, _: &DeviceId, entry: &Entry, _: Instant) -> Option<Duration> {
        Some(entry.remembered_for)
    }

    fn expire_after_update(&self, _: &DeviceId, entry: &Entry, _: Instant, _: Option<Duration>) -> Option<Duration> {
        Some(entry.remembered_for)
    }
}

impl Absent {
    pub fn new() -> Self {
        Self {
            ids: Cache::builder().max_capacity(IDS_MAX).expire_after(Drawn).build(),
            epochs: std::iter::repeat_with(AtomicU32::default).take(BUCKETS).collect(),
        }
    }

    /// Before a look-up is sent.
    pub fn epoch(&self, device: DeviceId) -> Epoch {
        Epoch(self.bucket(device).load(Ordering::Acquire))
    }

    /// The look-up sent in `epoch` found no such device.
    pub fn learn(&self, device: DeviceId, epoch: Epoch, rng: &mut impl Rng) {
        let remembered_for = REMEMBERED_FOR.mul_f64(rng.random_range(1.0..=2.0));
        self.ids.insert(device, Entry { epoch, remembered_for });
    }

    pub fn contains(&self, device: DeviceId) -> bool {
        self.ids
            .get(&device)
            .is_some_and(|entry| entry.epoch == self.epoch(device))
    }

    /// The device was registered.
    pub fn forget(&self, device: DeviceId) {
        self.bucket(device).fetch_add(1, Ordering::AcqRel);
        self.ids.invalidate(&device);
    }

    /// Any number of devices were registered.
    pub fn forget_all(&self) {
        for epoch in &self.epochs {
            epoch.fetch_add(1, Ordering::AcqRel);
        }
        self.ids.invalidate_all();
    }

    /// By the last byte: random or counted in every version of UUID but those made from a host's address, which share a bucket at worst.
    fn bucket(&self, device: DeviceId) -> &AtomicU32 {
        let [.., last] = *device.as_bytes();
        &self.epochs[usize::from(last) % BUCKETS]
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::SmallRng};
    use uuid::Uuid;

    use super::*;

    fn device(n: u128) -> DeviceId {
        DeviceId::from_uuid(Uuid::from_u128(n))
    }

    #[test]
    fn absent_id_is_remembered_until_it_is_registered() {
        let absent = Absent::new();
        let mut rng = SmallRng::seed_from_u64(1);
        for n in [1, 2] {
            absent.learn(device(n), absent.epoch(device(n)), &mut rng);
        }

        absent.forget(device(1));

        assert!(!absent.contains(device(1)));
        assert!(absent.contains(device(2)));
        absent.forget_all();
        assert!(!absent.contains(device(2)));
    }

    #[test]
    fn answer_of_a_look_up_sent_before_the_registration_does_not_count() {
        let absent = Absent::new();
        let mut rng = SmallRng::seed_from_u64(1);
        let sent_in = absent.epoch(device(1));

        absent.forget(device(1));
        absent.learn(device(1), sent_in, &mut rng);

        assert!(!absent.contains(device(1)));
    }

    #[test]
    fn memory_is_bounded() {
        let absent = Absent::new();
        let mut rng = SmallRng::seed_from_u64(1);

        for n in 0..200_000 {
            absent.learn(device(n), absent.epoch(device(n)), &mut rng);
        }
        absent.ids.run_pending_tasks();

        assert!(absent.ids.entry_count() <= IDS_MAX);
    }
}
