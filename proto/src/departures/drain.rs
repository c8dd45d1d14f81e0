//! The drain of a node: it is announced first, then every session is closed.

use std::{ops::RangeInclusive, time::Duration};

use super::{NodeLoad, queue::Queue};
use crate::{refusal::Peers, time::Instant};

/// Part of a drain's time that is kept at its end, for the last closes to be written.
const RESERVE: Duration = Duration::from_secs(2);
/// Minimum time over which a drain closes sessions, if its deadline allows it.
const SPAN_MIN: Duration = Duration::from_millis(500);
/// Time from the last close until the next process listens, with some reserve.
const RESTART_TIME: Duration = Duration::from_millis(2_500);
/// Time from which the return of each device is drawn, so that devices of a small fleet do not return together.
const RETURN_SPREAD: Duration = Duration::from_secs(1);
/// Maximum duration of a drain that is handled as a restart. Devices do not wait for the end of a longer one.
const RESTART_DRAIN_MAX: Duration = Duration::from_secs(30);

/// Parameters of a drain.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DrainOrder {
    /// Sessions closed per second. `None`: as many as the node can readmit.
    pub rate_per_second: Option<f64>,
    /// Time from the start of the drain to the first close. Shorter than the deadline.
    pub announce: Duration,
    /// Time from the start of the drain to the last close.
    pub deadline: Duration,
}

/// State of a drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrainState {
    /// No drain.
    Idle,
    /// The node is not ready, so that load balancers send no more devices. Devices that connect are admitted.
    Announced,
    /// Sessions are closed; new devices are refused.
    Draining,
    /// No session is left; new devices are refused.
    Drained,
}

/// State of a drain, with its figures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DrainStatus {
    pub state: DrainState,
    /// Sessions closed per second; 0 before the first close.
    pub rate_per_second: f64,
    /// Number of sessions at the first close; `None` before.
    pub sessions: Option<usize>,
}

/// A drain is in progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a drain is running already: GET /api/v1/drain shows it, DELETE /api/v1/drain ends it")]
pub struct AlreadyDraining;

/// A drain in progress.
#[derive(Debug)]
pub(super) struct Drain<S> {
    rate_per_second: Option<f64>,
    pub state: DrainState,
    begins_at: Instant,
    deadline: Instant,
    /// Result of the first scan.
    pub begun: Option<Begun>,
    pub queue: Queue<S>,
}

/// Data of a drain after its first scan.
#[derive(Debug)]
pub(super) struct Begun {
    sessions: usize,
    returns: ReturnSchedule,
}

impl<S> Drain<S> {
    pub fn new(order: DrainOrder, now: Instant) -> Self {
        Self {
            rate_per_second: order.rate_per_second,
            state: DrainState::Announced,
            begins_at: now + order.announce,
            deadline: now + order.deadline,
            begun: None,
            queue: Queue::new(now),
        }
    }

    pub fn status(&self) -> DrainStatus {
        DrainStatus {
            state: self.state,
            rate_per_second: self.begun.as_ref().map_or(0.0, |_| self.queue.rate_per_second()),
            sessions: self.begun.as_ref().map(|begun| begun.sessions),
        }
    }

    /// Ends the announcement when its time has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.state == DrainState::Announced && self.begins_at <= now {
            self.state = DrainState::Draining;
            self.queue.scan(now);
        }
    }

    /// Makes all remaining sessions due now.
    pub fn expedite(&mut self, now: Instant) {
        self.begins_at = self.begins_at.min(now);
        self.deadline = self.deadline.min(now);
        self.queue.expedite(now);
        if let Some(begun) = &mut self.begun {
            begun.returns.expedite(now);
        }
    }

    /// Takes the sessions of a scan. The first scan sets the rate: that of the order, or a higher one if needed to end
    /// 2 s before the deadline. Sessions that are left then are due at once.
    pub fn handle_found(&mut self, found: Vec<S>, load: &NodeLoad, now: Instant) {
        if self.begun.is_none() {
            let left = self.deadline.saturating_since(now);
            let span = left
                .saturating_sub(RESERVE)
                .max(SPAN_MIN)
                .min(left.max(Duration::from_millis(1)));
            let needed = load.sessions as f64 / span.as_secs_f64();
            let rate = self.rate_per_second.unwrap_or(load.capacity_per_second).max(needed);
            self.queue.set_pace(rate, Some(now + span), now);
            self.begun = Some(Begun {
                sessions: load.sessions,
                returns: ReturnSchedule::new(load, self.queue.rate_per_second(), span, now),
            });
        }
        let is_empty = found.is_empty();
        self.queue.fill(found);
        if load.sessions == 0 {
            self.state = DrainState::Drained;
        } else if is_empty {
            self.queue.rescan(now);
        }
    }

    /// The range, from now, in which the device of a session that is closed now returns.
    pub fn next_return(&mut self, now: Instant) -> RangeInclusive<Duration> {
        match &mut self.begun {
            Some(begun) => begun.returns.next_range(now),
            None => Peers::None.hint_range(),
        }
    }

    /// Time of the next event.
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.state {
            DrainState::Announced => Some(self.begins_at),
            DrainState::Draining => self.queue.poll_timeout(),
            DrainState::Drained | DrainState::Idle => None,
        }
    }
}

/// Return times of the devices of a drained node: after its restart, one after the other, at the rate at which the node
/// can readmit them.
///
/// A slot is later only if other tenants have a backlog: the virtual queue starts at the time of the close.
#[derive(Debug)]
struct ReturnSchedule {
    /// Time of the last close. `None`: too late for devices to wait for it.
    drained_at: Option<Instant>,
    /// Time between the returns of two devices.
    interval: Duration,
    /// Number of devices that have a time.
    scheduled: u32,
}

impl ReturnSchedule {
    fn new(load: &NodeLoad, rate_per_second: f64, span_max: Duration, now: Instant) -> Self {
        let span = Duration::try_from_secs_f64(load.sessions as f64 / rate_per_second).unwrap_or(Duration::MAX);
        let span = span.min(span_max);
        Self {
            drained_at: (span <= RESTART_DRAIN_MAX).then(|| now + span),
            interval: Duration::try_from_secs_f64(1.0 / load.capacity_per_second).unwrap_or(Duration::from_secs(1)),
            scheduled: 0,
        }
    }

    fn next_range(&mut self, now: Instant) -> RangeInclusive<Duration> {
        let Some(drained_at) = self.drained_at else {
            return Peers::None.hint_range();
        };
        let from = drained_at.saturating_since(now) + RESTART_TIME + self.interval.saturating_mul(self.scheduled);
        self.scheduled = self.scheduled.saturating_add(1);
        from..=from + RETURN_SPREAD
    }

    const fn expedite(&mut self, now: Instant) {
        self.drained_at = Some(now);
    }
}
