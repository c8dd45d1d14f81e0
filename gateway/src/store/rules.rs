//! Firmware rules and their revision. They have their own connections, so that a storm of lookups never delays them.

use std::time::Duration;

pub use seawall_proto::rules::StoredRules;
use seawall_proto::{
    id::RuleId,
    rules::{Rule, RuleSpec, Unsupported},
    time::WallTime,
};
use serde_json::Value as Json;

use super::{
    RULES_TIME_MAX, RULES_WRITE_TIME_MAX, Store,
    audit::{self, Change},
    connection::{Connection, Row, Sql, Value},
    error::StoreError,
    failures::Operation,
    model::{Audit, from_ms, to_ms},
    pool::Held,
};

/// Maximum number of rules. One more is a [`StoreError::Conflict`].
pub const RULES_MAX: i64 = 10_000;
/// Maximum number of lost rules whose removal is remembered. A node that was offline for longer keeps an older one.
const RELEASED_MAX: usize = 1_000;

/// The confirmation of a rule that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consent {
    /// It is confirmed. Later rules are not added up with it.
    Given,
    /// It needs no confirmation beside the rules of this revision. Later rules are added up with it for an hour.
    Checked { revision: u64 },
    /// It refuses no other devices than before, or none at all.
    NotNeeded,
}

impl Consent {
    /// Code of the time at which the rule was unconfirmed: now, never, or as before.
    pub(super) const fn code(self) -> i64 {
        match self {
            Self::Checked { .. } => 1,
            Self::Given => 2,
            Self::NotNeeded => 3,
        }
    }

    /// Whether rules were written since the check. `next` is the revision of this write.
    pub(super) const fn is_outdated(self, next: i64) -> bool {
        match self {
            Self::Checked { revision } => next.unsigned_abs() != revision + 1,
            Self::Given | Self::NotNeeded => false,
        }
    }
}

/// Index: meta's primary key. It is polled often, and so also says whether the server accepts writes.
const REVISION: Sql = Sql {
    sqlite: "SELECT value AS revision, 'off' AS read_only FROM meta WHERE key = 'rules_revision'",
    postgres: "SELECT value AS revision, current_setting('transaction_read_only') AS read_only FROM meta \
               WHERE key = 'rules_revision'",
};

/// Reads the whole table, see [`RULES_MAX`]. One statement, so that rules and revision belong together, and because the
/// server may be far away. The released rules are in a row of their own.
const ALL: Sql = Sql::both(
    "SELECT m.value AS revision, NULL AS released, r.id, r.spec, r.created_at, r.revision AS changed_at FROM meta AS m \
     LEFT JOIN rules AS r ON 1 = 1 WHERE m.key = 'rules_revision' \
     UNION ALL SELECT NULL, value, NULL, NULL, NULL, NULL FROM meta WHERE key = 'rules_released' \
     ORDER BY created_at, id",
);

/// Index: meta's primary key. First in each transaction, so that writers of rules queue here.
const NEXT_REVISION: Sql = Sql::both(
    "UPDATE meta SET value = CAST(CAST(value AS BIGINT) + 1 AS TEXT) WHERE key = 'rules_revision' \
     RETURNING value AS revision, (SELECT count(*) FROM rules) AS count",
);

/// Index: rules' primary key.
pub(super) const FIND: Sql = Sql::both("SELECT id, spec, created_at, revision AS changed_at FROM rules WHERE id = $1");

/// Writes the audit record as well, and that the change is made, in the same round trip: the server may be far away.
pub(super) const INSERT: Sql = Sql {
    sqlite: "INSERT INTO rules (id, spec, revision, created_at, unconfirmed_at) \
             VALUES ($9, $10, $11, $1, CASE WHEN $12 = 1 THEN CAST(unixepoch('subsec') * 1000 AS INTEGER) END); \
             INSERT INTO rule_writes (id, at) VALUES ($7, $1) ON CONFLICT (id) DO NOTHING; \
             INSERT INTO audit (at, actor, action, subject, before, after, arrived_at) VALUES ($1, $2, $3, $4, $5, $6, $8)",
    postgres: "WITH made AS (INSERT INTO rules (id, spec, revision, created_at, unconfirmed_at) \
               VALUES ($9, $10, $11, $1, CASE WHEN $12 = 1 THEN CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) END)), \
               noted AS (INSERT INTO rule_writes (id, at) VALUES ($7, $1) ON CONFLICT (id) DO NOTHING) \
               INSERT INTO audit (at, actor, action, subject, before, after, arrived_at) VALUES ($1, $2, $3, $4, $5, $6, $8)",
};

/// As [`INSERT`]. Index: rules' primary key.
pub(super) const UPDATE: Sql = Sql {
    sqlite: "UPDATE rules SET spec = $10, revision = $11, unconfirmed_at = CASE WHEN $12 = 1 THEN \
             CAST(unixepoch('subsec') * 1000 AS INTEGER) WHEN $12 = 3 THEN unconfirmed_at END WHERE id = $9; \
             INSERT INTO rule_writes (id, at) VALUES ($7, $1) ON CONFLICT (id) DO NOTHING; \
             INSERT INTO audit (at, actor, action, subject, before, after, arrived_at) VALUES ($1, $2, $3, $4, $5, $6, $8)",
    postgres: "WITH changed AS (UPDATE rules SET spec = $10, revision = $11, unconfirmed_at = CASE WHEN $12 = 1 THEN \
               CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) WHEN $12 = 3 THEN unconfirmed_at END WHERE id = $9), \
               noted AS (INSERT INTO rule_writes (id, at) VALUES ($7, $1) ON CONFLICT (id) DO NOTHING) \
               INSERT INTO audit (at, actor, action, subject, before, after, arrived_at) VALUES ($1, $2, $3, $4, $5, $6, $8)",
};

/// As [`INSERT`]. Deletes the rule's staged change as well. Index: the primary keys.
pub(super) const DELETE: Sql = Sql {
    sqlite: "DELETE FROM rules WHERE id = $9; DELETE FROM rollouts WHERE id = $9; DELETE FROM rollout_counts WHERE id = $9; \
             INSERT INTO rule_writes (id, at) VALUES ($7, $1) ON CONFLICT (id) DO NOTHING; \
             INSERT INTO audit (at, actor, action, subject, before, after, arrived_at) VALUES ($1, $2, $3, $4, $5, $6, $8)",
    postgres: "WITH gone AS (DELETE FROM rules WHERE id = $9), rollout AS (DELETE FROM rollouts WHERE id = $9), \
               counts AS (DELETE FROM rollout_counts WHERE id = $9), \
               noted AS (INSERT INTO rule_writes (id, at) VALUES ($7, $1) ON CONFLICT (id) DO NOTHING) \
               INSERT INTO audit (at, actor, action, subject, before, after, arrived_at) VALUES ($1, $2, $3, $4, $5, $6, $8)",
};

/// Index: meta's primary key. Ids, separated by spaces, oldest first.
const RELEASED: Sql = Sql::both("SELECT value FROM meta WHERE key = 'rules_released'");

/// Index: meta's primary key.
const RELEASE: Sql = Sql::both(
    "INSERT INTO meta (key, value) VALUES ('rules_released', $1) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
);

/// Changes no row if the last automatic rule is too recent. Index: meta's primary key.
const NOTE_AUTOMATIC: Sql = Sql {
    sqlite: "INSERT INTO meta (key, value) VALUES ('automatic_rule_at', CAST(CAST(unixepoch('subsec') * 1000 AS INTEGER) AS TEXT)) \
             ON CONFLICT (key) DO UPDATE SET value = excluded.value \
             WHERE CAST(meta.value AS INTEGER) <= CAST(excluded.value AS INTEGER) - $1",
    postgres: "INSERT INTO meta (key, value) \
               VALUES ('automatic_rule_at', CAST(CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) AS TEXT)) \
               ON CONFLICT (key) DO UPDATE SET value = excluded.value \
               WHERE CAST(meta.value AS BIGINT) <= CAST(excluded.value AS BIGINT) - $1",
};

impl Store {
    /// Returns the revision of the rule set.
    ///
    /// # Errors
    /// The database did not answer within 2 s.
    #[tracing::instrument(name = "db.meta.find", level = "debug", skip_all)]
    pub async fn rules_revision(&self) -> Result<u64, StoreError> {
        self.polled(Operation::Rules, RULES_TIME_MAX, async |mut held: Held| {
            let row = held.first(REVISION, &[]).await?;
            held.release();
            let read_only = row.as_ref().map(|row| row.text("read_only")).transpose()?.flatten();
            self.health().set_read_only(read_only.as_deref() == Some("on"));
            revision(row.as_ref())
        })
        .await
    }

    /// Returns every rule, and their revision. A rule that this version can't enforce does not affect the others.
    ///
    /// # Errors
    /// The database did not answer within 2 s.
    #[tracing::instrument(name = "db.rules.all", level = "debug", skip_all)]
    pub async fn rules(&self) -> Result<StoredRules, StoreError> {
        self.polled(Operation::Rules, RULES_TIME_MAX, async |mut held: Held| {
            let rows = held.all(ALL, &[]).await?;
            held.release();
            let is_of_rules = |row: &Row| !matches!(row.text("revision"), Ok(None));
            let (rows, released): (Vec<Row>, Vec<Row>) = rows.into_iter().partition(is_of_rules);
            let released = rule_ids(released.first(), "released")?;
            let revision = revision(rows.first())?;
            // Without rules the join has one row, of nulls.
            let is_empty = matches!(&rows[..], [only] if matches!(only.text("spec"), Ok(None)));
            let mut stored = StoredRules {
                revision,
                rules: Vec::with_capacity(rows.len()),
                unsupported: Vec::new(),
                released,
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

    /// Adds a rule. Its revision is the new one of the rule set.
    ///
    /// # Errors
    /// [`StoreError::Conflict`]: the id is taken, or there are [`RULES_MAX`] rules. [`StoreError::Outdated`]: rules
    /// were written since it was checked. Not done within 1.7 s.
    #[tracing::instrument(name = "db.rules.insert", level = "debug", skip_all)]
    pub async fn rule_insert(
        &self,
        id: RuleId,
        spec: RuleSpec,
        consent: Consent,
        audit: &Audit,
    ) -> Result<Rule, StoreError> {
        self.observed(Operation::Rules, RULES_WRITE_TIME_MAX, async {
            let (mut held, revision) = self.begin_insert(consent).await?;
            let after = as_json(&spec)?;
            let rule = insert(&mut held, id, spec, after, revision, consent, audit).await?;
            held.commit().await?;
            Ok(rule)
        })
        .await
    }

    /// Adds a rule of the breaker that no person has asked for. It was decided on the rules of this revision. At most
    /// one is added within `interval`, by the database's clock, whatever has become of the last one.
    ///
    /// # Errors
    /// As [`Store::rule_insert`]. [`StoreError::Conflict`]: the last one was added within `interval`.
    #[tracing::instrument(name = "db.rules.insert", level = "debug", skip_all)]
    pub async fn rule_insert_automatic(
        &self,
        id: RuleId,
        spec: RuleSpec,
        revision: u64,
        interval: Duration,
        audit: &Audit,
    ) -> Result<Rule, StoreError> {
        let consent = Consent::Checked { revision };
        self.observed(Operation::Rules, RULES_WRITE_TIME_MAX, async {
            let (mut held, revision) = self.begin_insert(consent).await?;
            let interval = i64::try_from(interval.as_millis()).unwrap_or(i64::MAX);
            if held.run(NOTE_AUTOMATIC, &[Value::from(interval)]).await? != 1 {
                return conflict(held, "the cohort breaker has made another rule a short time ago").await;
            }
            let after = as_json(&spec)?;
            let rule = insert(&mut held, id, spec, after, revision, consent, audit).await?;
            held.commit().await?;
            Ok(rule)
        })
        .await
    }

    /// Opens a transaction that may add a rule. Returns the revision that it gets.
    pub(super) async fn begin_insert(&self, consent: Consent) -> Result<(Held, i64), StoreError> {
        let mut held = self.rules_connection().await?;
        let Next { revision, rules } = begin(&mut held).await?;
        if consent.is_outdated(revision) {
            held.rollback().await?;
            return Err(StoreError::Outdated);
        }
        if rules >= RULES_MAX {
            let why = format!("there are {RULES_MAX} rules already: delete some first");
            return conflict(held, &why).await;
        }
        Ok((held, revision))
    }

    /// Replaces a rule's spec, if the rule has not changed since the caller read it. `Ok(None)`: there is no such rule.
    ///
    /// # Errors
    /// [`StoreError::OtherRevision`]: the rule is no longer at `seen_revision`. [`StoreError::Conflict`]: it is not one
    /// of this version.
    /// [`StoreError::Outdated`]: rules were written since it was checked. Not done within 1.7 s.
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
            let Next { revision, .. } = begin(&mut held).await?;
            if consent.is_outdated(revision) {
                held.rollback().await?;
                return Err(StoreError::Outdated);
            }
            let Some(row) = held.first(FIND, &[Value::Uuid(id.0)]).await? else {
                held.rollback().await?;
                return Ok(None);
            };
            let Ok(before) = rule(&row)? else {
                return conflict(
                    held,
                    "this version can't read the whole rule, and would lose a part of it: change it through a node of the version that wrote it, or delete it",
                )
                .await;
            };
            if before.revision != seen_revision {
                held.rollback().await?;
                return Err(StoreError::OtherRevision(before.revision));
            }
            let record = record(audit, id, Some(as_json(&before.spec)?), Some(as_json(&spec)?));
            let text = as_text(&spec)?;
            let written = [
                Value::Uuid(id.0),
                Value::from(text.as_str()),
                Value::from(revision),
                Value::from(consent.code()),
            ];
            held.run(UPDATE, &values(&record, audit, None, &written)).await?;
            held.commit().await?;
            Ok(Some(Rule {
                spec,
                revision: revision.unsigned_abs(),
                ..before
            }))
        })
        .await
    }

    /// Deletes a rule. Returns the new revision of the rule set. `Ok(None)`: there is no such rule.
    ///
    /// # Errors
    /// Not done within 1.7 s.
    #[tracing::instrument(name = "db.rules.delete", level = "debug", skip_all)]
    pub async fn rule_delete(&self, id: RuleId, audit: &Audit) -> Result<Option<u64>, StoreError> {
        self.rule_delete_at(id, None, audit).await
    }

    /// As [`rule_delete`](Self::rule_delete), if the rule has one of these revisions. `None`: any.
    ///
    /// # Errors
    /// [`StoreError::OtherRevision`]: it has another one. Not done within 1.7 s.
    #[tracing::instrument(name = "db.rules.delete_at", level = "debug", skip_all)]
    pub async fn rule_delete_at(
        &self,
        id: RuleId,
        revisions: Option<&[u64]>,
        audit: &Audit,
    ) -> Result<Option<u64>, StoreError> {
        self.observed(Operation::Rules, RULES_WRITE_TIME_MAX, async {
            let mut held = self.rules_connection().await?;
            let Next { revision, .. } = begin(&mut held).await?;
            let Some(row) = held.first(FIND, &[Value::Uuid(id.0)]).await? else {
                held.rollback().await?;
                return Ok(None);
            };
            let (before, found) = match rule(&row)? {
                Ok(rule) => (as_json(&rule.spec)?, rule.revision),
                Err(unsupported) => (as_written(&unsupported.spec), unsupported.revision),
            };
            let mut held = check_revision(held, found, revisions).await?;
            let record = record(audit, id, Some(before), None);
            held.run(DELETE, &values(&record, audit, None, &[Value::Uuid(id.0)]))
                .await?;
            held.commit().await?;
            Ok(Some(revision.unsigned_abs()))
        })
        .await
    }

    /// Removes a rule that the database has lost, or whose row is damaged, on every node that keeps it in force.
    /// Returns the new revision of the rule set. `revisions`: see [`rule_delete_at`](Self::rule_delete_at).
    ///
    /// # Errors
    /// As [`rule_delete_at`](Self::rule_delete_at).
    #[tracing::instrument(name = "db.rules.release", level = "debug", skip_all)]
    pub async fn rule_release(&self, lost: &Rule, revisions: Option<&[u64]>, audit: &Audit) -> Result<u64, StoreError> {
        self.observed(Operation::Rules, RULES_WRITE_TIME_MAX, async {
            let mut held = self.rules_connection().await?;
            let Next { revision, .. } = begin(&mut held).await?;
            let row = held.first(FIND, &[Value::Uuid(lost.id.0)]).await?;
            let found = match row.as_ref().map(rule).transpose()? {
                Some(Ok(rule)) => rule.revision,
                Some(Err(unsupported)) => unsupported.revision,
                None => lost.revision,
            };
            let mut held = check_revision(held, found, revisions).await?;
            release(&mut held, lost.id).await?;
            let record = record(audit, lost.id, Some(as_json(&lost.spec)?), None);
            let deleted = [Value::Uuid(lost.id.0)];
            held.run(DELETE, &values(&record, audit, None, &deleted)).await?;
            held.commit().await?;
            Ok(revision.unsigned_abs())
        })
        .await
    }
}

/// Removes a rule that the database lacks on every node that keeps it in force.
pub(super) async fn release(connection: &mut Connection, id: RuleId) -> Result<(), StoreError> {
    let mut released = released(connection).await?;
    released.retain(|other| *other != id);
    released.push(id);
    let surplus = released.len().saturating_sub(RELEASED_MAX);
    let ids: Vec<String> = released[surplus..].iter().map(RuleId::to_string).collect();
    connection
        .run(RELEASE, &[Value::from(ids.join(" ").as_str())])
        .await
        .map(drop)
}

/// Why a change of a rule is not made that was decided on another form of it.
pub(super) const CHANGED: &str = "the rule was changed meanwhile: look at it again";

/// Ends the transaction unless the rule has one of the revisions that the caller names.
async fn check_revision(held: Held, found: u64, revisions: Option<&[u64]>) -> Result<Held, StoreError> {
    if revisions.is_some_and(|revisions| !revisions.contains(&found)) {
        held.rollback().await?;
        return Err(StoreError::OtherRevision(found));
    }
    Ok(held)
}

pub(super) async fn conflict<T>(held: Held, why: &str) -> Result<T, StoreError> {
    held.rollback().await?;
    Err(StoreError::Conflict(why.to_owned()))
}

/// Writes a rule and its audit record, which says `after`, into the open transaction.
pub(super) async fn insert(
    connection: &mut Connection,
    id: RuleId,
    spec: RuleSpec,
    after: Json,
    revision: i64,
    consent: Consent,
    audit: &Audit,
) -> Result<Rule, StoreError> {
    let record = record(audit, id, None, Some(after));
    let text = as_text(&spec)?;
    let written = [
        Value::Uuid(id.0),
        Value::from(text.as_str()),
        Value::from(revision),
        Value::from(consent.code()),
    ];
    connection.run(INSERT, &values(&record, audit, None, &written)).await?;
    Ok(Rule {
        id,
        spec,
        created_at: audit.at,
        revision: revision.unsigned_abs(),
    })
}

/// Arguments of [`INSERT`], [`UPDATE`] and [`DELETE`].
pub(super) fn values<'a>(
    record: &'a audit::Record<'_>,
    audit: &Audit,
    arrived_at: Option<WallTime>,
    rule: &[Value<'a>],
) -> Vec<Value<'a>> {
    let of_write = [Value::Uuid(audit.id), Value::Int(arrived_at.map(to_ms))];
    [&record.values()[..], &of_write, rule].concat()
}

async fn released(connection: &mut Connection) -> Result<Vec<RuleId>, StoreError> {
    rule_ids(connection.first(RELEASED, &[]).await?.as_ref(), "value")
}

/// The ids of rules in a text.
fn rule_ids(row: Option<&Row>, column: &'static str) -> Result<Vec<RuleId>, StoreError> {
    let ids = row
        .map(|row| row.text(column))
        .transpose()?
        .flatten()
        .unwrap_or_default();
    // An id that can't be read releases no rule.
    Ok(ids
        .split_whitespace()
        .filter_map(|id| id.parse().ok().map(RuleId))
        .collect())
}

/// The beginning of a transaction that writes rules.
pub(super) struct Next {
    /// Revision of this write.
    pub revision: i64,
    /// Number of rules before it.
    pub rules: i64,
}

pub(super) async fn begin(connection: &mut Connection) -> Result<Next, StoreError> {
    let row = connection.begin_with(NEXT_REVISION).await?;
    let revision = i64::try_from(revision(row.as_ref())?)
        .map_err(|_| corrupt("meta", "value", "rules_revision is out of range"))?;
    let rules = row.map(|row| row.int("count")).transpose()?.flatten();
    Ok(Next {
        revision,
        rules: rules.unwrap_or_default(),
    })
}

pub(super) fn record(audit: &Audit, id: RuleId, before: Option<Json>, after: Option<Json>) -> audit::Record<'_> {
    let change = Change {
        subject: id.to_string(),
        before,
        after,
    };
    audit::Record::new(audit, change)
}

/// Reads the rule of a row. The inner error is a rule that this version can't enforce.
pub(super) fn rule(row: &Row) -> Result<Result<Rule, Unsupported>, StoreError> {
    let id = RuleId(row.uuid("id")?);
    // SQLite accepts any type in any column.
    let created_at = from_ms(row.int("created_at").ok().flatten().unwrap_or_default());
    let revision = row.int("changed_at").ok().flatten().unwrap_or_default().unsigned_abs();
    let spec = row.text("spec").ok().flatten().unwrap_or_default();
    Ok(Rule::read(id, &spec, created_at, revision))
}

/// Returns a spec that this version can't read as JSON.
pub(super) fn as_written(spec: &str) -> Json {
    serde_json::from_str(spec).unwrap_or_else(|_| Json::String(spec.to_owned()))
}

/// Reads the revision, which is text like every value of `meta`.
pub(super) fn revision(row: Option<&Row>) -> Result<u64, StoreError> {
    let text = row.map(|row| row.text("revision")).transpose()?.flatten();
    text.and_then(|text| text.parse().ok())
        .ok_or_else(|| corrupt("meta", "value", "rules_revision is not a number"))
}

pub(super) fn as_text(spec: &RuleSpec) -> Result<String, StoreError> {
    as_json(spec).map(|json| json.to_string())
}

pub(super) fn as_json(spec: &RuleSpec) -> Result<Json, StoreError> {
    serde_json::to_value(spec).map_err(|error| StoreError::Invalid(format!("the rule can't be written down: {error}")))
}

fn corrupt(table: &'static str, column: &'static str, detail: &str) -> StoreError {
    StoreError::Corrupt {
        table,
        column,
        detail: detail.to_owned(),
    }
}
