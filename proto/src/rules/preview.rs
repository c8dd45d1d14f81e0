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

/// What a rule is added up with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Beside<'a> {
    /// Rules that were made a short time ago and that nobody has confirmed.
    pub rules: &'a [&'a RuleSpec],
    /// Devices that these rules have sent away, so that they are not seen any more.
    pub sent_away: u64,
    /// Devices of which nobody knows what rules ask of them. They count as hit where it is asked whether to confirm.
    pub unlisted: u64,
}

/// What a rule would hit among the devices that were looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preview {
    /// Devices looked at, with those of [`Beside`].
    pub total: u64,
    /// Devices that the rule matches.
    pub matched: u64,
    /// Devices that the rule or one of the others matches, with those of [`Beside`].
    pub together: u64,
    /// Of `together`, those that none of the others matches.
    pub added: u64,
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

    /// Share of the registered devices, in percent, that must have been seen for their versions to stand for all.
    pub const SEEN_PERCENT_MIN: u64 = 10;

    /// Looks at all of `seen`. Devices that other rules refuse already are hit again.
    pub fn of<'a>(spec: &RuleSpec, beside: &Beside<'_>, seen: impl IntoIterator<Item = Seen<'a>>) -> Self {
        let Beside {
            rules: others,
            sent_away,
            unlisted,
        } = *beside;
        let mut preview = Self {
            total: unlisted.saturating_add(sent_away),
            together: unlisted.saturating_add(sent_away),
            added: unlisted,
            ..Self::default()
        };
        let mut versions: BTreeMap<&str, u64> = BTreeMap::new();
        for Seen { subject, devices } in seen {
            preview.total = preview.total.saturating_add(devices);
            let (is_hit, is_hit_already) = (spec.is_for(&subject), others.iter().any(|other| other.is_for(&subject)));
            if is_hit || is_hit_already {
                preview.together = preview.together.saturating_add(devices);
            }
            if is_hit && !is_hit_already {
                preview.added = preview.added.saturating_add(devices);
            }
            if is_hit {
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

    /// Whether so many of the devices would be refused that an operator has to say it twice.
    #[must_use]
    pub const fn needs_confirmation(&self) -> bool {
        self.total >= Self::CONFIRM_DEVICES_MIN
            && (self.is_many(self.matched) || (self.added > 0 && self.is_many(self.together)))
    }

    const fn is_many(&self, devices: u64) -> bool {
        devices as u128 * 100 > self.total as u128 * Self::CONFIRM_PERCENT as u128
    }

    /// Whether so few of the `registered` devices were looked at that they don't stand for all.
    #[must_use]
    pub const fn is_blind(&self, registered: u64) -> bool {
        registered >= Self::CONFIRM_DEVICES_MIN
            && (self.total as u128) * 100 < registered as u128 * Self::SEEN_PERCENT_MIN as u128
    }
}
