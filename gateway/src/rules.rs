//! The firmware rules in force on this node: loaded from the database, kept on disk, swapped in one step.
//!
//! A write through this node applies at once, without another look at the database; a write through another node is seen by polling the
//! revision. Any failure to read means "keep what you have": the last good set is also on disk, and is what a start without a
//! database uses. Rules are compiled and written to disk off the runtime's workers.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use rand::{SeedableRng as _, rngs::SmallRng};
use seawall_proto::{
    close::Close,
    drain::Pacing,
    id::RuleId,
    rules::{Rule, RuleSet, Subject},
    time::{Instant, WallTime},
};
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, task::spawn_blocking};
use tokio_util::sync::CancellationToken;

use crate::{
    clock::Clock,
    data_dir::write_atomically,
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
    /// Writes applied so far. Held while the rules in force are replaced: what was read before a write never undoes it.
    writes: Mutex<u64>,
    file: PathBuf,
}

/// A change of the rules that this node has written to the database.
#[derive(Clone, Debug)]
pub enum Written {
    /// Made or changed. Its revision is that of the rule set.
    Rule(Rule),
    Deleted {
        rule: RuleId,
        revision: u64,
    },
}

impl Written {
    const fn revision(&self) -> u64 {
        match self {
            Self::Rule(rule) => rule.revision,
            Self::Deleted { revision, .. } => *revision,
        }
    }

    /// `base` with this change; `None` where it has it already. Where `base` lacks changes of others before this one, it keeps its
    /// revision, so that the poll brings those.
    fn onto(self, base: &RuleSet) -> Option<RuleSet> {
        let revision = self.revision();
        if base.revision() >= revision {
            return None;
        }
        let is_next = base.revision() + 1 == revision;
        let mut rules = base.rules().to_vec();
        match self {
            Self::Rule(rule) => {
                if rules
                    .iter()
                    .any(|other| other.id == rule.id && other.revision >= revision)
                {
                    return None;
                }
                rules.retain(|other| other.id != rule.id);
                rules.push(rule);
            }
            Self::Deleted { rule, .. } => rules.retain(|other| other.id != rule),
        }
        let labelled = if is_next { revision } else { base.revision() };
        Some(RuleSet::compile(labelled, rules))
    }
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
            writes: Mutex::default(),
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

    /// Makes what the database holds the rules in force. Where a write through this node came meanwhile, nothing changes: what was read
    /// may be older, and the next poll finds out.
    ///
    /// # Errors
    /// The database can't be read; the rules in force stay.
    pub async fn reload(&self, store: &Store, clock: &Clock, events: &Events) -> Result<(), StoreError> {
        let writes = *self.writes();
        let StoredRules { revision, rules } = store.rules().await?;
        let Ok(set) = spawn_blocking(move || RuleSet::compile(revision, rules)).await else {
            // The runtime ends.
            return Ok(());
        };
        let guard = self.writes();
        if *guard != writes {
            return Ok(());
        }
        let in_force = self.current();
        if revision != in_force.revision() || set.digest() != in_force.digest() {
            self.put_in_force(set, clock, events);
        }
        drop(guard);
        self.confirmed_at.store(clock.now().as_micros(), Ordering::Relaxed);
        Ok(())
    }

    /// Puts a change in force that this node has just written. Asks nobody.
    pub async fn apply(&self, written: &Written, clock: &Clock, events: &Events) {
        loop {
            let base = self.current();
            let (change, onto) = (written.clone(), Arc::clone(&base));
            let Ok(Some(set)) = spawn_blocking(move || change.onto(&onto)).await else {
                return;
            };
            let mut writes = self.writes();
            // Other rules came into force meanwhile: once more, onto those. Each round somebody else got on.
            if Arc::ptr_eq(&base, &self.current()) {
                *writes += 1;
                self.put_in_force(set, clock, events);
                return;
            }
        }
    }

    fn put_in_force(&self, set: RuleSet, clock: &Clock, events: &Events) {
        let (before, revision) = (self.current.load().revision(), set.revision());
        self.current.store(Arc::new(set));
        let applied = Body::Rules {
            revision,
            rule: None,
            change: "applied",
        };
        events.notice(clock.wall(), applied);
        tracing::info!(
            rules.revision = revision,
            rules.revision_before = before,
            "firmware rules applied"
        );
        self.revision.send_replace(revision);
    }

    fn writes(&self) -> MutexGuard<'_, u64> {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes `set` to disk, for a start without the database.
    async fn keep(&self, set: Arc<RuleSet>) {
        let file = self.file.clone();
        let saving = spawn_blocking(move || {
            let saved = Saved {
                revision: set.revision(),
                rules: set.rules().to_vec(),
            };
            if let Err(error) = save(&file, &saved) {
                tracing::error!(%error, file = %file.display(), "rules are in force but could not be written to disk: free space or repair the data directory, a restart without the database would use older rules");
            }
        });
        // Cancelled only where the runtime ends.
        let _ = saving.await;
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

/// Polls the revision, and keeps what is in force on disk, until `stop`.
pub async fn follow(state: Shared, stop: CancellationToken) {
    let mut is_failing = false;
    let mut kept: Option<Arc<RuleSet>> = None;
    let mut changes = state.rules.subscribe();
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
        let next_poll = tokio::time::sleep(state.config.rules.poll());
        tokio::pin!(next_poll);
        loop {
            changes.borrow_and_update();
            let current = state.rules.current();
            // What came from the disk need not go there.
            let is_kept = kept.as_ref().is_some_and(|kept| Arc::ptr_eq(kept, &current));
            if state.rules.is_confirmed() && !is_kept {
                state.rules.keep(Arc::clone(&current)).await;
                kept = Some(current);
            }
            tokio::select! {
                biased;
                changed = changes.changed() => if changed.is_err() { return },
                () = stop.cancelled() => return,
                () = &mut next_poll => break,
            }
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

fn save(file: &Path, saved: &Saved) -> Result<(), std::io::Error> {
    write_atomically(file, &serde_json::to_vec(saved)?, 0o644)
}

#[cfg(test)]
mod tests {
    use seawall_proto::rules::{Effect, Match, RuleSpec};
    use uuid::Uuid;

    use super::*;

    fn rule(id: u128, revision: u64, reason: &str) -> Rule {
        let mut spec = RuleSpec::new(Match::default(), Effect::Block);
        reason.clone_into(&mut spec.reason);
        Rule {
            id: RuleId(Uuid::from_u128(id)),
            spec,
            created_at: WallTime::from_unix_ms(1),
            revision,
        }
    }

    fn reasons(set: &RuleSet) -> Vec<&str> {
        let mut reasons: Vec<&str> = set.rules().iter().map(|rule| rule.spec.reason.as_str()).collect();
        reasons.sort_unstable();
        reasons
    }

    #[test]
    fn rules_that_can_not_be_kept_leave_nothing_beside_their_file() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join(FILE);
        std::fs::create_dir(&file).unwrap();
        let saved = Saved {
            revision: 1,
            rules: vec![rule(1, 1, "one")],
        };

        assert!(save(&file, &saved).is_err());

        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_next_change_makes_the_next_revision() {
        let base = RuleSet::compile(4, vec![rule(1, 4, "one")]);

        let made = Written::Rule(rule(2, 5, "two")).onto(&base).unwrap();
        let changed = Written::Rule(rule(1, 6, "uno")).onto(&made).unwrap();
        let deleted = Written::Deleted {
            rule: RuleId(Uuid::from_u128(2)),
            revision: 7,
        };
        let deleted = deleted.onto(&changed).unwrap();

        assert_eq!((made.revision(), reasons(&made)), (5, vec!["one", "two"]));
        assert_eq!((changed.revision(), reasons(&changed)), (6, vec!["two", "uno"]));
        assert_eq!((deleted.revision(), reasons(&deleted)), (7, vec!["uno"]));
    }

    #[test]
    fn change_after_one_of_another_node_is_in_force_and_the_poll_still_has_work() {
        let base = RuleSet::compile(4, vec![rule(1, 4, "one")]);

        let set = Written::Rule(rule(3, 6, "three")).onto(&base).unwrap();

        assert_eq!((set.revision(), reasons(&set)), (4, vec!["one", "three"]));
    }

    #[test]
    fn change_that_is_in_force_already_is_not_made_again() {
        let base = RuleSet::compile(4, vec![rule(1, 3, "newer")]);

        assert!(Written::Rule(rule(1, 2, "older")).onto(&base).is_none());
        assert!(Written::Rule(rule(2, 4, "two")).onto(&base).is_none());
    }

    #[tokio::test]
    async fn writes_at_the_same_time_are_both_in_force() {
        let home = tempfile::tempdir().unwrap();
        let (rules, clock, events) = (Rules::open(home.path()), Clock::start(), Events::default());
        let (one, two) = (Written::Rule(rule(1, 1, "one")), Written::Rule(rule(2, 2, "two")));

        tokio::join!(rules.apply(&one, &clock, &events), rules.apply(&two, &clock, &events),);

        assert_eq!(reasons(&rules.current()), ["one", "two"]);
        assert_eq!(*rules.writes(), 2);
    }
}
