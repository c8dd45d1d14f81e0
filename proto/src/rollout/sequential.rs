//! The sequential probability ratio test (Wald) of treated devices against a control of the same minutes.
//!
//! It works on counts. A control without a single failure needs no special case, and neither do few connects. Rank
//! tests such as Mann-Whitney can't decide there. The alternative is a failure rate of `p1 = max(5 p0, p0 + margin)`,
//! where `p0` is the control's and the margin one percentage point.
//!
//! The control's rate is itself an estimate. So two sums are kept. The strict one uses the greatest rate that fits the
//! control, and alone finds "worse". The lenient one uses the least, and alone finds "fine". With many
//! connects in the control they are equal.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::time::WallTime;

/// Sum at which the treated devices do worse: ln((1 - β) / α) with α = 0.0001 and β = 0.05.
const WORSE: f64 = 9.16;
/// Sum at which they do not: ln(β / (1 - α)). Neither sum falls below it, so that late failures are found as soon.
const FINE: f64 = -3.0;
/// Least failure rate that is believed of a control.
const P_MIN: f64 = 0.001;
/// Greatest rate that a control is compared by, and that the alternative may reach.
const P0_MAX: f64 = 0.9;
const P1_MAX: f64 = 0.95;
/// Least margin between the two rates.
const MARGIN_MIN: f64 = 0.01;
/// Connects in an interval by which its own failure rate outweighs that of the window: a fault that hits everybody for
/// a minute counts in that minute.
const INTERVAL_WEIGHT: f64 = 50.0;
/// Most intervals that are kept apart. Then each two become one.
const INTERVALS_MAX: usize = 32;
/// Share of the devices sent away by a rule that do not return in time: as is usual at worst, and if the rule is at
/// fault.
const MISSING_P0: f64 = 0.1;
const MISSING_P1: f64 = 0.5;
/// Connects with which the nearer control is large enough to be used by itself.
const NEAR_MIN: u64 = 100;

/// Connects, and how many of them failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    pub connects: u64,
    /// At most `connects`.
    pub failed: u64,
}

impl Counts {
    fn plus(self, other: Self) -> Self {
        Self {
            connects: self.connects.saturating_add(other.connects),
            failed: self.failed.saturating_add(other.failed),
        }
    }

    const fn since(self, earlier: Self) -> Self {
        Self {
            connects: self.connects.saturating_sub(earlier.connects),
            failed: self.failed.saturating_sub(earlier.failed),
        }
    }

    /// Connects and failures as numbers to calculate with.
    #[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
    fn figures(self) -> (f64, f64) {
        (self.connects as f64, self.failed.min(self.connects) as f64)
    }
}

/// What all nodes counted in a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Devices that the stage treats.
    pub treated: Counts,
    /// Devices most like them: of the same model for a release, matched and not treated for a rollout.
    pub near: Counts,
    /// All other devices that may be compared.
    pub others: Counts,
    /// Devices that the rule has sent away: those that were expected back by now, and those of them that are missing.
    /// Only of one node, since a device may return to another one.
    #[serde(default)]
    pub returns: Counts,
}

impl Totals {
    /// The nearer control where it is large enough, else all.
    #[must_use]
    pub fn control(&self) -> Counts {
        self.control_of(self.is_near_enough())
    }

    const fn is_near_enough(&self) -> bool {
        self.near.connects >= NEAR_MIN
    }

    fn control_of(&self, uses_near: bool) -> Counts {
        if uses_near {
            self.near
        } else {
            self.near.plus(self.others)
        }
    }

    /// The sum of both.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            treated: self.treated.plus(other.treated),
            near: self.near.plus(other.near),
            others: self.others.plus(other.others),
            returns: self.returns.plus(other.returns),
        }
    }

    /// Whether too many of the devices that the rule has sent away do not return.
    pub(crate) fn are_missing(&self) -> bool {
        let (expected, missing) = self.returns.figures();
        let of_returned = ((1.0 - MISSING_P1) / (1.0 - MISSING_P0)).ln();
        missing * (MISSING_P1 / MISSING_P0).ln() + (expected - missing) * of_returned >= WORSE
    }

    /// What came since `earlier`.
    fn since(&self, earlier: &Self) -> Self {
        Self {
            treated: self.treated.since(earlier.treated),
            near: self.near.since(earlier.near),
            others: self.others.since(earlier.others),
            returns: Counts::default(),
        }
    }
}

/// What the test says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finding {
    Worse,
    Fine,
    Open,
}

/// The test of one window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sequential {
    /// Counts of the intervals that are over, oldest first; at most [`INTERVALS_MAX`].
    intervals: Vec<Interval>,
    /// When the last of them ended.
    settled_at: WallTime,
    /// So many of the planned intervals are one here. It doubles when there are too many.
    scale: u32,
    /// Sum with the greatest rate that the control speaks for.
    strict: f64,
    /// Sum with the least.
    lenient: f64,
}

/// Connects and failures of an interval: treated, near, others.
type Interval = [u64; 6];

impl Sequential {
    pub const fn new(now: WallTime) -> Self {
        Self {
            intervals: Vec::new(),
            settled_at: now,
            scale: 1,
            strict: 0.0,
            lenient: 0.0,
        }
    }

    /// The value next to 0 between the two sums.
    pub const fn log_likelihood_ratio(&self) -> f64 {
        if self.strict > 0.0 {
            self.strict
        } else if self.lenient < 0.0 {
            self.lenient
        } else {
            0.0
        }
    }

    /// Takes the counts of the whole window. `needed`: connects that the stage needs, which few devices lower; then a
    /// coarser difference is tested. `interval`: the minutes in which treated and control devices are compared.
    pub fn handle_totals(&mut self, totals: &Totals, needed: u64, interval: Duration, now: WallTime) -> Finding {
        let settled = self
            .intervals
            .iter()
            .fold(Totals::default(), |sum, counts| sum.plus(&(*counts).into()));
        let last = Interval::from(totals.since(&settled));
        let (needed, _) = Counts {
            connects: needed.max(1),
            failed: 0,
        }
        .figures();
        let margin = (2.0 / needed).max(MARGIN_MIN);
        // All over again, since the control's rate is known better than it was.
        let uses_near = totals.is_near_enough();
        let sum = |rate: f64| {
            self.intervals.iter().chain([&last]).fold(0.0_f64, |sum, counts| {
                let counts = Totals::from(*counts);
                let ratio = log_likelihood_ratio(counts.treated, counts.control_of(uses_near), rate, margin);
                (sum + ratio).max(FINE)
            })
        };
        let (strict, lenient) = rates(totals.control());
        (self.strict, self.lenient) = (sum(strict), sum(lenient));
        if now.saturating_since(self.settled_at) >= interval * self.scale {
            self.settle(last, now);
        }
        if self.strict >= WORSE {
            Finding::Worse
        } else if self.lenient <= FINE {
            Finding::Fine
        } else {
            Finding::Open
        }
    }

    fn settle(&mut self, last: Interval, now: WallTime) {
        self.intervals.push(last);
        self.settled_at = now;
        if self.intervals.len() >= INTERVALS_MAX {
            let pairs = self.intervals.chunks(2).map(|pair| {
                let sum = pair
                    .iter()
                    .fold(Totals::default(), |sum, counts| sum.plus(&(*counts).into()));
                Interval::from(sum)
            });
            self.intervals = pairs.collect();
            self.scale = self.scale.saturating_mul(2);
        }
    }
}

impl From<Totals> for Interval {
    fn from(totals: Totals) -> Self {
        let Totals {
            treated, near, others, ..
        } = totals;
        [
            treated.connects,
            treated.failed,
            near.connects,
            near.failed,
            others.connects,
            others.failed,
        ]
    }
}

impl From<Interval> for Totals {
    fn from([treated, treated_failed, near, near_failed, others, others_failed]: Interval) -> Self {
        let counts = |connects, failed| Counts { connects, failed };
        Self {
            treated: counts(treated, treated_failed),
            near: counts(near, near_failed),
            others: counts(others, others_failed),
            returns: Counts::default(),
        }
    }
}

/// The greatest and the least failure rate that a control speaks for.
fn rates(control: Counts) -> (f64, f64) {
    let (connects, failed) = control.figures();
    let least = if connects > 0.0 { failed / connects } else { 0.0 }.max(P_MIN);
    // Two standard deviations above: three failures where none was seen.
    let most = (failed + 1.0 + 2.0 * (failed + 1.0).sqrt()) / (connects + 10.0);
    (most.max(least), least)
}

/// Logarithm of the likelihood ratio of one interval. `rate` is the control's in the whole window.
fn log_likelihood_ratio(treated: Counts, control: Counts, rate: f64, margin: f64) -> f64 {
    let (control_connects, control_failed) = control.figures();
    let here = (control_failed + INTERVAL_WEIGHT * rate) / (control_connects + INTERVAL_WEIGHT);
    let p0 = rate.max(here).min(P0_MAX);
    let p1 = (5.0 * p0).max(p0 + margin).min(P1_MAX);
    let (connects, failed) = treated.figures();
    failed * (p1 / p0).ln() + (connects - failed) * ((1.0 - p1) / (1.0 - p0)).ln()
}
