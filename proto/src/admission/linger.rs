//! The batching delay: in a storm a statement waits briefly for more keys. So the database gets a few large statements
//! instead of thousands of small ones. In calm times nothing waits. Start with [`Linger`]; docs/design/admission.md has
//! the reasons.

use std::time::Duration;

use crate::time::Instant;

/// Approximate number of keys that a statement waits for. Beyond it, a key in a larger statement costs no less.
const KEYS_WANTED: f64 = 128.0;
/// Minimum rate at which a statement lingers, in keys per second: below it statements are few anyway.
const RATE_MIN: f64 = 400.0;
/// Maximum time for which a statement lingers: less than the tenth of a second that an idle ceiling saves up.
pub(super) const WAIT_MAX: Duration = Duration::from_millis(80);
/// The database is busy if a statement takes longer than the delay divided by this.
const BUSY_FACTOR: f64 = 4.0;
/// Time constant of the average rate.
const RATE_OVER: Duration = Duration::from_millis(50);

/// Decides when the next statement may be sent.
#[derive(Debug)]
pub(super) struct Linger {
    keys_per_second: f64,
    sent_at: Instant,
    /// Average time of a statement, in seconds.
    took: f64,
}

impl Linger {
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

    /// A statement was sent.
    pub fn handle_sent(&mut self, keys: usize, now: Instant) {
        self.keys_per_second = self.rate(now) + keys as f64 / RATE_OVER.as_secs_f64();
        self.sent_at = now;
    }

    /// Time until which a statement that is not full waits for more keys.
    pub fn until(&self, is_at_ceiling: bool, now: Instant) -> Instant {
        let rate = self.rate(now);
        let wait = Duration::from_secs_f64(KEYS_WANTED / rate.max(1.0)).min(WAIT_MAX);
        // A busy database batches on its own: while it works, the next statement fills. An idle one would lose
        // throughput.
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
