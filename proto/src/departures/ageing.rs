//! Maximum age of sessions, so that devices that connected together do not stay together.

use std::{collections::VecDeque, time::Duration};

use super::NodeLoad;
use crate::{id::SessionId, rate::Bucket, time::Instant};

/// Part of the configured life by which lives differ from it, to both sides.
const LIFE_SPREAD: f64 = 0.25;
/// Part of the live sessions that may end per minute in the long run. With [`SAVED_SPAN`] it stays below a thousandth
/// in any minute. A life of 24 h needs 0.07 %.
const SHARE_PER_MINUTE: f64 = 0.000_9;
/// Time whose unused closes are saved up.
const SAVED_SPAN: Duration = Duration::from_secs(5);
/// Maximum time between two scans for old sessions.
const SCAN_INTERVAL: Duration = Duration::from_secs(5);

/// Lives of sessions: the configured one, a quarter more or less by the session's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lives(Duration);

impl Lives {
    /// Returns the lives of sessions that live for `mean` on average.
    #[must_use]
    pub const fn new(mean: Duration) -> Self {
        Self(mean)
    }

    /// Whether a session has reached the end of its life.
    #[must_use]
    pub fn is_over(self, session: SessionId, opened_at: Instant, now: Instant) -> bool {
        now.saturating_since(opened_at) >= self.of(session)
    }

    /// The life of one session: the same at each call.
    fn of(self, session: SessionId) -> Duration {
        let part = scattered(session.0) as f64 / u64::MAX as f64;
        self.0.mul_f64(1.0 - LIFE_SPREAD + 2.0 * LIFE_SPREAD * part)
    }
}

/// Old sessions that are due.
#[derive(Debug)]
pub(super) struct Ageing<S> {
    lives: Lives,
    bucket: Bucket,
    due: VecDeque<S>,
    scan_at: Instant,
}

impl<S> Ageing<S> {
    /// Creates the ageing of sessions that live for `life` on average. The first old session may end at once.
    pub fn new(life: Duration, now: Instant) -> Self {
        Self {
            lives: Lives::new(life),
            bucket: Bucket::new(1.0, now),
            due: VecDeque::new(),
            scan_at: now + SCAN_INTERVAL.min(life),
        }
    }

    /// Time of the next scan.
    pub const fn scan_at(&self) -> Instant {
        self.scan_at
    }

    /// Returns the lives to scan for, if a scan is due.
    pub fn poll_scan(&mut self, now: Instant) -> Option<Lives> {
        (self.scan_at <= now).then(|| {
            self.scan_at = now + SCAN_INTERVAL.min(self.lives.0);
            self.lives
        })
    }

    /// Takes the sessions `found` by a scan. Queues those that may end now.
    pub fn handle_found(&mut self, found: Vec<S>, load: &NodeLoad, now: Instant) {
        if !load.is_calm {
            return self.suspend(now);
        }
        let per_second = load.sessions as f64 * SHARE_PER_MINUTE / 60.0;
        // One more, for the fraction of a session that earlier passes left.
        self.bucket
            .refill(per_second, per_second * SAVED_SPAN.as_secs_f64() + 1.0, now);
        let due = self.bucket.take(found.len());
        self.due.extend(found.into_iter().take(due));
    }

    /// Ends no session for now, and saves nothing up.
    pub fn suspend(&mut self, now: Instant) {
        self.bucket = Bucket::new(0.0, now);
        self.due.clear();
    }

    /// Removes a session that ends now.
    pub fn poll_close(&mut self) -> Option<S> {
        self.due.pop_front()
    }
}

/// Maps neighbouring numbers far apart (the finalizer of SplitMix64: Steele, Lea and Flood, "Fast splittable
/// pseudorandom number generators", 2014).
const fn scattered(number: u64) -> u64 {
    let mixed = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn lives_are_spread_evenly_over_a_quarter_to_both_sides() {
        let lives = Lives::new(DAY);

        let hours: Vec<f64> = (0..100_000)
            .map(|n| lives.of(SessionId(n)).as_secs_f64() / 3_600.0)
            .collect();

        assert!(hours.iter().all(|hours| (18.0..=30.0).contains(hours)));
        for hour in 18..30 {
            let begun = f64::from(hour);
            let share = hours
                .iter()
                .filter(|&&hours| hours >= begun && hours < begun + 1.0)
                .count();
            assert!((7_900..=8_800).contains(&share), "{share} end in hour {hour}");
        }
        assert_eq!(lives.of(SessionId(7)), lives.of(SessionId(7)));
    }

    #[test]
    fn at_most_a_thousandth_ends_in_any_minute() {
        let mut ageing = Ageing::new(DAY, Instant::ZERO);
        let mut now = Instant::ZERO;
        let mut taken = Vec::new();

        for pass in 0..1_200 {
            now += SCAN_INTERVAL;
            // For ten minutes no session is old enough.
            let old = if (100..220).contains(&pass) { 0 } else { 50_000 };
            taken.push(ended(&mut ageing, old, &load(50_000), now));
        }

        assert!(
            taken.windows(12).all(|minute| minute.iter().sum::<usize>() <= 50),
            "{taken:?}"
        );
        let minutes = (1_200 - 120) / 12;
        assert!((minutes * 44..=minutes * 46).contains(&taken.iter().sum::<usize>()));
        now += DAY;
        assert!(
            ended(&mut ageing, 50_000, &load(50_000), now) <= 4,
            "a late caller gets no burst"
        );
    }

    #[test]
    fn nobody_ends_in_a_storm_and_nothing_is_saved_up_for_after_it() {
        let mut ageing = Ageing::new(DAY, Instant::ZERO);
        let end = Instant::ZERO + Duration::from_secs(3_600);
        let storm = NodeLoad {
            is_calm: false,
            ..load(50_000)
        };

        assert_eq!(ended(&mut ageing, 50_000, &storm, end), 0);

        assert_eq!(ended(&mut ageing, 50_000, &load(50_000), end), 0);
        assert_eq!(ended(&mut ageing, 50_000, &load(50_000), end + SCAN_INTERVAL), 3);
    }

    #[test]
    fn few_sessions_end_rarely() {
        let mut ageing = Ageing::new(DAY, Instant::ZERO);
        let mut now = Instant::ZERO;
        let mut taken = 0;

        while now < Instant::ZERO + DAY {
            now += SCAN_INTERVAL;
            taken += ended(&mut ageing, 10, &load(10), now);
        }

        // 10 sessions, 0.09 % a minute, 1,440 minutes.
        assert!((13..=14).contains(&taken), "{taken}");
    }

    /// Of `old` sessions that a scan finds, the number that ends.
    fn ended(ageing: &mut Ageing<usize>, old: usize, load: &NodeLoad, now: Instant) -> usize {
        ageing.handle_found((0..old).collect(), load, now);
        std::iter::from_fn(|| ageing.poll_close()).count()
    }

    fn load(sessions: usize) -> NodeLoad {
        NodeLoad {
            sessions,
            capacity_per_second: 1_000.0,
            is_calm: true,
        }
    }
}
