//! What this node remembers of devices: the slot each was given, and which have been seen authenticated. Both bounded.
//!
//! Both are hash maps in the order of entry, so that nothing depends on the hash. Their key is secret: ids come from outside, and
//! whoever could choose them to fall into one place would make every look there slow.

use std::hash::BuildHasher;

use indexmap::IndexMap;
use siphasher::sip::SipHasher13;

use super::{SLOT_GOOD_FOR, Slot, token::TenantTag};
use crate::{id::DeviceId, time::Instant};

/// Strangers fill at most one part in this many of the memory of slots: they are free to invent.
const STRANGERS_PART: usize = 4;
/// Remembered slots looked at a call, going round. A call adds one at most: so what is past goes faster than new ones come.
const EXPIRE_STEPS: usize = 4;
/// Second chances that a call gives to acquaintances: then the next goes, seen again or not.
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

/// Slots by device. Holds at most `slots_max`; a slot that finds no room lives in its token alone.
#[derive(Debug)]
pub(super) struct SlotMemory {
    slots: Map<Slot>,
    /// The place at which to look next for slots that are past.
    hand: usize,
    strangers: usize,
    slots_max: usize,
}

impl SlotMemory {
    pub fn new(slots_max: usize, key: [u8; 16]) -> Self {
        Self {
            slots: Map::with_hasher(Keyed::new(key)),
            hand: 0,
            strangers: 0,
            slots_max,
        }
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// The slot of `device`, unless it is past.
    pub fn get(&self, device: DeviceId, now: Instant) -> Option<Slot> {
        self.slots.get(&device).copied().filter(|slot| !is_past(slot, now))
    }

    /// `false` where there is no room.
    pub fn put(&mut self, device: DeviceId, slot: Slot, now: Instant) -> bool {
        self.expire(now);
        if let Some(remembered) = self.slots.get_mut(&device) {
            self.strangers -= usize::from(remembered.is_strangers());
            self.strangers += usize::from(slot.is_strangers());
            *remembered = slot;
            return true;
        }
        let is_full = self.slots.len() >= self.slots_max
            || (slot.is_strangers() && self.strangers >= self.slots_max / STRANGERS_PART);
        if is_full {
            return false;
        }
        self.strangers += usize::from(slot.is_strangers());
        self.slots.insert(device, slot);
        true
    }

    pub fn remove(&mut self, device: DeviceId) {
        if let Some(removed) = self.slots.swap_remove(&device) {
            self.strangers -= usize::from(removed.is_strangers());
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
                self.strangers -= usize::from(slot.is_strangers());
                // The last one comes here, and is looked at next.
                self.slots.swap_remove_index(self.hand);
            } else {
                self.hand += 1;
            }
        }
    }
}

fn is_past(slot: &Slot, now: Instant) -> bool {
    now > slot.at + SLOT_GOOD_FOR
}

/// Devices that were seen authenticated, and their tenants. At most `known_max`: the one not seen longest goes first, found by
/// giving each a second chance in the order of coming.
#[derive(Debug)]
pub(super) struct Known {
    devices: Map<Acquaintance>,
    /// Who has to go next, once there is no room.
    hand: usize,
    known_max: usize,
}

#[derive(Clone, Copy, Debug)]
struct Acquaintance {
    tenant: TenantTag,
    seen_again: bool,
}

impl Known {
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

    pub fn tenant_of(&self, device: DeviceId) -> Option<TenantTag> {
        self.devices.get(&device).map(|known| known.tenant)
    }

    pub fn meet(&mut self, device: DeviceId, tenant: TenantTag) {
        if let Some(known) = self.devices.get_mut(&device) {
            known.tenant = tenant;
            known.seen_again = true;
            return;
        }
        let seen_again = false;
        if self.devices.len() < self.known_max {
            self.devices.insert(device, Acquaintance { tenant, seen_again });
            return;
        }
        self.pass_over();
        // The last one comes to its place; then the new one and the last one change theirs.
        self.devices.swap_remove_index(self.hand);
        let (last, _) = self.devices.insert_full(device, Acquaintance { tenant, seen_again });
        self.devices.swap_indices(self.hand, last);
        self.step();
    }

    /// Who comes last takes its place in the order.
    pub fn forget(&mut self, device: DeviceId) {
        self.devices.swap_remove(&device);
    }

    /// Goes on to one that was not seen again, or past as many as a call may.
    fn pass_over(&mut self) {
        for _ in 0..CHANCES_MAX {
            match self.devices.get_index_mut(self.hand) {
                Some((_, known)) if known.seen_again => known.seen_again = false,
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
    use crate::slots::Place;

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
            bounces: 0,
            tenant: tenant.map(TenantTag::of),
            place: Place::Kept,
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
    fn strangers_leave_room_for_the_known() {
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

        // 600 come in the minute for which a slot is good; strangers have room for 250.
        assert!((1..=250).contains(&memory.len()), "{}", memory.len());
        assert_eq!(memory.strangers, memory.len());
    }

    #[test]
    fn memory_acts_alike_whatever_its_key() {
        let lives = [KEY, [8; 16]].map(|key| {
            let mut memory = SlotMemory::new(100, key);
            let mut known = Known::new(100, key);
            let mut stored = Vec::new();
            for n in 0..10_000 {
                let now = Instant::from_micros(n * 1_000_000);
                let id = device(u128::from(n * n % 977));
                stored.push(memory.put(id, slot(now, Some("a")), now));
                known.meet(id, TenantTag::of("a"));
                memory.remove(device(u128::from(n % 31)));
            }
            let met: Vec<bool> = (0..977).map(|n| known.tenant_of(device(n)).is_some()).collect();
            (stored, memory.len(), met)
        });

        assert_eq!(lives[0], lives[1]);
    }

    #[test]
    fn acquaintances_are_bounded_and_those_seen_again_stay() {
        let mut known = Known::new(100, KEY);
        let tenant = TenantTag::of("a");
        known.meet(device(0), tenant);
        for n in 1..250 {
            known.meet(device(n), tenant);
            known.meet(device(0), tenant);
        }

        assert_eq!(known.len(), 100);
        assert_eq!(known.tenant_of(device(0)), Some(tenant));
        assert_eq!(known.tenant_of(device(1)), None);
    }
}
