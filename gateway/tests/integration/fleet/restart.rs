//! A planned restart of a real gateway, and the time for which its devices are offline.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use firmware_sim::{
    connection::{Connection, Credential, DeviceConfig},
    fleet::{Fleet, FleetConfig},
    identity::Identity,
    mix::Mix,
};
use rustix::process::Signal;
use serde_json::json;
use tokio::task::{JoinSet, spawn_blocking};

use crate::{
    harness::{
        devices::{attempt, device, devices, end_of, plain},
        process::GatewayProcess,
        wait::{PATIENCE, eventually},
    },
    scarce::import,
};

/// Address that only the gateways of this test use.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 10, 1, 1);
/// Devices with `seawall.v1`: they return with a resume token.
const V1: u32 = 100;
/// Devices with plain sessions: they return with only a slot.
const PLAIN: u32 = 100;
/// Time from SIGTERM to the start of the next process.
const NEXT_START: Duration = Duration::from_secs(2);
/// Maximum time from SIGTERM to the return of the last device.
const BACK_MAX: Duration = Duration::from_secs(4);
/// Maximum number of restarts until one is fast enough: the machine may be busy with other tests.
const RESTARTS_MAX: usize = 3;
/// Wait of a plain device if no gateway listens.
const RETRY: Duration = Duration::from_millis(20);

#[tokio::test(flavor = "multi_thread")]
async fn small_fleet_is_back_four_seconds_after_sigterm() {
    let started = spawn_blocking(|| {
        let gateway = GatewayProcess::start_at(ADDRESS).unwrap();
        import(&gateway, 0..V1 + PLAIN);
        gateway
    });
    let mut gateway = started.await.unwrap();
    let fleet = fleet_of(&gateway).await;
    let mut plain_ones = Vec::new();
    for number in V1..V1 + PLAIN {
        let session = attempt(gateway.addresses.devices, plain(device(number))).await;
        plain_ones.push((number, session.admitted()));
    }
    eventually(|| fleet.stats().total().connected == u64::from(V1)).await;

    let mut times = Vec::new();
    while times.last().is_none_or(|took| *took > BACK_MAX) {
        assert!(times.len() < RESTARTS_MAX, "all were back after {times:?}");
        let returned = fleet.stats().total().reconnects + u64::from(V1);
        let begun = Instant::now();
        gateway.signal(Signal::TERM).unwrap();
        let address = gateway.addresses.devices;
        let next = spawn_blocking(move || next_of(gateway, begun));
        let mut returns = JoinSet::new();
        for (number, session) in plain_ones {
            returns.spawn(async move { (number, comes_back(address, session, plain(device(number))).await) });
        }
        plain_ones = returns.join_all().await;
        eventually(|| fleet.stats().total().reconnects == returned).await;
        times.push(begun.elapsed());

        gateway = next.await.unwrap();
        let v1 = fleet.stats().total();
        assert_eq!(v1.refusals(), 0, "{v1:?}");
        assert_eq!(v1.closed.keys().collect::<Vec<_>>(), ["1012"]);
        assert_eq!(gateway.metric("seawall_sessions ").unwrap(), u64::from(V1 + PLAIN));
    }
    fleet.stop().await;
}

/// The next process. The previous one must have ended before it starts.
fn next_of(mut gateway: GatewayProcess, begun: Instant) -> GatewayProcess {
    let status = gateway.wait(NEXT_START).unwrap();
    assert_eq!(status.code(), Some(0), "{}", gateway.log().unwrap());
    std::thread::sleep(NEXT_START.saturating_sub(begun.elapsed()));
    gateway.start_next().unwrap()
}

/// Returns at the time of the close, and is admitted at the first answered attempt.
async fn comes_back(address: SocketAddr, mut session: Connection, mut device: DeviceConfig) -> Connection {
    let (_, code, reason) = end_of(&mut session, PATIENCE).await;
    assert_eq!((code, &reason["reason"]), (1012, &json!("draining")));
    device.slot = Some(reason["slot"].as_str().unwrap().to_owned());
    tokio::time::sleep(Duration::from_millis(reason["retry_after_ms"].as_u64().unwrap())).await;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt(address, device.clone()).await.outcome {
            Ok(session) => return session,
            Err(error) => {
                assert!(error.refused().is_none(), "{error:?}");
                assert!(Instant::now() < deadline, "{error:?}");
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Well-behaved devices with the first numbers.
async fn fleet_of(gateway: &GatewayProcess) -> Fleet {
    let identities = devices(0..V1).into_iter().map(|device| {
        let Credential::Bearer(secret) = device.credential else {
            panic!("a device of the rig has a secret");
        };
        Identity {
            id: device.id,
            external_id: None,
            secret,
            tenant: None,
            model: None,
        }
    });
    let url = format!("ws://{}", gateway.addresses.devices);
    let config = FleetConfig::new(&url, identities.collect(), Mix::all("1.0.0"));
    Fleet::start(config).await.unwrap()
}
