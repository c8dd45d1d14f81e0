//! Revocations of resume tokens: every change of a device writes one in its transaction, and each node reads them by
//! revision.
//!
//! Revisions are assigned under a lock that is taken last and held until the commit. So they become visible in their
//! order, and a node that has seen one has seen all before it. They have their own connections, so that a storm of
//! lookups never delays them.

use std::time::Duration;

use seawall_proto::{
    id::DeviceId,
    resume::{AHEAD_MAX, GRACE, Generation, LIFE_MAX, REVOKED_MAX, SKEW},
    time::WallTime,
};

use super::{
    Operation, RULES_TIME_MAX, Store,
    connection::{Connection, Row, Sql, Value},
    error::StoreError,
    model::to_ms,
    pool::Held,
};

/// Time for which a revocation is kept: several hours longer than the life of any older token.
const KEPT_FOR: Duration = Duration::from_hours(8 * 24);
const _: () = assert!(KEPT_FOR.as_secs() > AHEAD_MAX.as_secs() + LIFE_MAX.as_secs() + GRACE.as_secs() + SKEW.as_secs());
const NOT_A_NUMBER: &str = "a revision of the revocations is not a number of 32 bits";

/// The revocations since a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRevocations {
    pub revision: Generation,
    /// Tokens older than this revision are not valid, of any device.
    pub floor: Generation,
    /// At most the newest [`REVOKED_MAX`]. With that many, older ones may be missing.
    pub devices: Vec<(DeviceId, Generation)>,
    /// Revision of the last import that changed more devices than are listed; zero before the first.
    pub unlisted: Generation,
}

/// Index: meta's primary key.
const REVISION: Sql = Sql::both(
    "SELECT r.value AS revision, f.value AS floor, COALESCE(u.value, '0') AS unlisted FROM meta AS r \
     JOIN meta AS f ON f.key = 'revocations_floor' LEFT JOIN meta AS u ON u.key = 'revocations_unlisted' \
     WHERE r.key = 'revocations_revision'",
);

/// Index: revocations' primary key.
const SINCE: Sql =
    Sql::both("SELECT revision AS number, device FROM revocations WHERE revision > $1 ORDER BY revision DESC LIMIT $2");

/// Index: meta's primary key. Last in each transaction, so that a change of a device only waits here for a commit.
const NEXT_REVISION: Sql = Sql::both(
    "UPDATE meta SET value = CAST(CAST(value AS BIGINT) + 1 AS TEXT) WHERE key = 'revocations_revision' \
     RETURNING value AS revision",
);

/// Index: meta's primary key. For a node that knows a later revision: the registry was restored from a backup.
const LEAP: Sql = Sql::both(
    "UPDATE meta SET value = CAST($1 AS TEXT) WHERE key = 'revocations_revision' AND CAST(value AS BIGINT) < $1",
);

/// Index: meta's primary key.
const RAISE: Sql = Sql::both(
    "UPDATE meta SET value = CAST($1 AS TEXT) WHERE key = 'revocations_floor' AND CAST(value AS BIGINT) < $1",
);

/// Index: meta's primary key.
const NOTE_UNLISTED: Sql = Sql::both(
    "INSERT INTO meta (key, value) VALUES ('revocations_unlisted', CAST($1 AS TEXT)) \
     ON CONFLICT (key) DO UPDATE SET value = excluded.value",
);

const INSERT: Sql = Sql::both("INSERT INTO revocations (revision, device, at) VALUES ($1, $2, $3)");

/// The devices of an import that got another credential; see [`super::import`].
const INSERT_IMPORTED: Sql =
    Sql::both("INSERT INTO revocations (revision, device, at) SELECT $1, id, $2 FROM import_rows");

/// The newest revocation to delete, by age or number. Reads the table, which pruning keeps small.
const PRUNED: Sql = Sql::both(
    "SELECT max(number) AS number FROM (SELECT max(revision) AS number FROM revocations WHERE at < $1 \
     UNION ALL SELECT number FROM (SELECT revision AS number FROM revocations ORDER BY revision DESC LIMIT 1 OFFSET $2) AS surplus) AS old",
);

/// Index: revocations' primary key.
const PRUNE: Sql = Sql::both("DELETE FROM revocations WHERE revision <= $1");

impl Store {
    /// Returns the revision and the revocations since `known`; no devices if the revision is the same.
    ///
    /// # Errors
    /// The database did not answer within 2 s.
    #[tracing::instrument(name = "db.revocations.since", level = "debug", skip_all)]
    pub async fn revocations_since(&self, known: Option<Generation>) -> Result<StoredRevocations, StoreError> {
        self.polled(Operation::Revocations, RULES_TIME_MAX, async |mut held: Held| {
            let row = held.first(REVISION, &[]).await?;
            let revision = generation(row.as_ref(), "revision")?;
            let floor = generation(row.as_ref(), "floor")?;
            let unlisted = generation(row.as_ref(), "unlisted")?;
            let rows = if known == Some(revision) {
                Vec::new()
            } else {
                let since = known.filter(|known| *known < revision).unwrap_or_default();
                let most = Value::from(i64::try_from(REVOKED_MAX).unwrap_or(i64::MAX));
                held.all(SINCE, &[Value::from(i64::from(since.0)), most]).await?
            };
            held.release();
            let devices = rows.iter().map(revocation).collect::<Result<Vec<_>, _>>()?;
            Ok(StoredRevocations {
                revision,
                floor,
                devices,
                unlisted,
            })
        })
        .await
    }

    /// Revokes the tokens of a device whose row was changed directly in the database.
    ///
    /// # Errors
    /// The database did not answer within 2 s.
    #[tracing::instrument(name = "db.revocations.insert", level = "debug", skip_all)]
    pub async fn revoke_tokens(&self, device: DeviceId, at: WallTime) -> Result<(), StoreError> {
        self.observed(Operation::Revocations, RULES_TIME_MAX, async {
            let mut held = self.rules_pool().take().await?;
            held.begin().await?;
            revoke(&mut held, device, at).await?;
            held.commit().await
        })
        .await
    }

    /// Revokes the tokens of all devices up to `known`, after the registry was restored from an older backup.
    ///
    /// # Errors
    /// The database did not answer within 2 s.
    #[tracing::instrument(name = "db.revocations.leap", level = "debug", skip_all)]
    pub async fn revoke_all_tokens(&self, known: Generation) -> Result<(), StoreError> {
        let next = Value::from(i64::from(known.0.saturating_add(1)));
        self.observed(Operation::Revocations, RULES_TIME_MAX, async {
            let mut held = self.rules_pool().take().await?;
            held.begin().await?;
            held.run(LEAP, &[next]).await?;
            held.run(RAISE, &[next]).await?;
            held.commit().await
        })
        .await
    }

    /// Deletes revocations that no valid token is older than, and those above [`REVOKED_MAX`]. The floor replaces them.
    ///
    /// # Errors
    /// The database did not answer within 2 s.
    #[tracing::instrument(name = "db.revocations.prune", level = "debug", skip_all)]
    pub async fn revocations_prune(&self, now: WallTime) -> Result<(), StoreError> {
        let kept_since = to_ms(now).saturating_sub(i64::try_from(KEPT_FOR.as_millis()).unwrap_or(i64::MAX));
        let most = i64::try_from(REVOKED_MAX).unwrap_or(i64::MAX);
        self.observed(Operation::Revocations, RULES_TIME_MAX, async {
            let mut held = self.rules_pool().take().await?;
            held.begin().await?;
            let oldest = held
                .first(PRUNED, &[Value::from(kept_since), Value::from(most)])
                .await?;
            let Some(through) = oldest.map(|row| row.int("number")).transpose()?.flatten() else {
                return held.rollback().await;
            };
            held.run(RAISE, &[Value::from(through)]).await?;
            held.run(PRUNE, &[Value::from(through)]).await?;
            held.commit().await
        })
        .await
    }
}

/// Revokes the tokens of a device, as the last statement of the open transaction before the commit.
pub(super) async fn revoke(connection: &mut Connection, device: DeviceId, at: WallTime) -> Result<(), StoreError> {
    let revision = next_revision(connection).await?;
    let values = [Value::from(revision), device.into(), Value::from(to_ms(at))];
    connection.run(INSERT, &values).await.map(drop)
}

/// The same for all devices left in an import's rows. For more than a node can remember, it revokes the tokens of all
/// devices.
pub(super) async fn revoke_imported(connection: &mut Connection, count: u64, at: WallTime) -> Result<(), StoreError> {
    let revision = Value::from(next_revision(connection).await?);
    if count > REVOKED_MAX as u64 {
        connection.run(RAISE, &[revision]).await?;
        return connection.run(NOTE_UNLISTED, &[revision]).await.map(drop);
    }
    let values = [revision, Value::from(to_ms(at))];
    connection.run(INSERT_IMPORTED, &values).await.map(drop)
}

async fn next_revision(connection: &mut Connection) -> Result<i64, StoreError> {
    let row = connection.first(NEXT_REVISION, &[]).await?;
    generation(row.as_ref(), "revision").map(|revision| i64::from(revision.0))
}

fn revocation(row: &Row) -> Result<(DeviceId, Generation), StoreError> {
    let number = row.int("number")?.and_then(|number| u32::try_from(number).ok());
    let revision = number
        .map(Generation)
        .ok_or_else(|| corrupt("revocations", "revision"))?;
    Ok((DeviceId::from_uuid(row.uuid("device")?), revision))
}

/// Reads a revision, which is text like every value of `meta`.
fn generation(row: Option<&Row>, column: &'static str) -> Result<Generation, StoreError> {
    let text = row.map(|row| row.text(column)).transpose()?.flatten();
    text.and_then(|text| text.parse().ok())
        .map(Generation)
        .ok_or_else(|| corrupt("meta", "value"))
}

fn corrupt(table: &'static str, column: &'static str) -> StoreError {
    StoreError::Corrupt {
        table,
        column,
        detail: NOT_A_NUMBER.to_owned(),
    }
}
