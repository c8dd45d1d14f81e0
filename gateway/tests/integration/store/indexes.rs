//! Indexes that a later version of the schema adds to a table that may be large.

use std::time::{Duration, Instant};

use seawall_gateway::{
    runtime::config::DatabaseUrl,
    store::{SCHEMA_VERSION, Store},
};
use sqlx::{Connection as _, PgConnection};

use super::{WAIT_MAX, within};
use crate::harness::{
    pg,
    pooler::{Options, Pooler},
};

const VALID_INDEXES: &str = "SELECT count(*) FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid \
     WHERE relname IN ('devices_not_enabled', 'devices_by_tenant_and_model') AND indisvalid";
const INSERT: &str = "INSERT INTO devices (id, secret_sha256, created_at, updated_at) \
     VALUES (gen_random_uuid(), sha256('secret'), 1, 1)";
/// The server reports every table as large.
const LARGE: &str = "CREATE FUNCTION public.pg_total_relation_size(regclass) RETURNS bigint \
         LANGUAGE sql IMMUTABLE RETURN 1099511627776; \
     DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path = public, pg_catalog', current_database()); END $$";
/// More than a statement of a migration may take here, and less than it waits in this test.
const STATEMENT_TIMEOUT: Duration = Duration::from_millis(200);

async fn run(connection: &mut PgConnection, sql: &'static str) {
    sqlx::raw_sql(sql).execute(connection).await.unwrap();
}

async fn number(connection: &mut PgConnection, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(connection).await.unwrap()
}

/// A database with the schema before the indexes, and a connection to it.
async fn without_indexes() -> (DatabaseUrl, PgConnection) {
    let url = pg::shared().database().await.unwrap();
    Store::migrate(&url).await.unwrap();
    let mut connection = PgConnection::connect(url.expose()).await.unwrap();
    run(
        &mut connection,
        "DROP INDEX devices_not_enabled, devices_by_tenant_and_model; DELETE FROM _sqlx_migrations WHERE version = 3",
    )
    .await;
    (url, connection)
}

async fn reason(store: &Store, words: &str) -> String {
    let deadline = Instant::now() + WAIT_MAX;
    loop {
        let reason = store.state().reason.unwrap_or_default();
        if reason.contains(words) {
            return reason;
        }
        assert!(Instant::now() < deadline, "{reason}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn migrate_replaces_an_invalid_index_while_devices_are_written_and_without_a_time_limit() {
    let (url, mut connection) = without_indexes().await;
    run(&mut connection, INSERT).await;
    run(&mut connection, INSERT).await;
    // Two devices of one tenant: creating the index fails, and leaves an invalid one.
    let interrupted = sqlx::raw_sql("CREATE UNIQUE INDEX CONCURRENTLY devices_by_tenant_and_model ON devices (tenant)");
    interrupted.execute(&mut connection).await.unwrap_err();
    run(
        &mut connection,
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET statement_timeout = 200', current_database()); END $$",
    )
    .await;
    let mut open = PgConnection::connect(url.expose()).await.unwrap();
    run(&mut open, "BEGIN").await;
    run(&mut open, INSERT).await;

    let migrating = tokio::spawn({
        let url = url.clone();
        async move { Store::migrate(&url).await }
    });
    // A statement may begin after this one, by the server's clock.
    let longest = "SELECT greatest(max(extract(epoch FROM now() - query_start) * 1000), 0)::bigint FROM pg_stat_activity \
         WHERE datname = current_database() AND state = 'active' AND query LIKE '%CREATE INDEX CONCURRENTLY%' \
         AND pid <> pg_backend_pid()";
    let deadline = Instant::now() + WAIT_MAX;
    while u128::try_from(number(&mut connection, longest).await).unwrap() <= 2 * STATEMENT_TIMEOUT.as_millis() {
        assert!(!migrating.is_finished(), "it waits for the open transaction");
        assert!(Instant::now() < deadline, "it makes the index");
    }
    run(&mut connection, "SET statement_timeout = 5000").await;
    run(&mut connection, INSERT).await;
    assert!(!migrating.is_finished());
    run(&mut open, "COMMIT").await;

    within(migrating).await.unwrap().unwrap();
    assert_eq!(number(&mut connection, VALID_INDEXES).await, 2);
    assert_eq!(number(&mut connection, "SELECT count(*) FROM devices").await, 4);
    // The recorded version is what a gateway expects.
    let store = Store::open(&url).await.unwrap();
    within(store.ready()).await;
}

#[tokio::test]
async fn gateway_leaves_indexes_on_a_large_table_to_migrate() {
    let (url, mut connection) = without_indexes().await;
    run(&mut connection, LARGE).await;

    let store = Store::open(&url).await.unwrap();
    reason(&store, "run `seawall migrate`; this gateway waits for it").await;
    assert_eq!(number(&mut connection, VALID_INDEXES).await, 0);
    assert!(!store.is_ready());
    if let Some(pooler) = Pooler::start(pg::shared(), "transaction", Options::Dropped).unwrap() {
        let refused = Store::migrate(&pooler.url(&url, pg::shared())).await.unwrap_err();
        assert!(refused.to_string().contains("server's own address"), "{refused}");
    }

    Store::migrate(&url).await.unwrap();
    within(store.ready()).await;
    assert_eq!(number(&mut connection, VALID_INDEXES).await, 2);
}

#[tokio::test]
async fn gateways_that_start_at_once_make_indexes_on_a_small_table() {
    let (url, mut connection) = without_indexes().await;
    let pooler = Pooler::start(pg::shared(), "transaction", Options::Refused).unwrap();
    let mut urls = vec![url.clone(), url.clone()];
    urls.extend(pooler.as_ref().map(|pooler| pooler.url(&url, pg::shared())));

    let mut stores = Vec::new();
    for url in &urls {
        stores.push(Store::open(url).await.unwrap());
    }
    for store in &stores {
        within(store.ready()).await;
    }

    assert_eq!(number(&mut connection, VALID_INDEXES).await, 2);
    let newest = number(&mut connection, "SELECT max(version) FROM _sqlx_migrations").await;
    assert_eq!(newest, SCHEMA_VERSION);
}
