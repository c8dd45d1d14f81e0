//! The lines that keys wait in: one a class, and in each line a lane for each tenant. Lanes are served by deficit round robin, so that a
//! tenant with any number of devices gets no more than its weight of what there is.

use std::{
    collections::BTreeMap,
    ops::Bound::{Excluded, Unbounded},
};

use super::Class;
use crate::{
    id::DeviceId,
    slots::{TenantTag, Weights},
};

/// All lines.
#[derive(Debug, Default)]
pub(super) struct Lines {
    lines: [Line; Class::COUNT],
}

/// The keys that wait in one class.
#[derive(Debug, Default)]
struct Line {
    /// By tenant, strangers together; never empty ones.
    lanes: BTreeMap<Option<TenantTag>, BTreeMap<u64, DeviceId>>,
    len: usize,
    /// The lane being served, and how many of its keys may go before the next lane's turn comes.
    served: Option<(Option<TenantTag>, u32)>,
}

impl Lines {
    pub fn len(&self, class: Class) -> usize {
        self.lines[class.index()].len
    }

    pub fn is_empty(&self) -> bool {
        self.lines.iter().all(|line| line.len == 0)
    }

    pub fn insert(&mut self, class: Class, tenant: Option<TenantTag>, place: u64, device: DeviceId) {
        let line = &mut self.lines[class.index()];
        let replaced = line.lanes.entry(tenant).or_default().insert(place, device);
        debug_assert!(replaced.is_none(), "places are never given twice");
        line.len += 1;
    }

    pub fn remove(&mut self, class: Class, tenant: Option<TenantTag>, place: u64) {
        self.lines[class.index()].remove(tenant, place);
    }

    /// The key whose turn it is.
    pub fn pop(&mut self, class: Class, weights: &Weights) -> Option<DeviceId> {
        self.lines[class.index()].pop(weights)
    }

    /// The newest key of the tenant that has the most waiting for its weight, if that is more than `tenant` would have with one more.
    pub fn newest_of_longest(&self, class: Class, tenant: Option<TenantTag>, weights: &Weights) -> Option<DeviceId> {
        let line = &self.lines[class.index()];
        let for_its_weight = |tenant, len: usize| len as f64 / f64::from(weights.of(tenant));
        let own = line.lanes.get(&tenant).map_or(0, BTreeMap::len) + 1;
        let (longest, len) = line
            .lanes
            .iter()
            .map(|(tenant, lane)| (lane, for_its_weight(*tenant, lane.len())))
            .max_by(|one, other| one.1.total_cmp(&other.1))?;
        if len <= for_its_weight(tenant, own) {
            return None;
        }
        longest.last_key_value().map(|(_, device)| *device)
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

impl Line {
    fn remove(&mut self, tenant: Option<TenantTag>, place: u64) -> Option<DeviceId> {
        let lane = self.lanes.get_mut(&tenant)?;
        let device = lane.remove(&place)?;
        if lane.is_empty() {
            self.lanes.remove(&tenant);
        }
        self.len -= 1;
        Some(device)
    }

    fn pop(&mut self, weights: &Weights) -> Option<DeviceId> {
        let (tenant, left) = match self.served {
            Some((tenant, left)) if left > 0 && self.lanes.contains_key(&tenant) => (tenant, left),
            last => {
                let after = last.map_or(Unbounded, |(tenant, _)| Excluded(tenant));
                let next = self.lanes.range((after, Unbounded)).next();
                let (tenant, _) = next.or_else(|| self.lanes.first_key_value())?;
                (*tenant, weights.of(*tenant))
            }
        };
        self.served = Some((tenant, left - 1));
        let (place, _) = self.lanes.get(&tenant)?.first_key_value()?;
        self.remove(tenant, *place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(n: u64) -> DeviceId {
        DeviceId::from_uuid(uuid::Uuid::from_u128(n.into()))
    }

    fn tag(name: &str) -> Option<TenantTag> {
        Some(TenantTag::of(name))
    }

    fn weights() -> Weights {
        Weights::new(&BTreeMap::from([("heavy".to_owned(), 3)]))
    }

    /// 1,000 of `great`, then 100 each of `small` and `heavy`, told apart by thousands.
    fn lines() -> Lines {
        let mut lines = Lines::default();
        for (thousand, name, count) in [(1, "great", 1_000), (2, "small", 100), (3, "heavy", 100)] {
            for n in 0..count {
                let place = thousand * 1_000 + n;
                lines.insert(Class::Holder, tag(name), place, device(place));
            }
        }
        lines
    }

    fn popped(lines: &mut Lines, count: usize) -> Vec<u64> {
        let pop = || lines.pop(Class::Holder, &weights());
        std::iter::from_fn(pop)
            .take(count)
            .map(|device| u64::try_from(device.as_uuid().as_u128()).unwrap())
            .collect()
    }

    #[test]
    fn tenants_are_served_by_weight_however_many_wait() {
        let mut lines = lines();

        let served = popped(&mut lines, 100);

        let of = |thousand| served.iter().filter(|place| **place / 1_000 == thousand).count();
        assert_eq!((of(1), of(2), of(3)), (20, 20, 60));
        assert!(
            served.iter().filter(|place| **place < 2_000).is_sorted(),
            "first come, first served"
        );
    }

    #[test]
    fn lanes_that_are_empty_cost_the_others_nothing() {
        let mut lines = lines();

        let served = popped(&mut lines, 10_000);

        assert_eq!(served.len(), 1_200);
        assert!(
            served[300..].iter().all(|place| *place < 2_000),
            "the great one gets all that is left"
        );
        assert!(lines.is_empty());
        assert_eq!(lines.len(Class::Holder), 0);
    }

    #[test]
    fn full_line_makes_room_at_the_cost_of_the_longest() {
        let lines = lines();

        let newest = |name| lines.newest_of_longest(Class::Holder, tag(name), &weights());

        assert_eq!(newest("small"), Some(device(1_999)));
        assert_eq!(newest("new"), Some(device(1_999)));
        assert_eq!(newest("great"), None, "its own newest would not be better off");
    }

    #[test]
    fn key_that_left_is_not_served() {
        let mut lines = Lines::default();
        lines.insert(Class::WalkIn, None, 1, device(1));
        lines.insert(Class::WalkIn, None, 2, device(2));

        lines.remove(Class::WalkIn, None, 1);
        lines.remove(Class::WalkIn, None, 1);

        assert_eq!(lines.pop(Class::WalkIn, &weights()), Some(device(2)));
        assert_eq!(lines.pop(Class::WalkIn, &weights()), None);
    }
}
