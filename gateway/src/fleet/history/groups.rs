//! Devices that are alike: one cohort, and one tenant and model in the registry. Each group counts its devices by
//! presence, so that counts of the whole fleet cost a walk through groups and not through devices.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::{
    fleet::cohorts::Cohort,
    store::{DeviceKinds, PresenceState},
};

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

/// Devices of one cohort, and of one tenant and model in the registry.
#[derive(Debug)]
pub struct Group {
    /// What its devices claim, by which rules judge them.
    pub cohort: Arc<Cohort>,
    /// The registry's tenant.
    pub tenant: Arc<str>,
    /// The registry's model, by which devices are listed and counted. Their claim may differ.
    pub model: Option<Arc<str>>,
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

/// Which registered devices were counted.
#[derive(Clone, Copy, Debug)]
pub enum Registered<'a> {
    /// All. Those that this node does not know were seen by none.
    All(&'a DeviceKinds),
    /// Those that no node has seen.
    NeverSeen(&'a DeviceKinds),
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
    by_name: HashMap<Name, Arc<Group>>,
    /// Numbers of groups that were forgotten.
    free: Vec<usize>,
    /// Groups that found no room.
    missed: usize,
}

/// The address of the cohort, which each group keeps; tenant and model.
type Name = (usize, Arc<str>, Option<Arc<str>>);

impl Groups {
    /// The group of a device. `tenant` and `model` are the registry's.
    pub fn of(&self, cohort: &Arc<Cohort>, tenant: &Arc<str>, model: Option<&str>) -> Arc<Group> {
        // Most devices claim the registry's model.
        let model = match (&cohort.model, model) {
            (Some(claimed), Some(model)) if **claimed == *model => Some(Arc::clone(claimed)),
            (_, model) => model.map(Arc::from),
        };
        let mut rows = self.rows();
        let name = (Arc::as_ptr(cohort).addr(), Arc::clone(tenant), model.clone());
        if let Some(group) = rows.by_name.get(&name) {
            return Arc::clone(group);
        }
        let number = rows.free_number();
        let group = Arc::new(Group {
            cohort: Arc::clone(cohort),
            tenant: Arc::clone(tenant),
            model,
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
                By::Model => group.model.clone(),
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

    /// As [`by`](Self::by), with the devices that no node has seen: they are unknown, and have no firmware version.
    #[must_use]
    pub fn by_with(&self, by: By, registered: &Registered<'_>) -> BTreeMap<Option<Arc<str>>, Counts> {
        let mut found = self.by(by);
        let mut seen: HashMap<(Arc<str>, Option<Arc<str>>), u64> = HashMap::new();
        let (kinds, rest) = match registered {
            Registered::NeverSeen(kinds) => (kinds, kinds.rest),
            Registered::All(kinds) => {
                let (groups, extra) = self.all();
                for (group, counts) in groups {
                    let kind = (Arc::clone(&group.tenant), group.model.clone());
                    *seen.entry(kind).or_default() += counts.total();
                }
                (kinds, kinds.rest.saturating_sub(extra.total()))
            }
        };
        let mut add = |key: Option<&Arc<str>>, devices: u64| {
            if devices > 0 {
                found.entry(key.cloned()).or_default().unknown += devices;
            }
        };
        for kind in &kinds.kinds {
            let seen = seen.get(&(Arc::clone(&kind.tenant), kind.model.clone()));
            let key = match by {
                By::Tenant => Some(&kind.tenant),
                By::Model => kind.model.as_ref(),
                By::Firmware => None,
            };
            add(key, kind.devices.saturating_sub(seen.copied().unwrap_or(0)));
        }
        add(None, rest);
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
    use crate::{fleet::cohorts::Cohorts, store::DeviceKind};

    #[test]
    fn counts_are_by_tenant_model_and_firmware() {
        let (groups, cohorts) = (Groups::default(), Cohorts::new());
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let (old, new) = (
            cohorts.intern(Some("m"), Some("1")),
            cohorts.intern(Some("m"), Some("2")),
        );
        groups.add(&groups.of(&old, &a, Some("m")), PresenceState::Online);
        groups.add(&groups.of(&new, &a, Some("m")), PresenceState::Offline);
        groups.add(&groups.of(&new, &b, Some("m")), PresenceState::Unknown);
        groups.add(&groups.of(&new, &b, Some("m")), PresenceState::Online);
        groups.remove(&groups.of(&new, &b, Some("m")), PresenceState::Online);

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
    fn model_is_the_registry_s_whatever_devices_claim() {
        let (groups, cohorts) = (Groups::default(), Cohorts::new());
        let (tenant, claimed): (Arc<str>, _) = ("a".into(), cohorts.intern(Some("claimed"), Some("1")));
        for model in [Some("registered"), None, Some("claimed")] {
            groups.add(&groups.of(&claimed, &tenant, model), PresenceState::Online);
        }

        let by = groups.by(By::Model);
        let keys: Vec<_> = by.keys().map(Option::as_deref).collect();
        assert_eq!(keys, [None, Some("claimed"), Some("registered")]);
        assert!(by.values().all(|counts| counts.online == 1));
    }

    #[test]
    fn devices_that_no_node_has_seen_are_unknown() {
        let (groups, cohorts) = (Groups::default(), Cohorts::new());
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let cohort = cohorts.intern(Some("claimed"), Some("1"));
        groups.add(&groups.of(&cohort, &a, Some("m")), PresenceState::Online);
        groups.add(&groups.of(&cohort, &a, Some("m")), PresenceState::Offline);
        let kind = |tenant: &Arc<str>, model: Option<&str>, devices| DeviceKind {
            tenant: Arc::clone(tenant),
            model: model.map(Arc::from),
            devices,
        };
        let kinds = DeviceKinds {
            // Counted before the device of "n" was registered.
            kinds: vec![kind(&a, Some("m"), 5), kind(&a, None, 1), kind(&b, Some("m"), 2)],
            rest: 7,
        };
        groups.add(&groups.of(&cohort, &b, Some("n")), PresenceState::Online);

        let shown = |by, registered| {
            let rows = groups.by_with(by, &registered).into_iter();
            rows.map(|(key, counts)| (key.as_deref().unwrap_or("-").to_owned(), counts.total(), counts.unknown))
                .collect::<Vec<_>>()
        };
        let row = |key: &str, total, unknown| (key.to_owned(), total, unknown);
        let all = Registered::All(&kinds);
        assert_eq!(shown(By::Tenant, all), [row("-", 7, 7), row("a", 6, 4), row("b", 3, 2)]);
        assert_eq!(shown(By::Model, all), [row("-", 8, 8), row("m", 7, 5), row("n", 1, 0)]);
        assert_eq!(shown(By::Firmware, all), [row("-", 13, 13), row("1", 3, 0)]);
        let never_seen = Registered::NeverSeen(&kinds);
        assert_eq!(shown(By::Tenant, never_seen)[1], row("a", 8, 6));
    }

    #[test]
    fn groups_beyond_the_maximum_are_counted_without_a_name() {
        let (groups, cohorts) = (Groups::default(), Cohorts::new());
        let cohort = cohorts.intern(None, Some("1"));
        let held: Vec<_> = (0..GROUPS_MAX + 10)
            .map(|n| {
                let group = groups.of(&cohort, &n.to_string().into(), None);
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
            groups.of(&cohort, &"new".into(), None);
        }
        assert_eq!(groups.rows().by_name.len(), 1, "what nobody belongs to makes room");
    }

    #[test]
    fn page_that_began_before_a_clean_up_takes_no_group_for_another() {
        let (groups, cohorts) = (Groups::default(), Cohorts::new());
        let cohort = cohorts.intern(None, Some("1"));
        let kept = groups.of(&cohort, &"kept".into(), None);
        let mut held: Vec<_> = (1..GROUPS_MAX)
            .map(|n| groups.of(&cohort, &n.to_string().into(), None))
            .collect();
        let matching = groups.matching(|group| group.tenant.starts_with('7') || &*group.tenant == "kept");

        // Others take their places while the page is read.
        held.clear();
        let number = kept.number;
        let newer: Vec<_> = (0..3 * GROUPS_MAX)
            .map(|n| groups.of(&cohort, &format!("newer-{n}").into(), None))
            .collect();

        assert!(matching.has(&kept) && kept.number == number);
        assert!(newer.iter().all(|group| !matching.has(group)));
    }

    #[test]
    fn groups_that_find_no_room_share_a_clean_up() {
        let (groups, cohorts) = (Groups::default(), Cohorts::new());
        let cohort = cohorts.intern(None, Some("1"));
        let _held: Vec<_> = (0..GROUPS_MAX)
            .map(|n| groups.of(&cohort, &n.to_string().into(), None))
            .collect();
        let begun = std::time::Instant::now();

        for n in 0..20_000 {
            groups.of(&cohort, &format!("extra-{n}").into(), None);
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
