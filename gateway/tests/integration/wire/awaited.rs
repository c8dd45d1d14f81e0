//! Devices with a valid token: the rate limits of their address do not apply to them, the limit on connections does.

use std::time::{Duration, Instant};

use seawall_proto::id::DeviceId;
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::harness::{
    gateway::Gateway,
    raw::{Device, ask, request},
    wait::SHORT_PATIENCE,
};

const V1: &str = "Sec-WebSocket-Protocol: seawall.v1";

#[tokio::test]
async fn device_with_a_due_slot_is_let_in_however_often_its_address_comes() {
    const DEVICES: usize = 8;
    let gateway = Gateway::start("[limits]\nhandshakes_per_second_per_address_max = 1\n").await;
    let lookups = &gateway.shared.lookups;
    let (mut devices, mut wait) = (Vec::new(), Duration::ZERO);
    for _ in 0..DEVICES {
        let (id, secret) = gateway.device().await;
        let hint = lookups.slot_for_close(id.parse().unwrap(), Duration::ZERO);
        wait = wait.max(hint.after);
        let lines = format!("Seawall-Device: {id}\r\nAuthorization: Bearer {secret}");
        devices.push((lines, hint.slot.unwrap()));
    }
    let early = DeviceId::from_uuid(uuid::Uuid::max());
    let early_slot = lookups.slot_for_close(early, Duration::from_secs(60)).slot.unwrap();
    let early_lines = format!("Seawall-Device: {early}\r\nAuthorization: Bearer x");
    // At the time that they were told.
    sleep(wait).await;

    let begun = Instant::now();
    let mut statuses = Vec::new();
    for (lines, slot) in &devices {
        statuses.push(come(&gateway, lines, &format!("Seawall-Slot: {slot}")).await.0);
    }
    let mut others = Vec::new();
    for (lines, slot) in [
        (&devices[0].0, &devices[1].1),
        (&devices[0].0, &"no slot".into()),
        (&early_lines, &early_slot),
    ] {
        others.push(come(&gateway, lines, &format!("Seawall-Slot: {slot}")).await.1);
    }

    assert_eq!(statuses, [101; DEVICES]);
    let throttled = others.iter().filter(|code| *code == "throttled").count();
    let allowed = begun.elapsed().as_secs_f64();
    assert!(
        throttled as f64 >= 3.0 - allowed,
        "another's slot, none, one to come: {others:?}"
    );
}

#[tokio::test]
async fn device_with_a_resume_token_is_let_in_however_often_its_address_comes() {
    let gateway = Gateway::start("[limits]\nhandshakes_per_second_per_address_max = 1\n").await;
    let (lines, resume, _session) = with_token(&gateway).await;

    let mut statuses = Vec::new();
    for _ in 0..4 {
        statuses.push(come(&gateway, &lines, &resume).await.0);
    }

    assert_eq!(statuses, [101; 4]);
    assert_eq!(gateway.metric("seawall_resumes_total{outcome=\"resumed\"}"), 4);
}

#[tokio::test]
async fn device_with_a_resume_token_is_let_in_while_others_of_its_address_are_slow() {
    let gateway = Gateway::start("[limits]\nhandshakes_max = 64\nhead_timeout_ms = 6000\n").await;
    let (lines, resume, _session) = with_token(&gateway).await;
    let mut slow = Vec::new();
    for _ in 0..60 {
        let mut stream = TcpStream::connect(gateway.devices).await.unwrap();
        stream.write_all(b"GET /v1/connect HTTP/1.1\r\n").await.unwrap();
        slow.push(stream);
    }

    let throttled = async {
        while come(&gateway, &lines, "").await.0 == 101 {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(SHORT_PATIENCE, throttled).await.unwrap();
    let (status, _) = come(&gateway, &lines, &resume).await;

    assert_eq!(status, 101);
    let throttled = "seawall_throttled_total{limit=\"address_handshakes\"}";
    assert_eq!(gateway.metric(throttled), 1);
}

#[tokio::test]
async fn connections_of_an_address_are_bounded_whatever_token_is_shown() {
    let gateway = Gateway::start("[limits]\nconnections_per_address_max = 1\n").await;
    let (lines, resume, _session) = with_token(&gateway).await;

    let (status, code) = come(&gateway, &lines, &resume).await;

    assert_eq!((status, code.as_str()), (503, "throttled"));
    let throttled = "seawall_throttled_total{limit=\"address_connections\"}";
    assert_eq!(gateway.metric(throttled), 1);
}

/// A device with a session: the lines that identify it, and the one with its resume token.
async fn with_token(gateway: &Gateway) -> (String, String, Device) {
    let shared = &gateway.shared;
    shared.resume.poll(&shared.store, &shared.clock).await.unwrap();
    let lines = gateway.device_lines().await;
    let mut session = Device::connect(gateway.devices, &[&lines, V1]).await;
    let welcome: serde_json::Value = serde_json::from_str(session.frame().await.text()).unwrap();
    let resume = format!("Seawall-Resume: {}", welcome["resume"].as_str().unwrap());
    (lines, resume, session)
}

/// Status and code of the answer to a device with this token; without a token if the line is empty.
async fn come(gateway: &Gateway, lines: &str, token: &str) -> (u16, String) {
    let lines: Vec<&str> = [lines, token].into_iter().filter(|line| !line.is_empty()).collect();
    let answer = ask(gateway.devices, request(&lines).as_bytes()).await;
    let code = (answer.status != 101).then(|| answer.code());
    (answer.status, code.unwrap_or_default())
}
