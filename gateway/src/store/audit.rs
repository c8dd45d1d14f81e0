//! The audit log: each change writes a record in its transaction. It is read newest first.

use seawall_proto::{id::DeviceId, time::WallTime};
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};
use uuid::Uuid;

use super::{
    Store,
    connection::{Connection, Row, Sql, Value},
    error::StoreError,
    failures::Operation,
    model::{Audit, AuditRecord, PAGE_MAX, Page, from_ms, to_ms},
    rule_journal,
};

const INSERT: Sql =
    Sql::both("INSERT INTO audit (at, actor, action, subject, before, after) VALUES ($1, $2, $3, $4, $5, $6)");

/// Index: audit's primary key.
const PAGE: Sql = Sql::both(
    "SELECT seq, at, actor, action, subject, before, after, arrived_at FROM audit WHERE seq <= $1 ORDER BY seq DESC LIMIT $2",
);

/// Deletes the oldest records that are older than a time. Index: audit's primary key.
const PRUNE: Sql =
    Sql::both("DELETE FROM audit WHERE at < $1 AND seq IN (SELECT seq FROM audit ORDER BY seq LIMIT $2)");

/// Maximum number of records that one call of [`Store::audit_prune`] deletes.
pub const AUDIT_PRUNE_MAX: u32 = 10_000;

/// A change, without any secret.
#[derive(Clone, Debug)]
pub struct Change {
    /// The changed object: its id, or a word for an object without one.
    pub subject: String,
    pub before: Option<Json>,
    pub after: Option<Json>,
}

impl Change {
    /// A change of an object without a state.
    #[must_use]
    pub fn of(subject: &str) -> Self {
        Self {
            subject: subject.to_owned(),
            before: None,
            after: None,
        }
    }

    /// A change without its previous state.
    #[must_use]
    pub fn to(subject: &str, after: Json) -> Self {
        Self {
            after: Some(after),
            ..Self::of(subject)
        }
    }
}

/// A record of a change that is not in the database itself, such as a drain. It may wait in a node's journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditEntry {
    /// The database takes a record with the same id once.
    pub id: Uuid,
    pub at: WallTime,
    pub actor: String,
    pub action: String,
    pub subject: String,
    pub before: Option<Json>,
    pub after: Option<Json>,
}

impl AuditEntry {
    #[must_use]
    pub fn new(audit: &Audit, change: Change) -> Self {
        Self {
            id: audit.id,
            at: audit.at,
            actor: audit.actor.clone(),
            action: audit.action.to_owned(),
            subject: change.subject,
            before: change.before,
            after: change.after,
        }
    }

    /// A line as [`rule_journal::note`] takes it.
    fn line(&self) -> Json {
        let text = |json: &Option<Json>| json.as_ref().map(Json::to_string);
        json!({
            "id": self.id.simple().to_string(),
            "at": to_ms(self.at),
            "actor": self.actor,
            "action": self.action,
            "subject": self.subject,
            "before": text(&self.before),
            "after": text(&self.after),
        })
    }
}

/// A record of the audit log, as a statement takes it.
#[derive(Debug)]
pub(super) struct Record<'a> {
    audit: &'a Audit,
    subject: String,
    before: Option<String>,
    after: Option<String>,
}

impl<'a> Record<'a> {
    pub fn new(audit: &'a Audit, change: Change) -> Self {
        Self {
            audit,
            subject: change.subject,
            before: change.before.map(|json| json.to_string()),
            after: change.after.map(|json| json.to_string()),
        }
    }

    /// The columns `at, actor, action, subject, before, after`.
    pub fn values(&self) -> [Value<'_>; 6] {
        [
            Value::from(to_ms(self.audit.at)),
            Value::from(self.audit.actor.as_str()),
            Value::from(self.audit.action),
            Value::from(self.subject.as_str()),
            Value::Text(self.before.as_deref()),
            Value::Text(self.after.as_deref()),
        ]
    }
}

/// Writes a record into the transaction that is open on `connection`.
pub(super) async fn record(connection: &mut Connection, audit: &Audit, change: Change) -> Result<(), StoreError> {
    let record = Record::new(audit, change);
    connection.run(INSERT, &record.values()).await.map(drop)
}

impl Store {
    /// Records an action that changes nothing in the database: a drain, a disconnect. It must not hold a secret.
    ///
    /// # Errors
    /// The database is unavailable or full.
    #[tracing::instrument(name = "db.audit.insert", level = "debug", skip_all)]
    pub async fn audit_append(&self, entry: &AuditEntry) -> Result<(), StoreError> {
        self.bounded(Operation::Write, async {
            let mut held = self.writes().take().await?;
            held.begin().await?;
            rule_journal::note(&mut held, &[entry.line()], None).await?;
            held.commit().await
        })
        .await
    }

    /// Takes records that waited in a node's journal, without those that it has already, in one transaction.
    ///
    /// # Errors
    /// The database is unavailable or full.
    #[tracing::instrument(name = "db.audit.arrive", level = "debug", skip_all)]
    pub async fn audit_arrive(&self, entries: &[AuditEntry], arrived_at: WallTime) -> Result<(), StoreError> {
        self.bounded(Operation::Write, async {
            let mut held = self.writes().take().await?;
            held.begin().await?;
            let ids: Vec<DeviceId> = entries.iter().map(|entry| DeviceId::from_uuid(entry.id)).collect();
            let made = held.all(rule_journal::MADE, &[Value::Keys(&ids)]).await?;
            let made: Vec<Uuid> = made.iter().map(|row| row.uuid("id")).collect::<Result<_, _>>()?;
            let missing = entries.iter().filter(|entry| !made.contains(&entry.id));
            let lines: Vec<Json> = missing.map(AuditEntry::line).collect();
            if lines.is_empty() {
                return held.rollback().await;
            }
            rule_journal::note(&mut held, &lines, Some(arrived_at)).await?;
            held.commit().await
        })
        .await
    }

    /// Deletes the oldest records that are older than `before`, at most [`AUDIT_PRUNE_MAX`], and records that. Returns
    /// the number of deleted records.
    ///
    /// # Errors
    /// The database is unavailable or full.
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

    /// Returns records, newest first, from `cursor` on; at most [`PAGE_MAX`]. A record that can't be read is left
    /// out.
    ///
    /// # Errors
    /// The database is unavailable.
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
            held.release();
            let items = self.readable(rows.iter().take(limit as usize), from_row);
            let next = rows.get(limit as usize).map(|row| row.int("seq")).transpose()?;
            Ok(Page {
                items,
                next_cursor: next.flatten(),
            })
        })
        .await
    }
}

fn from_row(row: &Row) -> Result<AuditRecord, StoreError> {
    Ok(AuditRecord {
        seq: row.int("seq")?.unwrap_or_default(),
        at: from_ms(row.int("at")?.unwrap_or_default()),
        arrived_at: row.int("arrived_at")?.map(from_ms),
        actor: row.text("actor")?.unwrap_or_default(),
        action: row.text("action")?.unwrap_or_default(),
        subject: row.text("subject")?.unwrap_or_default(),
        before: row.text("before")?.map(parsed),
        after: row.text("after")?.map(parsed),
    })
}

/// Text that is not JSON stays text: the rest of the record is readable.
fn parsed(text: String) -> Json {
    serde_json::from_str(&text).unwrap_or(Json::String(text))
}
