//! Resume tokens: devices reconnect without the database. For revoked devices see [`super::revoked`].

use std::{
    fs,
    ops::Range,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use firmware_sim::connection::{Connection, DeviceConfig};
use seawall_gateway::{runtime::config::DatabaseUrl, store::Rotation};
use seawall_proto::{
    admission::BreakerState, departures::DrainOrder, id::SecretHash, resume::Generation, rules::Match,
};
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection, SqliteConnection};

use super::registry::eventually_unauthorized;
use crate::harness::{
    devices::{
        ANSWER_MAX_AWAY, assert_alive, audit, block_matching, device, devices, end_of, id, label, plain,
        with_wrong_secret,
    },
    gateway::Gateway,
    pg::{self, Cluster},
    wait::{PATIENCE, eventually},
};

const STATEMENTS: &str = "seawall_lookup_statements_total ";
const RESUMED: &str = "seawall_resumes_total{outcome=\"resumed\"}";
const GIVEN: &str = "seawall_resume_tokens_total{";

/// A session, and the token of its welcome.
async fn welcomed(gateway: &Gateway, device: &DeviceConfig) -> (Connection, Option<String>) {
    let mut connection = gateway.connect(device).await.admitted();
    let welcome = connection.next_json(PATIENCE).await.unwrap();
    assert_eq!(welcome["type"], "welcome");
    (connection, welcome["resume"].as_str().map(str::to_owned))
}

/// Devices that were connected once, with the tokens that they keep. Their sessions have ended.
pub async fn returning(gateway: &Gateway, numbers: Range<u32>) -> Vec<DeviceConfig> {
    gateway.register(numbers.clone()).await;
    let mut returning = Vec::new();
    for mut device in devices(numbers) {
        let (connection, token) = welcomed(gateway, &device).await;
        device.resume = Some(token.expect("a resume token"));
        returning.push(device);
        drop(connection);
    }
    eventually(|| gateway.shared.sessions.is_empty()).await;
    returning
}

/// Asserts that all of them are admitted quickly and without a query.
pub async fn assert_resumed(gateway: &Gateway, returning: &[DeviceConfig]) {
    let (asked, resumed) = (gateway.metric(STATEMENTS), gateway.metric(RESUMED));

    for attempt in gateway.connect_all(returning).await {
        assert!(attempt.took < ANSWER_MAX_AWAY, "answered after {:?}", attempt.took);
        assert_alive(&mut attempt.admitted()).await;
    }

    assert_eq!(gateway.metric(STATEMENTS), asked);
    assert_eq!(gateway.metric(RESUMED), resumed + returning.len() as u64);
    eventually(|| gateway.shared.sessions.is_empty()).await;
}

pub async fn on_postgres() -> (Cluster, DatabaseUrl, Gateway) {
    let cluster = Cluster::start().unwrap();
    let url = cluster.database().await.unwrap();
    let gateway = Gateway::start_on(Some(&url), "").await;
    gateway.settled().await;
    // The first probes are also statements.
    eventually(|| gateway.shared.lookups.state().breaker == BreakerState::Closed).await;
    (cluster, url, gateway)
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_return_without_a_statement_while_the_database_is_dead_and_after_a_restart_too() {
    let (cluster, url, gateway) = on_postgres().await;
    let returning = returning(&gateway, 0..40).await;
    cluster.kill().unwrap();

    assert_resumed(&gateway, &returning).await;
    assert_eq!(gateway.metric("seawall_handshakes_total{outcome=\"admitted\"}"), 80);
    let restarted = gateway.restart_on(Some(&url)).await;

    assert_resumed(&restarted, &returning).await;
    assert_eq!(restarted.metric(STATEMENTS), 0);
    let lookups = &restarted.shared.lookups;
    assert_eq!(
        lookups.slots().known + lookups.registry_index().len(),
        40,
        "all are known to the slots"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn token_helps_neither_another_device_nor_another_credential_nor_without_one() {
    let gateway = Gateway::start("").await;
    let returning = returning(&gateway, 0..2).await;
    let mut thief = device(1);
    thief.resume = returning[0].resume.clone();
    let mut guessing = with_wrong_secret(&returning[0]);
    guessing.resume = returning[0].resume.clone();
    let mut anonymous = returning[0].clone();
    anonymous.credential = firmware_sim::connection::Credential::Missing;

    let asked = gateway.metric(STATEMENTS);
    gateway.connect(&thief).await.admitted();
    gateway.connect(&guessing).await.refused_with(401, "unauthorized");
    assert_eq!(gateway.metric(STATEMENTS), asked + 2, "both were looked up");
    gateway.connect(&anonymous).await.refused_with(401, "unauthorized");

    assert_eq!(gateway.metric("seawall_resumes_total{outcome=\"invalid\"}"), 2);
    assert_eq!(gateway.metric(RESUMED), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn token_that_is_damaged_or_far_too_long_is_ignored() {
    let gateway = Gateway::start("limits.head_bytes_max = 16384").await;
    let returning = returning(&gateway, 0..1).await;
    let token = returning[0].resume.clone().unwrap();
    let others = [
        token[..token.len() - 2].to_owned(),
        format!("{token}AA"),
        "A".repeat(10_240),
        "{\"alg\":\"none\"}".to_owned(),
    ];

    for other in others {
        let mut device = device(0);
        device.resume = Some(other);
        gateway.connect(&device).await.admitted();
    }

    assert_eq!(gateway.metric(RESUMED), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_win_over_the_token_by_what_the_registry_said() {
    let gateway = Gateway::start("").await;
    let returning = returning(&gateway, 0..1).await;
    let by_tenant = Match {
        tenant: Some(label("default")),
        ..Match::default()
    };
    let asked = gateway.metric(STATEMENTS);

    let rule = gateway.add_rule(block_matching(by_tenant)).await;

    gateway
        .connect(&returning[0])
        .await
        .refused_with(403, "firmware_blocked");
    gateway.delete_rule(rule).await;
    assert_resumed(&gateway, &returning).await;
    assert_eq!(gateway.metric(STATEMENTS), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_seawall_v1_sessions_get_tokens_and_none_do_where_they_are_off() {
    let gateway = Gateway::start("").await;
    gateway.register(0..1).await;
    drop(gateway.session(&plain(device(0))).await);
    assert_eq!(gateway.metric(GIVEN), 0);
    let returning = returning(&gateway, 1..2).await;

    let off = Gateway::start("resume.life_seconds = 0").await;
    off.register(1..2).await;

    let (_, token) = welcomed(&off, &returning[0]).await;
    assert_eq!(token, None);
    assert_eq!(off.metric(RESUMED), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_renewed_while_connected_and_before_a_drain_closes() {
    let gateway = Gateway::start("resume.life_seconds = 4\nsession.heartbeat_ms = 1000").await;
    gateway.register(0..1).await;
    let (mut session, first) = welcomed(&gateway, &device(0)).await;

    let renewed = session.next_json(PATIENCE).await.unwrap();
    assert_eq!(renewed["type"], "resume");
    assert_ne!(renewed["token"].as_str(), first.as_deref());
    assert_eq!(gateway.metric("seawall_resume_tokens_total{occasion=\"renewal\"}"), 1);
    let order = DrainOrder {
        rate_per_second: None,
        announce: Duration::ZERO,
        deadline: Duration::from_secs(10),
    };
    gateway.shared.departures.start_drain(order).unwrap();

    let (mut frames, code, _) = end_of(&mut session, PATIENCE).await;
    assert_eq!((frames.pop().unwrap()["type"].take(), code), (json!("reconnect"), 1012));
    let fresh = frames.pop().unwrap();
    assert_eq!(fresh["type"], "resume");
    gateway.shared.departures.cancel_drain();
    for token in [&renewed["token"], &fresh["token"]] {
        let mut device = device(0);
        device.resume = token.as_str().map(str::to_owned);
        assert_resumed(&gateway, &[device]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn session_of_a_rotated_device_gets_no_token_for_its_old_secret() {
    let gateway = Gateway::start("resume.life_seconds = 4\nsession.heartbeat_ms = 1000").await;
    gateway.register(0..4).await;
    let (mut session, _) = welcomed(&gateway, &device(3)).await;
    let rotation = Rotation {
        secret: SecretHash::of(b"a new secret of device 3"),
        overlap: Duration::ZERO,
    };
    let state = &gateway.shared;
    state
        .store
        .device_rotate(id(3), rotation, &audit("device.rotate"))
        .await
        .unwrap();
    state.resume.revoke(id(3)).await;

    assert!(session.next_json(Duration::from_secs(5)).await.is_err(), "no renewal");

    assert_eq!(gateway.metric("seawall_resume_tokens_total{occasion=\"renewal\"}"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn key_rotation_refuses_nobody() {
    let gateway = Gateway::start("").await;
    let before = returning(&gateway, 0..10).await;
    let file = gateway.shared.config.server.data_dir.join("keys.json");
    let mut keys: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let newer = json!({"id": 2, "secret": URL_SAFE_NO_PAD.encode([9; 32])});
    keys["slots"].as_array_mut().unwrap().insert(0, newer);
    fs::write(&file, keys.to_string()).unwrap();

    let gateway = gateway.restart_on(None).await;

    assert_resumed(&gateway, &before).await;
    let after = returning(&gateway, 10..20).await;
    assert_resumed(&gateway, &after).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn token_of_one_node_counts_on_another_with_the_same_keys_and_no_longer_once_revoked() {
    let url = pg::shared().database().await.unwrap();
    let first = Gateway::start_on(Some(&url), "").await;
    eventually(|| first.shared.readiness().ready).await;
    let returning = returning(&first, 0..5).await;
    let home = tempfile::tempdir().unwrap();
    fs::create_dir(home.path().join("data")).unwrap();
    let keys = first.shared.config.server.data_dir.join("keys.json");
    fs::copy(keys, home.path().join("data/keys.json")).unwrap();

    let second = Gateway::start_in(home, Some(&url), "").await;
    eventually(|| second.shared.readiness().ready).await;

    assert_resumed(&second, &returning).await;
    first
        .shared
        .store
        .device_delete(id(0), &audit("device.delete"))
        .await
        .unwrap();
    eventually(|| second.shared.resume.known() == Generation(1)).await;
    eventually_unauthorized(&second, &returning[0]).await;
    let other = Gateway::start_on(Some(&url), "").await;
    eventually(|| other.shared.readiness().ready).await;
    other.connect(&returning[1]).await.admitted();
    assert_eq!(other.metric(RESUMED), 0, "it has keys of its own");
}

#[tokio::test(flavor = "multi_thread")]
async fn node_is_not_ready_before_it_knows_the_revocations() {
    let url = pg::shared().database().await.unwrap();
    let first = Gateway::start_on(Some(&url), "").await;
    eventually(|| first.shared.readiness().ready).await;
    first.stop().await;
    let mut hand = PgConnection::connect(url.expose()).await.unwrap();
    let lock = sqlx::raw_sql("BEGIN; LOCK TABLE revocations IN ACCESS EXCLUSIVE MODE");
    lock.execute(&mut hand).await.unwrap();

    let gateway = Gateway::start_on(Some(&url), "").await;
    let state = &gateway.shared;
    eventually(|| state.lookups.had_contact() && state.rules.is_confirmed()).await;
    assert!(!state.readiness().ready, "each device would be looked up");
    sqlx::raw_sql("COMMIT").execute(&mut hand).await.unwrap();

    eventually(|| state.readiness().ready).await;
    assert!(state.resume.revision().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_return_in_a_hundred_is_looked_up_and_what_changed_past_the_api_is_found() {
    let gateway = Gateway::start("").await;
    let returning = returning(&gateway, 0..150).await;
    let asked = gateway.metric(STATEMENTS);
    let revalidated = |outcome: &str| gateway.metric(&format!("seawall_resume_drills_total{{outcome=\"{outcome}\"}}"));

    return_until(&gateway, &returning, || revalidated("confirmed") > 0).await;
    let url = gateway.shared.config.database_url();
    let path = format!("sqlite:{}", url.sqlite_path().unwrap().display());
    let mut hand = SqliteConnection::connect(&path).await.unwrap();
    let known = gateway.shared.resume.known();
    sqlx::raw_sql("UPDATE devices SET state = 1")
        .execute(&mut hand)
        .await
        .unwrap();
    let closed = || gateway.metric("seawall_closes_total{reason=\"disabled\"}");
    return_until(&gateway, &returning, || closed() > 0).await;

    assert!(revalidated("disabled") > 0);
    assert!(gateway.shared.resume.known() > known, "all nodes learn it");
    // Devices whose token was revoked are looked up for themselves.
    let revoked = gateway.metric("seawall_resumes_total{outcome=\"revoked\"}");
    assert!(
        gateway.metric(STATEMENTS) <= asked + revoked,
        "the revalidation is counted separately"
    );
}

/// All of them reconnect, stay for a moment, and leave, repeatedly. Some may be refused.
async fn return_until(gateway: &Gateway, returning: &[DeviceConfig], holds: impl Fn() -> bool) {
    let deadline = Instant::now() + 6 * PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never came true");
        let attempts = gateway.connect_all(returning).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        drop(attempts);
    }
}
