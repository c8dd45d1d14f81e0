//! Devices that are known to a node which has not seen them, and after restarts.

use std::{fs, sync::Arc};

use seawall_gateway::{
    fleet::registry_index::FILE,
    node::Shared,
    runtime::config::DatabaseUrl,
    store::{DEFAULT_TENANT, DeviceChange},
};
use seawall_proto::slots::{RegistryIndex, TenantTag};

use super::resume;
use crate::harness::{
    devices::{assert_alive, audit, device, id, label, with_wrong_secret},
    gateway::Gateway,
    pg::Cluster,
    wait::eventually,
};

/// Few enough that a registry without them is still believed.
const DEVICES: u32 = 19;

/// A gateway on a new database that has read all its devices.
async fn on_postgres() -> (Cluster, DatabaseUrl, Gateway) {
    let cluster = Cluster::start().unwrap();
    let url = cluster.database().await.unwrap();
    let gateway = Gateway::start_on(Some(&url), "").await;
    eventually(|| gateway.shared.readiness().ready).await;
    gateway.register(0..DEVICES).await;
    gateway.shared.registry_index_wanted.ask();
    eventually(|| has_read_all(&gateway.shared)).await;
    (cluster, url, gateway)
}

fn has_read_all(shared: &Shared) -> bool {
    let registry_index = shared.lookups.registry_index();
    let tenant = Some(TenantTag::of(DEFAULT_TENANT));
    (0..DEVICES).all(|n| registry_index.tenant_of(id(n)) == tenant) && registry_index.tenant_of(id(DEVICES)).is_none()
}

fn kept(shared: &Shared) -> Option<RegistryIndex> {
    let file = shared.config.server.data_dir.join(FILE);
    RegistryIndex::from_bytes(&fs::read(file).ok()?).ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn registry_index_outlives_a_restart_without_the_database() {
    let (cluster, url, gateway) = on_postgres().await;
    eventually(|| kept(&gateway.shared).is_some_and(|kept| kept.len() == DEVICES as usize)).await;
    cluster.kill().unwrap();

    let gateway = gateway.restart_on(Some(&url)).await;

    assert!(has_read_all(&gateway.shared));
    assert_eq!(gateway.shared.lookups.slots().known, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn node_with_a_new_disk_reads_the_registry_once_it_is_there() {
    let (cluster, url, first) = on_postgres().await;
    cluster.kill().unwrap();
    let second = Gateway::start_on(Some(&url), "").await;
    assert!(second.shared.lookups.registry_index().is_empty());

    cluster.restart().unwrap();
    eventually(|| has_read_all(&second.shared)).await;

    assert!(has_read_all(&first.shared));
    eventually(|| second.metric("seawall_roster_devices") == u64::from(DEVICES)).await;
    assert!(second.metric("seawall_roster_age_seconds") < 60);
}

#[tokio::test(flavor = "multi_thread")]
async fn registry_index_copied_from_another_registry_is_replaced_at_the_start() {
    let (_cluster, _url, of_another) = on_postgres().await;
    eventually(|| kept(&of_another.shared).is_some_and(|kept| kept.len() == DEVICES as usize)).await;
    let foreign = fs::read(of_another.shared.config.server.data_dir.join(FILE)).unwrap();
    let home = tempfile::tempdir().unwrap();
    fs::create_dir(home.path().join("data")).unwrap();
    fs::write(home.path().join("data").join(FILE), foreign).unwrap();

    let gateway = Gateway::start_in(home, None, "").await;

    eventually(|| gateway.shared.lookups.registry_index().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_registry_index_is_no_error_and_is_replaced() {
    let home = tempfile::tempdir().unwrap();
    fs::create_dir(home.path().join("data")).unwrap();
    fs::write(home.path().join("data").join(FILE), "no registry index").unwrap();

    let gateway = Gateway::start_in(home, None, "").await;

    eventually(|| kept(&gateway.shared).is_some()).await;
    gateway.register(0..1).await;
    assert_alive(&mut gateway.session(&device(0)).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn device_that_was_let_in_or_changed_here_is_known_beside_the_registry_index() {
    let gateway = Gateway::start("").await;
    eventually(|| kept(&gateway.shared).is_some()).await;
    gateway.register(0..1).await;
    assert!(gateway.shared.lookups.registry_index().is_empty());

    gateway.session(&device(0)).await;
    gateway.shared.lookups.learn(id(1), "acme");

    assert_eq!(gateway.shared.lookups.slots().known, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_token_still_tells_a_device_from_unknown_ones() {
    let (cluster, url, gateway) = resume::on_postgres().await;
    let returning = resume::returning(&gateway, 0..2).await;
    let known = gateway.shared.resume.known();
    let change = DeviceChange {
        tenant: Some(label("elsewhere")),
        ..DeviceChange::default()
    };
    let audit = audit("device.update");
    let changed = gateway.shared.store.device_update(id(0), &change, &audit).await;
    assert!(changed.unwrap().is_some());
    eventually(|| gateway.shared.resume.known() > known).await;
    cluster.kill().unwrap();
    let gateway = gateway.restart_on(Some(&url)).await;
    gateway
        .shared
        .lookups
        .set_registry_index(Arc::new(RegistryIndex::empty()));

    let stolen = with_wrong_secret(&returning[1]);
    for (device, known) in [(&returning[0], 1), (&stolen, 1), (&returning[1], 2)] {
        let _ = gateway.connect(device).await;
        assert_eq!(gateway.shared.lookups.slots().known, known);
    }
}
