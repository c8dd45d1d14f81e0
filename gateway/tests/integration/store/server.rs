//! PostgreSQL in other environments: far away, read-only, short of connections, with few permissions.

use std::time::{Duration, Instant};

use seawall_gateway::{
    runtime::config::DatabaseUrl,
    store::{Consent, DatabaseStatus, LookupWorker, Operation, SCHEMA_VERSION, Store, StoreError, Trouble},
};
use seawall_proto::rules::RuleSpec;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    time::sleep,
};

use super::{WAIT_MAX, audit, device, new_device, within};
use crate::harness::{
    pg::{self, Cluster},
    wait::eventually_async,
};

const LIMIT: Duration = Duration::from_secs(1);
/// Half of the round trip of 300 ms.
const ONE_WAY: Duration = Duration::from_millis(150);

async fn run(url: &DatabaseUrl, sql: impl Into<String>) {
    let mut connection = PgConnection::connect(url.expose()).await.unwrap();
    let sql = sqlx::raw_sql(AssertSqlSafe(sql.into()));
    sql.execute(&mut connection).await.unwrap();
}

/// The same database as `role`, at the same or another port.
fn as_role(url: &DatabaseUrl, role: &str) -> DatabaseUrl {
    url.expose()
        .replace("postgres://postgres@", &format!("postgres://{role}@"))
        .parse()
        .unwrap()
}

/// The same database at another port.
fn at_port(url: &DatabaseUrl, port: u16) -> DatabaseUrl {
    let here = format!(":{}/", pg::shared().port());
    url.expose().replace(&here, &format!(":{port}/")).parse().unwrap()
}

async fn find_in_the_end(worker: &mut LookupWorker, found: usize) {
    let deadline = Instant::now() + WAIT_MAX;
    loop {
        match worker.find(&[device(1)], LIMIT).await {
            Ok(answer) => return assert_eq!(answer.records.len(), found),
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    }
}

/// A proxy to `port` that delays all data by `one_way`.
pub async fn far(port: u16, one_way: Duration) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let far = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else {
                return;
            };
            let ((near_read, near_write), (read, write)) = (near.into_split(), server.into_split());
            tokio::spawn(delay(near_read, write, one_way));
            tokio::spawn(delay(read, near_write, one_way));
        }
    });
    far
}

async fn delay(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, one_way: Duration) {
    let mut buffer = vec![0; 65_536];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        sleep(one_way).await;
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn database_300_ms_away_becomes_ready_and_looks_devices_up() {
    let cluster = pg::shared();
    let url = cluster.database().await.unwrap();
    Store::migrate(&url).await.unwrap();
    let port = far(cluster.port(), ONE_WAY).await;

    let store = Store::open(&at_port(&url, port)).await.unwrap();
    within(store.ready()).await;
    // A connection takes longer than one lookup may: the attempt continues between two.
    find_in_the_end(&mut store.lookup_worker(), 0).await;
    eventually_async(async || store.rules_revision().await.is_ok()).await;
    // On a connection on which nothing was prepared yet.
    let unprepared = Store::open(&at_port(&url, port)).await.unwrap();
    within(unprepared.ready()).await;
    eventually_async(async || unprepared.rules().await.is_ok()).await;
    eventually_async(async || unprepared.revocations_since(None).await.is_ok()).await;
}

#[tokio::test]
async fn rule_is_checked_written_and_deleted_where_the_database_is_200_ms_away() {
    let url = pg::shared().database().await.unwrap();
    Store::migrate(&url).await.unwrap();
    let port = far(pg::shared().port(), Duration::from_millis(100)).await;
    let store = Store::open(&at_port(&url, port)).await.unwrap();
    within(store.ready()).await;

    // The first tries may end with a connection for the next one.
    eventually_async(async || store.rule_check(uuid::Uuid::nil()).await.is_ok()).await;
    let audit = audit("rule.create", 1);
    let spec: RuleSpec = serde_json::from_value(serde_json::json!({
        "match": {"firmware": "=1.0.0"}, "effect": "block", "reason": "broken"
    }))
    .unwrap();
    let made = std::cell::RefCell::new(None);
    eventually_async(async || {
        let id = seawall_proto::id::RuleId(uuid::Uuid::new_v4());
        let written = store.rule_insert(id, spec.clone(), Consent::Given, &audit).await;
        *made.borrow_mut() = written.ok();
        made.borrow().is_some()
    })
    .await;
    let made = made.into_inner().unwrap();
    let changed = store.rule_update(made.id, made.revision, spec, Consent::Given, &audit);
    assert_eq!(changed.await.unwrap().unwrap().revision, made.revision + 1);
    assert_eq!(
        store.rule_delete(made.id, &audit).await.unwrap(),
        Some(made.revision + 2)
    );
    assert!(
        store
            .rule_check(uuid::Uuid::nil())
            .await
            .unwrap()
            .unconfirmed
            .is_empty()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_that_are_dropped_without_a_word_cost_one_look_up() {
    let url = pg::shared().database().await.unwrap();
    Store::migrate(&url).await.unwrap();
    let (port, drop_idle) = forgetful(pg::shared().port()).await;
    let store = Store::open(&at_port(&url, port)).await.unwrap();
    within(store.ready()).await;
    // Each of them waits for the lock on a separate connection.
    let mut locker = PgConnection::connect(url.expose()).await.unwrap();
    let lock = sqlx::raw_sql("BEGIN; LOCK TABLE devices IN ACCESS EXCLUSIVE MODE");
    lock.execute(&mut locker).await.unwrap();
    let looks = (0..6).map(|_| {
        let mut worker = store.lookup_worker();
        tokio::spawn(async move { worker.find(&[device(1)], LIMIT).await })
    });
    let looks: Vec<_> = looks.collect();
    let name = url.expose().rsplit('/').next().unwrap().to_owned();
    eventually_async(async || {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND wait_event_type = 'Lock'";
        let mut outside = PgConnection::connect(url.expose()).await.unwrap();
        let waiting = sqlx::query_scalar::<_, i64>(waiting)
            .bind(&name)
            .fetch_one(&mut outside);
        waiting.await.unwrap() == 6
    })
    .await;
    sqlx::raw_sql("ROLLBACK").execute(&mut locker).await.unwrap();
    for look in looks {
        look.await.unwrap().unwrap();
    }
    // Idle for longer than a connection in a storm.
    sleep(Duration::from_millis(1_100)).await;

    drop_idle.send_replace(true);
    let mut worker = store.lookup_worker();
    let first = worker.find(&[device(1)], LIMIT).await;

    assert!(matches!(first, Err(StoreError::TimedOut)), "{first:?}");
    for _ in 0..6 {
        assert_eq!(worker.find(&[device(1)], LIMIT).await.unwrap().records.len(), 0);
    }
}

/// A proxy to `port` that drops data of the connections that were made before it is told to.
async fn forgetful(port: u16) -> (u16, watch::Sender<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near_port = listener.local_addr().unwrap().port();
    let lost = watch::Sender::new(false);
    let told = lost.subscribe();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let mut server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            let mut told = told.clone();
            let is_new = *told.borrow();
            tokio::spawn(async move {
                let is_told = async move {
                    let _ = told.wait_for(|is_lost| *is_lost && !is_new).await;
                };
                tokio::select! {
                    biased;
                    () = is_told => std::future::pending().await,
                    _ = tokio::io::copy_bidirectional(&mut near, &mut server) => {}
                }
            });
        }
    });
    (near_port, lost)
}

#[tokio::test]
async fn read_only_server_answers_reads_and_has_a_state_of_its_own() {
    let cluster = Cluster::start().unwrap();
    let url = cluster.database().await.unwrap();
    let store = Store::open(&url).await.unwrap();
    within(store.ready()).await;
    store
        .device_insert(&new_device(1), &audit("device.create", 1))
        .await
        .unwrap();
    let mut worker = store.lookup_worker();
    find_in_the_end(&mut worker, 1).await;

    run(&url, "ALTER SYSTEM SET default_transaction_read_only = on").await;
    run(&url, "SELECT pg_reload_conf()").await;
    eventually_async(async || {
        store.rules_revision().await.unwrap();
        store.state().status == DatabaseStatus::ReadOnly
    })
    .await;

    let refused = store.device_insert(&new_device(2), &audit("device.create", 1)).await;
    assert!(matches!(refused, Err(StoreError::ReadOnlyServer)), "{refused:?}");
    assert_eq!(store.state().status, DatabaseStatus::ReadOnly);
    assert_eq!(worker.find(&[device(1)], LIMIT).await.unwrap().records.len(), 1);
    assert!(Store::probe(&url).await.unwrap().is_read_only);
    // A gateway that starts then does not need to write either.
    let second = Store::open(&url).await.unwrap();
    within(second.ready()).await;

    run(&url, "ALTER SYSTEM RESET default_transaction_read_only").await;
    run(&url, "SELECT pg_reload_conf()").await;
    eventually_async(async || {
        store.rules_revision().await.unwrap();
        store.state().status == DatabaseStatus::Available
    })
    .await;
}

#[tokio::test]
async fn look_ups_get_connections_that_nobody_else_uses_where_they_are_scarce() {
    let url = pg::shared().database().await.unwrap();
    Store::migrate(&url).await.unwrap();
    run(
        &url,
        "CREATE ROLE scarce LOGIN CONNECTION LIMIT 2; GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO scarce",
    )
    .await;
    let store = Store::open(&as_role(&url, "scarce")).await.unwrap();
    within(store.ready()).await;
    // Both are open and idle now.
    eventually_async(async || store.rules_revision().await.is_ok()).await;
    eventually_async(async || store.device(device(1)).await.is_ok()).await;

    let mut worker = store.lookup_worker();
    assert_eq!(
        worker
            .find(&[device(1)], Duration::from_secs(2))
            .await
            .unwrap()
            .records
            .len(),
        0
    );

    let reason = store.scarce_connections().expect("a reason is shown");
    assert!(reason.contains("scarce"), "{reason}");
    assert_eq!(store.state().status, DatabaseStatus::Available);
    // And the others get theirs in between.
    for _ in 0..5 {
        eventually_async(async || store.rules_revision().await.is_ok()).await;
        eventually_async(async || store.device(device(1)).await.is_ok()).await;
        find_in_the_end(&mut worker, 0).await;
    }
}

#[tokio::test]
async fn role_without_create_is_enough_where_the_schema_is_there() {
    let url = pg::shared().database().await.unwrap();
    run(
        &url,
        "CREATE ROLE reader LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC",
    )
    .await;
    let store = Store::open(&as_role(&url, "reader")).await.unwrap();
    eventually_async(async || store.state().reason.is_some()).await;
    let reason = store.state().reason.unwrap();
    assert!(reason.contains("permission denied for schema public"), "{reason}");
    assert!(!reason.contains("at line"), "{reason}");

    Store::migrate(&url).await.unwrap();
    run(
        &url,
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO reader",
    )
    .await;

    within(store.ready()).await;
    assert_eq!(store.rules_revision().await.unwrap(), 0);
}

#[tokio::test]
async fn tables_that_are_not_made_yet_are_no_trouble() {
    let url = pg::shared().database().await.unwrap();
    run(
        &url,
        "CREATE ROLE early LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC",
    )
    .await;
    let store = Store::open(&as_role(&url, "early")).await.unwrap();

    store.rules_revision().await.unwrap_err();
    store.device(device(1)).await.unwrap_err();

    assert_eq!(store.failed(Operation::Read), 1);
    for trouble in [Trouble::Refuses, Trouble::Unreadable] {
        assert_eq!(store.trouble(trouble), None, "the missing permission is in its state");
    }
}

#[tokio::test]
async fn schema_that_another_process_changes_is_waited_for() {
    let url = pg::shared().database().await.unwrap();
    let mut other = PgConnection::connect(url.expose()).await.unwrap();
    // As sqlx and older versions of this program lock it.
    sqlx::migrate::Migrate::lock(&mut other).await.unwrap();

    let store = Store::open(&url).await.unwrap();
    eventually_async(async || {
        let reason = store.state().reason;
        reason.is_some_and(|reason| reason.contains("another process changes the schema"))
    })
    .await;
    assert!(!store.is_ready());
    sqlx::migrate::Migrate::unlock(&mut other).await.unwrap();

    within(store.ready()).await;
    let row = sqlx::query_scalar::<_, i64>("SELECT max(version) FROM _sqlx_migrations").fetch_one(&mut other);
    assert_eq!(row.await.unwrap(), SCHEMA_VERSION);
}

#[tokio::test]
async fn write_that_waits_for_a_lock_does_not_call_the_database_away() {
    let url = pg::shared().database().await.unwrap();
    let store = Store::open(&url).await.unwrap();
    within(store.ready()).await;
    let mut locker = PgConnection::connect(url.expose()).await.unwrap();
    let lock = sqlx::raw_sql("BEGIN; SELECT * FROM meta FOR UPDATE");
    lock.execute(&mut locker).await.unwrap();

    let audit = audit("rule.create", 1);
    let spec: RuleSpec = serde_json::from_value(serde_json::json!({
        "match": {"firmware": "=1.0.0"}, "effect": "block", "reason": "broken"
    }))
    .unwrap();
    let writes = async {
        let id = || seawall_proto::id::RuleId(uuid::Uuid::new_v4());
        tokio::join!(
            store.rule_insert(id(), spec.clone(), Consent::Given, &audit),
            store.rule_insert(id(), spec.clone(), Consent::Given, &audit),
            store.rule_insert(id(), spec.clone(), Consent::Given, &audit),
        )
    };
    let mut writes = std::pin::pin!(writes);
    let failed = loop {
        tokio::select! {
            failed = &mut writes => break failed,
            polled = store.rules_revision() => assert_eq!(polled.unwrap(), 0),
        }
        assert_eq!(store.state().status, DatabaseStatus::Available);
    };

    assert!(failed.0.is_err() && failed.1.is_err() && failed.2.is_err());
    assert_eq!(store.state().status, DatabaseStatus::Available);
}
