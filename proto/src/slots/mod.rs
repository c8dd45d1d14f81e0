//! Reconnect slots: the time at which a refused device should return, so that the fleet returns at the rate that
//! the database can take. A slot gives priority at its time, and never authenticates. docs/design/slots.md has the
//! reasons.
//!
//! Start with [`Slots`]. It does not decide which device is refused; see [`crate::admission`].

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use rand::Rng;

mod memory;
mod registry_index;
mod tenants;
mod token;

pub use crate::keyring::Keyring as SlotKeys;
pub use registry_index::{
    DamagedIndex, REGISTRY_INDEX_BYTES_MAX, REGISTRY_INDEX_MAX, RegistryIndex, RegistryIndexBuilder, believable_len,
    is_same_registry,
};
pub(crate) use tenants::{QueueEnd, UNKNOWN_SHARE, Weights};
pub use token::{TOKEN_TEXT_LEN, TenantTag};

use self::{
    memory::{KnownDevices, SlotMemory},
    tenants::Tenants,
    token::Claims,
};
use crate::{
    hint::{Hint, draw},
    id::DeviceId,
    time::{Instant, WallTime},
};

/// Time before a slot from which it gives priority.
pub const SLOT_EARLY: Duration = Duration::from_millis(300);
/// Time after a slot until which it gives priority.
pub const SLOT_GOOD_FOR: Duration = Duration::from_secs(60);
/// Minimum hint of a slot.
pub const HINT_MIN: Duration = Duration::from_millis(500);
/// Maximum hint of a slot. The hint of a slot further ahead is drawn between [`HINT_FAR_MIN`] and this.
pub const HINT_MAX: Duration = Duration::from_secs(600);
/// See [`HINT_MAX`].
pub const HINT_FAR_MIN: Duration = Duration::from_secs(450);
/// Minimum time before a slot at which an early retry keeps it. A nearer slot is used up.
const SLOT_KEPT: Duration = Duration::from_millis(200);
/// Minimum time before a slot at which a retry shows that the device does not follow hints. Its time in the virtual
/// queue is then given to one more device. Its slot stays.
const SLOT_EARLY_FAR: Duration = Duration::from_secs(2);
/// Tolerated difference between the wall clocks of two nodes, for tokens of another node to have full effect. See
/// docs/design/slots.md.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(5);

/// A slot of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub at: Instant,
    /// Time of the device's first refusal, for seniority.
    pub first_unix_s: u32,
    /// Number of refusals; stops at 255.
    pub refusals: u8,
    /// `None` for an unknown device.
    pub tenant: Option<TenantTag>,
    /// Whether its time in the virtual queue is the device's alone.
    pub ownership: Ownership,
}

/// A slot from a token, and the time before it from which it gives priority.
#[derive(Clone, Copy, Debug)]
struct Carried {
    slot: Slot,
    early: Duration,
}

/// Whether a time in the virtual queue belongs to one device. See [`SLOT_EARLY_FAR`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ownership {
    Sole,
    /// The device was told to return before its slot, because the slot is beyond the longest hint.
    Far,
    /// The device does not follow hints, so that the time was given to another one as well.
    Shared,
}

impl Slot {
    pub const fn is_unknown(&self) -> bool {
        self.tenant.is_none()
    }

    /// Whether this slot, from a token, replaces the remembered one. The later of two slots is used, so that none is
    /// shortened. The same slot by two clocks is one.
    fn replaces(&self, remembered: &Self) -> bool {
        let is_another = self.refusals > remembered.refusals || self.at > remembered.at + CLOCK_TOLERANCE;
        is_another && self.at > remembered.at
    }
}

/// State of an arriving device, from memory and token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    /// `None` for an unknown device.
    pub tenant: Option<TenantTag>,
    pub slot: Option<Slot>,
    /// Whether its slot gives it priority now.
    pub is_due: bool,
}

/// The virtual queue from which a new slot is taken.
#[derive(Debug)]
pub(crate) enum Pace<'a> {
    /// The queues of all tenants and of unknown devices, which share this number of slots per second.
    Shared(f64),
    /// The queue of an isolated cohort.
    Isolated { queue_end: &'a mut QueueEnd, rate: f64 },
}

/// Bounds of [`Slots`], and the weights of tenants: the part of
/// [`AdmissionConfig`](crate::admission::AdmissionConfig) that concerns slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotsConfig {
    /// Maximum number of devices whose slot is remembered. Further slots are in their token only.
    pub slots_max: usize,
    /// Maximum number of known devices beside the registry index.
    pub known_max: usize,
    /// Maximum number of tenants with a queue of their own. Further tenants share one.
    pub tenants_max: usize,
    /// Weight of a tenant in the queue of slots, by name. A tenant that is not named has weight 1.
    pub tenant_weights: BTreeMap<String, u32>,
}

impl Default for SlotsConfig {
    fn default() -> Self {
        Self {
            slots_max: 2_000_000,
            known_max: 1_000_000,
            tenants_max: 1_024,
            tenant_weights: BTreeMap::new(),
        }
    }
}

/// Figures of [`Slots`] for people and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotsState {
    /// Number of devices whose slot is remembered.
    pub remembered: usize,
    /// Number of slots issued so far that found no room in memory, and are in their token only.
    pub stateless: u64,
    /// Number of known devices that the registry index does not have with their tenant.
    pub known: usize,
}

/// All slots issued here, and their tokens for other nodes.
#[derive(Debug)]
pub struct Slots {
    keys: SlotKeys,
    memory: SlotMemory,
    known: KnownDevices,
    registry_index: Arc<RegistryIndex>,
    tenants: Tenants,
    /// Number of slots that found no room in memory.
    stateless: u64,
}

impl Slots {
    #[must_use]
    pub fn new(config: &SlotsConfig, keys: SlotKeys) -> Self {
        Self {
            memory: SlotMemory::new(config.slots_max, keys.memory_key()),
            known: KnownDevices::new(config.known_max, keys.memory_key()),
            registry_index: Arc::new(RegistryIndex::empty()),
            keys,
            tenants: Tenants::new(&config.tenant_weights, config.tenants_max),
            stateless: 0,
        }
    }

    #[must_use]
    pub fn state(&self) -> SlotsState {
        SlotsState {
            remembered: self.memory.len(),
            stateless: self.stateless,
            known: self.known.len(),
        }
    }

    /// The registered devices known to this node.
    #[must_use]
    pub const fn registry_index(&self) -> &Arc<RegistryIndex> {
        &self.registry_index
    }

    /// Replaces the registered devices. Returns the previous ones, so that the caller can drop them outside its lock:
    /// dropping a large index takes a moment.
    pub fn set_registry_index(&mut self, registry_index: Arc<RegistryIndex>) -> Arc<RegistryIndex> {
        self.memory.make_room(registry_index.len());
        self.known.make_room(registry_index.len());
        std::mem::replace(&mut self.registry_index, registry_index)
    }

    /// `None` for an unknown device. An authentication here is newer than the registry index.
    fn tenant_of(&self, device: DeviceId) -> Option<TenantTag> {
        self.known
            .tenant_of(device)
            .or_else(|| self.registry_index.tenant_of(device))
    }

    /// State of a device, from memory and token. An invalid token is ignored.
    pub(crate) fn standing(&self, device: DeviceId, token: Option<&str>, now: Instant, wall: WallTime) -> Standing {
        let carried = token.and_then(|text| self.carried(device, text, now, wall));
        self.standing_with(device, carried, now)
    }

    /// The same, with the slot of a valid token.
    fn standing_with(&self, device: DeviceId, carried: Option<Carried>, now: Instant) -> Standing {
        let remembered = self.memory.get(device, now);
        let early_by_token = carried.map_or(SLOT_EARLY, |carried| carried.early);
        let carried = carried.map(|carried| carried.slot);
        let tenant = [remembered, carried].into_iter().flatten().find_map(|slot| slot.tenant);
        let (slot, early) = match (remembered, carried) {
            (Some(remembered), Some(carried)) if carried.replaces(&remembered) => (Some(carried), early_by_token),
            (Some(remembered), _) => (Some(remembered), SLOT_EARLY),
            (None, carried) => (carried, early_by_token),
        };
        Standing {
            tenant: self.tenant_of(device).or(tenant),
            slot,
            is_due: slot.is_some_and(|slot| now + early >= slot.at),
        }
    }

    /// The tenant that a device has by its slot token, whatever the time of that, else as far as this node knows.
    #[must_use]
    pub fn claimed_tenant(&self, device: DeviceId, token: Option<&str>, now: Instant) -> Option<TenantTag> {
        let carried = token.and_then(|text| self.keys.verify_slot(device, text));
        let remembered = || self.memory.get(device, now).and_then(|slot| slot.tenant);
        carried
            .and_then(|claims| claims.tenant)
            .or_else(|| self.tenant_of(device))
            .or_else(remembered)
    }

    /// Whether a device was seen authenticated, or is registered as far as this node knows. The id alone decides, and
    /// anybody can name one.
    #[must_use]
    pub fn is_known(&self, device: DeviceId, token: Option<&str>, now: Instant, wall: WallTime) -> bool {
        self.standing(device, token, now, wall).tenant.is_some()
    }

    /// Whether the device shows a token for a slot that gives it priority now. A remembered slot is not enough: anybody
    /// can name the id.
    pub(crate) fn shows_due(&self, device: DeviceId, token: &str, now: Instant, wall: WallTime) -> bool {
        let carried = self.carried(device, token, now, wall);
        carried.is_some() && self.standing_with(device, carried, now).is_due
    }

    fn carried(&self, device: DeviceId, text: &str, now: Instant, wall: WallTime) -> Option<Carried> {
        let claims = self.keys.verify_slot(device, text)?;
        let is_from_the_future =
            claims.issued_unix_s > unix_s(wall).saturating_add(u32::try_from(CLOCK_TOLERANCE.as_secs()).unwrap_or(0));
        // A token of this node is of its own clock.
        let (early, tolerance) = if claims.is_own {
            (SLOT_EARLY, Duration::ZERO)
        } else {
            (CLOCK_TOLERANCE, CLOCK_TOLERANCE)
        };
        let is_past = wall > claims.slot + SLOT_GOOD_FOR + tolerance;
        if is_from_the_future || is_past {
            return None;
        }
        let slot = Slot {
            at: now + claims.slot.saturating_since(wall) - wall.saturating_since(claims.slot),
            first_unix_s: claims.first_unix_s,
            refusals: claims.refusals,
            tenant: claims.tenant,
            // The issuing node may have shared it already.
            ownership: Ownership::Shared,
        };
        Some(Carried { slot, early })
    }

    /// Gives a slot to a device that does not ask for a lookup: its session is closed, or the node has no room for it.
    /// The slot is not before `now + at_least`. A slot in `token` that is still ahead is kept. `keys_per_second` is
    /// [`Admission::k_ref`](crate::admission::Admission::k_ref).
    pub fn give(
        &mut self,
        device: DeviceId,
        token: Option<&str>,
        at_least: Duration,
        keys_per_second: f64,
        (now, wall): (Instant, WallTime),
        rng: &mut impl Rng,
    ) -> Hint {
        let standing = self.standing(device, token, now, wall);
        let pace = Pace::Shared(keys_per_second);
        self.refuse(device, &standing, at_least, pace, (now, wall), rng)
    }

    /// Gives a slot to a device that may not return before a time. A slot that is still ahead is kept, and
    /// otherwise the time is its slot. No tenant's queue moves.
    pub(crate) fn refuse_until(
        &mut self,
        device: DeviceId,
        token: Option<&str>,
        at: Instant,
        (now, wall): (Instant, WallTime),
        rng: &mut impl Rng,
    ) -> Hint {
        let standing = self.standing(device, token, now, wall);
        let mut own = QueueEnd::empty(1.0);
        let pace = Pace::Isolated {
            queue_end: &mut own,
            rate: 1.0,
        };
        let at_least = at.saturating_since(now);
        self.refuse(device, &standing, at_least, pace, (now, wall), rng)
    }

    /// Returns when a refused device should return: at the slot that it has, if that is still ahead, otherwise at a
    /// new one, not before `now + at_least`.
    pub(crate) fn refuse(
        &mut self,
        device: DeviceId,
        standing: &Standing,
        at_least: Duration,
        pace: Pace<'_>,
        (now, wall): (Instant, WallTime),
        rng: &mut impl Rng,
    ) -> Hint {
        // Another connection of the device may have been refused since the standing was read.
        let newest = match (self.memory.get(device, now), standing.slot) {
            (Some(remembered), Some(slot)) if slot.replaces(&remembered) => Some(slot),
            (Some(remembered), _) => Some(remembered),
            (None, slot) => slot,
        };
        let mut slot = match newest {
            Some(slot) if slot.at > now + SLOT_KEPT => self.kept(slot, &pace, now),
            previous => {
                let from = now + HINT_MIN;
                let time = match pace {
                    Pace::Shared(rate) => {
                        let at_least = from.max(now + at_least);
                        let shared = standing
                            .tenant
                            .and_then(|tenant| self.tenants.take_shared(tenant, from, at_least));
                        shared.unwrap_or_else(|| self.tenants.take(standing.tenant, from, rate))
                    }
                    Pace::Isolated { queue_end, rate } => queue_end.take(from, rate),
                };
                Slot {
                    at: time.max(now + at_least),
                    first_unix_s: previous.map_or(unix_s(wall), |slot| slot.first_unix_s),
                    refusals: previous.map_or(0, |slot| slot.refusals.saturating_add(1)),
                    tenant: standing.tenant,
                    ownership: Ownership::Sole,
                }
            }
        };
        let is_far = slot.at > now + HINT_MAX;
        slot.ownership = match slot.ownership {
            Ownership::Shared => Ownership::Shared,
            Ownership::Sole | Ownership::Far if is_far => Ownership::Far,
            Ownership::Sole | Ownership::Far => Ownership::Sole,
        };
        if !self.memory.put(device, slot, now) {
            self.stateless += 1;
        }
        self.hint(device, &slot, now, wall, rng)
    }

    /// Returns when a device should return, not before `now + at_least`, without changing its slot or its tenant's
    /// queue.
    pub(crate) fn hint_without_slot(
        &self,
        device: DeviceId,
        standing: &Standing,
        at_least: Duration,
        (now, wall): (Instant, WallTime),
        rng: &mut impl Rng,
    ) -> Hint {
        let slot = Slot {
            at: now + at_least,
            first_unix_s: standing.slot.map_or(unix_s(wall), |slot| slot.first_unix_s),
            refusals: standing.slot.map_or(0, |slot| slot.refusals),
            tenant: standing.tenant,
            ownership: Ownership::Shared,
        };
        self.hint(device, &slot, now, wall, rng)
    }

    /// The slot of a device that returns too early.
    fn kept(&mut self, mut slot: Slot, pace: &Pace<'_>, now: Instant) -> Slot {
        let is_disobeyed = slot.ownership == Ownership::Sole && slot.at > now + SLOT_EARLY_FAR;
        if let (true, Pace::Shared(_), Some(tenant)) = (is_disobeyed, pace, slot.tenant) {
            self.tenants.share(tenant, slot.at, now);
            slot.ownership = Ownership::Shared;
        }
        slot
    }

    /// A device was authenticated and is admitted: its slot is used, and it is known from now on. `tenant` is the
    /// registry's.
    pub fn handle_admitted(&mut self, device: DeviceId, tenant: &str) {
        self.memory.remove(device);
        self.handle_tenant(device, tenant);
    }

    /// The registry has the device with this tenant, whatever the registry index says: it is known from now on.
    pub fn handle_tenant(&mut self, device: DeviceId, tenant: &str) {
        let tenant = TenantTag::of(tenant);
        if self.registry_index.tenant_of(device) == Some(tenant) {
            self.known.forget(device);
        } else {
            self.known.insert(device, tenant);
        }
    }

    /// A resume token signed here, which no longer admits the device, names this tenant. That is enough for a slot from
    /// the tenant's queue, unless newer data is known.
    pub fn handle_hinted_tenant(&mut self, device: DeviceId, tenant: &str) {
        if self.tenant_of(device).is_none() {
            self.known.insert(device, TenantTag::of(tenant));
        }
    }

    fn hint(&self, device: DeviceId, slot: &Slot, now: Instant, wall: WallTime, rng: &mut impl Rng) -> Hint {
        let wait = slot.at.saturating_since(now);
        let after = if wait > HINT_MAX {
            draw(HINT_FAR_MIN..=HINT_MAX, rng)
        } else {
            wait.max(HINT_MIN)
        };
        let claims = Claims {
            is_own: true,
            slot: wall + wait,
            first_unix_s: slot.first_unix_s,
            refusals: slot.refusals,
            tenant: slot.tenant,
            issued_unix_s: unix_s(wall),
        };
        Hint {
            after,
            slot: Some(self.keys.sign_slot(device, &claims)),
        }
    }
}

/// Wraps in 2106.
#[expect(
    clippy::cast_possible_truncation,
    reason = "four bytes of the token are for it, until 2106"
)]
const fn unix_s(wall: WallTime) -> u32 {
    (wall.as_unix_ms() / 1_000) as u32
}

#[cfg(test)]
mod tests;
