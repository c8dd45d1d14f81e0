//! Firmware rules and their revision, over a connection of their own: a storm of look-ups never delays a rule.

use seawall_proto::{
    id::RuleId,
    rules::{Rule, RuleSpec, Unsupported},
};
use serde_json::Value as Json;

use super::{
    RULES_TIME_MAX, RULES_WRITE_TIME_MAX, Store,
    audit::{self, Change},
    connection::{Connection, Row, Sql, Value},
    error::StoreError,
    failures::Operation,
    lane::Held,
    model::{Audit, from_ms, to_ms},
};

/// Most rules. One more is a [`StoreError::Conflict`].
pub const RULES_MAX: i64 = 10_000;

/// Whether somebody has confirmed a rule that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consent {
    /// It is confirmed, so that later rules are not added to it.
    Given,
    /// It needs no confirmation beside the rules of this revision. Later ones are added to it for an hour.
    Checked { revision: u64 },
    /// It hits no other devices than before.
    NotNeeded,
}

impl Consent {
    /// The time at which the rule counts as unconfirmed: now, never, or as before.
    const fn code(self) -> i64 {
        match self {
            Self::Checked { .. } => 1,
            Self::Given => 2,
            Self::NotNeeded => 3,
        }
    }

    /// Whether rules were written since the check. `next` is the revision of this write.
    const fn is_outdated(self, next: i64) -> bool {
        match self {
            Self::Checked { revision } => next.unsigned_abs() != revision + 1,
            Self::Given | Self::NotNeeded => false,
        }
    }
}

/// Every rule as of one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRules {
    /// Grows with every change of any rule; 0 before the first.
    pub revision: u64,
    /// In the order in which they were made.
    pub rules: Vec<Rule>,
    /// Rules that this version can't enforce: of a later version, or changed by hand.
    pub unsupported: Vec<Unsupported>,
}

/// Index: meta's primary key. It is polled all the time, and so says too whether the server takes writes.
const REVISION: Sql = Sql {
    sqlite: "SELECT value AS revision, 'off' AS read_only FROM meta WHERE key = 'rules_revision'",
    postgres: "SELECT value AS revision, current_setting('transaction_read_only') AS read_only FROM meta \
               WHERE key = 'rules_revision'",
};

/// Reads the whole table, see [`RULES_MAX`]. One statement, so that rules and revision belong together.
const ALL: Sql = Sql::both(
    "SELECT m.value AS revision, r.id, r.spec, r.created_at, r.revision AS changed_at FROM meta AS m \
     LEFT JOIN rules AS r ON 1 = 1 WHERE m.key = 'rules_revision' ORDER BY r.created_at, r.id",
);

/// Index: meta's primary key. First in each transaction: writers of rules queue up here.
const NEXT_REVISION: Sql = Sql::both(
    "UPDATE meta SET value = CAST(CAST(value AS BIGINT) + 1 AS TEXT) WHERE key = 'rules_revision' \
     RETURNING value AS revision",
);

const COUNT: Sql = Sql::both("SELECT count(*) AS count FROM rules");

/// Index: rules' primary key.
const FIND: Sql = Sql::both("SELECT id, spec, created_at, revision AS changed_at FROM rules WHERE id = $1");

const INSERT: Sql = Sql {
    sqlite: "INSERT INTO rules (id, spec, created_at, revision, unconfirmed_at) \
             VALUES ($1, $2, $3, $4, CASE WHEN $5 = 1 THEN CAST(unixepoch('subsec') * 1000 AS INTEGER) END)",
    postgres: "INSERT INTO rules (id, spec, created_at, revision, unconfirmed_at) \
               VALUES ($1, $2, $3, $4, CASE WHEN $5 = 1 THEN CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) END)",
};

/// Index: rules' primary key.
const UPDATE: Sql = Sql {
    sqlite: "UPDATE rules SET spec = $2, revision = $3, unconfirmed_at = CASE WHEN $4 = 1 THEN \
             CAST(unixepoch('subsec') * 1000 AS INTEGER) WHEN $4 = 3 THEN unconfirmed_at END WHERE id = $1",
    postgres: "UPDATE rules SET spec = $2, revision = $3, unconfirmed_at = CASE WHEN $4 = 1 THEN \
               CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) WHEN $4 = 3 THEN unconfirmed_at END WHERE id = $1",
};

/// Index: rules' primary key.
const DELETE: Sql = Sql::both("DELETE FROM rules WHERE id = $1");

impl Store {
    /// The revision of the rule set, to be asked for often.
    ///
    /// # Errors
    /// The database did not answer within 2 s.
    #[tracing::instrument(name = "db.meta.find", level = "debug", skip_all)]
    pub async fn rules_revision(&self) -> Result<u64, StoreError> {
        self.polled(Operation::Rules, RULES_TIME_MAX, async |mut held: Held| {
            let row = held.first(REVISION, &[]).await?;
            held.give_back();
            let read_only = row.as_ref().map(|row| row.text("read_only")).transpose()?.flatten();
            self.health().set_read_only(read_only.as_deref() == Some("on"));
            revision(row.as_ref())
        })
        .await
    }

    /// Every rule, and the revision that this is. A rule that this version can't enforce stops none of the others.
    ///
    /// # Errors
    /// The database did not answer within 2 s.
    #[tracing::instrument(name = "db.rules.all", level = "debug", skip_all)]
    pub async fn rules(&self) -> Result<StoredRules, StoreError> {
        self.polled(Operation::Rules, RULES_TIME_MAX, async |mut held: Held| {
            let rows = held.all(ALL, &[]).await?;
            held.give_back();
            let revision = revision(rows.first())?;
            // Without rules the join has one row, of nulls.
            let is_empty = matches!(&rows[..], [only] if matches!(only.text("spec"), Ok(None)));
            let mut stored = StoredRules {
                revision,
                rules: Vec::with_capacity(rows.len()),
                unsupported: Vec::new(),
            };
            for row in rows.iter().filter(|_| !is_empty) {
                match rule(row)? {
                    Ok(rule) => stored.rules.push(rule),
                    Err(unsupported) => stored.unsupported.push(unsupported),
                }
            }
            Ok(stored)
        })
        .await
    }

    /// Adds a rule. Its revision is that of the rule set from now on.
    ///
    /// # Errors
    /// [`StoreError::Conflict`]: the id is taken, or there are [`RULES_MAX`] rules. [`StoreError::Outdated`]: rules were written since
    /// it was checked. Not done within 1.8 s.
    #[tracing::instrument(name = "db.rules.insert", level = "debug", skip_all)]
    pub async fn rule_insert(
        &self,
        id: RuleId,
        spec: RuleSpec,
        consent: Consent,
        audit: &Audit,
    ) -> Result<Rule, StoreError> {
        self.observed(Operation::Rules, RULES_WRITE_TIME_MAX, async {
            let mut held = self.rules_connection().await?;
            held.begin().await?;
            let revision = next_revision(&mut held).await?;
            if consent.is_outdated(revision) {
                held.rollback().await?;
                return Err(StoreError::Outdated);
            }
            let count = held.first(COUNT, &[]).await?;
            if count
                .map(|row| row.int("count"))
                .transpose()?
                .flatten()
                .unwrap_or_default()
                >= RULES_MAX
            {
                held.rollback().await?;
                return Err(StoreError::Conflict(format!(
                    "there are {RULES_MAX} rules already: delete some first"
                )));
            }
            let text = as_text(&spec)?;
            let values = [
                Value::Uuid(id.0),
                Value::from(text.as_str()),
                Value::from(to_ms(audit.at)),
                Value::from(revision),
                Value::from(consent.code()),
            ];
            held.run(INSERT, &values).await?;
            record(&mut held, audit, id, None, Some(as_json(&spec)?)).await?;
            held.commit().await?;
            Ok(Rule {
                id,
                spec,
                created_at: audit.at,
                revision: revision.unsigned_abs(),
            })
        })
        .await
    }

    /// Replaces a rule's spec, if the rule is still as the caller saw it. `Ok(None)`: there is no such rule.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] where the rule is no longer at `seen_revision`, or is not one of this version. [`StoreError::Outdated`]:
    /// rules were written since it was checked. Not done within 1.8 s.
    #[tracing::instrument(name = "db.rules.update", level = "debug", skip_all)]
    pub async fn rule_update(
        &self,
        id: RuleId,
        seen_revision: u64,
        spec: RuleSpec,
        consent: Consent,
        audit: &Audit,
    ) -> Result<Option<Rule>, StoreError> {
        self.observed(Operation::Rules, RULES_WRITE_TIME_MAX, async {
            let mut held = self.rules_connection().await?;
            held.begin().await?;
            let revision = next_revision(&mut held).await?;
            if consent.is_outdated(revision) {
                held.rollback().await?;
                return Err(StoreError::Outdated);
            }
            let Some(row) = held.first(FIND, &[Value::Uuid(id.0)]).await? else {
                held.rollback().await?;
                return Ok(None);
            };
            let Ok(before) = rule(&row)? else {
                held.rollback().await?;
                return Err(StoreError::Conflict(
                    "this version can't read the whole rule, and would lose a part of it: change it through a node of the version that wrote it, or delete it".into(),
                ));
            };
            if before.revision != seen_revision {
                held.rollback().await?;
                return Err(StoreError::Conflict(
                    "the rule was changed meanwhile: look at it again".into(),
                ));
            }
            let text = as_text(&spec)?;
            let values = [
                Value::Uuid(id.0),
                Value::from(text.as_str()),
                Value::from(revision),
                Value::from(consent.code()),
            ];
            held.run(UPDATE, &values).await?;
            record(&mut held, audit, id, Some(as_json(&before.spec)?), Some(as_json(&spec)?)).await?;
            held.commit().await?;
            Ok(Some(Rule {
                spec,
                revision: revision.unsigned_abs(),
                ..before
            }))
        })
        .await
    }

    /// Deletes a rule; the revision of the rule set from now on. `Ok(None)`: there is no such rule.
    ///
    /// # Errors
    /// Not done within 1.8 s.
    #[tracing::instrument(name = "db.rules.delete", level = "debug", skip_all)]
    pub async fn rule_delete(&self, id: RuleId, audit: &Audit) -> Result<Option<u64>, StoreError> {
        self.observed(Operation::Rules, RULES_WRITE_TIME_MAX, async {
            let mut held = self.rules_connection().await?;
            held.begin().await?;
            let revision = next_revision(&mut held).await?;
            let Some(row) = held.first(FIND, &[Value::Uuid(id.0)]).await? else {
                held.rollback().await?;
                return Ok(None);
            };
            let before = match rule(&row)? {
                Ok(rule) => as_json(&rule.spec)?,
                Err(unsupported) => as_written(&unsupported.spec),
            };
            held.run(DELETE, &[Value::Uuid(id.0)]).await?;
            record(&mut held, audit, id, Some(before), None).await?;
            held.commit().await?;
            Ok(Some(revision.unsigned_abs()))
        })
        .await
    }
}

async fn next_revision(connection: &mut Connection) -> Result<i64, StoreError> {
    let row = connection.first(NEXT_REVISION, &[]).await?;
    let revision = revision(row.as_ref())?;
    i64::try_from(revision).map_err(|_| corrupt("meta", "value", "rules_revision is out of range"))
}

async fn record(
    connection: &mut Connection,
    audit: &Audit,
    id: RuleId,
    before: Option<Json>,
    after: Option<Json>,
) -> Result<(), StoreError> {
    let change = Change {
        subject: id.to_string(),
        before,
        after,
    };
    audit::record(connection, audit, change).await
}

/// The rule of a row, as far as this version knows it. Fails where the table is not one of rules.
pub(super) fn rule(row: &Row) -> Result<Result<Rule, Unsupported>, StoreError> {
    let id = RuleId(row.uuid("id")?);
    // SQLite keeps whatever was written into a column, text or not.
    let created_at = from_ms(row.int("created_at").ok().flatten().unwrap_or_default());
    let revision = row.int("changed_at").ok().flatten().unwrap_or_default().unsigned_abs();
    let spec = row.text("spec").ok().flatten().unwrap_or_default();
    Ok(Rule::read(id, &spec, created_at, revision))
}

/// What a rule says that this version can't read.
fn as_written(spec: &str) -> Json {
    serde_json::from_str(spec).unwrap_or_else(|_| Json::String(spec.to_owned()))
}

/// Stored as text, as every value of `meta`.
pub(super) fn revision(row: Option<&Row>) -> Result<u64, StoreError> {
    let text = row.map(|row| row.text("revision")).transpose()?.flatten();
    text.and_then(|text| text.parse().ok())
        .ok_or_else(|| corrupt("meta", "value", "rules_revision is not a number"))
}

fn as_text(spec: &RuleSpec) -> Result<String, StoreError> {
    as_json(spec).map(|json| json.to_string())
}

fn as_json(spec: &RuleSpec) -> Result<Json, StoreError> {
    serde_json::to_value(spec).map_err(|error| StoreError::Invalid(format!("the rule can't be written down: {error}")))
}

fn corrupt(table: &'static str, column: &'static str, detail: &str) -> StoreError {
    StoreError::Corrupt {
        table,
        column,
        detail: detail.to_owned(),
    }
}
