//! Ids that two devices seem to share: their sessions replace each other again and again.
//!
//! A device that comes back before its dead session was noticed replaces itself, once. Two devices with one id go on. Start with
//! [`Duplicates`]. What an operator is told of them is the caller's.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use crate::{id::DeviceId, time::Instant};

/// So many replacements of one id within [`WINDOW`] make it a duplicate.
pub const REPLACEMENTS: usize = 5;
/// See [`REPLACEMENTS`]. An id that was not replaced so often lately is none any more.
pub const WINDOW: Duration = Duration::from_secs(600);
/// Ids watched, about 100 bytes each. Then the one watched longest is forgotten, and counted anew where it goes on: where a crowd
/// replaces its dead sessions, a duplicate may be found late.
const IDS_MAX: usize = 4_096;

/// The ids replaced lately.
#[derive(Clone, Debug, Default)]
pub struct Duplicates {
    /// The last replacements of each, oldest first; at most [`REPLACEMENTS`].
    replaced_at: BTreeMap<DeviceId, VecDeque<Instant>>,
    /// Every id watched, in the order in which they were first seen.
    order: VecDeque<DeviceId>,
}

/// What is known of duplicate ids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// How many there are.
    pub count: usize,
    /// One of them: the smallest, so that it is the same at the next look.
    pub example: Option<DeviceId>,
}

impl Duplicates {
    /// A session of `device` was replaced by a newer one.
    pub fn handle_replaced(&mut self, device: DeviceId, now: Instant) {
        if let Some(times) = self.replaced_at.get_mut(&device) {
            if times.len() >= REPLACEMENTS {
                times.pop_front();
            }
            times.push_back(now);
            return;
        }
        if self.order.len() >= IDS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.replaced_at.remove(&oldest);
        }
        self.order.push_back(device);
        self.replaced_at.insert(device, VecDeque::from([now]));
    }

    /// The duplicates as of `now`. Forgets ids that were left in peace; takes time in proportion to the ids watched.
    pub fn find(&mut self, now: Instant) -> Found {
        let is_recent = |at: &Instant| now.saturating_since(*at) < WINDOW;
        self.replaced_at.retain(|_, times| times.back().is_some_and(is_recent));
        let watched = &self.replaced_at;
        self.order.retain(|device| watched.contains_key(device));
        let is_duplicate =
            |times: &VecDeque<Instant>| times.len() >= REPLACEMENTS && times.front().is_some_and(is_recent);
        let mut found = Found::default();
        for (&device, times) in &self.replaced_at {
            if is_duplicate(times) {
                found.count += 1;
                found.example = found.example.or(Some(device));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(n: u128) -> DeviceId {
        DeviceId::from_uuid(uuid::Uuid::from_u128(n))
    }

    fn at(seconds: u64) -> Instant {
        Instant::ZERO + Duration::from_secs(seconds)
    }

    fn replace(duplicates: &mut Duplicates, n: u128, times: impl IntoIterator<Item = u64>) {
        for seconds in times {
            duplicates.handle_replaced(device(n), at(seconds));
        }
    }

    #[test]
    fn ids_that_are_replaced_again_and_again_are_found() {
        let mut duplicates = Duplicates::default();

        replace(&mut duplicates, 7, [0, 60, 120, 180]);
        assert_eq!(duplicates.find(at(180)), Found::default());
        replace(&mut duplicates, 7, [240]);
        replace(&mut duplicates, 9, 200..205);

        let found = duplicates.find(at(240));
        assert_eq!((found.count, found.example), (2, Some(device(7))));
    }

    #[test]
    fn duplicate_that_is_left_in_peace_is_none_any_more_and_is_forgotten() {
        let mut duplicates = Duplicates::default();
        replace(&mut duplicates, 7, [0, 60, 120, 180, 240]);

        assert_eq!(duplicates.find(at(599)).count, 1);
        assert_eq!(duplicates.find(at(600)), Found::default());
        duplicates.find(at(240 + 600));

        assert!(duplicates.replaced_at.is_empty() && duplicates.order.is_empty());
    }

    #[test]
    fn device_that_replaces_its_dead_session_now_and_then_is_no_duplicate() {
        let mut duplicates = Duplicates::default();

        replace(&mut duplicates, 7, (0..100).map(|n| n * 150));

        assert_eq!(duplicates.find(at(99 * 150)).count, 0);
    }

    #[test]
    fn ids_watched_have_a_bound_and_the_latest_stay() {
        let mut duplicates = Duplicates::default();
        for n in 0..20_000 {
            replace(&mut duplicates, n, [0]);
        }
        replace(&mut duplicates, 30_000, 1..6);

        assert_eq!(duplicates.replaced_at.len(), IDS_MAX);
        assert_eq!(duplicates.order.len(), IDS_MAX);
        assert_eq!(duplicates.find(at(6)).example, Some(device(30_000)));
    }
}
