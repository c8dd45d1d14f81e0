//! Emptying this node: not ready first, then sessions leave at a pace, each with a slot, and nobody new comes in.
//!
//! [`Drain`] holds the order and what became of it; [`run`] carries it out. SIGTERM, Ctrl-C and `POST /api/v1/drain` give the same order.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rand::{Rng, SeedableRng as _, rngs::SmallRng};
use seawall_proto::{
    close::{Close, Restart},
    drain::{Homecoming, Pacing},
    refusal::{Hint, Peers},
    time::WallTime,
};
use serde::Serialize;
use tokio::{
    sync::Notify,
    task::{spawn_blocking, yield_now},
};
use tokio_util::sync::CancellationToken;

use crate::{clock::Clock, events::Body, sessions::Session, state::Shared};

/// Sessions that are told to leave before others have their turn on this worker.
const CLOSED_AT_ONCE_MAX: usize = 500;

/// How a drain shall go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Order {
    /// Sessions closed a second; `None`: as fast as admission could take them back.
    pub rate_per_second: Option<f64>,
    /// Between not being ready and the first close: balancers send nobody here any more then. Less than the deadline.
    pub announce: Duration,
    /// When the last session has been told.
    pub deadline: Duration,
}

/// Where a drain stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainState {
    /// Nobody asked for one.
    Idle,
    /// Not ready, so that balancers turn away; devices that come all the same are let in.
    Announced,
    /// Sessions are leaving; new devices are refused.
    Draining,
    /// All have left; new devices are refused.
    Drained,
}

/// What the API tells of a drain.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct DrainStatus {
    pub state: DrainState,
    /// Sessions that are still here.
    pub left: usize,
    /// Sessions closed a second.
    pub rate: f64,
    /// Sessions when the first was told to leave; `None` before that.
    pub total: Option<usize>,
    /// When the last session has been told; `None` without a drain.
    pub deadline: Option<WallTime>,
}

/// A drain is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a drain is running already: GET /api/v1/drain shows it, DELETE /api/v1/drain ends it")]
pub struct AlreadyDraining;

/// The order to drain.
#[derive(Debug)]
pub struct Drain {
    inner: Mutex<Inner>,
    is_draining: AtomicBool,
    wake: Notify,
}

#[derive(Debug)]
struct Inner {
    state: DrainState,
    order: Option<Order>,
    is_hurried: bool,
    rate: f64,
    total: Option<usize>,
    /// For people: what the drain does goes by monotonic time.
    deadline: Option<WallTime>,
    /// `None`: no session was told to leave yet.
    homecoming: Option<Homecoming>,
}

impl Inner {
    const IDLE: Self = Self {
        state: DrainState::Idle,
        order: None,
        is_hurried: false,
        rate: 0.0,
        total: None,
        deadline: None,
        homecoming: None,
    };
}

impl Default for Drain {
    fn default() -> Self {
        Self {
            inner: Mutex::new(Inner::IDLE),
            is_draining: AtomicBool::new(false),
            wake: Notify::new(),
        }
    }
}

impl Drain {
    /// Starts one. The node is not ready from now on; new devices are refused from the end of the announcement on, at once where
    /// there is none.
    ///
    /// # Errors
    /// One is under way.
    pub fn start(&self, order: Order) -> Result<(), AlreadyDraining> {
        let mut inner = self.inner();
        if inner.state != DrainState::Idle {
            return Err(AlreadyDraining);
        }
        let is_announced = !order.announce.is_zero();
        *inner = Inner {
            state: if is_announced {
                DrainState::Announced
            } else {
                DrainState::Draining
            },
            order: Some(order),
            deadline: Some(Clock::start().wall() + order.deadline),
            ..Inner::IDLE
        };
        self.is_draining.store(!is_announced, Ordering::Relaxed);
        drop(inner);
        self.wake.notify_one();
        Ok(())
    }

    /// Ends one: who is still here stays, and new devices are welcome. Returns whether there was one.
    pub fn cancel(&self) -> bool {
        let mut inner = self.inner();
        let was_on = inner.state != DrainState::Idle;
        *inner = Inner::IDLE;
        self.is_draining.store(false, Ordering::Relaxed);
        drop(inner);
        self.wake.notify_one();
        was_on
    }

    /// Closes everything that is left now, each with its hint: the second signal.
    pub fn hurry(&self) {
        self.inner().is_hurried = true;
        self.wake.notify_one();
    }

    /// One was asked for: the node is not ready.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.inner().state != DrainState::Idle
    }

    /// New devices are refused.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Relaxed)
    }

    /// What refused devices are told while this node is leaving; `None` while it is not. One node has no peers.
    #[must_use]
    pub fn peers(&self) -> Option<Peers> {
        self.is_draining().then_some(Peers::None)
    }

    /// `sessions`: how many there are now.
    #[must_use]
    pub fn status(&self, sessions: usize) -> DrainStatus {
        let inner = self.inner();
        DrainStatus {
            state: inner.state,
            left: sessions,
            rate: inner.rate,
            total: inner.total,
            deadline: inner.deadline,
        }
    }

    /// The announcement is over. False where the drain was cancelled meanwhile, or begun anew.
    fn begin(&self) -> bool {
        let mut inner = self.inner();
        if inner.has_ended(DrainState::Announced) {
            return false;
        }
        inner.state = DrainState::Draining;
        self.is_draining.store(true, Ordering::Relaxed);
        true
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// The drain that was in this state was cancelled; another may have been asked for since.
    fn has_ended(&self, state: DrainState) -> bool {
        self.state != state || self.order.is_some()
    }
}

/// Carries out drains until `stop`.
pub async fn run(state: Shared, stop: CancellationToken) {
    loop {
        let order = state.drain.inner().order.take();
        if let Some(order) = order {
            drain_once(&state, order, &stop).await;
            if !stop.is_cancelled() {
                // The next order may have come meanwhile, and its wake-up gone to this one.
                continue;
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = state.drain.wake.notified() => {}
        }
    }
}

/// Orders one session to leave, and tells it when to come back.
pub fn send_away(state: &Shared, session: &Session, rng: &mut impl Rng) {
    let between = state.drain.inner().homecoming.as_mut().map_or_else(
        || Peers::None.hint_range(),
        |homecoming| homecoming.next_range(state.clock.now()),
    );
    let back = Hint::draw(between, rng).after;
    let hint = state.gate.slot_for_close(session.info.device, back);
    session.close(Close::Restart {
        why: Restart::Draining,
        hint,
    });
}

/// Waits until balancers have noticed that this node is not ready. False where there is nothing more to do.
async fn announce(state: &Shared, span: Duration, stop: &CancellationToken) -> bool {
    state
        .events
        .notice(state.clock.wall(), Body::Drain { state: "announced" });
    tracing::info!(
        announce_seconds = span.as_secs(),
        "drain announced: not ready, devices are still let in"
    );
    let over = tokio::time::sleep(span);
    tokio::pin!(over);
    loop {
        tokio::select! {
            () = stop.cancelled() => return false,
            () = state.drain.wake.notified() => {}
            () = &mut over => return state.drain.begin(),
        }
        let is_hurried = {
            let inner = state.drain.inner();
            if inner.has_ended(DrainState::Announced) {
                return false;
            }
            inner.is_hurried
        };
        if is_hurried {
            return state.drain.begin();
        }
    }
}

async fn drain_once(state: &Shared, order: Order, stop: &CancellationToken) {
    if !order.announce.is_zero() && !announce(state, order.announce, stop).await {
        if !stop.is_cancelled() {
            note_cancelled(state);
        }
        return;
    }
    let mut rng = SmallRng::from_os_rng();
    let now = state.clock.now();
    let (sessions, capacity) = (state.sessions.len(), state.gate.k_ref());
    let rate = order.rate_per_second.unwrap_or(capacity);
    let time = order.deadline.saturating_sub(order.announce);
    let mut pacing = Pacing::drain(rate, sessions, time, now);
    {
        let mut inner = state.drain.inner();
        if inner.has_ended(DrainState::Draining) {
            drop(inner);
            return note_cancelled(state);
        }
        inner.rate = pacing.rate_per_second();
        inner.total = Some(sessions);
        inner.homecoming = Some(pacing.homecoming(sessions, capacity, now));
    }
    state
        .events
        .notice(state.clock.wall(), Body::Drain { state: "draining" });
    tracing::info!(
        sessions = state.sessions.len(),
        rate_per_second = pacing.rate_per_second(),
        "drain started"
    );

    let mut batch = Vec::new();
    loop {
        // Handshakes that had passed the question for draining may still add a session: look again until there is none.
        if batch.is_empty() {
            batch = still_here(state).await;
        }
        let now = state.clock.now();
        {
            let mut inner = state.drain.inner();
            if inner.has_ended(DrainState::Draining) {
                drop(inner);
                return note_cancelled(state);
            }
            if inner.is_hurried {
                pacing.hurry(now);
                inner.homecoming.iter_mut().for_each(|homecoming| homecoming.hurry(now));
            }
        }
        if batch.is_empty() && state.sessions.is_empty() {
            break;
        }
        let due = pacing.take_due(batch.len(), now);
        for (number, session) in (1..).zip(batch.drain(..due)) {
            send_away(state, &session, &mut rng);
            if number % CLOSED_AT_ONCE_MAX == 0 {
                yield_now().await;
            }
        }
        let next = pacing.poll_timeout().max(now + Duration::from_millis(10));
        tokio::select! {
            () = stop.cancelled() => return,
            () = state.drain.wake.notified() => {}
            () = tokio::time::sleep_until(state.clock.deadline(next)) => {}
        }
    }
    let mut inner = state.drain.inner();
    if inner.state == DrainState::Draining {
        inner.state = DrainState::Drained;
        state
            .events
            .notice(state.clock.wall(), Body::Drain { state: "drained" });
        tracing::info!("drain ended: no session is left");
    }
}

/// Sessions that were not told to leave yet. Looks at every session: off the runtime's workers.
async fn still_here(state: &Shared) -> Vec<Arc<Session>> {
    let looked_at = Arc::clone(state);
    let look = move || looked_at.sessions.matching(|session| !session.is_closing());
    // Cancelled only where the runtime ends.
    spawn_blocking(look).await.unwrap_or_default()
}

fn note_cancelled(state: &Shared) {
    state
        .events
        .notice(state.clock.wall(), Body::Drain { state: "cancelled" });
    tracing::info!(sessions = state.sessions.len(), "drain cancelled");
}
