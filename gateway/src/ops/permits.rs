//! Permits of API connections: how many may be open, how many may run a call, and which one is evicted for a new one.
//!
//! A connection is *busy* from a valid token until its answer is written. Any other is *idle*, whatever bytes it sends.
//! Idle connections are evicted for new ones, so that silent or slow ones never block `/healthz`, `/metrics` and
//! operators. Start with [`Permits`].

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

/// Connections beyond those that may be busy: for calls without a token while all others are busy.
const IDLE_ROOM: usize = 16;
/// Minimum idle time before a connection is evicted if there is another choice: time for a request to arrive.
const IDLE_AT_LEAST: Duration = Duration::from_secs(1);

/// All permits.
#[derive(Debug)]
pub struct Permits {
    busy_max: usize,
    open: Mutex<Open>,
    /// Notified when a permit is released, or a connection becomes idle.
    freed: Notify,
}

#[derive(Debug, Default)]
struct Open {
    /// Number of the next connection or turn.
    next: u64,
    connections: HashMap<u64, Connection>,
    /// Idle connections in the order in which they became idle.
    idle: BTreeMap<u64, u64>,
    /// The idle connections that have carried a call, in the same order.
    served: BTreeMap<u64, u64>,
}

#[derive(Debug)]
struct Connection {
    evicted: CancellationToken,
    state: Activity,
}

#[derive(Clone, Copy, Debug)]
enum Activity {
    /// Key among the idle connections, and when it became idle.
    Idle(u64, Instant),
    Busy,
}

/// The permit of one connection. Dropping it releases it.
#[derive(Debug)]
pub struct Permit {
    permits: Arc<Permits>,
    number: u64,
    evicted: CancellationToken,
}

/// A running call. Dropping it makes the connection idle.
#[derive(Debug)]
pub struct Busy(Arc<Permit>);

impl Permits {
    /// `busy_max` connections may run a call at a time.
    pub fn new(busy_max: usize) -> Arc<Self> {
        Arc::new(Self {
            busy_max,
            open: Mutex::default(),
            freed: Notify::new(),
        })
    }

    /// Acquires a permit for a new connection. Waits only while every connection is busy.
    ///
    /// # Cancel safety
    /// Dropping the future acquires nothing.
    pub async fn acquire(self: &Arc<Self>) -> Permit {
        loop {
            let freed = self.freed.notified();
            if let Some(permit) = self.try_take(Instant::now()) {
                return permit;
            }
            freed.await;
        }
    }

    fn try_take(self: &Arc<Self>, now: Instant) -> Option<Permit> {
        let mut open = self.open();
        if open.connections.len() >= self.busy_max {
            let has_room = open.connections.len() < self.busy_max + IDLE_ROOM;
            if !open.evict_one(has_room, now) && !has_room {
                return None;
            }
        }
        let number = open.number();
        let evicted = CancellationToken::new();
        let connection = Connection {
            evicted: evicted.clone(),
            state: Activity::Busy,
        };
        open.connections.insert(number, connection);
        open.set_idle(number, now, false);
        drop(open);
        Some(Permit {
            permits: Arc::clone(self),
            number,
            evicted,
        })
    }

    /// Number of open connections.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.open().connections.len()
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Evicts the connection that has been idle for longest. While that is not long, one that has carried a call goes
    /// first: its client has its answer, and the request of a new one may be on its way. False: none goes.
    fn evict_one(&mut self, has_room: bool, now: Instant) -> bool {
        let Some(&oldest) = self.idle.values().next() else {
            return false;
        };
        let is_idle_for_long = self
            .connections
            .get(&oldest)
            .is_some_and(|connection| match connection.state {
                Activity::Idle(_, since) => now.duration_since(since) >= IDLE_AT_LEAST,
                Activity::Busy => false,
            });
        let evicted = match (is_idle_for_long, has_room) {
            (true, _) => oldest,
            (false, true) => return false,
            (false, false) => self.served.values().next().copied().unwrap_or(oldest),
        };
        self.remove(evicted);
        true
    }

    fn remove(&mut self, number: u64) {
        if let Some(connection) = self.connections.remove(&number) {
            connection.evicted.cancel();
            if let Activity::Idle(key, _) = connection.state {
                self.idle.remove(&key);
                self.served.remove(&key);
            }
        }
    }

    fn set_idle(&mut self, number: u64, now: Instant, is_served: bool) {
        let key = self.number();
        if let Some(connection) = self.connections.get_mut(&number) {
            connection.state = Activity::Idle(key, now);
            self.idle.insert(key, number);
            if is_served {
                self.served.insert(key, number);
            }
        }
    }

    fn busy_len(&self) -> usize {
        self.connections.len() - self.idle.len()
    }
}

impl Permit {
    /// Ready when this connection has to make way.
    pub async fn evicted(&self) {
        self.evicted.cancelled().await;
    }

    /// Ends the connection.
    pub fn evict(&self) {
        self.evicted.cancel();
    }

    /// Marks the connection as busy. `None`: as many as may be are busy, or this one has to make way.
    pub fn occupy(self: &Arc<Self>) -> Option<Busy> {
        let mut open = self.permits.open();
        if open.busy_len() >= self.permits.busy_max {
            return None;
        }
        let connection = open.connections.get_mut(&self.number)?;
        let Activity::Idle(key, _) = connection.state else {
            return None;
        };
        connection.state = Activity::Busy;
        open.idle.remove(&key);
        open.served.remove(&key);
        drop(open);
        Some(Busy(Arc::clone(self)))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.permits.open().remove(self.number);
        self.permits.freed.notify_one();
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let Permit { permits, number, .. } = &*self.0;
        permits.open().set_idle(*number, Instant::now(), true);
        permits.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_connection_that_is_idle_for_longest_makes_way() {
        let permits = Permits::new(2);
        let now = Instant::now();
        let first = Arc::new(permits.try_take(now).unwrap());
        let second = Arc::new(permits.try_take(now).unwrap());
        // It was used meanwhile: the other one is idle for longer.
        drop(first.occupy().unwrap());

        let third = permits.try_take(now + Duration::from_secs(5)).unwrap();

        assert!(second.evicted.is_cancelled());
        assert!(!first.evicted.is_cancelled() && !third.evicted.is_cancelled());
        assert!(second.occupy().is_none(), "a connection that has to go begins no call");
        assert_eq!(permits.len(), 2);
        drop((first, second, third));
        assert_eq!(permits.len(), 0);
    }

    #[test]
    fn connection_whose_request_is_on_its_way_does_not_make_way_for_ones_that_have_their_answers() {
        let permits = Permits::new(8);
        let now = Instant::now();
        let waiting = permits.try_take(now).unwrap();

        let answered: Vec<Arc<Permit>> = (0..100)
            .map(|_| {
                let permit = Arc::new(permits.try_take(now).unwrap());
                drop(permit.occupy().unwrap());
                permit
            })
            .collect();

        assert!(!waiting.evicted.is_cancelled());
        assert_eq!(permits.len(), 8 + IDLE_ROOM);
        let later = now + IDLE_AT_LEAST;
        let _next = permits.try_take(later + Duration::from_secs(1)).unwrap();
        assert!(waiting.evicted.is_cancelled(), "it had its time");
        drop(answered);
        assert!(permits.open().served.is_empty());
    }

    #[test]
    fn a_flood_of_silent_connections_takes_no_more_places_than_there_are() {
        let permits = Permits::new(8);
        let now = Instant::now();

        let flood: Vec<Permit> = (0..1_000).map(|_| permits.try_take(now).unwrap()).collect();

        assert_eq!(permits.len(), 8 + IDLE_ROOM);
        let evicted = flood.iter().filter(|permit| permit.evicted.is_cancelled()).count();
        assert_eq!(evicted, 1_000 - permits.len());
        assert!(!flood.last().unwrap().evicted.is_cancelled());
    }

    #[test]
    fn calls_leave_room_for_connections_that_carry_none() {
        let permits = Permits::new(2);
        let now = Instant::now();
        let calls: Vec<Arc<Permit>> = (0..3).map(|_| Arc::new(permits.try_take(now).unwrap())).collect();

        let busy: Vec<Option<Busy>> = calls.iter().map(Permit::occupy).collect();

        assert!(busy[0].is_some() && busy[1].is_some());
        assert!(busy[2].is_none());
        assert!(permits.try_take(now).is_some());
        drop(busy);
        assert!(calls[2].occupy().is_some());
    }
}
