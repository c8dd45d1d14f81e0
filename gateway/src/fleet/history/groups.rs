//! Devices that are alike: one tenant, model and firmware version. Each group counts its devices by presence, so that
//! counts of the whole fleet cost a walk through groups and not through devices.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::{fleet::cohorts::Cohort, store::PresenceState};

/// Maximum number of groups with a row of their own. Devices of further ones are counted in a row without names, and
/// each keeps its group itself.
pub const GROUPS_MAX: usize = 16_384;
/// Groups that find no room per search for groups without devices. Each search goes through all rows.
const MISSES_PER_SEARCH: usize = 1_000;

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

    /// Devices in a state.
    #[must_use]
    pub const fn of(self, state: PresenceState) -> u64 {
        match state {
            PresenceState::Online => self.online,
            PresenceState::Offline => self.offline,
            PresenceState::Unknown => self.unknown,
        }
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
    /// Its place in [`Matching`], less than [`GROUPS_MAX`]. `None` if there was no room for a row of its own.
    number: Option<usize>,
    counts: [AtomicUsize; PresenceState::ALL.len()],
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
    /// Numbers of groups that were forgotten.
    free: Vec<usize>,
    /// Groups that found no room.
    missed: usize,
}

impl Groups {
    /// The group of a device.
    pub fn of(&self, cohort: &Arc<Cohort>, tenant: &Arc<str>) -> Arc<Group> {
        let mut rows = self.rows();
        let name = (Arc::as_ptr(cohort).addr(), Arc::clone(tenant));
        if let Some(group) = rows.by_name.get(&name) {
            return Arc::clone(group);
        }
        let number = rows.free_number();
        let group = Arc::new(Group {
            cohort: Arc::clone(cohort),
            tenant: Arc::clone(tenant),
            number,
            counts: Default::default(),
        });
        if number.is_some() {
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
        if group.number.is_some() {
            &group.counts
        } else {
            &self.extra
        }
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
        // A connecting device needs the rows as well: nothing is decided behind their lock.
        let groups: Vec<Arc<Group>> = self.rows().by_name.values().cloned().collect();
        let len = groups.iter().filter_map(|group| group.number).max();
        let mut decided = vec![None; len.map_or(0, |max| max + 1)];
        for group in groups {
            if let Some(number) = group.number {
                let is_wanted = wanted(&group);
                decided[number] = Some((group, is_wanted));
            }
        }
        Matching { decided, wanted }
    }

    fn rows(&self) -> MutexGuard<'_, Rows> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Rows {
    /// The number of a new group, if there is room for one.
    fn free_number(&mut self) -> Option<usize> {
        if self.by_name.len() >= GROUPS_MAX {
            if self.missed.is_multiple_of(MISSES_PER_SEARCH) {
                self.forget_empty();
            }
            self.missed += 1;
        }
        let has_room = self.by_name.len() < GROUPS_MAX;
        // Without free numbers, those from 0 on are in use.
        has_room.then(|| self.free.pop().unwrap_or(self.by_name.len()))
    }

    /// Drops groups that no device belongs to. The numbers of others stay: pages go by them.
    fn forget_empty(&mut self) {
        let free = &mut self.free;
        self.by_name.retain(|_, group| {
            let is_used = Arc::strong_count(group) > 1;
            if !is_used {
                free.extend(group.number);
            }
            is_used
        });
    }
}

/// Groups that were decided about.
pub(super) struct Matching<F> {
    /// By number. They are kept, so that a group that gets the number of a forgotten one is not mistaken for it.
    decided: Vec<Option<(Arc<Group>, bool)>>,
    wanted: F,
}

impl<F: Fn(&Group) -> bool> Matching<F> {
    /// Whether the group is wanted. A group that was not there before is decided now.
    pub fn has(&self, group: &Group) -> bool {
        let decided = group.number.and_then(|number| self.decided.get(number)?.as_ref());
        match decided {
            Some((decided, is_wanted)) if std::ptr::eq(&raw const **decided, group) => *is_wanted,
            Some(_) | None => (self.wanted)(group),
        }
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

        drop((held, matching));
        for _ in 0..MISSES_PER_SEARCH {
            groups.of(&cohort, &"new".into());
        }
        assert_eq!(groups.rows().by_name.len(), 1, "what nobody belongs to makes room");
    }

    #[test]
    fn page_that_began_before_a_clean_up_takes_no_group_for_another() {
        let (groups, cohorts) = (Groups::default(), Cohorts::new());
        let cohort = cohorts.intern(None, Some("1"));
        let kept = groups.of(&cohort, &"kept".into());
        let mut held: Vec<_> = (1..GROUPS_MAX)
            .map(|n| groups.of(&cohort, &n.to_string().into()))
            .collect();
        let matching = groups.matching(|group| group.tenant.starts_with('7') || &*group.tenant == "kept");

        // Others take their places while the page is read.
        held.clear();
        let number = kept.number;
        let newer: Vec<_> = (0..3 * GROUPS_MAX)
            .map(|n| groups.of(&cohort, &format!("newer-{n}").into()))
            .collect();

        assert!(matching.has(&kept) && kept.number == number);
        assert!(newer.iter().all(|group| !matching.has(group)));
    }

    #[test]
    fn groups_that_find_no_room_share_a_clean_up() {
        let (groups, cohorts) = (Groups::default(), Cohorts::new());
        let cohort = cohorts.intern(None, Some("1"));
        let _held: Vec<_> = (0..GROUPS_MAX)
            .map(|n| groups.of(&cohort, &n.to_string().into()))
            .collect();
        let begun = std::time::Instant::now();

        for n in 0..20_000 {
            groups.of(&cohort, &format!("extra-{n}").into());
        }

        // A search for each of them takes a minute.
        assert!(
            begun.elapsed() < std::time::Duration::from_secs(10),
            "{:?}",
            begun.elapsed()
        );
        assert_eq!(groups.rows().missed, 20_000);
    }
}
