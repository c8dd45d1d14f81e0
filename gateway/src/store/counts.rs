//! Data for the check of a new rule: the devices of every node by kind, and the unconfirmed rules of the last hour.
//!
//! Each node writes one row, every few seconds, in one statement. Ages are by the database's clock, since the nodes'
//! clocks may differ.

use std::time::Duration;

use seawall_proto::rules::Rule;
use uuid::Uuid;

use super::{
    Store,
    connection::{Sql, Value},
    error::StoreError,
    failures::Operation,
    rules::{revision, rule},
};

/// Age up to which a row is current. A node writes its row several times in this time.
const LIVE_FOR: Duration = Duration::from_secs(30);
/// Time for which a row is kept, so that a rule of an outage is compared with the fleet before it.
const KEPT_FOR: Duration = Duration::from_hours(24);
/// Time for which a change of the rules is remembered as made: longer than a node is without the database.
const RULE_WRITES_KEPT_FOR: Duration = Duration::from_hours(30 * 24);
/// Time for which an unconfirmed rule is added up with others.
const RECENT: Duration = Duration::from_hours(1);
/// Maximum number of rows read and kept: the newest.
const ROWS_MAX: i64 = 256;
/// Maximum number of registered devices that is counted. Above it, the registry index has the number.
const REGISTERED_MAX: i64 = 10_000;
/// Maximum time of [`Store::rule_check`]: half of the time to check and write a rule.
const CHECK_TIME_MAX: Duration = Duration::from_secs(1);

/// The devices of one run of a node, as it wrote them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CountedNode {
    pub node: String,
    /// The row is current: its devices are connected now.
    pub is_live: bool,
    /// Time since the row was written.
    pub age: Duration,
    pub counts: String,
}

/// Data for the check of a new rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleCheck {
    /// Revision of the rules.
    pub revision: u64,
    /// Registered devices, counted up to [`REGISTERED_MAX`].
    pub registered: u64,
    /// Unconfirmed rules, created or changed within the last hour, that this version enforces.
    pub unconfirmed: Vec<Rule>,
    /// All runs except the caller's, newest first.
    pub nodes: Vec<CountedNode>,
}

/// Index: device_counts' primary key.
const WRITE: Sql = Sql {
    sqlite: "INSERT INTO device_counts (id, node, at, counts) VALUES ($1, $2, CAST(unixepoch('subsec') * 1000 AS INTEGER), $3) \
             ON CONFLICT (id) DO UPDATE SET at = excluded.at, counts = excluded.counts",
    postgres: "INSERT INTO device_counts (id, node, at, counts) \
               VALUES ($1, $2, CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT), $3) \
               ON CONFLICT (id) DO UPDATE SET at = excluded.at, counts = excluded.counts",
};

/// Reads the table, which has few rows.
const PRUNE: Sql = Sql {
    sqlite: "DELETE FROM device_counts WHERE at < CAST(unixepoch('subsec') * 1000 AS INTEGER) - $1 \
             OR id IN (SELECT id FROM device_counts ORDER BY at DESC LIMIT 1000000 OFFSET $2)",
    postgres: "DELETE FROM device_counts WHERE at < CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) - $1 \
               OR id IN (SELECT id FROM device_counts ORDER BY at DESC LIMIT 1000000 OFFSET $2)",
};

/// Reads the tables of rules and counts, which are small, and at most [`REGISTERED_MAX`] devices. It is one statement
/// because the server may be far away. Part 0 has the unconfirmed rules and the number of devices, part 1 the nodes and
/// the ages of their rows.
const CHECK: Sql = Sql {
    sqlite: "SELECT CAST(0 AS BIGINT) AS part, m.value AS revision, r.id, r.spec, r.created_at, r.revision AS changed_at, \
             NULL AS node, NULL AS counts, \
             (SELECT count(*) FROM (SELECT 1 AS one FROM devices LIMIT $5) AS registered) AS number \
             FROM meta AS m LEFT JOIN rules AS r ON r.unconfirmed_at > CAST(unixepoch('subsec') * 1000 AS INTEGER) - $1 \
             WHERE m.key = 'rules_revision' \
             UNION ALL SELECT CAST(1 AS BIGINT), NULL, NULL, NULL, NULL, NULL, o.node, o.counts, o.age FROM \
             (SELECT node, counts, CAST(unixepoch('subsec') * 1000 AS INTEGER) - at AS age FROM device_counts \
             WHERE id <> $2 AND at > CAST(unixepoch('subsec') * 1000 AS INTEGER) - $3 ORDER BY at DESC LIMIT $4) AS o",
    postgres: "SELECT CAST(0 AS BIGINT) AS part, m.value AS revision, r.id, r.spec, r.created_at, r.revision AS changed_at, \
             NULL AS node, NULL AS counts, \
             (SELECT count(*) FROM (SELECT 1 AS one FROM devices LIMIT $5) AS registered) AS number \
             FROM meta AS m LEFT JOIN rules AS r ON r.unconfirmed_at > CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) - $1 \
             WHERE m.key = 'rules_revision' \
             UNION ALL SELECT CAST(1 AS BIGINT), NULL, NULL, NULL, NULL, NULL, o.node, o.counts, o.age FROM \
             (SELECT node, counts, CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) - at AS age FROM device_counts \
             WHERE id <> $2 AND at > CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) - $3 ORDER BY at DESC LIMIT $4) AS o",
};

/// Reads the table, which has a row for each change of the rules in the last month.
const PRUNE_RULE_WRITES: Sql = Sql {
    sqlite: "DELETE FROM rule_writes WHERE at < CAST(unixepoch('subsec') * 1000 AS INTEGER) - $1",
    postgres: "DELETE FROM rule_writes WHERE at < CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) - $1",
};

impl Store {
    /// Replaces the counts of this run of a node.
    ///
    /// # Errors
    /// The database is unavailable or full.
    #[tracing::instrument(name = "db.device_counts.write", level = "debug", skip_all)]
    pub async fn counts_write(&self, run: Uuid, node: &str, counts: &str) -> Result<(), StoreError> {
        self.bounded(Operation::Write, async {
            let mut held = self.writes().take().await?;
            let values = [Value::Uuid(run), Value::from(node), Value::from(counts)];
            held.begin().await?;
            held.run(WRITE, &values).await?;
            held.commit().await
        })
        .await
    }

    /// Deletes old rows, and those of old changes of rules.
    ///
    /// # Errors
    /// The database is unavailable.
    #[tracing::instrument(name = "db.device_counts.prune", level = "debug", skip_all)]
    pub async fn counts_prune(&self) -> Result<(), StoreError> {
        self.bounded(Operation::Write, async {
            let mut held = self.writes().take().await?;
            held.begin().await?;
            held.run(PRUNE, &[millis(KEPT_FOR), Value::from(ROWS_MAX)]).await?;
            held.run(PRUNE_RULE_WRITES, &[millis(RULE_WRITES_KEPT_FOR)]).await?;
            held.commit().await
        })
        .await
    }

    /// Returns the data for the check of a new rule, except the devices of `run`, which the caller knows.
    ///
    /// # Errors
    /// The database did not answer within 1 s.
    #[tracing::instrument(name = "db.device_counts.all", level = "debug", skip_all)]
    pub async fn rule_check(&self, run: Uuid) -> Result<RuleCheck, StoreError> {
        self.observed(Operation::Rules, CHECK_TIME_MAX, async {
            // With less time left, a statement to a server far away would be cut off, and the connection lost each
            // time.
            let mut held = self.reads().take_within(CHECK_TIME_MAX / 2).await?;
            let values = [
                millis(RECENT),
                Value::Uuid(run),
                millis(KEPT_FOR),
                Value::from(ROWS_MAX),
                Value::from(REGISTERED_MAX),
            ];
            let rows = held.all(CHECK, &values).await?;
            held.release();
            let (mut rules, mut nodes) = (Vec::new(), Vec::new());
            for row in &rows {
                let number = row.int("number")?.unwrap_or_default();
                let part = if row.int("part")? == Some(0) {
                    &mut rules
                } else {
                    &mut nodes
                };
                part.push((row, number));
            }
            nodes.sort_by_key(|(_, age)| *age);
            let mut check = RuleCheck {
                revision: revision(rules.first().map(|(row, _)| *row))?,
                registered: rules.first().map_or(0, |(_, count)| count.unsigned_abs()),
                unconfirmed: Vec::new(),
                nodes: Vec::with_capacity(nodes.len()),
            };
            // Without such rules the join has one row, of nulls.
            for (row, _) in rules.iter().filter(|(row, _)| !matches!(row.text("spec"), Ok(None))) {
                check.unconfirmed.extend(rule(row)?.ok());
            }
            for (row, age) in nodes {
                let age = Duration::from_millis(age.unsigned_abs());
                check.nodes.push(CountedNode {
                    node: row.text("node")?.unwrap_or_default(),
                    is_live: age <= LIVE_FOR,
                    age,
                    counts: row.text("counts")?.unwrap_or_default(),
                });
            }
            Ok(check)
        })
        .await
    }
}

fn millis(span: Duration) -> Value<'static> {
    Value::from(i64::try_from(span.as_millis()).unwrap_or(i64::MAX))
}
