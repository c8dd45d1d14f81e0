//! A whole gateway in this process, started as the binary starts it.

use std::{net::SocketAddr, ops::Range, time::Instant};

use firmware_sim::connection::{Connection, DeviceConfig};
use seawall_gateway::{
    node::Shared,
    runtime::{
        config::{Config, DatabaseUrl},
        lifecycle::HARD_STOP_TIMEOUT,
        memory::Sources,
    },
    serve::{self, Overrides, Running},
    store::{Consent, NewDevice},
};
use seawall_proto::{
    id::{DeviceId, RuleId, SecretHash},
    rules::{Rule, RuleSpec},
};
use tempfile::TempDir;
use tokio::task::JoinSet;

use super::{
    devices::{self, Attempt, attempt, audit, raw},
    figures,
    wait::{PATIENCE, eventually},
};

/// A running gateway. Its tasks end with the test's runtime.
pub struct Gateway {
    pub shared: Shared,
    pub devices: SocketAddr,
    pub ops: SocketAddr,
    running: Running,
    home: TempDir,
}

impl Gateway {
    /// On a new SQLite database, with these settings (TOML) over the defaults, and ready.
    pub async fn start(settings: &str) -> Self {
        let gateway = Self::start_on(None, settings).await;
        gateway.settled().await;
        gateway
    }

    /// Waits until it is ready, and has read the registry for its index. On a busy machine both come after the start:
    /// the index would have devices that the test registers, and doubts about those that it deletes.
    pub async fn settled(&self) {
        eventually(|| self.shared.readiness().ready && self.shared.registry.index_read().is_some()).await;
    }

    /// On a database that may be shared.
    pub async fn start_on(database: Option<&DatabaseUrl>, settings: &str) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), database, settings).await
    }

    /// With memory from these sources, which only the test measures.
    pub async fn start_with_memory(sources: Sources, settings: &str) -> Self {
        let overrides = Overrides {
            memory: Some(sources),
            ..Overrides::default()
        };
        Self::start_over(overrides, tempfile::tempdir().unwrap(), None, settings).await
    }

    /// With room for few changes of presence that wait to be written.
    pub async fn start_with_presence_queue(len_max: usize, database: &DatabaseUrl) -> Self {
        let overrides = Overrides {
            presence_queue_len_max: Some(len_max),
            ..Overrides::default()
        };
        Self::start_over(overrides, tempfile::tempdir().unwrap(), Some(database), "").await
    }

    /// In `data` of a directory that may have files already.
    pub async fn start_in(home: TempDir, database: Option<&DatabaseUrl>, settings: &str) -> Self {
        Self::start_over(Overrides::default(), home, database, settings).await
    }

    async fn start_over(overrides: Overrides, home: TempDir, database: Option<&DatabaseUrl>, settings: &str) -> Self {
        let mut config = Config::from_toml(settings).unwrap();
        config.server.data_dir = home.path().join("data");
        if config.server.listen == Config::default().server.listen {
            config.server.listen.set_port(0);
        }
        config.ops.listen = SocketAddr::from(([127, 0, 0, 1], 0));
        config.database.url = database.cloned();
        config.validate().unwrap();
        let running = serve::start_over(config, overrides).await.unwrap();
        Self {
            shared: running.state.clone(),
            devices: running.addresses.devices,
            ops: running.addresses.ops,
            running,
            home,
        }
    }

    /// Ends it as the process does; every task must end in time.
    pub async fn stop(self) {
        let begun = Instant::now();
        self.running.stop().await.unwrap();
        assert!(begun.elapsed() < HARD_STOP_TIMEOUT, "tasks are still running");
    }

    /// Ends it, even after a failure.
    pub async fn end(self) {
        let _ = self.running.stop().await;
    }

    /// Ends it and starts it again on the same data directory.
    pub async fn restart_on(self, database: Option<&DatabaseUrl>) -> Self {
        Self::start_in(self.stop_and_keep().await, database, "").await
    }

    /// Ends it, and returns the directory with its data.
    pub async fn stop_and_keep(self) -> TempDir {
        self.running.stop().await.unwrap();
        self.home
    }

    /// Registers the devices with these numbers.
    pub async fn register(&self, numbers: Range<u32>) {
        devices::register(&self.shared.store, numbers).await;
    }

    /// Registers one device.
    pub async fn register_as(&self, device: &NewDevice) {
        let audit = audit("device.create");
        self.shared.store.device_insert(device, &audit).await.unwrap();
    }

    /// Registers a device, and returns its id and secret.
    pub async fn device(&self) -> (String, String) {
        let id = uuid::Uuid::new_v4();
        let secret = format!("secret-of-{id}");
        self.register_as(&NewDevice {
            external_id: None,
            id: DeviceId::from_uuid(id),
            tenant: None,
            model: None,
            secret: SecretHash::of(secret.as_bytes()),
        })
        .await;
        (id.to_string(), secret)
    }

    /// Registers a device, and returns the header lines that identify it.
    pub async fn device_lines(&self) -> String {
        let (id, secret) = self.device().await;
        format!("Seawall-Device: {id}\r\nAuthorization: Bearer {secret}")
    }

    /// Creates a rule as the API does: stored, and in force here when this returns.
    pub async fn add_rule(&self, spec: RuleSpec) -> RuleId {
        let id = devices::add_rule(&self.shared.store, spec).await;
        self.reload_rules().await;
        id
    }

    /// Changes a rule as the API does.
    pub async fn change_rule(&self, id: RuleId, spec: RuleSpec) {
        let (revision, audit) = (self.rule(id).revision, audit("rule.update"));
        let store = &self.shared.store;
        let changed = store.rule_update(id, revision, spec, Consent::Given, &audit).await;
        assert!(changed.unwrap().is_some());
        self.reload_rules().await;
    }

    /// A rule in force.
    pub fn rule(&self, id: RuleId) -> Rule {
        let rules = self.shared.rules.current();
        let rule = rules.rules().iter().find(|rule| rule.id == id);
        rule.expect("it is in force").clone()
    }

    pub async fn delete_rule(&self, id: RuleId) {
        let revision = self.shared.store.rule_delete(id, &audit("rule.delete")).await;
        assert!(revision.unwrap().is_some());
        self.reload_rules().await;
    }

    async fn reload_rules(&self) {
        let state = &self.shared;
        state
            .rules
            .reload(&state.store, &state.clock, &state.events)
            .await
            .unwrap();
    }

    /// Makes one attempt to connect.
    pub async fn connect(&self, device: &DeviceConfig) -> Attempt {
        attempt(self.devices, device.clone()).await
    }

    /// Opens a session, which must succeed. Its welcome is read.
    pub async fn session(&self, device: &DeviceConfig) -> Connection {
        let mut connection = self.connect(device).await.admitted();
        if device.protocols.is_some() {
            assert_eq!(connection.next_json(PATIENCE).await.unwrap()["type"], "welcome");
        }
        connection
    }

    /// All at once; the answers are in the order of the devices.
    pub async fn connect_all(&self, devices: &[DeviceConfig]) -> Vec<Attempt> {
        let mut tasks = JoinSet::new();
        for (index, device) in devices.iter().cloned().enumerate() {
            let address = self.devices;
            tasks.spawn(async move { (index, attempt(address, device).await) });
        }
        let mut attempts = tasks.join_all().await;
        attempts.sort_by_key(|(index, _)| *index);
        attempts.into_iter().map(|(_, attempt)| attempt).collect()
    }

    /// Like [`Self::connect_all`]; all must be admitted.
    pub async fn sessions(&self, devices: &[DeviceConfig]) -> Vec<Connection> {
        let attempts = self.connect_all(devices).await;
        attempts.into_iter().map(Attempt::admitted).collect()
    }

    /// Sum of the series that `series` names, to the nearest whole number.
    #[track_caller]
    pub fn metric(&self, series: &str) -> u64 {
        self.figure(series).round() as u64
    }

    /// Sum of the series that `series` names.
    #[track_caller]
    pub fn figure(&self, series: &str) -> f64 {
        figures::sum(&self.shared.metrics.render(), series)
    }

    /// Status of `GET /readyz` on the device listener.
    pub async fn readyz(&self) -> u16 {
        raw(self.devices, b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").await
    }
}
