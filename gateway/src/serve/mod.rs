//! Start of a gateway, in order, and its end. Start with [`start`]; the binary runs [`until_signal`].
//!
//! The order: data directory and its lock, database, tokens, keys, rules, tasks, listeners, `addresses.json`. An
//! unreachable PostgreSQL does not prevent the start. Everything else that cannot be used does, with one line that says
//! why.

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Duration,
};

use seawall_proto::{
    departures::{DrainOrder, DrainState},
    id::Label,
    presence::known::Boot,
    session::SessionLimits,
    slots::believable_len,
};
use tokio::{net::TcpListener, time::timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    connection,
    edge::{
        listener::{self, Bounds, Listener, Sharing},
        proxy::Proxies,
        tls::{Tls, TlsError},
    },
    fleet::{
        alarms::Alarms,
        audit_journal::AuditJournal,
        breaker::CohortBreaker,
        cohorts::Cohorts,
        events::Events,
        faults::Faults,
        history::{History, KNOWN_MAX, queue::QUEUE_LEN_MAX},
        last_known_good,
        panics::Panics,
        registered::Registered,
        registry::Registry,
        registry_index,
        resume::Resume,
        rollouts::Rollouts,
        rules::Rules,
        settings::Settings,
        webhook::{Webhook, WebhookError},
    },
    lookup::{Dependencies, Lookups},
    metrics::Metrics,
    node::{Plan, Shared, SharedIds, State},
    ops,
    runtime::{
        capacity,
        clock::Clock,
        config::Config,
        data_dir::{self, Addresses, DataDir, DataDirError},
        keys::{self, KeysError},
        lifecycle::{Asked, HARD_STOP_TIMEOUT, Lifecycle, Signals, blocking},
        memory::{Memory, Sources},
    },
    session::{
        departures::Departures, ids, observer::ObserverClock, restricted::RestrictedSessions, sessions::Sessions,
        silence::Silence, socket::SocketLimits,
    },
    store::{Store, StoreError},
    tasks::{self, configuration::Reloads, supervise::spawn_helper},
    tokens::{Tokens, TokensError},
};

/// Maximum wait for the first answer of the database before the gateway listens without its rules.
const FIRST_CONTACT_TIMEOUT: Duration = Duration::from_secs(1);
/// Interval of checks during that time whether the first lookups were answered.
const FIRST_LOOKUPS_CHECK: Duration = Duration::from_millis(5);
/// Time between two attempts to write `addresses.json`.
const ADDRESSES_RETRY: Duration = Duration::from_secs(2);
/// Interval of checks whether all sessions have ended.
const LEFT_CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// Why a gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory is in use, or cannot be used.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The database cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The admin token cannot be read or created.
    #[error(transparent)]
    Tokens(#[from] TokensError),
    /// The signing keys cannot be read or created.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// A certificate or key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The webhook's secret cannot be used.
    #[error(transparent)]
    Webhook(#[from] WebhookError),
    /// An address is in use, or does not belong to this machine.
    #[error("{setting}: can't listen on {address}: {source}")]
    Listen {
        setting: &'static str,
        address: SocketAddr,
        source: io::Error,
    },
    /// Signals cannot be handled, or a local address cannot be read.
    #[error("{what}: {source}")]
    System { what: &'static str, source: io::Error },
    /// An essential task ended.
    #[error("{0}")]
    Broken(String),
}

impl StartError {
    /// Whether the cause is a setting, not the machine.
    #[must_use]
    pub fn is_setting(&self) -> bool {
        match self {
            Self::DataDir(DataDirError::InUse { .. }) | Self::Tls(_) | Self::Webhook(_) => true,
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

/// A running gateway.
pub struct Running {
    /// The addresses in use.
    pub addresses: Addresses,
    /// The state shared by its parts.
    pub state: Shared,
    life: Lifecycle,
    data_dir: DataDir,
}

/// Parts that a test replaces.
#[derive(Default)]
pub struct Overrides {
    /// Where memory is measured. Only the test measures then.
    pub memory: Option<Sources>,
    /// Maximum number of changes of presence that wait to be written.
    pub presence_queue_len_max: Option<usize>,
}

/// Starts a gateway, which listens when this returns. The settings must be valid.
///
/// # Errors
/// Something that it needs cannot be used. Then nothing of it runs.
pub async fn start(config: Config) -> Result<Running, StartError> {
    start_over(config, Overrides::default()).await
}

/// Starts a gateway with replaced parts.
///
/// # Errors
/// See [`start`].
pub async fn start_over(config: Config, overrides: Overrides) -> Result<Running, StartError> {
    let life = Lifecycle::new();
    let started = start_with(config, overrides, &life).await;
    if started.is_err() {
        life.stop().await;
    }
    started
}

async fn start_with(config: Config, overrides: Overrides, life: &Lifecycle) -> Result<Running, StartError> {
    let data_dir = DataDir::open(&config.server.data_dir)?;
    // Left by a gateway that was killed: it no longer listens there.
    data_dir.remove_addresses();
    let tls = Tls::open(&config)?;
    let database = config.database_url();
    if database.sqlite_path().is_some_and(|file| !file.exists()) && keys::are_in(data_dir.path()) {
        tracing::warn!(%database, "new database created in a data directory that was used before: check database.url");
    }
    let store = Store::open(&database).await?;
    let clock = Clock::start();
    let tokens = Tokens::open(data_dir.path())?;
    let keys = keys::open(data_dir.path())?;
    let webhook = Arc::new(Webhook::open(&config.webhook, &node_name(&config))?);
    let metrics = Arc::new(Metrics::new());
    let limits = capacity::sized(&config);
    let follows_memory = overrides.memory.is_none();
    let sources = overrides
        .memory
        .unwrap_or_else(|| Sources::of_process(config.server.max_memory_bytes));
    let memory = Arc::new(Memory::new(sources));
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
    let departures = Arc::new(Departures::new(config.session.age_max(), clock));
    let mut ids = ids::load(data_dir.path(), started);
    let queue_len_max = overrides.presence_queue_len_max.unwrap_or(QUEUE_LEN_MAX);
    let history = History::with_bounds(KNOWN_MAX, queue_len_max);
    history.queue().set_boot(started.max(ids.last_mark()));
    let boot = Boot {
        node: ids.node(),
        epoch: ids.next(started),
    };
    let sessions = Sessions::new(ids);
    let lookups = Lookups::start(
        config.admission.clone(),
        keys.slots.with_issuer(&node_name(&config)),
        &store,
        clock,
        Dependencies {
            metrics: Arc::clone(&metrics),
            resume: Arc::clone(&resume),
            rules: Arc::clone(&rules),
            departures: Arc::clone(&departures),
            sessions: sessions.counter(),
        },
        life,
    );
    if let Some(rate) = last_known_good::load(data_dir.path()) {
        lookups.set_last_known_good(rate);
    }
    let registry_index = registry_index::load(data_dir.path());
    // Until the devices are counted.
    lookups.set_believes_absence(believable_len(registry_index.len(), 0) == 0);
    lookups.set_registry_index(Arc::new(registry_index));
    // The settings are valid.
    let proxies = Arc::new(Proxies::of(&config.proxy).unwrap_or_default());
    let events = Arc::new(Events::new(started));
    let alarms = Arc::new(Alarms::new(Arc::clone(&events), Arc::clone(&webhook), clock));
    let panics = Arc::new(Panics::new(metrics.task_panics.clone(), Arc::clone(&alarms)));
    let breaker = CohortBreaker::new(config.breaker.mode.into());
    let config = Arc::new(config);
    let state = Arc::new(State {
        node: node_name(&config).into(),
        run: Uuid::now_v7(),
        boot,
        is_presence_restored: AtomicBool::new(false),
        memory,
        session_limits: Arc::new(session_limits(&config)),
        socket_limits: Arc::new(SocketLimits::of(&config.limits)),
        settings: Settings::new(Arc::clone(&config)),
        config,
        clock,
        started,
        store,
        lookups,
        resume,
        registry_index_wanted: registry_index::Wanted::default(),
        registered: Registered::default(),
        rules,
        audit_journal: Arc::new(AuditJournal::open(data_dir.path())),
        restricted: RestrictedSessions::new(bounds.connections),
        rollouts: Rollouts::default(),
        sessions,
        observer: start_observer(clock, life)?,
        silence: Silence::default(),
        lost: AtomicU64::new(0),
        cohorts: Cohorts::new(),
        breaker,
        history,
        events,
        alarms,
        webhook,
        departures,
        metrics,
        tokens,
        tls,
        proxies,
        faults: Faults::default(),
        registry: Registry::default(),
        plan: Plan::default(),
        panics,
        shared_ids: SharedIds::default(),
    });
    await_first_contact(&state).await;
    spawn_tasks(&state, life, follows_memory);
    let context = listener::Context {
        metrics: Arc::clone(&state.metrics),
        panics: Arc::clone(&state.panics),
        proxies: Arc::clone(&state.proxies),
    };
    let shared = Arc::clone(&state);
    let serve = move |limiter, accepted| connection::serve(Arc::clone(&shared), limiter, accepted);
    life.spawn("listener", devices.run(context, serve, life.hard().clone()));
    life.spawn("api", ops::serve(api, Arc::clone(&state), life.hard().clone()));
    if let Err(error) = data_dir::write_addresses(data_dir.path(), addresses) {
        tracing::warn!(%error, devices = %addresses.devices, ops = %addresses.ops, "addresses.json not written: retrying");
        let (folder, hard) = (data_dir.path().to_owned(), life.hard().clone());
        spawn_helper(life, &state.panics, "addresses", move || {
            write_addresses_later(folder.clone(), addresses, hard.clone())
        });
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

/// Observed time, which a thread of its own advances until the gateway ends.
fn start_observer(clock: Clock, life: &Lifecycle) -> Result<Arc<ObserverClock>, StartError> {
    let observer = Arc::new(ObserverClock::new(clock));
    let (ticked, stop) = (Arc::clone(&observer), life.hard().clone());
    std::thread::Builder::new()
        .name("observer".to_owned())
        .spawn(move || ticked.tick_until(&stop))
        .map_err(|source| StartError::System {
            what: "thread of the observer clock",
            source,
        })?;
    Ok(observer)
}

/// Writes `addresses.json` once that is possible, or until `stop`: a full disk must not keep devices out.
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

/// Waits briefly for the database. An immediate answer makes the gateway ready before it listens; a slow one must
/// not delay the start.
async fn await_first_contact(state: &Shared) {
    let contact = async {
        state.store.ready().await;
        state.rules.poll(&state.store, &state.clock, &state.events).await?;
        state.resume.poll(&state.store, &state.clock).await?;
        tasks::registry::check(state).await?;
        while !state.lookups.had_contact() {
            tokio::time::sleep(FIRST_LOOKUPS_CHECK).await;
        }
        Ok::<_, StoreError>(())
    };
    match timeout(FIRST_CONTACT_TIMEOUT, contact).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(error = %error, "database not readable: listening, but not ready")
        }
        Err(_) => tracing::warn!("database does not answer: listening, but not ready"),
    }
}

fn spawn_tasks(state: &Shared, life: &Lifecycle, follows_memory: bool) {
    // Essential: the gateway stops if one of them panics.
    life.spawn(
        "session clock",
        tasks::timer::call_sessions(Arc::clone(state), life.hard().clone()),
    );
    // Auxiliary: restarted after a panic.
    macro_rules! helper {
        ($name:literal, $run:path) => {{
            let (shared, hard) = (Arc::clone(state), life.hard().clone());
            spawn_helper(life, &state.panics, $name, move || {
                $run(Arc::clone(&shared), hard.clone())
            });
        }};
    }
    helper!("rules", tasks::rules::follow);
    helper!("rule journal", tasks::rule_journal::follow);
    helper!("audit journal", tasks::audit_journal::follow);
    helper!("rollouts", tasks::rollouts::run);
    helper!("departures", tasks::departures::run);
    helper!("device counts", tasks::census::publish);
    helper!("revocations", tasks::resume::follow);
    helper!("registry_index", tasks::registry_index::follow);
    helper!("revalidation", tasks::revalidation::run);
    helper!("tokens", follow_tokens);
    helper!("plan guard", tasks::plan_guard::guard);
    helper!("known good", tasks::last_known_good::keep);
    helper!("session ids", tasks::session_ids::keep);
    helper!("gauges", tasks::gauges::publish);
    if follows_memory {
        helper!("memory", tasks::memory::follow);
    }
    helper!("certificates", tasks::tls::follow);
    helper!("presence", tasks::presence::write);
    helper!("stored presence", tasks::presence_returns::follow);
    helper!("registered devices", tasks::registered::count);
    helper!("silence", tasks::silence::watch);
    helper!("registry", tasks::registry::guard);
    helper!("faults", tasks::faults::follow);
    helper!("webhook", tasks::webhook::deliver);
    helper!("attempts summary", tasks::attempts_summary::run);
    helper!("cohorts", tasks::cohorts::judge);
    helper!("versions", tasks::versions::follow);
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

/// The configured name, or that of the host, or `node`.
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
    /// Completes when an essential part of the gateway has failed.
    pub async fn broken(&self) {
        self.life.soft().cancelled().await;
    }

    /// Closes all sessions at a pace, within the configured time, then stops. When `expedite` is ready, the remaining
    /// sessions get their 1012 at once.
    ///
    /// # Errors
    /// A part of the gateway had failed.
    pub async fn leave(self, expedite: impl Future<Output = ()>) -> Result<(), StartError> {
        let current = self.state.settings.current();
        let settings = &current.drain;
        let deadline = settings.deadline();
        let rate = (settings.rate_per_second > 0).then_some(f64::from(settings.rate_per_second));
        // A drain that an operator started continues; the deadline below applies to it as well.
        let _ = self.state.departures.start_drain(DrainOrder {
            rate_per_second: rate,
            announce: settings.announce(),
            deadline,
        });
        tokio::select! {
            () = self.emptied() => {}
            () = tokio::time::sleep(deadline) => tracing::warn!(sessions = self.state.sessions.len(), "drain deadline reached: closing the remaining sessions"),
            () = expedite => tracing::warn!(sessions = self.state.sessions.len(), "second signal received: closing the remaining sessions"),
        }
        if !self.state.sessions.is_empty() {
            // An operator may have cancelled the drain meanwhile; then there is none to expedite.
            let _ = self.state.departures.start_drain(DrainOrder {
                rate_per_second: None,
                announce: Duration::ZERO,
                deadline: Duration::ZERO,
            });
            self.state.departures.expedite_drain();
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
            tracing::warn!("some tasks did not end in time");
        }
        // The sessions have ended by now.
        tasks::presence::flush(&self.state).await;
        let (node, mark) = {
            let ids = self.state.sessions.ids();
            (ids.node(), ids.last_mark())
        };
        let data_dir = self.data_dir;
        let last_writes = blocking(move || {
            data_dir.remove_addresses();
            // Best effort: the stored mark is ahead of it.
            if let Err(error) = ids::save(data_dir.path(), node, mark) {
                tracing::debug!(%error, "session-ids.json can't be written");
            }
        });
        if timeout(HARD_STOP_TIMEOUT, last_writes).await.is_err() {
            // A disk that hangs must not keep the process.
            tracing::warn!("the data directory does not answer: its last writes are left out");
        }
        match self.life.failure() {
            Some(failure) => Err(StartError::Broken(failure.to_owned())),
            None => {
                tracing::info!(sessions = self.state.sessions.len(), "stopped");
                Ok(())
            }
        }
    }

    /// Completes when all sessions have ended, and no handshake can become one.
    async fn emptied(&self) {
        while self.state.departures.drain_status().state != DrainState::Drained {
            tokio::time::sleep(LEFT_CHECK_INTERVAL).await;
        }
    }
}

/// Runs a gateway until SIGTERM or Ctrl-C. At SIGHUP its configuration and its certificates are read again.
///
/// # Errors
/// The start failed, or a part of the gateway did.
pub async fn until_signal(config: Config, reloads: Reloads) -> Result<(), StartError> {
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
        // A start that waits for a lock must end with the process that started it.
        () = signals.leave() => return Ok(()),
    };
    let reloads = Arc::new(reloads);
    follow_configuration(&running, &reloads);
    loop {
        let asked = tokio::select! {
            asked = signals.next() => asked,
            () = running.broken() => Asked::Leave,
        };
        match asked {
            Asked::Leave => break,
            Asked::Reload => {
                reloads.ask();
                // A file system that hangs must not keep the gateway from leaving.
                tokio::select! {
                    () = tasks::tls::reload_now(&running.state) => {}
                    () = signals.leave() => break,
                    () = running.broken() => break,
                }
            }
        }
    }
    tracing::info!(sessions = running.state.sessions.len(), "leaving");
    running.leave(signals.leave()).await
}

/// Reads the configuration again when it changes.
fn follow_configuration(running: &Running, reloads: &Arc<Reloads>) {
    if reloads.is_confirmed() {
        running.state.settings.handle_confirmed(Some(running.state.clock.now()));
    }
    let (reloads, state, hard) = (
        Arc::clone(reloads),
        Arc::clone(&running.state),
        running.life.hard().clone(),
    );
    spawn_helper(&running.life, &running.state.panics, "configuration", move || {
        tasks::configuration::follow(Arc::clone(&reloads), Arc::clone(&state), hard.clone())
    });
}
