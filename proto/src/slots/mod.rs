//! Reconnect slots: the time at which a refused device should come back, so that the fleet returns at the rate that the
//! database can take. A slot gives priority at its time, and never authenticates.
//!
//! Start with [`Slots`]. It does not decide who is refused; see [`crate::admission`].

use std::{sync::Arc, time::Duration};

use rand::Rng;

mod memory;
mod roster;
mod tenants;
mod token;

pub use roster::{DamagedRoster, ROSTER_BYTES_MAX, ROSTER_MAX, Roster, RosterBuilder, believable_len};
pub(crate) use tenants::{STRANGERS_SHARE, Tail, Weights};
pub use token::{SlotKeys, TOKEN_TEXT_LEN, TenantTag};

use self::{
    memory::{Known, SlotMemory},
    tenants::Tenants,
    token::Claims,
};
use crate::{
    admission::AdmissionConfig,
    id::DeviceId,
    refusal::{Hint, draw},
    time::{Instant, WallTime},
};

/// A slot helps from this long before its time. Contract section 3.
pub const SLOT_EARLY: Duration = Duration::from_millis(300);
/// A slot helps until this long after its time. Contract section 3.
pub const SLOT_GOOD_FOR: Duration = Duration::from_secs(60);
/// Shortest hint of a slot.
pub const HINT_MIN: Duration = Duration::from_millis(500);
/// Longest hint of a slot. A slot further ahead is told by a hint drawn from [`HINT_FAR_MIN`] to this.
pub const HINT_MAX: Duration = Duration::from_secs(600);
/// See [`HINT_MAX`].
pub const HINT_FAR_MIN: Duration = Duration::from_secs(450);
/// A slot at least this far ahead is kept on an early retry; a nearer one counts as used.
const SLOT_KEPT: Duration = Duration::from_millis(200);
/// A device that comes back by more than this before the time it was told does not keep to slots, and most probably won't be there at its
/// own: the place is given to one more device, or the database would idle where many such places follow each other. Its slot stays.
const SLOT_EARLY_FAR: Duration = Duration::from_secs(2);
/// How much the wall clocks of two nodes may differ for tokens to count in full. overload.md section 4.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(5);

/// A place in the virtual queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub at: Instant,
    /// When the device was first refused, for seniority.
    pub first_unix_s: u32,
    /// How often it has been given a slot; stops at 255.
    pub bounces: u8,
    /// `None`: a stranger's.
    pub tenant: Option<TenantTag>,
    /// What has become of its place in the queue.
    pub place: Place,
}

/// A place in the queue is meant for one device. See [`SLOT_EARLY_FAR`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Kept,
    /// The device was told to come before its slot, because the slot is beyond the longest hint.
    Far,
    /// The device does not do as told, so that somebody else was given the place too.
    Shared,
}

impl Slot {
    pub const fn is_strangers(&self) -> bool {
        self.tenant.is_none()
    }

    /// Whether this slot, carried by a token, counts instead of the one remembered here: of two the later, so that none is shortened,
    /// whichever node gave it out. One slot, by two clocks, is not two.
    fn replaces(&self, remembered: &Self) -> bool {
        let is_another = self.bounces > remembered.bounces || self.at > remembered.at + CLOCK_TOLERANCE;
        is_another && self.at > remembered.at
    }
}

/// Where an arriving device stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    /// `None`: a stranger, never seen authenticated.
    pub tenant: Option<TenantTag>,
    pub slot: Option<Slot>,
    /// Its slot helps it now.
    pub is_due: bool,
}

/// Where a new slot is taken from.
#[derive(Debug)]
pub(crate) enum Pace<'a> {
    /// The queues of tenants and strangers, which share this many places a second.
    Shared(f64),
    /// A queue of its own, whoever is in it.
    Apart { tail: &'a mut Tail, rate: f64 },
}

/// All slots given out here, and the tokens to take elsewhere.
#[derive(Debug)]
pub struct Slots {
    keys: SlotKeys,
    memory: SlotMemory,
    known: Known,
    roster: Arc<Roster>,
    tenants: Tenants,
    /// Slots that found no room in memory.
    stateless: u64,
}

impl Slots {
    #[must_use]
    pub fn new(config: &AdmissionConfig, keys: SlotKeys) -> Self {
        Self {
            memory: SlotMemory::new(config.slots_max, keys.memory_key()),
            known: Known::new(config.known_max, keys.memory_key()),
            roster: Arc::new(Roster::empty()),
            keys,
            tenants: Tenants::new(&config.tenant_weights, config.tenants_max),
            stateless: 0,
        }
    }

    /// Slots remembered here.
    #[must_use]
    pub fn remembered(&self) -> usize {
        self.memory.len()
    }

    /// Devices that are no strangers although the roster does not have them so.
    #[must_use]
    pub fn known(&self) -> usize {
        self.known.len()
    }

    /// Slots given out so far that found no room in memory, and live in their token alone.
    #[must_use]
    pub const fn stateless(&self) -> u64 {
        self.stateless
    }

    pub(crate) const fn roster(&self) -> &Arc<Roster> {
        &self.roster
    }

    /// Who is registered, from now on; the roster of before, whose end takes a moment where it is large.
    pub(crate) fn set_roster(&mut self, roster: Arc<Roster>) -> Arc<Roster> {
        std::mem::replace(&mut self.roster, roster)
    }

    /// `None`: a stranger's. What was seen here is newer than the roster.
    fn tenant_of(&self, device: DeviceId) -> Option<TenantTag> {
        self.known.tenant_of(device).or_else(|| self.roster.tenant_of(device))
    }

    /// What memory and token say of a device. A token that doesn't count is ignored.
    pub(crate) fn standing(&self, device: DeviceId, token: Option<&str>, now: Instant, wall: WallTime) -> Standing {
        let carried = token.and_then(|text| self.carried(device, text, now, wall));
        let remembered = self.memory.get(device, now);
        let tenant = [remembered, carried].into_iter().flatten().find_map(|slot| slot.tenant);
        let (slot, early) = match (remembered, carried) {
            (Some(remembered), Some(carried)) if carried.replaces(&remembered) => (Some(carried), CLOCK_TOLERANCE),
            (Some(remembered), _) => (Some(remembered), SLOT_EARLY),
            (None, carried) => (carried, CLOCK_TOLERANCE),
        };
        Standing {
            tenant: self.tenant_of(device).or(tenant),
            slot,
            is_due: slot.is_some_and(|slot| now + early >= slot.at),
        }
    }

    /// Whether the device shows a token of ours for a slot that helps it now. What is only remembered of the id doesn't count: anybody may name one.
    pub(crate) fn shows_due(&self, device: DeviceId, token: &str, now: Instant, wall: WallTime) -> bool {
        self.carried(device, token, now, wall).is_some() && self.standing(device, Some(token), now, wall).is_due
    }

    fn carried(&self, device: DeviceId, text: &str, now: Instant, wall: WallTime) -> Option<Slot> {
        let claims = self.keys.verify(device, text)?;
        let is_from_the_future =
            claims.issued_unix_s > unix_s(wall).saturating_add(u32::try_from(CLOCK_TOLERANCE.as_secs()).unwrap_or(0));
        let is_past = wall > claims.slot + SLOT_GOOD_FOR + CLOCK_TOLERANCE;
        if is_from_the_future || is_past {
            return None;
        }
        Some(Slot {
            at: now + claims.slot.saturating_since(wall) - wall.saturating_since(claims.slot),
            first_unix_s: claims.first_unix_s,
            bounces: claims.bounces,
            tenant: claims.tenant,
            // The node that gave it out may have shared it already.
            place: Place::Shared,
        })
    }

    /// Tells a refused device when to come back: at the slot it has, if that is still ahead, else at a new one, not before
    /// `now + at_least`.
    pub(crate) fn refuse(
        &mut self,
        device: DeviceId,
        standing: &Standing,
        at_least: Duration,
        pace: Pace<'_>,
        (now, wall): (Instant, WallTime),
        rng: &mut impl Rng,
    ) -> Hint {
        // Memory is asked again: another connection of the device may have been refused since it was asked first.
        let newest = match (self.memory.get(device, now), standing.slot) {
            (Some(remembered), Some(slot)) if slot.replaces(&remembered) => Some(slot),
            (Some(remembered), _) => Some(remembered),
            (None, slot) => slot,
        };
        let mut slot = match newest {
            Some(slot) if slot.at > now + SLOT_KEPT => self.kept(slot, &pace, now),
            previous => {
                let from = now + HINT_MIN;
                let place = match pace {
                    Pace::Shared(rate) => {
                        let at_least = from.max(now + at_least);
                        let shared = standing
                            .tenant
                            .and_then(|tenant| self.tenants.take_shared(tenant, from, at_least));
                        shared.unwrap_or_else(|| self.tenants.take(standing.tenant, from, rate))
                    }
                    Pace::Apart { tail, rate } => tail.take(from, rate),
                };
                Slot {
                    at: place.max(now + at_least),
                    first_unix_s: previous.map_or(unix_s(wall), |slot| slot.first_unix_s),
                    bounces: previous.map_or(0, |slot| slot.bounces.saturating_add(1)),
                    tenant: standing.tenant,
                    place: Place::Kept,
                }
            }
        };
        let is_far = slot.at > now + HINT_MAX;
        slot.place = match slot.place {
            Place::Shared => Place::Shared,
            Place::Kept | Place::Far if is_far => Place::Far,
            Place::Kept | Place::Far => Place::Kept,
        };
        if !self.memory.put(device, slot, now) {
            self.stateless += 1;
        }
        self.hint(device, &slot, now, wall, rng)
    }

    /// Tells a device when to come back, at the earliest after `at_least`, without a change to its slot or to its tenant's queue.
    pub(crate) fn hint_apart(
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
            bounces: standing.slot.map_or(0, |slot| slot.bounces),
            tenant: standing.tenant,
            place: Place::Shared,
        };
        self.hint(device, &slot, now, wall, rng)
    }

    /// The slot of a device that came too early.
    fn kept(&mut self, mut slot: Slot, pace: &Pace<'_>, now: Instant) -> Slot {
        let is_disobeyed = slot.place == Place::Kept && slot.at > now + SLOT_EARLY_FAR;
        if let (true, Pace::Shared(_), Some(tenant)) = (is_disobeyed, pace, slot.tenant) {
            self.tenants.share(tenant, slot.at, now);
            slot.place = Place::Shared;
        }
        slot
    }

    /// A device was authenticated and admitted: its slot is used, and it is known from now on.
    pub(crate) fn handle_admitted(&mut self, device: DeviceId, tenant: &str) {
        self.memory.remove(device);
        self.handle_tenant(device, tenant);
    }

    /// The registry has a device with this tenant: it is no stranger from now on.
    pub(crate) fn handle_tenant(&mut self, device: DeviceId, tenant: &str) {
        let tenant = TenantTag::of(tenant);
        if self.roster.tenant_of(device) == Some(tenant) {
            self.known.forget(device);
        } else {
            self.known.meet(device, tenant);
        }
    }

    /// What was signed here once says that a device is this tenant's: enough for a place in its queue, where nothing newer is known.
    pub(crate) fn handle_vouched(&mut self, device: DeviceId, tenant: &str) {
        if self.tenant_of(device).is_none() {
            self.known.meet(device, TenantTag::of(tenant));
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
            slot: wall + wait,
            first_unix_s: slot.first_unix_s,
            bounces: slot.bounces,
            tenant: slot.tenant,
            issued_unix_s: unix_s(wall),
        };
        Hint {
            after,
            slot: Some(self.keys.sign(device, &claims)),
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
