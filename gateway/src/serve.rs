//! A gateway's start, in order, and its end. Start with [`start`]; the binary runs [`until_signal`].
//!
//! The order: data directory and its lock, database, tokens, keys, rules, tasks, listeners, `addresses.json`. A PostgreSQL that
//! is away does not stop the start; everything else that can't be used does, with one line that says why.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use seawall_proto::{id::Label, session::SessionLimits, slots::believable_len};
use tokio::{net::TcpListener, time::timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    ageing,
    alarms::Alarms,
    capacity, census,
    clock::Clock,
    cohorts::Cohorts,
    config::{Config, ConfigError},
    data_dir::{self, Addresses, DataDir, DataDirError},
    drain::{self, DrainState, Order},
    events::Events,
    faults::{self, Faults},
    history::History,
    keys::{self, KeysError},
    known_good,
    lifecycle::{Asked, HARD_STOP_TIMEOUT, Lifecycle, Signals},
    listener::{Bounds, Listener, Sharing},
    lookup::{Dependencies, Gate},
    memory::{self, Memory, Sources},
    metrics::Metrics,
    ops,
    proxy::Proxies,
    registry::{self, Registry},
    resume::{self, Resume},
    roster,
    rules::{self, Rules},
    sessions::Sessions,
    socket::SocketLimits,
    state::{Plan, Shared, SharedIds, State},
    store::{Store, StoreError},
    supervise::{Panics, spawn_helper},
    telemetry,
    tls::{self, Tls, TlsError},
    tokens::{Tokens, TokensError},
    upkeep,
};

/// Time that a database which answers has before the gateway listens without knowing its rules.
const FIRST_CONTACT_TIMEOUT: Duration = Duration::from_secs(1);
/// Time between two attempts to write `addresses.json`.
const ADDRESSES_RETRY: Duration = Duration::from_secs(2);
/// Time between two looks at whether all sessions have left.
const LEFT_LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Why a gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory is in use, or can't be used.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The database can't be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The admin token can't be read or made.
    #[error(transparent)]
    Tokens(#[from] TokensError),
    /// The signing keys can't be read or made.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// A certificate or key can't be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// An address is taken, or is none of this machine's.
    #[error("{setting}: can't listen on {address}: {source}")]
    Listen {
        setting: &'static str,
        address: SocketAddr,
        source: io::Error,
    },
    /// Signals can't be listened to, or an address can't be told.
    #[error("{what}: {source}")]
    System { what: &'static str, source: io::Error },
    /// A task ended that a gateway can't be without.
    #[error("{0}")]
    Broken(String),
}

impl StartError {
    /// Whether a setting is wrong, rather than something of the machine's.
    #[must_use]
    pub fn is_setting(&self) -> bool {
        match self {
            Self::DataDir(DataDirError::InUse { .. }) | Self::Tls(_) => true,
            Self::Store(StoreError::Open { error, .. }) => matches!(**error, StoreError::Invalid(_)),
            Self::DataDir(DataDirError::Unusable { .. })
            | Self::Store(_)
            | Self::Tokens(_)
            | Self::Keys(_)
            | Self::Listen { .. }
            | Self::System { .. }
            | Self::Broken(_) => false,
        }
    }
}

/// A gateway that listens.
pub struct Running {
    /// The addresses in use.
    pub addresses: Addresses,
    /// What its parts share.
    pub state: Shared,
    life: Lifecycle,
    data_dir: DataDir,
}

/// Starts a gateway; it listens when this returns. The settings must be valid.
///
/// # Errors
/// What it needs can't be used. Nothing of it runs then.
pub async fn start(config: Config) -> Result<Running, StartError> {
    let life = Lifecycle::new();
    let started = start_with(config, &life).await;
    if started.is_err() {
        life.stop().await;
    }
    started
}

async fn start_with(config: Config, life: &Lifecycle) -> Result<Running, StartError> {
    let data_dir = DataDir::open(&config.server.data_dir)?;
    // Those of a gateway that was killed: nobody listens there.
    data_dir.remove_addresses();
    let tls = Tls::open(&config)?;
    let database = config.database_url();
    if database.sqlite_path().is_some_and(|file| !file.exists()) && keys::are_in(data_dir.path()) {
        tracing::warn!(%database, "the data directory was used before, and has no such database: a new one is made. Is it the right one?");
    }
    let store = Store::open(&database).await?;
    let clock = Clock::start();
    let tokens = Tokens::open(data_dir.path())?;
    let keys = keys::open(data_dir.path())?;
    let metrics = Arc::new(Metrics::new());
    let limits = capacity::sized(&config);
    let memory = Arc::new(Memory::new(Sources::of_process(config.server.max_memory_bytes)));
    let bounds = Bounds::of_process(&limits);
    let sharing = Sharing::of(config.server.share_port);
    let devices =
        Listener::bind(config.server.listen, sharing, bounds, &limits, Arc::clone(&memory)).map_err(|source| {
            StartError::Listen {
                setting: "server.listen",
                address: config.server.listen,
                source,
            }
        })?;
    let api = TcpListener::bind(config.ops.listen)
        .await
        .map_err(|source| StartError::Listen {
            setting: "ops.listen",
            address: config.ops.listen,
            source,
        })?;
    let local = |what| move |source| StartError::System { what, source };
    let addresses = Addresses {
        devices: devices.local_addr(),
        ops: api.local_addr().map_err(local("address of the API"))?,
    };

    let started = clock.wall();
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
        life,
    );
    if let Some(rate) = known_good::load(data_dir.path()) {
        gate.set_last_known_good(rate);
    }
    let roster = roster::load(data_dir.path());
    // Until the devices are counted.
    gate.set_believes_absence(believable_len(roster.len(), 0) == 0);
    gate.set_roster(Arc::new(roster));
    // The settings are valid.
    let proxies = Proxies::of(&config.proxy).unwrap_or_default();
    let state = Arc::new(State {
        node: node_name(&config),
        run: Uuid::now_v7(),
        memory,
        session_limits: Arc::new(session_limits(&config)),
        socket_limits: Arc::new(SocketLimits::of(&config.limits)),
        config: Arc::new(config),
        clock,
        started,
        store,
        gate,
        resume,
        roster_wanted: roster::Wanted::default(),
        rules,
        sessions: Sessions::new(started),
        cohorts: Cohorts::new(),
        history: History::default(),
        events: Events::new(started),
        alarms: Alarms::default(),
        drain: drain::Drain::default(),
        metrics,
        tokens,
        tls,
        proxies,
        faults: Faults::default(),
        registry: Registry::default(),
        plan: Plan::default(),
        panics: Panics::default(),
        shared_ids: SharedIds::default(),
    });
    await_first_contact(&state).await;
    spawn_tasks(&state, life);
    let (shared, hard) = (Arc::clone(&state), life.hard().clone());
    life.spawn("listener", devices.run(shared, hard));
    life.spawn("api", ops::serve(api, Arc::clone(&state), life.hard().clone()));
    if let Err(error) = data_dir::write_addresses(data_dir.path(), addresses) {
        tracing::warn!(%error, devices = %addresses.devices, ops = %addresses.ops, "addresses.json can't be written: trying again until it can");
        let (folder, hard) = (data_dir.path().to_owned(), life.hard().clone());
        life.spawn("addresses", write_addresses_later(folder, addresses, hard));
    }
    tracing::info!(
        devices = %addresses.devices,
        ops = %addresses.ops,
        connections_max = bounds.connections,
        "listening"
    );
    Ok(Running {
        addresses,
        state,
        life: life.clone(),
        data_dir,
    })
}

/// Writes `addresses.json` as soon as that is possible, or until `stop`: a full disk must not keep devices out.
async fn write_addresses_later(folder: PathBuf, addresses: Addresses, stop: CancellationToken) {
    while stop
        .run_until_cancelled(tokio::time::sleep(ADDRESSES_RETRY))
        .await
        .is_some()
    {
        let path = folder.clone();
        let write = move || data_dir::write_addresses(&path, addresses);
        if let Ok(Ok(())) = tokio::task::spawn_blocking(write).await {
            return tracing::info!("addresses.json is written");
        }
    }
}

/// A database that answers at once makes the gateway ready before it listens; one that doesn't must not hold it up.
async fn await_first_contact(state: &Shared) {
    let contact = async {
        state.store.ready().await;
        state.rules.poll(&state.store, &state.clock, &state.events).await?;
        state.resume.poll(&state.store, &state.clock).await?;
        registry::check(state).await
    };
    match timeout(FIRST_CONTACT_TIMEOUT, contact).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => {
            tracing::warn!(error = %error, "the database can't be read: listening, and not ready until it can")
        }
        Err(_) => tracing::warn!("the database doesn't answer: listening, and not ready until it does"),
    }
}

fn spawn_tasks(state: &Shared, life: &Lifecycle) {
    // Essential: without one of them the gateway ends.
    life.spawn("drain", drain::run(Arc::clone(state), life.hard().clone()));
    life.spawn(
        "session clock",
        upkeep::call_sessions(Arc::clone(state), life.hard().clone()),
    );
    // Helpers: started again after a panic.
    macro_rules! helper {
        ($name:literal, $run:path) => {{
            let (shared, hard) = (Arc::clone(state), life.hard().clone());
            spawn_helper(life, state, $name, move || $run(Arc::clone(&shared), hard.clone()));
        }};
    }
    helper!("rules", rules::follow);
    helper!("evictor", rules::evict);
    helper!("device counts", census::publish);
    helper!("revocations", resume::follow);
    helper!("roster", roster::follow);
    helper!("drill", resume::drill);
    helper!("ageing", ageing::run);
    helper!("tokens", follow_tokens);
    helper!("plan guard", upkeep::guard_plans);
    helper!("known good", known_good::keep);
    helper!("gauges", upkeep::publish);
    helper!("memory", memory::follow);
    helper!("certificates", tls::follow);
    helper!("lag", upkeep::measure_lag);
    helper!("registry", registry::guard);
    helper!("faults", faults::follow);
    helper!("attempts summary", upkeep::sum_up_attempts);
}

async fn follow_tokens(state: Shared, stop: CancellationToken) {
    state.tokens.clone().follow(state.store.clone(), stop).await;
}

fn session_limits(config: &Config) -> SessionLimits {
    SessionLimits {
        heartbeat: config.session.heartbeat(),
        backoff_cap: Duration::from_millis(config.session.backoff_cap_ms),
        messages_per_second: config.limits.messages_per_second,
        messages_burst: config.limits.messages_burst,
    }
}

/// The name configured, else that of the host, else `node`.
#[must_use]
pub fn node_name(config: &Config) -> String {
    let host = rustix::system::uname();
    let named = config
        .server
        .node
        .as_deref()
        .unwrap_or_else(|| host.nodename().to_str().unwrap_or_default());
    match Label::parse(named) {
        Ok(Some(label)) => label.as_str().to_owned(),
        Ok(None) | Err(_) => "node".to_owned(),
    }
}

impl Running {
    /// Cancelled when a part of the gateway failed, so that it can't go on.
    pub async fn broken(&self) {
        self.life.soft().cancelled().await;
    }

    /// Sends every session away at a pace, at most for as long as the settings say, then stops. When `hurry` is ready, what is
    /// left gets its 1012 at once.
    ///
    /// # Errors
    /// A part of the gateway had failed.
    pub async fn leave(self, hurry: impl Future<Output = ()>) -> Result<(), StartError> {
        let settings = &self.state.config.drain;
        let deadline = settings.deadline();
        let rate = (settings.rate_per_second > 0).then_some(f64::from(settings.rate_per_second));
        // A drain that an operator started goes on; the deadline below is for it too.
        let _ = self.state.drain.start(Order {
            rate_per_second: rate,
            announce: settings.announce(),
            deadline,
        });
        tokio::select! {
            () = self.emptied() => {}
            () = tokio::time::sleep(deadline) => tracing::warn!(sessions = self.state.sessions.len(), "the time to drain is over: closing what is left"),
            () = hurry => tracing::warn!(sessions = self.state.sessions.len(), "a second signal: closing what is left"),
        }
        if !self.state.sessions.is_empty() {
            // An operator may have cancelled the drain meanwhile; then there is none to hurry.
            let _ = self.state.drain.start(Order {
                rate_per_second: None,
                announce: Duration::ZERO,
                deadline: Duration::ZERO,
            });
            self.state.drain.hurry();
            let _ = timeout(HARD_STOP_TIMEOUT, self.emptied()).await;
        }
        self.stop().await
    }

    /// Stops without a drain.
    ///
    /// # Errors
    /// A part of the gateway had failed.
    pub async fn stop(self) -> Result<(), StartError> {
        if !self.life.stop().await {
            tracing::warn!("some tasks were still running at the end");
        }
        self.data_dir.remove_addresses();
        match self.life.failure() {
            Some(failure) => Err(StartError::Broken(failure.to_owned())),
            None => {
                tracing::info!(sessions = self.state.sessions.len(), "stopped");
                Ok(())
            }
        }
    }

    /// All sessions have left, and no handshake can become one any more.
    async fn emptied(&self) {
        while self.state.drain.status(self.state.sessions.len()).state != DrainState::Drained {
            tokio::time::sleep(LEFT_LOOK_INTERVAL).await;
        }
    }
}

/// Runs a gateway until SIGTERM or Ctrl-C. At SIGHUP `reload` says what to log from now on, and certificates are read again.
///
/// # Errors
/// The start failed, or a part of the gateway did.
pub async fn until_signal(
    config: Config,
    reload: impl Fn() -> Result<String, ConfigError> + Send + Sync + 'static,
) -> Result<(), StartError> {
    let reload = Arc::new(reload);
    let mut signals = Signals::listen().map_err(|source| StartError::System {
        what: "listening to signals",
        source,
    })?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        devices = %config.server.listen,
        ops = %config.ops.listen,
        data_dir = %config.server.data_dir.display(),
        database = %config.database_url(),
        "starting Seawall"
    );
    let running = tokio::select! {
        running = start(config) => running?,
        // A start that waits for a lock must not outlive who started it.
        () = signals.leave() => return Ok(()),
    };
    loop {
        let asked = tokio::select! {
            asked = signals.next() => asked,
            () = running.broken() => Asked::Leave,
        };
        match asked {
            Asked::Leave => break,
            Asked::Reload => {
                // A file system that hangs must not keep the gateway from leaving.
                tokio::select! {
                    () = take_settings(&reload, &running.state) => {}
                    () = signals.leave() => break,
                    () = running.broken() => break,
                }
            }
        }
    }
    tracing::info!(sessions = running.state.sessions.len(), "leaving");
    running.leave(signals.leave()).await
}

/// Reads the files anew that SIGHUP is for, off the runtime's workers: the log level of the configuration, and certificates.
async fn take_settings<R>(reload: &Arc<R>, state: &Shared)
where
    R: Fn() -> Result<String, ConfigError> + Send + Sync + 'static,
{
    let reload = Arc::clone(reload);
    // Cancelled only where the runtime ends; a panic in it is in the log.
    if let Ok(level) = tokio::task::spawn_blocking(move || reload()).await {
        apply_level(level);
    }
    tls::reload_now(state).await;
}

/// Takes the log level of the configuration; a configuration that can't be used changes nothing.
fn apply_level(level: Result<String, ConfigError>) {
    match level {
        Ok(level) => match telemetry::set_level(&level) {
            // A change tells of itself.
            Ok(change) if change.is_change() => {}
            Ok(change) => tracing::info!(
                to = change.to,
                "log level unchanged: it is what flags, environment and file say"
            ),
            Err(error) => tracing::error!(error = %error, "log level not changed"),
        },
        Err(error) => tracing::error!(error = %error, "the configuration can't be used: the log level stays"),
    }
}
