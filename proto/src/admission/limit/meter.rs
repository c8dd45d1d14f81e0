//! Answers of the database while devices wait, in windows of about a second.

use std::time::Duration;

use crate::time::Instant;

/// Minimum length of a window.
const WINDOW_MIN: Duration = Duration::from_secs(1);
/// Maximum idle time of a window that is still backlogged, as a part of its span. Devices that ask again when they are
/// answered leave short gaps.
const IDLE_PART: u32 = 20;
/// Number of buckets of times: four for each doubling, from [`BUCKET_FIRST_US`]. The last one holds all times above 2
/// s, which no statement reaches.
const BUCKETS: usize = 64;
const BUCKETS_PER_DOUBLING: f64 = 4.0;
const BUCKET_FIRST_US: f64 = 32.0;

/// Measurement between two answers of the database.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::admission) struct Window {
    pub span: Duration,
    /// Number of keys answered.
    pub answered: u64,
    /// 90th percentile of the time of a statement, to within a fifth.
    pub took_p90: Duration,
    /// Whether devices waited nearly all the time. Only then is the rate the capacity of the database, not the demand
    /// of the fleet.
    pub is_backlogged: bool,
}

impl Window {
    /// Keys answered per second.
    pub fn rate(&self) -> f64 {
        self.answered as f64 / self.span.as_secs_f64().max(1e-6)
    }
}

/// Counts in windows. A window begins and ends with an answer, so that it contains whole statements of any size.
#[derive(Debug)]
pub(in crate::admission) struct Meter {
    begin: Option<Instant>,
    answered: u64,
    /// Idle time of this window, up to `idle_since`.
    idle: Duration,
    /// Time since which no key waits although more could be sent.
    idle_since: Option<Instant>,
    took: [u32; BUCKETS],
    last: Option<Window>,
    last_backlogged: Option<Window>,
}

impl Default for Meter {
    fn default() -> Self {
        Self {
            begin: None,
            answered: 0,
            idle: Duration::ZERO,
            idle_since: None,
            took: [0; BUCKETS],
            last: None,
            last_backlogged: None,
        }
    }
}

impl Meter {
    /// No key waits, although more could be sent.
    pub fn handle_idle(&mut self, now: Instant) {
        self.idle_since.get_or_insert(now);
    }

    /// Keys wait, or as many are sent as may be.
    pub fn handle_busy(&mut self, now: Instant) {
        if let Some(since) = self.idle_since.take() {
            self.idle += now.saturating_since(since);
        }
    }

    /// A statement ended, with this number of keys answered. Returns the window that it completes, if any.
    pub fn handle_ended(&mut self, answered: usize, took: Duration, now: Instant) -> Option<Window> {
        self.took[bucket(took)] += 1;
        let Some(begin) = self.begin else {
            self.restart(now);
            return None;
        };
        self.answered += u64::try_from(answered).unwrap_or(u64::MAX);
        let span = now.saturating_since(begin);
        if span < WINDOW_MIN {
            return None;
        }
        let idle = self.idle
            + self
                .idle_since
                .map_or(Duration::ZERO, |since| now.saturating_since(since));
        let window = Window {
            span,
            answered: self.answered,
            took_p90: self.p90(),
            is_backlogged: idle * IDLE_PART <= span,
        };
        self.restart(now);
        self.last = Some(window);
        if window.is_backlogged {
            self.last_backlogged = Some(window);
        }
        Some(window)
    }

    /// The database answers again after an outage: no window spans it.
    pub const fn handle_recovered(&mut self) {
        self.begin = None;
    }

    /// Keys answered per second in the last window in which devices waited nearly all the time. Zero before the first.
    pub fn rate(&self) -> f64 {
        self.last_backlogged.map_or(0.0, |window| window.rate())
    }

    /// 90th percentile of the time of a statement in the last window. Zero before the first.
    pub fn took_p90(&self) -> Duration {
        self.last.map_or(Duration::ZERO, |window| window.took_p90)
    }

    fn p90(&self) -> Duration {
        let all: u32 = self.took.iter().sum();
        let mut left = all - all / 10;
        for (index, count) in self.took.iter().enumerate() {
            if *count >= left {
                return bound(index);
            }
            left -= count;
        }
        bound(BUCKETS - 1)
    }

    fn restart(&mut self, now: Instant) {
        *self = Self {
            begin: Some(now),
            idle_since: self.idle_since.map(|_| now),
            last: self.last,
            last_backlogged: self.last_backlogged,
            ..Self::default()
        };
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positive, and bounded by the number of buckets"
)]
fn bucket(took: Duration) -> usize {
    let doublings = (took.as_secs_f64() * 1e6 / BUCKET_FIRST_US).max(1.0).log2();
    ((doublings * BUCKETS_PER_DOUBLING) as usize).min(BUCKETS - 1)
}

/// Maximum time of a bucket.
fn bound(bucket: usize) -> Duration {
    let doublings = (bucket + 1) as f64 / BUCKETS_PER_DOUBLING;
    Duration::from_secs_f64(BUCKET_FIRST_US * doublings.exp2() / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn at(ms: u64) -> Instant {
        Instant::from_micros(ms * 1_000)
    }

    #[test]
    fn window_counts_what_came_after_its_first_answer() {
        let mut meter = Meter::default();
        assert_eq!(meter.handle_ended(256, MS, at(0)), None);
        assert_eq!(meter.handle_ended(200, MS, at(500)), None);
        assert_eq!(meter.handle_ended(0, MS, at(900)), None);

        let window = meter.handle_ended(200, MS, at(1_000)).unwrap();

        assert!((window.rate() - 400.0).abs() < 1e-9);
        assert!(window.is_backlogged);
    }

    /// The window of two seconds in which nothing waits from the first of these times to the second.
    fn window_idle_in(from: u64, to: u64) -> Window {
        let mut meter = Meter::default();
        meter.handle_ended(1, MS, at(0));
        meter.handle_idle(at(from));
        meter.handle_idle(at(to - 1));
        meter.handle_busy(at(to));
        meter.handle_ended(1, MS, at(2_000)).unwrap()
    }

    #[test]
    fn window_that_is_idle_for_more_than_a_twentieth_says_nothing_of_capacity() {
        assert!(window_idle_in(500, 600).is_backlogged);
        assert!(!window_idle_in(500, 601).is_backlogged);
    }

    #[test]
    fn idle_span_counts_in_each_window_that_it_reaches_into() {
        let mut meter = Meter::default();
        meter.handle_ended(1, MS, at(0));
        meter.handle_idle(at(990));
        let before = meter.handle_ended(1, MS, at(1_000)).unwrap();
        meter.handle_busy(at(1_500));
        let after = meter.handle_ended(1, MS, at(2_000)).unwrap();

        assert!(before.is_backlogged && !after.is_backlogged);
    }

    #[test]
    fn p90_is_exceeded_by_one_of_ten() {
        let mut meter = Meter::default();
        meter.handle_ended(1, MS, at(0));
        for n in 0..99_u64 {
            let took = if n < 90 { MS } else { MS * 400 };
            meter.handle_ended(1, took, at(n));
        }
        let most = meter.handle_ended(1, MS * 400, at(1_000)).unwrap();

        assert!((MS..MS * 6 / 5).contains(&most.took_p90), "{most:?}");
        for n in 0..10 {
            meter.handle_ended(1, MS * 400, at(1_000 + n));
        }
        let slower = meter.handle_ended(1, MS, at(2_000)).unwrap();
        assert!((MS * 400..MS * 480).contains(&slower.took_p90), "{slower:?}");
    }
}
