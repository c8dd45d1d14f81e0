//! Changes of rules that waited in a node's journal, and arrive late.

use seawall_proto::{
    id::{DeviceId, RuleId},
    rules::{LocalWrite, Settlement, Stored, net},
    time::WallTime,
};
use serde_json::{Value as Json, json};
use uuid::Uuid;

use super::{
    RULES_WRITE_TIME_MAX, Store,
    connection::{Connection, Sql, Value},
    error::StoreError,
    failures::Operation,
    model::{Audit, to_ms},
    rules::{self, Consent, Next, as_json, as_text, as_written, begin, record, release, values},
};

/// Index: rule_writes' primary key.
pub(super) const MADE: Sql = Sql {
    sqlite: "SELECT id FROM rule_writes WHERE id IN (SELECT unhex(value) FROM json_each($1))",
    postgres: "SELECT id FROM rule_writes WHERE id = ANY($1)",
};

/// Writes audit records alone, and that the changes are made. One statement, because the server may be far away.
const NOTE: Sql = Sql {
    sqlite: "INSERT INTO rule_writes (id, at) SELECT unhex(value ->> 'id'), value ->> 'at' FROM json_each($1) WHERE true \
             ON CONFLICT (id) DO NOTHING; \
             INSERT INTO audit (at, actor, action, subject, before, after, arrived_at) \
             SELECT value ->> 'at', value ->> 'actor', value ->> 'action', value ->> 'subject', value ->> 'before', \
             value ->> 'after', $2 FROM json_each($1)",
    postgres: "WITH lines AS (SELECT item.value AS line FROM json_array_elements($1::json) AS item(value)), \
               noted AS (INSERT INTO rule_writes (id, at) SELECT (line ->> 'id')::uuid, (line ->> 'at')::bigint FROM lines \
               ON CONFLICT (id) DO NOTHING) \
               INSERT INTO audit (at, actor, action, subject, before, after, arrived_at) \
               SELECT (line ->> 'at')::bigint, line ->> 'actor', line ->> 'action', line ->> 'subject', line ->> 'before', \
               line ->> 'after', $2::bigint FROM lines",
};

/// Result of a change that arrived late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settled {
    pub settlement: Settlement,
    /// Revision of the rule set that includes the change.
    pub revision: u64,
}

/// What this node knows about the rule of a chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// It is in force as one that the database has lost.
    pub is_lost: bool,
    /// Revision of the rules beside which the devices that it refuses were counted.
    pub checked: Option<u64>,
}

impl Store {
    /// Applies the net effect of a chain of changes, without those that were applied before, in one transaction.
    /// The audit log has the author and time of each change. A conflict with other changes is settled as
    /// [`LocalWrite::settlement`] says, and is in the audit log as well.
    ///
    /// # Errors
    /// [`StoreError::Outdated`]: rules were written since the devices were counted. Not done within 1.7 s. Calling it
    /// again makes the changes once.
    #[tracing::instrument(name = "db.rules.settle", level = "debug", skip_all)]
    pub async fn rule_settle(
        &self,
        chain: &[&LocalWrite],
        seen: Seen,
        arrived_at: WallTime,
    ) -> Result<Settled, StoreError> {
        self.observed(Operation::Rules, RULES_WRITE_TIME_MAX, async {
            let mut held = self.rules_connection().await?;
            let Next { revision, .. } = begin(&mut held).await?;
            let ids: Vec<DeviceId> = chain.iter().map(|write| DeviceId::from_uuid(write.id)).collect();
            let made = held.all(MADE, &[Value::Keys(&ids)]).await?;
            let made: Vec<Uuid> = made.iter().map(|row| row.uuid("id")).collect::<Result<_, _>>()?;
            let first = chain
                .iter()
                .rposition(|write| made.contains(&write.id))
                .map_or(0, |at| at + 1);
            let chain = &chain[first..];
            let (Some(net), Some((last, earlier))) = (net(chain), chain.split_last()) else {
                held.rollback().await?;
                return Ok(Settled {
                    settlement: Settlement::Unchanged,
                    revision: revision.unsigned_abs() - 1,
                });
            };
            let is_outdated = seen
                .checked
                .is_some_and(|checked| revision.unsigned_abs() != checked + 1);
            if is_outdated && net.needs_check() {
                held.rollback().await?;
                return Err(StoreError::Outdated);
            }
            let row = held.first(rules::FIND, &[Value::Uuid(net.rule.0)]).await?;
            let found = row.as_ref().map(rules::rule).transpose()?;
            let settlement = net.settlement(match &found {
                None if seen.is_lost => Stored::Lost,
                None => Stored::Missing,
                Some(Ok(rule)) => Stored::Rule(&rule.spec),
                Some(Err(_)) if seen.is_lost => Stored::Damaged,
                Some(Err(_)) => Stored::Unsupported,
            });
            let stored = match &found {
                None => None,
                Some(Ok(rule)) => Some(as_json(&rule.spec)?),
                Some(Err(unsupported)) => Some(as_written(&unsupported.spec)),
            };
            if !earlier.is_empty() {
                let lines = earlier
                    .iter()
                    .map(|write| Ok(line(write, action(write), seen_before(write)?, wanted(write)?)))
                    .collect::<Result<Vec<_>, StoreError>>()?;
                note(&mut held, &lines, Some(arrived_at)).await?;
            }
            // What the last author saw is a form that the database never had.
            let before = if earlier.is_empty() || settlement.is_conflict() {
                stored.or(seen_before(last)?.filter(|_| settlement == Settlement::Deleted))
            } else {
                seen_before(last)?
            };
            apply(&mut held, &net, last, settlement, before, revision, arrived_at).await?;
            held.commit().await?;
            Ok(Settled {
                settlement,
                revision: revision.unsigned_abs(),
            })
        })
        .await
    }
}

fn seen_before(write: &LocalWrite) -> Result<Option<Json>, StoreError> {
    write.before.as_ref().map(as_json).transpose()
}

fn wanted(write: &LocalWrite) -> Result<Option<Json>, StoreError> {
    write.after.as_ref().map(as_json).transpose()
}

const fn action(write: &LocalWrite) -> &'static str {
    match (&write.before, &write.after) {
        (None, _) => "rule.create",
        (Some(_), Some(_)) => "rule.update",
        (Some(_), None) => "rule.delete",
    }
}

/// A line of [`NOTE`].
fn line(write: &LocalWrite, action: &str, before: Option<Json>, after: Option<Json>) -> Json {
    json!({
        "id": write.id.simple().to_string(),
        "at": to_ms(write.at),
        "actor": write.actor,
        "action": action,
        "subject": write.rule.to_string(),
        "before": before.map(|json| json.to_string()),
        "after": after.map(|json| json.to_string()),
    })
}

/// Writes lines of [`NOTE`] into the open transaction. `arrived_at` is `None` for those that did not wait.
pub(super) async fn note(
    connection: &mut Connection,
    lines: &[Json],
    arrived_at: Option<WallTime>,
) -> Result<(), StoreError> {
    let lines = json!(lines).to_string();
    let values = [Value::from(lines.as_str()), Value::Int(arrived_at.map(to_ms))];
    connection.run(NOTE, &values).await.map(drop)
}

/// Writes what `settlement` says into the open transaction, with its audit record.
async fn apply(
    connection: &mut Connection,
    write: &LocalWrite,
    last: &LocalWrite,
    settlement: Settlement,
    before: Option<Json>,
    revision: i64,
    arrived_at: WallTime,
) -> Result<(), StoreError> {
    let wanted = wanted(last)?;
    let action = if settlement.is_conflict() {
        "rule.conflict"
    } else {
        action(last)
    };
    let audit = Audit {
        id: write.id,
        at: write.at,
        actor: write.actor.clone(),
        action,
    };
    let after = if settlement.is_conflict() {
        let outcome = settlement.as_str();
        let second = write.written(settlement).map(|(id, _)| id.to_string());
        Some(json!({ "outcome": outcome, "wanted": wanted, "rule": second }))
    } else {
        wanted
    };
    if write.written(settlement).is_none() && settlement != Settlement::Deleted {
        return note(connection, &[line(last, action, before, after)], Some(arrived_at)).await;
    }
    let record = record(&audit, write.rule, before, after);
    match (settlement, write.written(settlement)) {
        (Settlement::Updated, Some((id, spec))) => {
            let text = as_text(spec)?;
            let rule = fields(write, id, &text, revision);
            let values = values(&record, &audit, Some(arrived_at), &rule);
            connection.run(rules::UPDATE, &values).await?;
        }
        (_, Some((id, spec))) => {
            let text = as_text(spec)?;
            let rule = fields(write, id, &text, revision);
            let values = values(&record, &audit, Some(arrived_at), &rule);
            connection.run(rules::INSERT, &values).await?;
        }
        (Settlement::Deleted, None) => {
            // Nodes that keep it as lost drop it.
            release(connection, write.rule).await?;
            let rule = [Value::Uuid(write.rule.0)];
            let values = values(&record, &audit, Some(arrived_at), &rule);
            connection.run(rules::DELETE, &values).await?;
        }
        (_, None) => {}
    }
    Ok(())
}

fn fields<'a>(write: &LocalWrite, id: RuleId, text: &'a str, revision: i64) -> [Value<'a>; 4] {
    let consent = if write.is_confirmed {
        Consent::Given
    } else if !write.needs_check() {
        Consent::NotNeeded
    } else {
        // No revision is compared here: this code only says that it is unconfirmed.
        Consent::Checked { revision: 0 }
    };
    [
        Value::Uuid(id.0),
        Value::from(text),
        Value::from(revision),
        Value::from(consent.code()),
    ]
}
