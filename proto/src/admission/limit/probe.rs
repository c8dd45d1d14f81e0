//! Two limits that are tried in turn, and their results.
//!
//! Throughput is not counted by the clock: a window has few statements of many keys, and its limits in time would
//! decide the result. By Little's law the throughput of a full pipe is the number of keys in flight, divided by their
//! time.

use std::time::Duration;

use super::LATENCY_MAX;
use crate::time::Instant;

/// One of the two limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum ProbeWindow {
    #[default]
    Low,
    High,
}

/// The window in which a statement was sent.
#[derive(Clone, Copy, Debug)]
pub(in crate::admission) struct ProbeId {
    window: ProbeWindow,
    pair: u32,
}

/// The statements of one window.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Measured {
    /// Number of statements sent.
    sent: u32,
    sent_full: u32,
    /// Number of ended statements that had filled the limit.
    pub statements: u32,
    pub keys: u64,
    failed: u64,
    late: u64,
    /// Sum of the times of all keys.
    key_seconds: f64,
    /// Sums over statements, for the variance of their times.
    log_took: f64,
    log_took_squared: f64,
}

impl Measured {
    /// Whether keys waited most of the time: at least half of the statements filled the limit.
    pub const fn is_backlogged(&self) -> bool {
        self.sent_full * 2 >= self.sent
    }

    fn variance_of_mean(&self) -> f64 {
        let count = f64::from(self.statements.max(1));
        let mean = self.log_took / count;
        (self.log_took_squared / count - mean * mean).max(0.0) / count
    }

    /// Logarithm of the keys answered per second, without the terms that both windows have in common.
    fn log_rate(&self, limit: u32) -> Option<f64> {
        let answered = self.keys - self.failed;
        (answered > 0 && self.key_seconds > 0.0).then(|| (f64::from(limit) * answered as f64 / self.key_seconds).ln())
    }
}

/// The current pair of windows.
#[derive(Clone, Debug, Default)]
pub(super) struct ProbePair {
    limits: [u32; 2],
    measured: [Measured; 2],
    window: ProbeWindow,
    is_second: bool,
    window_began: Instant,
    /// Number of this pair. Statements of earlier pairs are ignored.
    number: u32,
}

impl ProbePair {
    /// The pair after this one.
    pub fn next(&self, limits: [u32; 2], first: ProbeWindow, now: Instant) -> Self {
        Self {
            number: self.number.wrapping_add(1),
            limits,
            measured: Default::default(),
            window: first,
            is_second: false,
            window_began: now,
        }
    }

    /// Counts a statement that is sent now. Returns its window if it fills the limit; other statements are not
    /// measured.
    pub fn handle_sent(&mut self, is_full: bool) -> Option<ProbeId> {
        let measured = &mut self.measured[self.window as usize];
        measured.sent += 1;
        measured.sent_full += u32::from(is_full);
        is_full.then_some(ProbeId {
            window: self.window,
            pair: self.number,
        })
    }

    pub const fn window_began(&self) -> Instant {
        self.window_began
    }

    pub fn is_high(&self) -> bool {
        self.window == ProbeWindow::High
    }

    pub const fn limit(&self) -> u32 {
        self.limits[self.window as usize]
    }

    pub const fn measured(&self) -> Measured {
        self.measured[self.window as usize]
    }

    /// A statement ended. It is counted even after its window ended.
    pub fn measure(&mut self, probe: ProbeId, keys: u32, is_answered: bool, took: Duration) {
        if probe.pair != self.number {
            return;
        }
        let keys = u64::from(keys);
        let measured = &mut self.measured[probe.window as usize];
        measured.statements += 1;
        measured.keys += keys;
        measured.failed += if is_answered { 0 } else { keys };
        measured.late += if took > LATENCY_MAX { keys } else { 0 };
        let log_took = took.as_secs_f64().max(1e-6).ln();
        measured.log_took += log_took;
        measured.log_took_squared += log_took * log_took;
        measured.key_seconds += keys as f64 * took.as_secs_f64();
    }

    /// Begins the other window. Returns false if this was the second.
    pub const fn next_window(&mut self, now: Instant) -> bool {
        if self.is_second {
            return false;
        }
        self.is_second = true;
        self.window = match self.window {
            ProbeWindow::Low => ProbeWindow::High,
            ProbeWindow::High => ProbeWindow::Low,
        };
        self.window_began = now;
        true
    }

    /// Standard error of [`elasticity`](Self::elasticity), from the variance of times within the windows. Zero if both
    /// windows have the same limit, which measures nothing.
    pub fn error(&self) -> f64 {
        let [low, high] = self.limits;
        if low >= high {
            return 0.0;
        }
        let spread = (f64::from(high) / f64::from(low)).ln();
        let variance: f64 = self.measured.iter().map(Measured::variance_of_mean).sum();
        variance.sqrt() / spread
    }

    /// Growth of the answers in percent for one percent more in flight. `None` if there were no answers.
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
