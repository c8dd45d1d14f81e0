//! Devices that fall silent with open sockets, alone and many at once, and a node that is late. A deadline is at least
//! a minute, whatever the settings.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use firmware_sim::connection::{Connection, DeviceConfig, Received};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use seawall_gateway::fleet::events::{Body, Event};
use seawall_proto::presence::{
    Cause, Evidence, Presence,
    groups::{Block, GRACE, Group},
};
use socket2::Socket;
use tokio::task::{JoinSet, spawn_blocking};

use crate::harness::{
    devices::{attempt, device, id, plain},
    gateway::Gateway,
    skip::skip,
    wait::eventually,
};

const SETTINGS: &str = "[session]\nheartbeat_ms = 1000\n";
/// Time without a byte after which a device is suspect.
const DEADLINE: Duration = Duration::from_secs(60);
/// Time from there to its end, on a node that is well.
const AFTER_DEADLINE: Duration = Duration::from_secs(20);
/// What a point of local health adds to a deadline.
const STRETCH: Duration = Duration::from_secs(5);
/// Maximum wait for what follows a deadline.
const WAIT_MAX: Duration = Duration::from_secs(150);

/// Devices that answer their pings.
const WELL: u32 = 40;
/// Devices of one address block that fall silent.
const BLOCK: std::ops::Range<u32> = 100..125;
/// A device of another block that loses its power.
const DEAD: u32 = 200;

/// Events so far.
fn events(gateway: &Gateway) -> Vec<Arc<Event>> {
    gateway.shared.events.after(0, usize::MAX, usize::MAX).events
}

/// States of `presence_group` so far, each with its group and its members that were held and resolved.
fn group_states(gateway: &Gateway) -> Vec<(&'static str, Group, u32, u32)> {
    let events = events(gateway);
    let mut states = Vec::new();
    for event in events {
        if let Body::PresenceGroup(notice) = &event.body {
            states.push((notice.state, notice.of.clone(), notice.held, notice.resolved));
        }
    }
    states
}

fn presence(gateway: &Gateway, number: u32) -> Presence {
    gateway.shared.history.record(id(number)).unwrap().known.presence
}

/// A device at this address.
fn device_at(number: u32, address: [u8; 4]) -> DeviceConfig {
    DeviceConfig {
        source: Some(IpAddr::from(Ipv4Addr::from(address))),
        ..plain(device(number))
    }
}

/// Answers pings until the session ends.
async fn answer(mut session: Connection) {
    while !matches!(session.next_frame().await, Received::Closed { .. } | Received::Lost) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_block_is_one_event_and_a_dead_device_is_offline() {
    let gateway = Gateway::start(SETTINGS).await;
    gateway.register(0..WELL).await;
    gateway.register(BLOCK).await;
    gateway.register(DEAD..DEAD + 1).await;
    let mut sessions = JoinSet::new();
    for number in 0..WELL {
        let session = gateway.session(&plain(device(number))).await;
        sessions.spawn(answer(session));
    }
    // Nobody reads these: their sockets stay open, and no ping is answered.
    let begun = gateway.shared.observer.now();
    let dead = gateway.session(&device_at(DEAD, [127, 0, 32, 1])).await;
    let mut silent = Vec::new();
    for number in BLOCK {
        let host = u8::try_from(number).unwrap();
        silent.push(gateway.session(&device_at(number, [127, 0, 16, host])).await);
    }
    let newest_of_start = events(&gateway).len();

    let waits = Instant::now();
    let mut worst_health = 0;
    while gateway.shared.sessions.get(id(DEAD)).is_some() || group_states(&gateway).is_empty() {
        worst_health = worst_health.max(gateway.shared.observer.health());
        assert!(waits.elapsed() < WAIT_MAX, "{:?}", gateway.shared.silence.figures());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let took = gateway.shared.observer.now().saturating_since(begun);

    // Alone: offline, with evidence, in time.
    let Presence::Offline(Evidence::Silent { pings_unanswered, .. }) = presence(&gateway, DEAD) else {
        panic!("{:?}", presence(&gateway, DEAD));
    };
    assert!(pings_unanswered >= 2);
    let most = DEADLINE + AFTER_DEADLINE + STRETCH * u32::from(worst_health);
    assert!(DEADLINE <= took && took <= most, "{took:?} of {most:?}");
    // Together: one event, all unknown, all sockets kept.
    let block = Group::AddressBlock(Block::from(IpAddr::from([127, 0, 16, 1])));
    let held = u32::try_from(BLOCK.len()).unwrap();
    assert_eq!(group_states(&gateway), [("held", block.clone(), held, 0)]);
    assert!(
        BLOCK
            .clone()
            .all(|number| presence(&gateway, number) == Presence::Unknown(Cause::Path))
    );
    let later = events(&gateway).split_off(newest_of_start);
    let told = later.iter().filter(|event| matches!(event.body, Body::Presence { .. }));
    let told: Vec<_> = told.filter_map(|event| event.body.device()).collect();
    assert_eq!(told, [id(DEAD)]);
    assert_eq!(gateway.metric("seawall_closes_total"), 1);
    assert_eq!(
        gateway.metric("seawall_silent_sessions{state=\"held\"}"),
        u64::from(held)
    );
    for (query, is_told) in [
        ("tenant=default".to_owned(), true),
        ("tenant=other".to_owned(), false),
        (format!("device={}", id(BLOCK.start)), true),
        (format!("device={}", id(0)), false),
    ] {
        let text = streamed(&gateway, &query).await;
        assert_eq!(text.contains("\"state\":\"held\""), is_told, "{query}: {text}");
    }

    // Those that are heard are online, and nobody else.
    let (first, rest) = (silent.remove(0), silent);
    sessions.spawn(answer(first));
    eventually(|| presence(&gateway, BLOCK.start) == Presence::Online).await;
    assert_eq!(presence(&gateway, BLOCK.start + 1), Presence::Unknown(Cause::Path));
    for session in rest {
        sessions.spawn(answer(session));
    }
    eventually(|| {
        BLOCK
            .clone()
            .all(|number| presence(&gateway, number) == Presence::Online)
    })
    .await;
    eventually(|| {
        let states = group_states(&gateway);
        states.last() == Some(&("released", block.clone(), held, held))
    })
    .await;
    let states: Vec<_> = group_states(&gateway).into_iter().map(|(state, ..)| state).collect();
    assert!(
        states
            .iter()
            .filter(|state| **state != "resolving")
            .eq(&["held", "released"]),
        "{states:?}"
    );
    assert_eq!(gateway.metric("seawall_closes_total"), 1);
    drop(dead);
}

/// What a reader of the events gets within a second, from the first event on.
async fn streamed(gateway: &Gateway, query: &str) -> String {
    let token = fs::read_to_string(gateway.shared.config.server.data_dir.join("admin.token")).unwrap();
    let request = format!(
        "GET /api/v1/events?type=presence_group&{query} HTTP/1.1\r\nHost: 127.0.0.1\r\n\
         Authorization: Bearer {}\r\nLast-Event-ID: 0\r\n\r\n",
        token.trim()
    );
    let ops = gateway.ops;
    let reading = spawn_blocking(move || {
        let mut stream = TcpStream::connect(ops).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let (mut text, mut buffer) = (String::new(), [0; 4_096]);
        while let Ok(len @ 1..) = stream.read(&mut buffer) {
            text.push_str(&String::from_utf8_lossy(&buffer[..len]));
        }
        text
    });
    let text = reading.await.unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    text
}

/// Devices of a node of which a worker is blocked.
const FLEET: u32 = 50;
/// Longer than their deadline.
const BLOCKED: Duration = Duration::from_secs(63);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocked_worker_ends_no_session_and_calls_nobody_offline() {
    let gateway = Gateway::start(SETTINGS).await;
    gateway.register(0..FLEET).await;
    let answered: Arc<Vec<AtomicU32>> = Arc::new((0..FLEET).map(|_| AtomicU32::new(0)).collect());
    // Not on the workers of the node.
    let (address, counted) = (gateway.devices, Arc::clone(&answered));
    thread::spawn(move || run_fleet(address, &counted));
    eventually(|| gateway.shared.sessions.len() == FLEET as usize).await;
    let least = |least: u32| answered.iter().all(|count| count.load(Ordering::Relaxed) >= least);
    eventually(|| least(1)).await;

    // A task that blocks is the fault that is tested for.
    tokio::spawn(async { thread::sleep(BLOCKED) }).await.unwrap();

    let half_of_pings = u32::try_from(BLOCKED.as_secs()).unwrap() / 2;
    assert!(least(half_of_pings), "the other worker does the work: {answered:?}");
    answered.iter().for_each(|count| count.store(0, Ordering::Relaxed));
    eventually(|| least(3)).await;
    assert_eq!(gateway.metric("seawall_closes_total"), 0);
    assert!((0..FLEET).all(|number| presence(&gateway, number) == Presence::Online));
    assert_eq!(gateway.metric("seawall_presence_changes_total{state=\"unknown\"}"), 0);
}

/// Connects devices, and answers and counts their pings, for as long as the test runs.
fn run_fleet(address: SocketAddr, answered: &Arc<Vec<AtomicU32>>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut sessions = JoinSet::new();
        for number in 0..FLEET {
            let mut session = attempt(address, plain(device(number))).await.admitted();
            let answered = Arc::clone(answered);
            sessions.spawn(async move {
                loop {
                    match session.next_frame().await {
                        Received::Ping(_) => {
                            answered[number as usize].fetch_add(1, Ordering::Relaxed);
                        }
                        Received::Text(_) | Received::Binary(_) | Received::Pong(_) => {}
                        Received::Closed { .. } | Received::Lost => return,
                    }
                }
            });
        }
        sessions.join_all().await;
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn kernel_keeps_the_socket_of_a_silent_device_for_longer_than_its_group_is_held() {
    let gateway = Gateway::start(SETTINGS).await;
    gateway.register(0..1).await;
    // Only one device is at this address.
    let session = gateway.session(&device_at(0, [127, 0, 48, 9])).await;
    let Ok(this) = pidfd_open(getpid(), PidfdFlags::empty()) else {
        return skip("this kernel has no pidfd_open");
    };

    let mut files = fs::read_dir("/proc/self/fd").unwrap();
    let socket = files.find_map(|file| {
        let number = file.ok()?.file_name().to_str()?.parse().ok()?;
        let socket = Socket::from(pidfd_getfd(&this, number, PidfdGetfdFlags::empty()).ok()?);
        let peer = socket.peer_addr().ok()?.as_socket()?;
        (peer.ip() == IpAddr::from([127, 0, 48, 9])).then_some(socket)
    });
    let Some(socket) = socket else {
        return skip("a process may not look at its own sockets");
    };

    let kept = socket.tcp_user_timeout().unwrap().unwrap();
    assert!(kept >= DEADLINE + AFTER_DEADLINE + GRACE + DEADLINE, "{kept:?}");
    drop(session);
}
