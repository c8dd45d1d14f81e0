//! Gathering: while many devices come, a statement waits a moment for more keys, so that a storm costs the database few large
//! statements instead of thousands of small ones. In calm times nothing waits. Start with [`Gather`].

use std::time::Duration;

use crate::time::Instant;

/// Keys that a statement is gathered for, about: beyond it a key in a larger statement costs no less.
const KEYS_WANTED: f64 = 128.0;
/// Below so many keys a second, statements are few anyway, and none waits.
const RATE_MIN: f64 = 400.0;
/// Longest wait of a statement: less than the tenth of a second that an idle ceiling saves up, or it would lose some.
pub(super) const WAIT_MAX: Duration = Duration::from_millis(80);
/// A database is busy if a statement takes more than the inverse of this of the wait.
const BUSY_FACTOR: f64 = 4.0;
/// The rate is averaged over about this time.
const RATE_OVER: Duration = Duration::from_millis(50);

/// When the next statement may be sent.
#[derive(Debug)]
pub(super) struct Gather {
    keys_per_second: f64,
    sent_at: Instant,
    /// Seconds that a statement takes, averaged.
    took: f64,
}

impl Gather {
    pub const fn new(now: Instant) -> Self {
        Self {
            keys_per_second: 0.0,
            sent_at: now,
            took: 0.0,
        }
    }

    /// A statement ended.
    pub fn handle_ended(&mut self, took: Duration) {
        self.took += (took.as_secs_f64() - self.took) / 4.0;
    }

    /// A statement of so many keys was sent.
    pub fn handle_sent(&mut self, keys: usize, now: Instant) {
        self.keys_per_second = self.rate(now) + keys as f64 / RATE_OVER.as_secs_f64();
        self.sent_at = now;
    }

    /// Until when a statement that is not full waits for more keys.
    pub fn until(&self, is_at_ceiling: bool, now: Instant) -> Instant {
        let rate = self.rate(now);
        let wait = Duration::from_secs_f64(KEYS_WANTED / rate.max(1.0)).min(WAIT_MAX);
        // A busy database gathers by itself: while it works, the next statement fills. To let it idle would cost throughput.
        let is_busy = self.took * BUSY_FACTOR >= wait.as_secs_f64();
        if !is_at_ceiling && (rate < RATE_MIN || is_busy) {
            return self.sent_at;
        }
        self.sent_at + wait
    }

    fn rate(&self, now: Instant) -> f64 {
        let age = now.saturating_since(self.sent_at).as_secs_f64();
        self.keys_per_second * (-age / RATE_OVER.as_secs_f64()).exp()
    }
}
