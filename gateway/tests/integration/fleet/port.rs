//! Several gateways on one address (`server.share_port`).

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use firmware_sim::connection::Connection;
use tokio::time::sleep;

use super::rig::{Gateway, PATIENCE, devices, eventually};
use crate::harness::pg;

/// Of each gateway.
const CONNECTIONS_MAX: usize = 20;
/// A gateway that is full tells those who wait already to come back; all of them are let in within this.
const AGAIN_AFTER: Duration = Duration::from_millis(50);

/// Two gateways on one address and one database.
async fn two() -> [Gateway; 2] {
    let url = pg::shared().database().await.unwrap();
    let settings = |listen: &str| {
        format!("[server]\nshare_port = true\nlisten = \"{listen}\"\n[limits]\nconnections_max = {CONNECTIONS_MAX}\n")
    };
    let first = Gateway::start_on(Some(&url), &settings("127.0.0.1:0")).await;
    let second = Gateway::start_on(Some(&url), &settings(&first.devices.to_string())).await;
    assert_eq!(first.devices, second.devices);
    for gateway in [&first, &second] {
        eventually(|| gateway.shared.readiness().ready).await;
    }
    [first, second]
}

fn sessions(gateway: &Gateway) -> usize {
    gateway.shared.sessions.len()
}

/// Sessions of all devices, one after the other: whoever meets a gateway that is full, or has just left, tries again.
async fn connect(gateway: &Gateway, numbers: std::ops::Range<u32>) -> Vec<Connection> {
    let mut live = Vec::new();
    for (number, mut device) in devices(numbers).into_iter().enumerate() {
        // An address of its own each, as none may fill a gateway alone.
        device.source = Some(IpAddr::from([127, 0, 1, 1 + u8::try_from(number).unwrap()]));
        let deadline = Instant::now() + PATIENCE;
        live.push(loop {
            let error = match gateway.connect(&device).await.outcome {
                Ok(connection) => break connection,
                Err(error) => error,
            };
            assert!(Instant::now() < deadline, "not let in by either: {error:?}");
            sleep(AGAIN_AFTER).await;
        });
    }
    live
}

#[tokio::test(flavor = "multi_thread")]
async fn gateways_on_one_address_share_the_devices_and_a_full_one_leaves_them_to_the_other() {
    let [first, second] = two().await;
    first.register(0..40).await;

    let live = connect(&first, 0..38).await;

    assert_eq!(sessions(&first) + sessions(&second), live.len());
    let held = [sessions(&first), sessions(&second)];
    assert!(held.iter().all(|held| (18..=20).contains(held)), "{held:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn gateway_that_was_full_listens_again_once_it_has_room() {
    let [first, second] = two().await;
    first.register(0..80).await;
    let live = connect(&first, 0..40).await;
    eventually(|| sessions(&first) + sessions(&second) == 40).await;
    // Both are full, so that nobody listens.
    assert!(first.connect(&devices(41..42)[0]).await.outcome.is_err());

    drop(live);
    eventually(|| sessions(&first) + sessions(&second) == 0).await;
    let again = connect(&first, 40..72).await;

    assert_eq!(sessions(&first) + sessions(&second), again.len());
    assert!(sessions(&first).min(sessions(&second)) >= 12, "both have devices again");
}
