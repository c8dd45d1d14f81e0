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
    pool::Pool,
};

/// Maximum number of keys in one lookup. More is [`StoreError::Invalid`].
pub const KEYS_MAX: usize = 256;

/// The statement's text. The plan guard prefixes it.
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

/// The registry's answer for some keys. A key in neither list is not registered.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The rows that could be read, in any order.
    pub records: Vec<DeviceRecord>,
    /// Devices whose rows can't be read: nothing is known about them.
    pub unreadable: Vec<DeviceId>,
}

/// Looks devices up over connections that are used for nothing else. They are opened on demand, and shared by the
/// workers.
///
/// A worker runs one lookup at a time. A lookup that fails on the wire or takes too long closes its connection, and the
/// next one opens another. So no failure lasts.
#[derive(Debug)]
pub struct LookupWorker {
    pool: Arc<Pool>,
    failures: Arc<Failures>,
}

/// The connection of an attempt.
#[derive(Default)]
struct FoundIdle {
    is_reused: bool,
    may_be_stale: bool,
}

impl Store {
    /// A worker. [`LOOKUP_CONNECTIONS_MAX`](super::LOOKUP_CONNECTIONS_MAX) of them may look up at the same time.
    #[must_use]
    pub fn lookup_worker(&self) -> LookupWorker {
        LookupWorker {
            pool: Arc::clone(self.lookups()),
            failures: Arc::clone(self.failures()),
        }
    }
}

impl LookupWorker {
    /// Returns the registry's answer for `keys` within `limit`, including the time to connect.
    ///
    /// # Errors
    /// [`StoreError::TimedOut`] after `limit`; [`StoreError::Unavailable`] if the database is unavailable. No error
    /// says anything about the keys.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection. A running query continues in the server until its
    /// `statement_timeout`, 1 s.
    pub async fn find(&mut self, keys: &[DeviceId], limit: Duration) -> Result<Answer, StoreError> {
        if keys.len() > KEYS_MAX {
            return Err(StoreError::Invalid(format!("more than {KEYS_MAX} keys in one lookup")));
        }
        if keys.is_empty() {
            return Ok(Answer::default());
        }
        let deadline = Instant::now() + limit;
        let mut found_idle = FoundIdle::default();
        let found = match self.attempt(keys, deadline, &mut found_idle).await {
            // The server may have restarted, or changed what the statements mean. This must not refuse a device.
            Err(
                StoreError::Unavailable(_)
                | StoreError::FileFailed(_)
                | StoreError::Unusable(_)
                | StoreError::Unexpected(_),
            ) if found_idle.is_reused => {
                self.pool.close_idle();
                self.attempt(keys, deadline, &mut found_idle).await
            }
            // A firewall has silently dropped idle connections: the others are as dead as this one.
            Err(StoreError::TimedOut) if found_idle.may_be_stale => {
                self.pool.close_idle();
                Err(StoreError::TimedOut)
            }
            outcome => outcome,
        };
        let answer = found.and_then(|rows| self.read(&rows));
        self.failures.observe(Operation::Lookup, &answer);
        answer
    }

    async fn attempt(
        &self,
        keys: &[DeviceId],
        deadline: Instant,
        found_idle: &mut FoundIdle,
    ) -> Result<Vec<Row>, StoreError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let work = async {
            // The first statement takes nearly as many round trips as the connection did.
            let mut held = self.pool.take_within(left / 2).await?;
            *found_idle = FoundIdle {
                is_reused: held.is_reused(),
                may_be_stale: held.may_be_stale(),
            };
            let rows = held.all(FIND, &[Value::Keys(keys)]).await?;
            held.release();
            Ok(rows)
        };
        timeout(left, work).await.unwrap_or(Err(StoreError::TimedOut))
    }

    /// An unreadable row must not affect the other devices of its batch, nor be taken for a missing one. A row whose id
    /// is unreadable could belong to any of them.
    fn read(&self, rows: &[Row]) -> Result<Answer, StoreError> {
        let mut answer = Answer::default();
        for row in rows {
            match device_record(row) {
                Ok(record) => answer.records.push(record),
                Err(error) => {
                    let device = DeviceId::from_uuid(row.uuid("id")?);
                    self.failures.note_unreadable(row, &error);
                    answer.unreadable.push(device);
                }
            }
        }
        Ok(answer)
    }
}
