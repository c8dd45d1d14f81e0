//! Accepted handshakes, and the content of the 101 and the first frames.

use base64::{Engine, engine::general_purpose::STANDARD};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::harness::{
    gateway::Gateway,
    raw::{ACCEPT, Device, ask, masked, request, response},
    wait::soon,
};

#[tokio::test]
async fn welcome_comes_with_the_101() {
    let gateway = Gateway::start("").await;
    let lines = gateway.device_lines().await;
    let mut stream = TcpStream::connect(gateway.devices).await.unwrap();
    let bytes = request(&[&lines, "Sec-WebSocket-Protocol: seawall.v1"]);
    stream.write_all(bytes.as_bytes()).await.unwrap();

    let mut first_read = vec![0; 4096];
    let len = stream.read(&mut first_read).await.unwrap();

    let text = String::from_utf8_lossy(&first_read[..len]).into_owned();
    let (head, frame) = text.split_once("\r\n\r\n").expect("a whole head");
    assert!(head.starts_with("HTTP/1.1 101 "), "{text}");
    assert!(
        frame.contains("{\"type\":\"welcome\"") && frame.ends_with('}'),
        "{text}"
    );
    // A session follows like any other, without a second welcome.
    let mut device = Device { stream };
    device
        .text(r#"{"type":"message","id":"1","topic":"t","payload":1}"#)
        .await;
    assert_eq!(device.frame().await.text(), r#"{"type":"ack","id":"1"}"#);
}

#[tokio::test]
async fn every_source_of_identity_is_taken() {
    let gateway = Gateway::start("").await;
    let (id, secret) = gateway.device().await;
    let bearer = format!("Authorization: Bearer {secret}");
    let basic = format!("Authorization: Basic {}", STANDARD.encode(format!("{id}:{secret}")));
    let compact = id.replace('-', "").to_uppercase();

    let header = request(&[&format!("Seawall-Device: {compact}"), &bearer]);
    let user = request(&[&basic]);
    let query = request(&[&bearer]).replace("/v1/connect", &format!("/v1/connect?device={id}&firmware=3.8.0%2Bx"));
    for bytes in [header, user, query] {
        let response = ask(gateway.devices, bytes.as_bytes()).await;

        assert_eq!(response.status, 101);
        assert_eq!(response.header("Sec-WebSocket-Accept"), Some(ACCEPT));
        assert_eq!(response.header("Sec-WebSocket-Protocol"), None);
    }
}

#[tokio::test]
async fn renamed_identity_lets_an_old_fleet_in() {
    let gateway = Gateway::start("[identity]\ndevice_header = \"X-Device-Id\"\nfirmware_query = \"fw\"\n").await;
    let (id, secret) = gateway.device().await;
    let bearer = format!("Authorization: Bearer {secret}");

    let renamed = request(&[&format!("x-device-id: {id}"), &bearer]).replace("/v1/connect", "/v1/connect?fw=1.2");
    let default = request(&[&format!("Seawall-Device: {id}"), &bearer]);

    assert_eq!(ask(gateway.devices, renamed.as_bytes()).await.status, 101);
    assert_eq!(ask(gateway.devices, default.as_bytes()).await.code(), "bad_request");
}

#[tokio::test]
async fn sub_protocol_is_chosen_or_confirmed() {
    let gateway = Gateway::start("").await;
    let lines = gateway.device_lines().await;

    for (offer, chosen) in [
        ("mqtt, seawall.v1", "seawall.v1"),
        ("arduino", "arduino"),
        ("mqtt", "mqtt"),
        ("b, a", "b"),
    ] {
        let bytes = request(&[&lines, &format!("Sec-WebSocket-Protocol: {offer}")]);

        let response = ask(gateway.devices, bytes.as_bytes()).await;

        assert_eq!(response.header("Sec-WebSocket-Protocol"), Some(chosen));
    }
}

#[tokio::test]
async fn welcome_is_the_first_frame() {
    let gateway = Gateway::start("").await;

    let mut device = Device::connect(gateway.devices, &[&gateway.device_lines().await, V1]).await;

    let frame = device.any_frame().await;
    let welcome: serde_json::Value = serde_json::from_str(frame.text()).unwrap();
    assert_eq!(welcome["type"], "welcome");
    assert_eq!(welcome["heartbeat_ms"], 30_000);
    assert_eq!(welcome["backoff_cap_ms"], 60_000);
    assert!(welcome["session"].is_string() && welcome["server_time"].is_string());
}

#[tokio::test]
async fn frame_sent_with_the_request_is_not_lost() {
    let gateway = Gateway::start("").await;
    let mut stream = TcpStream::connect(gateway.devices).await.unwrap();
    let mut bytes = request(&[&gateway.device_lines().await, V1]).into_bytes();
    bytes.extend(masked(0x81, br#"{"type":"message","id":"m1","topic":"t","payload":1}"#));
    stream.write_all(&bytes).await.unwrap();

    assert_eq!(response(&mut stream).await.status, 101);
    let mut device = Device { stream };

    assert!(device.frame().await.text().contains("welcome"));
    assert_eq!(device.frame().await.text(), r#"{"type":"ack","id":"m1"}"#);
}

#[tokio::test]
async fn head_may_come_in_pieces() {
    let gateway = Gateway::start("").await;
    let mut stream = TcpStream::connect(gateway.devices).await.unwrap();
    stream.set_nodelay(true).unwrap();

    for byte in request(&[&gateway.device_lines().await]).as_bytes() {
        stream.write_all(&[*byte]).await.unwrap();
        tokio::task::yield_now().await;
    }

    assert_eq!(response(&mut stream).await.status, 101);
}

#[tokio::test]
async fn newer_session_replaces_the_older_and_stays() {
    let gateway = Gateway::start("").await;
    let lines = gateway.device_lines().await;
    let mut older = Device::connect(gateway.devices, &[&lines]).await;
    let mut newer = Device::connect(gateway.devices, &[&lines]).await;

    assert_eq!(older.frame().await.close().0, 4500);
    drop(older);
    soon(|| gateway.metric("seawall_closes_total{reason=\"replaced\"}") == 1).await;

    newer.send(0x89, b"still here").await;
    assert_eq!(newer.frame().await.payload, b"still here");
    assert_eq!(gateway.metric("seawall_sessions"), 1);
}

#[tokio::test]
async fn sum_of_outcomes_is_the_number_of_attempts() {
    let gateway = Gateway::start("").await;
    let lines = gateway.device_lines().await;
    let admitted = Device::connect(gateway.devices, &[&lines]).await;
    ask(gateway.devices, request(&[]).as_bytes()).await;
    ask(
        gateway.devices,
        request(&[&lines, "Seawall-Slot: a", "Seawall-Slot: b"]).as_bytes(),
    )
    .await;
    ask(
        gateway.devices,
        request(&[lines.split('\r').next().unwrap()]).as_bytes(),
    )
    .await;
    let mut half = TcpStream::connect(gateway.devices).await.unwrap();
    half.write_all(b"GET /v1/conn").await.unwrap();
    half.shutdown().await.unwrap();
    drop(TcpStream::connect(gateway.devices).await.unwrap());

    soon(|| gateway.metric("seawall_handshakes_total{outcome=\"abandoned\"}") == 1).await;
    soon(|| gateway.metric("seawall_connections_total{outcome=\"silent\"}") == 1).await;

    assert_eq!(gateway.metric("seawall_handshakes_total{"), 5);
    assert_eq!(gateway.metric("seawall_connections_total{outcome=\"request\"}"), 5);
    drop(admitted);
}

const V1: &str = "Sec-WebSocket-Protocol: seawall.v1";

#[tokio::test]
async fn peer_that_leaves_while_it_waits_is_abandoned() {
    // A second between two lookups: the second device waits.
    let gateway = Gateway::start("[admission]\nlookups_per_second_max = 1\n").await;
    let lines = gateway.device_lines().await;
    let mut waiting = Vec::new();
    for _ in 0..20 {
        let mut stream = TcpStream::connect(gateway.devices).await.unwrap();
        stream.write_all(request(&[&lines]).as_bytes()).await.unwrap();
        waiting.push(stream);
    }

    drop(waiting);

    soon(|| gateway.metric("seawall_handshakes_total{") == 20).await;
    soon(|| gateway.metric("seawall_admission_queue") == 0).await;
}

#[tokio::test]
async fn eager_peer_that_leaves_while_it_waits_costs_no_look_up() {
    const ATTEMPTS: u8 = 8;
    // A second between two lookups: all but the first device wait.
    let gateway = Gateway::start("[admission]\nlookups_per_second_max = 1\n").await;
    let _first = Device::connect(gateway.devices, &[&gateway.device_lines().await]).await;
    let lines = gateway.device_lines().await;
    let mut waiting = Vec::new();
    for _ in 0..ATTEMPTS {
        let mut stream = TcpStream::connect(gateway.devices).await.unwrap();
        stream.write_all(request(&[&lines]).as_bytes()).await.unwrap();
        waiting.push(stream);
    }
    soon(|| gateway.shared.lookups.state().queue >= 1).await;
    for stream in &mut waiting {
        stream.write_all(&masked(0x81, b"{}")).await.unwrap();
    }

    drop(waiting);

    let abandoned = "seawall_handshakes_total{outcome=\"abandoned\"}";
    soon(|| gateway.metric(abandoned) == u64::from(ATTEMPTS)).await;
    assert_eq!(gateway.metric("seawall_lookup_statements_total"), 1);
}

#[tokio::test]
async fn end_of_the_process_leaves_nobody_waiting() {
    let gateway = Gateway::start("").await;
    let mut half = TcpStream::connect(gateway.devices).await.unwrap();
    half.write_all(b"GET /v1/connect HTTP/1.1\r\n").await.unwrap();
    let _silent = TcpStream::connect(gateway.devices).await.unwrap();
    soon(|| gateway.shared.clock.now() > seawall_proto::time::Instant::from_micros(200_000)).await;

    let stopping = gateway.stop();
    let ((), answer) = tokio::join!(stopping, response(&mut half));

    assert_eq!((answer.status, answer.code().as_str()), (503, "draining"));
}
