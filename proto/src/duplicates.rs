//! Ids that two devices seem to share: their sessions replace each other again and again.
//!
//! A device that reconnects before its dead session is noticed replaces itself, once. Two devices with one id continue
//! to replace each other. Start with [`Duplicates`]. The caller reports them to operators.

use std::{collections::VecDeque, time::Duration};

use crate::{bounded::Bounded, id::DeviceId, time::Instant};

/// Number of replacements of one id within [`WINDOW`] that makes it a duplicate.
pub const REPLACEMENTS: usize = 5;
/// Time over which [`REPLACEMENTS`] are counted. Without as many, an id is not a duplicate any more.
pub const WINDOW: Duration = Duration::from_secs(600);
/// Maximum number of ids watched, about 100 bytes each. Beyond it the one watched longest is forgotten, and its count
/// restarts. While many devices replace dead sessions, a duplicate may be found late.
const IDS_MAX: usize = 4_096;

/// Ids whose sessions were replaced lately.
#[derive(Clone, Debug)]
pub struct Duplicates {
    /// Times of the last replacements of each id, oldest first; at most [`REPLACEMENTS`].
    replaced_at: Bounded<DeviceId, VecDeque<Instant>>,
}

impl Default for Duplicates {
    fn default() -> Self {
        Self {
            replaced_at: Bounded::new(IDS_MAX),
        }
    }
}

/// Duplicate ids found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Number of duplicates.
    pub count: usize,
    /// The smallest of them, so that repeated calls return the same one.
    pub example: Option<DeviceId>,
}

impl Duplicates {
    /// A session of `device` was replaced by a newer one.
    pub fn handle_replaced(&mut self, device: DeviceId, now: Instant) {
        let times = self.replaced_at.entry(device, VecDeque::new);
        if times.len() >= REPLACEMENTS {
            times.pop_front();
        }
        times.push_back(now);
    }

    /// The duplicates as of `now`. Forgets ids without recent replacements. Takes time in proportion to the ids
    /// watched.
    pub fn find(&mut self, now: Instant) -> Found {
        let is_recent = |at: &Instant| now.saturating_since(*at) < WINDOW;
        self.replaced_at.retain(|_, times| times.back().is_some_and(is_recent));
        let is_duplicate =
            |times: &VecDeque<Instant>| times.len() >= REPLACEMENTS && times.front().is_some_and(is_recent);
        let mut found = Found::default();
        for (&device, times) in self.replaced_at.iter() {
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

        assert_eq!(duplicates.replaced_at.len(), 0);
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
        assert_eq!(duplicates.find(at(6)).example, Some(device(30_000)));
    }
}
