//! Waiting keys by class, and in each class by tenant. Tenants are served by deficit round robin, so that one with
//! any number of devices gets no more than the share of its weight.

use std::{
    collections::BTreeMap,
    ops::Bound::{Excluded, Unbounded},
};

use super::Class;
use crate::{
    id::DeviceId,
    slots::{TenantTag, Weights},
};

/// Keys of all classes.
#[derive(Debug, Default)]
pub(super) struct ByClass {
    classes: [TenantQueues; Class::COUNT],
}

/// Keys of one class.
#[derive(Debug, Default)]
struct TenantQueues {
    /// By tenant, unknown devices together. None is empty.
    tenants: BTreeMap<Option<TenantTag>, BTreeMap<u64, DeviceId>>,
    len: usize,
    /// The tenant being served, and the number of its keys that may go before the next tenant's.
    served: Option<(Option<TenantTag>, u32)>,
}

impl ByClass {
    pub fn len(&self, class: Class) -> usize {
        self.classes[class as usize].len
    }

    pub fn is_empty(&self) -> bool {
        self.classes.iter().all(|queues| queues.len == 0)
    }

    pub fn insert(&mut self, class: Class, tenant: Option<TenantTag>, position: u64, device: DeviceId) {
        let queues = &mut self.classes[class as usize];
        let replaced = queues.tenants.entry(tenant).or_default().insert(position, device);
        debug_assert!(replaced.is_none(), "positions are never given twice");
        queues.len += 1;
    }

    pub fn remove(&mut self, class: Class, tenant: Option<TenantTag>, position: u64) {
        self.classes[class as usize].remove(tenant, position);
    }

    /// Takes the next key of the class.
    pub fn pop(&mut self, class: Class, weights: &Weights) -> Option<DeviceId> {
        self.classes[class as usize].pop(weights)
    }

    /// The newest key of the tenant that has the most keys for its weight, if that is more than `tenant` would have
    /// with one more.
    pub fn newest_of_longest(&self, class: Class, tenant: Option<TenantTag>, weights: &Weights) -> Option<DeviceId> {
        let queues = &self.classes[class as usize];
        let for_its_weight = |tenant, len: usize| len as f64 / f64::from(weights.of(tenant));
        let own = queues.tenants.get(&tenant).map_or(0, BTreeMap::len) + 1;
        let (longest, len) = queues
            .tenants
            .iter()
            .map(|(tenant, queue)| (queue, for_its_weight(*tenant, queue.len())))
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

impl TenantQueues {
    fn remove(&mut self, tenant: Option<TenantTag>, position: u64) -> Option<DeviceId> {
        let queue = self.tenants.get_mut(&tenant)?;
        let device = queue.remove(&position)?;
        if queue.is_empty() {
            self.tenants.remove(&tenant);
        }
        self.len -= 1;
        Some(device)
    }

    fn pop(&mut self, weights: &Weights) -> Option<DeviceId> {
        let (tenant, left) = match self.served {
            Some((tenant, left)) if left > 0 && self.tenants.contains_key(&tenant) => (tenant, left),
            last => {
                let after = last.map_or(Unbounded, |(tenant, _)| Excluded(tenant));
                let next = self.tenants.range((after, Unbounded)).next();
                let (tenant, _) = next.or_else(|| self.tenants.first_key_value())?;
                (*tenant, weights.of(*tenant))
            }
        };
        self.served = Some((tenant, left - 1));
        let (position, _) = self.tenants.get(&tenant)?.first_key_value()?;
        self.remove(tenant, *position)
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

    /// 1,000 keys of `great`, then 100 each of `small` and `heavy`, in ranges of thousands.
    fn by_class() -> ByClass {
        let mut queues = ByClass::default();
        for (thousand, name, count) in [(1, "great", 1_000), (2, "small", 100), (3, "heavy", 100)] {
            for n in 0..count {
                let position = thousand * 1_000 + n;
                queues.insert(Class::Holder, tag(name), position, device(position));
            }
        }
        queues
    }

    fn popped(queues: &mut ByClass, count: usize) -> Vec<u64> {
        let pop = || queues.pop(Class::Holder, &weights());
        std::iter::from_fn(pop)
            .take(count)
            .map(|device| u64::try_from(device.as_uuid().as_u128()).unwrap())
            .collect()
    }

    #[test]
    fn tenants_are_served_by_weight_however_many_wait() {
        let mut queues = by_class();

        let served = popped(&mut queues, 100);

        let of = |thousand| served.iter().filter(|position| **position / 1_000 == thousand).count();
        assert_eq!((of(1), of(2), of(3)), (20, 20, 60));
        assert!(
            served.iter().filter(|position| **position < 2_000).is_sorted(),
            "first come, first served"
        );
    }

    #[test]
    fn lanes_that_are_empty_cost_the_others_nothing() {
        let mut queues = by_class();

        let served = popped(&mut queues, 10_000);

        assert_eq!(served.len(), 1_200);
        assert!(
            served[300..].iter().all(|position| *position < 2_000),
            "the great one gets all that is left"
        );
        assert!(queues.is_empty());
        assert_eq!(queues.len(Class::Holder), 0);
    }

    #[test]
    fn full_line_makes_room_at_the_cost_of_the_longest() {
        let queues = by_class();

        let newest = |name| queues.newest_of_longest(Class::Holder, tag(name), &weights());

        assert_eq!(newest("small"), Some(device(1_999)));
        assert_eq!(newest("new"), Some(device(1_999)));
        assert_eq!(newest("great"), None, "its own newest would not be better off");
    }

    #[test]
    fn key_that_left_is_not_served() {
        let mut queues = ByClass::default();
        queues.insert(Class::WalkIn, None, 1, device(1));
        queues.insert(Class::WalkIn, None, 2, device(2));

        queues.remove(Class::WalkIn, None, 1);
        queues.remove(Class::WalkIn, None, 1);

        assert_eq!(queues.pop(Class::WalkIn, &weights()), Some(device(2)));
        assert_eq!(queues.pop(Class::WalkIn, &weights()), None);
    }
}
