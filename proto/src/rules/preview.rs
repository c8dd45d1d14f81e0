//! What a rule would hit, before it is made.
//!
//! Read [`Preview`] first. Where the rows come from (live sessions, the registry) is the caller's.

use std::collections::BTreeMap;

use super::{RuleSpec, Subject};
use crate::firmware::{MISSING, compare};

/// Some devices that are alike.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    pub subject: Subject<'a>,
    /// How many.
    pub devices: u64,
}

/// What a rule would hit among the devices that were looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preview {
    /// Devices looked at.
    pub total: u64,
    /// Devices that the rule matches.
    pub matched: u64,
    /// The matched devices by version, in the order of versions; at most [`Preview::VERSIONS_MAX`], those with most devices.
    pub by_version: Vec<VersionHit>,
    /// Matched devices whose version is not in `by_version`.
    pub others: u64,
}

/// Matched devices of one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VersionHit {
    /// As devices state it; [`MISSING`] where they state none.
    pub firmware: String,
    pub devices: u64,
}

impl Preview {
    /// Most versions that are listed.
    pub const VERSIONS_MAX: usize = 100;
    /// A rule that refuses more than this share of the devices, in percent, needs a confirmation.
    pub const CONFIRM_PERCENT: u64 = 30;
    /// Of fewer devices than this any share may be refused without one.
    pub const CONFIRM_DEVICES_MIN: u64 = 20;

    /// Looks at all of `seen`. Other rules do not count: devices that are refused already are hit again.
    pub fn of<'a>(spec: &RuleSpec, seen: impl IntoIterator<Item = Seen<'a>>) -> Self {
        let mut preview = Self::default();
        let mut versions: BTreeMap<&str, u64> = BTreeMap::new();
        for Seen { subject, devices } in seen {
            preview.total = preview.total.saturating_add(devices);
            if spec.is_for(&subject) {
                preview.matched = preview.matched.saturating_add(devices);
                let firmware = subject.firmware.map(str::trim).filter(|text| !text.is_empty());
                let count = versions.entry(firmware.unwrap_or(MISSING)).or_default();
                *count = count.saturating_add(devices);
            }
        }
        let mut versions: Vec<(&str, u64)> = versions.into_iter().collect();
        versions.sort_by_key(|(_, devices)| std::cmp::Reverse(*devices));
        let others = versions.split_off(versions.len().min(Self::VERSIONS_MAX));
        preview.others = others.iter().map(|(_, devices)| *devices).fold(0, u64::saturating_add);
        versions.sort_by(|(left, _), (right, _)| compare(left, right).then_with(|| left.cmp(right)));
        let hits = versions.into_iter().map(|(firmware, devices)| VersionHit {
            firmware: firmware.to_owned(),
            devices,
        });
        preview.by_version = hits.collect();
        preview
    }

    /// Whether so many of the devices would be refused that an operator has to say it twice. Ask it of connected devices.
    #[must_use]
    pub const fn needs_confirmation(&self) -> bool {
        self.total >= Self::CONFIRM_DEVICES_MIN
            && self.matched as u128 * 100 > self.total as u128 * Self::CONFIRM_PERCENT as u128
    }
}
