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
    error::{StoreError, in_one_line},
    failures::{Failures, Operation, Trouble},
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

/// What the registry says of some keys. One that is in neither list is not registered.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The rows that could be read, in any order.
    pub records: Vec<DeviceRecord>,
    /// Devices that have a row which can't be read: nothing is known of them.
    pub unreadable: Vec<DeviceId>,
}

/// Looks devices up over connections that nothing else uses, made when they are first needed and shared with the other workers.
///
/// A worker runs one look-up at a time; more at a time need more workers. A look-up that fails on the wire or takes too
/// long closes its connection, and the next one makes a new one: that is why no failure lasts, and none leaks.
#[derive(Debug)]
pub struct LookupWorker {
    lane: Arc<Lane>,
    failures: Arc<Failures>,
}

/// What is known of the connection of an attempt.
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
            lane: Arc::clone(self.lookups()),
            failures: Arc::clone(self.failures()),
        }
    }
}

impl LookupWorker {
    /// What the registry has of `keys`. Answers within `limit`, time to connect included.
    ///
    /// # Errors
    /// [`StoreError::TimedOut`] after `limit`; [`StoreError::Unavailable`] where the database is away. No error says
    /// anything about the keys.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection. A query that runs goes on in the server until its `statement_timeout`, 1 s.
    pub async fn find(&mut self, keys: &[DeviceId], limit: Duration) -> Result<Answer, StoreError> {
        if keys.len() > KEYS_MAX {
            return Err(StoreError::Invalid(format!("more than {KEYS_MAX} keys in one look-up")));
        }
        if keys.is_empty() {
            return Ok(Answer::default());
        }
        let deadline = Instant::now() + limit;
        let mut found_idle = FoundIdle::default();
        let found = match self.attempt(keys, deadline, &mut found_idle).await {
            // The server may have closed idle connections, by restarting, or changed what their statements mean: that is no reason to
            // refuse anybody.
            Err(
                StoreError::Unavailable(_)
                | StoreError::FileFailed(_)
                | StoreError::Unusable(_)
                | StoreError::Unexpected(_),
            ) if found_idle.is_reused => {
                self.lane.close_idle();
                self.attempt(keys, deadline, &mut found_idle).await
            }
            // Something between has dropped idle connections without a word: the others are as dead as this one.
            Err(StoreError::TimedOut) if found_idle.may_be_stale => {
                self.lane.close_idle();
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
        let begun = Instant::now();
        let left = deadline.saturating_duration_since(begun);
        let work = async {
            let mut held = self.lane.take().await?;
            *found_idle = FoundIdle {
                is_reused: held.is_reused(),
                may_be_stale: held.may_be_stale(),
            };
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
        timeout(left, work).await.unwrap_or(Err(StoreError::TimedOut))
    }

    /// A row that can't be read must not take the other devices of its batch down, nor count as one that is not there. One that does not
    /// even say whose it is could be anybody's.
    fn read(&self, rows: &[Row]) -> Result<Answer, StoreError> {
        let mut answer = Answer::default();
        for row in rows {
            match device_record(row) {
                Ok(record) => answer.records.push(record),
                Err(error) => {
                    let device = DeviceId::from_uuid(row.uuid("id")?);
                    let detail = format!("the row of device {device}: {}", in_one_line(&error));
                    self.failures.note(Trouble::Unreadable, detail);
                    answer.unreadable.push(device);
                }
            }
        }
        Ok(answer)
    }
}
