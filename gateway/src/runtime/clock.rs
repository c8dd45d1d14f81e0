//! The clock of decisions: adapters read it once per wake-up, and pass the result to the pure code. Timers and timeouts
//! of adapters use tokio's clock, or the standard library's.

use std::time::{SystemTime, UNIX_EPOCH};

use seawall_proto::time::{Instant, WallTime};

/// Monotonic time since the process started, and wall-clock time.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    origin: std::time::Instant,
}

impl Clock {
    #[must_use]
    pub fn start() -> Self {
        Self {
            origin: std::time::Instant::now(),
        }
    }

    #[must_use]
    pub fn now(&self) -> Instant {
        Instant::ZERO + self.origin.elapsed()
    }

    /// For tokio's timers.
    #[must_use]
    pub fn deadline(&self, at: Instant) -> tokio::time::Instant {
        tokio::time::Instant::from_std(self.origin + at.saturating_since(Instant::ZERO).min(FAR))
    }

    /// Zero if the machine's clock is before 1970.
    #[must_use]
    pub fn wall(&self) -> WallTime {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        WallTime::from_unix_ms(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
    }
}

/// Tokio's timers end at about two years.
const FAR: std::time::Duration = std::time::Duration::from_secs(365 * 24 * 3_600);
