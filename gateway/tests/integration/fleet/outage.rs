//! PostgreSQL is away at the start, killed or frozen while devices connect. No device waits for it, no session ends,
//! and afterwards everything recovers on its own.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use firmware_sim::connection::{Credential, DeviceConfig};
use rustix::process::Signal;
use seawall_gateway::{
    runtime::config::DatabaseUrl,
    store::{Operation, Store},
};
use seawall_proto::{
    admission::BreakerState,
    departures::{DrainOrder, DrainState},
};
use sqlx::{Connection as _, PgConnection};
use tokio::{
    net::TcpStream,
    task::{JoinSet, spawn_blocking},
    time::{Instant, sleep_until},
};

use crate::harness::{
    devices::{
        ANSWER_MAX, ANSWER_MAX_AWAY, Attempt, assert_alive, attempt, block, device, devices, end_of, id, persist,
        persist_all, register,
    },
    gateway::Gateway,
    pg::{self, Cluster},
    process::GatewayProcess,
    wait::{PATIENCE, eventually},
};

/// Devices that have a session before the outage.
const LIVE: std::ops::Range<u32> = 0..20;
/// Devices that connect during the outage, one per [`ARRIVAL_INTERVAL`].
const ARRIVING: std::ops::Range<u32> = 20..220;
const ARRIVAL_INTERVAL: Duration = Duration::from_millis(8);
/// Number of admitted devices at which the outage begins.
const HURT_AFTER: u32 = 50;
/// Number of devices and calls that wait for a table at the same time, so that a gateway opens all of its connections.
const AT_ONCE: u32 = 12;
/// First number of devices that are never registered.
const UNKNOWN: u32 = 100_000;
/// Time without a change after which a number of connections has settled.
const SETTLED_AFTER: Duration = Duration::from_millis(700);
/// Time for which they wait: less than the maximum of a lookup.
const TABLE_LOCKED_FOR: Duration = Duration::from_millis(400);
/// Maximum time of a start while the database does not answer.
const START_MAX: Duration = Duration::from_secs(5);
/// Maximum time of the end of a gateway without sessions.
const END_MAX: Duration = Duration::from_secs(8);

#[tokio::test(flavor = "multi_thread")]
async fn database_away_at_start_refuses_with_slots_until_it_comes() {
    let cluster = Cluster::start().unwrap();
    let url = cluster.database().await.unwrap();
    cluster.kill().unwrap();

    let gateway = Gateway::start_on(Some(&url), "").await;
    let attempts = gateway.connect_all(&devices(0..50)).await;

    assert_eq!(gateway.readyz().await, 503);
    assert_refused_at_once(&attempts);
    cluster.restart().unwrap();
    eventually(|| gateway.shared.readiness().ready).await;
    assert_eq!(gateway.readyz().await, 200);
    gateway.register(0..50).await;
    let returning = attempts.iter().zip(devices(0..50)).map(|(attempt, mut device)| {
        device.slot = attempt.refused().slot.clone();
        device
    });
    let live = persist_all(gateway.devices, returning).await;
    assert_eq!((live.len(), gateway.metric("seawall_sessions ")), (50, 50));
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_database_is_survived() {
    survive(|cluster| cluster.kill().unwrap(), |cluster| cluster.restart().unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frozen_database_is_survived() {
    survive(|cluster| cluster.freeze().unwrap(), |cluster| cluster.thaw().unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_a_database_that_froze_while_nobody_came() {
    let cluster = Cluster::start().unwrap();
    let url = cluster.database().await.unwrap();
    let gateway = Gateway::start_on(Some(&url), "").await;
    eventually(|| gateway.shared.readiness().ready).await;
    gateway.register(0..10).await;
    let _served = gateway.session(&device(0)).await;
    cluster.freeze().unwrap();

    eventually(|| is_said_to_be_away(&gateway)).await;
    for device in devices(1..8) {
        assert_refused_at_once(&[gateway.connect(&device).await]);
    }

    cluster.thaw().unwrap();
    assert_eq!(persist_all(gateway.devices, devices(1..8)).await.len(), 7);
    eventually(|| gateway.shared.readiness().reasons.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn call_that_failed_on_a_connection_of_its_own_refuses_nobody() {
    let database = pg::shared().database().await.unwrap();
    let gateway = Gateway::start_on(Some(&database), "").await;
    eventually(|| gateway.shared.readiness().ready).await;
    gateway.register(0..1).await;
    let mut operator = PgConnection::connect(database.expose()).await.unwrap();
    let failed = || {
        let of = |operation| gateway.shared.store.failed(operation);
        of(Operation::Rules) + of(Operation::Revocations)
    };

    let until = Instant::now() + PATIENCE;
    for round in 1..=3 {
        sqlx::raw_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
             WHERE datname = current_database() AND application_name = 'seawall polls'",
        )
        .execute(&mut operator)
        .await
        .unwrap();
        while failed() < round {
            drop(gateway.session(&device(0)).await);
            assert!(Instant::now() < until, "the polls did not notice");
        }
        let settled = Instant::now() + SETTLED_AFTER;
        while Instant::now() < settled {
            drop(gateway.session(&device(0)).await);
        }
    }

    assert_eq!(
        gateway.metric("seawall_handshakes_total{outcome=\"registry_unavailable\"}"),
        0
    );
}

/// Connections of one node: three for lookups, one each for revalidation, the polls and the rules, and four for the
/// API.
const BACKENDS_MAX: i64 = 10;

/// Whether `/readyz` reports the outage.
fn is_said_to_be_away(gateway: &Gateway) -> bool {
    gateway.shared.readiness().reasons.contains(&"database_unavailable")
}

#[tokio::test(flavor = "multi_thread")]
async fn plan_alarm_ends_soon_after_the_repair() {
    let database = pg::shared().database().await.unwrap();
    Store::migrate(&database).await.unwrap();
    let mut operator = PgConnection::connect(database.expose()).await.unwrap();
    let break_it = "INSERT INTO devices (id, secret_sha256, created_at, updated_at) \
        SELECT gen_random_uuid(), decode(repeat('00', 32), 'hex'), 1, 1 FROM generate_series(1, 20000); \
        ANALYZE devices; ALTER TABLE devices DROP CONSTRAINT devices_pkey";
    sqlx::raw_sql(break_it).execute(&mut operator).await.unwrap();
    let gateway = Gateway::start_on(Some(&database), "").await;
    let is_alarm = || gateway.shared.readiness().reasons.contains(&"plan_alarm");
    eventually(is_alarm).await;

    let repair = sqlx::raw_sql("CREATE UNIQUE INDEX devices_repaired ON devices (id)");
    repair.execute(&mut operator).await.unwrap();

    eventually(|| !is_alarm()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn database_frozen_at_start_does_not_hold_the_start_up() {
    let cluster = Cluster::start().unwrap();
    let url = cluster.database().await.unwrap();
    cluster.freeze().unwrap();

    let begun = Instant::now();
    let gateway = Gateway::start_on(Some(&url), "").await;
    assert!(begun.elapsed() < START_MAX, "{:?}", begun.elapsed());
    assert_refused_at_once(&gateway.connect_all(&devices(0..10)).await);
    assert_eq!(gateway.readyz().await, 503);

    cluster.thaw().unwrap();
    eventually(|| gateway.shared.readiness().ready).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_outlive_a_restart_without_the_database() {
    let cluster = Cluster::start().unwrap();
    let url = cluster.database().await.unwrap();
    let gateway = Gateway::start_on(Some(&url), "").await;
    eventually(|| gateway.shared.readiness().ready).await;
    gateway.add_rule(block("=6.6.6")).await;
    cluster.kill().unwrap();

    let gateway = gateway.restart_on(Some(&url)).await;

    let blocked = gateway.connect(&device(0).firmware("6.6.6")).await;
    blocked.refused_with(403, "firmware_blocked");
    assert_refused_at_once(&gateway.connect_all(&devices(0..1)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn locked_table_is_an_outage_with_an_end() {
    let database = pg::shared().database().await.unwrap();
    let gateway = Gateway::start_on(Some(&database), "").await;
    eventually(|| gateway.shared.readiness().ready).await;
    gateway.register(0..60).await;
    let mut migration = PgConnection::connect(database.expose()).await.unwrap();
    let lock = "BEGIN; LOCK TABLE devices IN ACCESS EXCLUSIVE MODE";
    sqlx::raw_sql(lock).execute(&mut migration).await.unwrap();

    let attempts = gateway.connect_all(&devices(0..60)).await;

    for attempt in &attempts {
        assert_sent_away(attempt);
        assert!(attempt.took < ANSWER_MAX, "answered after {:?}", attempt.took);
    }
    assert_refused_at_once(&gateway.connect_all(&devices(0..60)).await);
    migration.close().await.unwrap();
    assert_eq!(persist_all(gateway.devices, devices(0..60)).await.len(), 60);
}

#[tokio::test(flavor = "multi_thread")]
async fn device_verified_after_the_drain_began_is_not_let_in() {
    let cluster = Cluster::start().unwrap();
    let url = cluster.database().await.unwrap();
    let gateway = Gateway::start_on(Some(&url), "").await;
    eventually(|| gateway.shared.readiness().ready).await;
    gateway.register(0..1).await;
    drop(gateway.session(&device(0)).await);
    eventually(|| gateway.shared.sessions.is_empty()).await;
    cluster.freeze().unwrap();

    let waiting = tokio::spawn(attempt(gateway.devices, device(0)));
    eventually(|| gateway.shared.lookups.state().in_flight == 1).await;
    let order = DrainOrder {
        rate_per_second: None,
        announce: Duration::ZERO,
        deadline: Duration::from_secs(60),
    };
    gateway.shared.departures.start_drain(order).unwrap();
    eventually(|| gateway.shared.departures.drain_status().state == DrainState::Drained).await;
    cluster.thaw().unwrap();

    waiting.await.unwrap().refused_with(503, "draining");
    assert!(gateway.shared.sessions.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn frozen_database_does_not_hold_the_end_up() {
    let cluster = Cluster::start().unwrap();
    let url = cluster.database().await.unwrap();
    let store = Store::open(&url).await.unwrap();
    store.ready().await;
    register(&store, 0..2).await;
    let start = move || GatewayProcess::start(&["--database", url.expose()]);
    let mut process = spawn_blocking(start).await.unwrap().unwrap();
    let address = process.addresses.devices;
    let mut session = persist(address, device(0)).await.connection;
    cluster.freeze().unwrap();
    let waiting = tokio::spawn(attempt(address, device(1)));

    process.signal(Signal::TERM).unwrap();

    assert_eq!(end_of(&mut session, PATIENCE).await.1, 1012);
    assert_sent_away_or_draining(&waiting.await.unwrap());
    let status = spawn_blocking(move || process.wait(END_MAX)).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(0));
}

#[track_caller]
fn assert_sent_away_or_draining(attempt: &Attempt) {
    let refused = attempt.refused();
    assert_eq!(refused.status, 503, "{refused:?}");
    assert!(refused.retry_after_ms.is_some(), "{refused:?}");
}

async fn survive(hurt: fn(&Cluster), heal: fn(&Cluster)) {
    let cluster = Cluster::start().unwrap();
    let url = cluster.database().await.unwrap();
    let gateway = Gateway::start_on(Some(&url), "").await;
    eventually(|| gateway.shared.readiness().ready).await;
    gateway.register(LIVE.start..ARRIVING.end).await;
    gateway.add_rule(block("=6.6.6")).await;
    let mut live = gateway.sessions(&devices(LIVE)).await;
    let backends_before = backends_in_use(&gateway, &cluster, &url, UNKNOWN).await;

    // During the arrivals.
    let admitted = Arc::new(AtomicU32::new(0));
    let arrivals = arrive(&gateway, &admitted);
    eventually(|| admitted.load(Ordering::Relaxed) >= HURT_AFTER).await;
    hurt(&cluster);
    let attempts = arrivals.join_all().await;
    for (_, attempt) in &attempts {
        assert!(attempt.took < ANSWER_MAX, "answered after {:?}", attempt.took);
        if attempt.outcome.is_err() {
            assert_sent_away(attempt);
        }
    }
    let mut attempts_made = LIVE.len() + 2 * AT_ONCE as usize + ARRIVING.len();

    // Once the outage is known.
    eventually(|| is_said_to_be_away(&gateway)).await;
    let refused_once = gateway.connect_all(&devices(20..120)).await;
    assert_refused_at_once(&refused_once);
    attempts_made += refused_once.len();
    let blocked = gateway.connect(&device(20).firmware("6.6.6")).await;
    blocked.refused_with(403, "firmware_blocked");
    let mut anonymous = device(21);
    anonymous.credential = Credential::Missing;
    gateway.connect(&anonymous).await.refused_with(401, "unauthorized");
    attempts_made += 2;
    for connection in &mut live {
        assert_alive(connection).await;
    }
    assert_eq!(
        gateway.readyz().await,
        200,
        "a database lost later moves no device to other nodes"
    );

    for operation in ["lookup", "rules"] {
        let failed = format!("seawall_database_errors_total{{operation=\"{operation}\"}}");
        eventually(|| gateway.metric(&failed) > 0).await;
    }

    // After the outage.
    heal(&cluster);
    let (connected, waiting): (Vec<_>, Vec<_>) = attempts.into_iter().partition(|(_, attempt)| attempt.outcome.is_ok());
    assert!(!waiting.is_empty(), "the outage was not noticed");
    let mut connected: Vec<_> = connected.into_iter().map(|(_, attempt)| attempt.admitted()).collect();
    let returning = waiting.into_iter().map(|(mut device, attempt)| {
        device.slot = attempt.refused().slot.clone();
        device
    });
    for returned in persist_all(gateway.devices, returning).await {
        attempts_made += 1 + returned.refusals as usize;
        connected.push(returned.connection);
    }
    for connection in live.iter_mut().chain(&mut connected) {
        assert_alive(connection).await;
    }
    assert_eq!(gateway.shared.sessions.len(), LIVE.len() + ARRIVING.len());
    assert_eq!(gateway.metric("seawall_handshakes_total{") as usize, attempts_made);
    eventually(|| gateway.shared.readiness().reasons.is_empty()).await;
    let backends = backends_in_use(&gateway, &cluster, &url, UNKNOWN + 2 * AT_ONCE).await;
    assert!(
        backends <= backends_before.max(BACKENDS_MAX),
        "{backends} connections to the database, {backends_before} before"
    );
}

/// Number of connections that a gateway holds after it has used all of them, and has become idle.
async fn backends_in_use(gateway: &Gateway, cluster: &Cluster, url: &DatabaseUrl, first: u32) -> i64 {
    let mut migration = PgConnection::connect(url.expose()).await.unwrap();
    let lock = "BEGIN; LOCK TABLE devices IN ACCESS EXCLUSIVE MODE";
    sqlx::raw_sql(lock).execute(&mut migration).await.unwrap();
    let mut waiting = JoinSet::new();
    for number in 0..AT_ONCE {
        // One after the other: those that already wait are in statements of their own.
        tokio::time::sleep(TABLE_LOCKED_FOR / AT_ONCE).await;
        let (address, store) = (gateway.devices, gateway.shared.store.clone());
        waiting.spawn(async move {
            let unknown = attempt(address, device(first + number)).await;
            assert!(unknown.outcome.is_err());
        });
        waiting.spawn(async move { assert!(store.device(id(number)).await.unwrap().is_some()) });
    }
    migration.close().await.unwrap();
    waiting.join_all().await;
    // Workers take turns: each has its connection after a few statements.
    for number in AT_ONCE..2 * AT_ONCE {
        let unknown = attempt(gateway.devices, device(first + number)).await;
        assert!(unknown.outcome.is_err());
    }
    // The connection that held the lock may take a moment to close.
    let mut counted = cluster.backends("test_0").await.unwrap();
    loop {
        tokio::time::sleep(SETTLED_AFTER).await;
        let again = cluster.backends("test_0").await.unwrap();
        if again == counted {
            return counted;
        }
        counted = again;
    }
}

/// Attempts spread over time, independent of each other. `admitted` counts the admitted ones. They end in any order.
fn arrive(gateway: &Gateway, admitted: &Arc<AtomicU32>) -> JoinSet<(DeviceConfig, Attempt)> {
    let mut arrivals = JoinSet::new();
    let mut due = Instant::now();
    for device in devices(ARRIVING) {
        let (address, admitted) = (gateway.devices, Arc::clone(admitted));
        arrivals.spawn(async move {
            sleep_until(due).await;
            let attempt = attempt(address, device.clone()).await;
            admitted.fetch_add(u32::from(attempt.outcome.is_ok()), Ordering::Relaxed);
            (device, attempt)
        });
        due += ARRIVAL_INTERVAL;
    }
    arrivals
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_that_leave_while_they_wait_are_counted_as_abandoned() {
    let cluster = Cluster::start().unwrap();
    let url = cluster.database().await.unwrap();
    let gateway = Gateway::start_on(Some(&url), "").await;
    eventually(|| gateway.shared.readiness().ready).await;
    gateway.register(0..10).await;
    cluster.freeze().unwrap();

    let waiting: Vec<_> = devices(0..10)
        .into_iter()
        .map(|device| tokio::spawn(attempt(gateway.devices, device)))
        .collect();
    eventually(|| gateway.shared.lookups.state().queue == 10).await;
    for task in &waiting {
        task.abort();
    }

    eventually(|| gateway.metric("seawall_handshakes_total{outcome=\"abandoned\"}") == 10).await;
    eventually(|| gateway.metric("seawall_admission_queue ") == 0).await;
    assert_eq!(gateway.metric("seawall_handshakes_total{"), 10);
    cluster.thaw().unwrap();
    drop(TcpStream::connect(gateway.devices).await.unwrap());
    persist_all(gateway.devices, devices(0..1)).await;
    assert_eq!(gateway.metric("seawall_handshakes_total{outcome=\"abandoned\"}"), 10);
}

/// Asserts that all are refused as devices that cannot be verified now, with a slot, at once.
#[track_caller]
fn assert_refused_at_once(attempts: &[Attempt]) {
    for attempt in attempts {
        attempt.refused_with(503, "registry_unavailable");
        assert_sent_away(attempt);
        assert!(attempt.took < ANSWER_MAX_AWAY, "answered after {:?}", attempt.took);
    }
}

#[track_caller]
fn assert_sent_away(attempt: &Attempt) {
    let refused = attempt.refused();
    assert_eq!(refused.status, 503, "{refused:?}");
    assert!(
        matches!(refused.code.as_deref(), Some("registry_unavailable" | "overloaded")),
        "{refused:?}"
    );
    assert!(
        refused.slot.is_some() && refused.retry_after_ms.is_some(),
        "{refused:?}"
    );
}

#[tokio::test]
async fn node_that_has_just_become_ready_sends_nobody_away() {
    let url = pg::shared().database().await.unwrap();
    for _ in 0..10 {
        let gateway = Gateway::start_on(Some(&url), "").await;
        let ready = async {
            while !gateway.shared.readiness().ready {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, ready).await.unwrap();

        assert_eq!(gateway.shared.lookups.state().breaker, BreakerState::Closed);
    }
}
