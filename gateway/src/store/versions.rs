//! Firmware versions that the fleet has run, and whether they have proved themselves. Nodes write what they find; all
//! of them read it. Ages are by the database's clock.

use std::time::Duration;

use seawall_proto::{
    id::Label,
    proving::{FLEET_AGE_MIN, VersionState},
    time::WallTime,
};
use serde_json::json;

use super::{
    Store,
    audit::{self, Change},
    connection::{Connection, Row, Sql, Value},
    error::StoreError,
    failures::Operation,
    model::{Audit, from_ms, to_ms},
};

/// Maximum number of rows. Further versions are not recorded: each node tests them, and again after a restart.
const VERSIONS_MAX: i64 = 20_000;
/// Age at which the row of an unproven version is removed: of one that was only tried, or made up. 30 days.
const UNPROVEN_MAX: Duration = Duration::from_hours(30 * 24);
/// Changes of this time before the last read are read again: a transaction may end after a later one.
const OVERLAP: Duration = Duration::from_secs(30);

/// A version as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredVersion {
    pub model: Option<Label>,
    pub firmware: Option<Label>,
    pub state: VersionState,
}

/// Stored versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredVersions {
    pub versions: Vec<StoredVersion>,
    /// Whether the oldest version is younger than [`FLEET_AGE_MIN`].
    pub is_young: bool,
    pub as_of: WallTime,
}

/// Model and firmware version.
pub type VersionName<'a> = (Option<&'a str>, Option<&'a str>);

/// Adds proven versions, unless the table is full. Index: firmware_versions' primary key.
const SEED: Sql = Sql {
    sqlite: "INSERT INTO firmware_versions (model, firmware, state, first_seen_at, changed_at) \
             SELECT value->>0, value->>1, 0, CAST(unixepoch('subsec') * 1000 AS INTEGER), \
             CAST(unixepoch('subsec') * 1000 AS INTEGER) FROM json_each($1) \
             WHERE (SELECT count(*) FROM firmware_versions) < $2 ON CONFLICT (model, firmware) DO NOTHING",
    postgres: "INSERT INTO firmware_versions (model, firmware, state, first_seen_at, changed_at) \
               SELECT item.value->>0, item.value->>1, 0, CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT), \
               CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) FROM json_array_elements($1::json) AS item(value) \
               WHERE (SELECT count(*) FROM firmware_versions) < $2 ON CONFLICT (model, firmware) DO NOTHING",
};

/// Index: firmware_versions_by_changed_at.
const CHANGED: Sql = Sql::both(
    "SELECT model, firmware, state FROM firmware_versions WHERE changed_at >= $1 ORDER BY changed_at DESC LIMIT $2",
);

/// Whether any version is older than an age. Reads the table up to the first one: at most [`VERSIONS_MAX`] rows.
const AGE: Sql = Sql {
    sqlite: "SELECT CASE WHEN EXISTS (SELECT 1 FROM firmware_versions \
             WHERE first_seen_at <= CAST(unixepoch('subsec') * 1000 AS INTEGER) - $1) THEN 1 ELSE 0 END AS has_old, \
             CAST(unixepoch('subsec') * 1000 AS INTEGER) AS now",
    postgres: "SELECT CAST(CASE WHEN EXISTS (SELECT 1 FROM firmware_versions \
               WHERE first_seen_at <= CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) - $1) THEN 1 ELSE 0 END AS BIGINT) AS has_old, \
               CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) AS now",
};

/// Reads the table, at a start.
const PURGE: Sql = Sql {
    sqlite: "DELETE FROM firmware_versions WHERE state = 1 \
             AND changed_at < CAST(unixepoch('subsec') * 1000 AS INTEGER) - $1",
    postgres: "DELETE FROM firmware_versions WHERE state = 1 \
               AND changed_at < CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) - $1",
};

/// Adds a version, unless the table is full. Index: firmware_versions' primary key.
const ADD: Sql = Sql {
    sqlite: "INSERT INTO firmware_versions (model, firmware, state, first_seen_at, changed_at) \
             SELECT $1, $2, $3, CAST(unixepoch('subsec') * 1000 AS INTEGER), CAST(unixepoch('subsec') * 1000 AS INTEGER) \
             WHERE (SELECT count(*) FROM firmware_versions) < $4 ON CONFLICT (model, firmware) DO NOTHING",
    postgres: "INSERT INTO firmware_versions (model, firmware, state, first_seen_at, changed_at) \
               SELECT $1, $2, $3, CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT), \
               CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) \
               WHERE (SELECT count(*) FROM firmware_versions) < $4 ON CONFLICT (model, firmware) DO NOTHING",
};

/// Index: firmware_versions' primary key.
const SET: Sql = Sql {
    sqlite: "UPDATE firmware_versions SET state = $3, changed_at = CAST(unixepoch('subsec') * 1000 AS INTEGER) \
             WHERE model = $1 AND firmware = $2 AND state = $4",
    postgres: "UPDATE firmware_versions SET state = $3, changed_at = CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) \
               WHERE model = $1 AND firmware = $2 AND state = $4",
};

/// Index: firmware_versions' primary key.
const FIND: Sql = Sql::both("SELECT model, firmware, state FROM firmware_versions WHERE model = $1 AND firmware = $2");

impl Store {
    /// Records these versions as proven, unless they are recorded already. Returns all.
    ///
    /// # Errors
    /// The database is unavailable, slow or full.
    #[tracing::instrument(name = "db.firmware_versions.load", level = "debug", skip_all)]
    pub async fn versions_load(&self, known: &[VersionName<'_>]) -> Result<StoredVersions, StoreError> {
        let pairs: Vec<_> = known
            .iter()
            .map(|(model, firmware)| json!([model.unwrap_or_default(), firmware.unwrap_or_default()]))
            .collect();
        let pairs = serde_json::Value::from(pairs).to_string();
        self.bounded(Operation::Write, async {
            let mut held = self.writes().take().await?;
            held.begin().await?;
            held.run(PURGE, &[Value::from(millis(UNPROVEN_MAX))]).await?;
            held.run(SEED, &[Value::from(pairs.as_str()), Value::from(VERSIONS_MAX)])
                .await?;
            let versions = read(&mut held, WallTime::default()).await?;
            held.commit().await?;
            Ok(versions)
        })
        .await
    }

    /// Returns the versions that changed since `as_of`, or shortly before.
    ///
    /// # Errors
    /// The database is unavailable.
    #[tracing::instrument(name = "db.firmware_versions.changed", level = "debug", skip_all)]
    pub async fn versions_changed(&self, as_of: WallTime) -> Result<StoredVersions, StoreError> {
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let versions = read(&mut held, as_of - OVERLAP).await?;
            held.release();
            Ok(versions)
        })
        .await
    }

    /// Records a change of a version. A change from a state that it is not in has no effect. Returns its state.
    ///
    /// # Errors
    /// The database is unavailable or full.
    #[tracing::instrument(name = "db.firmware_versions.write", level = "debug", skip_all)]
    pub async fn version_write(
        &self,
        (model, firmware): VersionName<'_>,
        before: Option<VersionState>,
        after: VersionState,
    ) -> Result<VersionState, StoreError> {
        self.bounded(Operation::Write, async {
            let mut held = self.writes().take().await?;
            let name = [text(model), text(firmware)];
            held.begin().await?;
            let state = number(before.unwrap_or(after));
            held.run(ADD, &[name[0], name[1], state, Value::from(VERSIONS_MAX)])
                .await?;
            if let Some(before) = before {
                held.run(SET, &[name[0], name[1], number(after), number(before)])
                    .await?;
            }
            let row = held.first(FIND, &name).await?;
            held.commit().await?;
            row.as_ref().map_or(Ok(after), self::state)
        })
        .await
    }

    /// Makes a version proven that is not. Returns its previous state; `Ok(None)` if there is no such version, or it is
    /// proven.
    ///
    /// # Errors
    /// The database is unavailable or full.
    #[tracing::instrument(name = "db.firmware_versions.clear", level = "debug", skip_all)]
    pub async fn version_clear(
        &self,
        (model, firmware): VersionName<'_>,
        subject: &str,
        audit: &Audit,
    ) -> Result<Option<VersionState>, StoreError> {
        self.bounded(Operation::Write, async {
            let mut held = self.writes().take().await?;
            let name = [text(model), text(firmware)];
            held.begin().await?;
            let row = held.first(FIND, &name).await?;
            let before = row.as_ref().map(state).transpose()?;
            let Some(before) = before.filter(|before| *before != VersionState::Proven) else {
                held.rollback().await?;
                return Ok(None);
            };
            let after = VersionState::Proven;
            held.run(SET, &[name[0], name[1], number(after), number(before)])
                .await?;
            let change = Change {
                subject: subject.to_owned(),
                before: Some(json!({ "state": before })),
                after: Some(json!({ "state": after })),
            };
            audit::record(&mut held, audit, change).await?;
            held.commit().await?;
            Ok(Some(before))
        })
        .await
    }
}

async fn read(held: &mut Connection, since: WallTime) -> Result<StoredVersions, StoreError> {
    let row = held.first(AGE, &[Value::from(millis(FLEET_AGE_MIN))]).await?;
    let int = |column| row.as_ref().map_or(Ok(None), |row| row.int(column));
    let (has_old, now) = (int("has_old")? == Some(1), int("now")?.unwrap_or_default());
    let values = [Value::from(to_ms(since)), Value::from(VERSIONS_MAX)];
    let rows = held.all(CHANGED, &values).await?;
    Ok(StoredVersions {
        versions: rows.iter().map(version).collect::<Result<_, _>>()?,
        is_young: !has_old,
        as_of: from_ms(now),
    })
}

fn version(row: &Row) -> Result<StoredVersion, StoreError> {
    let label = |column| Ok::<_, StoreError>(Label::parse(&row.text(column)?.unwrap_or_default()).unwrap_or_default());
    Ok(StoredVersion {
        model: label("model")?,
        firmware: label("firmware")?,
        state: state(row)?,
    })
}

/// A state of a later version is one that nothing is known of.
fn state(row: &Row) -> Result<VersionState, StoreError> {
    let found = row.small("state")?;
    let at = usize::try_from(found).unwrap_or_default();
    Ok(VersionState::ALL.get(at).copied().unwrap_or(VersionState::Unproven))
}

fn number(state: VersionState) -> Value<'static> {
    Value::Small(Some(state as i16))
}

fn millis(age: Duration) -> i64 {
    i64::try_from(age.as_millis()).unwrap_or(i64::MAX)
}

fn text(text: Option<&str>) -> Value<'_> {
    Value::from(text.unwrap_or_default())
}
