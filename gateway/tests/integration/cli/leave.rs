//! Signals with live sessions.

use std::{
    fs,
    time::{Duration, Instant},
};

use firmware_sim::connection::{Connection, DeviceConfig, Received};
use rustix::process::Signal;
use serde_json::Value;

use super::{STOP_MAX, done};
use crate::harness::{process::GatewayProcess, wait::eventually};

#[test]
fn sigterm_drains_and_exits_0() {
    let mut gateway = GatewayProcess::start(&[]).unwrap();

    gateway.signal(Signal::TERM).unwrap();

    assert_eq!(
        gateway.wait(STOP_MAX).unwrap().code(),
        Some(0),
        "{}",
        gateway.log().unwrap()
    );
    assert!(!gateway.data_dir().join("addresses.json").exists());
}

#[test]
fn sigterm_ends_a_gateway_whose_data_directory_hangs() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    let mut gateway = GatewayProcess::start(&[]).unwrap();
    // Opening it for writing waits for a reader that never comes.
    let hanging = gateway.data_dir().join("session-ids.json.new");
    mknodat(CWD, &hanging, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();

    gateway.signal(Signal::TERM).unwrap();

    let status = gateway.wait(STOP_MAX).unwrap();
    assert_eq!(status.code(), Some(0), "{}", gateway.log().unwrap());
}

/// A gateway with live sessions of `count` devices. It closes one per second when it drains.
async fn gateway_with_sessions(count: usize) -> (GatewayProcess, Vec<Connection>) {
    let home = tempfile::tempdir().unwrap();
    let (config, fleet) = (home.path().join("seawall.toml"), home.path().join("fleet.csv"));
    fs::write(&config, "[drain]\nrate_per_second = 1\n").unwrap();
    let gateway = GatewayProcess::start(&["--config", config.to_str().unwrap()]).unwrap();
    let out = fleet.to_str().unwrap();
    done(&mut gateway.operator(&["devices", "seed", "--count", &count.to_string(), "--out", out]));
    let url = format!("ws://{}", gateway.addresses.devices);
    let mut sessions = Vec::new();
    for line in fs::read_to_string(&fleet).unwrap().lines().skip(1) {
        let (id, secret) = line.split_once(',').unwrap();
        let device = DeviceConfig::new(id.parse().unwrap(), secret);
        sessions.push(Connection::open(&url, &device).await.unwrap());
    }
    (gateway, sessions)
}

/// Reads to the close frame; asserts that it is 1012 with a hint.
async fn assert_sent_away(mut session: Connection) {
    let closed = async {
        loop {
            match session.next_frame().await {
                Received::Closed { code, reason } => break (code, reason),
                Received::Lost => panic!("lost without a close frame"),
                Received::Text(_) | Received::Binary(_) | Received::Ping(_) | Received::Pong(_) => {}
            }
        }
    };
    let (code, reason) = tokio::time::timeout(STOP_MAX, closed).await.unwrap();
    let reason: Value = serde_json::from_str(&reason).unwrap();
    assert_eq!((code, &reason["reason"]), (1012, &Value::from("draining")));
    assert!(reason["retry_after_ms"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn sessions_are_sent_away_with_hints_at_sigterm() {
    let (mut gateway, sessions) = gateway_with_sessions(2).await;

    gateway.signal(Signal::TERM).unwrap();

    for session in sessions {
        assert_sent_away(session).await;
    }
    assert_eq!(
        gateway.wait(STOP_MAX).unwrap().code(),
        Some(0),
        "{}",
        gateway.log().unwrap()
    );
}

#[tokio::test]
async fn second_signal_sends_the_rest_away_within_2_seconds() {
    let (mut gateway, sessions) = gateway_with_sessions(12).await;
    gateway.signal(Signal::TERM).unwrap();
    eventually(|| gateway.has_logged("drain started")).await;

    gateway.signal(Signal::INT).unwrap();
    let asked = Instant::now();
    for session in sessions {
        assert_sent_away(session).await;
    }

    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    assert_eq!(
        gateway.wait(STOP_MAX).unwrap().code(),
        Some(0),
        "{}",
        gateway.log().unwrap()
    );
}
