//! What this node remembers of devices: their slots, and which were authenticated. Both are bounded.
//!
//! Both are hash maps in the order of insertion, so that nothing depends on the hash. The key of the hash is
//! secret: ids come from outside, and must not be chosen to collide.

use std::hash::BuildHasher;

use indexmap::IndexMap;
use siphasher::sip::SipHasher13;

use super::{SLOT_GOOD_FOR, Slot, token::TenantTag};
use crate::{id::DeviceId, time::Instant};

/// Part of the memory of slots that unknown devices may fill, because their ids can be invented freely.
const UNKNOWN_PART: usize = 4;
/// Number of remembered slots that each call checks in turn. A call adds at most one, so past slots are removed faster
/// than new ones are added.
const EXPIRE_STEPS: usize = 4;
/// Maximum number of second chances in a call. Then the next device is removed, referenced or not.
const CHANCES_MAX: usize = 7;

type Map<V> = IndexMap<DeviceId, V, Keyed>;

/// SipHash-1-3 with a secret key.
#[derive(Clone, Copy)]
struct Keyed(SipHasher13);

impl Keyed {
    fn new(key: [u8; 16]) -> Self {
        Self(SipHasher13::new_with_key(&key))
    }
}

impl BuildHasher for Keyed {
    type Hasher = SipHasher13;

    fn build_hasher(&self) -> SipHasher13 {
        self.0
    }
}

impl std::fmt::Debug for Keyed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keyed").finish_non_exhaustive()
    }
}

/// Slots by device, at most `slots_max`. A further slot is in its token only.
#[derive(Debug)]
pub(super) struct SlotMemory {
    slots: Map<Slot>,
    /// Index at which the next check for past slots begins.
    hand: usize,
    unknown: usize,
    slots_max: usize,
}

impl SlotMemory {
    pub fn new(slots_max: usize, key: [u8; 16]) -> Self {
        Self {
            slots: Map::with_hasher(Keyed::new(key)),
            hand: 0,
            unknown: 0,
            slots_max,
        }
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Makes room for this number of devices at once. Growing by doubling takes many milliseconds in the middle of a
    /// storm, while all devices wait.
    pub fn make_room(&mut self, devices: usize) {
        make_room(&mut self.slots, devices.min(self.slots_max));
    }

    /// The slot of `device`, unless it is past.
    pub fn get(&self, device: DeviceId, now: Instant) -> Option<Slot> {
        self.slots.get(&device).copied().filter(|slot| !is_past(slot, now))
    }

    /// Returns `false` if there is no room.
    pub fn put(&mut self, device: DeviceId, slot: Slot, now: Instant) -> bool {
        self.expire(now);
        if let Some(remembered) = self.slots.get_mut(&device) {
            self.unknown -= usize::from(remembered.is_unknown());
            self.unknown += usize::from(slot.is_unknown());
            *remembered = slot;
            return true;
        }
        let is_full =
            self.slots.len() >= self.slots_max || (slot.is_unknown() && self.unknown >= self.slots_max / UNKNOWN_PART);
        if is_full {
            return false;
        }
        self.unknown += usize::from(slot.is_unknown());
        self.slots.insert(device, slot);
        true
    }

    pub fn remove(&mut self, device: DeviceId) {
        if let Some(removed) = self.slots.swap_remove(&device) {
            self.unknown -= usize::from(removed.is_unknown());
        }
    }

    /// Forgets a few slots that are past.
    fn expire(&mut self, now: Instant) {
        for _ in 0..EXPIRE_STEPS {
            let Some((_, slot)) = self.slots.get_index(self.hand) else {
                self.hand = 0;
                return;
            };
            if is_past(slot, now) {
                self.unknown -= usize::from(slot.is_unknown());
                // The last entry moves to this index, and is checked next.
                self.slots.swap_remove_index(self.hand);
            } else {
                self.hand += 1;
            }
        }
    }
}

fn make_room<V>(map: &mut Map<V>, len: usize) {
    map.reserve(len.saturating_sub(map.len()));
}

fn is_past(slot: &Slot, now: Instant) -> bool {
    now > slot.at + SLOT_GOOD_FOR
}

/// Devices that were authenticated or registered here, with their tenants. At most `known_max`: beyond it a device that
/// was not seen lately is removed by the CLOCK algorithm (second chance).
#[derive(Debug)]
pub(super) struct KnownDevices {
    devices: Map<KnownDevice>,
    /// Index of the clock hand.
    hand: usize,
    known_max: usize,
}

#[derive(Clone, Copy, Debug)]
struct KnownDevice {
    tenant: TenantTag,
    is_referenced: bool,
}

impl KnownDevices {
    pub fn new(known_max: usize, key: [u8; 16]) -> Self {
        Self {
            devices: Map::with_hasher(Keyed::new(key)),
            hand: 0,
            known_max,
        }
    }

    pub fn len(&self) -> usize {
        self.devices.len()
    }

    /// See [`SlotMemory::make_room`].
    pub fn make_room(&mut self, devices: usize) {
        make_room(&mut self.devices, devices.min(self.known_max));
    }

    pub fn tenant_of(&self, device: DeviceId) -> Option<TenantTag> {
        self.devices.get(&device).map(|known| known.tenant)
    }

    pub fn insert(&mut self, device: DeviceId, tenant: TenantTag) {
        if let Some(known) = self.devices.get_mut(&device) {
            known.tenant = tenant;
            known.is_referenced = true;
            return;
        }
        let is_referenced = false;
        if self.devices.len() < self.known_max {
            self.devices.insert(device, KnownDevice { tenant, is_referenced });
            return;
        }
        self.sweep();
        // The last entry moves to this index; then the new one and the last one swap.
        self.devices.swap_remove_index(self.hand);
        let (last, _) = self.devices.insert_full(device, KnownDevice { tenant, is_referenced });
        self.devices.swap_indices(self.hand, last);
        self.step();
    }

    /// Forgets a device. The last entry moves to its index.
    pub fn forget(&mut self, device: DeviceId) {
        self.devices.swap_remove(&device);
    }

    /// Advances the hand to a device that was not referenced, at most by [`CHANCES_MAX`].
    fn sweep(&mut self) {
        for _ in 0..CHANCES_MAX {
            match self.devices.get_index_mut(self.hand) {
                Some((_, known)) if known.is_referenced => known.is_referenced = false,
                Some(_) | None => return,
            }
            self.step();
        }
    }

    const fn step(&mut self) {
        self.hand += 1;
        if self.hand >= self.known_max {
            self.hand = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::slots::Ownership;

    const KEY: [u8; 16] = [7; 16];
    /// Time after which a slot of time zero is past, whatever the rounding.
    const FORGOTTEN_AFTER: Duration = Duration::from_secs(62);

    fn device(n: u128) -> DeviceId {
        DeviceId::from_uuid(uuid::Uuid::from_u128(n))
    }

    fn slot(at: Instant, tenant: Option<&str>) -> Slot {
        Slot {
            at,
            first_unix_s: 0,
            refusals: 0,
            tenant: tenant.map(TenantTag::of),
            ownership: Ownership::Sole,
        }
    }

    #[test]
    fn past_slots_are_forgotten_and_their_room_is_used_again() {
        let mut memory = SlotMemory::new(1_000, KEY);
        for n in 0..1_000 {
            assert!(memory.put(device(n), slot(Instant::ZERO, Some("a")), Instant::ZERO));
        }
        assert!(!memory.put(device(2_000), slot(Instant::ZERO, Some("a")), Instant::ZERO));

        let later = Instant::ZERO + FORGOTTEN_AFTER;
        let stored = (3_000..4_000)
            .filter(|n| memory.put(device(*n), slot(later, Some("a")), later))
            .count();

        assert_eq!(stored, 1_000);
        assert_eq!(memory.get(device(1), later), None);
        assert!(memory.len() <= 1_000);
    }

    #[test]
    fn registered_devices_never_make_the_memory_grow() {
        let mut memory = SlotMemory::new(5_000, KEY);
        let mut known = KnownDevices::new(5_000, KEY);
        memory.make_room(usize::MAX);
        known.make_room(usize::MAX);
        let capacity = (memory.slots.capacity(), known.devices.capacity());
        assert!(capacity.0 < 20_000, "bounded: {capacity:?}");

        for n in 0..5_000 {
            memory.put(device(n), slot(Instant::ZERO, Some("a")), Instant::ZERO);
            known.insert(device(n), TenantTag::of("a"));
        }

        assert_eq!((memory.slots.capacity(), known.devices.capacity()), capacity);
    }

    #[test]
    fn slot_moved_ahead_outlives_its_first_time() {
        let mut memory = SlotMemory::new(10, KEY);
        memory.put(device(1), slot(Instant::ZERO, None), Instant::ZERO);
        let moved = slot(Instant::ZERO + Duration::from_secs(100), None);
        memory.put(device(1), moved, Instant::ZERO);

        let later = Instant::ZERO + Duration::from_secs(90);
        memory.put(device(2), slot(later, None), later);

        assert_eq!(memory.get(device(1), later), Some(moved));
    }

    #[test]
    fn unknown_devices_leave_room_for_known_ones() {
        let mut memory = SlotMemory::new(1_000, KEY);
        for n in 0..5_000 {
            memory.put(device(n), slot(Instant::ZERO, None), Instant::ZERO);
        }

        assert_eq!(memory.len(), 250);
        assert!(memory.put(device(9_999), slot(Instant::ZERO, Some("a")), Instant::ZERO));
    }

    #[test]
    fn what_is_past_is_forgotten_while_others_come_and_go() {
        let mut memory = SlotMemory::new(1_000, KEY);
        let mut now = Instant::ZERO;
        for n in 0..100_000 {
            now += Duration::from_millis(100);
            assert!(memory.put(device(n), slot(now, None), now) || memory.len() >= 250);
            memory.remove(device(n / 2));
        }

        // 600 arrive in the minute for which a slot is valid; there is room for 250 unknown devices.
        assert!((1..=250).contains(&memory.len()), "{}", memory.len());
        assert_eq!(memory.unknown, memory.len());
    }

    #[test]
    fn memory_acts_alike_whatever_its_key() {
        let lives = [KEY, [8; 16]].map(|key| {
            let mut memory = SlotMemory::new(100, key);
            let mut known = KnownDevices::new(100, key);
            let mut stored = Vec::new();
            for n in 0..10_000 {
                let now = Instant::from_micros(n * 1_000_000);
                let id = device(u128::from(n * n % 977));
                stored.push(memory.put(id, slot(now, Some("a")), now));
                known.insert(id, TenantTag::of("a"));
                memory.remove(device(u128::from(n % 31)));
            }
            let met: Vec<bool> = (0..977).map(|n| known.tenant_of(device(n)).is_some()).collect();
            (stored, memory.len(), met)
        });

        assert_eq!(lives[0], lives[1]);
    }

    #[test]
    fn acquaintances_are_bounded_and_those_seen_again_stay() {
        let mut known = KnownDevices::new(100, KEY);
        let tenant = TenantTag::of("a");
        known.insert(device(0), tenant);
        for n in 1..250 {
            known.insert(device(n), tenant);
            known.insert(device(0), tenant);
        }

        assert_eq!(known.len(), 100);
        assert_eq!(known.tenant_of(device(0)), Some(tenant));
        assert_eq!(known.tenant_of(device(1)), None);
    }
}
