//! A revoked device is not admitted by its token, whatever revoked it, and on every node.

use std::{
    fs,
    time::{Duration, Instant},
};

use firmware_sim::connection::DeviceConfig;
use seawall_gateway::store::{DeviceChange, ImportLine, ImportRow, OnOtherCredential, Rotation, Store};
use seawall_proto::{
    admission::BreakerState,
    id::SecretHash,
    record::DeviceState,
    resume::{Generation, REVOKED_MAX},
};
use serde_json::Value;
use sqlx::Connection as _;

use super::resume::{assert_resumed, on_postgres, returning};
use crate::harness::{
    devices::{assert_alive, audit, devices, end_of, id, label},
    gateway::Gateway,
    pg,
    wait::{PATIENCE, eventually},
};

/// Time within which a revocation takes effect on every node.
const REVOKED_WITHIN: Duration = Duration::from_secs(1);

/// Device 0 is disabled, 1 revoked, 2 deleted, 3 has a new secret, 4 another tenant; the others are unchanged.
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
    change_five(elsewhere).await;
    // A busy machine may delay one change, but not three.
    let mut took = vec![known_within(gateway, Generation(5)).await];
    for revision in [6, 7] {
        let wall = gateway.shared.clock.wall();
        elsewhere.revoke_tokens(id(90), wall).await.unwrap();
        took.push(known_within(gateway, Generation(revision)).await);
    }
    assert!(took.iter().min() < Some(&REVOKED_WITHIN), "{took:?}");
    assert_five_are_refused(gateway, &returning).await;
    returning
}

/// Time until the node knows this revision of the revocations.
async fn known_within(gateway: &Gateway, revision: Generation) -> Duration {
    let begun = Instant::now();
    eventually(|| gateway.shared.resume.known() == revision).await;
    begun.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_end_when_an_import_replaces_more_secrets_than_are_listed() {
    let gateway = Gateway::start("").await;
    let import = async |secret: &[u8]| {
        let lines = (0..=u32::try_from(REVOKED_MAX).unwrap()).map(|number| ImportLine {
            number: u64::from(number) + 2,
            row: Ok(ImportRow {
                id: id(number),
                external_id: None,
                secret: SecretHash::of(secret),
                tenant: None,
                model: None,
            }),
        });
        let lines: Vec<_> = lines.collect();
        let mut import = gateway.shared.store.import(OnOtherCredential::Update).await.unwrap();
        for batch in lines.chunks(1_000) {
            import.push(batch.to_vec()).await.unwrap();
        }
        import.finish(&audit("device.import")).await.unwrap()
    };
    import(b"the old secret of them all").await;
    gateway.register(70_000..70_001).await;
    eventually(|| gateway.shared.resume.revision().is_some()).await;
    let device = DeviceConfig::new(id(0), "the old secret of them all").firmware("1.0.0");
    let mut replaced = gateway.session(&device).await;
    let mut other = gateway.session(&devices(70_000..70_001)[0]).await;

    assert_eq!(import(b"the new secret of them all").await.updated, 65_537);

    let (_, code, _) = end_of(&mut replaced, PATIENCE).await;
    assert_eq!(code, 4003);
    assert_alive(&mut other).await;
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
    eventually(|| gateway.shared.readiness().ready).await;

    assert_five_are_refused(&gateway, &returning).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn session_ends_within_a_second_when_its_device_is_disabled_revoked_deleted_or_rotated_on_another_node() {
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

    for (session, expected) in sessions.iter_mut().zip([4002, 4501, 4501, 4003]) {
        let (_, code, _) = end_of(session, REVOKED_WITHIN).await;
        assert_eq!(code, expected);
    }
    for session in &mut sessions[4..] {
        assert_alive(session).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn device_that_was_deleted_through_another_node_is_forgotten_here() {
    let gateway = Gateway::start("").await;
    let state = &gateway.shared;
    eventually(|| state.readiness().ready).await;
    let elsewhere = Store::open(&state.config.database_url()).await.unwrap();
    returning(&gateway, 0..3).await;
    let mut session = gateway.session(&devices(1..2)[0]).await;

    for number in [0, 1] {
        let deletion = audit("device.delete");
        elsewhere.device_delete(id(number), &deletion).await.unwrap().unwrap();
    }

    let (_, code, _) = end_of(&mut session, PATIENCE).await;
    assert_eq!(code, 4501);
    eventually(|| state.sessions.is_empty()).await;
    eventually(|| [0, 1].iter().all(|number| state.history.record(id(*number)).is_none())).await;
    assert!(state.history.record(id(2)).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_on_this_node_is_refused_at_once_even_if_the_database_dies_then() {
    let (cluster, url, gateway) = on_postgres().await;
    let returning = returning(&gateway, 0..2).await;
    let state = &gateway.shared;
    cluster.kill().unwrap();

    // As the API does after each change, even if its outcome is unknown.
    state.resume.revoke(id(0)).await;

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
    let file = gateway.shared.config.server.data_dir.join("revoked.jsonl");
    cluster.kill().unwrap();
    fs::write(&file, "{").unwrap();

    let gateway = gateway.restart_on(Some(&url)).await;

    gateway
        .connect(&returning[0])
        .await
        .refused_with(503, "registry_unavailable");
    cluster.restart().unwrap();
    eventually(|| gateway.shared.readiness().ready && file_is_good(&file)).await;
    // Its probes are also statements.
    eventually(|| gateway.shared.lookups.state().breaker == BreakerState::Closed).await;
    assert_resumed(&gateway, &returning).await;
}

fn file_is_good(file: &std::path::Path) -> bool {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.ends_with('\n') && text.lines().all(|line| serde_json::from_str::<Value>(line).is_ok())
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

    eventually(|| gateway.shared.alarms.is_active("registry_older")).await;
    gateway.connect(&returning[5]).await.admitted();
    assert_eq!(gateway.metric("seawall_resumes_total{outcome=\"revoked\"}"), 1);
}
