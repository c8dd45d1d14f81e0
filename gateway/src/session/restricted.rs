//! Room for restricted sessions: devices that are upgraded without authentication get an update notice, and are closed.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// One restricted session for so many connections of the node.
const CONNECTIONS_PER_SESSION: usize = 100;
/// Minimum number of restricted sessions.
const SESSIONS_MIN: usize = 4;
/// Maximum time that a device waits for a session to end.
const WAIT_MAX: Duration = Duration::from_millis(100);

/// The node's restricted sessions: at most 1 % of its connections, and at least four.
#[derive(Debug)]
pub struct RestrictedSessions {
    room: Arc<Semaphore>,
    max: usize,
    /// Ends the session that has waited for it longest.
    wanted: Notify,
}

impl RestrictedSessions {
    /// `connections`: maximum number of connections of the node.
    #[must_use]
    pub fn new(connections: usize) -> Self {
        let max = (connections / CONNECTIONS_PER_SESSION).max(SESSIONS_MIN);
        Self {
            room: Arc::new(Semaphore::new(max)),
            max,
            wanted: Notify::new(),
        }
    }

    /// Room for one more, given back when it is dropped. If there is none, the oldest session that
    /// [may end](Self::is_wanted) ends for it; `None` if there is none after 100 ms.
    pub async fn take(&self) -> Option<OwnedSemaphorePermit> {
        let room = || Arc::clone(&self.room);
        if let Ok(permit) = room().try_acquire_owned() {
            return Some(permit);
        }
        self.wanted.notify_one();
        timeout(WAIT_MAX, room().acquire_owned()).await.ok()?.ok()
    }

    /// Resolves when another device needs the room of a session that has had its time.
    pub async fn is_wanted(&self) {
        self.wanted.notified().await;
    }

    /// Number of restricted sessions that are open.
    #[must_use]
    pub fn len(&self) -> usize {
        self.max - self.room.available_permits()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Maximum number of restricted sessions at a time.
    #[must_use]
    pub const fn max(&self) -> usize {
        self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_percent_of_the_connections_and_at_least_four() {
        assert_eq!(RestrictedSessions::new(100_000).max(), 1_000);
        let few = RestrictedSessions::new(10);
        let mut held = Vec::new();
        while let Some(place) = few.take().await {
            held.push(place);
        }

        assert_eq!((held.len(), few.len(), few.max()), (4, 4, 4));
        drop(held);
        assert!(few.is_empty() && few.take().await.is_some());
    }

    #[tokio::test]
    async fn a_session_that_has_had_its_time_makes_room() {
        let few = Arc::new(RestrictedSessions::new(10));
        for _ in 0..4 {
            let (place, sessions) = (few.take().await.unwrap(), Arc::clone(&few));
            tokio::spawn(async move {
                sessions.is_wanted().await;
                drop(place);
            });
        }
        tokio::task::yield_now().await;

        let place = few.take().await;

        assert!(place.is_some());
        assert_eq!(few.len(), 4, "only one has ended");
    }
}
