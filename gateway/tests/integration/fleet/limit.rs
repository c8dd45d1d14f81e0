//! The limit on look-ups on real databases, and what is remembered of their capacity.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use seawall_gateway::{config::DatabaseUrl, lookup::LookUp};
use seawall_proto::{
    admission::{AdmissionState, Arrival, CohortTag},
    id::{Network, Proof},
    rules::OwnedSubject,
};
use tokio::task::JoinSet;

use super::rig::{Gateway, id};
use crate::harness::pg::Cluster;

const DEVICES: u32 = 1_000;
/// Devices that want to be looked up at any time.
const WAITING: u32 = 600;
const STORM: Duration = Duration::from_secs(4);
/// How admission is after a storm, and keys a statement in it.
async fn storm(gateway: &Gateway) -> (AdmissionState, f64) {
    let end = Instant::now() + STORM;
    let mut tasks = JoinSet::new();
    for first in 0..WAITING {
        let shared = Arc::clone(&gateway.shared);
        tasks.spawn(async move {
            let (mut number, mut found) = (first, 0_u32);
            while Instant::now() < end {
                number = (number + WAITING) % DEVICES;
                let arrival = Arrival {
                    device: id(number),
                    cohort: CohortTag::of(None, None),
                    slot_token: None,
                    arrived: shared.clock.now(),
                    is_known_absent: false,
                    proof: Proof::Secret,
                    network: Network::V4(1),
                };
                match shared.gate.look_up(arrival, OwnedSubject::default()).await {
                    LookUp::Found(_) => found += 1,
                    LookUp::Refused(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                    LookUp::Absent | LookUp::Blocked(_) => panic!("it is registered, and no rule is in force"),
                }
            }
            found
        });
    }
    let found: u32 = tasks.join_all().await.into_iter().sum();
    let state = gateway.shared.gate.state();
    let statements = gateway.metric("seawall_lookup_statements_total");
    println!("{statements} statements, {found} found, {state:?}");
    (state, f64::from(found) / statements as f64)
}

async fn keeps_its_limit(database: Option<&DatabaseUrl>) {
    let gateway = Gateway::start_on(database, "").await;
    gateway.register(0..DEVICES).await;

    let (state, keys_a_statement) = storm(&gateway).await;

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
    // So few in flight that devices wait, whatever the machine.
    let gateway = Gateway::start("[admission]\nkeys_in_flight_max = 4\n").await;
    gateway.register(0..DEVICES).await;
    let (before, _) = storm(&gateway).await;
    assert!(before.rate > 0.0 && before.k_peak >= before.rate * 0.9, "{before:?}");
    assert!(before.limit_ceiling == 4 && before.limit <= 4, "{before:?}");

    let after = gateway.restart_on(None).await.shared.gate.state();

    assert!(
        after.k_last_known_good >= 0.9 * before.k_peak,
        "{after:?} after {before:?}"
    );
}
