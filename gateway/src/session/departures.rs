//! The sessions of a node that are to leave, and the state of its drain.
//!
//! [`Departures`] takes orders and answers questions. The task `departures` finds the sessions and closes them.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use seawall_proto::{
    departures::{self, AlreadyDraining, Departure, DrainOrder, DrainState, EvictionStatus, NodeLoad, Output, Scan},
    refusal::Peers,
    time::WallTime,
};
use tokio::sync::Notify;

use super::sessions::Session;
use crate::runtime::clock::Clock;

/// How far a drain is, as the API shows it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DrainStatus {
    pub state: DrainState,
    /// Sessions closed a second; 0 before the first close.
    pub rate_per_second: f64,
    /// Sessions at the first close; `None` before.
    pub sessions: Option<usize>,
    /// When the last session is closed; `None` without a drain.
    pub deadline: Option<WallTime>,
}

/// The sessions that are to leave, and why.
#[derive(Debug)]
pub struct Departures {
    clock: Clock,
    inner: Mutex<Inner>,
    /// A copy, for connections: they ask once or twice each.
    is_draining: AtomicBool,
    ordered: Notify,
}

type Machine = departures::Departures<Arc<Session>>;

#[derive(Debug)]
struct Inner {
    machine: Machine,
    /// For people. The drain itself goes by monotonic time.
    deadline: Option<WallTime>,
}

impl Departures {
    /// `life`: mean life of sessions; `None` where they have no maximum age.
    #[must_use]
    pub fn new(life: Option<Duration>, clock: Clock) -> Self {
        Self {
            inner: Mutex::new(Inner {
                machine: Machine::new(life, clock.now()),
                deadline: None,
            }),
            clock,
            is_draining: AtomicBool::new(false),
            ordered: Notify::new(),
        }
    }

    /// Starts a drain. The node is not ready from now on. It refuses new devices from the end of the announcement on.
    ///
    /// # Errors
    /// A drain is in progress.
    pub fn start_drain(&self, order: DrainOrder) -> Result<(), AlreadyDraining> {
        self.order(|inner| {
            inner.machine.handle_drain_started(order, self.clock.now())?;
            inner.deadline = Some(self.clock.wall() + order.deadline);
            Ok(())
        })
    }

    /// Ends a drain: sessions that are left stay, and new devices are admitted. Returns whether there was one.
    pub fn cancel_drain(&self) -> bool {
        self.order(|inner| {
            inner.deadline = None;
            inner.machine.handle_drain_cancelled()
        })
    }

    /// Closes everything that is left of a drain now, each session with its hint.
    pub fn expedite_drain(&self) {
        self.order(|inner| inner.machine.handle_drain_expedited(self.clock.now()));
    }

    /// Searches for sessions that the rules in force evict.
    pub fn handle_rules(&self) {
        self.order(|inner| inner.machine.handle_rules(self.clock.now()));
    }

    /// The task that closes sessions was started, for the first time or again.
    pub fn handle_restarted(&self) {
        self.order(|inner| inner.machine.handle_restarted(self.clock.now()));
    }

    /// Decides on a session that has registered while a drain may be in progress.
    pub fn handle_registered(&self) -> Option<Departure> {
        self.is_draining()
            .then(|| self.with(|inner| inner.machine.handle_registered(self.clock.now())))?
    }

    /// Takes the result of a scan.
    pub fn handle_found(&self, scan: Scan, found: Vec<Arc<Session>>, load: &NodeLoad) {
        self.with(|inner| inner.machine.handle_found(scan, found, load, self.clock.now()));
    }

    /// Returns what the task does next.
    pub fn poll_output(&self) -> Output<Arc<Session>> {
        self.with(|inner| inner.machine.poll_output(self.clock.now()))
    }

    /// Waits for an order.
    ///
    /// # Cancel safety
    /// No order is lost when this is dropped.
    pub async fn ordered(&self) {
        self.ordered.notified().await;
    }

    #[must_use]
    pub fn drain_status(&self) -> DrainStatus {
        self.with(|inner| {
            let status = inner.machine.drain_status();
            DrainStatus {
                state: status.state,
                rate_per_second: status.rate_per_second,
                sessions: status.sessions,
                deadline: inner.deadline,
            }
        })
    }

    #[must_use]
    pub fn eviction_status(&self) -> EvictionStatus {
        self.with(|inner| inner.machine.eviction_status())
    }

    /// Whether a drain was started: the node is not ready.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.drain_status().state != DrainState::Idle
    }

    /// Whether new devices are refused.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Relaxed)
    }

    /// What refused devices are told while this node drains; `None` while it does not. One node has no peers.
    #[must_use]
    pub fn peers(&self) -> Option<Peers> {
        self.is_draining().then_some(Peers::None)
    }

    fn order<T>(&self, give: impl FnOnce(&mut Inner) -> T) -> T {
        let answer = self.with(give);
        self.ordered.notify_one();
        answer
    }

    fn with<T>(&self, call: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = call(&mut inner);
        let is_draining = match inner.machine.drain_status().state {
            DrainState::Idle | DrainState::Announced => false,
            DrainState::Draining | DrainState::Drained => true,
        };
        self.is_draining.store(is_draining, Ordering::Relaxed);
        answer
    }
}
