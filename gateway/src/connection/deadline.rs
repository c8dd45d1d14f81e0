//! Deadlines of the steps of a handshake, and decisions on late ones. Start with [`StepDeadline`].

use std::time::{Duration, Instant};

use crate::edge::limiter::{ConnectionLimiter, HandshakePermit, LATE_AFTER, Late, PARKED_AFTER, Sent};

/// A step that has taken this part of its time is slow: while over half of the permits are in use, its address then
/// gets at most a fair share of them. Not earlier, because a fleet that reconnects at once also has slow handshakes.
const SLOW_AFTER_PART: u32 = 2;

/// Why a step is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GivenUp {
    /// Its time has passed.
    TimedOut,
    /// It was given up for others, which wait because of its address, or because of it.
    MadeWay,
}

/// The deadline of one step.
pub(super) struct StepDeadline<'a> {
    limiter: &'a ConnectionLimiter,
    permit: &'a mut HandshakePermit,
    begun: Instant,
    time_max: Duration,
    slow_after: Duration,
    is_grace_used: bool,
}

impl<'a> StepDeadline<'a> {
    /// `time_usual` is the time of a step whose address is not refused already; `time_max` may be less.
    pub(super) fn begin(
        limiter: &'a ConnectionLimiter,
        permit: &'a mut HandshakePermit,
        time_max: Duration,
        time_usual: Duration,
    ) -> Self {
        Self {
            limiter,
            permit,
            begun: Instant::now(),
            time_max: time_max.min(time_usual),
            slow_after: time_usual / SLOW_AFTER_PART,
            is_grace_used: false,
        }
    }

    /// Time until the next [`check`](Self::check).
    pub(super) fn next_check(&self) -> Duration {
        let elapsed = self.begun.elapsed();
        let interval = if elapsed < PARKED_AFTER {
            PARKED_AFTER
        } else {
            LATE_AFTER
        };
        self.time_max.saturating_sub(elapsed).min(interval)
    }

    /// Takes the memory that a client needs which begins to send. Returns `false` if there is none yet.
    pub(super) fn try_begin(&mut self) -> bool {
        self.limiter.try_begin(self.permit)
    }

    /// Whether the step may continue. `has_unread`: on a busy machine its data may have arrived without being read.
    /// That saves it once.
    pub(super) fn check(&mut self, sent: Sent, has_unread: impl FnOnce() -> bool) -> Result<(), GivenUp> {
        let elapsed = self.begun.elapsed();
        if elapsed >= self.time_max {
            return Err(GivenUp::TimedOut);
        }
        if elapsed >= self.slow_after {
            self.permit.mark_slow();
        }
        if self.limiter.check_late(self.permit, elapsed, sent) == Late::Leave {
            if self.is_grace_used || !has_unread() {
                return Err(GivenUp::MadeWay);
            }
            self.is_grace_used = true;
        }
        Ok(())
    }
}
