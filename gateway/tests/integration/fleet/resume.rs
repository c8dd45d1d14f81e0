//! Resume tokens: devices come back without the database, and whoever was revoked does not, whoever revoked it and where.

use std::{
    fs,
    ops::Range,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use firmware_sim::connection::{Connection, DeviceConfig};
use seawall_gateway::{
    config::DatabaseUrl,
    drain::Order,
    store::{DeviceChange, Rotation, Store},
};
use seawall_proto::{id::SecretHash, record::DeviceState, resume::Generation, rules::Match};
use serde_json::{Value, json};
use sqlx::{Connection as _, SqliteConnection};

use super::rig::{
    ANSWER_MAX_AWAY, Gateway, PATIENCE, assert_alive, audit, block_matching, device, devices, end_of, eventually, id,
    label, plain, with_wrong_secret,
};
use crate::harness::pg::{self, Cluster};

/// Within this a revocation counts on every node.
const REVOKED_WITHIN: Duration = Duration::from_secs(1);

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

/// Devices that were connected once, with what they keep of it. Their sessions have ended.
async fn returning(gateway: &Gateway, numbers: Range<u32>) -> Vec<DeviceConfig> {
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

/// All of them get in without a query, and fast.
async fn assert_resumed(gateway: &Gateway, returning: &[DeviceConfig]) {
    let (asked, resumed) = (gateway.metric(STATEMENTS), gateway.metric(RESUMED));

    for attempt in gateway.connect_all(returning).await {
        assert!(attempt.took < ANSWER_MAX_AWAY, "answered after {:?}", attempt.took);
        assert_alive(&mut attempt.admitted()).await;
    }

    assert_eq!(gateway.metric(STATEMENTS), asked);
    assert_eq!(gateway.metric(RESUMED), resumed + returning.len() as u64);
    eventually(|| gateway.shared.sessions.is_empty()).await;
}

async fn on_postgres() -> (Cluster, DatabaseUrl, Gateway) {
    let cluster = Cluster::start().unwrap();
    let url = cluster.database().await.unwrap();
    let gateway = Gateway::start_on(Some(&url), "").await;
    eventually(|| gateway.shared.readiness().ready).await;
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
    assert_eq!(restarted.shared.gate.state().known, 40, "no strangers to the slots");
}

/// Device 0 is disabled, 1 revoked, 2 deleted, 3 has a new secret, 4 another tenant; the others are as they were.
async fn change_five(store: &Store) {
    let state = |state| DeviceChange {
        state: Some(state),
        ..DeviceChange::default()
    };
    let moved = DeviceChange {
        tenant: Some(label("elsewhere")),
        ..DeviceChange::default()
    };
    let audit = audit("device.update");
    for (number, change) in [
        (0, state(DeviceState::Disabled)),
        (1, state(DeviceState::Revoked)),
        (4, moved),
    ] {
        store.device_update(id(number), &change, &audit).await.unwrap().unwrap();
    }
    store.device_delete(id(2), &audit).await.unwrap().unwrap();
    let rotation = Rotation {
        secret: SecretHash::of(b"a new secret of device 3"),
        overlap: Duration::ZERO,
    };
    store.device_rotate(id(3), rotation, &audit).await.unwrap().unwrap();
}

async fn assert_five_are_refused(gateway: &Gateway, returning: &[DeviceConfig]) {
    for (device, status) in returning.iter().zip([403, 401, 401, 401]) {
        assert_eq!(gateway.connect(device).await.refused().status, status);
    }
    gateway.connect(&returning[4]).await.admitted();
    assert_eq!(gateway.metric("seawall_resumes_total{outcome=\"revoked\"}"), 5);
    eventually(|| gateway.shared.sessions.is_empty()).await;
    assert_resumed(gateway, &returning[5..]).await;
}

async fn revoked_elsewhere(gateway: &Gateway, elsewhere: &Store) -> Vec<DeviceConfig> {
    let returning = returning(gateway, 0..10).await;
    let known = gateway.shared.resume.known();
    change_five(elsewhere).await;
    let begun = Instant::now();
    eventually(|| gateway.shared.resume.known() == Generation(known.0 + 5)).await;
    assert!(begun.elapsed() < REVOKED_WITHIN, "{:?}", begun.elapsed());
    assert_five_are_refused(gateway, &returning).await;
    returning
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_on_another_node_is_refused_within_a_second_and_after_a_restart_without_the_database() {
    let (cluster, url, gateway) = on_postgres().await;
    let elsewhere = Store::open(&url).await.unwrap();
    elsewhere.ready().await;
    let returning = revoked_elsewhere(&gateway, &elsewhere).await;
    cluster.kill().unwrap();

    let gateway = gateway.restart_on(Some(&url)).await;

    for device in &returning[..5] {
        let attempt = gateway.connect(device).await;
        attempt.refused_with(503, "registry_unavailable");
    }
    assert_resumed(&gateway, &returning[5..]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_by_another_process_on_sqlite_is_refused_within_a_second_and_after_a_restart() {
    let gateway = Gateway::start("").await;
    let url = gateway.shared.config.database_url();
    let elsewhere = Store::open(&url).await.unwrap();
    let returning = revoked_elsewhere(&gateway, &elsewhere).await;

    let gateway = gateway.restart_on(None).await;

    assert_five_are_refused(&gateway, &returning).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn session_ends_within_a_second_when_its_device_is_disabled_revoked_or_deleted_on_another_node() {
    let url = pg::shared().database().await.unwrap();
    let gateway = Gateway::start_on(Some(&url), "").await;
    eventually(|| gateway.shared.readiness().ready).await;
    let elsewhere = Store::open(&url).await.unwrap();
    elsewhere.ready().await;
    gateway.register(0..6).await;
    let mut sessions = Vec::new();
    for device in devices(0..6) {
        sessions.push(gateway.session(&device).await);
    }

    change_five(&elsewhere).await;

    for (session, expected) in sessions.iter_mut().zip([4002, 4501, 4501]) {
        let (_, code, _) = end_of(session, REVOKED_WITHIN).await;
        assert_eq!(code, expected);
    }
    for session in &mut sessions[3..] {
        assert_alive(session).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_on_this_node_is_refused_at_once_even_if_the_database_dies_then() {
    let (cluster, url, gateway) = on_postgres().await;
    let returning = returning(&gateway, 0..2).await;
    let state = &gateway.shared;
    cluster.kill().unwrap();

    // As the API does behind each change, also behind one whose outcome is not known.
    state.resume.revoke(id(0), &state.store, &state.clock).await;

    let refused = |gateway: Gateway, device: DeviceConfig| async move {
        let status = gateway.connect(&device).await.refused().status;
        (gateway, status)
    };
    let (gateway, status) = refused(gateway, returning[0].clone()).await;
    assert_eq!(status, 503);
    assert_resumed(&gateway, &returning[1..]).await;
    let gateway = gateway.restart_on(Some(&url)).await;
    let (gateway, status) = refused(gateway, returning[0].clone()).await;
    assert_eq!(status, 503);
    assert_resumed(&gateway, &returning[1..]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_file_of_revocations_a_node_counts_no_token_until_the_database_answers() {
    let (cluster, url, gateway) = on_postgres().await;
    let returning = returning(&gateway, 0..3).await;
    let file = gateway.shared.config.server.data_dir.join("revoked.json");
    cluster.kill().unwrap();
    fs::write(&file, "{").unwrap();

    let gateway = gateway.restart_on(Some(&url)).await;

    gateway
        .connect(&returning[0])
        .await
        .refused_with(503, "registry_unavailable");
    cluster.restart().unwrap();
    eventually(|| gateway.shared.readiness().ready && file_is_good(&file)).await;
    assert_resumed(&gateway, &returning).await;
}

fn file_is_good(file: &std::path::Path) -> bool {
    serde_json::from_slice::<Value>(&fs::read(file).unwrap()).is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn registry_out_of_a_backup_has_every_device_looked_up_once() {
    let url = pg::shared().database().await.unwrap();
    let gateway = Gateway::start_on(Some(&url), "").await;
    eventually(|| gateway.shared.readiness().ready).await;
    let returning = returning(&gateway, 0..6).await;
    change_five(&gateway.shared.store).await;
    eventually(|| gateway.shared.resume.known() == Generation(5)).await;
    let mut backup = sqlx::PgConnection::connect(url.expose()).await.unwrap();
    let older = "DELETE FROM revocations; UPDATE meta SET value = '2' WHERE key = 'revocations_revision'";
    sqlx::raw_sql(older).execute(&mut backup).await.unwrap();

    eventually(|| gateway.shared.resume.known() == Generation(6)).await;

    gateway.connect(&returning[5]).await.admitted();
    assert_eq!(gateway.metric("seawall_resumes_total{outcome=\"revoked\"}"), 1);
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
    assert_eq!(gateway.metric("seawall_resumes_total{outcome=\"blocked\"}"), 1);
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
    let order = Order {
        rate_per_second: None,
        announce: Duration::ZERO,
        deadline: Duration::from_secs(10),
    };
    gateway.shared.drain.start(order).unwrap();

    let (mut frames, code, _) = end_of(&mut session, PATIENCE).await;
    assert_eq!((frames.pop().unwrap()["type"].take(), code), (json!("reconnect"), 1012));
    let fresh = frames.pop().unwrap();
    assert_eq!(fresh["type"], "resume");
    gateway.shared.drain.cancel();
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
    state.resume.revoke(id(3), &state.store, &state.clock).await;

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
async fn one_return_in_a_hundred_is_looked_up_and_what_changed_past_the_api_is_found() {
    let gateway = Gateway::start("").await;
    let returning = returning(&gateway, 0..150).await;
    let asked = gateway.metric(STATEMENTS);
    let drilled = |outcome: &str| gateway.metric(&format!("seawall_resume_drills_total{{outcome=\"{outcome}\"}}"));

    return_until(&gateway, &returning, || drilled("confirmed") > 0).await;
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

    assert!(drilled("disabled") > 0);
    assert!(gateway.shared.resume.known() > known, "all nodes are told");
    // Those whose token was revoked are looked up for themselves.
    let revoked = gateway.metric("seawall_resumes_total{outcome=\"revoked\"}");
    assert!(
        gateway.metric(STATEMENTS) <= asked + revoked,
        "the drill is counted apart"
    );
}

/// All of them come back, stay for a moment, and leave, again and again. Some may be refused.
async fn return_until(gateway: &Gateway, returning: &[DeviceConfig], holds: impl Fn() -> bool) {
    let deadline = Instant::now() + 6 * PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never came true");
        let attempts = gateway.connect_all(returning).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        drop(attempts);
    }
}
