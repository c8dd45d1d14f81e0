//! The limit on keys in flight, the measured rate, and the reference capacity.
//!
//! Three figures that must not be confused: the *limit* bounds keys in flight now ([`Limiter`]). The *measured
//! rate* is what the database answers while devices wait ([`Meter`]). The *reference capacity* remembers the best
//! of that, and is the base of slots and queue lengths ([`Reference`]).
//!
//! The limit finds the database's knee on its own. It is dithered, a little lower and a little higher in turn, and
//! moves by the *elasticity* of the throughput: how much more is answered for a little more in flight.
//! docs/design/limiter.md has the reasons, and the figures of all constants.

mod meter;
mod probe;
mod reference;

use std::time::Duration;

use rand::{Rng, SeedableRng as _, rngs::SmallRng};

use self::probe::{ProbePair, ProbeWindow};
pub(super) use self::{
    meter::Meter,
    probe::ProbeId,
    reference::{OVERBOOKING, Reference},
};
use super::{BATCHES_IN_FLIGHT_MAX, to_u32, to_usize};
use crate::time::Instant;

/// Limit while the plan guard sees a sequential scan.
const LIMIT_CUT: u32 = 2;
/// Minimum of the limit, unless its ceiling is lower.
const LIMIT_MIN: f64 = 4.0;
/// Limit at the start: two statements of 64 keys. Harmless to any database, and large enough for a storm.
const LIMIT_START: f64 = 128.0;
/// Part of its last value from which the limit starts after an outage.
const AFTER_OUTAGE: f64 = 0.25;
/// Minimum time of a probe window.
const PROBE_MIN: Duration = Duration::from_millis(250);
/// Maximum time of a probe window. With too few statements by then, the pair has no result.
const PROBE_MAX: Duration = Duration::from_secs(2);
/// Factor by which the higher window is longer while the limit is at its ceiling.
const AT_CEILING: u32 = 4;
/// Number of statements after which a probe window may end.
const PROBE_STATEMENTS: u32 = 10;
/// The same during the search, in which each may take long.
const PROBE_STATEMENTS_SEARCHING: u32 = 6;
/// Number of keys after which a probe window may end.
const PROBE_KEYS: u64 = 50;
/// Minimum number of statements of a window with a result.
const PROBE_STATEMENTS_MIN: u32 = 3;
/// Minimum distance of the limits of a pair from the middle, as a part of it. It follows the noise of the
/// measurement.
const DITHER_MIN: f64 = 0.05;
/// Maximum of [`DITHER_MIN`].
const DITHER_MAX: f64 = 0.14;
/// Intended standard error of a measured elasticity. That of the average over pairs is half as much.
const ERROR_WANTED: f64 = 0.25;
/// Weight of a new measurement of the elasticity.
const GAIN: f64 = 0.4;
/// Weight during the search.
const GAIN_SEARCHING: f64 = 0.6;
/// Weight of the first measurement.
const GAIN_FIRST: f64 = 1.0;
/// Maximum of a plausible elasticity, in either direction. Beyond it the database probably changed between the windows
/// of a pair. A second such value in a row is used with this magnitude.
const ELASTICITY_MAX: f64 = 2.0;
/// Maximum time of a statement that is not late.
const LATENCY_MAX: Duration = Duration::from_millis(500);
/// Part of late keys above which the limit shrinks, whatever the throughput does.
const LATE_PART: f64 = 0.1;
/// Part of failed keys above which the limit shrinks, whatever the throughput does.
const FAILED_PART: f64 = 0.05;
/// Factor by which it shrinks in these cases.
const HARD_CUT: f64 = 0.7;
/// Elasticity above which the limit is far below the knee. If it cannot grow, its ceiling is too low.
const ELASTIC: f64 = 0.6;
/// Elasticity above which a ceiling that was too low remains too low.
const ELASTIC_STILL: f64 = 0.35;
/// Elasticity below which the limit is far above the knee.
const STEEP: f64 = -0.25;
/// Factor by which the limit moves during the search.
const SEARCH_FACTOR: f64 = 2.0;
/// Limit below which the search does not halve it.
const HALVED_FROM: f64 = 48.0;
/// Time for which devices wait at the ceiling before the alarm.
const CEILING_ALARM_AFTER: Duration = Duration::from_secs(10);

crate::labels! {
    /// Why the limit has its value.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub enum LimitReason {
        /// Nothing was measured yet.
        Start = "start",
        /// It grew: more in flight gave more answers.
        Grew = "grew",
        /// It was held: it is about right.
        Held = "held",
        /// It was held: the fleet asks for less than the database could answer.
        AppLimited = "app_limited",
        /// It was held: more in flight would give more answers, but this is the most allowed.
        Ceiling = "ceiling",
        /// It shrank: more in flight gave hardly more answers, or fewer.
        Elasticity = "elasticity",
        /// It shrank: statements took too long.
        Latency = "latency",
        /// It shrank: too many statements failed.
        Errors = "errors",
        /// It starts low after an outage.
        Outage = "outage",
        /// It was cut, because a lookup reads a whole table.
        PlanCut = "plan_cut",
    }
}

/// The search at the start and after an outage: the limit moves by large steps as long as the direction stays the
/// same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Search {
    Begun,
    Up,
    Down,
    Over,
}

impl Search {
    /// Whether the search may continue by this factor.
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

/// Finds the maximum number of keys in flight.
#[derive(Debug)]
pub(super) struct Limiter {
    ceiling: f64,
    /// Middle of the two limits that are tried in turn.
    level: f64,
    dither: f64,
    elasticity: f64,
    search: Search,
    is_cut: bool,
    is_outage: bool,
    reason: LimitReason,
    at_ceiling_since: Option<Instant>,
    pair: ProbePair,
    /// Draws which limit of a pair comes first, so that a periodic load is not mistaken for the effect of the limit.
    rng: SmallRng,
    is_seeded: bool,
    /// Whether the last pair was implausible.
    is_in_doubt: bool,
}

impl Limiter {
    /// Creates a limiter of at most `ceiling` keys, `batch_keys_max` of them in one statement.
    pub fn new(ceiling: u32, batch_keys_max: u32, now: Instant) -> Self {
        let ceiling = reachable(ceiling, batch_keys_max);
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
            pair: ProbePair::default(),
            rng: SmallRng::seed_from_u64(now.as_micros()),
            is_seeded: false,
            is_in_doubt: false,
        };
        limit.begin_pair(now);
        limit
    }

    /// Seeds its random numbers from the caller's, at the first call. Nodes that dithered in step would measure each
    /// other.
    pub fn seed(&mut self, rng: &mut impl Rng) {
        if !std::mem::replace(&mut self.is_seeded, true) {
            self.rng = SmallRng::from_rng(rng);
        }
    }

    /// Maximum number of keys in flight.
    pub fn keys(&self) -> u32 {
        let keys = self.pair.limit();
        if self.is_cut { keys.min(LIMIT_CUT) } else { keys }
    }

    /// Maximum that the limit may reach.
    pub fn ceiling(&self) -> u32 {
        whole(self.ceiling)
    }

    /// Maximum number of keys in flight now, those of isolated cohorts included.
    pub fn bound(&self) -> u32 {
        if self.is_cut { self.keys() } else { self.ceiling() }
    }

    pub const fn reason(&self) -> LimitReason {
        self.reason
    }

    /// Growth of the answers in percent for one percent more in flight: 1 below the knee, 0 at it.
    pub const fn elasticity(&self) -> f64 {
        self.elasticity
    }

    /// Whether the ceiling is too low: devices have waited for a while, and more in flight would have given more
    /// answers.
    pub fn is_ceiling_too_low(&self, now: Instant) -> bool {
        self.at_ceiling_since
            .is_some_and(|since| now.saturating_since(since) >= CEILING_ALARM_AFTER)
    }

    /// Changes the ceiling; see [`new`](Self::new).
    pub fn set_ceiling(&mut self, ceiling: u32, batch_keys_max: u32, now: Instant) {
        self.ceiling = reachable(ceiling, batch_keys_max);
        self.level = self.bounded(self.level);
        self.begin_pair(now);
    }

    /// The plan guard found, or no longer finds, a lookup that reads a whole table.
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

    /// The breaker opened: after the outage the limit starts low.
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

    /// A statement of `keys` is sent; `in_flight` includes them. Returns the probe window to keep for its end.
    pub fn handle_sent(&mut self, keys: usize, in_flight: usize) -> Option<ProbeId> {
        let limit = to_usize(self.pair.limit());
        let is_full = in_flight == limit && keys >= limit / BATCHES_IN_FLIGHT_MAX && !self.is_cut;
        self.pair.handle_sent(is_full)
    }

    /// A statement ended, `took` after it was sent.
    pub fn handle_ended(
        &mut self,
        probe: Option<ProbeId>,
        keys: usize,
        is_answered: bool,
        took: Duration,
        now: Instant,
    ) {
        if !self.is_cut && !self.is_outage {
            if let Some(probe) = probe {
                self.pair.measure(probe, to_u32(keys), is_answered, took);
            }
            self.step(now);
        }
    }

    /// Ends the probe window, and the pair, if it is time.
    fn step(&mut self, now: Instant) {
        let times = if self.level >= self.ceiling && self.pair.is_high() {
            AT_CEILING
        } else {
            1
        };
        let age = now.saturating_since(self.pair.window_began());
        let measured = self.pair.measured();
        let wanted = if self.search == Search::Over {
            PROBE_STATEMENTS
        } else {
            PROBE_STATEMENTS_SEARCHING
        };
        let has_enough = measured.statements >= wanted * times && measured.keys >= PROBE_KEYS;
        if age < PROBE_MIN * times || (age < PROBE_MAX && !has_enough) {
            return;
        }
        if measured.statements < PROBE_STATEMENTS_MIN || !measured.is_backlogged() {
            // Too few keys waited: the limit does not hold the throughput back. A statement that fills it by chance
            // runs beside smaller ones. So its time is too short, especially at the higher limit, and the elasticity
            // too high.
            self.set_reason(LimitReason::AppLimited, now);
            self.begin_pair(now);
        } else if !self.pair.next_window(now) {
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

    /// Adjusts the limit by the result of the pair. Returns the reason.
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

    /// The factor that the limit changes by. docs/design/limiter.md explains the table.
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
        let first = if self.rng.random() {
            ProbeWindow::Low
        } else {
            ProbeWindow::High
        };
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

/// The part of a ceiling that statements can reach.
fn reachable(ceiling: u32, batch_keys_max: u32) -> f64 {
    let reachable = to_u32(BATCHES_IN_FLIGHT_MAX).saturating_mul(batch_keys_max);
    f64::from(ceiling.min(reachable).max(1))
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
