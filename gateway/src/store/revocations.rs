//! Revocations of resume tokens: written with every change of a device, in its transaction, and read by each node by revision.
//!
//! Revisions are given out under a lock that is held until the commit, and taken last: so they become visible in their order, and
//! a node that has seen one has seen all before it. Rules' lane reads them: a storm of look-ups never delays a revocation.

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
    lane::Held,
    model::to_ms,
};

/// How long a revocation is kept: longer than any token lives that was made before it, by several hours.
const KEPT_FOR: Duration = Duration::from_hours(8 * 24);
const _: () = assert!(KEPT_FOR.as_secs() > AHEAD_MAX.as_secs() + LIFE_MAX.as_secs() + GRACE.as_secs() + SKEW.as_secs());
const NOT_A_NUMBER: &str = "a revision of the revocations is not a number of 32 bits";

/// What was revoked since a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRevocations {
    pub revision: Generation,
    /// Nobody's token of before it counts.
    pub floor: Generation,
    /// The newest [`REVOKED_MAX`] at most; with that many, older ones may be missing.
    pub devices: Vec<(DeviceId, Generation)>,
}

/// Index: meta's primary key.
const REVISION: Sql = Sql::both(
    "SELECT r.value AS revision, f.value AS floor FROM meta AS r JOIN meta AS f ON f.key = 'revocations_floor' \
     WHERE r.key = 'revocations_revision'",
);

/// Index: revocations' primary key.
const SINCE: Sql =
    Sql::both("SELECT revision AS number, device FROM revocations WHERE revision > $1 ORDER BY revision DESC LIMIT $2");

/// Index: meta's primary key. Last in each transaction: whoever changes a device waits here for a commit only.
const NEXT_REVISION: Sql = Sql::both(
    "UPDATE meta SET value = CAST(CAST(value AS BIGINT) + 1 AS TEXT) WHERE key = 'revocations_revision' \
     RETURNING value AS revision",
);

/// Index: meta's primary key. For a node that knows more than the registry, which came out of a backup then.
const LEAP: Sql = Sql::both(
    "UPDATE meta SET value = CAST($1 AS TEXT) WHERE key = 'revocations_revision' AND CAST(value AS BIGINT) < $1",
);

/// Index: meta's primary key.
const RAISE: Sql = Sql::both(
    "UPDATE meta SET value = CAST($1 AS TEXT) WHERE key = 'revocations_floor' AND CAST(value AS BIGINT) < $1",
);

const INSERT: Sql = Sql::both("INSERT INTO revocations (revision, device, at) VALUES ($1, $2, $3)");

/// Those devices of an import that got another credential; see [`super::import`].
const INSERT_IMPORTED: Sql =
    Sql::both("INSERT INTO revocations (revision, device, at) SELECT $1, id, $2 FROM import_rows");

/// The newest that is too old, or one too many. Reads the table, which pruning keeps small.
const PRUNED: Sql = Sql::both(
    "SELECT max(number) AS number FROM (SELECT max(revision) AS number FROM revocations WHERE at < $1 \
     UNION ALL SELECT number FROM (SELECT revision AS number FROM revocations ORDER BY revision DESC LIMIT 1 OFFSET $2) AS surplus) AS old",
);

/// Index: revocations' primary key.
const PRUNE: Sql = Sql::both("DELETE FROM revocations WHERE revision <= $1");

impl Store {
    /// The revision of the revocations, and what came since `known`; no devices where the revision is still that.
    ///
    /// # Errors
    /// The database did not answer within 2 s.
    #[tracing::instrument(name = "db.revocations.since", level = "debug", skip_all)]
    pub async fn revocations_since(&self, known: Option<Generation>) -> Result<StoredRevocations, StoreError> {
        self.polled(Operation::Revocations, RULES_TIME_MAX, async |mut held: Held| {
            let row = held.first(REVISION, &[]).await?;
            let revision = generation(row.as_ref(), "revision")?;
            let floor = generation(row.as_ref(), "floor")?;
            let rows = if known == Some(revision) {
                Vec::new()
            } else {
                let since = known.filter(|known| *known < revision).unwrap_or_default();
                let most = Value::from(i64::try_from(REVOKED_MAX).unwrap_or(i64::MAX));
                held.all(SINCE, &[Value::from(i64::from(since.0)), most]).await?
            };
            held.give_back();
            let devices = rows.iter().map(revocation).collect::<Result<Vec<_>, _>>()?;
            Ok(StoredRevocations {
                revision,
                floor,
                devices,
            })
        })
        .await
    }

    /// Revokes the tokens of a device whose row was changed by other hands.
    ///
    /// # Errors
    /// The database did not answer within 2 s.
    #[tracing::instrument(name = "db.revocations.insert", level = "debug", skip_all)]
    pub async fn revoke_tokens(&self, device: DeviceId, at: WallTime) -> Result<(), StoreError> {
        self.observed(Operation::Revocations, RULES_TIME_MAX, async {
            let mut held = self.rules_lane().take().await?;
            held.begin().await?;
            revoke(&mut held, device, at).await?;
            held.commit().await
        })
        .await
    }

    /// Revokes the tokens of all devices up to `known`, which the registry has no record of: it came out of a backup.
    ///
    /// # Errors
    /// The database did not answer within 2 s.
    #[tracing::instrument(name = "db.revocations.leap", level = "debug", skip_all)]
    pub async fn revoke_all_tokens(&self, known: Generation) -> Result<(), StoreError> {
        let next = Value::from(i64::from(known.0.saturating_add(1)));
        self.observed(Operation::Revocations, RULES_TIME_MAX, async {
            let mut held = self.rules_lane().take().await?;
            held.begin().await?;
            held.run(LEAP, &[next]).await?;
            held.run(RAISE, &[next]).await?;
            held.commit().await
        })
        .await
    }

    /// Drops revocations that no living token is older than, and those above [`REVOKED_MAX`]; the floor keeps what they said.
    ///
    /// # Errors
    /// The database did not answer within 2 s.
    #[tracing::instrument(name = "db.revocations.prune", level = "debug", skip_all)]
    pub async fn revocations_prune(&self, now: WallTime) -> Result<(), StoreError> {
        let kept_since = to_ms(now).saturating_sub(i64::try_from(KEPT_FOR.as_millis()).unwrap_or(i64::MAX));
        let most = i64::try_from(REVOKED_MAX).unwrap_or(i64::MAX);
        self.observed(Operation::Revocations, RULES_TIME_MAX, async {
            let mut held = self.rules_lane().take().await?;
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

/// Into the transaction that is open on `connection`, as its last statement but the commit.
pub(super) async fn revoke(connection: &mut Connection, device: DeviceId, at: WallTime) -> Result<(), StoreError> {
    let revision = next_revision(connection).await?;
    let values = [Value::from(revision), device.into(), Value::from(to_ms(at))];
    connection.run(INSERT, &values).await.map(drop)
}

/// The same for all devices left in an import's rows; for more than a node can remember, for everybody.
pub(super) async fn revoke_imported(connection: &mut Connection, count: u64, at: WallTime) -> Result<(), StoreError> {
    let revision = Value::from(next_revision(connection).await?);
    if count > REVOKED_MAX as u64 {
        return connection.run(RAISE, &[revision]).await.map(drop);
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

/// Stored as text, as every value of `meta`.
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
