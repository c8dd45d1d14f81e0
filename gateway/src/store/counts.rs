//! What the check of a new rule reads: how many devices of which kind every node has, and the rules of the last hour that nobody
//! confirmed.
//!
//! Each node writes one row, every few seconds, in one statement. Ages are by the database's clock: nodes may disagree about the time.

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

/// Time for which a row says what is connected. A node writes its row several times in it.
const LIVE_FOR: Duration = Duration::from_secs(30);
/// Time for which a row is kept, so that a rule made in an outage is compared with the fleet before it.
const KEPT_FOR: Duration = Duration::from_hours(24);
/// Time for which an unconfirmed rule is added up with others.
const RECENT: Duration = Duration::from_hours(1);
/// Maximum number of rows read and kept: the newest.
const ROWS_MAX: i64 = 256;
/// Registered devices are counted up to this number: more than that are known from the roster.
const REGISTERED_MAX: i64 = 10_000;
/// Maximum time of [`Store::rule_check`]: half of the time in which a rule is to be checked and written.
const CHECK_TIME_MAX: Duration = Duration::from_secs(1);

/// The devices of one run of a node, as it wrote them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CountedNode {
    pub node: String,
    /// Written a moment ago: its devices are connected now.
    pub is_live: bool,
    pub counts: String,
}

/// What a new rule is checked against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleCheck {
    /// Revision of the rules.
    pub revision: u64,
    /// Registered devices, counted up to [`REGISTERED_MAX`].
    pub registered: u64,
    /// Rules made or changed within the last hour that nobody confirmed, as far as this version enforces them.
    pub unconfirmed: Vec<Rule>,
    /// All runs but the caller's, newest first.
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

/// Reads the rules' table and that of the counts, which are small, and as many devices as it counts at most. One statement: the server may be
/// far away. Part 0 has the unconfirmed rules and the number of devices, part 1 the nodes and the ages of what they wrote.
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

impl Store {
    /// Writes how many devices this run of a node has, in place of what it wrote before.
    ///
    /// # Errors
    /// The database is away or full.
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

    /// Drops what nobody reads any more.
    ///
    /// # Errors
    /// The database is away.
    #[tracing::instrument(name = "db.device_counts.prune", level = "debug", skip_all)]
    pub async fn counts_prune(&self) -> Result<(), StoreError> {
        self.bounded(Operation::Write, async {
            let mut held = self.writes().take().await?;
            held.begin().await?;
            held.run(PRUNE, &[millis(KEPT_FOR), Value::from(ROWS_MAX)]).await?;
            held.commit().await
        })
        .await
    }

    /// What a new rule is checked against, but for the devices of `run`, which the caller knows better.
    ///
    /// # Errors
    /// The database did not answer within 1 s.
    #[tracing::instrument(name = "db.device_counts.all", level = "debug", skip_all)]
    pub async fn rule_check(&self, run: Uuid) -> Result<RuleCheck, StoreError> {
        self.observed(Operation::Rules, CHECK_TIME_MAX, async {
            let mut held = self.reads().take().await?;
            let values = [
                millis(RECENT),
                Value::Uuid(run),
                millis(KEPT_FOR),
                Value::from(ROWS_MAX),
                Value::from(REGISTERED_MAX),
            ];
            let rows = held.all(CHECK, &values).await?;
            held.give_back();
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
                check.nodes.push(CountedNode {
                    node: row.text("node")?.unwrap_or_default(),
                    is_live: u128::from(age.unsigned_abs()) <= LIVE_FOR.as_millis(),
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
