//! The limits on handshakes: their effect when they are reached, and that it ends.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::harness::{
    gateway::Gateway,
    raw::{Device, ask, request, response},
    wait::{SHORT_PATIENCE, soon},
};

#[tokio::test]
async fn connection_over_the_figure_of_its_address_is_throttled() {
    let gateway = Gateway::start("[limits]\nconnections_per_address_max = 1\n").await;
    let lines = gateway.device_lines().await;
    let first = Device::connect(gateway.devices, &[&lines]).await;

    let second = ask(gateway.devices, request(&[&lines]).as_bytes()).await;

    assert_eq!((second.status, second.code().as_str()), (503, "throttled"));
    assert!(second.header("Seawall-Retry-After-Ms").is_some());
    drop(first);
    soon(|| gateway.metric("seawall_sessions") == 0).await;
    Device::connect(gateway.devices, &[&lines]).await;
}

#[tokio::test]
async fn readiness_is_told_to_an_address_that_has_its_share() {
    let gateway = Gateway::start("[limits]\nconnections_per_address_max = 2\n").await;
    let lines = gateway.device_lines().await;
    let _held = [
        TcpStream::connect(gateway.devices).await.unwrap(),
        TcpStream::connect(gateway.devices).await.unwrap(),
    ];

    for _ in 0..3 {
        let probe = ask(gateway.devices, b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert_eq!(probe.status, 200, "{probe:?}");
    }
    let device = ask(gateway.devices, request(&[&lines]).as_bytes()).await;

    assert_eq!((device.status, device.code().as_str()), (503, "throttled"));
    assert_eq!(gateway.metric("seawall_connections_total{outcome=\"probe\"}"), 3);
    let throttled = "seawall_throttled_total{limit=\"address_connections\"}";
    assert_eq!(gateway.metric(throttled), 1);
}

#[tokio::test]
async fn readiness_is_told_to_an_address_that_came_too_often() {
    let gateway = Gateway::start("[limits]\nhandshakes_per_second_per_address_max = 1\n").await;

    for _ in 0..4 {
        let probe = ask(gateway.devices, b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert_eq!(probe.status, 200, "{probe:?}");
    }
}

#[tokio::test]
async fn silent_connection_over_the_figure_of_its_address_is_answered_soon_and_is_no_attempt() {
    let gateway = Gateway::start("[limits]\nconnections_per_address_max = 1\n").await;
    let _held = TcpStream::connect(gateway.devices).await.unwrap();
    let begun = Instant::now();
    let mut silent = TcpStream::connect(gateway.devices).await.unwrap();

    let answer = response(&mut silent).await;

    assert_eq!((answer.status, answer.code().as_str()), (503, "throttled"));
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    let limited = "seawall_connections_total{outcome=\"address_limited\"}";
    soon(|| gateway.metric(limited) == 1).await;
    assert_eq!(gateway.metric("seawall_handshakes_total{"), 0);
    let throttled = "seawall_throttled_total{limit=\"address_connections\"}";
    assert_eq!(gateway.metric(throttled), 1);
    let hints = "seawall_retry_hint_seconds_count{limit=\"address_connections\"}";
    assert_eq!(gateway.metric(hints), 1);
}

#[tokio::test]
async fn place_that_is_taken_back_is_throttled_and_only_a_late_head_gets_408() {
    const HEAD_TIMEOUT: Duration = Duration::from_secs(2);
    let gateway = Gateway::start("[limits]\nhandshakes_max = 8\nhead_timeout_ms = 2000\n").await;
    let mut halves = JoinSet::new();
    for _ in 0..120 {
        let begun = Instant::now();
        let mut stream = TcpStream::connect(gateway.devices).await.unwrap();
        stream.write_all(b"GET /v1/connect HTTP/1.1\r\n").await.unwrap();
        halves.spawn(async move { (response(&mut stream).await, begun.elapsed()) });
    }

    let mut taken_back = 0;
    for (answer, took) in halves.join_all().await {
        if answer.status == 408 {
            assert!(took >= HEAD_TIMEOUT, "{took:?}");
            continue;
        }
        assert_eq!((answer.status, answer.code().as_str()), (503, "throttled"));
        let after_ms: u64 = answer.header("Seawall-Retry-After-Ms").unwrap().parse().unwrap();
        assert!(after_ms < 5_000, "permits were short for a moment only: {after_ms} ms");
        taken_back += 1;
    }
    assert!(taken_back > 0);
    let throttled = gateway.metric("seawall_throttled_total{limit=\"address_handshakes\"}");
    assert_eq!(throttled, taken_back);
    let hints = gateway.metric("seawall_retry_hint_seconds_count{limit=\"address_handshakes\"}");
    assert_eq!(hints, throttled);
}

#[tokio::test]
async fn fleet_that_connects_all_its_sockets_first_is_not_sent_away() {
    // 8 permits, and room for 64 parked handshakes.
    let gateway = Gateway::start("[limits]\nhandshakes_max = 8\n").await;
    let mut sockets = Vec::new();
    for _ in 0..300 {
        sockets.push(TcpStream::connect(gateway.devices).await.unwrap());
    }
    // Published every second.
    soon(|| gateway.metric("seawall_handshakes_under_way{") >= 290).await;

    let mut codes = Vec::new();
    for socket in &mut sockets {
        socket.write_all(request(&[]).as_bytes()).await.unwrap();
        codes.push(response(socket).await.code());
    }

    assert!(codes.iter().all(|code| code == "bad_request"), "{codes:?}");
}

#[tokio::test]
async fn node_that_is_full_gives_slots() {
    let gateway = Gateway::start("[limits]\nconnections_max = 1\n").await;
    let lines = gateway.device_lines().await;
    let _first = Device::connect(gateway.devices, &[&lines]).await;

    let second = ask(gateway.devices, request(&[&lines]).as_bytes()).await;

    assert_eq!((second.status, second.code().as_str()), (503, "overloaded"));
    assert!(second.header("Seawall-Slot").is_some(), "{second:?}");
    let after_ms: u64 = second.header("Seawall-Retry-After-Ms").unwrap().parse().unwrap();
    assert!((30_000..=600_000).contains(&after_ms));
}

#[tokio::test]
async fn handshakes_a_second_by_address_are_counted_where_configured() {
    let gateway = Gateway::start("[limits]\nhandshakes_per_second_per_address_max = 2\n").await;

    let mut codes = Vec::new();
    for _ in 0..4 {
        codes.push(ask(gateway.devices, request(&[]).as_bytes()).await.code());
    }

    assert_eq!(codes[0], "bad_request");
    assert!(codes.contains(&"throttled".to_owned()), "{codes:?}");
}

#[tokio::test]
async fn silent_connections_do_not_keep_a_device_out() {
    let gateway = Gateway::start("[limits]\nhandshakes_max = 8\nhead_timeout_ms = 4000\n").await;
    let lines = gateway.device_lines().await;
    let mut silent = Vec::new();
    for _ in 0..12 {
        silent.push(TcpStream::connect(gateway.devices).await.unwrap());
    }

    let answer = ask(gateway.devices, request(&[&lines]).as_bytes()).await;

    assert_eq!(answer.status, 101, "{answer:?}");
}

#[tokio::test]
async fn no_client_is_reset_at_the_limit_on_handshakes() {
    let gateway = Gateway::start("[limits]\nhandshakes_max = 8\nhead_timeout_ms = 1000\n").await;
    let mut silent = JoinSet::new();
    for _ in 0..40 {
        let mut stream = TcpStream::connect(gateway.devices).await.unwrap();
        silent.spawn(async move {
            let mut answer = String::new();
            // A reset would be an error here.
            timeout(SHORT_PATIENCE, stream.read_to_string(&mut answer))
                .await
                .unwrap()
                .unwrap();
            answer
        });
    }

    for answer in silent.join_all().await {
        let is_taken_back = answer.starts_with("HTTP/1.1 503 ") && answer.contains("throttled");
        assert!(is_taken_back || answer.starts_with("HTTP/1.1 408 "), "{answer}");
    }
}

#[tokio::test]
async fn crowd_behind_one_address_is_not_turned_away() {
    let gateway = Gateway::start("[limits]\nhandshakes_max = 8\n").await;
    let mut asking = Vec::new();
    for _ in 0..200 {
        let mut stream = TcpStream::connect(gateway.devices).await.unwrap();
        asking.push(tokio::spawn(async move {
            tokio::io::AsyncWriteExt::write_all(&mut stream, request(&[]).as_bytes())
                .await
                .unwrap();
            response(&mut stream).await.code()
        }));
    }

    for answer in asking {
        assert_eq!(answer.await.unwrap(), "bad_request");
    }
}

/// Connections of one address that never send a complete head, and reconnect as soon as they are closed.
const SLOW_CROWD: usize = 2_000;
/// 40 permits, and room for 320 parked handshakes.
const FEW_PERMITS: &str = "[limits]\nhandshakes_max = 40\n";
const SLOW_CROWD_AT_FEW_PERMITS: usize = 600;
/// Handshakes of the crowd that run before devices connect: slightly fewer than there is room for.
const CROWD_UNDER_WAY: u64 = 300;
/// Attempts of devices during the attack, and the time between two.
const DEVICES: usize = 60;
const DEVICE_INTERVAL: Duration = Duration::from_millis(50);
/// Measured on two cores: 1 ms and 0.27 s with room to park, 0.54 s and 0.73 s without. A machine with other load needs
/// more. If permits were not taken back, a device would wait for 2.5 s per round, and there are four.
const MEDIAN_MAX: Duration = Duration::from_secs(2);
const LONGEST_MAX: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread")]
async fn slow_crowd_of_one_address_does_not_keep_devices_out() {
    assert_devices_get_in("", SLOW_CROWD).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_crowd_that_has_no_room_aside_is_given_up() {
    let gave_up = assert_devices_get_in(FEW_PERMITS, SLOW_CROWD_AT_FEW_PERMITS).await;

    assert!(gave_up > 0, "nobody was throttled before the time of its head was over");
}

/// Asserts that devices are admitted while a crowd holds the permits. Returns how many of the crowd were given up by
/// then.
async fn assert_devices_get_in(settings: &str, crowd_len: usize) -> u64 {
    let gateway = Gateway::start(settings).await;
    let lines = gateway.device_lines().await;
    let is_over = Arc::new(AtomicBool::new(false));
    let mut crowd = JoinSet::new();
    for _ in 0..crowd_len {
        crowd.spawn(be_slow(gateway.devices, Arc::clone(&is_over)));
    }
    // Its connections fill the permits and the room to park, or are all connected. Published every second.
    soon(|| gateway.metric("seawall_handshakes_under_way{") >= CROWD_UNDER_WAY).await;

    let mut waits = JoinSet::new();
    for _ in 0..DEVICES {
        let (address, bytes) = (gateway.devices, request(&[&lines]));
        waits.spawn(async move {
            let begun = Instant::now();
            let answer = ask(address, bytes.as_bytes()).await;
            assert_eq!(answer.status, 101, "{answer:?}");
            begun.elapsed()
        });
        sleep(DEVICE_INTERVAL).await;
    }
    let mut waits = waits.join_all().await;
    let gave_up = gateway.metric("seawall_throttled_total{limit=\"address_handshakes\"}");
    // Published every second, and the crowd is still connected.
    soon(|| gateway.metric("seawall_handshakes_under_way{state=\"aside\"}") > 100).await;

    is_over.store(true, Ordering::Relaxed);
    waits.sort_unstable();
    let (median, longest) = (waits[DEVICES / 2], waits[DEVICES - 1]);
    println!("crowd of {crowd_len}: median {median:?}, longest {longest:?}, {gave_up} given up");
    assert!(median <= MEDIAN_MAX, "{median:?}");
    assert!(longest <= LONGEST_MAX, "{longest:?}");
    gave_up
}

#[tokio::test]
async fn slow_device_is_admitted_while_a_crowd_holds_the_permits() {
    let gateway = Gateway::start("[limits]\nhandshakes_max = 8\n").await;
    let lines = gateway.device_lines().await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(gateway.devices).await.unwrap());
    }
    let bytes = request(&[&lines]);
    let (first, rest) = bytes.as_bytes().split_at(40);
    let mut slow = TcpStream::connect(gateway.devices).await.unwrap();

    slow.write_all(first).await.unwrap();
    sleep(Duration::from_millis(1_500)).await;
    slow.write_all(rest).await.unwrap();

    assert_eq!(response(&mut slow).await.status, 101);
}

/// Connects from another address than the devices, and sends a byte at intervals.
async fn be_slow(gateway: SocketAddr, is_over: Arc<AtomicBool>) {
    while !is_over.load(Ordering::Relaxed) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, 2], 0))).unwrap();
        let Ok(mut stream) = socket.connect(gateway).await else {
            continue;
        };
        let mut space = [0; 512];
        while !is_over.load(Ordering::Relaxed) {
            if stream.write_all(b"G").await.is_err() {
                break;
            }
            // Answered, or closed.
            if timeout(Duration::from_millis(400), stream.read(&mut space))
                .await
                .is_ok()
            {
                break;
            }
        }
    }
}
