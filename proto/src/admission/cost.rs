//! Cost of lookups by cohort: one firmware version whose lookups scan a table must not slow down all others.
//!
//! The keys of a statement are of many cohorts, so its time says nothing about one of them. A suspected cohort is put
//! on *probation*: its keys are sent in statements of their own, beside those of the others. If they take much longer
//! at the same time, the cohort stays isolated until they no longer do. If all are slow, the cause is the database, and
//! the cohort is released. docs/design/admission.md has the steps and the figures.
//!
//! Start with [`Costs`]. It sends nothing; see [`super::Admission`].

use std::{collections::BTreeMap, time::Duration};

pub use crate::cohort::CohortTag;
use crate::{
    bounded::Bounded,
    slots::{Pace, QueueEnd},
    time::Instant,
};

/// Maximum number of cohorts watched. Then the one not seen longest is forgotten.
const COHORTS_MAX: usize = 1_024;
/// Minimum time of a slow statement.
const SLOW_MIN: Duration = Duration::from_millis(10);
/// Minimum ratio of a slow statement's time to the usual time for its number of keys.
const SLOW_FACTOR: f64 = 4.0;
/// Maximum number of isolated cohorts. Further ones stay among the others.
const ISOLATED_MAX: usize = 64;
/// Number of slow statements in a row after which a cohort is suspected.
const SLOW_RUN: u8 = 3;
/// Number of statements that the usual time is averaged over. The fastest statement alone would be an outlier, and many
/// would be slow compared with it.
const USUAL_STATEMENTS: u32 = 32;
/// Minimum number of statements for a usual time: fewer may be outliers.
const USUAL_MIN: u32 = 4;
/// Time constant with which the usual time rises while statements are slow. Slow statements are not averaged, so
/// that a slow morning does not become usual at once.
const USUAL_RISES: Duration = Duration::from_secs(600);
/// Maximum time between two slow statements that counts as slow time. A calm night says nothing about what is usual.
const SLOW_GAP_MAX: Duration = Duration::from_secs(1);
/// Number of statements of either side that decide a probation.
const PROBATION_STATEMENTS: u32 = 2;
/// Maximum number of keys of a cohort on probation in one statement.
const PROBATION_KEYS: usize = 8;
/// Maximum time of a probation. If it ends without a verdict, there are no others to protect.
const PROBATION_MAX: Duration = Duration::from_secs(2);
/// Maximum time of a probation during which no other cohort is looked up.
const PROBATION_ALONE_MAX: Duration = Duration::from_millis(500);
/// Time for which a cleared cohort is not suspected again. It doubles with each further probation.
const COOL_DOWN_MIN: Duration = Duration::from_secs(10);
/// Maximum of the doubled [`COOL_DOWN_MIN`].
const COOL_DOWN_MAX: Duration = Duration::from_secs(320);
/// Minimum ratio of a costly cohort's time to that of the others, for as many keys.
const COSTLY_FACTOR: f64 = 3.0;
/// Number of cheap statements in a row after which an isolated cohort is released.
const CHEAP_RUN: u8 = 3;
/// Time without a lookup after which an isolated cohort is released.
const ISOLATED_UNUSED_MAX: Duration = Duration::from_secs(600);
/// Intended time of an isolated cohort's statement: well below the longest allowed, so that its devices are answered.
const ISOLATED_STATEMENT: Duration = Duration::from_millis(250);
/// Ratio of the idle span after an isolated cohort's statement to the statement itself, while others are looked up
/// as well. So the cohort has the database for a quarter of the time.
const ISOLATED_IDLE_FACTOR: u32 = 3;
/// Time without a statement after which an isolated cohort has no share of that quarter.
const ISOLATED_SHARE_MAX: Duration = Duration::from_secs(60);
/// Number of buckets of statements, by the number of keys: 1, 2, 3–4, 5–8, … 129–256.
const BUCKETS: usize = 9;

/// A cohort that is isolated because its lookups cost far more than those of others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costly {
    pub cohort: CohortTag,
    /// Time that the database takes for one of its keys.
    pub per_key: Duration,
}

/// Number of keys of a statement, by cohort.
type Cohorts = [(CohortTag, u32)];

fn keys_of(cohorts: &Cohorts) -> u32 {
    cohorts.iter().map(|(_, keys)| keys).sum()
}

/// A cohort that changes its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transition {
    Isolated(CohortTag),
    Released(CohortTag),
}

/// Costs of the cohorts whose devices were looked up lately.
#[derive(Debug)]
pub(super) struct Costs {
    cohorts: Bounded<CohortTag, Cohort>,
    /// At most [`ISOLATED_MAX`].
    isolated: BTreeMap<CohortTag, Isolated>,
    /// Usual times of statements, by bucket.
    usual: [Usual; BUCKETS],
    /// When the latest slow statement ended.
    slow_at: Instant,
    probation: Option<Probation>,
    /// Recent statements without an isolated cohort.
    others: Option<Sample>,
    /// Before this time no statement of an isolated cohort is sent, except on probation.
    idle_until: Instant,
}

impl Default for Costs {
    fn default() -> Self {
        Self {
            cohorts: Bounded::new(COHORTS_MAX),
            isolated: BTreeMap::new(),
            usual: Default::default(),
            slow_at: Instant::ZERO,
            probation: None,
            others: None,
            idle_until: Instant::ZERO,
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Usual {
    seconds: f64,
    /// At most [`USUAL_STATEMENTS`].
    statements: u32,
}

impl Usual {
    fn learn(&mut self, seconds: f64) {
        self.statements = (self.statements + 1).min(USUAL_STATEMENTS);
        self.seconds += (seconds - self.seconds) / f64::from(self.statements);
        debug_assert!(self.seconds.is_finite());
    }

    /// Raises the time by `factor`, at most to the time of a slow statement.
    fn rise(&mut self, factor: f64, took_seconds: f64) {
        if self.seconds < took_seconds {
            self.seconds = (self.seconds * factor).min(took_seconds);
        }
        debug_assert!(self.seconds.is_finite());
    }
}

#[derive(Debug, Default)]
struct Cohort {
    seen: Instant,
    slow_run: u8,
    cool_until: Instant,
    cool_down: Duration,
}

#[derive(Debug)]
struct Isolated {
    seen: Instant,
    seconds_per_key: f64,
    is_proven: bool,
    cheap_run: u8,
    queue_end: QueueEnd,
}

#[derive(Debug)]
struct Probation {
    cohort: CohortTag,
    began: Instant,
    own: Option<Sample>,
    others: Option<Sample>,
}

/// Moving average of statements. Later ones have more weight.
#[derive(Clone, Copy, Debug)]
struct Sample {
    seconds: f64,
    keys: f64,
    statements: u32,
    at: Instant,
}

impl Sample {
    fn add(sample: &mut Option<Self>, keys: u32, took: Duration, now: Instant) {
        let (seconds, keys) = (took.as_secs_f64(), f64::from(keys));
        let so_far = sample.get_or_insert(Self {
            seconds,
            keys,
            statements: 0,
            at: now,
        });
        so_far.seconds += (seconds - so_far.seconds) / 4.0;
        so_far.keys += (keys - so_far.keys) / 4.0;
        so_far.statements = so_far.statements.saturating_add(1);
        so_far.at = now;
    }

    /// Ratio to the time of `others`, for as many keys.
    fn slower_than(&self, others: &Self) -> f64 {
        let scale = (self.keys / others.keys.max(1.0)).max(1.0);
        self.seconds / (others.seconds * scale).max(1e-6)
    }
}

impl Costs {
    pub fn is_isolated(&self, cohort: CohortTag) -> bool {
        self.isolated.contains_key(&cohort)
    }

    /// Whether the cohort is isolated and not on probation: its devices wait and return at the pace of its own
    /// lookups.
    pub fn is_costly(&self, cohort: CohortTag) -> bool {
        self.isolated.get(&cohort).is_some_and(|isolated| isolated.is_proven)
    }

    /// Number of watched cohorts.
    #[cfg(test)]
    pub fn watched(&self) -> usize {
        self.cohorts.len()
    }

    /// Cohorts that are isolated and not on probation.
    pub fn costly(&self) -> impl Iterator<Item = Costly> {
        self.isolated
            .iter()
            .filter(|(_, isolated)| isolated.is_proven)
            .map(|(cohort, isolated)| Costly {
                cohort: *cohort,
                per_key: Duration::from_secs_f64(isolated.seconds_per_key),
            })
    }

    /// Maximum number of keys of an isolated cohort in one statement.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "positive, and a float too large saturates"
    )]
    pub fn keys_at_a_time(&self, cohort: CohortTag) -> usize {
        match self.isolated.get(&cohort) {
            Some(isolated) if isolated.is_proven => {
                ((ISOLATED_STATEMENT.as_secs_f64() / isolated.seconds_per_key) as usize).max(1)
            }
            Some(_) | None => PROBATION_KEYS,
        }
    }

    /// The cohort on probation. It is served before other isolated ones, or its probation would end without a
    /// verdict.
    pub fn on_probation(&self) -> Option<CohortTag> {
        self.probation.as_ref().map(|probation| probation.cohort)
    }

    /// Time from which an isolated cohort may send its next statement.
    pub fn idle_until(&self, cohort: CohortTag) -> Instant {
        if self.on_probation() == Some(cohort) {
            return Instant::ZERO;
        }
        self.idle_until
    }

    /// Keys per second that are answered for an isolated cohort, idle spans included.
    pub fn rate(&self, cohort: CohortTag, now: Instant) -> f64 {
        let share = self.share(now);
        self.isolated
            .get(&cohort)
            .map_or(f64::MAX, |isolated| share / isolated.seconds_per_key)
    }

    /// Share of the time for which each isolated cohort has the database.
    fn share(&self, now: Instant) -> f64 {
        let is_there = |isolated: &&Isolated| isolated.is_proven && isolated.seen + ISOLATED_SHARE_MAX > now;
        let sharing = self.isolated.values().filter(is_there).count().max(1) as f64;
        match self.others_lately(now) {
            Some(_) => 1.0 / (sharing * f64::from(1 + ISOLATED_IDLE_FACTOR)),
            None => 1.0 / sharing,
        }
    }

    fn others_lately(&self, now: Instant) -> Option<Sample> {
        self.others.filter(|others| others.at + PROBATION_MAX > now)
    }

    /// Pace of the slots of a cohort's devices: `shared` slots per second, or a virtual queue of its own if it is
    /// costly.
    pub fn pace(&mut self, cohort: CohortTag, shared: f64, overbooking: f64, now: Instant) -> Pace<'_> {
        let share = self.share(now);
        match self.isolated.get_mut(&cohort).filter(|isolated| isolated.is_proven) {
            Some(isolated) => Pace::Isolated {
                queue_end: &mut isolated.queue_end,
                rate: (overbooking * share / isolated.seconds_per_key).min(shared),
            },
            None => Pace::Shared(shared),
        }
    }

    /// A shared statement ended.
    pub fn handle_shared(&mut self, cohorts: &Cohorts, took: Duration, now: Instant) -> Option<Transition> {
        let keys = keys_of(cohorts);
        let is_slow = self.is_slow(keys, took, now);
        let has_isolated = cohorts.iter().any(|(cohort, _)| self.is_isolated(*cohort));
        if !has_isolated {
            Sample::add(&mut self.others, keys, took, now);
            if let Some(probation) = &mut self.probation {
                Sample::add(&mut probation.others, keys, took, now);
            }
        }
        for (cohort, _) in cohorts {
            let entry = self.entry(*cohort, now);
            if is_slow {
                entry.slow_run = entry.slow_run.saturating_add(1);
            } else {
                entry.slow_run = 0;
                entry.cool_down = Duration::ZERO;
            }
        }
        self.decide(now)
            .or_else(|| is_slow.then(|| self.suspect(cohorts, took, now)).flatten())
    }

    /// A statement of an isolated cohort ended.
    pub fn handle_isolated(
        &mut self,
        cohort: CohortTag,
        cohorts: &Cohorts,
        took: Duration,
        now: Instant,
    ) -> Option<Transition> {
        let keys = keys_of(cohorts);
        let per_key = took.as_secs_f64() / f64::from(keys.max(1));
        let others = self.others_lately(now);
        let isolated = self.isolated.get_mut(&cohort)?;
        isolated.seen = now;
        if let Some(probation) = self.probation.as_mut().filter(|probation| probation.cohort == cohort) {
            isolated.seconds_per_key = per_key.max(1e-6);
            Sample::add(&mut probation.own, keys, took, now);
            let has_enough = probation.own.is_some_and(|own| own.statements >= PROBATION_STATEMENTS);
            if has_enough && probation.others.is_none() && probation.began + PROBATION_ALONE_MAX <= now {
                return Some(self.clear(cohort, now));
            }
            return self.decide(now);
        }
        if others.is_some() {
            self.idle_until = now + took * ISOLATED_IDLE_FACTOR;
        }
        isolated.seconds_per_key = (isolated.seconds_per_key + (per_key - isolated.seconds_per_key) / 4.0).max(1e-6);
        let mut own = None;
        Sample::add(&mut own, keys, took, now);
        let is_costly = match (own, others) {
            (Some(own), Some(others)) => own.slower_than(&others) >= COSTLY_FACTOR && took >= SLOW_MIN,
            // Without others it slows down no other. It stays isolated while it is costly.
            (own, _) => own.is_some_and(|own| own.seconds >= SLOW_MIN.as_secs_f64()),
        };
        isolated.cheap_run = if is_costly { 0 } else { isolated.cheap_run + 1 };
        (isolated.cheap_run >= CHEAP_RUN).then(|| self.release(cohort, now))
    }

    /// Ends a probation without a verdict, and releases an isolated cohort that is no longer looked up.
    pub fn handle_timeout(&mut self, now: Instant) -> Option<Transition> {
        let late = self
            .probation
            .as_ref()
            .filter(|probation| probation.began + PROBATION_MAX <= now);
        if let Some(cohort) = late.map(|probation| probation.cohort) {
            return Some(self.clear(cohort, now));
        }
        let idle = self
            .isolated
            .iter()
            .find(|(_, isolated)| isolated.seen + ISOLATED_UNUSED_MAX <= now)
            .map(|(cohort, _)| *cohort);
        idle.map(|cohort| self.release(cohort, now))
    }

    /// Whether a statement took longer than usual for its number of keys. Updates the usual times.
    fn is_slow(&mut self, keys: u32, took: Duration, now: Instant) -> bool {
        let keys = keys.max(1);
        let seconds = took.as_secs_f64();
        let bucket =
            usize::try_from(keys.next_power_of_two().trailing_zeros()).map_or(0, |bucket| bucket.min(BUCKETS - 1));
        // A statement of fewer keys gives an upper bound: its time, scaled to this number of keys.
        let usual = (0..=bucket)
            .filter(|smaller| self.usual[*smaller].statements >= USUAL_MIN)
            .map(|smaller| self.usual[smaller].seconds * f64::from(1_u32 << (bucket - smaller)))
            .reduce(f64::min);
        let is_slow = took >= SLOW_MIN && usual.is_some_and(|usual| seconds >= SLOW_FACTOR * usual);
        if is_slow {
            let slow_time = now.saturating_since(self.slow_at).min(SLOW_GAP_MAX);
            self.slow_at = now;
            let factor = (slow_time.as_secs_f64() / USUAL_RISES.as_secs_f64()).exp();
            for (smaller, usual) in self.usual[..=bucket].iter_mut().enumerate() {
                // Fewer keys take at most their part of this time.
                usual.rise(factor, seconds / f64::from(1_u32 << (bucket - smaller)));
            }
        } else {
            self.usual[bucket].learn(seconds);
        }
        is_slow
    }

    /// Puts the cohort with the longest run of slow statements on probation; of several, the one with the fewest
    /// keys.
    fn suspect(&mut self, cohorts: &Cohorts, took: Duration, now: Instant) -> Option<Transition> {
        if self.probation.is_some() || self.isolated.len() >= ISOLATED_MAX {
            return None;
        }
        let (cohort, keys) = *cohorts
            .iter()
            .filter(|(cohort, _)| {
                let entry = self.cohorts.get(cohort);
                entry.is_some_and(|entry| entry.slow_run >= SLOW_RUN && entry.cool_until <= now)
                    && !self.is_isolated(*cohort)
            })
            .filter(|(cohort, _)| self.has_others(*cohort, now))
            .max_by_key(|(cohort, keys)| {
                let run = self.cohorts.get(cohort).map_or(0, |entry| entry.slow_run);
                (run, std::cmp::Reverse(*keys))
            })?;
        let seconds_per_key = took.as_secs_f64() / f64::from(keys.max(1));
        let isolated = Isolated {
            seen: now,
            seconds_per_key: seconds_per_key.max(1e-6),
            is_proven: false,
            cheap_run: 0,
            queue_end: QueueEnd::empty(1.0),
        };
        self.isolated.insert(cohort, isolated);
        self.probation = Some(Probation {
            cohort,
            began: now,
            own: None,
            others: None,
        });
        Some(Transition::Isolated(cohort))
    }

    /// Whether another cohort was looked up a moment ago, so that there are devices to protect, and a time to compare
    /// with.
    fn has_others(&self, cohort: CohortTag, now: Instant) -> bool {
        self.cohorts
            .iter()
            .any(|(other, entry)| *other != cohort && entry.seen + PROBATION_MAX > now && !self.is_isolated(*other))
    }

    /// Ends the probation if there are enough statements of both sides.
    fn decide(&mut self, now: Instant) -> Option<Transition> {
        let probation = self.probation.as_ref()?;
        let (own, others) = (probation.own?, probation.others?);
        if own.statements < PROBATION_STATEMENTS || others.statements < PROBATION_STATEMENTS {
            return None;
        }
        let cohort = probation.cohort;
        if own.slower_than(&others) < COSTLY_FACTOR || own.seconds < SLOW_MIN.as_secs_f64() {
            return Some(self.clear(cohort, now));
        }
        self.probation = None;
        if let Some(isolated) = self.isolated.get_mut(&cohort) {
            isolated.is_proven = true;
        }
        None
    }

    fn clear(&mut self, cohort: CohortTag, now: Instant) -> Transition {
        self.probation = None;
        let entry = self.entry(cohort, now);
        entry.cool_down = (entry.cool_down * 2).clamp(COOL_DOWN_MIN, COOL_DOWN_MAX);
        entry.cool_until = now + entry.cool_down;
        self.release(cohort, now)
    }

    fn release(&mut self, cohort: CohortTag, now: Instant) -> Transition {
        self.isolated.remove(&cohort);
        self.entry(cohort, now).slow_run = 0;
        Transition::Released(cohort)
    }

    fn entry(&mut self, cohort: CohortTag, now: Instant) -> &mut Cohort {
        self.cohorts.renew(&cohort);
        let entry = self.cohorts.entry(cohort, Cohort::default);
        entry.seen = now;
        entry
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_slow(costs: &mut Costs, keys: u32, ms: u64, now: Instant) -> bool {
        costs.is_slow(keys, Duration::from_millis(ms), now)
    }

    #[test]
    fn slow_large_statements_do_not_make_a_slow_small_one_usual() {
        let mut costs = Costs::default();
        for _ in 0..USUAL_STATEMENTS {
            assert!(!is_slow(&mut costs, 1, 2, Instant::ZERO));
            assert!(!is_slow(&mut costs, 256, 20, Instant::ZERO));
        }

        for half_second in 0..3_600 {
            let now = Instant::ZERO + Duration::from_millis(500 * half_second);
            is_slow(&mut costs, 256, 400, now);
        }

        let now = Instant::ZERO + Duration::from_secs(1_800);
        assert!(!is_slow(&mut costs, 256, 400, now), "after half an hour it is usual");
        assert!(is_slow(&mut costs, 1, 40, now), "20 times what one key takes");
    }
}
