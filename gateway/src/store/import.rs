//! Import of many devices at once: all of them, or none.
//!
//! Rows are first collected in a temporary table, so that a slow upload holds no lock on the registry.
//! [`Import::finish`] then compares and moves them in one transaction. Dropping an [`Import`] imports nothing.

use std::{collections::HashMap, sync::Arc, time::Duration};

use data_encoding::HEXLOWER;
use seawall_proto::id::{DeviceId, Label, SecretHash};
use serde_json::json;
use tokio::{sync::OwnedSemaphorePermit, time::timeout};

use super::{
    Store,
    audit::{self, Change},
    connection::{Connection, Sql, Value},
    error::StoreError,
    failures::{Failures, Operation},
    model::{Audit, DEFAULT_TENANT, to_ms},
    pool::{Held, Pool},
    revocations,
};

/// Maximum number of lines of one import, without the header. One more fails the import with [`StoreError::Invalid`].
pub const LINES_MAX: u64 = 1_000_000;
/// Maximum number of bad lines that a report names. It counts the rest.
const BAD_LINES_NAMED_MAX: usize = 100;
/// Maximum time for one batch of lines.
const PUSH_MAX: Duration = Duration::from_secs(30);
/// Maximum time to compare and move a million rows.
const FINISH_MAX: Duration = Duration::from_mins(5);

/// One line of the file, as read by the caller.
#[derive(Clone, Debug)]
pub struct ImportLine {
    /// Number in the file; the header is line 1.
    pub number: u64,
    /// The row, or what is wrong with the line. The error repeats no secret.
    pub row: Result<ImportRow, String>,
}

#[derive(Clone, Debug)]
pub struct ImportRow {
    pub id: DeviceId,
    /// The device's name, if it is not a UUID.
    pub external_id: Option<Label>,
    pub secret: SecretHash,
    /// `None`: `default` for a new device, unchanged for an updated one.
    pub tenant: Option<Label>,
    /// `None`: no model for a new device, unchanged for an updated one.
    pub model: Option<Label>,
}

/// The result of an import. With any bad line nothing was imported, and the other figures are 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImportReport {
    pub added: u64,
    /// Devices that got another credential, or a name that they did not have.
    pub updated: u64,
    /// Devices that were already as the file says.
    pub skipped: u64,
    pub bad: u64,
    /// The first 100 bad lines, by number.
    pub bad_lines: Vec<BadLine>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadLine {
    pub number: u64,
    pub reason: String,
}

/// What to do with an id that is registered with another credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnOtherCredential {
    /// Its line is bad.
    Refuse,
    /// The file's credential replaces it at once.
    Update,
}

const CREATE: Sql = Sql {
    sqlite: "CREATE TEMP TABLE import_rows (id BLOB NOT NULL PRIMARY KEY, line INTEGER NOT NULL, tenant TEXT, model TEXT, \
             secret_sha256 BLOB NOT NULL, external_id TEXT) WITHOUT ROWID",
    postgres: "CREATE TEMP TABLE import_rows (id UUID NOT NULL PRIMARY KEY, line BIGINT NOT NULL, tenant TEXT, model TEXT, \
               secret_sha256 BYTEA NOT NULL, external_id TEXT)",
};

/// Rows are one JSON array of arrays: one statement per batch, in both databases.
const COLLECT: Sql = Sql {
    sqlite: "INSERT INTO import_rows (id, line, tenant, model, secret_sha256, external_id) \
             SELECT unhex(value->>0), value->>1, value->>2, value->>3, unhex(value->>4), value->>5 \
             FROM json_each($1) WHERE true \
             ON CONFLICT (id) DO NOTHING",
    postgres: "INSERT INTO import_rows (id, line, tenant, model, secret_sha256, external_id) \
               SELECT (value->>0)::uuid, (value->>1)::bigint, value->>2, value->>3, decode(value->>4, 'hex'), value->>5 \
               FROM json_array_elements($1::json) AS item(value) ON CONFLICT (id) DO NOTHING",
};

/// Index: import_rows' primary key.
const COLLECTED: Sql = Sql {
    sqlite: "SELECT id, line, secret_sha256 FROM import_rows WHERE id IN (SELECT unhex(value) FROM json_each($1))",
    postgres: "SELECT id, line, secret_sha256 FROM import_rows WHERE id = ANY($1)",
};

/// PostgreSQL does not know a temporary table's size without it. SQLite joins by primary key anyway.
const ANALYZE: Sql = Sql {
    sqlite: "SELECT 1",
    postgres: "ANALYZE import_rows",
};

/// Index: devices' primary key. Waits for a transaction that registers the same id.
const ADD: Sql = Sql::both(
    "INSERT INTO devices (id, tenant, model, secret_sha256, state, created_at, updated_at, external_id) \
     SELECT id, COALESCE(tenant, $2), model, secret_sha256, 0, $1, $1, external_id FROM import_rows WHERE true \
     ON CONFLICT (id) DO NOTHING",
);

/// Index: devices' primary key.
const COUNT_OTHERS: Sql = Sql::both(
    "SELECT count(*) AS count FROM import_rows AS s JOIN devices AS d ON d.id = s.id \
     WHERE d.secret_sha256 <> s.secret_sha256",
);

/// Index: devices' primary key.
const FIRST_OTHERS: Sql = Sql::both(
    "SELECT s.line FROM import_rows AS s JOIN devices AS d ON d.id = s.id \
     WHERE d.secret_sha256 <> s.secret_sha256 ORDER BY s.line LIMIT $1",
);

/// Index: devices' primary key. One audit record for each device that gets another credential.
const AUDIT_OTHERS: Sql = Sql {
    sqlite: "INSERT INTO audit (at, actor, action, subject, before, after) \
             SELECT $1, $2, $3, lower(substr(hex(d.id), 1, 8) || '-' || substr(hex(d.id), 9, 4) || '-' || \
             substr(hex(d.id), 13, 4) || '-' || substr(hex(d.id), 17, 4) || '-' || substr(hex(d.id), 21)), \
             json_object('tenant', d.tenant, 'model', d.model, 'previous_secret_until_ms', d.previous_valid_until), \
             json_object('tenant', COALESCE(s.tenant, d.tenant), 'model', COALESCE(s.model, d.model), \
             'previous_secret_until_ms', NULL) \
             FROM import_rows AS s JOIN devices AS d ON d.id = s.id WHERE d.secret_sha256 <> s.secret_sha256",
    postgres: "INSERT INTO audit (at, actor, action, subject, before, after) \
               SELECT $1, $2, $3, d.id::text, \
               json_build_object('tenant', d.tenant, 'model', d.model, 'previous_secret_until_ms', d.previous_valid_until)::text, \
               json_build_object('tenant', COALESCE(s.tenant, d.tenant), 'model', COALESCE(s.model, d.model), \
               'previous_secret_until_ms', NULL)::text \
               FROM import_rows AS s JOIN devices AS d ON d.id = s.id WHERE d.secret_sha256 <> s.secret_sha256",
};

/// Index: devices' primary key.
const UPDATE_OTHERS: Sql = Sql::both(
    "UPDATE devices SET secret_sha256 = s.secret_sha256, previous_secret_sha256 = NULL, previous_valid_until = NULL, \
     tenant = COALESCE(s.tenant, devices.tenant), model = COALESCE(s.model, devices.model), \
     external_id = COALESCE(s.external_id, devices.external_id), updated_at = $1 \
     FROM import_rows AS s WHERE s.id = devices.id AND s.secret_sha256 <> devices.secret_sha256",
);

/// Index: devices' primary key. Names the devices that were registered by their UUIDs. No session or resume token
/// depends on the name.
const NAME: Sql = Sql::both(
    "UPDATE devices SET external_id = s.external_id, updated_at = $1 FROM import_rows AS s \
     WHERE s.id = devices.id AND s.secret_sha256 = devices.secret_sha256 \
     AND devices.external_id IS NULL AND s.external_id IS NOT NULL",
);

/// Keeps the devices that get another credential: their resume tokens are revoked. Index: devices' primary key.
const KEEP_OTHERS: Sql = Sql::both(
    "DELETE FROM import_rows WHERE NOT EXISTS \
     (SELECT 1 FROM devices AS d WHERE d.id = import_rows.id AND d.secret_sha256 <> import_rows.secret_sha256)",
);

/// A pooler would keep the table otherwise.
const DROP: Sql = Sql::both("DROP TABLE import_rows");

/// A running import. Push every line, then finish. Dropping it imports nothing.
#[derive(Debug)]
pub struct Import {
    /// `None` after an error: the import has failed.
    connection: Option<Held>,
    on_other_credential: OnOtherCredential,
    lines: u64,
    collected: u64,
    report: ImportReport,
    pool: Arc<Pool>,
    failures: Arc<Failures>,
    _permit: OwnedSemaphorePermit,
}

impl Store {
    /// Begins an import.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] while another import runs on this node. The database is unavailable.
    pub async fn import(&self, on_other_credential: OnOtherCredential) -> Result<Import, StoreError> {
        let permit = self
            .import_permit()
            .map_err(|_| StoreError::Conflict("another import is running".into()))?;
        let connection = self
            .bounded(Operation::Import, async {
                self.imports().check_writable().await?;
                let mut held = self.imports().take().await?;
                if held.is_pooled() {
                    // The temporary table exists in one server connection only. One transaction keeps that connection.
                    held.begin().await?;
                }
                held.control(CREATE).await?;
                Ok(held)
            })
            .await?;
        Ok(Import {
            connection: Some(connection),
            pool: Arc::clone(self.imports()),
            on_other_credential,
            lines: 0,
            collected: 0,
            report: ImportReport::default(),
            failures: Arc::clone(self.failures()),
            _permit: permit,
        })
    }
}

impl Import {
    /// Adds the next lines of the file, in order. About a thousand at a time is best, since all of them are in memory.
    ///
    /// # Errors
    /// More than [`LINES_MAX`] lines; the database is unavailable or full. The import has failed then, and nothing was
    /// imported.
    #[tracing::instrument(name = "db.import_rows.insert", level = "debug", skip_all)]
    pub async fn push(&mut self, lines: Vec<ImportLine>) -> Result<(), StoreError> {
        self.lines += lines.len() as u64;
        if self.lines > LINES_MAX {
            self.connection = None;
            return Err(StoreError::Invalid(format!(
                "more than {LINES_MAX} lines: import them in several files"
            )));
        }
        let mut rows = Vec::with_capacity(lines.len());
        for line in lines {
            match line.row {
                Ok(row) => rows.push((line.number, row)),
                Err(reason) => self.report.note_bad(line.number, reason),
            }
        }
        let mut connection = self.connection.take().ok_or_else(over)?;
        let work = collect(&mut connection, &rows);
        let collected = timeout(PUSH_MAX, work).await.unwrap_or(Err(StoreError::TimedOut));
        self.failures.observe(Operation::Import, &collected);
        let collected = collected?;
        self.connection = Some(connection);
        self.collected += collected.rows;
        self.report.skipped += collected.repeated;
        for (number, reason) in collected.bad {
            self.report.note_bad(number, reason);
        }
        Ok(())
    }

    /// Compares the lines with the registry, and imports all of them if every line is good.
    ///
    /// # Errors
    /// The database is unavailable, full, or locked for too long: nothing was imported. After [`StoreError::TimedOut`]
    /// this is not known. Then importing the same file again is safe.
    #[tracing::instrument(name = "db.devices.import", level = "debug", skip_all)]
    pub async fn finish(mut self, audit: &Audit) -> Result<ImportReport, StoreError> {
        let mut connection = self.connection.take().ok_or_else(over)?;
        let work = self.move_rows(&mut connection, audit);
        let finished = timeout(FINISH_MAX, work).await.unwrap_or(Err(StoreError::TimedOut));
        self.failures.observe(Operation::Import, &finished);
        finished?;
        Ok(self.report)
    }

    /// An early return drops the connection, and the transaction with it.
    async fn move_rows(&mut self, connection: &mut Connection, audit: &Audit) -> Result<(), StoreError> {
        let at = Value::from(to_ms(audit.at));
        connection.control(ANALYZE).await?;
        connection.begin().await?;
        // Added first: then every id of the file exists, and nobody can add one with another credential before the
        // comparison.
        if self.report.bad == 0 {
            self.report.added = connection.run(ADD, &[at, Value::from(DEFAULT_TENANT)]).await?;
        }
        let mut named = 0;
        match self.on_other_credential {
            OnOtherCredential::Refuse => self.refuse_others(connection).await?,
            OnOtherCredential::Update if self.report.bad == 0 => {
                let others = [at, Value::from(audit.actor.as_str()), Value::from(audit.action)];
                connection.run(AUDIT_OTHERS, &others).await?;
                named = connection.run(NAME, &[at]).await?;
                connection.run(KEEP_OTHERS, &[]).await?;
                self.report.updated = connection.run(UPDATE_OTHERS, &[at]).await?;
            }
            OnOtherCredential::Update => {}
        }
        if self.report.bad > 0 {
            self.report.added = 0;
            self.report.skipped = 0;
            return Ok(());
        }
        let revoked = self.report.updated;
        self.report.updated += named;
        self.report.skipped += self.collected.saturating_sub(self.report.added + self.report.updated);
        let change = Change {
            subject: "devices".into(),
            before: None,
            after: Some(json!({
                "added": self.report.added,
                "updated": self.report.updated,
                "skipped": self.report.skipped,
            })),
        };
        audit::record(connection, audit, change).await?;
        if revoked > 0 {
            revocations::revoke_imported(connection, revoked, audit.at).await?;
        }
        self.pool.check_writable().await?;
        if connection.is_pooled() {
            connection.control(DROP).await?;
        }
        connection.commit().await
    }

    async fn refuse_others(&mut self, connection: &mut Connection) -> Result<(), StoreError> {
        let count = connection.first(COUNT_OTHERS, &[]).await?;
        let count = count
            .map(|row| row.int("count"))
            .transpose()?
            .flatten()
            .unwrap_or_default();
        if count == 0 {
            return Ok(());
        }
        let limit = i64::try_from(BAD_LINES_NAMED_MAX).unwrap_or(i64::MAX);
        for row in connection.all(FIRST_OTHERS, &[Value::from(limit)]).await? {
            let number = row
                .int("line")?
                .and_then(|line| u64::try_from(line).ok())
                .unwrap_or_default();
            self.report
                .name_bad(number, "the id is registered with another credential".into());
        }
        self.report.bad += u64::try_from(count).unwrap_or_default();
        Ok(())
    }
}

impl ImportReport {
    fn note_bad(&mut self, number: u64, reason: String) {
        self.bad += 1;
        self.name_bad(number, reason);
    }

    /// Keeps the first ones by number, in whatever order they are found.
    fn name_bad(&mut self, number: u64, reason: String) {
        let place = self.bad_lines.partition_point(|line| line.number <= number);
        if place < BAD_LINES_NAMED_MAX {
            self.bad_lines.insert(place, BadLine { number, reason });
            self.bad_lines.truncate(BAD_LINES_NAMED_MAX);
        }
    }
}

#[derive(Debug, Default)]
struct Collected {
    rows: u64,
    /// Ids that the file repeats with the same credential.
    repeated: u64,
    bad: Vec<(u64, String)>,
}

async fn collect(connection: &mut Connection, rows: &[(u64, ImportRow)]) -> Result<Collected, StoreError> {
    let mut collected = Collected::default();
    if rows.is_empty() {
        return Ok(collected);
    }
    collected.rows = connection.run(COLLECT, &[Value::from(as_json(rows).as_str())]).await?;
    if collected.rows == rows.len() as u64 {
        return Ok(collected);
    }
    // Some ids are repeated: from an earlier line of the file, in this batch or before it.
    let keys: Vec<_> = rows.iter().map(|(_, row)| row.id).collect();
    let mut first = HashMap::with_capacity(keys.len());
    for row in connection.all(COLLECTED, &[Value::Keys(&keys)]).await? {
        let line = row
            .int("line")?
            .and_then(|line| u64::try_from(line).ok())
            .unwrap_or_default();
        let secret = row
            .bytes("secret_sha256")?
            .and_then(|bytes| <[u8; 32]>::try_from(&*bytes).ok());
        first.insert(row.uuid("id")?, (line, secret.map(SecretHash::from_bytes)));
    }
    for (number, row) in rows {
        match first.get(&row.id.as_uuid()) {
            Some((line, _)) if line == number => {}
            Some((_, Some(secret))) if *secret == row.secret => collected.repeated += 1,
            Some((line, _)) => {
                let reason = format!("the id is on line {line} already, with another credential");
                collected.bad.push((*number, reason));
            }
            None => {}
        }
    }
    Ok(collected)
}

fn over() -> StoreError {
    StoreError::Invalid("the import has failed: start again".into())
}

fn as_json(rows: &[(u64, ImportRow)]) -> String {
    let rows = rows.iter().map(|(number, row)| {
        json!([
            row.id.as_uuid().simple().to_string(),
            number,
            row.tenant,
            row.model,
            HEXLOWER.encode(row.secret.as_bytes()),
            row.external_id
        ])
    });
    serde_json::Value::Array(rows.collect()).to_string()
}
