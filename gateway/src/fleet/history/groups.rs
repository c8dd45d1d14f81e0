//! Devices that are alike: one tenant, model and firmware version. Each group counts its devices by presence, so that
//! counts of the whole fleet cost a walk through groups and not through devices.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
};

use crate::{fleet::cohorts::Cohort, store::PresenceState};

/// Maximum number of groups with a row of their own. Devices of further ones are counted in a row without names, and
/// each keeps its group itself.
pub const GROUPS_MAX: usize = 16_384;
/// Number of groups without a row.
const UNNUMBERED: u32 = u32::MAX;

/// How many devices, by presence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub online: u64,
    pub offline: u64,
    pub unknown: u64,
}

impl Counts {
    #[must_use]
    pub const fn total(self) -> u64 {
        self.online + self.offline + self.unknown
    }

    const fn plus(self, other: Self) -> Self {
        Self {
            online: self.online + other.online,
            offline: self.offline + other.offline,
            unknown: self.unknown + other.unknown,
        }
    }
}

/// Devices of one tenant, model and firmware version.
#[derive(Debug)]
pub struct Group {
    pub cohort: Arc<Cohort>,
    pub tenant: Arc<str>,
    /// Its bit in [`Matching`].
    number: AtomicU32,
    counts: [AtomicUsize; PresenceState::ALL.len()],
    /// Where there was no room for a row of its own.
    is_extra: bool,
}

/// Key of counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Tenant,
    Model,
    Firmware,
}

/// The groups of this node.
#[derive(Debug, Default)]
pub struct Groups {
    rows: Mutex<Rows>,
    /// Counts of devices whose group has no row.
    extra: [AtomicUsize; PresenceState::ALL.len()],
}

#[derive(Debug, Default)]
struct Rows {
    /// By the address of the cohort, which each group keeps.
    by_name: HashMap<(usize, Arc<str>), Arc<Group>>,
    last_number: u32,
}

impl Groups {
    /// The group of a device.
    pub fn of(&self, cohort: &Arc<Cohort>, tenant: &Arc<str>) -> Arc<Group> {
        let mut rows = self.rows();
        let name = (Arc::as_ptr(cohort).addr(), Arc::clone(tenant));
        if let Some(group) = rows.by_name.get(&name) {
            return Arc::clone(group);
        }
        if rows.by_name.len() >= GROUPS_MAX {
            rows.forget_empty();
        }
        let is_extra = rows.by_name.len() >= GROUPS_MAX;
        let number = if is_extra {
            UNNUMBERED
        } else {
            rows.last_number += 1;
            rows.last_number
        };
        let group = Arc::new(Group {
            cohort: Arc::clone(cohort),
            tenant: Arc::clone(tenant),
            number: AtomicU32::new(number),
            counts: Default::default(),
            is_extra,
        });
        if !is_extra {
            rows.by_name.insert(name, Arc::clone(&group));
        }
        group
    }

    /// Counts one device more in `state`.
    pub(super) fn add(&self, group: &Group, state: PresenceState) {
        self.counts(group)[state as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one device less in `state`.
    pub(super) fn remove(&self, group: &Group, state: PresenceState) {
        self.counts(group)[state as usize].fetch_sub(1, Ordering::Relaxed);
    }

    fn counts<'a>(&'a self, group: &'a Group) -> &'a [AtomicUsize; PresenceState::ALL.len()] {
        if group.is_extra { &self.extra } else { &group.counts }
    }

    /// Every group that has devices, with their number, in no order. Devices of groups without a row have none.
    #[must_use]
    pub fn all(&self) -> (Vec<(Arc<Group>, Counts)>, Counts) {
        let rows = self.rows();
        let groups = rows
            .by_name
            .values()
            .map(|group| (Arc::clone(group), read(&group.counts)));
        let all = groups.filter(|(_, counts)| counts.total() > 0).collect();
        (all, read(&self.extra))
    }

    /// Devices by presence, all together.
    #[must_use]
    pub fn total(&self) -> Counts {
        let rows = self.rows();
        let counts = rows.by_name.values().map(|group| read(&group.counts));
        counts.fold(read(&self.extra), Counts::plus)
    }

    /// Devices by tenant, model or firmware version, in the order of those. A key is `None` for devices that name none,
    /// and for those of groups without a row.
    #[must_use]
    pub fn by(&self, by: By) -> BTreeMap<Option<Arc<str>>, Counts> {
        let (groups, extra) = self.all();
        let mut found: BTreeMap<Option<Arc<str>>, Counts> = BTreeMap::new();
        for (group, counts) in groups {
            let key = match by {
                By::Tenant => Some(Arc::clone(&group.tenant)),
                By::Model => group.cohort.model.clone(),
                By::Firmware => group.cohort.firmware.clone(),
            };
            let row = found.entry(key).or_default();
            *row = row.plus(counts);
        }
        if extra.total() > 0 {
            let row = found.entry(None).or_default();
            *row = row.plus(extra);
        }
        found
    }

    /// The groups for which `wanted` holds, decided once for each and not for each device.
    pub(super) fn matching<F: Fn(&Group) -> bool>(&self, wanted: F) -> Matching<F> {
        let rows = self.rows();
        let mut decided = vec![None; rows.last_number as usize + 1];
        for group in rows.by_name.values() {
            decided[group.number.load(Ordering::Relaxed) as usize] = Some(wanted(group));
        }
        Matching { decided, wanted }
    }

    fn rows(&self) -> MutexGuard<'_, Rows> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Rows {
    /// Drops groups that no device belongs to, and numbers the others again.
    fn forget_empty(&mut self) {
        self.by_name.retain(|_, group| Arc::strong_count(group) > 1);
        self.last_number = 0;
        for group in self.by_name.values() {
            self.last_number += 1;
            group.number.store(self.last_number, Ordering::Relaxed);
        }
    }
}

/// Groups that were decided about.
pub(super) struct Matching<F> {
    /// By number. A group that was not there is decided when it is met.
    decided: Vec<Option<bool>>,
    wanted: F,
}

impl<F: Fn(&Group) -> bool> Matching<F> {
    pub fn has(&self, group: &Group) -> bool {
        let number = group.number.load(Ordering::Relaxed) as usize;
        let decided = self.decided.get(number).copied().flatten();
        decided.unwrap_or_else(|| (self.wanted)(group))
    }
}

fn read(counts: &[AtomicUsize; PresenceState::ALL.len()]) -> Counts {
    let count =
        |state: PresenceState| u64::try_from(counts[state as usize].load(Ordering::Relaxed)).unwrap_or(u64::MAX);
    Counts {
        online: count(PresenceState::Online),
        offline: count(PresenceState::Offline),
        unknown: count(PresenceState::Unknown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::cohorts::Cohorts;

    #[test]
    fn counts_are_by_tenant_model_and_firmware() {
        let (groups, cohorts) = (Groups::default(), Cohorts::new());
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let (old, new) = (
            cohorts.intern(Some("m"), Some("1")),
            cohorts.intern(Some("m"), Some("2")),
        );
        groups.add(&groups.of(&old, &a), PresenceState::Online);
        groups.add(&groups.of(&new, &a), PresenceState::Offline);
        groups.add(&groups.of(&new, &b), PresenceState::Unknown);
        groups.add(&groups.of(&new, &b), PresenceState::Online);
        groups.remove(&groups.of(&new, &b), PresenceState::Online);

        let of = |by, key: &str| groups.by(by)[&Some(Arc::from(key))];
        let counts = |online, offline, unknown| Counts {
            online,
            offline,
            unknown,
        };
        assert_eq!(of(By::Tenant, "a"), counts(1, 1, 0));
        assert_eq!(of(By::Firmware, "2"), counts(0, 1, 1));
        assert_eq!(of(By::Model, "m"), counts(1, 1, 1));
        assert_eq!(groups.total(), counts(1, 1, 1));
    }

    #[test]
    fn groups_beyond_the_maximum_are_counted_without_a_name() {
        let (groups, cohorts) = (Groups::default(), Cohorts::new());
        let cohort = cohorts.intern(None, Some("1"));
        let held: Vec<_> = (0..GROUPS_MAX + 10)
            .map(|n| {
                let group = groups.of(&cohort, &n.to_string().into());
                groups.add(&group, PresenceState::Online);
                group
            })
            .collect();

        assert_eq!(groups.rows().by_name.len(), GROUPS_MAX);
        assert_eq!(groups.by(By::Tenant)[&None].online, 10);
        assert_eq!(groups.total().online, held.len() as u64);
        let matching = groups.matching(|group| group.tenant.ends_with('7'));
        for group in &held {
            assert_eq!(matching.has(group), group.tenant.ends_with('7'));
        }

        drop(held);
        groups.of(&cohort, &"new".into());
        assert_eq!(groups.rows().by_name.len(), 1, "what nobody belongs to makes room");
    }
}
