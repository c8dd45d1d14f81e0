//! The connect path's only read: devices by primary key, many in one statement.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use seawall_proto::{id::DeviceId, record::DeviceRecord};
use tokio::time::timeout;

use super::{
    Store,
    connection::{Connection, Connector, Row, Sql, Value},
    devices::device_record,
    error::StoreError,
    failures::{Failures, Operation},
};

/// Most keys in one look-up. More is [`StoreError::Invalid`].
pub const KEYS_MAX: usize = 256;

/// The statement's text, in a form that the plan guard can put its own words in front of.
macro_rules! find {
    (sqlite) => {
        "SELECT id, tenant, model, secret_sha256, previous_secret_sha256, previous_valid_until, state \
         FROM devices WHERE id IN (SELECT unhex(value) FROM json_each($1))"
    };
    (postgres) => {
        "SELECT id, tenant, model, secret_sha256, previous_secret_sha256, previous_valid_until, state \
         FROM devices WHERE id = ANY($1)"
    };
}
pub(super) use find;

/// Index: devices' primary key.
const FIND: Sql = Sql {
    sqlite: find!(sqlite),
    postgres: find!(postgres),
};

/// Looks devices up over one connection of its own, made when it is first needed.
///
/// A worker runs one look-up at a time; more at a time need more workers. A look-up that fails on the wire or takes too
/// long closes the connection, and the next one makes a new one: that is why no failure lasts, and none leaks.
#[derive(Debug)]
pub struct LookupWorker {
    connector: Arc<Connector>,
    failures: Arc<Failures>,
    connection: Option<Connection>,
}

impl Store {
    /// A worker with a connection of its own, not counted among the others.
    #[must_use]
    pub fn lookup_worker(&self) -> LookupWorker {
        LookupWorker {
            connector: Arc::clone(self.lookups()),
            failures: Arc::clone(self.failures()),
            connection: None,
        }
    }
}

impl LookupWorker {
    /// The records of `keys` that are registered, in any order; a key that is missing from the answer is not registered.
    /// Answers within `limit`, time to connect included.
    ///
    /// # Errors
    /// [`StoreError::TimedOut`] after `limit`; [`StoreError::Unavailable`] where the database is away. Neither says
    /// anything about the keys.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection. A query that runs goes on in the server until its `statement_timeout`, 1 s.
    pub async fn find(&mut self, keys: &[DeviceId], limit: Duration) -> Result<Vec<DeviceRecord>, StoreError> {
        if keys.len() > KEYS_MAX {
            return Err(StoreError::Invalid(format!("more than {KEYS_MAX} keys in one look-up")));
        }
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let deadline = Instant::now() + limit;
        let was_reused = self.connection.is_some();
        let found = match self.attempt(keys, deadline).await {
            // The server may have closed an idle connection, by restarting: that is no reason to refuse anybody.
            Err(StoreError::Unavailable(_)) if was_reused => self.attempt(keys, deadline).await,
            outcome => outcome,
        };
        self.failures.observe(Operation::Lookup, &found);
        found
    }

    async fn attempt(&mut self, keys: &[DeviceId], deadline: Instant) -> Result<Vec<DeviceRecord>, StoreError> {
        // Taken out while it works: whatever ends this future early drops it, and thereby closes it.
        let idle = self.connection.take();
        let left = deadline.saturating_duration_since(Instant::now());
        let work = async {
            let mut connection = match idle {
                Some(connection) => connection,
                None => self.connector.connect().await?,
            };
            let rows = connection.all(FIND, &[Value::Keys(keys)]).await?;
            Ok((connection, rows))
        };
        let (connection, rows) = timeout(left, work).await.unwrap_or(Err(StoreError::TimedOut))?;
        self.connection = Some(connection);
        Ok(rows.iter().filter_map(understood).collect())
    }
}

/// A row that can't be understood must not take the other devices of its batch down. The schema's checks keep such rows out;
/// one that is there all the same is a device that nobody can verify.
fn understood(row: &Row) -> Option<DeviceRecord> {
    match device_record(row) {
        Ok(record) => Some(record),
        Err(error) => {
            let id = row.uuid("id").unwrap_or_default();
            tracing::error!(device.id = %id, %error, "registry row can't be read, its device counts as unknown");
            None
        }
    }
}
