//! Drains: by order, cancelled, and by signal.

use std::time::Duration;

use firmware_sim::connection::Connection;
use rustix::process::Signal;
use seawall_gateway::{runtime::config::DatabaseUrl, store::Store};
use seawall_proto::departures::{DrainOrder, DrainState};
use serde_json::{Value, json};
use tokio::task::{JoinSet, spawn_blocking};

use crate::harness::{
    devices::{attempt, device, devices, end_of, plain, register},
    gateway::Gateway,
    process::GatewayProcess,
    wait::{PATIENCE, eventually},
};

/// Maximum time of the end after a second signal. The closes may take 2 s.
const HURRIED_MAX: Duration = Duration::from_secs(4);
/// Six sessions at two per second end within 3 s. A device returns 2.5 to 3.5 s later, whether the drain continues or
/// not.
const CANCELLED_HINT_MAX: Duration = Duration::from_millis(6_600);

#[tokio::test(flavor = "multi_thread")]
async fn drain_tells_every_session_when_to_come_back_and_refuses_newcomers() {
    let gateway = Gateway::start("").await;
    gateway.register(0..16).await;
    let speaking = gateway.sessions(&devices(0..10)).await;
    let plain_ones: Vec<_> = devices(10..15).into_iter().map(plain).collect();
    let silent = gateway.sessions(&plain_ones).await;

    gateway.shared.departures.start_drain(order(None)).unwrap();

    for mut session in speaking {
        let (frames, code, reason) = end_of(&mut session, PATIENCE).await;
        assert_eq!((code, &reason["reason"]), (1012, &json!("draining")));
        assert_eq!(frames.len(), 2, "{frames:?}");
        let (token, frames) = (&frames[0], &frames[1..]);
        assert_eq!(token["type"], "resume", "a new one, to reconnect with");
        assert_eq!(
            (&frames[0]["type"], &frames[0]["reason"]),
            (&json!("reconnect"), &json!("draining"))
        );
        assert_eq!(frames[0]["after_ms"], reason["retry_after_ms"]);
        assert_eq!(frames[0]["slot"], reason["slot"]);
        let after_ms = reason["retry_after_ms"].as_u64().unwrap();
        assert!(reason["slot"].is_string());
        assert!(
            (2_500..=4_000).contains(&after_ms),
            "a small fleet is soon back: {after_ms}"
        );
    }
    for mut session in silent {
        let (frames, code, reason) = end_of(&mut session, PATIENCE).await;
        assert_eq!((frames.len(), code, &reason["reason"]), (0, 1012, &json!("draining")));
        assert!(
            reason["slot"].is_string() && reason["retry_after_ms"].is_u64(),
            "{reason}"
        );
    }
    let refused = gateway.connect(&device(15)).await;
    let hint = refused.refused_with(503, "draining").retry_after_ms.unwrap();
    assert!((10_000..=30_000).contains(&hint), "{hint}");
    assert_eq!(gateway.readyz().await, 503);
    eventually(|| status(&gateway) == (DrainState::Drained, 0)).await;
    assert_eq!(gateway.metric("seawall_closes_total{reason=\"draining\"}"), 15);

    assert!(gateway.shared.departures.cancel_drain());
    assert_eq!(gateway.readyz().await, 200);
    gateway.session(&device(15)).await;
    assert!(!gateway.shared.departures.cancel_drain());
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_drain_leaves_the_rest_in_peace() {
    let gateway = Gateway::start("").await;
    gateway.register(0..6).await;
    let mut sessions = gateway.sessions(&devices(0..6)).await;

    gateway.shared.departures.start_drain(order(Some(2.0))).unwrap();
    assert!(
        gateway.shared.departures.start_drain(order(None)).is_err(),
        "one at a time"
    );
    eventually(|| gateway.shared.sessions.len() == 5).await;
    assert_eq!(status(&gateway).0, DrainState::Draining);
    gateway.shared.departures.cancel_drain();

    let mut left = 0;
    for session in &mut sessions {
        match session.next_json(PATIENCE).await {
            Ok(welcome) => assert_eq!(welcome["type"], "welcome"),
            Err(error) => panic!("{error}"),
        }
        // The session that is closed first may have ended already.
        let _ = session.send_json(&message()).await;
        match session.next_json(PATIENCE).await {
            Ok(frame) if frame["type"] == "ack" => left += 1,
            Ok(frame) => assert_eq!(frame["type"], "resume", "a fresh token, then the close"),
            Err(error) => panic!("{error}"),
        }
    }
    assert!((4..=5).contains(&left), "{left}");
    assert_eq!(status(&gateway), (DrainState::Idle, left));
}

#[tokio::test(flavor = "multi_thread")]
async fn device_closed_by_a_drain_that_is_then_cancelled_is_back_at_its_short_hint() {
    let gateway = Gateway::start("").await;
    gateway.register(0..6).await;
    let sessions = gateway.sessions(&devices(0..6)).await;
    let mut ends = JoinSet::new();
    for (number, mut session) in (0..).zip(sessions) {
        ends.spawn(async move { (number, end_of(&mut session, PATIENCE).await) });
    }

    gateway.shared.departures.start_drain(order(Some(2.0))).unwrap();
    let (number, (frames, code, reason)) = ends.join_next().await.unwrap().unwrap();
    gateway.shared.departures.cancel_drain();

    assert_eq!((code, &reason["reason"]), (1012, &json!("draining")));
    let hint = Duration::from_millis(reason["retry_after_ms"].as_u64().unwrap());
    assert!(hint <= CANCELLED_HINT_MAX, "{hint:?}");
    let mut returning = device(number);
    returning.slot = Some(reason["slot"].as_str().unwrap().to_owned());
    returning.resume = Some(frames[0]["token"].as_str().unwrap().to_owned());
    tokio::time::sleep(hint).await;
    gateway.session(&returning).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn term_signal_sends_every_session_its_1012_and_exits_0() {
    let (mut process, sessions) = leaving_process("").await;

    process.signal(Signal::TERM).unwrap();

    for (code, has_hint) in ends(sessions, PATIENCE).await {
        assert_eq!((code, has_hint), (1012, true));
    }
    let status = spawn_blocking(move || process.wait(PATIENCE)).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn second_signal_closes_what_is_left_at_once() {
    let (mut process, sessions) = leaving_process("[drain]\nrate_per_second = 1\n").await;

    process.signal(Signal::TERM).unwrap();
    // The drain has begun when new devices are refused.
    let address = process.addresses.devices;
    let deadline = std::time::Instant::now() + PATIENCE;
    while attempt(address, device(20)).await.outcome.is_ok() {
        assert!(std::time::Instant::now() < deadline, "the signal had no effect");
    }
    process.signal(Signal::TERM).unwrap();

    for (code, has_hint) in ends(sessions, HURRIED_MAX).await {
        assert_eq!((code, has_hint), (1012, true));
    }
    let status = spawn_blocking(move || process.wait(HURRIED_MAX))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(status.code(), Some(0));
}

/// The real binary with these settings and 20 sessions.
async fn leaving_process(settings: &str) -> (GatewayProcess, Vec<Connection>) {
    let home = tempfile::tempdir().unwrap();
    let config = home.path().join("seawall.toml");
    std::fs::write(&config, settings).unwrap();
    let database = DatabaseUrl::sqlite(&home.path().join("devices.db"));
    let store = Store::open(&database).await.unwrap();
    register(&store, 0..21).await;
    let database = format!("sqlite:{}", home.path().join("devices.db").display());
    let args = ["--config", config.to_str().unwrap(), "--database", &database].map(str::to_owned);
    let process = spawn_blocking(move || GatewayProcess::start(&args.each_ref().map(String::as_str)));
    let process = process.await.unwrap().unwrap();
    let mut sessions = Vec::new();
    for device in devices(0..20) {
        sessions.push(attempt(process.addresses.devices, device).await.admitted());
    }
    // The files stay open in the gateway; their names are no longer needed.
    drop(home);
    (process, sessions)
}

/// Code of each session's close, and whether it had a hint and a slot.
async fn ends(sessions: Vec<Connection>, within: Duration) -> Vec<(u16, bool)> {
    let mut ends = JoinSet::new();
    for mut session in sessions {
        ends.spawn(async move {
            let (_, code, reason) = end_of(&mut session, within).await;
            (code, reason["retry_after_ms"].is_u64() && reason["slot"].is_string())
        });
    }
    ends.join_all().await
}

fn message() -> Value {
    json!({"type": "message", "id": "1", "topic": "test", "payload": 1})
}

fn order(rate_per_second: Option<f64>) -> DrainOrder {
    DrainOrder {
        rate_per_second,
        announce: Duration::ZERO,
        deadline: Duration::from_secs(60),
    }
}

fn status(gateway: &Gateway) -> (DrainState, usize) {
    let state = gateway.shared.departures.drain_status().state;
    (state, gateway.shared.sessions.len())
}
