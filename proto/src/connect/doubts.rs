//! Devices that the registry does not have, although the registry index has them. Most were deleted. Otherwise the
//! registry has lost them, which a count of its devices shows. Until such a count they cannot be verified.

use std::collections::BTreeMap;

use crate::id::DeviceId;

/// Maximum number of devices, about 40 bytes each. Further ones cannot be verified until an index is read.
const DEVICES_MAX: usize = 65_536;

/// Devices of the index that the registry does not have, with the number of the doubt.
#[derive(Debug, Default)]
pub struct Doubts {
    devices: BTreeMap<DeviceId, u64>,
    last: u64,
    /// Number of the last doubt for which a count found the registry complete.
    settled: u64,
}

impl Doubts {
    /// Whether a count that began after `device` was first missing found the registry complete.
    pub fn is_settled(&mut self, device: DeviceId) -> bool {
        if let Some(number) = self.devices.get(&device) {
            return *number <= self.settled;
        }
        self.last += 1;
        if self.devices.len() < DEVICES_MAX {
            self.devices.insert(device, self.last);
        }
        false
    }

    /// Number of the last doubt; 0 if there was none.
    #[must_use]
    pub const fn last(&self) -> u64 {
        self.last
    }

    /// Whether devices were missing, and no later count found the registry complete.
    #[must_use]
    pub const fn are_open(&self) -> bool {
        self.last > self.settled
    }

    /// Records that a count which began when `last` was the last doubt found the registry complete.
    pub fn settle(&mut self, last: u64) {
        self.settled = self.settled.max(last);
    }

    /// Another index was read. A device that it has is missing from the registry by a new doubt.
    pub fn clear(&mut self) {
        self.devices.clear();
        self.settled = self.last;
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn device_that_is_missed_is_settled_by_a_count_that_began_afterwards() {
        let (one, two) = (
            DeviceId::from_uuid(Uuid::from_u128(1)),
            DeviceId::from_uuid(Uuid::from_u128(2)),
        );
        let mut doubts = Doubts::default();

        assert!(!doubts.is_settled(one));
        let count_began = doubts.last();
        assert!(!doubts.is_settled(two));
        doubts.settle(count_began);

        assert!(doubts.is_settled(one) && !doubts.is_settled(two));
        assert!(doubts.are_open());
        doubts.settle(doubts.last());
        assert!(doubts.is_settled(two) && !doubts.are_open());
        doubts.clear();
        assert!(!doubts.is_settled(one), "with another index it is another doubt");
        assert!(doubts.are_open());
        doubts.clear();
        assert!(!doubts.are_open(), "the index says which devices there are");
    }
}
