//! What look-ups cost, by cohort: one firmware version whose look-ups scan a table must not slow down everybody else's.
//!
//! A statement's keys are of many cohorts, and its time says nothing of one of them. So a cohort under suspicion is *tried*: its
//! keys are sent in statements of their own for a moment, one at a time, beside those of the others. If they take much longer than the
//! others' do meanwhile, the cohort stays apart until they no longer do; if all are slow, it is the database, and the cohort goes back.
//! Start with [`Costs`]. It sends nothing; see [`super::Admission`]. Why: the incident of overload.md section 0.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    slots::{Pace, Tail},
    time::Instant,
};

/// Most cohorts watched. Then the half not seen longest is forgotten.
const COHORTS_MAX: usize = 1_024;
/// A faster statement is never slow.
const SLOW_MIN: Duration = Duration::from_millis(10);
/// A statement is slow if it takes this many times what is usual for its number of keys.
const SLOW_FACTOR: f64 = 4.0;
/// Most cohorts apart at a time. Further ones stay among the others.
const APART_MAX: usize = 64;
/// Slow statements in a row that bring a cohort under suspicion.
const SLOW_RUN: u8 = 3;
/// What is usual is an average of as many statements. The fastest instead would be a lucky one, beside which many are slow.
const USUAL_STATEMENTS: u32 = 32;
/// Fewer statements than this tell nothing of what is usual: one of them may be a lucky one.
const USUAL_MIN: u32 = 4;
/// Time constant with which the usual time rises while statements are slow. Slow statements are not averaged: a morning of them must
/// not become usual at once.
const USUAL_RISES: Duration = Duration::from_secs(600);
/// Longest time between two slow statements that counts as slow time. A calm night says nothing about what is usual.
const SLOW_GAP_MAX: Duration = Duration::from_secs(1);
/// Statements that a trial is decided by, of either side.
const TRIAL_STATEMENTS: u32 = 2;
/// Keys of a cohort on trial in one statement.
const TRIAL_KEYS: usize = 8;
/// A trial without a verdict ends after this: nobody else was there to be protected.
const TRIAL_MAX: Duration = Duration::from_secs(2);
/// The same where nobody else was looked up at all meanwhile.
const TRIAL_ALONE_MAX: Duration = Duration::from_millis(500);
/// A cohort found innocent is not tried again for this long, and twice as long each time after that.
const IMMUNITY_MIN: Duration = Duration::from_secs(10);
/// See [`IMMUNITY_MIN`].
const IMMUNITY_MAX: Duration = Duration::from_secs(320);
/// A cohort is costly if its statements take this many times as long as those of the others with as many keys.
const COSTLY_FACTOR: f64 = 3.0;
/// Statements in a row that show a cohort apart to be cheap, or without anybody else, before it goes back.
const CHEAP_RUN: u8 = 3;
/// A cohort apart that asked for nothing in this time goes back.
const APART_IDLE_MAX: Duration = Duration::from_secs(600);
/// Time that a statement of a cohort apart shall take: well below the longest allowed, so that its devices are answered.
const APART_STATEMENT: Duration = Duration::from_millis(250);
/// While others are looked up too, a statement of a cohort apart is followed by a rest of this many times as long: the database belongs to
/// them for most of the time. A quarter of it still lets the cohort in.
const APART_RESTS: u32 = 3;
/// A cohort apart that had no statement in this time does not count among those that take turns.
const APART_TURN_MAX: Duration = Duration::from_secs(60);
/// Buckets of statements by the number of keys: 1, 2, 3–4, 5–8, … 129–256.
const BUCKETS: usize = 9;

/// A model with a firmware version, as the device names them, in eight bytes. Never shown, never kept on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CohortTag(u64);

impl CohortTag {
    #[must_use]
    pub fn of(model: Option<&str>, firmware: Option<&str>) -> Self {
        use std::hash::{DefaultHasher, Hash as _, Hasher as _};
        let mut hasher = DefaultHasher::new();
        (model, firmware).hash(&mut hasher);
        Self(hasher.finish())
    }
}

/// A cohort whose look-ups are sent apart, because they cost far more than the others'.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costly {
    pub cohort: CohortTag,
    /// Time that the database takes for one of its keys.
    pub per_key: Duration,
}

/// One ended statement.
#[derive(Clone, Copy, Debug)]
pub(super) struct Statement<'a> {
    /// Its cohorts, with their keys.
    pub cohorts: &'a [(CohortTag, u32)],
    pub took: Duration,
}

impl Statement<'_> {
    fn keys(&self) -> u32 {
        self.cohorts.iter().map(|(_, keys)| keys).sum()
    }
}

/// A cohort whose queue changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Move {
    Apart(CohortTag),
    Back(CohortTag),
}

/// What is known of the cohorts whose devices were looked up lately.
#[derive(Debug, Default)]
pub(super) struct Costs {
    cohorts: BTreeMap<CohortTag, Cohort>,
    /// At most [`APART_MAX`].
    apart: BTreeMap<CohortTag, Apart>,
    /// What statements usually take, by bucket.
    usual: [Usual; BUCKETS],
    /// When the latest slow statement ended.
    slow_at: Instant,
    trial: Option<Trial>,
    /// Statements of all who are not apart, lately.
    others: Option<Sample>,
    /// No statement of a cohort apart is sent before.
    rests_until: Instant,
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

    /// Rises by this factor, at most to the time that a slow statement took.
    fn rise(&mut self, factor: f64, took_seconds: f64) {
        if self.seconds < took_seconds {
            self.seconds = (self.seconds * factor).min(took_seconds);
        }
        debug_assert!(self.seconds.is_finite());
    }
}

#[derive(Debug)]
struct Cohort {
    seen: Instant,
    slow_run: u8,
    immune_until: Instant,
    immunity: Duration,
}

#[derive(Debug)]
struct Apart {
    seen: Instant,
    seconds_per_key: f64,
    is_proven: bool,
    cheap_run: u8,
    tail: Tail,
}

#[derive(Debug)]
struct Trial {
    cohort: CohortTag,
    began: Instant,
    own: Option<Sample>,
    others: Option<Sample>,
}

/// Statements, averaged: the later ones count more.
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

    /// How many times longer than `others`, with as many keys.
    fn slower_than(&self, others: &Self) -> f64 {
        let scale = (self.keys / others.keys.max(1.0)).max(1.0);
        self.seconds / (others.seconds * scale).max(1e-6)
    }
}

impl Costs {
    pub fn is_apart(&self, cohort: CohortTag) -> bool {
        self.apart.contains_key(&cohort)
    }

    /// Apart for good: its devices wait, and come back, at the pace of its own look-ups. One on trial keeps to everybody's.
    pub fn is_costly(&self, cohort: CohortTag) -> bool {
        self.apart.get(&cohort).is_some_and(|apart| apart.is_proven)
    }

    /// Cohorts watched, for tests of the bound.
    #[cfg(test)]
    pub fn watched(&self) -> usize {
        self.cohorts.len()
    }

    /// Cohorts found costly.
    pub fn costly(&self) -> impl Iterator<Item = Costly> {
        self.apart
            .iter()
            .filter(|(_, apart)| apart.is_proven)
            .map(|(cohort, apart)| Costly {
                cohort: *cohort,
                per_key: Duration::from_secs_f64(apart.seconds_per_key),
            })
    }

    /// Keys of a cohort apart that one statement may hold.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "positive, and a float too large saturates"
    )]
    pub fn keys_at_a_time(&self, cohort: CohortTag) -> usize {
        match self.apart.get(&cohort) {
            Some(apart) if apart.is_proven => ((APART_STATEMENT.as_secs_f64() / apart.seconds_per_key) as usize).max(1),
            Some(_) | None => TRIAL_KEYS,
        }
    }

    /// The cohort on trial. It goes before those that are convicted, or its trial would end without a verdict.
    pub fn on_trial(&self) -> Option<CohortTag> {
        self.trial.as_ref().map(|trial| trial.cohort)
    }

    /// When a cohort apart may send its next statement.
    pub fn rests_until(&self, cohort: CohortTag) -> Instant {
        if self.on_trial() == Some(cohort) {
            return Instant::ZERO;
        }
        self.rests_until
    }

    /// Keys a second that are answered for a cohort apart, its rests included.
    pub fn rate(&self, cohort: CohortTag, now: Instant) -> f64 {
        let part = self.part(now);
        self.apart
            .get(&cohort)
            .map_or(f64::MAX, |apart| part / apart.seconds_per_key)
    }

    /// The part of the time that each of the cohorts apart has the database for.
    fn part(&self, now: Instant) -> f64 {
        let is_there = |apart: &&Apart| apart.is_proven && apart.seen + APART_TURN_MAX > now;
        let turns = self.apart.values().filter(is_there).count().max(1) as f64;
        match self.others_lately(now) {
            Some(_) => 1.0 / (turns * f64::from(1 + APART_RESTS)),
            None => 1.0 / turns,
        }
    }

    fn others_lately(&self, now: Instant) -> Option<Sample> {
        self.others.filter(|others| others.at + TRIAL_MAX > now)
    }

    /// Where the slots of a cohort's devices are taken from: `shared` places a second, or a queue of its own if it is apart.
    pub fn pace(&mut self, cohort: CohortTag, shared: f64, overbooking: f64, now: Instant) -> Pace<'_> {
        let part = self.part(now);
        match self.apart.get_mut(&cohort).filter(|apart| apart.is_proven) {
            Some(apart) => Pace::Apart {
                tail: &mut apart.tail,
                rate: (overbooking * part / apart.seconds_per_key).min(shared),
            },
            None => Pace::Shared(shared),
        }
    }

    /// A statement of cohorts that are not apart ended.
    pub fn handle_shared(&mut self, statement: &Statement<'_>, now: Instant) -> Option<Move> {
        let is_slow = self.is_slow(statement, now);
        let has_apart = statement.cohorts.iter().any(|(cohort, _)| self.is_apart(*cohort));
        if !has_apart {
            Sample::add(&mut self.others, statement.keys(), statement.took, now);
            if let Some(trial) = &mut self.trial {
                Sample::add(&mut trial.others, statement.keys(), statement.took, now);
            }
        }
        for (cohort, _) in statement.cohorts {
            let entry = self.entry(*cohort, now);
            if is_slow {
                entry.slow_run = entry.slow_run.saturating_add(1);
            } else {
                entry.slow_run = 0;
                entry.immunity = Duration::ZERO;
            }
        }
        self.judge(now)
            .or_else(|| is_slow.then(|| self.suspect(statement, now)).flatten())
    }

    /// A statement of a cohort apart ended.
    pub fn handle_apart(&mut self, cohort: CohortTag, statement: &Statement<'_>, now: Instant) -> Option<Move> {
        let keys = statement.keys();
        let per_key = statement.took.as_secs_f64() / f64::from(keys.max(1));
        let others = self.others_lately(now);
        let apart = self.apart.get_mut(&cohort)?;
        apart.seen = now;
        if let Some(trial) = self.trial.as_mut().filter(|trial| trial.cohort == cohort) {
            apart.seconds_per_key = per_key.max(1e-6);
            Sample::add(&mut trial.own, keys, statement.took, now);
            let is_heard = trial.own.is_some_and(|own| own.statements >= TRIAL_STATEMENTS);
            if is_heard && trial.others.is_none() && trial.began + TRIAL_ALONE_MAX <= now {
                return Some(self.acquit(cohort, now));
            }
            return self.judge(now);
        }
        if others.is_some() {
            self.rests_until = now + statement.took * APART_RESTS;
        }
        apart.seconds_per_key = (apart.seconds_per_key + (per_key - apart.seconds_per_key) / 4.0).max(1e-6);
        let mut own = None;
        Sample::add(&mut own, keys, statement.took, now);
        let is_dear = match (own, others) {
            (Some(own), Some(others)) => own.slower_than(&others) >= COSTLY_FACTOR && statement.took >= SLOW_MIN,
            // Nobody else is there, so it slows nobody down; while it is costly it stays where it is.
            (own, _) => own.is_some_and(|own| own.seconds >= SLOW_MIN.as_secs_f64()),
        };
        apart.cheap_run = if is_dear { 0 } else { apart.cheap_run + 1 };
        (apart.cheap_run >= CHEAP_RUN).then(|| self.release(cohort, now))
    }

    /// Time has passed: trials without a verdict end, and cohorts apart that are no longer there are forgotten.
    pub fn handle_timeout(&mut self, now: Instant) -> Option<Move> {
        let late = self.trial.as_ref().filter(|trial| trial.began + TRIAL_MAX <= now);
        if let Some(cohort) = late.map(|trial| trial.cohort) {
            return Some(self.acquit(cohort, now));
        }
        let idle = self
            .apart
            .iter()
            .find(|(_, apart)| apart.seen + APART_IDLE_MAX <= now)
            .map(|(cohort, _)| *cohort);
        idle.map(|cohort| self.release(cohort, now))
    }

    /// Slower than usual for its number of keys. Learns what is usual.
    fn is_slow(&mut self, statement: &Statement<'_>, now: Instant) -> bool {
        let keys = statement.keys().max(1);
        let seconds = statement.took.as_secs_f64();
        let bucket =
            usize::try_from(keys.next_power_of_two().trailing_zeros()).map_or(0, |bucket| bucket.min(BUCKETS - 1));
        // Smaller ones tell an upper bound, as many times as long as they have fewer keys.
        let usual = (0..=bucket)
            .filter(|smaller| self.usual[*smaller].statements >= USUAL_MIN)
            .map(|smaller| self.usual[smaller].seconds * f64::from(1_u32 << (bucket - smaller)))
            .reduce(f64::min);
        let is_slow = statement.took >= SLOW_MIN && usual.is_some_and(|usual| seconds >= SLOW_FACTOR * usual);
        if is_slow {
            let slow_time = now.saturating_since(self.slow_at).min(SLOW_GAP_MAX);
            self.slow_at = now;
            let factor = (slow_time.as_secs_f64() / USUAL_RISES.as_secs_f64()).exp();
            for (smaller, usual) in self.usual[..=bucket].iter_mut().enumerate() {
                // What so many keys took says of fewer that each took its part, and no more.
                usual.rise(factor, seconds / f64::from(1_u32 << (bucket - smaller)));
            }
        } else {
            self.usual[bucket].learn(seconds);
        }
        is_slow
    }

    /// Puts the cohort on trial that was in slow statements longest; of several the one with the fewest keys.
    fn suspect(&mut self, statement: &Statement<'_>, now: Instant) -> Option<Move> {
        if self.trial.is_some() || self.apart.len() >= APART_MAX {
            return None;
        }
        let (cohort, keys) = *statement
            .cohorts
            .iter()
            .filter(|(cohort, _)| {
                let entry = self.cohorts.get(cohort);
                entry.is_some_and(|entry| entry.slow_run >= SLOW_RUN && entry.immune_until <= now)
                    && !self.is_apart(*cohort)
            })
            .filter(|(cohort, _)| self.has_others(*cohort, now))
            .max_by_key(|(cohort, keys)| {
                let run = self.cohorts.get(cohort).map_or(0, |entry| entry.slow_run);
                (run, std::cmp::Reverse(*keys))
            })?;
        let seconds_per_key = statement.took.as_secs_f64() / f64::from(keys.max(1));
        let apart = Apart {
            seen: now,
            seconds_per_key: seconds_per_key.max(1e-6),
            is_proven: false,
            cheap_run: 0,
            tail: Tail::empty(1.0),
        };
        self.apart.insert(cohort, apart);
        self.trial = Some(Trial {
            cohort,
            began: now,
            own: None,
            others: None,
        });
        Some(Move::Apart(cohort))
    }

    /// Another cohort was looked up a moment ago: there is somebody to protect, and to compare with.
    fn has_others(&self, cohort: CohortTag, now: Instant) -> bool {
        self.cohorts
            .iter()
            .any(|(other, entry)| *other != cohort && entry.seen + TRIAL_MAX > now && !self.is_apart(*other))
    }

    /// Ends the trial, if both sides have been heard.
    fn judge(&mut self, now: Instant) -> Option<Move> {
        let trial = self.trial.as_ref()?;
        let (own, others) = (trial.own?, trial.others?);
        if own.statements < TRIAL_STATEMENTS || others.statements < TRIAL_STATEMENTS {
            return None;
        }
        let cohort = trial.cohort;
        if own.slower_than(&others) < COSTLY_FACTOR || own.seconds < SLOW_MIN.as_secs_f64() {
            return Some(self.acquit(cohort, now));
        }
        self.trial = None;
        if let Some(apart) = self.apart.get_mut(&cohort) {
            apart.is_proven = true;
        }
        None
    }

    fn acquit(&mut self, cohort: CohortTag, now: Instant) -> Move {
        self.trial = None;
        let entry = self.entry(cohort, now);
        entry.immunity = (entry.immunity * 2).clamp(IMMUNITY_MIN, IMMUNITY_MAX);
        entry.immune_until = now + entry.immunity;
        self.release(cohort, now)
    }

    fn release(&mut self, cohort: CohortTag, now: Instant) -> Move {
        self.apart.remove(&cohort);
        self.entry(cohort, now).slow_run = 0;
        Move::Back(cohort)
    }

    fn entry(&mut self, cohort: CohortTag, now: Instant) -> &mut Cohort {
        if self.cohorts.len() >= COHORTS_MAX && !self.cohorts.contains_key(&cohort) {
            // Half at once: devices may invent cohorts, and each must cost little.
            let mut seen: Vec<Instant> = self.cohorts.values().map(|entry| entry.seen).collect();
            let (_, median, _) = seen.select_nth_unstable(COHORTS_MAX / 2);
            let median = *median;
            self.cohorts.retain(|_, entry| entry.seen > median);
        }
        let entry = self.cohorts.entry(cohort).or_insert(Cohort {
            seen: now,
            slow_run: 0,
            immune_until: Instant::ZERO,
            immunity: Duration::ZERO,
        });
        entry.seen = now;
        entry
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_slow(costs: &mut Costs, keys: u32, ms: u64, now: Instant) -> bool {
        let cohorts = [(CohortTag::of(None, None), keys)];
        let took = Duration::from_millis(ms);
        costs.is_slow(
            &Statement {
                cohorts: &cohorts,
                took,
            },
            now,
        )
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
