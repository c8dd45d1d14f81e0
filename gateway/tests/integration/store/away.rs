//! PostgreSQL that is away, killed or frozen: every call ends in time, all recovers on its own, and nothing leaks.

use std::time::{Duration, Instant};

use seawall_gateway::store::{DatabaseStatus, LookupWorker, Store, StoreError};

use super::{WAIT_MAX, audit, device, new_device, within};
use crate::harness::{pg::Cluster, wait::eventually_async};

const LIMIT: Duration = Duration::from_secs(1);
/// Maximum time of a lookup with [`LIMIT`], on a busy machine.
const ANSWER_MAX: Duration = Duration::from_millis(1_200);

/// A new server with one device.
async fn setup() -> (Cluster, Store) {
    let cluster = Cluster::start().expect("PostgreSQL starts");
    let url = cluster.database().await.expect("a database");
    let store = Store::open(&url).await.expect("a good URL");
    within(store.ready()).await;
    store
        .device_insert(&new_device(1), &audit("device.create", 1))
        .await
        .expect("a device");
    (cluster, store)
}

async fn find_timed(worker: &mut LookupWorker) -> (Result<usize, StoreError>, Duration) {
    let started = Instant::now();
    let found = worker.find(&[device(1), device(2)], LIMIT).await;
    (found.map(|found| found.records.len()), started.elapsed())
}

/// Looks up repeatedly until it works.
async fn find_again(worker: &mut LookupWorker) {
    let deadline = Instant::now() + WAIT_MAX;
    loop {
        let (found, took) = find_timed(worker).await;
        assert!(took < ANSWER_MAX, "{took:?}");
        match found {
            Ok(found) => return assert_eq!(found, 1),
            Err(error) => assert!(error.is_away() && Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn frozen_database_is_answered_in_time_and_leaves_no_connection_behind() {
    let (cluster, store) = setup().await;
    let mut workers = [store.lookup_worker(), store.lookup_worker()];
    for worker in &mut workers {
        find_again(worker).await;
    }
    store.rules_revision().await.unwrap();
    let before = cluster.backends("test_0").await.unwrap();

    cluster.freeze().unwrap();
    for _ in 0..3 {
        for worker in &mut workers {
            let (found, took) = find_timed(worker).await;
            assert!(
                matches!(found, Err(StoreError::TimedOut | StoreError::Unavailable(_))),
                "{found:?}"
            );
            assert!(took < ANSWER_MAX, "{took:?}");
        }
    }
    let rules = Instant::now();
    assert!(store.rules_revision().await.is_err());
    assert!(rules.elapsed() < Duration::from_millis(2_200));
    assert_eq!(store.state().status, DatabaseStatus::Away);
    cluster.thaw().unwrap();

    for worker in &mut workers {
        find_again(worker).await;
    }
    assert_eq!(store.rules_revision().await.unwrap(), 0);
    assert_eq!(store.state().status, DatabaseStatus::Available);
    eventually_async(async || cluster.backends("test_0").await.unwrap() <= before).await;
}

#[tokio::test]
async fn look_up_that_can_not_even_connect_in_time_has_timed_out() {
    let (cluster, store) = setup().await;
    let mut worker = store.lookup_worker();
    cluster.freeze().unwrap();

    let (found, took) = find_timed(&mut worker).await;

    // Not a failure, which would be retried in two halves: its devices have waited long enough.
    assert!(matches!(found, Err(StoreError::TimedOut)), "{found:?}");
    assert!(took < ANSWER_MAX, "{took:?}");
    cluster.thaw().unwrap();
}

#[tokio::test]
async fn killed_database_is_answered_at_once_and_used_again_when_it_is_back() {
    let (cluster, store) = setup().await;
    let mut worker = store.lookup_worker();
    find_again(&mut worker).await;

    cluster.kill().unwrap();
    for _ in 0..3 {
        let (found, took) = find_timed(&mut worker).await;
        assert!(matches!(found, Err(StoreError::Unavailable(_))), "{found:?}");
        assert!(took < Duration::from_millis(300), "{took:?}");
    }
    assert!(store.device(device(1)).await.unwrap_err().is_away());
    assert!(store.ping().await.unwrap_err().is_away());
    assert_eq!(store.state().status, DatabaseStatus::Away);
    cluster.restart().unwrap();

    find_again(&mut worker).await;
    assert!(store.device(device(1)).await.unwrap().is_some());
    assert!(store.is_ready());
}

#[tokio::test]
async fn restart_between_two_look_ups_is_not_noticed() {
    let (cluster, store) = setup().await;
    let mut worker = store.lookup_worker();
    find_again(&mut worker).await;

    cluster.kill().unwrap();
    cluster.restart().unwrap();

    assert_eq!(find_timed(&mut worker).await.0.unwrap(), 1);
}

#[tokio::test]
async fn database_away_at_start_is_migrated_and_used_once_it_is_there() {
    let cluster = Cluster::start().unwrap();
    let url = cluster.database().await.unwrap();
    cluster.kill().unwrap();

    let store = Store::open(&url).await.unwrap();
    let mut worker = store.lookup_worker();
    assert!(find_timed(&mut worker).await.0.unwrap_err().is_away());
    assert!(store.ping().await.unwrap_err().is_away());
    assert_eq!(
        (store.is_ready(), store.state().status),
        (false, DatabaseStatus::Starting)
    );
    cluster.restart().unwrap();

    within(store.ready()).await;
    assert_eq!(find_timed(&mut worker).await.0.unwrap(), 0);
    assert_eq!(store.state().status, DatabaseStatus::Available);
}

#[tokio::test]
async fn slow_query_ends_in_the_server_too() {
    let (cluster, store) = setup().await;
    let fixture = super::Fixture {
        store,
        url: cluster.url("test_0"),
        _directory: None,
    };
    fixture
        .db_run(
            "ALTER TABLE devices RENAME TO stored; CREATE VIEW devices AS SELECT stored.* FROM stored, pg_sleep(30)",
        )
        .await;
    let before = cluster.backends("test_0").await.unwrap();
    let mut worker = fixture.store.lookup_worker();

    let started = Instant::now();
    let found = worker.find(&[device(1)], Duration::from_millis(200)).await;

    assert!(matches!(found, Err(StoreError::TimedOut)), "{found:?}");
    assert!(started.elapsed() < Duration::from_millis(400));
    // The server ends the query whose client is gone.
    let abandoned = Instant::now();
    eventually_async(async || cluster.backends("test_0").await.unwrap() <= before).await;
    assert!(abandoned.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn wrong_database_or_port_is_away_not_a_wrong_start() {
    let shared = crate::harness::pg::shared();
    let store = Store::open(&shared.url("no_such_database")).await.unwrap();

    let error = store.ping().await.unwrap_err();

    assert!(
        error.is_away() && error.to_string().contains("no_such_database"),
        "{error}"
    );
}
