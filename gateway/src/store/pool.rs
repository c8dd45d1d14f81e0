//! A small pool of connections for one purpose, so that no purpose can starve another.
//!
//! ADR 0009 says why it is not a general pool. A caller owns its connection, and returns it only after success. A
//! connection that is dropped earlier (by an error, a cancelled request, a deadline) is closed. At most
//! `connections_max` connections are in use, and at most as many are idle. Closing a connection of SQLite interrupts
//! its statement. A statement that waits for the disk keeps its thread, and the number of threads is bounded where they
//! start. Start with [`Pool::take`].

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

/// Maximum wait for a free connection. Then the caller gets [`StoreError::Busy`].
const TAKE_MAX: Duration = Duration::from_secs(2);
/// Idle time after which a connection is pinged before it is used: the server may have restarted.
const IDLE_TRUSTED: Duration = Duration::from_secs(1);
/// The same for lookups, which have no time for a ping. Firewalls silently drop idle connections after some minutes.
const LOOKUP_IDLE_TRUSTED: Duration = Duration::from_secs(60);
/// Maximum time of a ping. Then the connection is closed and a new one is opened.
const PING_MAX: Duration = Duration::from_millis(500);

/// Time for which connections are considered scarce after the server's last refusal for lack of them.
const SCARCE_FOR: Duration = Duration::from_secs(10);
/// Minimum time between two connections that a pool gives up to one of lower rank while connections are scarce.
const CONCESSION_INTERVAL: Duration = Duration::from_secs(1);
/// Time for the server to notice that an idle connection was closed to make room.
const ROOM_WAIT: Duration = Duration::from_millis(50);
/// Time between two attempts to connect if no other connection could be closed.
const SCARCE_RETRY: Duration = Duration::from_millis(200);

/// The purpose of a pool. It decides which pool closes a connection while they are scarce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rank {
    /// Imports and the plan guard.
    Spare,
    /// The API.
    Ops,
    /// Rules and revocations.
    Rules,
    /// Lookups of devices.
    Lookups,
}

/// Whether a pool closes a connection so that another one can open one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Yield {
    Always,
    /// At most one each [`CONCESSION_INTERVAL`]. None at all once a connection was closed in vain: another program took
    /// its place.
    Seldom,
    Never,
}

impl Rank {
    /// Maximum wait while the server refuses connections for lack of them. A lookup has a second in all.
    const fn scarce_wait_max(self) -> Duration {
        match self {
            Self::Lookups => Duration::from_millis(500),
            Self::Spare | Self::Ops | Self::Rules => Duration::from_millis(1_500),
        }
    }

    /// Position in the order in which pools close connections. The least important is first.
    const fn turn(self) -> u8 {
        match self {
            Self::Spare => 0,
            Self::Ops => 1,
            Self::Lookups => 2,
            Self::Rules => 3,
        }
    }

    /// Whether a pool of this rank closes a connection for `other`. A closed connection may go to another program. So a
    /// pool that needs its own gives one only to a pool without any.
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
pub(super) struct Pool {
    connector: Arc<Connector>,
    rank: Rank,
    slots: Arc<Semaphore>,
    idle: Mutex<Vec<(Connection, Instant)>>,
    /// Connections that are still being opened although their callers have given up. The next callers get them. So even
    /// a server that is far away is reached.
    dials: Mutex<Vec<Dial>>,
    /// Notified when a connection is returned.
    returned: Notify,
    /// Each connection that is in use has a clone.
    in_use: Arc<()>,
    /// Waiting callers that the server has refused a connection for lack of them.
    waiting: AtomicUsize,
    scarcity: Arc<Scarcity>,
}

type Dial = AbortOnDropHandle<(Result<Connection, StoreError>, Instant)>;

impl Pool {
    pub fn new(
        connector: impl Into<Arc<Connector>>,
        rank: Rank,
        connections_max: usize,
        scarcity: &Arc<Scarcity>,
    ) -> Arc<Self> {
        let pool = Arc::new(Self {
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
        scarcity.join(&pool);
        pool
    }

    /// Like [`take`](Self::take), for work with a deadline. If opening a connection took longer than `connect_max`, it
    /// is kept for the next caller: the server is far away, and work that is cut off would lose the connection each
    /// time.
    ///
    /// # Errors
    /// [`StoreError::TimedOut`] in that case.
    pub async fn take_within(self: &Arc<Self>, connect_max: Duration) -> Result<Held, StoreError> {
        let begun = Instant::now();
        let held = self.take().await?;
        if !held.is_reused() && begun.elapsed() > connect_max {
            held.release();
            return Err(StoreError::TimedOut);
        }
        Ok(held)
    }

    /// Returns a connection that is most likely alive. One for lookups is only pinged after a minute, since a ping
    /// costs as much as a lookup: see [`Held::is_reused`].
    ///
    /// # Cancel safety
    /// Safe: the next caller gets a connection that is being opened.
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
            pool: Arc::clone(self),
            _in_use: Arc::clone(&self.in_use),
            _permit: permit,
        })
    }

    /// Returns a connection, and its idle time if it was used before. The caller has waited since `begun`.
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
            // The others were idle for longer.
            self.close_idle();
        }
    }

    /// Returns a connection whose caller has given up. Failed attempts are dropped.
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

    /// Opens a connection, within its maximum time.
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
            pool: self,
            dial: Some(dial),
        };
        let dialled = match &mut dialing.dial {
            Some(dial) => dial.await,
            None => return Err(StoreError::TimedOut),
        };
        dialing.dial = None;
        match dialled {
            Ok((outcome, _)) => outcome,
            // It does not panic, and is aborted only with the pool.
            Err(error) => Err(StoreError::Unavailable(format!(
                "connecting to it ended early: {error}"
            ))),
        }
    }

    /// Checks that the database may be written. Called before a transaction begins, and before it is committed.
    pub async fn check_writable(&self) -> Result<(), StoreError> {
        self.connector.check_writable().await
    }

    /// Closes all idle connections. Returns their number.
    pub fn close_idle(&self) -> usize {
        let idle = std::mem::take(&mut *self.idle());
        let late_dials = std::iter::from_fn(|| self.take_late_dial());
        idle.len() + late_dials.count()
    }

    /// Closes the connection that was idle for longest. Returns whether there was one.
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

/// An attempt to connect. Dropping it leaves the attempt to the next caller.
struct Dialing<'a> {
    pool: &'a Pool,
    dial: Option<Dial>,
}

impl Drop for Dialing<'_> {
    fn drop(&mut self) {
        self.pool.dials().extend(self.dial.take());
    }
}

/// Whether the server refuses connections for lack of them. Shared by the pools of one store.
#[derive(Debug, Default)]
pub(super) struct Scarcity(Mutex<Shortage>);

#[derive(Debug, Default)]
struct Shortage {
    pools: Vec<Weak<Pool>>,
    /// The last refusal, and the server's message.
    last: Option<(Instant, String)>,
    /// The last connection that was closed by [`Yield::Seldom`].
    conceded: Option<Instant>,
    /// Whether such a connection was closed in vain since connections became scarce.
    is_futile: bool,
}

impl Scarcity {
    fn join(&self, pool: &Arc<Pool>) {
        self.lock().pools.push(Arc::downgrade(pool));
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

    /// Closes an idle connection of another pool, after the server has refused `pool` one. Returns whether there was
    /// one.
    fn make_room(&self, pool: &Pool, detail: &str) -> bool {
        {
            let mut shortage = self.lock();
            let is_news = shortage.last.as_ref().is_none_or(|(at, _)| at.elapsed() >= SCARCE_FOR);
            if is_news {
                tracing::warn!(reason = detail, "database connections are scarce: lookups go first");
                shortage.is_futile = false;
            }
            shortage.last = Some((Instant::now(), detail.to_owned()));
        }
        let has_none = pool.connections() == 0;
        let mut others = self.others(pool);
        others.retain(|other| !other.idle().is_empty());
        others.sort_by_key(|other| other.rank.turn());
        others
            .iter()
            .any(|other| self.is_to_yield(other, pool.rank, has_none) && other.close_one_idle())
    }

    /// Whether `pool` closes a connection that it could keep.
    fn is_wanted_of(&self, pool: &Pool) -> bool {
        let is_wanted = |other: &Arc<Pool>| other.is_in_need() && self.is_to_yield(pool, other.rank, true);
        self.is_on() && self.others(pool).iter().any(is_wanted)
    }

    fn is_to_yield(&self, pool: &Pool, other: Rank, other_has_none: bool) -> bool {
        match pool.rank.yields(pool.connections() == 1, other, other_has_none) {
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

    /// Records that a caller which has waited since `begun` got no connection.
    fn handle_given_up(&self, begun: Instant) {
        let mut shortage = self.lock();
        shortage.is_futile |= shortage.conceded.is_some_and(|at| at >= begun);
    }

    fn others(&self, pool: &Pool) -> Vec<Arc<Pool>> {
        let pools = self.lock().pools.clone();
        let pools = pools.iter().filter_map(Weak::upgrade);
        pools.filter(|other| !std::ptr::eq(Arc::as_ptr(other), pool)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Shortage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A waiting caller. Dropping it ends the count.
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

/// A connection in use. Dropping it closes it, and rolls its transaction back.
#[derive(Debug)]
pub(super) struct Held {
    connection: Connection,
    /// Closed instead of returned.
    is_passing: bool,
    idle_for: Option<Duration>,
    pool: Arc<Pool>,
    _in_use: Arc<()>,
    _permit: OwnedSemaphorePermit,
}

impl Held {
    pub async fn begin(&mut self) -> Result<(), StoreError> {
        self.pool.check_writable().await?;
        self.connection.begin().await
    }

    /// Whether it was used before: then the server may have closed it by a restart.
    pub const fn is_reused(&self) -> bool {
        self.idle_for.is_some()
    }

    /// Whether it was idle so long that a firewall may have dropped it silently.
    pub fn may_be_stale(&self) -> bool {
        self.idle_for.is_some_and(|idle_for| idle_for >= IDLE_TRUSTED)
    }

    /// Commits, and returns the connection.
    pub async fn commit(mut self) -> Result<(), StoreError> {
        self.pool.check_writable().await?;
        self.connection.commit().await?;
        self.release();
        Ok(())
    }

    /// Rolls back, and returns the connection. For transactions that found nothing to do.
    pub async fn rollback(mut self) -> Result<(), StoreError> {
        self.connection.rollback().await?;
        self.release();
        Ok(())
    }

    /// Returns the connection. Only without an open transaction, and after every answer was read.
    pub fn release(self) {
        if self.is_passing || self.pool.scarcity.is_wanted_of(&self.pool) {
            return;
        }
        self.pool.idle().push((self.connection, Instant::now()));
        self.pool.returned.notify_one();
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
