//! Who is registered, and with which tenant, in eight bytes a device: so that a node tells devices from strangers, and tenants from each
//! other, that it has never seen itself.
//!
//! A roster is a copy of an earlier moment, and only ever gives a place in a queue: it authenticates nobody. Start with [`Roster`]; the
//! caller reads the registry into a [`RosterBuilder`], and keeps [`Roster::to_bytes`] for its next life.

use std::{collections::BTreeMap, hash::Hasher as _};

use sha2::{Digest, Sha256};
use siphasher::sip::SipHasher13;

use super::token::TenantTag;
use crate::{id::DeviceId, time::WallTime};

/// Most devices of a roster: 128 MB. Those beyond it are strangers until they are seen.
pub const ROSTER_MAX: usize = 16_000_000;

/// Most tenants that are told apart; those beyond it count as the last.
const TENANTS_MAX: usize = 1 << TENANT_BITS;
const TENANT_BITS: u32 = 16;

/// Begins every kept roster, and names its layout.
const MAGIC: [u8; 16] = *b"seawall roster 1";
/// `magic 16 | key 16 | as of, unix ms 8 | tenants 8 | devices 8`, then eight bytes each, then the digest.
const HEAD_LEN: usize = 56;
const DIGEST_LEN: usize = 32;

/// Longest that [`Roster::to_bytes`] gives.
pub const ROSTER_BYTES_MAX: u64 = (HEAD_LEN + (TENANTS_MAX + ROSTER_MAX) * 8 + DIGEST_LEN) as u64;

/// A registry that has lost fewer devices is believed, whatever part of them it is.
const LOST_MIN: usize = 20;

/// How many devices a registry has at least that can be believed when it says that a device is not in it: half of those it had, or 19 fewer.
/// `known` is how many it had, `changed` how many of them were changed since, and may have been deleted, as it has recorded.
#[must_use]
pub const fn believable_len(known: usize, changed: usize) -> usize {
    let expected = known.saturating_sub(changed);
    let half = expected.div_ceil(2);
    let few_lost = expected.saturating_sub(LOST_MIN - 1);
    if half < few_lost { half } else { few_lost }
}

/// The registered devices as of a moment.
///
/// A device is 48 bits of its id's `SipHash` with a key that only this roster knows, so that nobody can choose ids that pass: of 16 million
/// devices' roster a stranger's id is taken for a device's once in 17 million. The other 16 bits are its tenant's number.
#[derive(Clone)]
pub struct Roster {
    key: [u8; 16],
    as_of: WallTime,
    /// Ascending.
    devices: Vec<u64>,
    tenants: Vec<TenantTag>,
}

impl std::fmt::Debug for Roster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Roster")
            .field("devices", &self.devices.len())
            .field("as_of", &self.as_of)
            .finish_non_exhaustive()
    }
}

/// What was kept is no whole roster of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("damaged, or of another version")]
pub struct DamagedRoster;

impl Roster {
    /// Nobody is registered, as far as is known.
    #[must_use]
    pub const fn empty() -> Self {
        Self {
            key: [0; 16],
            as_of: WallTime::from_unix_ms(0),
            devices: Vec::new(),
            tenants: Vec::new(),
        }
    }

    /// Devices in it.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.devices.len()
    }

    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }

    /// The moment that it is a copy of; 1970 where it never was one.
    #[must_use]
    pub const fn as_of(&self) -> WallTime {
        self.as_of
    }

    /// `None`: not registered then.
    #[must_use]
    pub fn tenant_of(&self, device: DeviceId) -> Option<TenantTag> {
        let wanted = place(self.key, device);
        let from = self.devices.partition_point(|known| *known < wanted);
        let found = self
            .devices
            .get(from)
            .filter(|known| **known ^ wanted < TENANTS_MAX as u64)?;
        self.tenants.get(tenant_number(*found)).copied()
    }

    /// What to keep for the next life.
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

    /// What an earlier life kept.
    ///
    /// # Errors
    /// It is not whole, or of another version.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DamagedRoster> {
        Self::parse(bytes).ok_or(DamagedRoster)
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
        let is_bounded = tenant_count <= TENANTS_MAX && device_count <= ROSTER_MAX;
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

/// A roster in the making.
pub struct RosterBuilder {
    key: [u8; 16],
    devices: Vec<u64>,
    tenants: Vec<TenantTag>,
    /// Of each tenant's name, as many as `tenants`.
    numbers: BTreeMap<Box<str>, u64>,
    devices_max: usize,
}

impl RosterBuilder {
    /// `key` is to be drawn by chance, and told to nobody.
    #[must_use]
    pub const fn new(key: [u8; 16]) -> Self {
        Self {
            key,
            devices: Vec::new(),
            tenants: Vec::new(),
            numbers: BTreeMap::new(),
            devices_max: ROSTER_MAX,
        }
    }

    /// Adds a device that was not added before. `false`: there is no room for it, or for any other.
    pub fn add(&mut self, device: DeviceId, tenant: &str) -> bool {
        if self.devices.len() >= self.devices_max {
            return false;
        }
        let number = self.number(tenant);
        self.devices.push(place(self.key, device) | number);
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

    /// Sorts what was added: a second for the largest roster. `as_of`: when the first device was read.
    #[must_use]
    pub fn finish(mut self, as_of: WallTime) -> Roster {
        self.devices.sort_unstable();
        self.devices.shrink_to_fit();
        Roster {
            key: self.key,
            as_of,
            devices: self.devices,
            tenants: self.tenants,
        }
    }
}

/// Where in the roster the device is, with tenant number zero.
fn place(key: [u8; 16], device: DeviceId) -> u64 {
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

    fn roster(devices: u128, tenants: u128) -> Roster {
        let mut builder = RosterBuilder::new([7; 16]);
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
    fn every_registered_device_is_found_with_its_tenant_and_no_stranger_is() {
        let roster = roster(100_000, 300);

        assert_eq!(roster.len(), 100_000);
        for n in 0..100_000 {
            assert_eq!(
                roster.tenant_of(device(n)),
                Some(TenantTag::of(&format!("t{}", n % 300)))
            );
        }
        for n in 100_000..300_000 {
            assert_eq!(roster.tenant_of(device(n)), None);
        }
        assert_eq!(Roster::empty().tenant_of(device(1)), None);
    }

    #[test]
    fn devices_beyond_the_bound_are_left_out() {
        let mut builder = RosterBuilder::new([7; 16]);
        builder.devices_max = 10;

        let added = (0..100).filter(|n| builder.add(device(*n), "a")).count();

        assert_eq!(added, 10);
        assert_eq!(builder.finish(AS_OF).tenant_of(device(10)), None);
    }

    #[test]
    fn tenants_beyond_the_bound_count_as_the_last() {
        let roster = roster(TENANTS_MAX as u128 + 5, TENANTS_MAX as u128 + 5);
        let last = TENANTS_MAX as u128 - 1;

        assert_eq!(
            roster.tenant_of(device(last - 1)),
            Some(TenantTag::of(&format!("t{}", last - 1)))
        );
        for n in last..last + 6 {
            assert_eq!(roster.tenant_of(device(n)), Some(TenantTag::of(&format!("t{last}"))));
        }
    }

    #[test]
    fn kept_roster_is_read_back() {
        for before in [Roster::empty(), roster(1_000, 3)] {
            let after = Roster::from_bytes(&before.to_bytes()).unwrap();

            assert_eq!((after.len(), after.as_of()), (before.len(), before.as_of()));
            assert!((0..2_000).all(|n| after.tenant_of(device(n)) == before.tenant_of(device(n))));
        }
    }

    #[test]
    fn roster_that_is_not_whole_is_none() {
        let whole = roster(20, 3).to_bytes();

        for len in 0..whole.len() {
            assert_eq!(Roster::from_bytes(&whole[..len]).unwrap_err(), DamagedRoster);
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            assert!(Roster::from_bytes(&damaged).is_err(), "byte {at}");
        }
    }

    #[test]
    fn digest_alone_makes_no_roster() {
        for content in [&MAGIC[..], &[0; 56], &[&MAGIC[..], &[0; 16], &[255; 24]].concat()] {
            let digest = Sha256::digest(content);

            assert!(Roster::from_bytes(&[content, &digest[..]].concat()).is_err());
        }
    }
}
