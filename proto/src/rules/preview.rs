//! Preview of a rule: the devices that it would refuse.
//!
//! Read [`Preview`] first. The caller supplies the devices, from live sessions or the registry.

use std::collections::BTreeMap;

use super::{Effect, RuleSpec, Subject};
use crate::firmware::{MISSING, compare};

/// Parts of a device in which shares are summed: only the sum of all groups is rounded.
const PARTS: u128 = 1_000_000_000_000;

/// A group of identical devices.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    pub subject: Subject<'a>,
    /// How many.
    pub devices: u64,
}

/// What the rule is evaluated together with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Beside<'a> {
    /// Rules that were created a short time ago and that no author has confirmed.
    pub rules: &'a [&'a RuleSpec],
    /// Devices whose sessions these rules have closed, so that they are not seen any more.
    pub sent_away: u64,
    /// Devices that are not known to rules. They are counted as affected when a confirmation is considered.
    pub unlisted: u64,
}

/// Effect of a rule on the devices that were counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preview {
    /// Number of devices, with those of [`Beside`].
    pub total: u64,
    /// Devices that the rule matches.
    pub matched: u64,
    /// Of `matched`, those that the rule does not admit: all but its `admit_percent`.
    pub affected: u64,
    /// Devices that the rule or one of the others does not admit, with those of [`Beside`].
    pub together: u64,
    /// Of `together`, those that all the others admit.
    pub added: u64,
    /// The matched devices by version, in the order of versions. At most [`Preview::VERSIONS_MAX`]: those with most
    /// devices.
    pub by_version: Vec<VersionHit>,
    /// Matched devices whose version is not in `by_version`.
    pub others: u64,
    /// Tenants none of whose devices the rule admits, in the order of names; at most [`Preview::TENANTS_MAX`]. Empty if
    /// the rule only throttles or counts.
    pub dark_tenants: Vec<String>,
    /// Number of all such tenants.
    pub dark: u64,
}

/// Matched devices of one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VersionHit {
    /// The version as devices state it; [`MISSING`] if they state none.
    pub firmware: String,
    pub devices: u64,
}

impl Preview {
    /// Maximum number of versions that are listed.
    pub const VERSIONS_MAX: usize = 100;
    /// Maximum number of tenants that are listed.
    pub const TENANTS_MAX: usize = 20;
    /// A rule that refuses more than this share of the devices, in percent, needs a confirmation.
    pub const CONFIRM_PERCENT: u64 = 30;
    /// Minimum number of devices for a confirmation. Of fewer devices any share may be refused without one.
    pub const CONFIRM_DEVICES_MIN: u64 = 20;

    /// Share of the registered devices, in percent, that must have been seen for their versions to represent all
    /// devices.
    pub const SEEN_PERCENT_MIN: u64 = 10;

    /// Evaluates all of `seen`. Devices that other rules already refuse are counted as well.
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
        // The devices of each tenant, and those that the rule matches.
        let mut tenants: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
        let (mut together, mut added) = (0_u128, 0_u128);
        for Seen { subject, devices } in seen {
            preview.total = preview.total.saturating_add(devices);
            let is_hit = spec.is_for(&subject);
            if let Some(tenant) = subject.tenant.filter(|_| devices > 0) {
                let (all, matched) = tenants.entry(tenant).or_default();
                *all = all.saturating_add(devices);
                *matched = matched.saturating_add(if is_hit { devices } else { 0 });
            }
            let all = u128::from(devices) * PARTS;
            let for_these = others.iter().filter(|other| other.is_for(&subject));
            let left = for_these.fold(all, |left, other| let_through(other, left));
            let left_by_all = if is_hit { let_through(spec, left) } else { left };
            together = together.saturating_add(all - left_by_all);
            added = added.saturating_add(left - left_by_all);
            if is_hit {
                preview.matched = preview.matched.saturating_add(devices);
                let firmware = subject.firmware.map(str::trim).filter(|text| !text.is_empty());
                let count = versions.entry(firmware.unwrap_or(MISSING)).or_default();
                *count = count.saturating_add(devices);
            }
        }
        let whole = |parts: u128| u64::try_from(parts.div_ceil(PARTS)).unwrap_or(u64::MAX);
        preview.affected = spec.affected_of(preview.matched);
        preview.together = preview.together.saturating_add(whole(together));
        preview.added = preview.added.saturating_add(whole(added));
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
        let sends_away = spec.effect != Effect::Throttle && !spec.is_harmless();
        // The tenant has most likely no device in the share.
        let is_none_left = |devices: u64| u128::from(devices) * u128::from(spec.admit_percent) < 50;
        let is_dark = |(all, matched): (u64, u64)| sends_away && all == matched && is_none_left(all);
        for (tenant, _) in tenants.into_iter().filter(|(_, counts)| is_dark(*counts)) {
            preview.dark += 1;
            if preview.dark_tenants.len() < Self::TENANTS_MAX {
                preview.dark_tenants.push(tenant.to_owned());
            }
        }
        preview
    }

    /// Whether the rule refuses so many devices that an operator must confirm it.
    #[must_use]
    pub const fn needs_confirmation(&self) -> bool {
        self.total >= Self::CONFIRM_DEVICES_MIN
            && (self.is_many(self.affected) || (self.added > 0 && self.is_many(self.together)))
    }

    const fn is_many(&self, devices: u64) -> bool {
        devices as u128 * 100 > self.total as u128 * Self::CONFIRM_PERCENT as u128
    }

    /// Whether too few of the `registered` devices were counted to represent all of them.
    #[must_use]
    pub const fn is_blind(&self, registered: u64) -> bool {
        registered >= Self::CONFIRM_DEVICES_MIN
            && (self.total as u128) * 100 < registered as u128 * Self::SEEN_PERCENT_MIN as u128
    }
}

/// Of `parts` of devices that `rule` matches, those that it admits. Shares of several rules are drawn independently of
/// each other.
fn let_through(rule: &RuleSpec, parts: u128) -> u128 {
    parts * u128::from(rule.admit_percent.min(100)) / 100
}
