//! The registry index: the registered devices with their tenants, in eight bytes each. With it a node tells registered
//! devices from unknown ones, and tenants from each other, before it has seen them.
//!
//! An index is a copy of an earlier moment. It only ever affects the order of service, and never authenticates.
//! Start with [`RegistryIndex`]. The caller reads the registry into a [`RegistryIndexBuilder`], and keeps
//! [`RegistryIndex::to_bytes`] for the next process.

use std::{collections::BTreeMap, hash::Hasher as _};

use sha2::{Digest, Sha256};
use siphasher::sip::SipHasher13;

use super::token::TenantTag;
use crate::{id::DeviceId, time::WallTime};

/// Maximum number of devices of an index: 128 MB. Further ones are unknown until they are seen.
pub const REGISTRY_INDEX_MAX: usize = 16_000_000;

/// Maximum number of tenants. Further ones count as the last.
const TENANTS_MAX: usize = 1 << TENANT_BITS;
const TENANT_BITS: u32 = 16;

/// Magic bytes of a kept index and its layout version.
const MAGIC: [u8; 16] = *b"seawall roster 1";
/// `magic 16 | key 16 | as of, unix ms 8 | tenants 8 | devices 8`, then eight bytes each, then the digest.
const HEAD_LEN: usize = 56;
const DIGEST_LEN: usize = 32;

/// Maximum length of [`RegistryIndex::to_bytes`].
pub const REGISTRY_INDEX_BYTES_MAX: u64 = (HEAD_LEN + (TENANTS_MAX + REGISTRY_INDEX_MAX) * 8 + DIGEST_LEN) as u64;

/// Minimum number of lost devices that makes a registry implausible.
const LOST_MIN: usize = 20;

/// Minimum number of devices at which a registry is believed if it does not have a device: half of the previous number,
/// or 19 fewer. `known` is that number, `changed` the number of devices that changed since and may have been deleted.
#[must_use]
pub const fn believable_len(known: usize, changed: usize) -> usize {
    let expected = known.saturating_sub(changed);
    let half = expected.div_ceil(2);
    let few_lost = expected.saturating_sub(LOST_MIN - 1);
    if half < few_lost { half } else { few_lost }
}

/// Whether a registry that has `found` of `sample` devices of the index is the one that the index was read from.
/// `changed`: the number of missing devices whose deletion may be on record. `None`: the sample is too small.
#[must_use]
pub const fn is_same_registry(sample: usize, found: usize, changed: usize) -> Option<bool> {
    if believable_len(sample, 0) == 0 {
        return None;
    }
    Some(found >= believable_len(sample, changed))
}

/// The registered devices as of a moment.
///
/// A device is 48 bits of its id's `SipHash` with a key that only this index knows, so that ids cannot be chosen to
/// match. In an index of 16 million devices, one unknown id in 17 million matches. The other 16 bits are the number
/// of its tenant.
#[derive(Clone)]
pub struct RegistryIndex {
    key: [u8; 16],
    as_of: WallTime,
    /// Ascending.
    devices: Vec<u64>,
    tenants: Vec<TenantTag>,
}

impl std::fmt::Debug for RegistryIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryIndex")
            .field("devices", &self.devices.len())
            .field("as_of", &self.as_of)
            .finish_non_exhaustive()
    }
}

/// The bytes are not an undamaged index of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("damaged, or of another version")]
pub struct DamagedIndex;

impl RegistryIndex {
    /// An index without devices.
    #[must_use]
    pub const fn empty() -> Self {
        Self {
            key: [0; 16],
            as_of: WallTime::from_unix_ms(0),
            devices: Vec::new(),
            tenants: Vec::new(),
        }
    }

    /// Number of devices.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.devices.len()
    }

    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }

    /// Time of the copy; 1970 for an empty index.
    #[must_use]
    pub const fn as_of(&self) -> WallTime {
        self.as_of
    }

    /// Tenant of a device; `None` if it was not registered.
    #[must_use]
    pub fn tenant_of(&self, device: DeviceId) -> Option<TenantTag> {
        let wanted = entry(self.key, device);
        let from = self.devices.partition_point(|known| *known < wanted);
        let found = self
            .devices
            .get(from)
            .filter(|known| **known ^ wanted < TENANTS_MAX as u64)?;
        self.tenants.get(tenant_number(*found)).copied()
    }

    /// Whether the registry had the device.
    #[must_use]
    pub fn has(&self, device: DeviceId) -> bool {
        self.tenant_of(device).is_some()
    }

    /// Encodes the index for the next process.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let len = HEAD_LEN + (self.tenants.len() + self.devices.len()) * 8 + DIGEST_LEN;
        let mut bytes = Vec::with_capacity(len);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&self.key);
        for number in [
            self.as_of.as_unix_ms(),
            self.tenants.len() as u64,
            self.devices.len() as u64,
        ] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        for number in self
            .tenants
            .iter()
            .map(|tenant| tenant.as_u64())
            .chain(self.devices.iter().copied())
        {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        let digest = Sha256::digest(&bytes);
        bytes.extend_from_slice(&digest);
        bytes
    }

    /// Decodes an index that a previous process kept.
    ///
    /// # Errors
    /// The bytes are damaged, or of another version.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DamagedIndex> {
        Self::parse(bytes).ok_or(DamagedIndex)
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (content, digest) = bytes.split_at_checked(bytes.len().checked_sub(DIGEST_LEN)?)?;
        if Sha256::digest(content)[..] != *digest {
            return None;
        }
        let (magic, rest) = content.split_first_chunk::<16>()?;
        let (key, rest) = rest.split_first_chunk::<16>()?;
        let (numbers, &[]) = rest.as_chunks::<8>() else {
            return None;
        };
        let mut numbers = numbers.iter().copied().map(u64::from_le_bytes);
        let as_of = WallTime::from_unix_ms(numbers.next()?);
        let tenant_count = usize::try_from(numbers.next()?).ok()?;
        let device_count = usize::try_from(numbers.next()?).ok()?;
        let is_bounded = tenant_count <= TENANTS_MAX && device_count <= REGISTRY_INDEX_MAX;
        if *magic != MAGIC || !is_bounded || numbers.len() != tenant_count + device_count {
            return None;
        }
        let tenants: Option<Vec<TenantTag>> = numbers.by_ref().take(tenant_count).map(TenantTag::from_u64).collect();
        let devices: Vec<u64> = numbers.collect();
        devices.is_sorted().then_some(Self {
            key: *key,
            as_of,
            devices,
            tenants: tenants?,
        })
    }
}

/// Builds a [`RegistryIndex`].
pub struct RegistryIndexBuilder {
    key: [u8; 16],
    devices: Vec<u64>,
    tenants: Vec<TenantTag>,
    /// Number of each tenant, by name.
    numbers: BTreeMap<Box<str>, u64>,
    devices_max: usize,
}

impl RegistryIndexBuilder {
    /// Creates a builder. `key` is random and secret.
    #[must_use]
    pub const fn new(key: [u8; 16]) -> Self {
        Self {
            key,
            devices: Vec::new(),
            tenants: Vec::new(),
            numbers: BTreeMap::new(),
            devices_max: REGISTRY_INDEX_MAX,
        }
    }

    /// Adds a device that was not added before. Returns `false` if it is full.
    pub fn add(&mut self, device: DeviceId, tenant: &str) -> bool {
        if self.devices.len() >= self.devices_max {
            return false;
        }
        let number = self.number(tenant);
        self.devices.push(entry(self.key, device) | number);
        true
    }

    fn number(&mut self, tenant: &str) -> u64 {
        if let Some(number) = self.numbers.get(tenant) {
            return *number;
        }
        if self.tenants.len() >= TENANTS_MAX {
            return TENANTS_MAX as u64 - 1;
        }
        let number = self.tenants.len() as u64;
        self.tenants.push(TenantTag::of(tenant));
        self.numbers.insert(tenant.into(), number);
        number
    }

    /// Sorts the devices: a second for the largest index. `as_of`: time at which the first device was read.
    #[must_use]
    pub fn finish(mut self, as_of: WallTime) -> RegistryIndex {
        self.devices.sort_unstable();
        self.devices.shrink_to_fit();
        RegistryIndex {
            key: self.key,
            as_of,
            devices: self.devices,
            tenants: self.tenants,
        }
    }
}

/// Entry of a device, with tenant number zero.
fn entry(key: [u8; 16], device: DeviceId) -> u64 {
    let mut hasher = SipHasher13::new_with_key(&key);
    hasher.write(device.as_bytes());
    hasher.finish() >> TENANT_BITS << TENANT_BITS
}

#[expect(clippy::cast_possible_truncation, reason = "the low 16 bits")]
const fn tenant_number(entry: u64) -> usize {
    entry as u16 as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    const AS_OF: WallTime = WallTime::from_unix_ms(1_800_000_000_000);

    fn device(n: u128) -> DeviceId {
        DeviceId::from_uuid(uuid::Uuid::from_u128(n))
    }

    fn index(devices: u128, tenants: u128) -> RegistryIndex {
        let mut builder = RegistryIndexBuilder::new([7; 16]);
        for n in 0..devices {
            assert!(builder.add(device(n), &format!("t{}", n % tenants)));
        }
        builder.finish(AS_OF)
    }

    #[test]
    fn registry_that_lost_half_of_its_devices_without_a_record_is_not_believed_unless_they_are_few() {
        let is_believed = |known, changed, found: usize| found >= believable_len(known, changed);

        assert!(is_believed(0, 0, 0));
        assert!(is_believed(19, 0, 0));
        assert!(!is_believed(20, 0, 0));
        assert!(is_believed(30, 0, 11));
        assert!(!is_believed(30, 0, 10));
        assert!(is_believed(1_000, 0, 500));
        assert!(!is_believed(1_000, 0, 499));
        assert!(is_believed(1_000, 981, 0), "deleted one by one");
        assert!(!is_believed(1_000, 500, 0));
        assert!(is_believed(1_000, 5_000, 0));
    }

    #[test]
    fn registry_is_another_if_it_lacks_most_of_a_sample_whose_deletions_are_not_on_record() {
        assert_eq!(is_same_registry(19, 0, 0), None);
        assert_eq!(is_same_registry(20, 0, 0), Some(false));
        assert_eq!(is_same_registry(128, 64, 0), Some(true));
        assert_eq!(is_same_registry(128, 63, 0), Some(false));
        assert_eq!(is_same_registry(128, 0, 128), Some(true), "deleted on record");
    }

    #[test]
    fn every_registered_device_is_found_with_its_tenant_and_no_unknown_one_is() {
        let index = index(100_000, 300);

        assert_eq!(index.len(), 100_000);
        for n in 0..100_000 {
            assert_eq!(
                index.tenant_of(device(n)),
                Some(TenantTag::of(&format!("t{}", n % 300)))
            );
        }
        for n in 100_000..300_000 {
            assert_eq!(index.tenant_of(device(n)), None);
        }
        assert_eq!(RegistryIndex::empty().tenant_of(device(1)), None);
    }

    #[test]
    fn devices_beyond_the_bound_are_left_out() {
        let mut builder = RegistryIndexBuilder::new([7; 16]);
        builder.devices_max = 10;

        let added = (0..100).filter(|n| builder.add(device(*n), "a")).count();

        assert_eq!(added, 10);
        assert_eq!(builder.finish(AS_OF).tenant_of(device(10)), None);
    }

    #[test]
    fn tenants_beyond_the_bound_count_as_the_last() {
        let index = index(TENANTS_MAX as u128 + 5, TENANTS_MAX as u128 + 5);
        let last = TENANTS_MAX as u128 - 1;

        assert_eq!(
            index.tenant_of(device(last - 1)),
            Some(TenantTag::of(&format!("t{}", last - 1)))
        );
        for n in last..last + 6 {
            assert_eq!(index.tenant_of(device(n)), Some(TenantTag::of(&format!("t{last}"))));
        }
    }

    #[test]
    fn kept_registry_index_is_read_back() {
        for before in [RegistryIndex::empty(), index(1_000, 3)] {
            let after = RegistryIndex::from_bytes(&before.to_bytes()).unwrap();

            assert_eq!((after.len(), after.as_of()), (before.len(), before.as_of()));
            assert!((0..2_000).all(|n| after.tenant_of(device(n)) == before.tenant_of(device(n))));
        }
    }

    #[test]
    fn registry_index_that_is_not_whole_is_none() {
        let whole = index(20, 3).to_bytes();

        for len in 0..whole.len() {
            assert_eq!(RegistryIndex::from_bytes(&whole[..len]).unwrap_err(), DamagedIndex);
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            assert!(RegistryIndex::from_bytes(&damaged).is_err(), "byte {at}");
        }
    }

    #[test]
    fn digest_alone_makes_no_registry_index() {
        for content in [&MAGIC[..], &[0; 56], &[&MAGIC[..], &[0; 16], &[255; 24]].concat()] {
            let digest = Sha256::digest(content);

            assert!(RegistryIndex::from_bytes(&[content, &digest[..]].concat()).is_err());
        }
    }
}
