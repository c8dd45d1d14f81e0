//! The firmware rules in force on this node: loaded from the database, kept on disk, swapped in one step.
//!
//! A write through this node applies at once, without another read of the database; one through another node is found
//! by polling the revision. After a failed read the current rules stay. The last good set is also on disk, for a start
//! without a database. Rules are compiled and written to disk off the runtime's workers.
//!
//! Changes that the database could not accept are in force here, and wait in a journal on disk.
//!
//! Two further kinds of rules exist beside those of the database that this version enforces. Rules that it cannot
//! enforce are kept and do nothing. Rules that the database has lost (it was restored from a backup, or its machine
//! lost power), or whose rows are damaged, stay in force. Rules whose deletion it has lost refuse devices again, but
//! close no session. Each of these raises an alarm.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use seawall_proto::{
    id::RuleId,
    rules::{InForce, Lost, Returned, Rule, RuleSet, merge},
    time::Instant,
};
use tokio::{sync::watch, task::spawn_blocking};

use crate::{
    fleet::events::{Body, Events},
    runtime::{clock::Clock, lifecycle::blocking},
    store::{Store, StoreError},
};

pub mod hits;
pub(super) mod journal;
mod local;
mod saved;
mod written;

use self::{
    hits::{Hit, HitsByRule},
    journal::Journal,
    local::Sets,
    saved::{Saved, read, save},
};
pub use self::{
    journal::{JournalError, WRITES_MAX},
    local::Local,
    written::Written,
};

/// Alarm while there are stored rules that this version cannot enforce.
pub const UNSUPPORTED_ALARM: &str = "rules_unsupported";
/// Alarm while the database lacks rules that are in force, or has rules whose deletion it has lost.
pub const LOST_ALARM: &str = "rules_lost";

/// Alarm while changes of rules wait in this node's journal.
pub const LOCAL_ALARM: &str = "rules_local";
/// Alarm after a change of the journal conflicted with another change in the database.
pub const CONFLICT_ALARM: &str = "rules_conflict";

/// File of the last good rules in the data directory.
const FILE: &str = "rules.json";

/// The rules in force.
pub struct Rules {
    current: ArcSwap<RuleSet>,
    /// The rules without local changes.
    stored: ArcSwap<RuleSet>,
    /// Changes that the database does not have yet.
    local: ArcSwap<Local>,
    journal: Arc<tokio::sync::Mutex<Journal>>,
    /// Lines of the journal that could not be read at the start.
    journal_damage: Option<String>,
    revision: watch::Sender<u64>,
    /// Time at which the database last confirmed them, in microseconds of the process clock; `u64::MAX` before the
    /// first time.
    confirmed_at: AtomicU64,
    /// Time at which they came into force here, in microseconds of the process clock.
    applied_at: AtomicU64,
    /// Number of writes applied. Locked while the rules in force are replaced: a read from before a write never undoes
    /// it.
    writes: Mutex<u64>,
    /// Rules in force that the database has lost.
    lost: ArcSwap<Vec<Lost>>,
    /// Rules in force whose deletion the database has lost: they close no session here.
    returned: ArcSwap<Vec<Returned>>,
    hits: ArcSwap<HitsByRule>,
    /// Locked by its one writer.
    file: Arc<tokio::sync::Mutex<PathBuf>>,
}

impl Rules {
    /// Starts with the last good rules on disk, or with none.
    #[must_use]
    pub fn open(data_dir: &Path) -> Self {
        let file = data_dir.join(FILE);
        let saved = match read(&file) {
            Ok(saved) => saved,
            Err(error) => {
                tracing::error!(%error, file = %file.display(), "rules file not readable: starting without rules until the database answers");
                None
            }
        };
        let InForce { set, lost, returned } = saved.map_or_else(InForce::empty, Saved::into_in_force);
        let (journal, journal_damage) = Journal::open(data_dir);
        let Sets { stored, current, local } = Sets::of(Arc::new(set), journal.writes().to_vec());
        Self {
            revision: watch::Sender::new(current.revision()),
            hits: ArcSwap::from_pointee(HitsByRule::default().carried_to(&current)),
            current: ArcSwap::new(current),
            stored: ArcSwap::new(stored),
            local: ArcSwap::new(local),
            journal: Arc::new(tokio::sync::Mutex::new(journal)),
            journal_damage,
            confirmed_at: AtomicU64::new(u64::MAX),
            applied_at: AtomicU64::new(0),
            writes: Mutex::default(),
            lost: ArcSwap::from_pointee(lost),
            returned: ArcSwap::from_pointee(returned),
            file: Arc::new(tokio::sync::Mutex::new(file)),
        }
    }

    /// Rules in force that the database lacks, although this node has seen them there.
    #[must_use]
    pub fn lost(&self) -> Arc<Vec<Lost>> {
        self.lost.load_full()
    }

    /// Rules in force that came with an older revision of the database, and that this node did not have. Most likely
    /// they were deleted.
    #[must_use]
    pub fn returned(&self) -> Arc<Vec<Returned>> {
        self.returned.load_full()
    }

    /// Effects of each rule in force on this node.
    #[must_use]
    pub fn hits(&self) -> Arc<HitsByRule> {
        self.hits.load_full()
    }

    /// Counts an effect of the rule.
    pub fn count(&self, rule: RuleId, hit: Hit) {
        self.hits.load().count(rule, hit);
    }

    /// Counts a connecting device that the rule would have applied to, in dry-run mode. Logs the 1st, 10th, 100th …
    /// time.
    pub fn count_dry_run(&self, rule: RuleId) {
        let Some(attempts) = self.hits.load().count(rule, Hit::DryRun) else {
            return;
        };
        if is_power_of_ten(attempts) {
            let current = self.current.load();
            let effect = current.rules().iter().find(|other| other.id == rule);
            tracing::info!(
                rule.id = %rule,
                rule.effect = effect.map(|rule| rule.spec.effect.as_str()),
                attempts,
                "dry-run rule matched"
            );
        }
    }

    /// Minimum hint for a device that `rule` evicts now.
    ///
    /// It depends on the time since the rules in force here changed: an older rule may have begun to evict, or to match
    /// these devices, a moment ago.
    pub(crate) fn evicted_for(&self, rule: &Rule, now: Instant) -> Duration {
        let applied_at = Instant::from_micros(self.applied_at.load(Ordering::Relaxed));
        rule.evicted_for(now.saturating_since(applied_at))
    }

    #[must_use]
    pub fn current(&self) -> Arc<RuleSet> {
        self.current.load_full()
    }

    /// The revision. The evictor wakes when it changes.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Whether the database has answered at least once since the start.
    #[must_use]
    pub fn is_confirmed(&self) -> bool {
        self.confirmed_at.load(Ordering::Relaxed) != u64::MAX
    }

    /// Time since the database last confirmed the rules in force; since the start if it never did.
    #[must_use]
    pub fn age(&self, now: Instant) -> Duration {
        match self.confirmed_at.load(Ordering::Relaxed) {
            u64::MAX => now.saturating_since(Instant::ZERO),
            at => now.saturating_since(Instant::from_micros(at)),
        }
    }

    /// Puts the database's rules in force. If a write through this node came meanwhile, nothing changes: the read may
    /// be older, and the next poll repeats it.
    ///
    /// A database whose revision is lower than that in force has lost rules: those stay in force until they are
    /// deleted. So do rules that it lacks at the same revision. Rules of such a database that were not in force close
    /// no session.
    ///
    /// # Errors
    /// The database cannot be read; the rules in force stay.
    pub async fn reload(&self, store: &Store, clock: &Clock, events: &Events) -> Result<(), StoreError> {
        let writes = *self.writes();
        let stored = store.rules().await?;
        let (in_force, lost, returned) = (self.stored(), self.lost(), self.returned());
        let (base, local) = (Arc::clone(&in_force), self.local());
        let (wall, local_before) = (clock.wall(), Arc::clone(&local));
        let merging = blocking(move || {
            let InForce { set, lost, returned } = merge(stored, &base, &lost, &returned, wall);
            let sets = (set != *base).then(|| Sets::of(Arc::new(set), local.writes.clone()));
            (sets, lost, returned)
        });
        let Some((sets, lost, returned)) = merging.await else {
            return Ok(());
        };
        {
            let guard = self.writes();
            if *guard != writes || !Arc::ptr_eq(&local_before, &self.local()) {
                return Ok(());
            }
            self.lost.store(Arc::new(lost));
            self.returned.store(Arc::new(returned));
            if let Some(sets) = sets {
                self.put_in_force(sets, clock, events);
            }
        }
        self.confirmed_at.store(clock.now().as_micros(), Ordering::Relaxed);
        Ok(())
    }

    /// Puts a change that this node has just written in force, without a query.
    pub async fn apply(&self, written: &Written, clock: &Clock, events: &Events) {
        let written = written.clone();
        let id = written.id();
        // In the same step as the rules in force: a reload in between would find the rule lost again.
        let forget = |rules: &Self| {
            let lost = rules.lost();
            let others = lost.iter().filter(|lost| lost.rule.id != id);
            rules.lost.store(Arc::new(others.cloned().collect()));
            let returned = rules.returned();
            let others = returned.iter().filter(|returned| returned.id != id);
            rules.returned.store(Arc::new(others.copied().collect()));
        };
        self.replace(clock, events, move |base| written.clone().onto(base), forget)
            .await;
    }

    /// Replaces the stored rules with the result of `change`, if there is one. Runs `beside` in the same step.
    async fn replace(
        &self,
        clock: &Clock,
        events: &Events,
        change: impl Fn(&RuleSet) -> Option<RuleSet> + Clone + Send + 'static,
        beside: impl Fn(&Self) + Send,
    ) {
        loop {
            let (base, local) = (self.stored(), self.local());
            let (change, onto, waiting) = (change.clone(), Arc::clone(&base), Arc::clone(&local));
            let changing = blocking(move || Some(Sets::of(Arc::new(change(&onto)?), waiting.writes.clone())));
            let Some(Some(sets)) = changing.await else {
                return;
            };
            let mut writes = self.writes();
            // Other rules came into force meanwhile: repeat with those. Another writer made progress in each round.
            if Arc::ptr_eq(&base, &self.stored()) && Arc::ptr_eq(&local, &self.local()) {
                *writes += 1;
                beside(self);
                self.put_in_force(sets, clock, events);
                return;
            }
        }
    }

    fn put_in_force(&self, sets: Sets, clock: &Clock, events: &Events) {
        let Sets { stored, current, local } = sets;
        let before = self.current();
        self.stored.store(stored);
        self.local.store(local);
        if *before == *current {
            return;
        }
        let (before, revision) = (before.revision(), current.revision());
        // First, so that every refusal by a new rule is counted.
        self.hits.store(Arc::new(self.hits.load().carried_to(&current)));
        self.applied_at.store(clock.now().as_micros(), Ordering::Relaxed);
        self.current.store(current);
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

    /// Writes the stored rules to disk, for a start without the database. Returns the rules that were written.
    ///
    /// # Errors
    /// They cannot be written.
    pub(crate) async fn keep(&self) -> Result<Arc<RuleSet>, std::io::Error> {
        let file = Arc::clone(&self.file).lock_owned().await;
        let (set, lost, returned) = (self.stored(), self.lost(), self.returned());
        let kept = Arc::clone(&set);
        let saving = spawn_blocking(move || save(&file, &set, &lost, &returned));
        // It fails if the runtime ends.
        saving.await.map_err(std::io::Error::other)??;
        Ok(kept)
    }

    /// Applies the database's rules if their revision has changed.
    ///
    /// # Errors
    /// The database cannot be read; the rules in force stay.
    pub async fn poll(&self, store: &Store, clock: &Clock, events: &Events) -> Result<(), StoreError> {
        if self.is_confirmed() && store.rules_revision().await? == self.stored.load().revision() {
            self.confirmed_at.store(clock.now().as_micros(), Ordering::Relaxed);
            return Ok(());
        }
        self.reload(store, clock, events).await
    }
}

fn is_power_of_ten(number: u64) -> bool {
    10_u64.checked_pow(number.max(1).ilog10()) == Some(number)
}

#[cfg(test)]
mod tests;
