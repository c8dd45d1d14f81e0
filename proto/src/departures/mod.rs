//! Paced closing of sessions, for three reasons: the node drains, a rule evicts them, or they have reached their
//! maximum age.
//!
//! Start with [`Departures`]. It decides when sessions are searched for, when each is closed, and when its device may
//! return. It does not know sessions: the caller finds and closes them.

mod ageing;
mod drain;
mod queue;
#[cfg(test)]
mod tests;

use std::{collections::VecDeque, ops::RangeInclusive, time::Duration};

use self::{ageing::Ageing, drain::Drain, queue::Queue};
pub use self::{
    ageing::Lives,
    drain::{AlreadyDraining, DrainOrder, DrainState, DrainStatus},
};
use crate::{close::Restart, refusal::Peers, time::Instant};

/// Minimum time between two wake-ups: sessions are closed in small groups, not one by one.
const WAKE_INTERVAL_MIN: Duration = Duration::from_millis(10);
/// Part of the admission rate that evicted devices may use. The rest is for other devices.
const EVICTION_SHARE: f64 = 0.1;
/// Time in which a large cohort is evicted, if the admission rate allows it.
const EVICTION_SPAN: Duration = Duration::from_secs(60);
/// Rate at which a small cohort is evicted, if the admission rate allows it, in sessions per second.
const EVICTION_RATE_MIN: f64 = 20.0;
/// Maximum number of transitions of the drain that wait to be reported. Beyond it the oldest is dropped.
const TRANSITIONS_MAX: usize = 16;

/// The sessions of a node that must be closed, with the reason. `S` identifies a session.
///
/// The reasons do not wait for each other, except that a drain suspends ageing. The caller calls
/// [`poll_output`](Self::poll_output) after every other call, until it returns [`Output::Wait`].
#[derive(Debug)]
pub struct Departures<S> {
    drain: Option<Drain<S>>,
    eviction: Queue<S>,
    /// Sessions that the eviction under way found first; 0 while there is none.
    evicting: usize,
    /// `None`: sessions have no maximum age.
    ageing: Option<Ageing<S>>,
    transitions: VecDeque<DrainState>,
}

/// The caller's next action.
#[derive(Debug, PartialEq)]
pub enum Output<S> {
    /// Report that the drain has reached this state.
    Drain(DrainState),
    /// Find these sessions and call [`Departures::handle_found`].
    Scan(Scan),
    /// Close this session if it is still there.
    Close(S, Departure),
    /// Call again at this time, or after the next input if there is none.
    Wait(Option<Instant>),
}

/// Sessions to find, among those that are not closing yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scan {
    /// All of them.
    Left,
    /// Those that a rule evicts.
    Evicted,
    /// Those that have reached their maximum age, the oldest first.
    Aged(Lives),
}

/// How a session ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Departure {
    /// Its device gets a slot, with a hint drawn from `back_within`.
    Restart {
        why: Restart,
        back_within: RangeInclusive<Duration>,
    },
    /// Its device gets the message of the rule. A session that no rule evicts any more stays.
    Eviction,
}

/// How far the eviction is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EvictionStatus {
    /// Sessions that it began with, or that a change of the rules added to; 0 while there is none.
    pub sessions: usize,
    /// Sessions that wait for their close.
    pub left: usize,
    /// Sessions closed per second; 0 while there is none.
    pub rate_per_second: f64,
}

/// Load of a node at the time of a scan.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NodeLoad {
    /// Number of live sessions, including closing ones.
    pub sessions: usize,
    /// Devices per second that the node can readmit.
    pub capacity_per_second: f64,
    /// Whether no device waits for a lookup, and the database answers.
    pub is_calm: bool,
}

impl<S> Departures<S> {
    /// Creates a machine for a node whose sessions live for `life` on average; `None`: without a maximum age.
    #[must_use]
    pub fn new(life: Option<Duration>, now: Instant) -> Self {
        Self {
            drain: None,
            eviction: Queue::new(now),
            evicting: 0,
            ageing: life.map(|life| Ageing::new(life, now)),
            transitions: VecDeque::new(),
        }
    }

    /// Starts a drain. If it has no announcement, new devices are refused from now on.
    ///
    /// # Errors
    /// A drain is in progress.
    pub fn handle_drain_started(&mut self, order: DrainOrder, now: Instant) -> Result<(), AlreadyDraining> {
        if self.drain.is_some() {
            return Err(AlreadyDraining);
        }
        if !order.announce.is_zero() {
            self.report(DrainState::Announced);
        }
        self.drain.insert(Drain::new(order, now)).handle_timeout(now);
        Ok(())
    }

    /// Ends a drain: the remaining sessions stay. Returns whether there was one.
    pub fn handle_drain_cancelled(&mut self) -> bool {
        let was_on = self.drain.take().is_some();
        if was_on {
            self.report(DrainState::Idle);
        }
        was_on
    }

    /// Skips the rest of a drain's time: every session is due.
    pub fn handle_drain_expedited(&mut self, now: Instant) {
        if let Some(drain) = &mut self.drain {
            drain.expedite(now);
            drain.handle_timeout(now);
        }
    }

    /// Searches for sessions that the rules in force evict. Discards those that earlier rules evicted.
    pub const fn handle_rules(&mut self, now: Instant) {
        self.eviction.scan(now);
    }

    /// The caller was restarted: the result of a scan may be lost.
    pub fn handle_restarted(&mut self, now: Instant) {
        self.handle_rules(now);
        if let Some(drain) = self.drain.as_mut().filter(|drain| drain.state == DrainState::Draining) {
            drain.queue.scan(now);
        }
    }

    /// Decides on a session that has registered: a scan may have missed it. The caller applies the rules in force.
    pub fn handle_registered(&mut self, now: Instant) -> Option<Departure> {
        let drain = self
            .drain
            .as_mut()
            .filter(|drain| drain.state != DrainState::Announced)?;
        Some(restart(drain, now))
    }

    /// Takes the result of a scan.
    pub fn handle_found(&mut self, scan: Scan, found: Vec<S>, load: &NodeLoad, now: Instant) {
        match scan {
            Scan::Left => {
                let draining = |drain: &&mut Drain<S>| drain.state == DrainState::Draining;
                if let Some(drain) = self.drain.as_mut().filter(draining) {
                    let is_first = drain.begun.is_none();
                    drain.handle_found(found, load, now);
                    let is_drained = drain.state == DrainState::Drained;
                    if is_first {
                        self.report(DrainState::Draining);
                    }
                    if is_drained {
                        self.report(DrainState::Drained);
                    }
                }
            }
            Scan::Evicted => {
                let rate = eviction_rate_per_second(found.len(), load.capacity_per_second);
                self.eviction.set_pace(rate, None, now);
                self.evicting = if found.is_empty() {
                    0
                } else {
                    self.evicting.max(found.len())
                };
                self.eviction.fill(found);
            }
            Scan::Aged(_) => {
                if let (None, Some(ageing)) = (&self.drain, &mut self.ageing) {
                    ageing.handle_found(found, load, now);
                }
            }
        }
    }

    /// State of the drain.
    #[must_use]
    pub fn drain_status(&self) -> DrainStatus {
        const IDLE: DrainStatus = DrainStatus {
            state: DrainState::Idle,
            rate_per_second: 0.0,
            sessions: None,
        };
        self.drain.as_ref().map_or(IDLE, Drain::status)
    }

    /// State of the eviction.
    #[must_use]
    pub fn eviction_status(&self) -> EvictionStatus {
        EvictionStatus {
            sessions: self.evicting,
            left: self.eviction.len(),
            rate_per_second: if self.evicting == 0 {
                0.0
            } else {
                self.eviction.rate_per_second()
            },
        }
    }

    /// Returns the caller's next action.
    pub fn poll_output(&mut self, now: Instant) -> Output<S> {
        if let Some(state) = self.transitions.pop_front() {
            return Output::Drain(state);
        }
        if let Some(drain) = &mut self.drain {
            drain.handle_timeout(now);
            if drain.state == DrainState::Draining {
                if drain.queue.poll_scan(now) {
                    return Output::Scan(Scan::Left);
                }
                if let Some(session) = drain.queue.poll_close(now) {
                    return Output::Close(session, restart(drain, now));
                }
            }
        }
        if self.eviction.poll_scan(now) {
            return Output::Scan(Scan::Evicted);
        }
        if let Some(session) = self.eviction.poll_close(now) {
            return Output::Close(session, Departure::Eviction);
        }
        if let Some(ageing) = &mut self.ageing {
            let lives = ageing.poll_scan(now);
            if self.drain.is_some() {
                ageing.suspend(now);
            } else if let Some(lives) = lives {
                return Output::Scan(Scan::Aged(lives));
            } else if let Some(session) = ageing.poll_close() {
                return Output::Close(
                    session,
                    Departure::Restart {
                        why: Restart::Ageing,
                        // This node readmits the device.
                        back_within: Peers::Some.hint_range(),
                    },
                );
            }
        }
        let next = [
            self.drain.as_ref().and_then(Drain::poll_timeout),
            self.eviction.poll_timeout(),
            self.ageing.as_ref().map(Ageing::scan_at),
        ];
        let next = next.into_iter().flatten().min();
        Output::Wait(next.map(|at| at.max(now + WAKE_INTERVAL_MIN)))
    }

    fn report(&mut self, state: DrainState) {
        if self.transitions.len() == TRANSITIONS_MAX {
            self.transitions.pop_front();
        }
        self.transitions.push_back(state);
    }
}

/// The rate at which a number of sessions is evicted: at most a tenth of the rate at which the node can readmit them.
#[must_use]
pub fn eviction_rate_per_second(sessions: usize, capacity_per_second: f64) -> f64 {
    let wanted = (sessions as f64 / EVICTION_SPAN.as_secs_f64()).max(EVICTION_RATE_MIN);
    wanted.min(capacity_per_second * EVICTION_SHARE)
}

fn restart<S>(drain: &mut Drain<S>, now: Instant) -> Departure {
    Departure::Restart {
        why: Restart::Draining,
        back_within: drain.next_return(now),
    }
}
