//! What this node remembers of devices: the slot each was given, and which have been seen authenticated. Both bounded.

use std::collections::{BTreeMap, VecDeque};

use super::{SLOT_GOOD_FOR, Slot, token::TenantTag};
use crate::{id::DeviceId, time::Instant};

/// Strangers fill at most one part in this many of the memory of slots: they are free to invent.
const STRANGERS_PART: usize = 4;
/// Entries of the expiry list looked at a call: more than one comes with a call, so that the list shrinks faster than it grows.
const EXPIRE_STEPS: usize = 8;

/// Slots by device. Holds at most `slots_max`; a slot that finds no room lives in its token alone.
#[derive(Debug)]
pub(super) struct SlotMemory {
    slots: BTreeMap<DeviceId, Remembered>,
    /// By the second at which a look is due. One entry a remembered slot; entries of slots that were cleared stay until then.
    expiries: BTreeMap<u32, Vec<DeviceId>>,
    expiries_len: usize,
    strangers: usize,
    slots_max: usize,
}

#[derive(Clone, Copy, Debug)]
struct Remembered {
    slot: Slot,
    /// The second in `expiries` that holds this device.
    listed: u32,
}

impl SlotMemory {
    pub const fn new(slots_max: usize) -> Self {
        Self {
            slots: BTreeMap::new(),
            expiries: BTreeMap::new(),
            expiries_len: 0,
            strangers: 0,
            slots_max,
        }
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// The slot of `device`, unless it is past.
    pub fn get(&self, device: DeviceId, now: Instant) -> Option<Slot> {
        let remembered = self.slots.get(&device)?;
        (now <= remembered.slot.at + SLOT_GOOD_FOR).then_some(remembered.slot)
    }

    /// `false` where there is no room.
    pub fn put(&mut self, device: DeviceId, slot: Slot, now: Instant) -> bool {
        self.expire(now);
        if let Some(remembered) = self.slots.get_mut(&device) {
            self.strangers -= usize::from(remembered.slot.is_strangers());
            self.strangers += usize::from(slot.is_strangers());
            remembered.slot = slot;
            return true;
        }
        let is_full = self.slots.len() >= self.slots_max
            || self.expiries_len >= self.slots_max.saturating_mul(2)
            || (slot.is_strangers() && self.strangers >= self.slots_max / STRANGERS_PART);
        if is_full {
            return false;
        }
        let listed = expiry(slot);
        self.strangers += usize::from(slot.is_strangers());
        self.slots.insert(device, Remembered { slot, listed });
        self.list(listed, device);
        true
    }

    pub fn remove(&mut self, device: DeviceId) {
        if let Some(removed) = self.slots.remove(&device) {
            self.strangers -= usize::from(removed.slot.is_strangers());
        }
    }

    fn list(&mut self, second: u32, device: DeviceId) {
        self.expiries.entry(second).or_default().push(device);
        self.expiries_len += 1;
    }

    /// Forgets a few slots that are past.
    fn expire(&mut self, now: Instant) {
        for _ in 0..EXPIRE_STEPS {
            let Some(mut entry) = self.expiries.first_entry() else {
                return;
            };
            let second = *entry.key();
            if second >= seconds(now) {
                return;
            }
            let Some(device) = entry.get_mut().pop() else {
                entry.remove();
                continue;
            };
            self.expiries_len -= 1;
            let Some(remembered) = self.slots.get_mut(&device) else {
                continue;
            };
            if remembered.listed != second {
                continue;
            }
            let due = expiry(remembered.slot);
            if due > second {
                remembered.listed = due;
                self.list(due, device);
            } else {
                self.remove(device);
            }
        }
    }
}

/// The first whole second at which the slot is past.
fn expiry(slot: Slot) -> u32 {
    seconds(slot.at + SLOT_GOOD_FOR).saturating_add(1)
}

fn seconds(at: Instant) -> u32 {
    u32::try_from(at.as_micros() / 1_000_000).unwrap_or(u32::MAX)
}

/// Devices that were seen authenticated, and their tenants. At most `known_max`: the one not seen longest goes first, found by
/// giving each a second chance in the order of coming.
#[derive(Debug)]
pub(super) struct Known {
    devices: BTreeMap<DeviceId, Acquaintance>,
    order: VecDeque<DeviceId>,
    known_max: usize,
}

#[derive(Clone, Copy, Debug)]
struct Acquaintance {
    tenant: TenantTag,
    seen_again: bool,
}

impl Known {
    pub const fn new(known_max: usize) -> Self {
        Self {
            devices: BTreeMap::new(),
            order: VecDeque::new(),
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
        if self.devices.len() >= self.known_max {
            self.forget_one();
        }
        self.order.push_back(device);
        self.devices.insert(
            device,
            Acquaintance {
                tenant,
                seen_again: false,
            },
        );
    }

    /// Second chances are bounded a call, so that no call takes long; then the next goes, seen again or not.
    fn forget_one(&mut self) {
        for chances_left in (0..EXPIRE_STEPS).rev() {
            let Some(device) = self.order.pop_front() else {
                return;
            };
            match self.devices.get_mut(&device) {
                Some(known) if known.seen_again && chances_left > 0 => {
                    known.seen_again = false;
                    self.order.push_back(device);
                }
                Some(_) | None => {
                    self.devices.remove(&device);
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

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
        }
    }

    #[test]
    fn past_slots_are_forgotten_and_their_room_is_used_again() {
        let mut memory = SlotMemory::new(1_000);
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
        let mut memory = SlotMemory::new(10);
        memory.put(device(1), slot(Instant::ZERO, None), Instant::ZERO);
        let moved = slot(Instant::ZERO + Duration::from_secs(100), None);
        memory.put(device(1), moved, Instant::ZERO);

        let later = Instant::ZERO + Duration::from_secs(90);
        memory.put(device(2), slot(later, None), later);

        assert_eq!(memory.get(device(1), later), Some(moved));
    }

    #[test]
    fn strangers_leave_room_for_the_known() {
        let mut memory = SlotMemory::new(1_000);
        for n in 0..5_000 {
            memory.put(device(n), slot(Instant::ZERO, None), Instant::ZERO);
        }

        assert_eq!(memory.len(), 250);
        assert!(memory.put(device(9_999), slot(Instant::ZERO, Some("a")), Instant::ZERO));
    }

    #[test]
    fn clearing_and_giving_again_does_not_grow_the_expiry_list_without_end() {
        let mut memory = SlotMemory::new(10);
        for _ in 0..1_000 {
            memory.put(device(1), slot(Instant::ZERO, None), Instant::ZERO);
            memory.remove(device(1));
        }

        assert!(memory.expiries_len <= 20);
    }

    #[test]
    fn acquaintances_are_bounded_and_those_seen_again_stay() {
        let mut known = Known::new(100);
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
