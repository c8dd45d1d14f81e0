//! The places of API connections: how many may be open, how many may carry a call, and which one makes way for a new one.
//!
//! A connection is *busy* from the moment a call on it has shown a valid token until its answer is written; any other is *idle*,
//! whatever bytes it sends. Idle connections make way for new ones, so that silent or slow ones never keep `/healthz`,
//! `/metrics` and operators out. Start with [`Places`].

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

/// Connections beyond those that may be busy: room for calls without a token while all others are busy.
const IDLE_ROOM: usize = 16;
/// Minimum age of an idle connection before it makes way while there is other room: time for a request to arrive.
const IDLE_AT_LEAST: Duration = Duration::from_secs(1);

/// All places.
#[derive(Debug)]
pub struct Places {
    busy_max: usize,
    open: Mutex<Open>,
    /// Told when a place is given back, or a connection becomes idle.
    freed: Notify,
}

#[derive(Debug, Default)]
struct Open {
    /// Number of the next connection or turn.
    next: u64,
    connections: HashMap<u64, Connection>,
    /// Idle connections in the order in which they became idle.
    idle: BTreeMap<u64, u64>,
    /// Those of them that have carried a call, in the same order.
    served: BTreeMap<u64, u64>,
}

#[derive(Debug)]
struct Connection {
    evicted: CancellationToken,
    state: Activity,
}

#[derive(Clone, Copy, Debug)]
enum Activity {
    /// Its key among the idle ones, and when it became idle.
    Idle(u64, Instant),
    Busy,
}

/// A place that one connection holds, given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    number: u64,
    evicted: CancellationToken,
}

/// A call that is carried out. The connection is idle again when this is dropped.
#[derive(Debug)]
pub struct Busy(Arc<Place>);

impl Places {
    /// `busy_max` connections may carry a call at a time.
    pub fn new(busy_max: usize) -> Arc<Self> {
        Arc::new(Self {
            busy_max,
            open: Mutex::default(),
            freed: Notify::new(),
        })
    }

    /// A place for a new connection. Waits only while every connection is busy.
    ///
    /// # Cancel safety
    /// Nothing is taken when this is dropped.
    pub async fn take(self: &Arc<Self>) -> Place {
        loop {
            let freed = self.freed.notified();
            if let Some(place) = self.try_take(Instant::now()) {
                return place;
            }
            freed.await;
        }
    }

    fn try_take(self: &Arc<Self>, now: Instant) -> Option<Place> {
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
        Some(Place {
            places: Arc::clone(self),
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

    /// Evicts the connection that has been idle for longest. While that is not long, one that has carried a call goes first: its client
    /// has its answer, and the request of a new one may be on its way. False: none goes.
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

impl Place {
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
        let mut open = self.places.open();
        if open.busy_len() >= self.places.busy_max {
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

impl Drop for Place {
    fn drop(&mut self) {
        self.places.open().remove(self.number);
        self.places.freed.notify_one();
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let Place { places, number, .. } = &*self.0;
        places.open().set_idle(*number, Instant::now(), true);
        places.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_connection_that_is_idle_for_longest_makes_way() {
        let places = Places::new(2);
        let now = Instant::now();
        let first = Arc::new(places.try_take(now).unwrap());
        let second = Arc::new(places.try_take(now).unwrap());
        // It was used meanwhile: the other one is idle for longer.
        drop(first.occupy().unwrap());

        let third = places.try_take(now + Duration::from_secs(5)).unwrap();

        assert!(second.evicted.is_cancelled());
        assert!(!first.evicted.is_cancelled() && !third.evicted.is_cancelled());
        assert!(second.occupy().is_none(), "a connection that has to go begins no call");
        assert_eq!(places.len(), 2);
        drop((first, second, third));
        assert_eq!(places.len(), 0);
    }

    #[test]
    fn connection_whose_request_is_on_its_way_does_not_make_way_for_ones_that_have_their_answers() {
        let places = Places::new(8);
        let now = Instant::now();
        let waiting = places.try_take(now).unwrap();

        let answered: Vec<Arc<Place>> = (0..100)
            .map(|_| {
                let place = Arc::new(places.try_take(now).unwrap());
                drop(place.occupy().unwrap());
                place
            })
            .collect();

        assert!(!waiting.evicted.is_cancelled());
        assert_eq!(places.len(), 8 + IDLE_ROOM);
        let later = now + IDLE_AT_LEAST;
        let _next = places.try_take(later + Duration::from_secs(1)).unwrap();
        assert!(waiting.evicted.is_cancelled(), "it had its time");
        drop(answered);
        assert!(places.open().served.is_empty());
    }

    #[test]
    fn a_flood_of_silent_connections_takes_no_more_places_than_there_are() {
        let places = Places::new(8);
        let now = Instant::now();

        let flood: Vec<Place> = (0..1_000).map(|_| places.try_take(now).unwrap()).collect();

        assert_eq!(places.len(), 8 + IDLE_ROOM);
        let evicted = flood.iter().filter(|place| place.evicted.is_cancelled()).count();
        assert_eq!(evicted, 1_000 - places.len());
        assert!(!flood.last().unwrap().evicted.is_cancelled());
    }

    #[test]
    fn calls_leave_room_for_connections_that_carry_none() {
        let places = Places::new(2);
        let now = Instant::now();
        let calls: Vec<Arc<Place>> = (0..3).map(|_| Arc::new(places.try_take(now).unwrap())).collect();

        let busy: Vec<Option<Busy>> = calls.iter().map(Place::occupy).collect();

        assert!(busy[0].is_some() && busy[1].is_some());
        assert!(busy[2].is_none());
        assert!(places.try_take(now).is_some());
        drop(busy);
        assert!(calls[2].occupy().is_some());
    }
}
