//! A lane: a few connections for one purpose, so that no purpose can starve another.
//!
//! This is not a general pool (ADR 0009 says why). A caller takes a connection out, owns it, and gives it back only when its work went
//! well; whatever is dropped on the way (an error, a cancelled request, a deadline) is closed. At most `connections_max`
//! connections are in use, at most as many are idle. Closing a connection of SQLite interrupts its statement. A statement that waits for the
//! disk runs on in its thread: the number of threads is bounded where they are started. Start with [`Lane::take`].

use std::{
    future::Future,
    ops::{Deref, DerefMut},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    connection::{Connection, Connector},
    error::StoreError,
};

/// Maximum wait for a free connection of a lane. Then the caller gets [`StoreError::Busy`].
const TAKE_MAX: Duration = Duration::from_secs(2);
/// A connection that was idle for longer is asked whether it is alive before it is used: the server may have restarted.
const IDLE_TRUSTED: Duration = Duration::from_secs(1);
/// The same for look-ups, which can't wait for an answer each time. Firewalls forget idle connections after some minutes, without a word.
const LOOKUP_IDLE_TRUSTED: Duration = Duration::from_secs(60);
/// Maximum wait for that answer. Then the connection is closed and a new one is made.
const PING_MAX: Duration = Duration::from_millis(500);

/// Time after the server's last refusal for want of connections during which they count as scarce.
const SCARCE_FOR: Duration = Duration::from_secs(10);
/// Minimum time between two connections that a lane gives up to a lower one while connections are scarce.
const CONCESSION_INTERVAL: Duration = Duration::from_secs(1);
/// Time for the server to notice that an idle connection was closed to make room.
const ROOM_WAIT: Duration = Duration::from_millis(50);
/// Time between two attempts to connect where nothing could be closed to make room.
const SCARCE_RETRY: Duration = Duration::from_millis(200);

/// What a lane is for: decides which lane closes a connection while they are scarce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rank {
    /// Imports and the plan guard.
    Spare,
    /// The API.
    Ops,
    /// Rules and revocations.
    Rules,
    /// Look-ups of devices.
    Lookups,
}

/// Whether a lane closes a connection so that another one can open one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Yield {
    Always,
    /// At most one each [`CONCESSION_INTERVAL`]. None at all once a connection was closed in vain: another program took its place.
    Seldom,
    Never,
}

impl Rank {
    /// Maximum wait for a connection that the server refuses for want of them. A look-up has a second in all.
    const fn scarce_wait_max(self) -> Duration {
        match self {
            Self::Lookups => Duration::from_millis(500),
            Self::Spare | Self::Ops | Self::Rules => Duration::from_millis(1_500),
        }
    }

    /// Position in the order in which lanes close connections: lanes that lose least are first.
    const fn turn(self) -> u8 {
        match self {
            Self::Spare => 0,
            Self::Ops => 1,
            Self::Lookups => 2,
            Self::Rules => 3,
        }
    }

    /// Whether a lane of this rank closes a connection for `other`. A closed connection may go to another program, so only a lane that
    /// has none gets one of a lane that needs its own.
    const fn yields(self, is_last: bool, other: Self, other_has_none: bool) -> Yield {
        match (self, other) {
            (Self::Spare, _) => Yield::Always,
            (Self::Ops | Self::Rules | Self::Lookups, _) if !other_has_none => Yield::Never,
            (Self::Ops | Self::Rules, Self::Spare) => Yield::Never,
            (Self::Ops, Self::Ops | Self::Rules | Self::Lookups) | (Self::Rules, Self::Lookups) => Yield::Always,
            (Self::Rules, Self::Ops | Self::Rules) => Yield::Seldom,
            (Self::Lookups, _) if is_last => Yield::Never,
            (Self::Lookups, _) => Yield::Seldom,
        }
    }
}

#[derive(Debug)]
pub(super) struct Lane {
    connector: Arc<Connector>,
    rank: Rank,
    slots: Arc<Semaphore>,
    idle: Mutex<Vec<(Connection, Instant)>>,
    /// Connections that are still being made although their callers could wait no longer: the next ones get them. So a server that is
    /// far away is reached in the end.
    dials: Mutex<Vec<Dial>>,
    /// One connection was given back.
    returned: Notify,
    /// Each connection that is in use has a clone.
    in_use: Arc<()>,
    /// Callers that the server refused a connection for want of them, and that wait.
    waiting: AtomicUsize,
    scarcity: Arc<Scarcity>,
}

type Dial = AbortOnDropHandle<(Result<Connection, StoreError>, Instant)>;

impl Lane {
    pub fn new(
        connector: impl Into<Arc<Connector>>,
        rank: Rank,
        connections_max: usize,
        scarcity: &Arc<Scarcity>,
    ) -> Arc<Self> {
        let lane = Arc::new(Self {
            connector: connector.into(),
            rank,
            slots: Arc::new(Semaphore::new(connections_max)),
            idle: Mutex::new(Vec::with_capacity(connections_max)),
            dials: Mutex::default(),
            returned: Notify::new(),
            in_use: Arc::default(),
            waiting: AtomicUsize::new(0),
            scarcity: Arc::clone(scarcity),
        });
        scarcity.join(&lane);
        lane
    }

    /// A connection that is alive, as far as can be known; one for look-ups is asked for a sign of life after a minute only, since that costs
    /// as much as a look-up: see [`Held::is_reused`].
    ///
    /// # Cancel safety
    /// A connection that is being made when the future is dropped is there for the next caller.
    pub async fn take(self: &Arc<Self>) -> Result<Held, StoreError> {
        let begun = Instant::now();
        let permit = match timeout(TAKE_MAX, Arc::clone(&self.slots).acquire_owned()).await {
            Ok(Ok(permit)) => permit,
            Ok(Err(_)) | Err(_) => return Err(StoreError::Busy),
        };
        let is_passing = self.connector.is_passing();
        let (connection, idle_for) = self.connection(begun).await?;
        Ok(Held {
            connection,
            is_passing,
            idle_for,
            lane: Arc::clone(self),
            _in_use: Arc::clone(&self.in_use),
            _permit: permit,
        })
    }

    /// With the time for which it was idle, where it was used before. The caller has waited since `begun`.
    async fn connection(&self, begun: Instant) -> Result<(Connection, Option<Duration>), StoreError> {
        let give_up_at = begun + self.rank.scarce_wait_max();
        loop {
            if let Some((connection, idle_for)) = self.take_idle().await {
                return Ok((connection, Some(idle_for)));
            }
            let detail = match self.dial().await {
                Ok(connection) => return Ok((connection, None)),
                Err(StoreError::NoConnectionFree(detail)) => detail,
                Err(error) => return Err(error),
            };
            let made_room = self.scarcity.make_room(self, &detail);
            let wait = if made_room { ROOM_WAIT } else { SCARCE_RETRY };
            if Instant::now() + wait > give_up_at {
                self.scarcity.handle_given_up(begun);
                return Err(StoreError::NoConnectionFree(detail));
            }
            let _waiting = Waiting::new(&self.waiting);
            tokio::select! {
                () = self.returned.notified() => {}
                () = sleep(wait) => {}
            }
        }
    }

    async fn take_idle(&self) -> Option<(Connection, Duration)> {
        loop {
            let (mut connection, since) = match self.take_late_dial() {
                Some(found) => found,
                None => self.idle().pop()?,
            };
            let idle_for = since.elapsed();
            let trusted_for = match self.rank {
                Rank::Lookups => LOOKUP_IDLE_TRUSTED,
                Rank::Spare | Rank::Ops | Rank::Rules => IDLE_TRUSTED,
            };
            if matches!(connection, Connection::Sqlite(_)) || idle_for < trusted_for {
                return Some((connection, idle_for));
            }
            if let Ok(Ok(())) = timeout(PING_MAX, connection.ping()).await {
                return Some((connection, idle_for));
            }
            // Those that remain were idle for longer.
            self.close_idle();
        }
    }

    /// A connection whose caller could not wait for it. Attempts that failed meanwhile say nothing about now.
    fn take_late_dial(&self) -> Option<(Connection, Instant)> {
        let mut dials = self.dials();
        while let Some(at) = dials.iter().position(|dial| dial.is_finished()) {
            let mut dial = dials.swap_remove(at);
            let finished = Pin::new(&mut dial).poll(&mut Context::from_waker(std::task::Waker::noop()));
            if let Poll::Ready(Ok((Ok(connection), since))) = finished {
                return Some((connection, since));
            }
        }
        None
    }

    /// A new connection, or an error within the time that one may take.
    async fn dial(&self) -> Result<Connection, StoreError> {
        if matches!(*self.connector, Connector::Sqlite(_)) {
            return self.connector.connect().await;
        }
        let under_way = self.dials().pop();
        let dial = under_way.unwrap_or_else(|| {
            let connector = Arc::clone(&self.connector);
            AbortOnDropHandle::new(tokio::spawn(async move { (connector.connect().await, Instant::now()) }))
        });
        let mut dialing = Dialing {
            lane: self,
            dial: Some(dial),
        };
        let dialled = match &mut dialing.dial {
            Some(dial) => dial.await,
            None => return Err(StoreError::TimedOut),
        };
        dialing.dial = None;
        match dialled {
            Ok((outcome, _)) => outcome,
            // It does not panic, and is aborted only with the lane.
            Err(error) => Err(StoreError::Unavailable(format!(
                "connecting to it ended early: {error}"
            ))),
        }
    }

    /// To be asked before a transaction begins, and before it is committed.
    pub async fn check_writable(&self) -> Result<(), StoreError> {
        self.connector.check_writable().await
    }

    /// Closes every connection that nobody uses, and counts them.
    pub fn close_idle(&self) -> usize {
        let idle = std::mem::take(&mut *self.idle());
        let late_dials = std::iter::from_fn(|| self.take_late_dial());
        idle.len() + late_dials.count()
    }

    /// Closes the connection that was unused for longest. False where there is none.
    fn close_one_idle(&self) -> bool {
        if self.take_late_dial().is_some() {
            return true;
        }
        let mut idle = self.idle();
        let is_there = !idle.is_empty();
        let oldest = is_there.then(|| idle.remove(0));
        drop(idle);
        oldest.is_some()
    }

    /// Open connections, in use or not.
    fn connections(&self) -> usize {
        self.idle().len() + Arc::strong_count(&self.in_use) - 1
    }

    fn is_in_need(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0 && self.connections() == 0
    }

    fn idle(&self) -> MutexGuard<'_, Vec<(Connection, Instant)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dials(&self) -> MutexGuard<'_, Vec<Dial>> {
        self.dials.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Leaves an attempt to connect to the next caller, where this one is dropped first.
struct Dialing<'a> {
    lane: &'a Lane,
    dial: Option<Dial>,
}

impl Drop for Dialing<'_> {
    fn drop(&mut self) {
        self.lane.dials().extend(self.dial.take());
    }
}

/// Whether the server refuses connections for want of them, shared by the lanes of one store.
#[derive(Debug, Default)]
pub(super) struct Scarcity(Mutex<Shortage>);

#[derive(Debug, Default)]
struct Shortage {
    lanes: Vec<Weak<Lane>>,
    /// The last refusal, and the server's words.
    last: Option<(Instant, String)>,
    /// The last connection that was closed by [`Yield::Seldom`].
    conceded: Option<Instant>,
    /// Such a connection was closed in vain since connections became scarce.
    is_futile: bool,
}

impl Scarcity {
    fn join(&self, lane: &Arc<Lane>) {
        self.lock().lanes.push(Arc::downgrade(lane));
    }

    /// Why connections are scarce, if they are.
    pub fn reason(&self) -> Option<String> {
        let shortage = self.lock();
        let (at, detail) = shortage.last.as_ref()?;
        (at.elapsed() < SCARCE_FOR).then(|| detail.clone())
    }

    fn is_on(&self) -> bool {
        self.lock()
            .last
            .as_ref()
            .is_some_and(|(at, _)| at.elapsed() < SCARCE_FOR)
    }

    /// The server has refused `lane` a connection: closes one that another lane does not use. False where there is none to close.
    fn make_room(&self, lane: &Lane, detail: &str) -> bool {
        {
            let mut shortage = self.lock();
            let is_news = shortage.last.as_ref().is_none_or(|(at, _)| at.elapsed() >= SCARCE_FOR);
            if is_news {
                tracing::warn!(reason = detail, "database connections are scarce: look-ups go first");
                shortage.is_futile = false;
            }
            shortage.last = Some((Instant::now(), detail.to_owned()));
        }
        let has_none = lane.connections() == 0;
        let mut others = self.others(lane);
        others.retain(|other| !other.idle().is_empty());
        others.sort_by_key(|other| other.rank.turn());
        others
            .iter()
            .any(|other| self.is_to_yield(other, lane.rank, has_none) && other.close_one_idle())
    }

    /// Whether `lane` closes a connection that it could keep.
    fn is_wanted_of(&self, lane: &Lane) -> bool {
        let is_wanted = |other: &Arc<Lane>| other.is_in_need() && self.is_to_yield(lane, other.rank, true);
        self.is_on() && self.others(lane).iter().any(is_wanted)
    }

    fn is_to_yield(&self, lane: &Lane, other: Rank, other_has_none: bool) -> bool {
        match lane.rank.yields(lane.connections() == 1, other, other_has_none) {
            Yield::Always => true,
            Yield::Seldom => self.concede(),
            Yield::Never => false,
        }
    }

    fn concede(&self) -> bool {
        let mut shortage = self.lock();
        let is_due = shortage.conceded.is_none_or(|at| at.elapsed() >= CONCESSION_INTERVAL);
        let is_conceded = is_due && !shortage.is_futile;
        if is_conceded {
            shortage.conceded = Some(Instant::now());
        }
        is_conceded
    }

    /// A caller that has waited since `begun` got no connection.
    fn handle_given_up(&self, begun: Instant) {
        let mut shortage = self.lock();
        shortage.is_futile |= shortage.conceded.is_some_and(|at| at >= begun);
    }

    fn others(&self, lane: &Lane) -> Vec<Arc<Lane>> {
        let lanes = self.lock().lanes.clone();
        let lanes = lanes.iter().filter_map(Weak::upgrade);
        lanes.filter(|other| !std::ptr::eq(Arc::as_ptr(other), lane)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Shortage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a caller that waits, until it is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection out of its lane. Dropping it closes it, and with it a transaction that was not committed.
#[derive(Debug)]
pub(super) struct Held {
    connection: Connection,
    /// Closed rather than given back.
    is_passing: bool,
    idle_for: Option<Duration>,
    lane: Arc<Lane>,
    _in_use: Arc<()>,
    _permit: OwnedSemaphorePermit,
}

impl Held {
    pub async fn begin(&mut self) -> Result<(), StoreError> {
        self.lane.check_writable().await?;
        self.connection.begin().await
    }

    /// Whether it was used before: then the server may have closed it meanwhile, by restarting.
    pub const fn is_reused(&self) -> bool {
        self.idle_for.is_some()
    }

    /// Whether it was idle for so long that it may be dead without anybody having said so.
    pub fn may_be_stale(&self) -> bool {
        self.idle_for.is_some_and(|idle_for| idle_for >= IDLE_TRUSTED)
    }

    /// Commits, and gives the connection back.
    pub async fn commit(mut self) -> Result<(), StoreError> {
        self.lane.check_writable().await?;
        self.connection.commit().await?;
        self.give_back();
        Ok(())
    }

    /// Undoes the transaction, and gives the connection back. For transactions that found nothing to do.
    pub async fn rollback(mut self) -> Result<(), StoreError> {
        self.connection.rollback().await?;
        self.give_back();
        Ok(())
    }

    /// Gives the connection back. Only with no transaction open and every answer read.
    pub fn give_back(self) {
        if self.is_passing || self.lane.scarcity.is_wanted_of(&self.lane) {
            return;
        }
        self.lane.idle().push((self.connection, Instant::now()));
        self.lane.returned.notify_one();
    }
}

impl Deref for Held {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl DerefMut for Held {
    fn deref_mut(&mut self) -> &mut Connection {
        &mut self.connection
    }
}
