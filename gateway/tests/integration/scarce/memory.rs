//! Memory that is short: new devices are sent away with slots, those who are there stay, and the kernel has nobody to kill.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use firmware_sim::{
    connection::{Connection, OpenError},
    tls::Trust,
};
use seawall_gateway::memory::{Group, Sources};
use seawall_proto::memory::DEVICE_BYTES;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::{JoinSet, spawn_blocking},
    time::{sleep, timeout},
};

use super::{
    super::{
        fleet::rig::{PATIENCE, assert_alive, attempt, device, eventually},
        harness::{authority::Authority, group::MemoryGroup, process::GatewayProcess},
        wire::{
            raw::{Device, ask, request},
            rig::Gateway,
        },
    },
    disk::import,
};

const MIB: u64 = 1 << 20;

/// Writes what the kernel would, of a group that may have 1,000 MiB.
fn uses(folder: &Path, mib: u64) {
    fs::write(folder.join("memory.max"), (1_000 * MIB).to_string()).unwrap();
    fs::write(folder.join("memory.current"), ((mib + 300) * MIB).to_string()).unwrap();
    fs::write(folder.join("memory.stat"), format!("inactive_file {}\n", 300 * MIB)).unwrap();
}

#[tokio::test]
async fn node_near_its_memory_sends_newcomers_away_with_slots_and_takes_them_again() {
    let counters = tempfile::tempdir().unwrap();
    uses(counters.path(), 100);
    let groups = Group::around("0::/\n", counters.path());
    let gateway = Gateway::start_with(Sources::of(groups, 0, 1 << 40), "").await;
    let (first, second) = (gateway.device_lines().await, gateway.device_lines().await);
    let memory = &gateway.shared.memory;
    memory.look(0);
    let mut live = Device::connect(gateway.devices, &[&first]).await;

    uses(counters.path(), 901);
    memory.look(1);
    let refused = ask(gateway.devices, request(&[&second]).as_bytes()).await;

    assert_eq!((refused.status, refused.code().as_str()), (503, "overloaded"));
    assert!(refused.header("Seawall-Slot").is_some(), "{refused:?}");
    let after_ms: u64 = refused.header("Seawall-Retry-After-Ms").unwrap().parse().unwrap();
    assert!((30_000..=600_000).contains(&after_ms), "{after_ms}");
    let readiness = gateway.shared.readiness();
    assert!(
        readiness.ready && readiness.reasons == ["memory_short"],
        "{readiness:?}"
    );
    assert_eq!(gateway.metric("seawall_memory_refusals_total"), 1.0);
    live.send(0x89, b"there").await;
    assert_eq!(live.frame().await.payload, b"there");

    // Five percent more have to be free.
    uses(counters.path(), 860);
    memory.look(1);
    assert_eq!(ask(gateway.devices, request(&[&second]).as_bytes()).await.status, 503);
    uses(counters.path(), 840);
    memory.look(1);
    Device::connect(gateway.devices, &[&second]).await;
    assert!(gateway.shared.readiness().reasons.is_empty());
}

/// The kernel's figures where so many more devices fit.
fn leaves_room_for(folder: &Path, devices: u64) {
    uses(folder, 0);
    let used = 900 * MIB - devices * DEVICE_BYTES;
    fs::write(folder.join("memory.current"), (used + 300 * MIB).to_string()).unwrap();
}

#[tokio::test]
async fn nobody_is_looked_up_who_does_not_fit_and_who_does_not_stay_gives_the_room_back() {
    let counters = tempfile::tempdir().unwrap();
    leaves_room_for(counters.path(), 1);
    let groups = Group::around("0::/\n", counters.path());
    let gateway = Gateway::start_with(Sources::of(groups, 0, 1 << 40), "").await;
    let mut lines = Vec::new();
    for _ in 0..8 {
        lines.push(gateway.device_lines().await);
    }
    gateway.shared.memory.look(0);
    let stranger = "Seawall-Device: 00000000-0000-4000-8000-000000000001\r\nAuthorization: Bearer nobody";
    assert_eq!(ask(gateway.devices, request(&[stranger]).as_bytes()).await.status, 401);
    assert_eq!(gateway.shared.memory.room(), 1);
    let looked_up = || gateway.metric("seawall_lookups_total{outcome=\"found\"}");

    let mut asking: JoinSet<u16> = JoinSet::new();
    for line in &lines[1..] {
        let (address, request) = (gateway.devices, request(&[line]));
        asking.spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut status = [0; 12];
            stream.read_exact(&mut status).await.unwrap();
            std::str::from_utf8(&status[9..]).unwrap().parse().unwrap()
        });
    }
    let mut statuses = asking.join_all().await;
    statuses.sort_unstable();

    assert_eq!(statuses, [101, 503, 503, 503, 503, 503, 503]);
    assert_eq!(looked_up(), 1.0);
}

#[tokio::test]
async fn strangers_who_wait_leave_room_for_devices_that_are_known() {
    let counters = tempfile::tempdir().unwrap();
    leaves_room_for(counters.path(), 4);
    let groups = Group::around("0::/\n", counters.path());
    let gateway = Gateway::start_with(Sources::of(groups, 0, 1 << 40), "").await;
    let known = gateway.device_lines().await;
    drop(Device::connect(gateway.devices, &[&known]).await);
    eventually(|| gateway.shared.sessions.is_empty()).await;
    gateway.shared.memory.look(0);

    // Two that wait for their look-ups.
    let waiting: Vec<_> = (0..2).filter_map(|_| gateway.shared.memory.take()).collect();
    let stranger = "Seawall-Device: 00000000-0000-4000-8000-000000000001\r\nAuthorization: Bearer nobody";
    let refused = ask(gateway.devices, request(&[stranger]).as_bytes()).await;

    assert_eq!((waiting.len(), refused.status), (2, 503), "{refused:?}");
    Device::connect(gateway.devices, &[&known]).await;
    drop(waiting);
    assert_eq!(ask(gateway.devices, request(&[stranger]).as_bytes()).await.status, 401);
}

#[tokio::test]
async fn only_so_many_claim_to_replace_a_session_at_a_time() {
    let memory = std::sync::Arc::new(seawall_gateway::memory::Memory::default());

    let claims: Vec<_> = (0..1_000).filter_map(|_| memory.take_to_replace()).collect();

    assert_eq!(claims.len(), 128);
    drop(claims);
    assert!(memory.take_to_replace().is_some());
}

#[tokio::test]
async fn device_that_is_online_replaces_its_session_on_a_full_node() {
    let counters = tempfile::tempdir().unwrap();
    uses(counters.path(), 100);
    let groups = Group::around("0::/\n", counters.path());
    let gateway = Gateway::start_with(Sources::of(groups, 0, 1 << 40), "").await;
    let (online, offline) = (gateway.device_lines().await, gateway.device_lines().await);
    let _before = Device::connect(gateway.devices, &[&online]).await;

    uses(counters.path(), 950);
    gateway.shared.memory.look(1);

    assert_eq!(ask(gateway.devices, request(&[&offline]).as_bytes()).await.status, 503);
    Device::connect(gateway.devices, &[&online]).await;
    assert_eq!(gateway.metric("seawall_session_replacements_total"), 1.0);
}

/// What the issue asks for: a group of 128 MB, and more devices than fit.
const GROUP_BYTES: u64 = 128 * MIB;
const DEVICES: u32 = 15_000;
/// Devices that connect at the same time.
const AT_A_TIME: usize = 500;
/// Fewest that must fit: 8,200 to 10,000 were measured.
const FITTING_MIN: usize = 7_000;
/// The same right after all have left, while what they took is still on its way back to the system: 2,700 to 8,000 were measured, the fewer
/// the more the machine has to do besides. Those refused come back half a minute later.
const FITTING_AGAIN_MIN: usize = 1_000;
const FILES_NEEDED: u64 = 18_000;

#[tokio::test(flavor = "multi_thread")]
async fn fifteen_thousand_devices_and_a_storm_do_not_kill_a_node_of_128_megabytes() {
    let _files = super::MANY_FILES.lock().await;
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    if files.maximum.is_some_and(|files| files < FILES_NEEDED) {
        eprintln!("SKIPPED: {DEVICES} devices need {FILES_NEEDED} open files, and the hard limit is {files:?}");
        return;
    }
    raise_files();
    let Some(group) = MemoryGroup::of(GROUP_BYTES) else {
        eprintln!("SKIPPED: this machine allows no memory cgroup of one's own; only faked counters were tried");
        return;
    };
    let folder = group.folder.clone();
    let gateway = spawn_blocking(move || GatewayProcess::start_in_group(&folder, &[]))
        .await
        .unwrap()
        .unwrap();
    import(&gateway, 0..DEVICES);

    let url = format!("ws://{}", gateway.addresses.devices);
    let begun = Instant::now();
    let mut live = come_all(&url, &Trust::default(), DEVICES).await;
    let first = live.len();
    // The storm: every device leaves and comes back, and those who did not fit come with them.
    live.clear();
    let mut live = come_all(&url, &Trust::default(), DEVICES).await;

    let (fitted, at_most) = (
        live.len(),
        gateway.metric("seawall_memory_bytes{kind=\"limit\"}").unwrap(),
    );
    println!(
        "{first} of {DEVICES} fitted, {fitted} after the storm, in {:?}",
        begun.elapsed()
    );
    assert_eq!(group.kills(), 0);
    assert_eq!(at_most, GROUP_BYTES);
    assert!(first >= FITTING_MIN && fitted >= FITTING_AGAIN_MIN, "{first}, {fitted}");
    for index in [0, fitted / 2, fitted - 1] {
        assert_alive(&mut live[index]).await;
    }
    drop(live);
    // It recovers.
    eventually(|| gateway.metric("seawall_sessions ").unwrap() == 0).await;
    eventually(|| gateway.metric("seawall_memory_alarm").unwrap() == 0).await;
    let back = async {
        // What was measured last may be of before.
        while attempt(gateway.addresses.devices, device(1)).await.outcome.is_err() {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, back).await.unwrap();
    drop(gateway);
}

/// Devices over TLS, of which not all fit, and handshakes that are begun and left.
const TLS_DEVICES: u32 = 12_000;
const BEGUN: usize = 3_000;
/// Fewest that must fit over TLS: 8,600 were measured.
const TLS_FITTING_MIN: usize = 6_500;

#[tokio::test(flavor = "multi_thread")]
async fn handshakes_without_end_do_not_kill_a_node_that_is_full() {
    let _files = super::MANY_FILES.lock().await;
    let Some(group) = MemoryGroup::of(GROUP_BYTES) else {
        eprintln!("SKIPPED: this machine allows no memory cgroup of one's own");
        return;
    };
    raise_files();
    let mut authority = Authority::new();
    let settings = authority.settings();
    let config = authority.write("seawall.toml", &settings);
    let folder = group.folder.clone();
    let gateway =
        spawn_blocking(move || GatewayProcess::start_in_group(&folder, &["--config", config.to_str().unwrap()]))
            .await
            .unwrap()
            .unwrap();
    import(&gateway, 0..TLS_DEVICES);
    let url = format!("wss://{}", gateway.addresses.devices);
    let trust = Trust::File(authority.path("ca.pem"));
    let mut live = come_all(&url, &trust, TLS_DEVICES).await;

    // The head of a hello that never comes to its end, as much of it as is taken.
    let hello = [&[0x16, 3, 1, 0x1f, 0, 1, 0, 0xea, 0x60][..], &[0; 7_900]].concat();
    let mut begun = Vec::new();
    for _ in 0..BEGUN {
        // A connection for which there is no room in the backlog would wait for seconds.
        let connecting = timeout(
            Duration::from_millis(100),
            TcpStream::connect(gateway.addresses.devices),
        );
        if let Ok(Ok(mut stream)) = connecting.await {
            let _ = timeout(Duration::from_millis(100), stream.write_all(&hello)).await;
            begun.push(stream);
        }
    }
    let used = gateway.metric("seawall_memory_bytes{kind=\"used\"}").unwrap();

    println!(
        "{} of {TLS_DEVICES} fitted, {} handshakes begun, {} MiB used",
        live.len(),
        begun.len(),
        used / MIB
    );
    assert_eq!(group.kills(), 0);
    assert!(live.len() >= TLS_FITTING_MIN, "{}", live.len());
    let last = live.len() - 1;
    assert_alive(&mut live[0]).await;
    assert_alive(&mut live[last]).await;
    drop(gateway);
}

fn raise_files() {
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: files.maximum,
        maximum: files.maximum,
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
}

/// Every device comes once; the sessions of those who fit. The others are told when to come back.
async fn come_all(url: &str, trust: &Trust, devices: u32) -> Vec<Connection> {
    let mut connecting = JoinSet::new();
    let mut live = Vec::new();
    let mut settle = |opened: Result<Connection, OpenError>| match opened {
        Ok(connection) => live.push(connection),
        Err(error) => {
            let refused = error.refused().unwrap_or_else(|| panic!("not answered: {error:?}"));
            assert_eq!(refused.status, 503, "{refused:?}");
            assert!(refused.slot.is_some(), "{refused:?}");
        }
    };
    for number in 0..devices {
        if connecting.len() == AT_A_TIME {
            settle(connecting.join_next().await.unwrap().unwrap());
        }
        let (url, mut config) = (url.to_owned(), device(number));
        config.trust = trust.clone();
        connecting.spawn(async move { Connection::open(&url, &config).await });
    }
    while let Some(opened) = connecting.join_next().await {
        settle(opened.unwrap());
    }
    live
}
