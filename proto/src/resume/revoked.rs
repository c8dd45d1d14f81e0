//! Devices whose earlier tokens are not valid: a bounded set, and a floor that applies to all devices.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::DeviceId;

/// Maximum number of devices in the set, about 80 bytes each. Beyond it the oldest revocation leaves the set, and the
/// floor rises to its revision. Devices with older tokens are then looked up once; none is admitted wrongly.
pub const REVOKED_MAX: usize = 65_536;

/// A revision of the revocations in the registry. It increases with each change of a device that invalidates earlier
/// tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u32);

impl Generation {
    /// Above every revision of a registry: as a floor, it makes every token invalid.
    pub const MAX: Self = Self(u32::MAX);
}

/// The revocations that a node knows.
#[derive(Clone, Debug)]
pub struct Revoked {
    known: Generation,
    floor: Generation,
    devices: BTreeMap<DeviceId, Generation>,
    oldest: BTreeSet<(Generation, DeviceId)>,
}

impl Revoked {
    /// No token is valid until the registry has been read.
    #[must_use]
    pub const fn unknown() -> Self {
        Self {
            known: Generation(0),
            floor: Generation::MAX,
            devices: BTreeMap::new(),
            oldest: BTreeSet::new(),
        }
    }

    /// The revocations that this node or the registry had at an earlier time. Bounded by [`REVOKED_MAX`].
    #[must_use]
    pub fn of(known: Generation, floor: Generation, devices: impl IntoIterator<Item = (DeviceId, Generation)>) -> Self {
        let mut revoked = Self {
            floor,
            ..Self::unknown()
        };
        for (device, at) in devices {
            revoked.revoke(device, at);
        }
        revoked.known = known;
        revoked
    }

    /// Whether a token of `device` is valid that includes all revocations up to `generation`.
    #[must_use]
    pub fn allows(&self, device: DeviceId, generation: Generation) -> bool {
        generation >= self.floor && self.devices.get(&device).is_none_or(|at| generation >= *at)
    }

    /// Invalidates the tokens of `device` that do not include the revision `at`.
    pub fn revoke(&mut self, device: DeviceId, at: Generation) {
        let before = self.devices.get(&device).copied();
        if at <= self.floor || before.is_some_and(|before| at <= before) {
            return;
        }
        if let Some(before) = before {
            self.oldest.remove(&(before, device));
        }
        self.devices.insert(device, at);
        self.oldest.insert((at, device));
        if self.devices.len() > REVOKED_MAX
            && let Some((oldest, _)) = self.oldest.first().copied()
        {
            self.raise(oldest);
        }
    }

    /// Invalidates the tokens of `device` that this node could have signed so far, and returns the revision used for
    /// it. For a change whose revision is not known yet, or that may not have been made: at worst the device is looked
    /// up once more.
    pub fn revoke_now(&mut self, device: DeviceId) -> Generation {
        let at = Generation(self.known.0.saturating_add(1));
        self.revoke(device, at);
        at
    }

    /// Invalidates the tokens of all devices that do not include `floor`.
    pub fn raise(&mut self, floor: Generation) {
        if floor <= self.floor {
            return;
        }
        self.floor = floor;
        while let Some((at, device)) = self.oldest.first().copied().filter(|(at, _)| *at <= floor) {
            self.oldest.remove(&(at, device));
            self.devices.remove(&device);
        }
    }

    /// Records that all revocations up to `through` have been read.
    pub fn confirm(&mut self, through: Generation) {
        self.known = self.known.max(through);
    }

    /// All revocations up to this revision are in the set.
    #[must_use]
    pub const fn known(&self) -> Generation {
        self.known
    }

    #[must_use]
    pub const fn floor(&self) -> Generation {
        self.floor
    }

    /// The set, ordered by device.
    pub fn devices(&self) -> impl ExactSizeIterator<Item = (DeviceId, Generation)> {
        self.devices.iter().map(|(device, at)| (*device, *at))
    }
}
