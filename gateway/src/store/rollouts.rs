//! Staged changes of rules. A step is written together with its rule and its audit record, over the connections of
//! rules. Each write names the revision of the row that it was decided on: of two that decide at a time, one does
//! nothing.

use seawall_proto::{
    id::RuleId,
    rollout::{Counts, Rollout, State, Totals},
    rules::{Rule, RuleSpec},
    time::WallTime,
};
use serde_json::{Value as Json, json};
use uuid::Uuid;

use super::{
    RULES_TIME_MAX, RULES_WRITE_TIME_MAX, Store,
    audit::{self, Change},
    connection::{Connection, Row, Sql, Value},
    error::StoreError,
    failures::Operation,
    model::{Audit, from_ms},
    rules::{CHANGED, Consent, FIND, Next, as_json, as_text, begin, conflict, insert, rule},
};

/// Maximum number of rollouts that run or are paused. One more is a [`StoreError::Conflict`].
pub const ROLLOUTS_OPEN_MAX: i64 = 20;
/// Time for which a rollout that is over is listed after its last step, in milliseconds: halted ones until something is
/// done about them.
const LISTED_MS: i64 = 60_000;
/// Maximum number of rollouts that are listed: the ones stepped last.
const LISTED_MAX: i64 = 200;

/// A rollout as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredRollout {
    /// The rule that it changes.
    pub rule: RuleId,
    /// Revision of the row.
    pub revision: u64,
    pub rollout: Rollout,
    /// Revision of the rule.
    pub rule_revision: u64,
    /// Counts of all nodes in its window; with [`Store::rollout`] only.
    pub totals: Totals,
    /// The database's time.
    pub now: WallTime,
}

/// A rollout that takes a step.
#[derive(Clone, Debug)]
pub struct RolloutWrite {
    pub rule: RuleId,
    /// Revision of the row that it was decided on; `None` where there was none.
    pub seen: Option<u64>,
    /// Revision of the rule that it was decided on.
    pub rule_revision: u64,
    pub rollout: Rollout,
}

/// Index: the primary keys. The rows of one rule are one for each run of a node.
const FIND_ROLLOUT: Sql = Sql {
    sqlite: "SELECT o.id, o.revision, o.rollout, r.revision AS changed_at, c.counts, \
             CAST(unixepoch('subsec') * 1000 AS INTEGER) AS now FROM rollouts AS o JOIN rules AS r ON r.id = o.id \
             LEFT JOIN rollout_counts AS c ON c.id = o.id AND c.window_number = o.window_number WHERE o.id = $1",
    postgres: "SELECT o.id, o.revision, o.rollout, r.revision AS changed_at, c.counts, \
               CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) AS now FROM rollouts AS o \
               JOIN rules AS r ON r.id = o.id \
               LEFT JOIN rollout_counts AS c ON c.id = o.id AND c.window_number = o.window_number WHERE o.id = $1",
};

/// Reads the table, which has a row for each rule that was ever changed in stages.
const LIST: Sql = Sql {
    sqlite: "SELECT o.id, o.revision, o.rollout, r.revision AS changed_at, NULL AS counts, \
             CAST(unixepoch('subsec') * 1000 AS INTEGER) AS now FROM rollouts AS o JOIN rules AS r ON r.id = o.id \
             WHERE o.phase <> 0 OR o.stepped_at > CAST(unixepoch('subsec') * 1000 AS INTEGER) - $1 \
             ORDER BY o.phase DESC, o.stepped_at DESC LIMIT $2",
    postgres: "SELECT o.id, o.revision, o.rollout, r.revision AS changed_at, NULL AS counts, \
               CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) AS now FROM rollouts AS o \
               JOIN rules AS r ON r.id = o.id \
               WHERE o.phase <> 0 OR o.stepped_at > CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) - $1 \
               ORDER BY o.phase DESC, o.stepped_at DESC LIMIT $2",
};

const NOW: Sql = Sql {
    sqlite: "SELECT CAST(unixepoch('subsec') * 1000 AS INTEGER) AS now, \
             (SELECT count(*) FROM rollouts WHERE phase = 1) AS open",
    postgres: "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) AS now, \
               (SELECT count(*) FROM rollouts WHERE phase = 1) AS open",
};

/// Index: rollouts' primary key.
const NOTE: Sql =
    Sql::both("UPDATE rollouts SET rollout = $3, revision = revision + 1 WHERE id = $1 AND revision = $2");

/// Index: rollouts' primary key.
const STEP: Sql = Sql::both(
    "UPDATE rollouts SET rollout = $3, revision = revision + 1, stepped_at = $4, phase = $5, window_number = $6 \
     WHERE id = $1 AND revision = $2",
);

/// Index: rollouts' primary key.
const ADD: Sql = Sql::both(
    "INSERT INTO rollouts (id, revision, rollout, stepped_at, phase, window_number) VALUES ($1, $2, $3, $4, $5, $6) \
     ON CONFLICT (id) DO NOTHING",
);

/// Index: rules' primary key.
const SET_SPEC: Sql = Sql::both("UPDATE rules SET spec = $2, revision = $3 WHERE id = $1");

/// Index: rollout_counts' primary key.
const DROP_COUNTS: Sql = Sql::both("DELETE FROM rollout_counts WHERE id = $1 AND window_number <> $2");

/// Index: the primary keys. Counts of a rule that is gone are not written.
const COUNT: Sql = Sql::both(
    "INSERT INTO rollout_counts (id, run, window_number, counts) \
     SELECT id, $2, $3, $4 FROM rollouts WHERE id = $1 AND window_number = $3 \
     ON CONFLICT (id, run) DO UPDATE SET window_number = excluded.window_number, counts = excluded.counts",
);

impl Store {
    /// Returns the rollouts that run, are paused or halted, and those that ended within the last minute.
    ///
    /// # Errors
    /// The database did not answer within 2 s.
    #[tracing::instrument(name = "db.rollouts.all", level = "debug", skip_all)]
    pub async fn rollouts(&self) -> Result<Vec<StoredRollout>, StoreError> {
        self.observed(Operation::Read, RULES_TIME_MAX, async {
            let mut held = self.reads().take().await?;
            let rows = held
                .all(LIST, &[Value::from(LISTED_MS), Value::from(LISTED_MAX)])
                .await?;
            held.release();
            // A rollout that a later version has written must not hide the others.
            Ok(rows.iter().filter_map(|row| read(row).ok()).collect())
        })
        .await
    }

    /// Returns the rollout of a rule, with what all nodes have counted. `Ok(None)`: there is none.
    ///
    /// # Errors
    /// The database did not answer within 2 s. A later version has written the rollout.
    #[tracing::instrument(name = "db.rollouts.find", level = "debug", skip_all)]
    pub async fn rollout(&self, rule: RuleId) -> Result<Option<StoredRollout>, StoreError> {
        self.observed(Operation::Read, RULES_TIME_MAX, async {
            let mut held = self.reads().take().await?;
            let rows = held.all(FIND_ROLLOUT, &[Value::Uuid(rule.0)]).await?;
            held.release();
            let Some(first) = rows.first() else { return Ok(None) };
            let mut stored = read(first)?;
            for row in &rows {
                let counts = row.text("counts")?;
                let counts: Option<Totals> = counts.and_then(|text| serde_json::from_str(&text).ok());
                stored.totals = stored.totals.plus(&counts.unwrap_or_default());
            }
            if rows.len() > 1 {
                // A device that one node misses may be back on another one.
                stored.totals.returns = Counts::default();
            }
            Ok(Some(stored))
        })
        .await
    }

    /// Replaces what this run of a node has counted for a rule in a window. Counts of a window that is over are left
    /// out.
    ///
    /// # Errors
    /// The database is unavailable or full.
    #[tracing::instrument(name = "db.rollout_counts.write", level = "debug", skip_all)]
    pub async fn rollout_count(&self, rule: RuleId, run: Uuid, window: u64, totals: &Totals) -> Result<(), StoreError> {
        self.bounded(Operation::Write, async {
            let mut held = self.writes().take().await?;
            let text = in_json(totals)?;
            let window = Value::from(i64::try_from(window).unwrap_or(i64::MAX));
            held.begin().await?;
            held.run(
                COUNT,
                &[
                    Value::Uuid(rule.0),
                    Value::Uuid(run),
                    window,
                    Value::from(text.as_str()),
                ],
            )
            .await?;
            held.commit().await
        })
        .await
    }

    /// Stores the evidence of a rollout that takes no step. Returns `false` if another node has written it since.
    ///
    /// # Errors
    /// The database is unavailable or full.
    #[tracing::instrument(name = "db.rollouts.update", level = "debug", skip_all)]
    pub async fn rollout_note(&self, stored: &StoredRollout) -> Result<bool, StoreError> {
        self.bounded(Operation::Write, async {
            let mut held = self.writes().take().await?;
            let text = in_json(&stored.rollout)?;
            let seen = Value::from(i64::try_from(stored.revision).unwrap_or(i64::MAX));
            held.begin().await?;
            let written = held
                .run(NOTE, &[Value::Uuid(stored.rule.0), seen, Value::from(text.as_str())])
                .await?;
            held.commit().await?;
            Ok(written == 1)
        })
        .await
    }

    /// Returns the database's time.
    ///
    /// # Errors
    /// The database did not answer within 2 s.
    #[tracing::instrument(name = "db.now", level = "debug", skip_all)]
    pub async fn now(&self) -> Result<WallTime, StoreError> {
        self.observed(Operation::Read, RULES_TIME_MAX, async {
            let mut held = self.reads().take().await?;
            let row = held.first(NOW, &[]).await?;
            held.release();
            Ok(from_ms(
                row.map(|row| row.int("now")).transpose()?.flatten().unwrap_or_default(),
            ))
        })
        .await
    }

    /// Stores a step, with the rule's share and the audit record. Returns the rule; `Ok(None)` if it does not exist.
    ///
    /// # Errors
    /// [`StoreError::Conflict`]: the rollout or the rule was changed meanwhile, or too many rollouts are open. Not done
    /// within 1.7 s.
    #[tracing::instrument(name = "db.rollouts.step", level = "debug", skip_all)]
    pub async fn rollout_step(&self, mut write: RolloutWrite, audit: &Audit) -> Result<Option<Rule>, StoreError> {
        self.observed(Operation::Rules, RULES_WRITE_TIME_MAX, async {
            let mut held = self.rules_connection().await?;
            let Next { revision, .. } = begin(&mut held).await?;
            let Some(row) = held.first(FIND, &[Value::Uuid(write.rule.0)]).await? else {
                held.rollback().await?;
                return Ok(None);
            };
            let Ok(before) = rule(&row)? else {
                return conflict(
                    held,
                    "this version can't read the whole rule: use a node of the version that wrote it",
                )
                .await;
            };
            if before.revision != write.rule_revision {
                return conflict(held, CHANGED).await;
            }
            let admit_percent = write.rollout.admit_percent();
            let changed = before.spec.admit_percent != admit_percent;
            let after = Rule {
                spec: RuleSpec {
                    admit_percent,
                    ..before.spec.clone()
                },
                revision: if changed {
                    revision.unsigned_abs()
                } else {
                    before.revision
                },
                ..before.clone()
            };
            if changed {
                let text = as_text(&after.spec)?;
                let values = [
                    Value::Uuid(write.rule.0),
                    Value::from(text.as_str()),
                    Value::from(revision),
                ];
                held.run(SET_SPEC, &values).await?;
            }
            write.rollout.set_rule_revision(after.revision);
            let is_new = write.seen.is_none();
            if !put(&mut held, &write).await? {
                let why = if is_new {
                    OTHERS
                } else {
                    "the rollout was changed meanwhile: look at it again"
                };
                return conflict(held, why).await;
            }
            let change = Change {
                subject: write.rule.to_string(),
                before: Some(json!({ "admit_percent": before.spec.admit_percent })),
                after: Some(summary(&write.rollout)),
            };
            audit::record(&mut held, audit, change).await?;
            held.commit().await?;
            Ok(Some(after))
        })
        .await
    }

    /// Adds a rule together with its rollout, which says the rule's share.
    ///
    /// # Errors
    /// As [`Store::rule_insert`] and [`Store::rollout_step`].
    #[tracing::instrument(name = "db.rules.insert", level = "debug", skip_all)]
    pub async fn rule_insert_staged(
        &self,
        id: RuleId,
        spec: RuleSpec,
        mut rollout: Rollout,
        consent: Consent,
        audit: &Audit,
    ) -> Result<Rule, StoreError> {
        self.observed(Operation::Rules, RULES_WRITE_TIME_MAX, async {
            let (mut held, revision) = self.begin_insert(consent).await?;
            rollout.set_rule_revision(revision.unsigned_abs());
            let spec = RuleSpec {
                admit_percent: rollout.admit_percent(),
                ..spec
            };
            let mut after = as_json(&spec)?;
            after["rollout"] = summary(&rollout);
            let rule = insert(&mut held, id, spec, after, revision, consent, audit).await?;
            let write = RolloutWrite {
                rule: id,
                seen: None,
                rule_revision: rule.revision,
                rollout,
            };
            if !put(&mut held, &write).await? {
                return conflict(held, OTHERS).await;
            }
            held.commit().await?;
            Ok(rule)
        })
        .await
    }
}

/// Why a new rollout is not taken.
const OTHERS: &str = "this rule has a rollout already, or 20 others run or are paused: end one first";

/// Writes the row, unless it has changed or too many others are open.
async fn put(held: &mut Connection, write: &RolloutWrite) -> Result<bool, StoreError> {
    let text = in_json(&write.rollout)?;
    let now = held.first(NOW, &[]).await?;
    let at = |column| now.as_ref().map(|row| row.int(column)).transpose();
    let (now, open) = (at("now")?.flatten(), at("open")?.flatten());
    // Read under the lock on the rules' revision, as every step is.
    if write.seen.is_none() && open.unwrap_or_default() >= ROLLOUTS_OPEN_MAX {
        return Ok(false);
    }
    let phase = match write.rollout.state() {
        State::Running | State::Paused => 1,
        // Listed, without blocking others.
        State::Halted => 2,
        State::Done | State::Reverted => 0,
    };
    let window = i64::try_from(write.rollout.window()).unwrap_or(i64::MAX);
    let seen = write.seen.map_or(1, |seen| i64::try_from(seen).unwrap_or(i64::MAX));
    let values = [
        Value::Uuid(write.rule.0),
        Value::from(seen),
        Value::from(text.as_str()),
        Value::from(now.unwrap_or_default()),
        Value::Small(Some(phase)),
        Value::from(window),
    ];
    let sql = if write.seen.is_some() { STEP } else { ADD };
    if held.run(sql, &values).await? != 1 {
        return Ok(false);
    }
    held.run(DROP_COUNTS, &[Value::Uuid(write.rule.0), Value::from(window)])
        .await?;
    Ok(true)
}

/// The record of a step in the audit log.
fn summary(rollout: &Rollout) -> Json {
    json!({
        "admit_percent": rollout.admit_percent(),
        "direction": rollout.direction(),
        "state": rollout.state(),
        "stage": rollout.stage(),
        "percent": rollout.percent(),
        "verdict": rollout.steps().last().map(|step| step.verdict),
    })
}

fn read(row: &Row) -> Result<StoredRollout, StoreError> {
    let text = row.text("rollout")?.unwrap_or_default();
    let rollout = serde_json::from_str(&text).map_err(|error| StoreError::Corrupt {
        table: "rollouts",
        column: "rollout",
        detail: format!("{error}; a later version may have written it"),
    })?;
    let number = |column| Ok::<_, StoreError>(row.int(column)?.unwrap_or_default());
    Ok(StoredRollout {
        rule: RuleId(row.uuid("id")?),
        revision: number("revision")?.unsigned_abs(),
        rollout,
        rule_revision: number("changed_at")?.unsigned_abs(),
        totals: Totals::default(),
        now: from_ms(number("now")?),
    })
}

fn in_json(value: &impl serde::Serialize) -> Result<String, StoreError> {
    serde_json::to_string(value)
        .map_err(|error| StoreError::Invalid(format!("the rollout can't be written down: {error}")))
}
