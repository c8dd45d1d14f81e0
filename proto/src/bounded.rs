//! A map with a maximum number of entries: beyond it the entry of the lowest rank is removed, and of these the oldest.

use std::collections::{BTreeMap, btree_map};

/// Ordered by key, so that nothing depends on a hash.
#[derive(Clone, Debug)]
pub(crate) struct Bounded<K, V> {
    entries: BTreeMap<K, Entry<V>>,
    /// Keys by rank, then by the order of insertion or renewal.
    order: BTreeMap<Position, K>,
    counter: u64,
    len_max: usize,
}

/// Rank, and number of the insertion or renewal.
type Position = (u64, u64);

#[derive(Clone, Debug)]
struct Entry<V> {
    value: V,
    /// Its key in [`Bounded::order`].
    position: Position,
}

impl<K: Copy + Ord, V> Bounded<K, V> {
    /// `len_max`: at least 1.
    pub const fn new(len_max: usize) -> Self {
        Self {
            entries: BTreeMap::new(),
            order: BTreeMap::new(),
            counter: 0,
            len_max,
        }
    }

    pub fn get(&self, key: &K) -> Option<&V> {
        self.entries.get(key).map(|entry| &entry.value)
    }

    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.entries.get_mut(key).map(|entry| &mut entry.value)
    }

    /// Returns the value of `key`, inserted with rank 0 if it is missing. The first entry may be removed for it.
    pub fn entry(&mut self, key: K, value: impl FnOnce() -> V) -> &mut V {
        if self.entries.len() >= self.len_max
            && !self.entries.contains_key(&key)
            && let Some((_, first)) = self.order.pop_first()
        {
            self.entries.remove(&first);
        }
        let entry = match self.entries.entry(key) {
            btree_map::Entry::Occupied(entry) => entry.into_mut(),
            btree_map::Entry::Vacant(vacant) => {
                self.counter += 1;
                let position = (0, self.counter);
                self.order.insert(position, key);
                vacant.insert(Entry {
                    value: value(),
                    position,
                })
            }
        };
        &mut entry.value
    }

    /// Makes the entry the newest one of rank 0.
    pub fn renew(&mut self, key: &K) {
        self.rank(key, 0);
    }

    /// Makes the entry the newest one of this rank. Entries of a lower rank are removed before it.
    pub fn rank(&mut self, key: &K, rank: u64) {
        if let Some(entry) = self.entries.get_mut(key) {
            self.order.remove(&entry.position);
            self.counter += 1;
            entry.position = (rank, self.counter);
            self.order.insert(entry.position, *key);
        }
    }

    pub fn remove(&mut self, key: &K) -> Option<V> {
        let entry = self.entries.remove(key)?;
        self.order.remove(&entry.position);
        Some(entry.value)
    }

    /// Keeps the entries for which `is_kept` is true.
    pub fn retain(&mut self, mut is_kept: impl FnMut(&K, &V) -> bool) {
        let order = &mut self.order;
        self.entries.retain(|key, entry| {
            let keeps = is_kept(key, &entry.value);
            if !keeps {
                order.remove(&entry.position);
            }
            keeps
        });
    }

    /// All entries, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.entries.iter().map(|(key, entry)| (key, &entry.value))
    }

    pub fn clear(&mut self) {
        self.entries.clear();
        self.order.clear();
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        debug_assert_eq!(self.entries.len(), self.order.len());
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(map: &Bounded<u32, ()>) -> Vec<u32> {
        map.iter().map(|(key, ())| *key).collect()
    }

    fn filled() -> Bounded<u32, ()> {
        let mut map = Bounded::new(3);
        for key in [3, 1, 2] {
            map.entry(key, || ());
        }
        map
    }

    #[test]
    fn where_it_is_full_the_entry_that_came_first_goes() {
        let mut map = filled();

        map.entry(1, || unreachable!("it is there"));
        map.entry(4, || ());

        assert_eq!((map.len(), keys(&map)), (3, vec![1, 2, 4]));
    }

    #[test]
    fn entry_that_is_renewed_outlives_those_that_came_later() {
        let mut map = filled();

        map.renew(&3);
        map.entry(4, || ());

        assert_eq!(keys(&map), [2, 3, 4]);
    }

    #[test]
    fn entry_of_a_higher_rank_outlives_all_of_a_lower_one() {
        let mut map = filled();

        map.rank(&3, 7);
        for key in 10..20 {
            map.entry(key, || ());
        }
        assert_eq!(keys(&map), [3, 18, 19]);
        map.rank(&3, 0);
        for key in 20..23 {
            map.entry(key, || ());
        }

        assert_eq!((map.len(), keys(&map)), (3, vec![20, 21, 22]));
    }

    #[test]
    fn entries_that_are_removed_make_room() {
        let mut map = filled();

        assert_eq!(map.remove(&3), Some(()));
        map.retain(|key, ()| *key != 1);
        for key in [5, 6] {
            map.entry(key, || ());
        }

        assert_eq!((map.len(), keys(&map)), (3, vec![2, 5, 6]));
    }
}
