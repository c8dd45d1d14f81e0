//! The audit log: written beside each change, in its transaction; read newest first.

use seawall_proto::time::WallTime;
use serde_json::{Value as Json, json};

use super::{
    Store,
    connection::{Connection, Row, Sql, Value},
    error::StoreError,
    failures::Operation,
    model::{Audit, AuditRecord, PAGE_MAX, Page, from_ms, to_ms},
};

const INSERT: Sql =
    Sql::both("INSERT INTO audit (at, actor, action, subject, before, after) VALUES ($1, $2, $3, $4, $5, $6)");

/// Index: audit's primary key.
const PAGE: Sql = Sql::both(
    "SELECT seq, at, actor, action, subject, before, after FROM audit WHERE seq <= $1 ORDER BY seq DESC LIMIT $2",
);

/// The oldest records, as far as they are older. Index: audit's primary key.
const PRUNE: Sql =
    Sql::both("DELETE FROM audit WHERE at < $1 AND seq IN (SELECT seq FROM audit ORDER BY seq LIMIT $2)");

/// Maximum number of records that one call of [`Store::audit_prune`] deletes.
pub const AUDIT_PRUNE_MAX: u32 = 10_000;

/// What a change was, in words that hold no secret.
#[derive(Clone, Debug)]
pub struct Change {
    /// An id, or a word for what has none.
    pub subject: String,
    pub before: Option<Json>,
    pub after: Option<Json>,
}

impl Change {
    /// Of something that has no state to tell.
    #[must_use]
    pub fn of(subject: &str) -> Self {
        Self {
            subject: subject.to_owned(),
            before: None,
            after: None,
        }
    }

    /// To this; what was before goes without saying.
    #[must_use]
    pub fn to(subject: &str, after: Json) -> Self {
        Self {
            after: Some(after),
            ..Self::of(subject)
        }
    }
}

/// Into the transaction that is open on `connection`.
pub(super) async fn record(connection: &mut Connection, audit: &Audit, change: Change) -> Result<(), StoreError> {
    let before = change.before.map(|json| json.to_string());
    let after = change.after.map(|json| json.to_string());
    let values = [
        Value::from(to_ms(audit.at)),
        Value::from(audit.actor.as_str()),
        Value::from(audit.action),
        Value::from(change.subject.as_str()),
        Value::Text(before.as_deref()),
        Value::Text(after.as_deref()),
    ];
    connection.run(INSERT, &values).await.map(drop)
}

impl Store {
    /// Writes down an action that changes nothing in the database: a drain, a disconnect. It must hold no secret.
    ///
    /// # Errors
    /// The database is away or full.
    #[tracing::instrument(name = "db.audit.insert", level = "debug", skip_all)]
    pub async fn audit_append(&self, audit: &Audit, change: Change) -> Result<(), StoreError> {
        self.bounded(Operation::Write, async {
            let mut held = self.writes().take().await?;
            held.begin().await?;
            record(&mut held, audit, change).await?;
            held.commit().await
        })
        .await
    }

    /// Deletes the oldest records of before `before`, at most [`AUDIT_PRUNE_MAX`], and records that. Returns the number of deleted records.
    ///
    /// # Errors
    /// The database is away or full.
    #[tracing::instrument(name = "db.audit.prune", level = "debug", skip_all)]
    pub async fn audit_prune(&self, before: WallTime, audit: &Audit) -> Result<u64, StoreError> {
        self.bounded(Operation::Write, async {
            let mut held = self.writes().take().await?;
            held.begin().await?;
            let values = [Value::from(to_ms(before)), Value::from(i64::from(AUDIT_PRUNE_MAX))];
            let deleted = held.run(PRUNE, &values).await?;
            if deleted == 0 {
                held.rollback().await?;
                return Ok(0);
            }
            let details = json!({ "before_ms": before.as_unix_ms(), "deleted": deleted });
            record(&mut held, audit, Change::to("audit", details)).await?;
            held.commit().await?;
            Ok(deleted)
        })
        .await
    }

    /// The audit log, newest first, from `cursor` on; at most [`PAGE_MAX`] records.
    ///
    /// # Errors
    /// The database is away.
    #[tracing::instrument(name = "db.audit.page", level = "debug", skip_all)]
    pub async fn audit_page(&self, cursor: Option<i64>, limit: u32) -> Result<Page<AuditRecord, i64>, StoreError> {
        let limit = limit.clamp(1, PAGE_MAX);
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let values = [
                Value::from(cursor.unwrap_or(i64::MAX)),
                Value::from(i64::from(limit) + 1),
            ];
            let rows = held.all(PAGE, &values).await?;
            held.give_back();
            let records = rows.iter().map(from_row).collect::<Result<_, _>>()?;
            Ok(Page::from_rows(records, limit, |record: &AuditRecord| record.seq))
        })
        .await
    }
}

fn from_row(row: &Row) -> Result<AuditRecord, StoreError> {
    Ok(AuditRecord {
        seq: row.int("seq")?.unwrap_or_default(),
        at: from_ms(row.int("at")?.unwrap_or_default()),
        actor: row.text("actor")?.unwrap_or_default(),
        action: row.text("action")?.unwrap_or_default(),
        subject: row.text("subject")?.unwrap_or_default(),
        before: parsed(row.text("before")?, "before")?,
        after: parsed(row.text("after")?, "after")?,
    })
}

fn parsed(text: Option<String>, column: &'static str) -> Result<Option<Json>, StoreError> {
    text.map(|text| serde_json::from_str(&text))
        .transpose()
        .map_err(|error| StoreError::Corrupt {
            table: "audit",
            column,
            detail: error.to_string(),
        })
}
