//! A lane: a few connections for one purpose, so that no purpose can starve another.
//!
//! This is not a general pool. A caller takes a connection out, owns it, and gives it back only when its work went
//! well; whatever is dropped on the way (an error, a cancelled request, a deadline) is closed: at most `connections_max`
//! connections are in use, at most as many are idle. SQLite's work goes on after that until the disk has answered; how many such
//! connections there can be is bounded where they are opened.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::{
    connection::{Connection, Connector, Sql},
    error::StoreError,
};

/// Longest wait for a free connection of a lane. Then the caller gets [`StoreError::Busy`].
const TAKE_MAX: Duration = Duration::from_secs(2);
/// Longest wait for a new connection to answer.
pub(super) const CONNECT_MAX: Duration = Duration::from_secs(1);
/// A connection that was idle for longer is asked whether it is alive before it is used: the server may have restarted.
const IDLE_TRUSTED: Duration = Duration::from_secs(1);
/// Longest wait for that answer. Then the connection is closed and a new one is made.
const PING_MAX: Duration = Duration::from_millis(500);

/// In SQLite, a transaction takes the write lock at once: one that reads first could otherwise fail half way.
const BEGIN: Sql = Sql {
    sqlite: "BEGIN IMMEDIATE",
    postgres: "BEGIN",
};
const COMMIT: Sql = Sql::both("COMMIT");
const ROLLBACK: Sql = Sql::both("ROLLBACK");

#[derive(Debug)]
pub(super) struct Lane {
    connector: Connector,
    slots: Arc<Semaphore>,
    idle: Mutex<Vec<(Connection, Instant)>>,
}

impl Lane {
    pub fn new(connector: Connector, connections_max: usize) -> Arc<Self> {
        Arc::new(Self {
            connector,
            slots: Arc::new(Semaphore::new(connections_max)),
            idle: Mutex::new(Vec::with_capacity(connections_max)),
        })
    }

    /// A connection that is alive, as far as can be known.
    ///
    /// # Cancel safety
    /// A connection being tried when the future is dropped is closed.
    pub async fn take(self: &Arc<Self>) -> Result<Held, StoreError> {
        let permit = match timeout(TAKE_MAX, Arc::clone(&self.slots).acquire_owned()).await {
            Ok(Ok(permit)) => permit,
            Ok(Err(_)) | Err(_) => return Err(StoreError::Busy),
        };
        let is_passing = self.connector.is_passing();
        let connection = match self.take_idle().await {
            Some(connection) => connection,
            None => connect(&self.connector).await?,
        };
        Ok(Held {
            connection,
            is_passing,
            lane: Arc::clone(self),
            _permit: permit,
        })
    }

    async fn take_idle(&self) -> Option<Connection> {
        loop {
            let (mut connection, since) = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
            if matches!(connection, Connection::Sqlite(_)) || since.elapsed() < IDLE_TRUSTED {
                return Some(connection);
            }
            if let Ok(Ok(())) = timeout(PING_MAX, connection.ping()).await {
                return Some(connection);
            }
        }
    }
}

/// A new connection, or an error within [`CONNECT_MAX`].
pub(super) async fn connect(connector: &Connector) -> Result<Connection, StoreError> {
    match connector {
        // SQLite waits for locks itself, as long as its busy timeout says.
        Connector::Sqlite(_) => connector.connect().await,
        Connector::Postgres(_) => {
            timeout(CONNECT_MAX, connector.connect())
                .await
                .unwrap_or(Err(StoreError::Unavailable(
                    "it accepts no connection within 1 s".into(),
                )))
        }
    }
}

/// A connection out of its lane. Dropping it closes it, and with it a transaction that was not committed.
#[derive(Debug)]
pub(super) struct Held {
    connection: Connection,
    /// Closed rather than given back.
    is_passing: bool,
    lane: Arc<Lane>,
    _permit: OwnedSemaphorePermit,
}

impl Held {
    pub async fn begin(&mut self) -> Result<(), StoreError> {
        self.lane.connector.check_writable()?;
        self.connection.control(BEGIN).await
    }

    /// Commits, and gives the connection back.
    pub async fn commit(mut self) -> Result<(), StoreError> {
        self.lane.connector.check_writable()?;
        self.connection.control(COMMIT).await?;
        self.give_back();
        Ok(())
    }

    /// Undoes the transaction, and gives the connection back. For transactions that found nothing to do.
    pub async fn rollback(mut self) -> Result<(), StoreError> {
        self.connection.control(ROLLBACK).await?;
        self.give_back();
        Ok(())
    }

    /// Gives the connection back. Only with no transaction open and every answer read.
    pub fn give_back(self) {
        if self.is_passing {
            return;
        }
        let mut idle = self.lane.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push((self.connection, Instant::now()));
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
