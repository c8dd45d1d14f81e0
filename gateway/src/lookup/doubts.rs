//! Devices that the registry lacks although it had them when the roster was read: most were deleted. Or the registry has lost them, which a
//! count of its devices finds out. Until such a count, they can't be verified.

use std::collections::BTreeMap;

use seawall_proto::id::DeviceId;

/// Maximum number of devices, some 40 bytes each. Further ones can't be verified until a roster was read.
const DEVICES_MAX: usize = 65_536;

#[derive(Debug, Default)]
pub(super) struct Doubts {
    /// With the number of the doubt.
    devices: BTreeMap<DeviceId, u64>,
    last: u64,
    /// A count that began after this doubt has found the registry whole.
    settled: u64,
}

impl Doubts {
    /// Whether a count that began after `device` was missed first has found the registry whole.
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

    pub const fn last(&self) -> u64 {
        self.last
    }

    pub const fn are_open(&self) -> bool {
        self.last > self.settled
    }

    /// A count that began when `last` was the last doubt has found the registry whole.
    pub fn settle(&mut self, last: u64) {
        self.settled = self.settled.max(last);
    }

    /// Another roster was read.
    pub fn clear(&mut self) {
        self.devices.clear();
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
        assert!(!doubts.is_settled(one), "with another roster it is another doubt");
    }
}
