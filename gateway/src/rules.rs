//! The firmware rules in force on this node: loaded from the database, kept on disk, swapped in one step.
//!
//! A write through this node applies at once; a write through another node is seen by polling the revision. Any failure to read means
//! "keep what you have": the last good set is also on disk, and is what a start without a database uses.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use rand::{SeedableRng as _, rngs::SmallRng};
use seawall_proto::{
    close::Close,
    drain::Pacing,
    rules::{Rule, RuleSet, Subject},
    time::{Instant, WallTime},
};
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    clock::Clock,
    events::{Body, Events},
    sessions::Session,
    state::Shared,
    store::{Store, StoreError, StoredRules},
};

/// Shortest time between two looks at what is due: evictions are paced in small groups, not one by one.
const PASS_MIN: Duration = Duration::from_millis(10);
/// File of the last good rules in the data directory.
const FILE: &str = "rules.json";

/// The rules in force.
pub struct Rules {
    current: ArcSwap<RuleSet>,
    revision: watch::Sender<u64>,
    /// When the database last confirmed them, in microseconds of the process clock; `u64::MAX` before the first time.
    confirmed_at: AtomicU64,
    loading: Mutex<()>,
    file: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    revision: u64,
    rules: Vec<Rule>,
}

impl Rules {
    /// Starts from the last good rules on disk, or from none.
    #[must_use]
    pub fn open(data_dir: &Path) -> Self {
        let file = data_dir.join(FILE);
        let saved = match read(&file) {
            Ok(saved) => saved,
            Err(error) => {
                tracing::error!(%error, file = %file.display(), "ignoring unreadable rules file: starting without rules until the database answers");
                None
            }
        };
        let set = saved.map_or_else(RuleSet::empty, |saved| RuleSet::compile(saved.revision, saved.rules));
        Self {
            revision: watch::Sender::new(set.revision()),
            current: ArcSwap::from_pointee(set),
            confirmed_at: AtomicU64::new(u64::MAX),
            loading: Mutex::new(()),
            file,
        }
    }

    #[must_use]
    pub fn current(&self) -> Arc<RuleSet> {
        self.current.load_full()
    }

    /// The revision; changes wake the evictor.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// The database has answered at least once since the start.
    #[must_use]
    pub fn is_confirmed(&self) -> bool {
        self.confirmed_at.load(Ordering::Relaxed) != u64::MAX
    }

    /// Time since the database last confirmed the rules in force; since the start where it never did.
    #[must_use]
    pub fn age(&self, now: Instant) -> Duration {
        match self.confirmed_at.load(Ordering::Relaxed) {
            u64::MAX => now.saturating_since(Instant::ZERO),
            at => now.saturating_since(Instant::from_micros(at)),
        }
    }

    /// Makes what the database holds the rules in force. Called after each write through this node, and by the poll.
    ///
    /// # Errors
    /// The database can't be read; the rules in force stay.
    pub async fn reload(&self, store: &Store, clock: &Clock, events: &Events) -> Result<(), StoreError> {
        let _one_at_a_time = self.loading.lock().await;
        let StoredRules { revision, rules } = store.rules().await?;
        let set = RuleSet::compile(revision, rules);
        let before = self.current.load().revision();
        if revision != before || set.digest() != self.current.load().digest() {
            let saved = Saved {
                revision,
                rules: set.rules().to_vec(),
            };
            if let Err(error) = save(&self.file, &saved) {
                tracing::error!(%error, file = %self.file.display(), "rules are in force but could not be written to disk: free space or repair the data directory, a restart without the database would use older rules");
            }
            self.current.store(Arc::new(set));
            events.notice(
                clock.wall(),
                Body::Rules {
                    revision,
                    rule: None,
                    change: "applied",
                },
            );
            tracing::info!(
                rules.revision = revision,
                rules.revision_before = before,
                "firmware rules applied"
            );
            self.revision.send_replace(revision);
        }
        self.confirmed_at.store(clock.now().as_micros(), Ordering::Relaxed);
        Ok(())
    }

    /// Looks whether the database holds another revision, and takes it.
    ///
    /// # Errors
    /// The database can't be read; the rules in force stay.
    pub async fn poll(&self, store: &Store, clock: &Clock, events: &Events) -> Result<(), StoreError> {
        if self.is_confirmed() && store.rules_revision().await? == self.current.load().revision() {
            self.confirmed_at.store(clock.now().as_micros(), Ordering::Relaxed);
            return Ok(());
        }
        self.reload(store, clock, events).await
    }
}

/// Polls the revision until `stop`.
pub async fn follow(state: Shared, stop: CancellationToken) {
    let mut is_failing = false;
    loop {
        let outcome = state.rules.poll(&state.store, &state.clock, &state.events).await;
        match (&outcome, is_failing) {
            (Err(error), false) => {
                tracing::warn!(%error, "rules can't be read: those in force stay");
            }
            (Ok(()), true) => tracing::info!("rules can be read again"),
            (Ok(()), false) | (Err(_), true) => {}
        }
        is_failing = outcome.is_err();
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(state.config.rules.poll()) => {}
        }
    }
}

/// Closes the live sessions that a rule with `evict` refuses, at a pace, until `stop`.
pub async fn evict(state: Shared, stop: CancellationToken) {
    let mut changes = state.rules.subscribe();
    loop {
        changes.borrow_and_update();
        while evict_matching(&state, &stop, &changes).await {}
        tokio::select! {
            () = stop.cancelled() => return,
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

/// One pass over the sessions. True where there may be more to do: a handshake that had passed the rules before the change may
/// have become a session during the pass, or the rules changed again.
async fn evict_matching(state: &Shared, stop: &CancellationToken, changes: &watch::Receiver<u64>) -> bool {
    let rules = state.rules.current();
    let wall = state.clock.wall();
    if !rules.is_evicting(wall) {
        return false;
    }
    let mut rng = SmallRng::from_os_rng();
    let mut left = state
        .sessions
        .matching(|session| evicting_rule(&rules, session, wall).is_some());
    if left.is_empty() {
        return false;
    }
    let mut pacing = Pacing::evict(state.gate.k_ref(), left.len(), state.clock.now());
    tracing::info!(
        sessions = left.len(),
        rate_per_second = pacing.rate_per_second(),
        "evicting blocked sessions"
    );
    while !left.is_empty() {
        let now = state.clock.now();
        let wall = state.clock.wall();
        for session in left.drain(..pacing.take_due(left.len(), now)) {
            if let Some(rule) = evicting_rule(&rules, &session, wall) {
                session.close(Close::evicted(rule.spec.retry_after, &mut rng));
            }
        }
        let next = pacing.poll_timeout().max(now + PASS_MIN);
        tokio::select! {
            () = stop.cancelled() => return false,
            () = tokio::time::sleep_until(state.clock.deadline(next)) => {}
        }
        if changes.has_changed().unwrap_or(true) {
            return true;
        }
    }
    true
}

/// Closes a session that began while a rule against it came into force: the pass over all sessions may have missed it.
pub fn evict_newcomer(state: &Shared, session: &Session) {
    if let Some(rule) = evicting_rule(&state.rules.current(), session, state.clock.wall()) {
        session.close(Close::evicted(rule.spec.retry_after, &mut rand::rng()));
    }
}

/// The rule that wants this session gone, if one does and it has not been told yet.
fn evicting_rule<'a>(rules: &'a RuleSet, session: &Session, wall: WallTime) -> Option<&'a Rule> {
    let subject = Subject {
        firmware: session.info.cohort.firmware.as_deref(),
        model: session.info.cohort.model.as_deref(),
        tenant: Some(&session.info.tenant),
    };
    rules.evicting(&subject, wall).filter(|_| !session.is_closing())
}

fn read(file: &Path) -> Result<Option<Saved>, std::io::Error> {
    match std::fs::read(file) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(std::io::Error::other),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whole or not at all: a crash in the middle leaves the file before.
fn save(file: &Path, saved: &Saved) -> Result<(), std::io::Error> {
    let beside = file.with_extension("json.new");
    let mut out = std::fs::File::create(&beside)?;
    out.write_all(&serde_json::to_vec(saved)?)?;
    out.sync_all()?;
    std::fs::rename(&beside, file)
}
