//! Sessions that wait for their close, and the rate at which they are closed.

use std::{collections::VecDeque, time::Duration};

use crate::{rate::Bucket, time::Instant};

/// Time whose closes may come in one burst: a late caller must not close everything at once.
const BURST_SPAN: Duration = Duration::from_millis(250);
/// Minimum rate, in sessions per second.
const RATE_MIN: f64 = 1.0 / 60.0;
/// Time from the last close to the scan for sessions that were missed.
const RESCAN_INTERVAL: Duration = Duration::from_millis(100);
/// Time after which a scan without a result is repeated.
const SCAN_TIMEOUT: Duration = Duration::from_secs(30);

/// Sessions that wait for their close, in the order in which they are closed.
#[derive(Debug)]
pub(super) struct Queue<S> {
    sessions: VecDeque<S>,
    rate_per_second: f64,
    bucket: Bucket,
    /// Time from which every session is due.
    deadline: Option<Instant>,
    scan_at: Option<Instant>,
}

impl<S> Queue<S> {
    /// Creates an empty queue, whose first session is due at once.
    pub const fn new(now: Instant) -> Self {
        Self {
            sessions: VecDeque::new(),
            rate_per_second: RATE_MIN,
            bucket: Bucket::new(1.0, now),
            deadline: None,
            scan_at: None,
        }
    }

    /// Sessions closed per second.
    pub const fn rate_per_second(&self) -> f64 {
        self.rate_per_second
    }

    /// Sessions that wait.
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Replaces the waiting sessions with the result of a scan.
    pub fn fill(&mut self, found: Vec<S>) {
        self.sessions = found.into();
        self.scan_at = None;
    }

    /// Changes the rate and the deadline. Saves up at most one close.
    pub fn set_pace(&mut self, rate_per_second: f64, deadline: Option<Instant>, now: Instant) {
        self.bucket.refill(self.rate_per_second, 1.0, now);
        self.rate_per_second = rate_per_second.max(RATE_MIN);
        self.deadline = deadline;
    }

    /// Makes every session due.
    pub const fn expedite(&mut self, now: Instant) {
        self.deadline = Some(now);
    }

    /// Requests a scan at once.
    pub const fn scan(&mut self, now: Instant) {
        self.scan_at = Some(now);
    }

    /// Requests another scan after [`RESCAN_INTERVAL`].
    pub fn rescan(&mut self, now: Instant) {
        self.scan_at = Some(now + RESCAN_INTERVAL);
    }

    /// Whether a scan begins now.
    pub fn poll_scan(&mut self, now: Instant) -> bool {
        let is_due = self.scan_at.is_some_and(|at| at <= now);
        if is_due {
            self.scan_at = Some(now + SCAN_TIMEOUT);
        }
        is_due
    }

    /// Removes a session that is closed now.
    pub fn poll_close(&mut self, now: Instant) -> Option<S> {
        if self.sessions.is_empty() {
            return None;
        }
        let burst = (self.rate_per_second * BURST_SPAN.as_secs_f64()).max(1.0);
        self.bucket.refill(self.rate_per_second, burst, now);
        let is_overdue = self.deadline.is_some_and(|deadline| deadline <= now);
        if !is_overdue && self.bucket.take(1) == 0 {
            return None;
        }
        let session = self.sessions.pop_front();
        if self.sessions.is_empty() {
            self.rescan(now);
        }
        session
    }

    /// Time of the next event.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let close_at = || {
            let at = self.bucket.poll_timeout(self.rate_per_second);
            self.deadline.map_or(at, |deadline| deadline.min(at))
        };
        let close_at = (!self.sessions.is_empty()).then(close_at);
        [close_at, self.scan_at].into_iter().flatten().min()
    }
}
