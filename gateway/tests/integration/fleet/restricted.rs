//! Restricted sessions: a blocked fleet gets its update notice, and nothing else.

use std::time::{Duration, Instant};

use firmware_sim::connection::DeviceConfig;
use seawall_gateway::store::NewDevice;
use seawall_proto::{
    id::RuleId,
    rules::{Effect, Match, RuleSpec},
};
use serde_json::{Value, json};

use crate::harness::{
    devices::{assert_alive, device, devices, end_of, label, new_device, plain, with_wrong_secret},
    gateway::Gateway,
    wait::{PATIENCE, eventually},
};

const SETTINGS: &str = "limits = { connections_max = 500 }";
/// 1 % of these connections.
const SESSIONS_MAX: usize = 5;

fn restrict(matches: Match) -> RuleSpec {
    let update = json!({"url": "https://updates.example/3.8.1.bin", "sha256": "ab"});
    let Value::Object(update) = update else { unreachable!() };
    RuleSpec {
        update: Some(Box::new(update)),
        retry_after: Duration::from_secs(100),
        reason: "boot loop".to_owned(),
        ..RuleSpec::new(matches, Effect::Restrict)
    }
}

fn restrict_firmware(range: &str) -> RuleSpec {
    restrict(Match {
        firmware: Some(range.parse().unwrap()),
        ..Match::default()
    })
}

/// Asserts that the device gets only its update notice.
async fn assert_restricted(gateway: &Gateway, device: &DeviceConfig, rule: RuleId) {
    let mut connection = gateway.connect(device).await.admitted();
    assert_eq!(connection.protocol().map(str::to_owned), device.protocols);
    let first = connection.next_json(PATIENCE).await.unwrap();
    assert_eq!(
        first,
        json!({"type": "update", "rule": rule.0.to_string(), "update": {"url": "https://updates.example/3.8.1.bin", "sha256": "ab"}})
    );
    let (frames, code, reason) = end_of(&mut connection, PATIENCE).await;
    assert_eq!((frames.len(), code, &reason["reason"]), (0, 4000, &json!("evicted")));
    let hint = reason["retry_after_ms"].as_u64().unwrap();
    assert!((100_000..=200_000).contains(&hint), "{hint}");
}

fn handshakes(gateway: &Gateway, outcome: &str) -> u64 {
    gateway.metric(&format!("seawall_handshakes_total{{outcome=\"{outcome}\"}}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn restricted_device_is_told_of_its_update_and_reaches_nothing_else() {
    let gateway = Gateway::start(SETTINGS).await;
    gateway.register(0..2).await;
    let mut before = gateway.session(&device(0).firmware("3.8.0")).await;
    let lookups = gateway.metric("seawall_lookups_total{");
    let rule = gateway.add_rule(restrict_firmware("3.8.*")).await;

    let registered = device(1).firmware("3.8.0");
    let wrong = with_wrong_secret(&device(1)).firmware("3.8.0");
    let unknown = device(7).firmware("3.8.0");
    let of_a_session = device(0).firmware("3.8.0");
    for shown in [
        &registered,
        &wrong,
        &unknown,
        &of_a_session,
        &plain(device(1).firmware("3.8.0")),
    ] {
        assert_restricted(&gateway, shown, rule).await;
    }

    assert_alive(&mut before).await;
    assert_eq!(gateway.shared.sessions.len(), 1, "restricted sessions replace nobody");
    assert_eq!(gateway.metric("seawall_lookups_total{"), lookups, "they cost no query");
    assert_eq!(
        (handshakes(&gateway, "restricted"), handshakes(&gateway, "admitted")),
        (5, 1)
    );
    assert_eq!(gateway.metric("seawall_closes_total{"), 0);
    assert!(gateway.shared.history.record(registered.id).unwrap().offline.is_none());
    gateway.delete_rule(rule).await;
    gateway.session(&registered).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_a_restricted_session_go_nowhere_and_its_place_is_given_back() {
    let gateway = Gateway::start(SETTINGS).await;
    gateway.add_rule(restrict_firmware("3.8.*")).await;
    let mut held = Vec::new();
    for number in 0..SESSIONS_MAX {
        let mut session = gateway
            .connect(&device(number as u32).firmware("3.8.0"))
            .await
            .admitted();
        let message = json!({"type": "message", "id": "1", "topic": "t", "payload": 1});
        // The gateway may have closed its side already.
        let _ = session.send_json(&message).await;
        held.push(session);
    }
    // None of them reads its update and the close frame, so that their places stay taken.
    eventually(|| gateway.shared.restricted.len() == SESSIONS_MAX).await;
    let attempt = gateway.connect(&device(9).firmware("3.8.0")).await;
    let refused = attempt.refused_with(403, "firmware_blocked");
    assert_eq!(refused.detail.as_deref(), Some("boot loop"));
    assert!((100_000..=200_000).contains(&refused.retry_after_ms.unwrap()));
    assert!(refused.rule.is_some());

    for session in &mut held {
        let (frames, code, _) = end_of(session, PATIENCE).await;
        assert_eq!(
            (frames[0]["type"].as_str(), frames.len(), code),
            (Some("update"), 1, 4000)
        );
    }
    eventually(|| gateway.shared.restricted.is_empty()).await;
    assert_eq!(gateway.metric("seawall_messages_total{"), 0);
    assert_eq!(gateway.metric("seawall_presence_devices{"), 0);
    gateway.connect(&device(9).firmware("3.8.0")).await.admitted();
}

#[tokio::test(flavor = "multi_thread")]
async fn device_that_never_closes_is_dropped_within_a_minute() {
    let gateway = Gateway::start(SETTINGS).await;
    gateway.add_rule(restrict_firmware("3.8.*")).await;

    let _idle = gateway.connect(&device(1).firmware("3.8.0")).await.admitted();
    let mut busy = gateway.connect(&device(2).firmware("3.8.0")).await.admitted();
    let begun = Instant::now();
    eventually(|| gateway.shared.restricted.len() == 2).await;
    while !gateway.shared.restricted.is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(60));
        // It sends for as long as it can, and never closes either.
        let _ = busy.send_json(&json!({"type": "heartbeat"})).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    assert!(begun.elapsed() > Duration::from_secs(5), "slow links get their time");
}

#[tokio::test(flavor = "multi_thread")]
async fn rule_on_the_tenant_restricts_after_the_look_up() {
    let gateway = Gateway::start(SETTINGS).await;
    let acme = NewDevice {
        tenant: Some(label("acme")),
        ..new_device(0)
    };
    gateway.register_as(&acme).await;
    gateway.register(1..2).await;
    let by_tenant = Match {
        tenant: Some(label("acme")),
        ..Match::default()
    };
    let rule = gateway.add_rule(restrict(by_tenant)).await;

    assert_restricted(&gateway, &device(0), rule).await;
    let wrong = with_wrong_secret(&device(0));
    gateway.connect(&wrong).await.refused_with(401, "unauthorized");
    let _other = gateway.session(&device(1)).await;
    assert_eq!(gateway.shared.sessions.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn block_wins_over_restrict_and_evicted_devices_return_to_their_update() {
    let gateway = Gateway::start(SETTINGS).await;
    gateway.register(0..3).await;
    let bad: Vec<_> = devices(0..3)
        .into_iter()
        .map(|device| device.firmware("3.8.0"))
        .collect();
    let mut sessions = Vec::new();
    for device in &bad {
        sessions.push(gateway.session(device).await);
    }
    let rule = gateway
        .add_rule(RuleSpec {
            evict: true,
            ..restrict_firmware("3.8.*")
        })
        .await;

    for session in &mut sessions {
        let (_, code, _) = end_of(session, PATIENCE).await;
        assert_eq!(code, 4000);
    }
    assert_restricted(&gateway, &bad[0], rule).await;
    let block = gateway.add_rule(crate::harness::devices::block("=3.8.0")).await;
    let attempt = gateway.connect(&bad[0]).await;
    let refused = attempt.refused_with(403, "firmware_blocked");
    assert_eq!(refused.rule.as_deref(), Some(block.0.to_string().as_str()));
}
