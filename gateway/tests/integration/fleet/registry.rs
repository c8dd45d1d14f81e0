//! A registry that answers wrongly: unreadable, emptied, or another file. No device is told that it is not registered,
//! no session ends, and operators learn why.

use std::{fs, path::PathBuf, sync::Arc};

use firmware_sim::connection::DeviceConfig;
use seawall_gateway::{
    fleet::{faults::Fault, registry::ACCEPT_FILE, registry_index::FILE},
    node::Shared,
    runtime::config::DatabaseUrl,
    store::{AuditEntry, Change, DatabaseStatus, OnOtherCredential, StoreError},
};
use seawall_proto::{id::RuleId, resume::Generation, slots::RegistryIndex};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, SqliteConnection};

use super::resume::{assert_resumed, returning};
use crate::harness::{
    devices::{add_rule, assert_alive, audit, block, device, devices, end_of, id, persist_all},
    gateway::Gateway,
    pg,
    wait::{PATIENCE, eventually},
};

/// More devices than a registry may lose and still be believed.
const DEVICES: u32 = 30;

async fn behind_the_back(gateway: &Gateway, sql: &str) {
    by_hand(&gateway.shared.config.database_url(), sql).await;
}

async fn by_hand(url: &DatabaseUrl, sql: &str) {
    let sql = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()));
    match url.sqlite_path() {
        Some(path) => {
            let url = format!("sqlite:{}", path.display());
            let mut connection = SqliteConnection::connect(&url).await.unwrap();
            sql.execute(&mut connection).await.map(drop).unwrap();
        }
        None => {
            let mut connection = PgConnection::connect(url.expose()).await.unwrap();
            sql.execute(&mut connection).await.map(drop).unwrap();
        }
    }
}

/// A gateway on this database whose registry index has all its devices.
async fn known(database: Option<&DatabaseUrl>) -> Gateway {
    let gateway = Gateway::start_on(database, "").await;
    eventually(|| gateway.shared.readiness().ready).await;
    gateway.register(0..DEVICES).await;
    gateway.shared.registry_index_wanted.ask();
    eventually(|| registry_index_on_disk(&gateway.shared) == DEVICES as usize).await;
    gateway
}

fn registry_index_on_disk(shared: &Shared) -> usize {
    let file = shared.config.server.data_dir.join(FILE);
    fs::read(file).map_or(0, |bytes| RegistryIndex::from_bytes(&bytes).unwrap().len())
}

fn has_reason(gateway: &Gateway, fault: Fault) -> bool {
    gateway.shared.readiness().reasons.contains(&fault.as_str())
}

fn accept_file(gateway: &Gateway) -> PathBuf {
    gateway.shared.config.server.data_dir.join(ACCEPT_FILE)
}

#[tokio::test(flavor = "multi_thread")]
async fn row_that_cannot_be_read_is_registry_unavailable_and_ends_no_session() {
    let gateway = Gateway::start("").await;
    gateway.register(0..3).await;
    let mut live = gateway.session(&device(0)).await;

    behind_the_back(
        &gateway,
        &format!(
            "PRAGMA ignore_check_constraints = ON; UPDATE devices SET state = 'enabled' WHERE id = X'{}'",
            id(0).as_uuid().simple()
        ),
    )
    .await;
    let attempt = gateway.connect(&device(0)).await;

    let refused = attempt.refused_with(503, "registry_unavailable");
    assert!(refused.slot.is_some() && refused.retry_after_ms.is_some());
    gateway.connect(&device(1)).await.admitted();
    eventually(|| has_reason(&gateway, Fault::RegistryUnreadable)).await;
    let detail = gateway.shared.faults.detail(Fault::RegistryUnreadable).unwrap();
    assert!(
        detail.contains(&id(0).to_string()) && detail.contains("state"),
        "{detail}"
    );
    // A recorded change causes a check of the session.
    let state = &gateway.shared;
    state.store.revoke_tokens(id(0), state.clock.wall()).await.unwrap();
    state.store.revoke_tokens(id(1), state.clock.wall()).await.unwrap();
    eventually(|| state.resume.known() == Generation(2)).await;
    assert_alive(&mut live).await;
    assert!(state.readiness().ready);
    assert!(matches!(
        state.store.device(id(0)).await,
        Err(StoreError::Undecodable(_))
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn column_of_another_type_is_registry_unavailable_for_everybody_and_nobody_s_session_ends() {
    let url = pg::shared().database().await.unwrap();
    let gateway = known(Some(&url)).await;
    let mut live = gateway.session(&device(0)).await;

    behind_the_back(&gateway, "ALTER TABLE devices ALTER COLUMN state TYPE int").await;

    for attempt in gateway.connect_all(&devices(1..20)).await {
        attempt.refused_with(503, "registry_unavailable");
    }
    eventually(|| has_reason(&gateway, Fault::RegistryUnreadable)).await;
    assert_alive(&mut live).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_column_is_a_reason_with_its_cause_and_never_calls_the_database_away() {
    let url = pg::shared().database().await.unwrap();
    let gateway = known(Some(&url)).await;
    let mut told = gateway.shared.store.subscribe();
    told.mark_unchanged();

    behind_the_back(&gateway, "ALTER TABLE devices RENAME COLUMN model TO model_x").await;

    eventually_refused(&gateway).await;
    eventually(|| has_reason(&gateway, Fault::LookupsFail) && has_reason(&gateway, Fault::DatabaseRefuses)).await;
    for fault in [Fault::LookupsFail, Fault::DatabaseRefuses] {
        let detail = gateway.shared.faults.detail(fault).unwrap();
        assert!(detail.contains("model"), "{detail}");
    }
    let error = gateway.shared.store.device(id(0)).await.unwrap_err();
    assert!(matches!(error, StoreError::Unusable(_)), "{error}");
    assert_eq!(gateway.shared.store.state().status, DatabaseStatus::Available);
    assert!(!told.has_changed().unwrap());

    behind_the_back(&gateway, "ALTER TABLE devices RENAME COLUMN model_x TO model").await;

    eventually(|| !has_reason(&gateway, Fault::LookupsFail)).await;
    gateway.connect(&device(1)).await.admitted();
}

/// Connects until a refusal shows that the breaker is open.
async fn eventually_refused(gateway: &Gateway) {
    for attempt in gateway.connect_all(&devices(0..10)).await {
        attempt.refused_with(503, "registry_unavailable");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn emptied_registry_is_not_believed_until_a_person_says_so_on_sqlite() {
    assert_not_believed(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn emptied_registry_is_not_believed_until_a_person_says_so_on_postgresql() {
    let url = pg::shared().database().await.unwrap();
    assert_not_believed(Some(&url)).await;
}

async fn assert_not_believed(database: Option<&DatabaseUrl>) {
    let gateway = known(database).await;
    let mut live = gateway.session(&device(0)).await;
    let waiting = eventually_held(&gateway).await;

    assert_alive(&mut live).await;
    assert!(
        gateway.shared.readiness().ready,
        "a load balancer must not move the fleet"
    );
    drop((live, waiting));
    let gateway = gateway.restart_on(database).await;

    eventually(|| has_reason(&gateway, Fault::RegistryShrunken)).await;
    let readiness = gateway.shared.readiness();
    assert!(readiness.ready, "a reason in a 200: {readiness:?}");
    gateway
        .connect(&device(1))
        .await
        .refused_with(503, "registry_unavailable");
    assert_eq!(registry_index_on_disk(&gateway.shared), DEVICES as usize);
    fs::write(accept_file(&gateway), "").unwrap();

    eventually(|| !has_reason(&gateway, Fault::RegistryShrunken) && !accept_file(&gateway).exists()).await;
    gateway.connect(&device(1)).await.refused_with(401, "unauthorized");
    eventually(|| registry_index_on_disk(&gateway.shared) == 0).await;
}

/// Empties the registry, and connects until it is no longer believed.
async fn eventually_held(gateway: &Gateway) {
    behind_the_back(gateway, "DELETE FROM devices").await;
    // A missing device causes a count, and is not told before it that it is not registered.
    gateway
        .connect(&device(2))
        .await
        .refused_with(503, "registry_unavailable");
    eventually(|| has_reason(gateway, Fault::RegistryShrunken)).await;
    gateway
        .connect(&device(1))
        .await
        .refused_with(503, "registry_unavailable");
    gateway
        .connect(&device(2))
        .await
        .refused_with(503, "registry_unavailable");
}

#[tokio::test(flavor = "multi_thread")]
async fn registry_of_another_fleet_of_the_same_size_is_not_believed_on_sqlite() {
    assert_other_fleet_is_not_believed(None, "randomblob(16)").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn registry_of_another_fleet_of_the_same_size_is_not_believed_on_postgresql() {
    let url = pg::shared().database().await.unwrap();
    assert_other_fleet_is_not_believed(Some(&url), "gen_random_uuid()").await;
}

async fn assert_other_fleet_is_not_believed(database: Option<&DatabaseUrl>, random_id: &str) {
    let gateway = known(database).await;
    let mut live = persist_all(gateway.devices, devices(0..25)).await;
    behind_the_back(
        &gateway,
        &format!("CREATE TABLE kept AS SELECT * FROM devices; UPDATE devices SET id = {random_id}"),
    )
    .await;

    gateway
        .connect(&device(26))
        .await
        .refused_with(503, "registry_unavailable");
    eventually(|| has_reason(&gateway, Fault::RegistryShrunken)).await;

    for attempt in gateway.connect_all(&devices(26..29)).await {
        attempt.refused_with(503, "registry_unavailable");
    }
    for session in &mut live {
        assert_alive(&mut session.connection).await;
    }
    assert!(
        gateway.shared.readiness().ready,
        "a load balancer must not move the fleet"
    );
    drop(live);

    // A node that has only its registry index to judge by.
    let url = gateway.shared.config.database_url();
    let home = gateway.stop_and_keep().await;
    by_hand(&url, "DELETE FROM presence").await;
    let gateway = Gateway::start_in(home, database, "").await;

    eventually(|| has_reason(&gateway, Fault::RegistryShrunken)).await;
    assert!(gateway.shared.readiness().ready);
    gateway
        .connect(&device(1))
        .await
        .refused_with(503, "registry_unavailable");
    assert_eq!(registry_index_on_disk(&gateway.shared), DEVICES as usize);

    by_hand(&url, "DELETE FROM devices; INSERT INTO devices SELECT * FROM kept").await;

    eventually(|| gateway.shared.readiness().reasons.is_empty()).await;
    gateway.connect(&device(1)).await.admitted();
    gateway
        .connect(&device(DEVICES))
        .await
        .refused_with(401, "unauthorized");
}

#[tokio::test(flavor = "multi_thread")]
async fn recorded_changes_of_unknown_devices_explain_no_loss() {
    let gateway = known(None).await;
    let state = &gateway.shared;
    for number in 0..2 * DEVICES {
        let other = id(1_000 + number);
        state.store.revoke_tokens(other, state.clock.wall()).await.unwrap();
    }

    eventually_held(&gateway).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn emptied_registry_whose_devices_can_not_be_counted_is_not_believed() {
    let gateway = known(None).await;
    // Not in the registry index.
    gateway.register(DEVICES..DEVICES + 1).await;
    behind_the_back(&gateway, "ALTER TABLE revocations RENAME TO gone; DELETE FROM devices").await;

    gateway
        .connect(&device(1))
        .await
        .refused_with(503, "registry_unavailable");
    eventually(|| !gateway.shared.lookups.believes_absence()).await;

    gateway
        .connect(&device(DEVICES))
        .await
        .refused_with(503, "registry_unavailable");
}

#[tokio::test(flavor = "multi_thread")]
async fn whole_registry_is_believed_after_a_restart_on_postgresql() {
    let url = pg::shared().database().await.unwrap();
    let gateway = known(Some(&url)).await.restart_on(Some(&url)).await;

    eventually(|| gateway.shared.readiness().ready).await;
    gateway.connect(&device(1)).await.admitted();
    gateway
        .connect(&device(DEVICES))
        .await
        .refused_with(401, "unauthorized");
}

#[tokio::test(flavor = "multi_thread")]
async fn restored_registry_is_believed_by_itself() {
    let gateway = known(None).await;
    let path = gateway.shared.config.database_url().sqlite_path().unwrap();
    behind_the_back(
        &gateway,
        &format!("VACUUM INTO '{}'", path.with_extension("backup").display()),
    )
    .await;
    eventually_held(&gateway).await;

    behind_the_back(
        &gateway,
        &format!(
            "ATTACH '{}' AS backup; INSERT INTO devices SELECT * FROM backup.devices",
            path.with_extension("backup").display()
        ),
    )
    .await;

    eventually(|| gateway.shared.readiness().reasons.is_empty()).await;
    gateway.connect(&device(1)).await.admitted();
}

#[tokio::test(flavor = "multi_thread")]
async fn most_of_a_fleet_can_be_deleted_through_the_api() {
    let gateway = known(None).await;
    let mut live = gateway.session(&device(1)).await;
    let store = &gateway.shared.store;
    let mut audit = audit("device.delete");
    audit.at = gateway.shared.clock.wall();

    for number in 1..DEVICES {
        store.device_delete(id(number), &audit).await.unwrap().unwrap();
    }
    gateway.shared.registry_index_wanted.ask();

    let (_, code, _) = end_of(&mut live, PATIENCE).await;
    assert_eq!(code, 4501, "on record");
    eventually(|| registry_index_on_disk(&gateway.shared) == 1).await;
    assert!(gateway.shared.readiness().reasons.is_empty());
    gateway.connect(&device(1)).await.refused_with(401, "unauthorized");
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_device_of_the_registry_index_is_unauthorized_once_the_devices_were_counted() {
    let gateway = known(None).await;
    let mut audit = audit("device.delete");
    audit.at = gateway.shared.clock.wall();
    let deleted = gateway.shared.store.device_delete(id(1), &audit).await;
    deleted.unwrap().unwrap();

    eventually_unauthorized(&gateway, &device(1)).await;
}

/// Connects a deleted device of the registry index until the devices were counted.
pub async fn eventually_unauthorized(gateway: &Gateway, device: &DeviceConfig) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let attempt = gateway.connect(device).await;
        if attempt.refused().status == 401 {
            return;
        }
        attempt.refused_with(503, "registry_unavailable");
        assert!(tokio::time::Instant::now() < deadline, "it never gets this answer");
        // Each attempt counts as one with a wrong credential, and the eleventh would be throttled.
        tokio::time::sleep(std::time::Duration::from_millis(700)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn device_that_is_gone_without_a_record_is_not_told_to_stay_away() {
    let gateway = Gateway::start("").await;
    let returning = returning(&gateway, 0..1).await;
    behind_the_back(&gateway, "DELETE FROM devices").await;

    let close = loop {
        let mut session = gateway.session(&returning[0]).await;
        let revalidated = || gateway.metric("seawall_resume_drills_total{outcome=\"absent\"}") > 0;
        if revalidated() {
            break end_of(&mut session, PATIENCE).await;
        }
        let looked = tokio::time::timeout(std::time::Duration::from_millis(20), end_of(&mut session, PATIENCE));
        if let Ok(end) = looked.await {
            break end;
        }
    };

    assert_eq!(close.1, 4003);
}

#[tokio::test(flavor = "multi_thread")]
async fn database_file_that_is_deleted_or_replaced_is_an_alarm_and_takes_no_writes() {
    let gateway = known(None).await;
    let mut live = gateway.session(&device(0)).await;
    let path = gateway.shared.config.database_url().sqlite_path().unwrap();
    let kept = path.with_extension("kept");
    fs::rename(&path, &kept).unwrap();

    let (rule, by) = (RuleId(uuid::Uuid::new_v4()), audit("rule.create"));
    let refused = gateway
        .shared
        .store
        .rule_insert(rule, block("=6.6.6"), seawall_gateway::store::Consent::Given, &by)
        .await;
    assert!(matches!(refused, Err(StoreError::FileChanged("deleted"))));
    assert!(!path.exists(), "no new registry in its place");
    let store = &gateway.shared.store;
    let entry = AuditEntry::new(&audit("drain.start"), Change::of("node"));
    let recorded = store.audit_append(&entry).await;
    assert!(
        matches!(recorded, Err(StoreError::FileChanged("deleted"))),
        "{recorded:?}"
    );
    let counted = store.counts_write(gateway.shared.run, "node", "{}").await;
    assert!(
        matches!(counted, Err(StoreError::FileChanged("deleted"))),
        "{counted:?}"
    );
    eventually(|| has_reason(&gateway, Fault::DatabaseFile)).await;
    fs::write(&path, "another").unwrap();
    let imported = gateway.shared.store.import(OnOtherCredential::Refuse).await;
    assert!(matches!(imported.map(drop), Err(StoreError::FileChanged("replaced"))));
    gateway.connect(&device(1)).await.admitted();
    assert_alive(&mut live).await;

    fs::rename(&kept, &path).unwrap();

    add_rule(&gateway.shared.store, block("=6.6.6")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_count_while_the_registry_is_not_believed() {
    let gateway = known(None).await;
    let returning = returning(&gateway, DEVICES..DEVICES + 3).await;
    eventually_held(&gateway).await;

    assert_resumed(&gateway, &returning).await;
    let state = Arc::clone(&gateway.shared);
    assert!(!state.lookups.believes_absence());
}

#[tokio::test(flavor = "multi_thread")]
async fn disk_that_takes_no_addresses_does_not_keep_devices_out() {
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("data");
    // Blocks the name of the temporary file.
    let obstacle = data.join("addresses.json.new");
    fs::create_dir_all(&obstacle).unwrap();

    let gateway = Gateway::start_in(home, None, "").await;

    gateway.register(0..1).await;
    gateway.connect(&device(0)).await.admitted();
    assert!(!data.join("addresses.json").exists());
    fs::remove_dir(&obstacle).unwrap();
    eventually(|| data.join("addresses.json").exists()).await;
}
