//! The firmware rules in force on this node: loaded from the database, kept on disk, swapped in one step.
//!
//! A write through this node applies at once, without another look at the database; a write through another node is seen by polling the
//! revision. Any failure to read means "keep what you have": the last good set is also on disk, and is what a start without a
//! database uses. Rules are compiled and written to disk off the runtime's workers.
//!
//! Two kinds of rules stand beside those of the database that this version enforces. Rules that it can't enforce are kept and do
//! nothing. Rules that the database has lost (it came out of a backup, or its machine lost power), or whose rows are damaged, stay in
//! force. Rules whose deletion it has lost refuse devices again, and close no session. Each of them raises an alarm.

use std::{
    collections::BTreeMap,
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
    rules::{Rule, RuleSet},
    time::{Instant, WallTime},
};
use tokio::{sync::watch, task::spawn_blocking};
use tokio_util::sync::CancellationToken;

use crate::{
    clock::Clock,
    events::{Body, Events},
    state::Shared,
    store::{Store, StoreError, StoredRules},
};

mod alarms;
mod evict;
pub mod hits;
mod saved;

use self::{
    alarms::Alarms,
    hits::HitsByRule,
    saved::{Saved, read, save},
};
pub use self::{
    alarms::{LOST_ALARM, UNSUPPORTED_ALARM},
    evict::{evict, evict_newcomer},
    saved::{Lost, Returned},
};

/// File of the last good rules in the data directory.
const FILE: &str = "rules.json";

/// The rules in force.
pub struct Rules {
    current: ArcSwap<RuleSet>,
    revision: watch::Sender<u64>,
    /// When the database last confirmed them, in microseconds of the process clock; `u64::MAX` before the first time.
    confirmed_at: AtomicU64,
    /// When they came into force here, in microseconds of the process clock.
    applied_at: AtomicU64,
    /// Writes applied so far. Held while the rules in force are replaced: what was read before a write never undoes it.
    writes: Mutex<u64>,
    /// Rules in force that the database has lost.
    lost: ArcSwap<Vec<Lost>>,
    /// Rules in force whose deletion the database has lost: they close no session here.
    returned: ArcSwap<Vec<Returned>>,
    hits: ArcSwap<HitsByRule>,
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
    /// The rule that was changed.
    #[must_use]
    pub const fn id(&self) -> RuleId {
        match self {
            Self::Rule(rule) => rule.id,
            Self::Deleted { rule, .. } => *rule,
        }
    }

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
        let (mut rules, mut unsupported) = (base.rules().to_vec(), base.unsupported().to_vec());
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
            Self::Deleted { rule, .. } => {
                rules.retain(|other| other.id != rule);
                unsupported.retain(|other| other.id != rule);
            }
        }
        let labelled = if is_next { revision } else { base.revision() };
        Some(RuleSet::compile_stored(labelled, rules, unsupported))
    }
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
        let Loaded { set, lost, returned } = saved.map_or_else(Loaded::empty, Saved::into_loaded);
        Self {
            revision: watch::Sender::new(set.revision()),
            hits: ArcSwap::from_pointee(HitsByRule::default().carried_to(&set)),
            current: ArcSwap::from_pointee(set),
            confirmed_at: AtomicU64::new(u64::MAX),
            applied_at: AtomicU64::new(0),
            writes: Mutex::default(),
            lost: ArcSwap::from_pointee(lost),
            returned: ArcSwap::from_pointee(returned),
            file,
        }
    }

    /// Rules in force that the database does not hold, although this node has seen them there.
    #[must_use]
    pub fn lost(&self) -> Arc<Vec<Lost>> {
        self.lost.load_full()
    }

    /// Rules in force that came with an older revision of the database, and that this node did not have: most likely they were deleted.
    #[must_use]
    pub fn returned(&self) -> Arc<Vec<Returned>> {
        self.returned.load_full()
    }

    /// What each rule in force did on this node.
    #[must_use]
    pub fn hits(&self) -> Arc<HitsByRule> {
        self.hits.load_full()
    }

    /// The rule has refused a device.
    pub fn count_refused(&self, rule: RuleId) {
        self.hits.load().count_refused(rule);
    }

    fn count_evicted(&self, rule: RuleId) {
        self.hits.load().count_evicted(rule);
    }

    /// How long a device that `rule` evicts now is told to stay away, at least.
    ///
    /// By the time since the rules in force here changed: a rule of yesterday may evict, or match these devices, since a moment ago.
    fn evicted_for(&self, rule: &Rule, now: Instant) -> Duration {
        let applied_at = Instant::from_micros(self.applied_at.load(Ordering::Relaxed));
        rule.evicted_for(now.saturating_since(applied_at))
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
    /// A database whose revision is lower than that in force has lost rules: those stay in force until they are deleted. So do rules that
    /// it lacks at the very same revision. Rules that such a database has, and that were not in force, close no session.
    ///
    /// # Errors
    /// The database can't be read; the rules in force stay.
    pub async fn reload(&self, store: &Store, clock: &Clock, events: &Events) -> Result<(), StoreError> {
        let writes = *self.writes();
        let stored = store.rules().await?;
        let (in_force, lost, returned) = (self.current(), self.lost(), self.returned());
        let base = Arc::clone(&in_force);
        let wall = clock.wall();
        let merging = spawn_blocking(move || Loaded::of(stored, &base, &lost, &returned, wall));
        let Ok(Loaded { set, lost, returned }) = merging.await else {
            // The runtime ends.
            return Ok(());
        };
        let revision = set.revision();
        {
            let guard = self.writes();
            if *guard != writes {
                return Ok(());
            }
            self.lost.store(Arc::new(lost));
            self.returned.store(Arc::new(returned));
            if revision != in_force.revision() || set.digest() != in_force.digest() {
                self.put_in_force(set, clock, events);
            }
        }
        self.confirmed_at.store(clock.now().as_micros(), Ordering::Relaxed);
        Ok(())
    }

    /// Puts a change in force that this node has just written. Asks nobody.
    pub async fn apply(&self, written: &Written, clock: &Clock, events: &Events) {
        let written = written.clone();
        self.replace(clock, events, move |base| written.clone().onto(base), |_| {})
            .await;
    }

    /// Takes a rule out of force that the database has lost. False where there is none of this id.
    pub async fn release(&self, id: RuleId, clock: &Clock, events: &Events) -> bool {
        if self.lost().iter().all(|lost| lost.rule.id != id) {
            return false;
        }
        let without = move |base: &RuleSet| {
            let rules = base.rules().iter().filter(|rule| rule.id != id).cloned().collect();
            Some(RuleSet::compile_stored(
                base.revision(),
                rules,
                base.unsupported().to_vec(),
            ))
        };
        // Together with the rules in force: a reload in between would find the rule lost again.
        let forget = |rules: &Self| {
            let lost = rules.lost();
            let others = lost.iter().filter(|lost| lost.rule.id != id);
            rules.lost.store(Arc::new(others.cloned().collect()));
        };
        self.replace(clock, events, without, forget).await;
        true
    }

    /// Puts what `change` makes of the rules in force in their place, unless it is nothing. Runs `beside` in the same step.
    async fn replace(
        &self,
        clock: &Clock,
        events: &Events,
        change: impl Fn(&RuleSet) -> Option<RuleSet> + Clone + Send + 'static,
        beside: impl Fn(&Self) + Send,
    ) {
        loop {
            let base = self.current();
            let (change, onto) = (change.clone(), Arc::clone(&base));
            let Ok(Some(set)) = spawn_blocking(move || change(&onto)).await else {
                return;
            };
            let mut writes = self.writes();
            // Other rules came into force meanwhile: once more, onto those. Each round somebody else got on.
            if Arc::ptr_eq(&base, &self.current()) {
                *writes += 1;
                beside(self);
                self.put_in_force(set, clock, events);
                return;
            }
        }
    }

    fn put_in_force(&self, set: RuleSet, clock: &Clock, events: &Events) {
        let (before, revision) = (self.current.load().revision(), set.revision());
        // First, so that no refusal by a new rule goes uncounted.
        self.hits.store(Arc::new(self.hits.load().carried_to(&set)));
        self.applied_at.store(clock.now().as_micros(), Ordering::Relaxed);
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
        let (file, lost, returned) = (self.file.clone(), self.lost(), self.returned());
        let saving = spawn_blocking(move || {
            if let Err(error) = save(&file, &set, &lost, &returned) {
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
    let mut alarms = Alarms::default();
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
            alarms.update(&state, &current);
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

/// Rules to be in force, with those among them that the database does not have as this node has seen them.
struct Loaded {
    set: RuleSet,
    lost: Vec<Lost>,
    returned: Vec<Returned>,
}

impl Loaded {
    fn empty() -> Self {
        Self {
            set: RuleSet::empty(),
            lost: Vec::new(),
            returned: Vec::new(),
        }
    }

    /// What is stored, the rules that the database has lost, and those whose deletion it has lost.
    fn of(stored: StoredRules, in_force: &RuleSet, lost: &[Lost], returned: &[Returned], wall: WallTime) -> Self {
        let StoredRules {
            revision,
            mut rules,
            mut unsupported,
        } = stored;
        let readable: BTreeMap<RuleId, u64> = rules.iter().map(|rule| (rule.id, rule.revision)).collect();
        let unreadable: BTreeMap<RuleId, u64> = unsupported.iter().map(|rule| (rule.id, rule.revision)).collect();
        let known: BTreeMap<RuleId, u64> = readable.iter().chain(&unreadable).map(|(id, at)| (*id, *at)).collect();
        // A rule that was changed since is neither lost nor returned any more.
        let is_changed = |id: &RuleId, since: u64| known.get(id).is_some_and(|changed| *changed > since);
        // Whoever changes a rule gives it another revision: one that can't be read any more at the same revision is damaged. Zero stands
        // for a revision that can't be read either.
        let is_damaged = |rule: &Rule| {
            let stored = unreadable.get(&rule.id);
            stored.is_some_and(|revision| *revision == rule.revision || *revision == 0)
        };
        let is_missing = |rule: &Rule| {
            rule.revision > revision || (revision == in_force.revision() && !known.contains_key(&rule.id))
        };
        let is_older = revision <= in_force.revision();
        let found = in_force
            .rules()
            .iter()
            .filter(|rule| is_damaged(rule) || (is_older && is_missing(rule)))
            .map(|rule| Lost {
                rule: rule.clone(),
                since: revision,
            });
        // Those found before go last, so that they keep the revision at which they were found.
        let lost: BTreeMap<RuleId, Lost> = found
            .chain(lost.iter().cloned())
            .map(|lost| (lost.rule.id, lost))
            .collect();
        let is_lost = |lost: &Lost| {
            // One that can be read again is not lost any more, either.
            let is_readable = readable.get(&lost.rule.id) == Some(&lost.rule.revision);
            !lost.rule.is_expired(wall) && !is_changed(&lost.rule.id, lost.since) && !is_readable
        };
        let lost: Vec<Lost> = lost.into_values().filter(is_lost).collect();
        let found = rules
            .iter()
            .filter(|rule| revision < in_force.revision() && in_force.rules().iter().all(|other| other.id != rule.id));
        let returned: BTreeMap<RuleId, u64> = found
            .map(|rule| (rule.id, revision))
            .chain(returned.iter().map(|rule| (rule.id, rule.since)))
            .filter(|(id, since)| known.contains_key(id) && !is_changed(id, *since))
            .collect();
        for rule in rules.iter_mut().filter(|rule| returned.contains_key(&rule.id)) {
            rule.spec.evict = false;
        }
        // Of a rule that was changed in a lost revision, the lost form counts.
        let is_kept = |id: RuleId| lost.binary_search_by_key(&id, |lost| lost.rule.id).is_err();
        rules.retain(|rule| is_kept(rule.id));
        unsupported.retain(|rule| is_kept(rule.id));
        rules.extend(lost.iter().map(|lost| lost.rule.clone()));
        Self {
            set: RuleSet::compile_stored(revision, rules, unsupported),
            lost,
            returned: returned.into_iter().map(|(id, since)| Returned { id, since }).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use seawall_proto::rules::{Effect, Match, RuleSpec};
    use uuid::Uuid;

    use super::*;
    use crate::config::DatabaseUrl;

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
        let set = RuleSet::compile(1, vec![rule(1, 1, "one")]);

        assert!(save(&file, &set, &[], &[]).is_err());

        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_this_version_can_not_enforce_survives_the_file_byte_by_byte() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join(FILE);
        let specs = [
            r#"{ "effect":"throttle", "rate": 1.50, "match":{"firmware":">=3"} }"#,
            "not \"JSON\"",
        ];
        let unsupported = (7..)
            .zip(specs)
            .map(|(id, spec)| Rule::read(RuleId(Uuid::from_u128(id)), spec, WallTime::from_unix_ms(1), 2).unwrap_err());
        let set = RuleSet::compile_stored(3, vec![rule(1, 1, "one")], unsupported.collect());

        save(&file, &set, &[], &[]).unwrap();
        let Loaded {
            set: again,
            lost,
            returned,
        } = read(&file).unwrap().unwrap().into_loaded();
        let first = std::fs::read(&file).unwrap();
        save(&file, &again, &lost, &returned).unwrap();

        let kept: Vec<&str> = again.unsupported().iter().map(|rule| &*rule.spec).collect();
        assert_eq!(kept, specs);
        assert_eq!((again.revision(), again.digest()), (3, set.digest()));
        assert_eq!(reasons(&again), ["one"]);
        assert_eq!(std::fs::read(&file).unwrap(), first);
    }

    #[test]
    fn file_of_a_later_version_is_read() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join(FILE);
        let id = Uuid::from_u128(1);
        let text = format!(
            r#"{{"revision":3,"cluster":"a","rules":[{{"id":"{id}","spec":{{"match":{{}},"effect":"block"}},"created_at":1,"revision":3,"stage":2}}]}}"#
        );
        std::fs::write(&file, text).unwrap();

        let rules = Rules::open(home.path());

        assert_eq!((rules.current().revision(), rules.current().rules().len()), (3, 1));
    }

    #[test]
    fn rules_that_the_database_has_lost_stay_in_force_until_it_has_them_again() {
        let in_force = RuleSet::compile(9, vec![rule(1, 3, "old"), rule(2, 8, "changed"), rule(3, 9, "new")]);
        let wall = WallTime::from_unix_ms(5);
        let stored = |revision, rules| StoredRules {
            revision,
            rules,
            unsupported: Vec::new(),
        };

        let restored = stored(6, vec![rule(1, 3, "old"), rule(2, 5, "before")]);
        let Loaded { set, lost, .. } = Loaded::of(restored, &in_force, &[], &[], wall);
        let next = stored(7, vec![rule(1, 3, "old"), rule(2, 7, "again")]);
        let Loaded {
            set: next,
            lost: still_lost,
            ..
        } = Loaded::of(next, &set, &lost, &[], wall);
        let same = stored(7, vec![rule(1, 3, "old"), rule(2, 7, "again")]);
        let Loaded {
            set: same,
            lost: lost_then,
            ..
        } = Loaded::of(same, &next, &still_lost, &[], wall);

        assert_eq!((set.revision(), reasons(&set)), (6, vec!["changed", "new", "old"]));
        assert_eq!(lost.len(), 2);
        assert_eq!((next.revision(), reasons(&next)), (7, vec!["again", "new", "old"]));
        assert_eq!((still_lost.len(), still_lost[0].since), (1, 6));
        assert_eq!((same.digest(), lost_then), (next.digest(), still_lost));
    }

    #[test]
    fn rules_that_the_database_lacks_at_the_same_revision_are_lost() {
        let in_force = RuleSet::compile(2, vec![rule(1, 1, "old"), rule(2, 2, "lost")]);
        let stored = StoredRules {
            revision: 2,
            rules: vec![rule(1, 1, "old"), rule(3, 2, "other")],
            unsupported: Vec::new(),
        };

        let Loaded { set, lost, .. } = Loaded::of(stored, &in_force, &[], &[], WallTime::from_unix_ms(5));

        assert_eq!((reasons(&set), lost.len()), (vec!["lost", "old", "other"], 1));
    }

    #[test]
    fn rule_whose_row_is_damaged_stays_in_force_until_it_can_be_read_or_was_changed() {
        let wall = WallTime::from_unix_ms(5);
        let in_force = RuleSet::compile(4, vec![rule(1, 3, "good"), rule(2, 4, "other")]);
        let unreadable = |id, revision| Rule::read(RuleId(Uuid::from_u128(id)), "", wall, revision).unwrap_err();
        let stored = |revision, rules, unsupported| StoredRules {
            revision,
            rules,
            unsupported,
        };

        let with_lost = |stored, in_force: &RuleSet, lost: &[Lost]| {
            let Loaded { set, lost, .. } = Loaded::of(stored, in_force, lost, &[], wall);
            (set, lost)
        };

        for at in [3, 0] {
            let damaged = stored(6, vec![rule(2, 4, "other")], vec![unreadable(1, at)]);
            let (set, lost) = with_lost(damaged.clone(), &in_force, &[]);
            assert_eq!((reasons(&set), set.unsupported().len()), (vec!["good", "other"], 0));
            assert_eq!((lost.len(), lost[0].rule.revision), (1, 3));
            let (again, still) = with_lost(damaged, &set, &lost);
            assert_eq!((again.digest(), &still), (set.digest(), &lost));

            let repaired = stored(6, vec![rule(1, 3, "good"), rule(2, 4, "other")], Vec::new());
            let (repaired, lost_then) = with_lost(repaired, &set, &lost);
            assert_eq!((reasons(&repaired), lost_then), (vec!["good", "other"], Vec::new()));
            let changed = stored(7, vec![rule(2, 4, "other")], vec![unreadable(1, 7)]);
            let (changed, lost_then) = with_lost(changed, &set, &lost);
            assert_eq!((reasons(&changed), changed.unsupported().len()), (vec!["other"], 1));
            assert_eq!(lost_then, []);
        }
        let by_a_later_version = stored(5, vec![rule(2, 4, "other")], vec![unreadable(1, 5)]);
        let (set, lost) = with_lost(by_a_later_version, &in_force, &[]);
        assert_eq!(
            (reasons(&set), set.unsupported().len(), lost),
            (vec!["other"], 1, Vec::new())
        );
    }

    #[test]
    fn rules_that_others_have_deleted_are_not_lost() {
        let in_force = RuleSet::compile(2, vec![rule(1, 1, "old"), rule(2, 2, "deleted")]);
        let stored = StoredRules {
            revision: 3,
            rules: vec![rule(1, 1, "old")],
            unsupported: Vec::new(),
        };

        let Loaded { set, lost, .. } = Loaded::of(stored, &in_force, &[], &[], WallTime::from_unix_ms(5));

        assert_eq!((reasons(&set), lost.len()), (vec!["old"], 0));
    }

    #[test]
    fn rule_whose_deletion_the_database_has_lost_closes_no_session_until_somebody_changes_it() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join(FILE);
        let evicting = |id, revision| {
            let mut rule = rule(id, revision, "evicting");
            rule.spec.evict = true;
            rule
        };
        // Rule 2 was deleted in revision 8.
        let in_force = RuleSet::compile(8, vec![evicting(1, 3)]);
        let wall = WallTime::from_unix_ms(5);
        let stored = |revision, rules| StoredRules {
            revision,
            rules,
            unsupported: Vec::new(),
        };
        let evicts = |set: &RuleSet| -> Vec<bool> { set.rules().iter().map(|rule| rule.spec.evict).collect() };

        let restored = stored(6, vec![evicting(1, 3), evicting(2, 5)]);
        let back = Loaded::of(restored, &in_force, &[], &[], wall);
        save(&file, &back.set, &back.lost, &back.returned).unwrap();
        let kept = read(&file).unwrap().unwrap().into_loaded();
        let next = stored(7, vec![evicting(1, 3), evicting(2, 5), rule(3, 7, "new")]);
        let next = Loaded::of(next, &kept.set, &kept.lost, &kept.returned, wall);
        let changed = stored(8, vec![evicting(1, 3), evicting(2, 8), rule(3, 7, "new")]);
        let changed = Loaded::of(changed, &next.set, &next.lost, &next.returned, wall);

        let id = RuleId(Uuid::from_u128(2));
        assert_eq!((evicts(&back.set), back.lost.len()), (vec![true, false], 0));
        assert_eq!(back.returned, [Returned { id, since: 6 }]);
        assert_eq!(
            (evicts(&next.set), &next.returned),
            (vec![true, false, false], &back.returned)
        );
        assert_eq!(
            (evicts(&changed.set), changed.returned.len()),
            (vec![true, true, false], 0)
        );
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
    async fn released_rule_stays_out_of_force_whatever_reloads_come_meanwhile() {
        let home = tempfile::tempdir().unwrap();
        let database = DatabaseUrl::sqlite(&home.path().join("seawall.db"));
        let store = Store::open(&database).await.unwrap();
        let (rules, clock, events) = (Rules::open(home.path()), Clock::start(), Events::default());

        for round in 1..=50 {
            let made = Written::Rule(rule(round, 1, "lost"));
            rules.current.store(Arc::new(RuleSet::empty()));
            rules.apply(&made, &clock, &events).await;
            rules.reload(&store, &clock, &events).await.unwrap();
            assert_eq!(rules.lost().len(), 1);

            let reloads = async {
                for _ in 0..20 {
                    rules.reload(&store, &clock, &events).await.unwrap();
                }
            };
            let release = async {
                // At another moment of the reloads each time.
                for _ in 0..round {
                    tokio::task::yield_now().await;
                }
                assert!(rules.release(made.id(), &clock, &events).await);
            };
            tokio::join!(reloads, release);
            rules.reload(&store, &clock, &events).await.unwrap();

            assert_eq!((rules.current().rules().len(), rules.lost().len()), (0, 0), "{round}");
        }
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
