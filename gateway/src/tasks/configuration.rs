//! Reads the configuration of a running node again: its file when that changes, what nodes share from its URLs, and
//! both at SIGHUP. Start with [`Reloads`].

use std::{
    fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use rand::Rng as _;
use seawall_proto::{config_source::Outcome, freshness::Freshness, time::Instant};
use tokio::{
    sync::Notify,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{
    fleet::shared_config::{Fetched, SharedConfig},
    node::{Shared, State},
    runtime::{
        config::{Config, ConfigError},
        lifecycle::blocking,
        telemetry,
    },
};

/// Interval of checks whether the file has changed, or the URLs are due.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// Alarm while no URL of `[source]` has answered as it should for 15 minutes.
const STALE_ALARM: &str = "config_stale";
/// Alarm while the configuration that was last read cannot be used.
const REFUSED_ALARM: &str = "config_refused";

/// Reads the whole configuration with this text of `[source]`.
type Load = Box<dyn Fn(Option<&str>) -> Result<Config, ConfigError> + Send + Sync>;

/// Where a node's configuration comes from.
pub struct Reloads {
    load: Load,
    file: Option<PathBuf>,
    shared: Option<Mutex<SharedConfig>>,
    is_confirmed: bool,
    asked: Notify,
}

impl Reloads {
    /// `is_confirmed`: whether the URLs answered at the start.
    #[must_use]
    pub fn new(load: Load, file: Option<PathBuf>, shared: Option<SharedConfig>, is_confirmed: bool) -> Self {
        Self {
            load,
            file,
            shared: shared.map(Mutex::new),
            is_confirmed,
            asked: Notify::new(),
        }
    }

    /// Whether the configuration of the start is that of its source, and not of an earlier process.
    #[must_use]
    pub const fn is_confirmed(&self) -> bool {
        self.is_confirmed
    }

    /// SIGHUP: reads everything now.
    pub fn ask(&self) {
        self.asked.notify_one();
    }

    /// Size and time of the file, by which a change is noticed. An error counts as one more state.
    fn mark(&self) -> Option<Mark> {
        let data = fs::metadata(self.file.as_ref()?).map_err(|error| error.kind());
        Some(data.map(|data| (data.len(), data.modified().ok())))
    }

    /// Blocks. Fetches if that is wanted, and reads the configuration if it was fetched or `reads_file`.
    fn read(&self, fetches: bool, reads_file: bool) -> Reading {
        let mut reading = Reading::default();
        let Some(shared) = &self.shared else {
            reading.config = reads_file.then(|| (self.load)(None));
            return reading;
        };
        let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
        if fetches {
            reading.fetched = shared.fetch(false, |text| (self.load)(Some(text)).map(drop));
        }
        if reads_file || reading.fetched.iter().any(|fetched| fetched.outcome == Outcome::Taken) {
            reading.config = Some((self.load)(shared.text()));
        }
        reading.unkept = shared.keep().err();
        reading
    }
}

type Mark = Result<(u64, Option<SystemTime>), io::ErrorKind>;

/// What a reading gave.
#[derive(Default)]
struct Reading {
    fetched: Vec<Fetched>,
    config: Option<Result<Config, ConfigError>>,
    /// Why the text of the URLs is not on disk.
    unkept: Option<io::Error>,
}

/// Follows the file and the URLs until `stop`.
pub async fn follow(reloads: Arc<Reloads>, state: Shared, stop: CancellationToken) {
    let mut mark = None;
    let mut pending = None;
    let mut next_fetch = state.clock.now();
    let mut logged = Logged::default();
    let mut is_first = true;
    let mut checks = interval(CHECK_INTERVAL);
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let is_asked = tokio::select! {
            () = stop.cancelled() => return,
            () = reloads.asked.notified() => true,
            _ = checks.tick() => false,
        };
        let found = reloads.mark();
        if std::mem::take(&mut is_first) {
            mark.clone_from(&found);
        }
        // A file that is being written is read once it stands still.
        let reads_file = is_asked || (found != mark && found == pending);
        pending.clone_from(&found);
        let fetches = reloads.shared.is_some() && (is_asked || state.clock.now() >= next_fetch);
        if reads_file || fetches {
            if reads_file {
                mark = found;
            }
            let reader = Arc::clone(&reloads);
            let Some(Some(reading)) = stop
                .run_until_cancelled(blocking(move || reader.read(fetches, reads_file)))
                .await
            else {
                continue;
            };
            handle(&state, reading, &mut logged);
            let part = rand::rng().random_range(0.9..1.1);
            next_fetch = state.clock.now() + Duration::from_secs(state.config.source.refresh).mul_f64(part);
        }
        watch(&state);
    }
}

/// What the log has said already.
#[derive(Default)]
struct Logged {
    outcomes: Vec<(String, Outcome)>,
    is_unkept: bool,
}

fn handle(state: &State, reading: Reading, logged: &mut Logged) {
    let now = state.clock.now();
    let outcomes: Vec<_> = reading
        .fetched
        .iter()
        .map(|fetched| (fetched.origin.clone(), fetched.outcome))
        .collect();
    // A URL that fails for hours is one line.
    let is_news = logged.outcomes != outcomes;
    for fetched in &reading.fetched {
        state.metrics.config_fetches.increment(fetched.outcome.as_str());
        if is_news && !fetched.outcome.is_contact() {
            tracing::warn!(
                source = fetched.origin,
                outcome = fetched.outcome.as_str(),
                problem = fetched.problem,
                "shared configuration not read: the one in use stays"
            );
        }
    }
    if !outcomes.is_empty() {
        logged.outcomes = outcomes;
    }
    match (&reading.unkept, logged.is_unkept) {
        (Some(error), false) => tracing::error!(%error, "shared configuration not kept on disk: tried again"),
        (None, true) => tracing::info!("shared configuration kept on disk"),
        (Some(_), true) | (None, false) => {}
    }
    logged.is_unkept = reading.unkept.is_some();
    let is_read = reading.config.is_some();
    match reading.config {
        Some(Ok(config)) => use_changes(state, config),
        Some(Err(error)) => {
            tracing::error!(%error, "configuration not usable: nothing is changed");
            return state.settings.handle_refused(error.to_string());
        }
        None => {}
    }
    let is_contact = reading.fetched.iter().any(|fetched| fetched.outcome.is_contact());
    let refused = reading.fetched.iter().find(|fetched| is_refusal(fetched.outcome));
    match refused {
        Some(refused) if !is_contact => state.settings.handle_refused(refused.to_string()),
        Some(_) | None if is_contact => state.settings.handle_confirmed(Some(now)),
        // The files of this node are good; its URLs were not asked, or did not answer.
        Some(_) | None if is_read => state.settings.handle_confirmed(None),
        Some(_) | None => {}
    }
}

/// Whether a URL answered with something that may not be used, rather than not at all.
const fn is_refusal(outcome: Outcome) -> bool {
    matches!(
        outcome,
        Outcome::EtagReused | Outcome::WrongType | Outcome::Empty | Outcome::TooLarge | Outcome::Invalid
    )
}

/// Uses what a running node can use. The rest waits for a restart.
fn use_changes(state: &State, config: Config) {
    // `seawall log-level` lasts until the configuration is read again.
    set_level(&config.logging.level);
    let changed = state.settings.set(config, &state.config);
    if changed.is_empty() {
        return;
    }
    let current = state.settings.current();
    state.breaker.set_mode(current.breaker.mode.into());
    state.lookups.set_bounds(
        current.admission.lookups_per_second_max,
        current.admission.keys_in_flight_max,
    );
    let restart_needed = state.settings.status().restart_needed;
    tracing::info!(?changed, "configuration changed");
    if !restart_needed.is_empty() {
        tracing::warn!(?restart_needed, "changed settings wait for a restart");
    }
}

fn set_level(level: &str) {
    match telemetry::set_level(level) {
        // `set_level` logs a change itself.
        Ok(change) if change.is_change() => {}
        Ok(change) => tracing::info!(to = change.to, "log level unchanged: already the configured one"),
        Err(error) => tracing::error!(error = %error, "log level not changed"),
    }
}

/// Age and alarms.
fn watch(state: &State) {
    let status = state.settings.status();
    let age = age(state, state.clock.now());
    state.metrics.config_age_seconds.set(age.as_secs_f64());
    let is_stale = Freshness::of(age) >= Freshness::Grace;
    let detail = if is_stale {
        "no URL of [source] has answered as it should for 15 minutes: the last good configuration is in use"
    } else {
        "the configuration is confirmed"
    };
    state.alarms.set(STALE_ALARM, is_stale, detail);
    let refused = status.refused.as_deref();
    state.alarms.set(
        REFUSED_ALARM,
        refused.is_some(),
        refused.unwrap_or("the configuration is in use").to_owned(),
    );
}

/// Time since the configuration was confirmed; since the start, if it is that of an earlier process. 0 if all of it is
/// of this node.
#[must_use]
pub fn age(state: &State, now: Instant) -> Duration {
    let status = state.settings.status();
    if status.is_shared {
        now.saturating_since(status.confirmed.unwrap_or(Instant::ZERO))
    } else {
        Duration::ZERO
    }
}
