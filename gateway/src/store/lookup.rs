//! The connect path's only read: devices by primary key, many in one statement.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use seawall_proto::{id::DeviceId, record::DeviceRecord};
use tokio::time::timeout;

use super::{
    Store,
    connection::{Row, Sql, Value},
    devices::device_record,
    error::StoreError,
    failures::{Failures, Operation},
    lane::Lane,
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

/// Looks devices up over connections that nothing else uses, made when they are first needed and shared with the other workers.
///
/// A worker runs one look-up at a time; more at a time need more workers. A look-up that fails on the wire or takes too
/// long closes its connection, and the next one makes a new one: that is why no failure lasts, and none leaks.
#[derive(Debug)]
pub struct LookupWorker {
    lane: Arc<Lane>,
    failures: Arc<Failures>,
}

impl Store {
    /// A worker. [`LOOKUP_CONNECTIONS_MAX`](super::LOOKUP_CONNECTIONS_MAX) of them may look up at the same time.
    #[must_use]
    pub fn lookup_worker(&self) -> LookupWorker {
        LookupWorker {
            lane: Arc::clone(self.lookups()),
            failures: Arc::clone(self.failures()),
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
        let mut is_reused = false;
        let found = match self.attempt(keys, deadline, &mut is_reused).await {
            // The server may have closed idle connections, by restarting: that is no reason to refuse anybody.
            Err(StoreError::Unavailable(_)) if is_reused => {
                self.lane.close_idle();
                self.attempt(keys, deadline, &mut is_reused).await
            }
            outcome => outcome,
        };
        self.failures.observe(Operation::Lookup, &found);
        found
    }

    async fn attempt(
        &self,
        keys: &[DeviceId],
        deadline: Instant,
        is_reused: &mut bool,
    ) -> Result<Vec<DeviceRecord>, StoreError> {
        let begun = Instant::now();
        let left = deadline.saturating_duration_since(begun);
        let work = async {
            let mut held = self.lane.take().await?;
            *is_reused = held.is_reused();
            // The server is far away, and the first statement takes nearly as many round trips as the connection did: it would be cut off,
            // and the connection lost, each time. The next look-up has it from the start.
            if !held.is_reused() && begun.elapsed() > left / 2 {
                held.give_back();
                return Err(StoreError::TimedOut);
            }
            let rows = held.all(FIND, &[Value::Keys(keys)]).await?;
            held.give_back();
            Ok(rows)
        };
        let rows = timeout(left, work).await.unwrap_or(Err(StoreError::TimedOut))?;
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
