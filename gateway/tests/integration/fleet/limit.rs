//! The limit on lookups with real databases, and the capacity that is kept on disk.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use seawall_gateway::runtime::config::DatabaseUrl;
use seawall_proto::{
    admission::AdmissionState,
    connect::{Attempt, Decision, LookUp},
    id::{Network, SecretHash},
};
use tokio::task::JoinSet;

use crate::harness::{
    devices::{id, secret},
    gateway::Gateway,
    pg::Cluster,
};

const DEVICES: u32 = 1_000;
/// Devices that wait for a lookup at any time.
const WAITING: u32 = 600;
const STORM: Duration = Duration::from_secs(4);
/// Minimum time of a storm whose capacity is kept: four seconds of it must have been measured.
const STORM_MEASURED: Duration = Duration::from_secs(8);

struct Storm {
    /// State of admission afterwards.
    state: AdmissionState,
    statements: f64,
    found: f64,
}

async fn storm(gateway: &Gateway, length: Duration) -> Storm {
    let end = Instant::now() + length;
    let mut tasks = JoinSet::new();
    for first in 0..WAITING {
        let shared = Arc::clone(&gateway.shared);
        tasks.spawn(async move {
            let (mut number, mut found) = (first, 0_u32);
            while Instant::now() < end {
                number = (number + WAITING) % DEVICES;
                let attempt = Attempt {
                    device: id(number),
                    credential: Some(SecretHash::of(secret(number).as_bytes()).into()),
                    firmware: None,
                    model: None,
                    tenant: None,
                    slot: None,
                    resume: None,
                    network: Network::V4(1),
                    arrived: shared.clock.now(),
                };
                let conclusion = shared.lookups.connect(attempt).await;
                match (conclusion.look_up, conclusion.decision) {
                    (Some(LookUp::Found { .. }), Decision::Admitted(_)) => found += 1,
                    (Some(LookUp::Refused(_)), _) => tokio::time::sleep(Duration::from_millis(10)).await,
                    other => panic!("it is registered, and no rule is in force: {other:?}"),
                }
            }
            found
        });
    }
    let found: u32 = tasks.join_all().await.into_iter().sum();
    let state = gateway.shared.lookups.state();
    let statements = gateway.metric("seawall_lookup_statements_total");
    println!("{statements} statements, {found} found, {state:?}");
    Storm {
        state,
        statements: statements as f64,
        found: f64::from(found),
    }
}

async fn keeps_its_limit(database: Option<&DatabaseUrl>) {
    let gateway = Gateway::start_on(database, "").await;
    gateway.register(0..DEVICES).await;

    let storm = storm(&gateway, STORM).await;

    let (state, keys_a_statement) = (storm.state, storm.found / storm.statements);
    assert!(state.limit >= 16, "a healthy database: {state:?}");
    assert!(keys_a_statement >= 8.0, "{keys_a_statement}");
}

#[tokio::test(flavor = "multi_thread")]
async fn storm_on_sqlite_keeps_a_limit_that_fills_statements() {
    keeps_its_limit(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn storm_on_postgres_keeps_a_limit_that_fills_statements() {
    let cluster = Cluster::start().unwrap();
    let url = cluster.database().await.unwrap();

    keeps_its_limit(Some(&url)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn capacity_measured_in_a_storm_is_known_after_a_restart() {
    // Few keys in flight, so that devices wait, and a rate and a queue that never refuse one. So the keys in flight are
    // the only limit on any machine.
    const SETTINGS: &str = "[admission]\nkeys_in_flight_max = 4\nlookups_per_second_max = 1000000\n";
    // Only seconds in which devices wait nearly all the time are measured. On a busy machine they may be too few.
    for is_last in [false, false, true] {
        let gateway = Gateway::start(SETTINGS).await;
        gateway.register(0..DEVICES).await;
        let storm = storm(&gateway, STORM_MEASURED).await;
        let before = storm.state;
        assert!(before.limit_ceiling == 4 && before.limit <= 4, "{before:?}");

        let after = gateway.restart_on(None).await.shared.lookups.state();

        // The best seconds answer at least as many keys as an average second sends statements, which have at least one
        // key each.
        let per_second = storm.statements / STORM_MEASURED.as_secs_f64();
        let is_measured = before.rate > 0.0 && before.k_peak >= per_second;
        let is_known = is_measured && after.k_last_known_good >= 0.9 * before.k_peak;
        assert!(is_known || !is_last, "{after:?} after {before:?}");
        if is_known {
            return;
        }
    }
}
