//! PostgreSQL behind a pooler that runs each transaction on any of its connections.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use seawall_gateway::{
    runtime::config::DatabaseUrl,
    store::{DatabaseStatus, ImportLine, ImportRow, OnOtherCredential, PlanReport, Store, StoreError},
};
use seawall_proto::id::SecretHash;
use sqlx::{Connection as _, PgConnection, Row as _};

use super::{audit, device, new_device, server::far, within};
use crate::harness::{
    pg::{self, Cluster},
    pooler::{Options, Pooler},
    wait::eventually_async,
};

const LIMIT: Duration = Duration::from_secs(5);

/// A store behind the pooler on a new database, which the pooler migrates.
async fn behind(pooler: &Pooler, cluster: &Cluster) -> (Store, DatabaseUrl) {
    let url = pooler.url(&cluster.database().await.unwrap(), cluster);
    let store = Store::open(&url).await.unwrap();
    within(store.ready()).await;
    (store, url)
}

/// Everything at once, on two nodes whose statements have the same names: each answer belongs to its query.
async fn assert_works(options: Options) {
    let cluster = pg::shared();
    let Some(pooler) = Pooler::start(cluster, "transaction", options).unwrap() else {
        return;
    };
    let (store, url) = behind(&pooler, cluster).await;
    let other = Store::open(&url).await.unwrap();
    within(other.ready()).await;
    for number in 1..=20 {
        store
            .device_insert(&new_device(number), &audit("device.create", 1))
            .await
            .unwrap();
    }

    let mut import = store.import(OnOtherCredential::Refuse).await.unwrap();
    for number in 21..=40_u64 {
        let row = ImportRow {
            external_id: None,
            id: device(number.into()),
            secret: SecretHash::of(b"imported"),
            tenant: None,
            model: None,
        };
        import.push(vec![ImportLine { number, row: Ok(row) }]).await.unwrap();
    }
    assert_eq!(import.finish(&audit("devices.import", 2)).await.unwrap().added, 20);
    // The pooler's connection has no table of the first import left.
    let second = store.import(OnOtherCredential::Refuse).await.unwrap();
    assert_eq!(second.finish(&audit("devices.import", 3)).await.unwrap().added, 0);

    let nodes = [&store, &other];
    let look_ups = (0..8_u128).map(|task| async move {
        let mut worker = nodes[(task % 2) as usize].lookup_worker();
        for round in 0..25 {
            let wanted = 1 + (task * 25 + round) % 40;
            let found = worker.find(&[device(wanted), device(1_000)], LIMIT).await.unwrap();
            assert_eq!(
                found.records.iter().map(|record| record.id).collect::<Vec<_>>(),
                [device(wanted)]
            );
        }
    });
    let polls = nodes.map(|node| async move {
        for _ in 0..25 {
            assert_eq!(node.rules_revision().await.unwrap(), 0);
            node.revocations_since(None).await.unwrap();
            assert!(node.device(device(1)).await.unwrap().is_some());
        }
    });
    tokio::join!(join_all(look_ups), join_all(polls));

    assert_eq!(store.plan_check().await.unwrap(), PlanReport::Indexed);
    assert_eq!(store.plan_check().await.unwrap(), PlanReport::Indexed);
    assert_eq!(store.state().status, DatabaseStatus::Available);
    assert!(Store::probe(&url).await.unwrap().is_pooled);
}

#[tokio::test]
async fn pooler_that_refuses_start_up_options_gets_statements_that_need_no_session() {
    assert_works(Options::Refused).await;
}

#[tokio::test]
async fn pooler_that_drops_start_up_options_gets_statements_that_need_no_session() {
    assert_works(Options::Dropped).await;
}

#[tokio::test]
async fn lookup_through_a_pooler_takes_one_round_trip() {
    let cluster = pg::shared();
    let Some(pooler) = Pooler::start(cluster, "transaction", Options::Dropped).unwrap() else {
        return;
    };
    let (near, url) = behind(&pooler, cluster).await;
    near.device_insert(&new_device(1), &audit("device.create", 1))
        .await
        .unwrap();
    let far = far(pooler.port(), Duration::from_millis(200)).await;
    let there = format!(":{}/", pooler.port());
    let url: DatabaseUrl = url.expose().replace(&there, &format!(":{far}/")).parse().unwrap();
    let store = Store::open(&url).await.unwrap();
    within(store.ready()).await;
    let mut worker = store.lookup_worker();
    // A connection takes longer than one lookup may: the attempt continues between two.
    eventually_async(async || store.lookup_worker().find(&[device(1)], LIMIT).await.is_ok()).await;

    let begun = Instant::now();
    let found = worker.find(&[device(1), device(2)], LIMIT).await.unwrap();

    assert_eq!(found.records[0], near.device(device(1)).await.unwrap().unwrap().record);
    assert_eq!((found.records.len(), found.unreadable.len()), (1, 0));
    // Two would take 800 ms.
    assert!(begun.elapsed() < Duration::from_millis(800), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn timeouts_are_in_force_behind_a_pooler_that_drops_options() {
    let cluster = pg::shared();
    let Some(pooler) = Pooler::start(cluster, "session", Options::Dropped).unwrap() else {
        return;
    };
    let direct = cluster.database().await.unwrap();
    let store = Store::open(&pooler.url(&direct, cluster)).await.unwrap();
    within(store.ready()).await;
    let mut locker = PgConnection::connect(direct.expose()).await.unwrap();
    let lock = "BEGIN; LOCK TABLE devices IN ACCESS EXCLUSIVE MODE";
    sqlx::raw_sql(lock).execute(&mut locker).await.unwrap();

    let mut worker = store.lookup_worker();
    let found = worker.find(&[device(1)], LIMIT).await;

    // The server's own limit on the wait for a lock, long before the caller's.
    assert!(
        matches!(found, Err(StoreError::Locked(_) | StoreError::TimedOut)),
        "{found:?}"
    );
    let locker = tokio::sync::Mutex::new(locker);
    eventually_async(async || waiting(&mut *locker.lock().await).await == 0).await;
}

async fn waiting(connection: &mut PgConnection) -> i64 {
    let statement =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let row = sqlx::query(statement).fetch_one(connection).await.unwrap();
    row.get(0)
}

#[tokio::test]
async fn server_reached_itself_is_not_taken_for_a_pooler() {
    let url = pg::shared().database().await.unwrap();

    let probe = Store::probe(&url).await.unwrap();

    assert!(!probe.is_pooled && !probe.is_read_only);
}
