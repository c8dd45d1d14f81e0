//! Two limits tried in turn, and what each gave.
//!
//! Throughput is not counted by the clock: a window holds few statements of many keys each, and where it begins and ends would
//! decide the result. By Little's law the throughput of a full pipe is what is in flight divided by how long it takes, and time
//! taken is known of every statement.

use std::time::Duration;

use super::LATENCY_MAX;
use crate::time::Instant;

/// Which of the two limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Arm {
    #[default]
    Low,
    High,
}

/// The arm that a statement was sent in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    arm: Arm,
    pair: u32,
}

/// What the statements of one arm came to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Measured {
    /// Statements sent, and those of them that filled the limit.
    sent: u32,
    sent_full: u32,
    /// Statements ended, of those that filled the limit.
    pub statements: u32,
    pub keys: u64,
    failed: u64,
    late: u64,
    /// Each key's time, together.
    key_seconds: f64,
    /// Sums over statements, for the spread of their times.
    log_took: f64,
    log_took_squared: f64,
}

impl Measured {
    /// Whether devices were waiting most of the time: at least half of the statements filled the limit.
    pub const fn is_backlogged(&self) -> bool {
        self.sent_full * 2 >= self.sent
    }

    fn variance_of_mean(&self) -> f64 {
        let count = f64::from(self.statements.max(1));
        let mean = self.log_took / count;
        (self.log_took_squared / count - mean * mean).max(0.0) / count
    }

    /// Logarithm of the keys answered a second, but for what both arms have in common.
    fn log_rate(&self, limit: u32) -> Option<f64> {
        let answered = self.keys - self.failed;
        (answered > 0 && self.key_seconds > 0.0).then(|| (f64::from(limit) * answered as f64 / self.key_seconds).ln())
    }
}

/// A pair of arms under way.
#[derive(Clone, Debug, Default)]
pub(super) struct Pair {
    limits: [u32; 2],
    measured: [Measured; 2],
    arm: Arm,
    is_second: bool,
    arm_began: Instant,
    /// Tells this pair from the one before: statements sent in that say nothing of this.
    number: u32,
}

impl Pair {
    /// The pair after this one.
    pub fn next(&self, limits: [u32; 2], first: Arm, now: Instant) -> Self {
        Self {
            number: self.number.wrapping_add(1),
            limits,
            measured: Default::default(),
            arm: first,
            is_second: false,
            arm_began: now,
        }
    }

    /// Counts a statement that is sent now. Returns the mark to keep with it if it fills the limit: others say nothing of the arm.
    pub fn handle_sent(&mut self, is_full: bool) -> Option<Mark> {
        let measured = &mut self.measured[self.arm as usize];
        measured.sent += 1;
        measured.sent_full += u32::from(is_full);
        is_full.then_some(Mark {
            arm: self.arm,
            pair: self.number,
        })
    }

    pub const fn arm_began(&self) -> Instant {
        self.arm_began
    }

    pub fn is_high(&self) -> bool {
        self.arm == Arm::High
    }

    pub const fn limit(&self) -> u32 {
        self.limits[self.arm as usize]
    }

    pub const fn measured(&self) -> Measured {
        self.measured[self.arm as usize]
    }

    /// A statement that was sent in `arm` has ended. One that ends later than its arm still counts: it was under way in it.
    pub fn measure(&mut self, mark: Mark, keys: u32, is_answered: bool, took: Duration) {
        if mark.pair != self.number {
            return;
        }
        let keys = u64::from(keys);
        let measured = &mut self.measured[mark.arm as usize];
        measured.statements += 1;
        measured.keys += keys;
        measured.failed += if is_answered { 0 } else { keys };
        measured.late += if took > LATENCY_MAX { keys } else { 0 };
        let log_took = took.as_secs_f64().max(1e-6).ln();
        measured.log_took += log_took;
        measured.log_took_squared += log_took * log_took;
        measured.key_seconds += keys as f64 * took.as_secs_f64();
    }

    /// Goes on to the other arm; false if this was the second.
    pub const fn next_arm(&mut self, now: Instant) -> bool {
        if self.is_second {
            return false;
        }
        self.is_second = true;
        self.arm = match self.arm {
            Arm::Low => Arm::High,
            Arm::High => Arm::Low,
        };
        self.arm_began = now;
        true
    }

    /// Standard error of [`elasticity`](Self::elasticity), from how much the times of statements in one arm differ.
    pub fn error(&self) -> f64 {
        let [low, high] = self.limits;
        let spread = (f64::from(high) / f64::from(low)).ln();
        let variance: f64 = self.measured.iter().map(Measured::variance_of_mean).sum();
        variance.sqrt() / spread
    }

    /// Of one percent more in flight, how much came out as answers; `None` where that can't be told.
    pub fn elasticity(&self) -> Option<f64> {
        let [low, high] = self.limits;
        let spread = (f64::from(high) / f64::from(low)).ln();
        let [less, more] = [self.measured[0].log_rate(low)?, self.measured[1].log_rate(high)?];
        (spread > 0.0).then(|| (more - less) / spread)
    }

    pub fn failed_part(&self) -> f64 {
        self.part(|measured| measured.failed)
    }

    pub fn late_part(&self) -> f64 {
        self.part(|measured| measured.late)
    }

    fn part(&self, of: impl Fn(&Measured) -> u64) -> f64 {
        let all: u64 = self.measured.iter().map(|measured| measured.keys).sum();
        let these: u64 = self.measured.iter().map(of).sum();
        these as f64 / all.max(1) as f64
    }
}
