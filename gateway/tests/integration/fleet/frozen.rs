//! A gateway process that is stopped for a while, by a signal or because its machine sleeps.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use firmware_sim::connection::{Connection, Received};
use rustix::process::Signal;
use serde_json::Value;
use tokio::task::{JoinSet, spawn_blocking};

use crate::{
    harness::{
        devices::{attempt, device, plain},
        process::{GatewayProcess, run},
        wait::eventually,
    },
    scarce::import,
};

/// Half of them use `seawall.v1`.
const DEVICES: u32 = 20;
/// A session is given up after 60 s without a frame at the earliest, whatever the settings.
const FROZEN: Duration = Duration::from_secs(61);
/// Pings that each device answers after the gateway continues.
const PINGS: u32 = 3;

#[tokio::test(flavor = "multi_thread")]
async fn gateway_that_stood_still_closes_no_session_and_shows_nobody_offline() {
    let home = tempfile::tempdir().unwrap();
    let config = home.path().join("seawall.toml");
    fs::write(&config, "[session]\nheartbeat_ms = 1000\n").unwrap();
    let started = spawn_blocking(move || {
        let gateway = GatewayProcess::start(&["--config", config.to_str().unwrap()]).unwrap();
        import(&gateway, 0..DEVICES);
        gateway
    });
    let gateway = started.await.unwrap();
    let pings: Vec<Arc<AtomicU32>> = (0..DEVICES).map(|_| Arc::default()).collect();
    let mut sessions = JoinSet::new();
    for (number, pings) in (0..).zip(&pings) {
        let device = if number % 2 == 0 {
            device(number)
        } else {
            plain(device(number))
        };
        let session = attempt(gateway.addresses.devices, device).await.admitted();
        sessions.spawn(answer_pings(session, Arc::clone(pings)));
    }
    let all_answered = |least: u32| pings.iter().all(|answered| answered.load(Ordering::Relaxed) >= least);
    eventually(|| all_answered(1)).await;

    gateway.signal(Signal::STOP).unwrap();
    tokio::time::sleep(FROZEN).await;
    pings.iter().for_each(|answered| answered.store(0, Ordering::Relaxed));
    gateway.signal(Signal::CONT).unwrap();
    let mut ended = None;
    eventually(|| {
        ended = sessions.try_join_next();
        ended.is_some() || all_answered(PINGS)
    })
    .await;

    assert!(ended.is_none(), "a session ended: {ended:?}");
    assert_eq!(gateway.metric("seawall_closes_total").unwrap(), 0);
    assert_eq!(listed(&gateway, "online"), DEVICES as usize);
    assert_eq!(listed(&gateway, "offline"), 0);
}

/// Answers and counts pings until the session ends. Returns its end.
async fn answer_pings(mut session: Connection, pings: Arc<AtomicU32>) -> Received {
    loop {
        match session.next_frame().await {
            Received::Ping(_) => {
                pings.fetch_add(1, Ordering::Relaxed);
            }
            Received::Text(_) | Received::Binary(_) | Received::Pong(_) => {}
            end @ (Received::Closed { .. } | Received::Lost) => return end,
        }
    }
}

/// Number of devices that operators see in this state.
fn listed(gateway: &GatewayProcess, state: &str) -> usize {
    let output = run(&mut gateway.operator(&["devices", "list", "--state", state, "--json"])).unwrap();
    let page: Value = serde_json::from_slice(&output.stdout).unwrap();
    page["items"].as_array().unwrap().len()
}
