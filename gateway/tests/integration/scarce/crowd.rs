//! Many devices behind one address, on real sockets: a mobile network, a factory, a load balancer that hides addresses.

use std::{fs, time::Instant};

use tokio::task::{JoinSet, spawn_blocking};

use super::{super::harness::process::GatewayProcess, disk::import};
use crate::harness::{
    devices::{assert_alive, device, persist},
    skip::skip,
};

/// Devices that connect from one address, as behind a NAT or a load balancer.
const DEVICES: u32 = 15_000;
/// Open files that this needs here and in the gateway.
const FILES_NEEDED: u64 = 18_000;
/// Devices that connect at the same time.
const AT_A_TIME: usize = 500;

#[tokio::test(flavor = "multi_thread")]
async fn fifteen_thousand_devices_behind_one_address_connect() {
    let _files = super::MANY_FILES.lock().await;
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    if files.maximum.is_some_and(|files| files < FILES_NEEDED) {
        skip(&format!(
            "{DEVICES} devices need {FILES_NEEDED} open files, and the hard limit is {files:?}"
        ));
        return;
    }
    let raised = rustix::process::Rlimit {
        current: files.maximum,
        maximum: files.maximum,
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    let gateway = spawn_blocking(|| GatewayProcess::start(&[])).await.unwrap().unwrap();
    import(&gateway, 0..DEVICES);
    let address = gateway.addresses.devices;

    let begun = Instant::now();
    let mut connecting = JoinSet::new();
    let mut live = Vec::new();
    for number in 0..DEVICES {
        if connecting.len() == AT_A_TIME {
            live.push(connecting.join_next().await.unwrap().unwrap());
        }
        connecting.spawn(persist(address, device(number)));
    }
    live.extend(connecting.join_all().await);
    println!("{DEVICES} devices connected in {:?}", begun.elapsed());

    assert_eq!(gateway.metric("seawall_sessions ").unwrap(), u64::from(DEVICES));
    assert_eq!(
        gateway
            .metric("seawall_handshakes_total{outcome=\"throttled\"}")
            .unwrap(),
        0
    );
    assert_eq!(
        gateway
            .metric("seawall_connections_total{outcome=\"address_limited\"}")
            .unwrap(),
        0
    );
    let (first, last) = (0, live.len() - 1);
    assert_alive(&mut live[first].connection).await;
    assert_alive(&mut live[last].connection).await;
    assert!(
        fs::read_dir(format!("/proc/{}/fd", gateway.pid().unwrap().as_raw_nonzero()))
            .unwrap()
            .count()
            > DEVICES as usize
    );
}
