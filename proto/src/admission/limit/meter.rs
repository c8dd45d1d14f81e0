//! What the database answers while devices wait, in windows of about a second.

use std::time::Duration;

use crate::time::Instant;

/// Shortest window that is measured.
const WINDOW_MIN: Duration = Duration::from_secs(1);
/// Buckets of times taken: four to a doubling, from [`BUCKET_FIRST_US`] on. The last holds what is longer: 2 s, beyond any statement.
const BUCKETS: usize = 64;
const BUCKETS_PER_DOUBLING: f64 = 4.0;
const BUCKET_FIRST_US: f64 = 32.0;

/// What was measured between two answers of the database.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::admission) struct Window {
    pub span: Duration,
    /// Keys answered.
    pub answered: u64,
    /// Nine of ten statements took no longer, to the accuracy of a bucket: a fifth.
    pub took_p90: Duration,
    /// Devices were waiting all the time: only then does the rate tell the database's capacity, not the fleet's demand.
    pub is_backlogged: bool,
}

impl Window {
    /// Keys answered a second.
    pub fn rate(&self) -> f64 {
        self.answered as f64 / self.span.as_secs_f64().max(1e-6)
    }
}

/// Counts into windows. A window begins and ends with an answer, so that it holds whole statements, however large.
#[derive(Debug)]
pub(in crate::admission) struct Meter {
    begin: Option<Instant>,
    answered: u64,
    was_idle: bool,
    took: [u32; BUCKETS],
    last: Option<Window>,
    last_backlogged: Option<Window>,
}

impl Default for Meter {
    fn default() -> Self {
        Self {
            begin: None,
            answered: 0,
            was_idle: false,
            took: [0; BUCKETS],
            last: None,
            last_backlogged: None,
        }
    }
}

impl Meter {
    /// Nobody waits, although more could be sent.
    pub const fn handle_idle(&mut self) {
        self.was_idle = true;
    }

    /// A statement ended, with so many keys answered; a window, if that completed one.
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
        let window = Window {
            span,
            answered: self.answered,
            took_p90: self.p90(),
            is_backlogged: !self.was_idle,
        };
        self.restart(now);
        self.last = Some(window);
        if window.is_backlogged {
            self.last_backlogged = Some(window);
        }
        Some(window)
    }

    /// Keys answered a second when devices last waited; 0 where they never did.
    pub fn rate(&self) -> f64 {
        self.last_backlogged.map_or(0.0, |window| window.rate())
    }

    /// Nine of ten statements took no longer in the last second that had some; 0 where there were none yet.
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

/// The longest time of a bucket.
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

    #[test]
    fn window_with_idle_time_says_nothing_of_capacity() {
        let mut meter = Meter::default();
        meter.handle_ended(1, MS, at(0));
        meter.handle_idle();

        let window = meter.handle_ended(1, MS, at(2_000)).unwrap();

        assert!(!window.is_backlogged);
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
