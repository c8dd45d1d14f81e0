//! Both databases have the same schema.

use std::collections::BTreeMap;

use seawall_gateway::store::{SCHEMA_VERSION, Store};
use sqlx::{Connection, PgConnection, Row, SqliteConnection};

use super::{Fixture, on_both};

on_both!(
    migrating_again_changes_nothing,
    newer_schema_does_not_stop_an_older_binary
);

/// Type of a value, whether it may be null, and whether it is in the primary key.
type Columns = BTreeMap<(String, String), (&'static str, bool, bool)>;

#[tokio::test]
async fn both_schemas_have_the_same_tables_columns_and_keys() {
    let sqlite = sqlite_columns(&Fixture::sqlite().await).await;
    let postgres = postgres_columns(&Fixture::postgres().await).await;

    assert_eq!(sqlite, postgres);
    let tables: std::collections::BTreeSet<_> = sqlite.keys().map(|(table, _)| table.as_str()).collect();
    assert_eq!(
        tables,
        [
            "audit",
            "device_counts",
            "devices",
            "firmware_versions",
            "meta",
            "presence",
            "presence_history",
            "presence_nodes",
            "revocations",
            "rollout_counts",
            "rollouts",
            "rule_writes",
            "rules",
            "tokens"
        ]
        .into()
    );
}

async fn sqlite_columns(fixture: &Fixture) -> Columns {
    let path = fixture.url.sqlite_path().unwrap();
    let mut connection = SqliteConnection::connect(&format!("sqlite:{}", path.display()))
        .await
        .unwrap();
    let sql = "SELECT t.name AS tab, c.name AS col, c.type AS kind, c.\"notnull\" AS needed, c.pk AS pk \
               FROM sqlite_schema t, pragma_table_info(t.name) c \
               WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite_%' AND t.name NOT LIKE '\\_%' ESCAPE '\\'";
    let rows = sqlx::query(sql).fetch_all(&mut connection).await.unwrap();
    let columns = rows.iter().map(|row| {
        let (table, column): (String, String) = (row.get("tab"), row.get("col"));
        let kind = match (row.get::<String, _>("kind").as_str(), column.as_str()) {
            ("BLOB", "id" | "device" | "run") => "uuid",
            ("BLOB", _) => "bytes",
            ("INTEGER", "state" | "phase") => "small",
            ("INTEGER", _) => "int",
            ("TEXT", _) => "text",
            other => panic!("unknown type {other:?}"),
        };
        let properties = (kind, row.get::<i64, _>("needed") == 0, row.get::<i64, _>("pk") > 0);
        ((table, column), properties)
    });
    columns.collect()
}

async fn postgres_columns(fixture: &Fixture) -> Columns {
    let mut connection = PgConnection::connect(fixture.url.expose()).await.unwrap();
    let sql = "SELECT c.relname::text AS tab, a.attname::text AS col, format_type(a.atttypid, NULL) AS kind, a.attnotnull AS needed, \
               coalesce(a.attnum = ANY(x.indkey), false) AS pk \
               FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid LEFT JOIN pg_index x ON x.indrelid = c.oid AND x.indisprimary \
               WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace AND a.attnum > 0 AND c.relname NOT LIKE '\\_%'";
    let rows = sqlx::query(sql).fetch_all(&mut connection).await.unwrap();
    let columns = rows.iter().map(|row| {
        let kind = match row.get::<String, _>("kind").as_str() {
            "uuid" => "uuid",
            "bytea" => "bytes",
            "smallint" => "small",
            "bigint" => "int",
            "text" => "text",
            other => panic!("unknown type {other}"),
        };
        (
            (row.get("tab"), row.get("col")),
            (kind, !row.get::<bool, _>("needed"), row.get("pk")),
        )
    });
    columns.collect()
}

async fn migrating_again_changes_nothing(fixture: &Fixture) {
    fixture.db_fill(3).await;

    Store::migrate(&fixture.url).await.unwrap();

    let devices = fixture.store.devices_page(&Default::default(), None, 10).await.unwrap();
    assert_eq!(devices.items.len(), 3);
}

async fn newer_schema_does_not_stop_an_older_binary(fixture: &Fixture) {
    let checksum = if fixture.url.sqlite_path().is_some() {
        "x'00'"
    } else {
        "'\\x00'"
    };
    let sql = format!(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
         VALUES ({}, 'of a later release', true, {checksum}, 1)",
        SCHEMA_VERSION + 1
    );
    fixture.db_run(sql).await;

    Store::migrate(&fixture.url).await.unwrap();
}

#[tokio::test]
async fn several_nodes_may_start_on_an_empty_postgresql_at_once() {
    let url = crate::harness::pg::shared().database().await.unwrap();

    let nodes = (0..4).map(|_| {
        let url = url.clone();
        tokio::spawn(async move {
            let store = Store::open(&url).await.unwrap();
            super::within(store.ready()).await;
            store.rules_revision().await.unwrap()
        })
    });

    for node in nodes.collect::<Vec<_>>() {
        assert_eq!(node.await.unwrap(), 0);
    }
}
