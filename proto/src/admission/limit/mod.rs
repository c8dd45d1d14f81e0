//! How many keys may be in flight, what was measured, and the reference capacity that slots are given out by.
//!
//! Three figures that must not be mixed up: the *limit* bounds keys in flight now ([`Limit`]); the *rate measured* is what the
//! database answers while devices wait ([`Meter`]); the *reference* remembers the best of that, and is all that slots and queue
//! bounds go by ([`Reference`]): slots issued at the rate of a slow moment would put the fleet to sleep (overload.md, finding 3).
//!
//! The limit finds the database's knee by itself. It is dithered, a little lower and a little higher in turn, and moves by the
//! *elasticity* of the throughput: how much more is answered, for a little more in flight. Latency alone can't tell a slow database
//! from a queueing one; elasticity can.

mod arm;
mod meter;
mod reference;

use std::time::Duration;

use rand::{Rng, SeedableRng as _, rngs::SmallRng};

use self::arm::{Arm, Mark, Pair};
pub(super) use self::{
    meter::Meter,
    reference::{OVERBOOKING, Reference},
};
use super::{BATCHES_IN_FLIGHT_MAX, BatchId, to_u32, to_usize};
use crate::time::Instant;

/// The limit while the plan guard sees a sequential scan.
const LIMIT_CUT: u32 = 2;
/// The limit never falls below this, unless its ceiling is lower.
const LIMIT_MIN: f64 = 4.0;
/// Where it starts: two statements of 64 keys, harmless to any database, and large enough that a storm costs few of them.
const LIMIT_START: f64 = 128.0;
/// After an outage it starts from this part of what it was.
const AFTER_OUTAGE: f64 = 0.25;
/// Shortest time at one of the two limits of a pair.
const ARM_MIN: Duration = Duration::from_millis(250);
/// Longest: with too few statements in it the pair says nothing.
const ARM_MAX: Duration = Duration::from_secs(2);
/// At its ceiling the limit stays that many times longer at the higher of the two.
const AT_CEILING: u32 = 4;
/// Statements and keys that an arm wants before it ends.
const ARM_STATEMENTS: u32 = 10;
/// While the limit searches: where it is far too high, each takes long.
const ARM_STATEMENTS_SEARCHING: u32 = 6;
const ARM_KEYS: u64 = 50;
/// Statements without which an arm says nothing.
const ARM_STATEMENTS_MIN: u32 = 3;
/// How far the limits of a pair are from the middle, as a part of it: as far as it takes to see the elasticity through the noise.
const DITHER_MIN: f64 = 0.05;
const DITHER_MAX: f64 = 0.14;
/// The standard error of a measured elasticity that is wanted.
/// Of the average over pairs it is half as much.
const ERROR_WANTED: f64 = 0.25;
/// Weight of a new measurement of the elasticity; the others while the limit searches, and at its first.
const GAIN: f64 = 0.4;
const GAIN_SEARCHING: f64 = 0.6;
const GAIN_FIRST: f64 = 1.0;
/// A single measurement beyond this, either way, tells that the database changed between the two arms of a pair. It is not believed; if the
/// next is like it, that counts as this.
const ELASTICITY_MAX: f64 = 2.0;
/// Statements slower than this in one of ten, or failed keys in more than one of twenty, shrink the limit whatever the throughput does.
const LATENCY_MAX: Duration = Duration::from_millis(500);
const LATE_PART: f64 = 0.1;
const FAILED_PART: f64 = 0.05;
/// By how much.
const HARD_CUT: f64 = 0.7;
/// Above this the limit is far below the knee; where it can't grow, its ceiling is too low.
const ELASTIC: f64 = 0.6;
/// And it still is, once it was, above this: one measurement of few statements says little.
const ELASTIC_STILL: f64 = 0.35;
/// Below this the limit is far above the knee.
const STEEP: f64 = -0.25;
/// While it searches, the limit doubles for as long as throughput follows, or halves for as long as it rises then.
const SEARCH_FACTOR: f64 = 2.0;
/// It never halves below this: few keys say little, and the way is short.
const HALVED_FROM: f64 = 48.0;
/// Devices must have waited for lack of a higher ceiling for this long before anybody is told.
const CEILING_ALARM_AFTER: Duration = Duration::from_secs(10);

/// Why the limit is what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LimitReason {
    /// Nothing was measured yet.
    Start,
    /// It grew: more in flight gave more answers.
    Grew,
    /// It was held: it is about right.
    Held,
    /// It was held: the fleet asks for less than the database could answer.
    AppLimited,
    /// It was held: more in flight would give more answers, but this is the most allowed.
    Ceiling,
    /// It shrank: more in flight gave hardly more answers, or fewer.
    Elasticity,
    /// It shrank: statements took too long.
    Latency,
    /// It shrank: too many statements failed.
    Errors,
    /// It starts low after an outage.
    Outage,
    /// It was cut, because a look-up reads a whole table.
    PlanCut,
}

impl LimitReason {
    pub const ALL: [Self; 10] = [
        Self::Start,
        Self::Grew,
        Self::Held,
        Self::AppLimited,
        Self::Ceiling,
        Self::Elasticity,
        Self::Latency,
        Self::Errors,
        Self::Outage,
        Self::PlanCut,
    ];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Grew => "grew",
            Self::Held => "held",
            Self::AppLimited => "app_limited",
            Self::Ceiling => "ceiling",
            Self::Elasticity => "elasticity",
            Self::Latency => "latency",
            Self::Errors => "errors",
            Self::Outage => "outage",
            Self::PlanCut => "plan_cut",
        }
    }
}

/// At first, and after an outage, the limit moves by great steps for as long as it goes one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Search {
    Begun,
    Up,
    Down,
    Over,
}

impl Search {
    /// Whether the limit may still be searched for by this factor.
    fn goes_on(self, factor: f64) -> bool {
        match self {
            Self::Begun => true,
            Self::Up => factor > 1.0,
            Self::Down => factor < 1.0,
            Self::Over => false,
        }
    }

    fn after(self, factor: f64) -> Self {
        if !self.goes_on(factor) {
            Self::Over
        } else if factor > 1.0 {
            Self::Up
        } else if factor < 1.0 {
            Self::Down
        } else {
            Self::Over
        }
    }
}

/// A statement under way.
#[derive(Clone, Copy, Debug)]
struct UnderWay {
    batch: BatchId,
    sent: Instant,
    keys: u32,
    /// The arm that it tells something of: it was sent at that arm's limit, with as many in flight as it allows.
    mark: Option<Mark>,
}

/// Most keys in flight, found by elasticity.
#[derive(Debug)]
pub(super) struct Limit {
    ceiling: f64,
    /// The middle of the two limits that are tried in turn.
    level: f64,
    dither: f64,
    elasticity: f64,
    search: Search,
    is_cut: bool,
    is_outage: bool,
    reason: LimitReason,
    at_ceiling_since: Option<Instant>,
    pair: Pair,
    /// At most [`BATCHES_IN_FLIGHT_MAX`].
    under_way: Vec<UnderWay>,
    /// Draws which limit of a pair goes first, so that a periodic load can't be mistaken for the limit's own effect.
    rng: SmallRng,
    is_seeded: bool,
    /// The last pair was not believed.
    is_in_doubt: bool,
}

impl Limit {
    /// `ceiling` keys at most, `batch_keys_max` in one statement.
    pub fn new(ceiling: u32, batch_keys_max: u32, now: Instant) -> Self {
        let reachable = to_u32(BATCHES_IN_FLIGHT_MAX).saturating_mul(batch_keys_max);
        let ceiling = f64::from(ceiling.min(reachable).max(1));
        let mut limit = Self {
            ceiling,
            level: LIMIT_START.min(ceiling),
            dither: DITHER_MAX,
            elasticity: 0.5,
            search: Search::Begun,
            is_cut: false,
            is_outage: false,
            reason: LimitReason::Start,
            at_ceiling_since: None,
            pair: Pair::default(),
            under_way: Vec::new(),
            rng: SmallRng::seed_from_u64(now.as_micros()),
            is_seeded: false,
            is_in_doubt: false,
        };
        limit.begin_pair(now);
        limit
    }

    /// Takes chance of its own from the caller's, at the first call: nodes before one database that tried their limits in step would each
    /// measure what all of them do, and drift apart.
    pub fn seed(&mut self, rng: &mut impl Rng) {
        if !std::mem::replace(&mut self.is_seeded, true) {
            self.rng = SmallRng::from_rng(rng);
        }
    }

    /// Keys that may be in flight.
    pub fn keys(&self) -> u32 {
        let keys = self.pair.limit();
        if self.is_cut { keys.min(LIMIT_CUT) } else { keys }
    }

    /// Most keys that it may ever come to.
    pub fn ceiling(&self) -> u32 {
        whole(self.ceiling)
    }

    /// Most keys that may be in flight now for whatever reason.
    pub fn bound(&self) -> u32 {
        if self.is_cut { self.keys() } else { self.ceiling() }
    }

    pub const fn reason(&self) -> LimitReason {
        self.reason
    }

    /// How much of one percent more in flight came out as answers, lately: 1 below the knee, 0 at it.
    pub const fn elasticity(&self) -> f64 {
        self.elasticity
    }

    /// The ceiling is too low: for a while devices waited, and more in flight would have given more answers.
    pub fn is_ceiling_too_low(&self, now: Instant) -> bool {
        self.at_ceiling_since
            .is_some_and(|since| now.saturating_since(since) >= CEILING_ALARM_AFTER)
    }

    /// The plan guard found, or no longer finds, a look-up that reads a whole table.
    pub fn set_cut(&mut self, is_cut: bool, now: Instant) {
        if self.is_cut != is_cut {
            self.is_cut = is_cut;
            let reason = if is_cut {
                LimitReason::PlanCut
            } else {
                LimitReason::Held
            };
            self.set_reason(reason, now);
            self.begin_pair(now);
        }
    }

    /// The breaker opened: what comes after the outage starts low.
    pub fn handle_outage(&mut self, now: Instant) {
        if !self.is_outage {
            self.is_outage = true;
            self.level = self.bounded(self.level * AFTER_OUTAGE);
            self.restart_search(LimitReason::Outage, now);
        }
    }

    /// The breaker closed.
    pub fn handle_recovered(&mut self, now: Instant) {
        if self.is_outage {
            self.is_outage = false;
            self.begin_pair(now);
        }
    }

    /// A statement of `keys` was sent; `in_flight` counts them.
    pub fn handle_sent(&mut self, batch: BatchId, keys: usize, in_flight: usize, now: Instant) {
        if self.under_way.len() >= BATCHES_IN_FLIGHT_MAX {
            return;
        }
        let limit = to_usize(self.pair.limit());
        let is_full = in_flight == limit && keys >= limit / BATCHES_IN_FLIGHT_MAX && !self.is_cut;
        self.under_way.push(UnderWay {
            batch,
            sent: now,
            keys: to_u32(keys),
            mark: self.pair.handle_sent(is_full),
        });
    }

    /// A statement ended: how long it took, if it is one that was sent.
    pub fn handle_ended(&mut self, batch: BatchId, is_answered: bool, now: Instant) -> Option<Duration> {
        let index = self.under_way.iter().position(|sent| sent.batch == batch)?;
        let sent = self.under_way.swap_remove(index);
        let took = now.saturating_since(sent.sent);
        if !self.is_cut && !self.is_outage {
            if let Some(mark) = sent.mark {
                self.pair.measure(mark, sent.keys, is_answered, took);
            }
            self.step(now);
        }
        Some(took)
    }

    /// Ends the arm, and the pair, if it is time.
    fn step(&mut self, now: Instant) {
        let times = if self.level >= self.ceiling && self.pair.is_high() {
            AT_CEILING
        } else {
            1
        };
        let age = now.saturating_since(self.pair.arm_began());
        let measured = self.pair.measured();
        let wanted = if self.search == Search::Over {
            ARM_STATEMENTS
        } else {
            ARM_STATEMENTS_SEARCHING
        };
        let has_enough = measured.statements >= wanted * times && measured.keys >= ARM_KEYS;
        if age < ARM_MIN * times || (age < ARM_MAX && !has_enough) {
            return;
        }
        if measured.statements < ARM_STATEMENTS_MIN || !measured.is_backlogged() {
            // Not enough were waiting: the limit is not what holds the throughput back. A statement that fills it by chance runs beside
            // smaller ones. Its time is then too short, most of all at the higher limit, and the elasticity too high.
            self.set_reason(LimitReason::AppLimited, now);
            self.begin_pair(now);
        } else if !self.pair.next_arm(now) {
            let reason = self.conclude();
            self.set_reason(reason, now);
            self.begin_pair(now);
        }
    }

    fn set_reason(&mut self, reason: LimitReason, now: Instant) {
        self.reason = reason;
        let since = self.at_ceiling_since.unwrap_or(now);
        self.at_ceiling_since = (reason == LimitReason::Ceiling).then_some(since);
    }

    /// Moves the limit by what the pair has shown, and says why.
    fn conclude(&mut self) -> LimitReason {
        let measured = self.pair.elasticity().unwrap_or(0.0);
        self.is_in_doubt = measured.abs() > ELASTICITY_MAX && !self.is_in_doubt;
        let measured = if self.is_in_doubt {
            self.elasticity
        } else {
            measured.clamp(-ELASTICITY_MAX, ELASTICITY_MAX)
        };
        let gain = match self.search {
            Search::Begun => GAIN_FIRST,
            Search::Up | Search::Down => GAIN_SEARCHING,
            Search::Over => GAIN,
        };
        self.elasticity += gain * (measured - self.elasticity);
        let (mut factor, mut reason) = self.factor();
        self.search = self.search.after(factor);
        if self.pair.failed_part() > FAILED_PART {
            (factor, reason) = (factor.min(HARD_CUT), LimitReason::Errors);
        } else if self.pair.late_part() > LATE_PART {
            (factor, reason) = (factor.min(HARD_CUT), LimitReason::Latency);
        }
        let level = self.bounded(self.level * factor);
        self.dither = (self.dither * self.pair.error() / ERROR_WANTED).clamp(DITHER_MIN, DITHER_MAX);
        if factor > 1.0 && level <= self.level {
            let was_ceiling = self.reason == LimitReason::Ceiling;
            let least = if was_ceiling { ELASTIC_STILL } else { ELASTIC };
            reason = if self.elasticity > least {
                LimitReason::Ceiling
            } else {
                LimitReason::Held
            };
        }
        self.level = level;
        reason
    }

    /// As overload.md section 1, but growing down to an elasticity of a tenth: where throughput flattens slowly, as with statements that
    /// cost so much each and so much a key, nine tenths of it are reached only there; and shrinking less for little: near a sharp knee the
    /// steps themselves would cost more than being a little beside it.
    fn factor(&self) -> (f64, LimitReason) {
        match self.elasticity {
            e if e > ELASTIC && self.search.goes_on(SEARCH_FACTOR) => (SEARCH_FACTOR, LimitReason::Grew),
            e if e > ELASTIC => (1.25, LimitReason::Grew),
            e if e > 0.35 => (1.12, LimitReason::Grew),
            e if e > 0.1 => (1.05, LimitReason::Grew),
            e if e > 0.0 => (1.0, LimitReason::Held),
            e if e > -0.1 => (0.95, LimitReason::Elasticity),
            e if e < STEEP && self.level > HALVED_FROM && self.search.goes_on(1.0 / SEARCH_FACTOR) => {
                (1.0 / SEARCH_FACTOR, LimitReason::Elasticity)
            }
            e if e > STEEP => (0.9, LimitReason::Elasticity),
            _ => (0.8, LimitReason::Elasticity),
        }
    }

    fn restart_search(&mut self, reason: LimitReason, now: Instant) {
        self.search = Search::Begun;
        self.elasticity = 0.5;
        self.dither = DITHER_MAX;
        self.set_reason(reason, now);
        self.begin_pair(now);
    }

    fn begin_pair(&mut self, now: Instant) {
        let first = if self.rng.random() { Arm::Low } else { Arm::High };
        let mut high = whole((self.level * (1.0 + self.dither)).min(self.ceiling));
        let middle = self.level.min(f64::from(high) / (1.0 + self.dither));
        let mut low = whole(middle * (1.0 - self.dither));
        if high - low.min(high) < 2 {
            high = whole((self.level + 1.0).min(self.ceiling));
            low = high.saturating_sub(2).max(1);
        }
        self.pair = self.pair.next([low, high], first, now);
    }

    const fn bounded(&self, level: f64) -> f64 {
        level.clamp(LIMIT_MIN.min(self.ceiling), self.ceiling)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "between one and a ceiling of 32 bits"
)]
fn whole(level: f64) -> u32 {
    level.round().max(1.0) as u32
}

#[cfg(test)]
mod tests;
