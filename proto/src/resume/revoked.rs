//! Whose tokens no longer count: a bounded set of devices, and a floor below which nobody's do.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::DeviceId;

/// Most devices in the set, about 80 bytes each. With one more the oldest revocation leaves it, and the floor rises to its
/// revision: every token as old as that is looked up once, none is let in wrongly.
pub const REVOKED_MAX: usize = 65_536;

/// A revision of the revocations in the registry. It grows with every change of a device that tokens of before must not outlive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u32);

impl Generation {
    /// Above every revision of a registry: as a floor, no token counts.
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
    /// Nothing is known: no token counts until the registry was asked.
    #[must_use]
    pub const fn unknown() -> Self {
        Self {
            known: Generation(0),
            floor: Generation::MAX,
            devices: BTreeMap::new(),
            oldest: BTreeSet::new(),
        }
    }

    /// What a node knew at an earlier time, or what the registry says. Bounded as ever.
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

    /// Whether a token of `device` counts that accounts for all revocations up to `generation`.
    #[must_use]
    pub fn allows(&self, device: DeviceId, generation: Generation) -> bool {
        generation >= self.floor && self.devices.get(&device).is_none_or(|at| generation >= *at)
    }

    /// Tokens of `device` that don't account for `at` no longer count.
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

    /// Tokens of `device` that this node could have signed up to now no longer count. For a change whose revision is not known yet,
    /// or that may not have been made: at worst the device is looked up once more. The revision that it counts as.
    pub fn revoke_now(&mut self, device: DeviceId) -> Generation {
        let at = Generation(self.known.0.saturating_add(1));
        self.revoke(device, at);
        at
    }

    /// Nobody's token counts that does not account for `floor`.
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

    /// All revocations up to `through` were told.
    pub fn confirm(&mut self, through: Generation) {
        self.known = self.known.max(through);
    }

    /// All revocations up to here are in this set.
    #[must_use]
    pub const fn known(&self) -> Generation {
        self.known
    }

    #[must_use]
    pub const fn floor(&self) -> Generation {
        self.floor
    }

    /// The set, by device.
    pub fn devices(&self) -> impl ExactSizeIterator<Item = (DeviceId, Generation)> {
        self.devices.iter().map(|(device, at)| (*device, *at))
    }
}
