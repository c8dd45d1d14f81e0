//! The plan guard: checks the query plans of the connect path's statements, before a storm shows a bad one.
//!
//! For PostgreSQL the check uses a connection with the settings of lookups, so that it sees the plan that runs. In a
//! good plan, every table is read through an index whose first column the statement names. With `enable_seqscan = off`,
//! a missing primary key could otherwise hide behind a full read of another index.

use std::{collections::BTreeSet, time::Duration};

use serde_json::Value as Json;
use sqlx::{PgConnection, Row as _, SqliteConnection};
use tokio::time::timeout;

use super::{Store, connection::Connection, error::StoreError, failures::Operation, lookup::find};

/// Maximum size, in bytes, of a PostgreSQL table that may be read as a whole: about a thousand devices.
const SMALL_TABLE_BYTES: i64 = 128 * 1024;
/// Number of rows from which an SQLite table may not be read as a whole.
const SMALL_TABLE_ROWS: i64 = 1_000;
/// Maximum time of a check, including the time to connect. Then it has no result.
const CHECK_MAX: Duration = Duration::from_secs(5);

/// The result of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlanReport {
    /// Every statement of the connect path uses an index, or reads a small table.
    Indexed,
    /// A statement does not. The text names the table and how it is read.
    Alarm(String),
}

impl PlanReport {
    #[must_use]
    pub const fn is_alarm(&self) -> bool {
        matches!(self, Self::Alarm(_))
    }
}

const PREPARE: &str = concat!("PREPARE seawall_plan (uuid[]) AS ", find!(postgres));

/// Numbers of keys to check: a plan may depend on them.
const EXPLAIN: [&str; 3] = [
    "EXPLAIN (FORMAT JSON) EXECUTE seawall_plan (string_to_array(\
     repeat('00000000-0000-4000-8000-000000000000,', 0) || '00000000-0000-4000-8000-000000000000', ',')::uuid[])",
    "EXPLAIN (FORMAT JSON) EXECUTE seawall_plan (string_to_array(\
     repeat('00000000-0000-4000-8000-000000000000,', 63) || '00000000-0000-4000-8000-000000000000', ',')::uuid[])",
    "EXPLAIN (FORMAT JSON) EXECUTE seawall_plan (string_to_array(\
     repeat('00000000-0000-4000-8000-000000000000,', 255) || '00000000-0000-4000-8000-000000000000', ',')::uuid[])",
];

/// Relations by name, with an index's first column. The size is that of the table.
const RELATIONS: &str = "SELECT c.relname::text AS name, pg_get_indexdef(c.oid, 1, true) AS first_column, \
     pg_relation_size(coalesce(x.indrelid, c.oid))::bigint AS size \
     FROM pg_class c LEFT JOIN pg_index x ON x.indexrelid = c.oid WHERE c.relname = ANY($1)";

const EXPLAIN_SQLITE: &str = concat!("EXPLAIN QUERY PLAN ", find!(sqlite));
const COUNT_SQLITE: &str = "SELECT count(*) FROM (SELECT 1 FROM devices LIMIT $1)";

impl Store {
    /// Reads the plans of the connect path, over a separate connection.
    ///
    /// # Errors
    /// The database is unavailable, or took longer than 5 s.
    #[tracing::instrument(name = "db.devices.explain", level = "debug", skip_all)]
    pub async fn plan_check(&self) -> Result<PlanReport, StoreError> {
        let check = async {
            // Dropped at the end, which closes it.
            let mut held = self.plans().take().await?;
            if held.is_pooled() {
                // Behind a pooler, a prepared statement may be missing in the next transaction.
                held.begin().await?;
            }
            let report = match &mut *held {
                Connection::Sqlite(connection) => check_sqlite(connection).await?,
                Connection::Postgres(postgres) => check_postgres(&mut postgres.connection).await?,
            };
            if held.is_pooled() {
                Connection::commit(&mut held).await?;
            }
            Ok(report)
        };
        let checked = timeout(CHECK_MAX, check).await.unwrap_or(Err(StoreError::TimedOut));
        self.failures().observe(Operation::Plan, &checked);
        checked
    }
}

async fn check_postgres(connection: &mut PgConnection) -> Result<PlanReport, StoreError> {
    sqlx::raw_sql(PREPARE).execute(&mut *connection).await?;
    let report = report_postgres(connection).await?;
    // A pooler may reuse the server's connection.
    sqlx::raw_sql("DEALLOCATE seawall_plan")
        .execute(&mut *connection)
        .await?;
    Ok(report)
}

async fn report_postgres(connection: &mut PgConnection) -> Result<PlanReport, StoreError> {
    for explain in EXPLAIN {
        let row = sqlx::raw_sql(explain).fetch_one(&mut *connection).await?;
        let scans = scans(&row.try_get::<Json, _>(0)?);
        let names: BTreeSet<_> = scans.iter().map(|scan| scan.relation.clone()).collect();
        let names = names.into_iter().collect::<Vec<_>>();
        let rows = sqlx::query(RELATIONS)
            .persistent(false)
            .bind(names)
            .fetch_all(&mut *connection)
            .await?;
        let relations = rows.iter().map(|row| {
            Ok(Relation {
                name: row.try_get("name")?,
                first_column: row.try_get("first_column")?,
                size: row.try_get("size")?,
            })
        });
        let relations = relations.collect::<Result<Vec<_>, sqlx::Error>>()?;
        if let Some(alarm) = scans.iter().find_map(|scan| full_read(scan, &relations)) {
            return Ok(PlanReport::Alarm(alarm));
        }
    }
    Ok(PlanReport::Indexed)
}

/// A node of a plan that reads a table or an index.
#[derive(Debug, PartialEq, Eq)]
struct Scan {
    node: String,
    /// The table of a sequential scan, the index of an index scan.
    relation: String,
    /// The condition on an index.
    condition: Option<String>,
}

#[derive(Debug)]
struct Relation {
    name: String,
    /// Of an index.
    first_column: Option<String>,
    size: i64,
}

/// Returns every such node of a plan.
fn scans(plan: &Json) -> Vec<Scan> {
    let mut found = Vec::new();
    let mut open = vec![plan];
    while let Some(json) = open.pop() {
        match json {
            Json::Array(items) => open.extend(items),
            Json::Object(node) => {
                let text = |key: &str| node.get(key).and_then(Json::as_str).map(str::to_owned);
                let kind = text("Node Type").unwrap_or_default();
                let relation = match kind.as_str() {
                    "Seq Scan" | "Sample Scan" => text("Relation Name"),
                    "Index Scan" | "Index Only Scan" | "Bitmap Index Scan" => text("Index Name"),
                    // The other nodes read their output.
                    _ => None,
                };
                if let Some(relation) = relation {
                    found.push(Scan {
                        node: kind,
                        relation,
                        condition: text("Index Cond"),
                    });
                }
                open.extend(node.values());
            }
            Json::Null | Json::Bool(_) | Json::Number(_) | Json::String(_) => {}
        }
    }
    found
}

/// Returns what is wrong with a scan, if anything.
fn full_read(scan: &Scan, relations: &[Relation]) -> Option<String> {
    let mut named = relations
        .iter()
        .filter(|relation| relation.name == scan.relation)
        .peekable();
    if named.peek().is_some() && named.clone().all(|relation| relation.size < SMALL_TABLE_BYTES) {
        return None;
    }
    let condition = scan.condition.as_deref().unwrap_or_default();
    let is_asked_by_first_column = named.any(|relation| {
        relation.first_column.as_deref().is_some_and(|column| {
            let mut words = condition.split(|c: char| !c.is_alphanumeric() && c != '_');
            !column.is_empty() && words.any(|word| word == column.trim_matches('"'))
        })
    });
    if is_asked_by_first_column {
        return None;
    }
    Some(format!(
        "looking devices up reads all of {} ({}): restore the primary key of devices, or make an index on its id",
        scan.relation,
        scan.node.to_lowercase()
    ))
}

async fn check_sqlite(connection: &mut SqliteConnection) -> Result<PlanReport, StoreError> {
    let rows = sqlx::query(EXPLAIN_SQLITE)
        .bind("[]")
        .fetch_all(&mut *connection)
        .await?;
    for row in rows {
        let step: String = row.try_get("detail")?;
        if !is_full_read_sqlite(&step) {
            continue;
        }
        let rows = sqlx::query(COUNT_SQLITE)
            .bind(SMALL_TABLE_ROWS)
            .fetch_one(&mut *connection)
            .await?;
        if rows.try_get::<i64, _>(0)? >= SMALL_TABLE_ROWS {
            return Ok(PlanReport::Alarm(format!(
                "looking devices up reads all of a table ({step}): restore the primary key of devices"
            )));
        }
    }
    Ok(PlanReport::Indexed)
}

/// An automatic index is built for one statement, by a full read of the table.
fn is_full_read_sqlite(step: &str) -> bool {
    (step.starts_with("SCAN ") && !step.starts_with("SCAN json_each")) || step.contains(" AUTOMATIC ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn verdict(plan: &Json, size: i64) -> Option<String> {
        let relation = |name: &str, first_column: Option<&str>| Relation {
            name: name.into(),
            first_column: first_column.map(str::to_owned),
            size,
        };
        let relations = [
            relation("devices", None),
            relation("devices_pkey", Some("id")),
            relation("devices_by_tenant", Some("tenant")),
        ];
        scans(plan).iter().find_map(|scan| full_read(scan, &relations))
    }

    #[test]
    fn sequential_scan_of_a_big_table_is_an_alarm_however_deep() {
        let scan = json!({"Node Type": "Seq Scan", "Relation Name": "devices"});
        let plan = json!([{"Plan": {"Node Type": "Limit", "Plans": [{"Node Type": "Append", "Plans": [scan]}]}}]);

        assert!(verdict(&plan, 1 << 30).unwrap().contains("devices (seq scan)"));
        assert_eq!(verdict(&plan, 8_192), None);
    }

    #[test]
    fn index_is_good_only_if_its_first_column_is_asked_for() {
        let index = |name: &str, condition: &str| {
            json!([{"Plan": {"Node Type": "Bitmap Heap Scan", "Relation Name": "devices", "Plans": [
                {"Node Type": "Bitmap Index Scan", "Index Name": name, "Index Cond": condition}]}}])
        };

        assert_eq!(verdict(&index("devices_pkey", "(id = ANY ($1))"), 1 << 30), None);
        assert!(verdict(&index("devices_by_tenant", "(id = ANY ($1))"), 1 << 30).is_some());
        assert!(verdict(&index("devices_pkey", ""), 1 << 30).is_some());
        assert!(verdict(&index("unknown_index", "(id = ANY ($1))"), 1 << 30).is_some());
    }

    #[test]
    fn sqlite_scan_and_automatic_index_are_full_reads() {
        assert!(is_full_read_sqlite("SCAN devices"));
        assert!(is_full_read_sqlite(
            "SEARCH devices USING AUTOMATIC COVERING INDEX (id=?)"
        ));
        assert!(!is_full_read_sqlite("SEARCH devices USING PRIMARY KEY (id=?)"));
        assert!(!is_full_read_sqlite("SCAN json_each VIRTUAL TABLE INDEX 1:"));
    }
}
