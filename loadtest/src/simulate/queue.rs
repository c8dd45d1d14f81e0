//! The calendar: what happens next in virtual time.
//!
//! Millions of devices wait for their slots at once, most of them minutes ahead. A single heap would sort them all, again and
//! again, across the whole memory. Here time is cut into buckets of about a millisecond, and buckets into pages of about four
//! seconds: an event ahead is appended to its page, moved to its bucket when the page comes up, and sorted only within its bucket.

use std::{
    cmp::{Ordering, Reverse},
    collections::{BTreeMap, BinaryHeap},
};

use seawall_proto::time::Instant;

/// A bucket is 2^10 µs: at 100,000 events per second it holds about a hundred.
const BUCKET_BITS: u32 = 10;
/// A page is 2^12 buckets, 4.2 s.
const PAGE_BITS: u32 = 12;
const BUCKETS: usize = 1 << PAGE_BITS;

/// Events in the order of their times; those of one time in the order in which they were put in.
#[derive(Debug)]
pub struct Calendar<E> {
    /// Rest of the current bucket, and of all before it.
    current: BinaryHeap<Due<E>>,
    /// Its number, counted from time zero.
    bucket: u64,
    /// The page of that bucket.
    near: Vec<Vec<(Instant, E)>>,
    /// Pages behind it.
    far: BTreeMap<u64, Vec<(Instant, E)>>,
    counter: u64,
    len: usize,
}

#[derive(Debug)]
struct Due<E> {
    at: Instant,
    order: u64,
    event: E,
}

impl<E> Default for Calendar<E> {
    fn default() -> Self {
        Self {
            current: BinaryHeap::new(),
            bucket: 0,
            near: std::iter::repeat_with(Vec::new).take(BUCKETS).collect(),
            far: BTreeMap::new(),
            counter: 0,
            len: 0,
        }
    }
}

impl<E> Calendar<E> {
    /// `event` happens at `at`; at once where that is past.
    pub fn push(&mut self, at: Instant, event: E) {
        self.len += 1;
        let bucket = at.as_micros() >> BUCKET_BITS;
        if bucket <= self.bucket {
            self.push_current(at, event);
        } else if bucket >> PAGE_BITS == self.bucket >> PAGE_BITS {
            self.near[index(bucket)].push((at, event));
        } else {
            self.far.entry(bucket >> PAGE_BITS).or_default().push((at, event));
        }
    }

    /// The next event, and its time. `announce` is shown a millisecond's events before the first of them is given, so that what they
    /// concern can be fetched from memory all at once.
    pub fn pop(&mut self, mut announce: impl FnMut(&E)) -> Option<(Instant, E)> {
        loop {
            if let Some(due) = self.current.pop() {
                self.len -= 1;
                return Some((due.at, due.event));
            }
            if self.len == 0 {
                return None;
            }
            self.turn();
            self.current.iter().for_each(|due| announce(&due.event));
        }
    }

    /// Makes the next bucket the current one; there is one, for something is left.
    fn turn(&mut self) {
        let from = index(self.bucket) + 1;
        let found = self.near.iter().skip(from).position(|bucket| !bucket.is_empty());
        match found {
            Some(ahead) => self.bucket += ahead as u64 + 1,
            None => {
                let Some((page, events)) = self.far.pop_first() else {
                    return;
                };
                self.bucket = page << PAGE_BITS;
                for (at, event) in events {
                    self.near[index(at.as_micros() >> BUCKET_BITS)].push((at, event));
                }
            }
        }
        let mut events = std::mem::take(&mut self.near[index(self.bucket)]);
        for (at, event) in events.drain(..) {
            self.push_current(at, event);
        }
        // Its memory is used again when the next page comes up.
        self.near[index(self.bucket)] = events;
    }

    fn push_current(&mut self, at: Instant, event: E) {
        let order = self.counter;
        self.counter += 1;
        self.current.push(Due { at, order, event });
    }
}

/// The place of a bucket within its page.
#[expect(clippy::cast_possible_truncation, reason = "masked to 12 bits")]
const fn index(bucket: u64) -> usize {
    (bucket & (BUCKETS as u64 - 1)) as usize
}

/// The earliest is the greatest, as the heap gives the greatest first.
impl<E> Ord for Due<E> {
    fn cmp(&self, other: &Self) -> Ordering {
        Reverse((self.at, self.order)).cmp(&Reverse((other.at, other.order)))
    }
}

impl<E> PartialOrd for Due<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> PartialEq for Due<E> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl<E> Eq for Due<E> {}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::SmallRng};

    use super::*;

    #[test]
    fn events_come_in_the_order_of_time_and_then_of_entry() {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut calendar = Calendar::default();
        let mut model: BTreeMap<(u64, u32), ()> = BTreeMap::new();
        let mut now = 0;

        for entry in 0..200_000_u32 {
            // Ties, the current bucket, the current page, and pages far ahead.
            let ahead = match entry % 4 {
                0 => 0,
                1 => rng.random_range(0..2_000),
                2 => rng.random_range(0..4_000_000),
                _ => rng.random_range(0..1_000_000_000),
            };
            calendar.push(Instant::from_micros(now + ahead), entry);
            model.insert((now + ahead, entry), ());
            if entry % 3 == 0 {
                let (at, event) = calendar.pop(|_| ()).unwrap();
                assert_eq!(model.pop_first(), Some(((at.as_micros(), event), ())));
                now = at.as_micros();
            }
        }
        while let Some((at, event)) = calendar.pop(|_| ()) {
            assert_eq!(model.pop_first(), Some(((at.as_micros(), event), ())));
        }

        assert!(model.is_empty() && calendar.len == 0);
    }
}
