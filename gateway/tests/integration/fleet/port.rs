//! Several gateways on one address (`server.share_port`).

use std::{net::IpAddr, ops::Range};

use firmware_sim::connection::{Connection, DeviceConfig};
use seawall_gateway::runtime::config::DatabaseUrl;

use crate::harness::{devices::devices, gateway::Gateway, pg, wait::eventually};

/// Maximum number of connections of each gateway.
const CONNECTIONS_MAX: usize = 20;
/// Devices with different addresses, because one address must not fill a gateway alone.
fn devices_apart(numbers: Range<u32>) -> Vec<DeviceConfig> {
    let mut apart = devices(numbers);
    for (number, device) in (1..).zip(&mut apart) {
        device.source = Some(IpAddr::from([127, 0, 1, number]));
    }
    apart
}

async fn start(url: &DatabaseUrl, listen: &str) -> Gateway {
    let settings =
        format!("[server]\nshare_port = true\nlisten = \"{listen}\"\n[limits]\nconnections_max = {CONNECTIONS_MAX}\n");
    let gateway = Gateway::start_on(Some(url), &settings).await;
    eventually(|| gateway.shared.readiness().ready).await;
    gateway
}

/// A full gateway and an empty one on the same address.
async fn full_and_empty() -> (Gateway, Gateway, Vec<Connection>) {
    let url = pg::shared().database().await.unwrap();
    let first = start(&url, "127.0.0.1:0").await;
    first.register(0..100).await;
    let live = first.sessions(&devices_apart(0..20)).await;
    let second = start(&url, &first.devices.to_string()).await;
    assert_eq!(first.devices, second.devices);
    // It was the last one there, and checks again when another gateway starts.
    eventually(|| {
        drop(std::net::TcpStream::connect(first.devices));
        first.metric("seawall_listening") == 0
    })
    .await;
    (first, second, live)
}

fn held(gateway: &Gateway) -> usize {
    gateway.shared.sessions.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn full_gateway_leaves_its_address_to_the_other_and_comes_back_when_it_has_room() {
    let (first, second, live) = full_and_empty().await;

    // All are admitted at their first attempt.
    let others = second.sessions(&devices_apart(20..38)).await;

    assert_eq!((held(&first), held(&second)), (live.len(), others.len()));
    drop(live);
    eventually(|| held(&first) == 0 && first.metric("seawall_listening") == 1).await;
    drop(others);
    eventually(|| held(&second) == 0).await;
    let again = second.sessions(&devices_apart(40..58)).await;
    assert_eq!(held(&first) + held(&second), again.len());
    assert!(held(&first) > 0, "the kernel spreads them");
}

#[tokio::test(flavor = "multi_thread")]
async fn where_all_gateways_of_an_address_are_full_devices_are_told_when_to_come_back() {
    let (first, second, _live) = full_and_empty().await;

    let _others = second.sessions(&devices_apart(20..40)).await;

    // The second one is the last, and keeps listening, except for an instant every few seconds.
    let mut told = 0;
    for device in devices_apart(40..100) {
        if let Err(error) = second.connect(&device).await.outcome
            && let Some(refused) = error.refused()
        {
            assert_eq!((refused.status, refused.code.as_deref()), (503, Some("overloaded")));
            assert!(refused.slot.is_some());
            told += 1;
        }
    }
    assert!(told >= 58, "{told} of 60");
    assert_eq!(held(&first) + held(&second), 40);
}
