//! A gateway's door without the rest of it: listener, gate and an SQLite registry of its own.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use seawall_gateway::{
    alarms::Alarms,
    capacity,
    clock::Clock,
    cohorts::Cohorts,
    config::Config,
    drain::Drain,
    events::Events,
    faults::Faults,
    history::History,
    keys,
    lifecycle::Lifecycle,
    listener::{Bounds, Listener, Sharing},
    lookup::{Dependencies, Gate},
    memory::{Memory, Sources},
    metrics::Metrics,
    proxy::Proxies,
    registry::Registry,
    resume::Resume,
    roster::Wanted,
    rules::Rules,
    sessions::Sessions,
    socket::SocketLimits,
    state::{Plan, Shared, SharedIds, State},
    store::{Audit, NewDevice, Store},
    supervise::Panics,
    tls::Tls,
    tokens::Tokens,
    upkeep,
};
use seawall_proto::{
    id::{DeviceId, SecretHash},
    session::SessionLimits,
};

/// How long a condition may take to come true.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running door. Ends when it is dropped.
pub struct Gateway {
    pub devices: SocketAddr,
    pub shared: Shared,
    life: Lifecycle,
    _data_dir: tempfile::TempDir,
}

impl Gateway {
    /// Starts with these settings over the defaults, as TOML.
    pub async fn start(settings: &str) -> Self {
        Self::start_with(Sources::of_process(0), settings).await
    }

    /// The same, with memory as these say; nobody looks at it but the test.
    pub async fn start_with(sources: Sources, settings: &str) -> Self {
        let data_dir = tempfile::tempdir().unwrap();
        let mut config = Config::from_toml(settings).unwrap();
        config.server.data_dir = data_dir.path().to_owned();
        config.limits = capacity::sized(&config);
        config.validate().unwrap();

        let (clock, life, metrics) = (Clock::start(), Lifecycle::new(), Arc::new(Metrics::new()));
        let store = Store::open(&config.database_url()).await.unwrap();
        let keys = keys::open(data_dir.path()).unwrap();
        let resume = Arc::new(Resume::open(data_dir.path(), keys.resume, config.resume.life()));
        let rules = Arc::new(Rules::open(data_dir.path()));
        let gate = Gate::start(
            config.admission.clone(),
            keys.slots,
            &store,
            clock,
            Dependencies {
                metrics: Arc::clone(&metrics),
                resume: Arc::clone(&resume),
                rules: Arc::clone(&rules),
            },
            &life,
        );
        let memory = Arc::new(Memory::new(sources));
        let listener = Listener::bind(
            SocketAddr::from(([127, 0, 0, 1], 0)),
            Sharing::Alone,
            Bounds::of_process(&config.limits),
            &config.limits,
            Arc::clone(&memory),
        )
        .unwrap();
        let devices = listener.local_addr();
        let session_limits = Arc::new(SessionLimits {
            heartbeat: config.session.heartbeat(),
            backoff_cap: Duration::from_millis(config.session.backoff_cap_ms),
            messages_per_second: config.limits.messages_per_second,
            messages_burst: config.limits.messages_burst,
        });
        let shared = Arc::new(State {
            started: clock.wall(),
            node: "test".into(),
            run: uuid::Uuid::nil(),
            store,
            gate,
            resume,
            roster_wanted: Wanted::default(),
            rules,
            sessions: Sessions::new(clock.wall()),
            cohorts: Cohorts::new(),
            history: History::default(),
            events: Events::default(),
            alarms: Alarms::default(),
            drain: Drain::default(),
            metrics,
            tokens: Tokens::open(data_dir.path()).unwrap(),
            tls: Tls::open(&config).unwrap(),
            proxies: Proxies::of(&config.proxy).unwrap(),
            memory,
            faults: Faults::default(),
            registry: Registry::default(),
            plan: Plan::default(),
            panics: Panics::default(),
            shared_ids: SharedIds::default(),
            session_limits,
            socket_limits: Arc::new(SocketLimits::of(&config.limits)),
            clock,
            config: Arc::new(config),
        });
        shared
            .rules
            .reload(&shared.store, &shared.clock, &shared.events)
            .await
            .unwrap();
        life.spawn(
            "session clock",
            upkeep::call_sessions(Arc::clone(&shared), life.hard().clone()),
        );
        life.spawn(
            "device listener",
            listener.run(Arc::clone(&shared), life.hard().clone()),
        );
        Self {
            devices,
            shared,
            life,
            _data_dir: data_dir,
        }
    }

    /// Registers a device, and says its id and secret.
    pub async fn device(&self) -> (String, String) {
        let id = uuid::Uuid::new_v4();
        let secret = format!("secret-of-{id}");
        let new = NewDevice {
            external_id: None,
            id: DeviceId::from_uuid(id),
            tenant: None,
            model: None,
            secret: SecretHash::of(secret.as_bytes()),
        };
        let audit = Audit {
            at: self.shared.clock.wall(),
            actor: "test".into(),
            action: "device.create",
        };
        self.shared.store.device_insert(&new, &audit).await.unwrap();
        (id.to_string(), secret)
    }

    /// Registers a device, and gives the header lines that it identifies itself with.
    pub async fn device_lines(&self) -> String {
        let (id, secret) = self.device().await;
        format!("Seawall-Device: {id}\r\nAuthorization: Bearer {secret}")
    }

    /// The figure of one series, named with its labels.
    pub fn metric(&self, series: &str) -> f64 {
        self.figures(series).next().unwrap_or(f64::NAN)
    }

    /// The sum of all series whose text begins like this.
    pub fn sum(&self, beginning: &str) -> f64 {
        self.figures(beginning).sum()
    }

    fn figures(&self, beginning: &str) -> impl Iterator<Item = f64> {
        let text = self.shared.metrics.render();
        let figures: Vec<f64> = text
            .lines()
            .filter(|line| line.starts_with(beginning))
            .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
            .collect();
        figures.into_iter()
    }

    /// Ends the gateway as the process does: true where every task ended in time.
    pub async fn stop(&self) -> bool {
        self.life.stop().await
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.life.hard().cancel();
    }
}

/// Waits until `holds`.
pub async fn eventually(mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap();
}
