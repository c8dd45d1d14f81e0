//! TLS for devices: successful handshakes, clients with other protocols, and new certificates.

mod clients;

use std::time::{Duration, Instant};

use firmware_sim::{
    connection::{Connection, DeviceConfig},
    tls::Trust,
};
use rustls::{ProtocolVersion, version};
use seawall_gateway::{
    edge::tls::{Reload, Reloaded},
    tasks::tls::reload_now,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::harness::{
    authority::{Authority, dial, serial_of, version_of},
    gateway::Gateway,
    raw::{ask, masked, request, response},
    wait::soon,
};

#[tokio::test]
async fn both_versions_carry_a_session_from_101_to_goodbye() {
    let mut authority = Authority::new();
    let gateway = Gateway::start(&authority.settings()).await;
    for (asked, expected) in [
        (&version::TLS12, ProtocolVersion::TLSv1_2),
        (&version::TLS13, ProtocolVersion::TLSv1_3),
    ] {
        let lines = gateway.device_lines().await;
        let mut stream = dial(authority.client_config(&[asked], None), gateway.devices)
            .await
            .unwrap();
        assert_eq!(version_of(&stream), expected);

        stream.write_all(request(&[&lines]).as_bytes()).await.unwrap();
        assert_eq!(response(&mut stream).await.status, 101);
        stream.write_all(&masked(0x88, &1000_u16.to_be_bytes())).await.unwrap();
        let mut rest = Vec::new();
        // Without close_notify this is an error.
        stream.read_to_end(&mut rest).await.unwrap();

        assert!(rest.ends_with(&[0x88, 2, 0x03, 0xe8]), "{rest:?}");
    }
    assert_eq!(gateway.metric("seawall_connections_total{outcome=\"tls_failed\"}"), 0);
}

#[tokio::test]
async fn reference_device_connects_over_tls_and_believes_its_authority_alone() {
    let mut authority = Authority::new();
    let gateway = Gateway::start(&authority.settings()).await;
    let (id, secret) = gateway.device().await;
    let url = format!("wss://{}", gateway.devices);
    let mut config = DeviceConfig::new(id.parse().unwrap(), &secret);
    assert!(Connection::open(&url, &config).await.is_err());
    config.trust = Trust::File(authority.path("ca.pem"));

    let mut device = Connection::open(&url, &config).await.unwrap();

    let welcome = device.next_json(Duration::from_secs(5)).await.unwrap();
    assert_eq!(welcome["type"], "welcome");
    device.close(1000, "").await.unwrap();
    assert_eq!(device.closed(Duration::from_secs(5)).await.unwrap().0, 1000);
}

#[tokio::test]
async fn refusals_and_readiness_end_with_a_goodbye() {
    let mut authority = Authority::new();
    let gateway = Gateway::start(&authority.settings()).await;
    for (asked, status) in [
        (request(&["Seawall-Device: x"]), 400),
        (request(&["Seawall-Device: 9b0c2e4a-11d2-7f00-8000-0000000000aa"]), 401),
        ("GET /readyz HTTP/1.1\r\n\r\n".to_owned(), 200),
    ] {
        let mut stream = authority.connect(gateway.devices, None).await.unwrap();
        stream.write_all(asked.as_bytes()).await.unwrap();

        // Reads to the end, and fails if the end is a truncation.
        assert_eq!(response(&mut stream).await.status, status);
    }
}

#[tokio::test]
async fn plain_http_is_told_that_tls_is_spoken() {
    let mut authority = Authority::new();
    let gateway = Gateway::start(&authority.settings()).await;
    let lines = gateway.device_lines().await;

    let answer = ask(gateway.devices, request(&[&lines]).as_bytes()).await;

    assert_eq!(answer.status, 400);
    assert!(answer.body.contains("wss://"), "{}", answer.body);
    assert_eq!(gateway.metric("seawall_connections_total{outcome=\"plain_http\"}"), 1);
    assert_eq!(gateway.metric("seawall_handshakes_total"), 0);
}

#[tokio::test]
async fn handshakes_that_fail_or_take_too_long_end_and_give_their_place_back() {
    let mut authority = Authority::new();
    let settings = authority.settings();
    let gateway = Gateway::start(&format!("{settings}handshake_timeout_ms = 300\n")).await;
    let begun = Instant::now();
    let mut half = TcpStream::connect(gateway.devices).await.unwrap();
    half.write_all(&[0x16, 3, 1]).await.unwrap();
    let mut garbage = TcpStream::connect(gateway.devices).await.unwrap();
    garbage.write_all(&[0x16; 100]).await.unwrap();
    let mut silent = TcpStream::connect(gateway.devices).await.unwrap();

    let mut rest = Vec::new();
    for stream in [&mut half, &mut garbage, &mut silent] {
        let _ = stream.read_to_end(&mut rest).await;
    }

    assert!(begun.elapsed() < Duration::from_secs(3));
    soon(|| gateway.metric("seawall_connections_total{outcome=\"tls_failed\"}") == 2).await;
    soon(|| gateway.metric("seawall_connections_total{outcome=\"silent\"}") == 1).await;
    gateway.stop().await;
}

#[tokio::test]
async fn handshake_that_is_longer_than_any_ends_before_it_fills_the_memory() {
    // rustls would wait for the rest, and keep up to 64 KiB of it.
    const HELLO_LEN: u32 = 60_000;
    let mut authority = Authority::new();
    let settings = authority.settings();
    let gateway = Gateway::start(&format!("{settings}handshake_timeout_ms = 60000\n")).await;
    let mut stream = TcpStream::connect(gateway.devices).await.unwrap();
    let mut message = vec![1];
    message.extend_from_slice(&HELLO_LEN.to_be_bytes()[1..]);
    message.resize(20_000, 0);
    for fragment in message.chunks(4_000) {
        let len = u16::try_from(fragment.len()).unwrap().to_be_bytes();
        let record = [&[0x16, 3, 1], &len[..], fragment].concat();
        // It may have ended by now.
        let _ = stream.write_all(&record).await;
    }

    let _ = stream.read_to_end(&mut Vec::new()).await;

    soon(|| gateway.metric("seawall_connections_total{outcome=\"tls_failed\"}") == 1).await;
}

#[tokio::test]
async fn crowd_that_begins_handshakes_and_stops_keeps_nobody_out() {
    let mut authority = Authority::new();
    let settings = authority.settings();
    let gateway = Gateway::start(&format!("{settings}[limits]\nhandshakes_max = 8\n")).await;
    let lines = gateway.device_lines().await;
    let mut crowd = Vec::new();
    for _ in 0..40 {
        let mut half = TcpStream::connect(gateway.devices).await.unwrap();
        half.write_all(&[0x16, 3, 1, 2, 0]).await.unwrap();
        crowd.push(half);
    }
    let begun = Instant::now();

    let mut stream = authority.connect(gateway.devices, None).await.unwrap();
    stream.write_all(request(&[&lines]).as_bytes()).await.unwrap();

    assert_eq!(response(&mut stream).await.status, 101);
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn handshakes_that_are_given_up_count_for_their_limit_and_have_no_hint() {
    let mut authority = Authority::new();
    let settings = authority.settings();
    let gateway = Gateway::start(&format!("{settings}[limits]\nhandshakes_max = 8\n")).await;
    let mut crowd = Vec::new();
    // More than the 8 permits and the room for 64 parked handshakes.
    for _ in 0..120 {
        let mut half = TcpStream::connect(gateway.devices).await.unwrap();
        half.write_all(&[0x16, 3, 1, 2, 0]).await.unwrap();
        crowd.push(half);
    }

    let throttled = "seawall_throttled_total{limit=\"address_handshakes\"}";
    soon(|| gateway.metric(throttled) > 0).await;

    let failed = "seawall_connections_total{outcome=\"tls_failed\"}";
    soon(|| gateway.metric(failed) > 0).await;
    assert_eq!(gateway.metric("seawall_retry_hint_seconds_count{"), 0);
}

#[tokio::test]
async fn new_certificate_is_for_newcomers_and_nobody_is_dropped() {
    let mut authority = Authority::new();
    let gateway = Gateway::start(&authority.settings()).await;
    let lines = gateway.device_lines().await;
    let mut old = authority.connect(gateway.devices, None).await.unwrap();
    old.write_all(request(&[&lines]).as_bytes()).await.unwrap();
    assert_eq!(response(&mut old).await.status, 101);
    let renewed = authority.server();
    authority.write_server(&renewed);

    reload_now(&gateway.shared).await;

    let new = authority.connect(gateway.devices, None).await.unwrap();
    assert_eq!((serial_of(&old), serial_of(&new)), (1, 2));
    old.write_all(&masked(0x89, b"x")).await.unwrap();
    let mut pong = [0; 3];
    old.read_exact(&mut pong).await.unwrap();
    assert_eq!(pong, [0x8a, 1, b'x']);
    assert_eq!(gateway.metric("seawall_tls_reloads_total{outcome=\"taken\"}"), 1);
}

#[tokio::test]
async fn files_that_cannot_be_used_change_nothing_but_are_told() {
    let mut authority = Authority::new();
    let gateway = Gateway::start(&authority.settings()).await;
    let foreign = authority.server();
    for (name, content) in [
        ("gateway.key", foreign.key.as_str()),
        ("gateway.key", "rubbish"),
        ("gateway.pem", ""),
    ] {
        authority.write(name, content);

        reload_now(&gateway.shared).await;

        assert!(gateway.shared.readiness().reasons.contains(&"tls_files"), "{content}");
        let stream = authority.connect(gateway.devices, None).await.unwrap();
        assert_eq!(serial_of(&stream), 1);
    }
    authority.write_server(&foreign);

    reload_now(&gateway.shared).await;

    assert!(!gateway.shared.readiness().reasons.contains(&"tls_files"));
    assert_eq!(gateway.metric("seawall_tls_reloads_total{outcome=\"refused\"}"), 3);
}

#[tokio::test]
async fn changed_files_are_taken_once_two_looks_agree() {
    let mut authority = Authority::new();
    let gateway = Gateway::start(&authority.settings()).await;
    let endpoint = gateway.shared.tls.devices.as_ref().unwrap();
    let renewed = authority.server();

    assert!(matches!(endpoint.reload(Reload::Changed), Reloaded::Unchanged));
    authority.write("gateway.pem", &renewed.certificate);
    assert!(matches!(endpoint.reload(Reload::Changed), Reloaded::Unchanged));
    authority.write("gateway.key", &renewed.key);
    assert!(matches!(endpoint.reload(Reload::Changed), Reloaded::Unchanged));
    assert!(matches!(endpoint.reload(Reload::Changed), Reloaded::Taken));
    assert!(matches!(endpoint.reload(Reload::Changed), Reloaded::Unchanged));
    std::fs::remove_file(authority.path("gateway.key")).unwrap();
    assert!(matches!(endpoint.reload(Reload::Changed), Reloaded::Refused(_)));
    assert!(matches!(endpoint.reload(Reload::Changed), Reloaded::Unchanged));
}
