//! Accounts of cohorts, and the detector of the cohort that is bad.
//!
//! A cohort is a model with a firmware version ([`CohortTag`]). [`Rates`] turns its counts into rates. [`Detector`]
//! compares each cohort with the rest of the fleet, once a second, and names those that stand out. [`Breaker`] makes
//! proposals of that, and decides which of them may be applied without a person. docs/design/cohorts.md has the
//! formulas, the reasons and the figures. Nothing here sends, stores or refuses anything.

mod breaker;
mod detector;
mod gates;
mod outcome;
mod past;
mod proposal;
mod rates;
mod ratio;
mod sites;
mod watch;

use std::time::Duration;

pub use self::{
    breaker::{Action, Breaker, Mode},
    detector::{COHORTS_MAX, Detector, Event, EventKind},
    gates::{BreakerRule, is_of_one_tenant, may_hold, rule_for},
    outcome::Outcome,
    past::{Past, SHORT_SESSION, STEADY_SESSION},
    proposal::{Proposal, ProposalId, ProposalState},
    rates::{Figure, Rates, STATEMENT_PARTS, Totals, Window},
    sites::Sites,
};
use crate::cohort::CohortTag;

/// A session that begins within this time of the device's previous one is a return: 10 minutes. A short return is a
/// repeat.
pub const RETURN_WITHIN: Duration = Duration::from_secs(600);

crate::labels! {
    /// What a cohort stands out by.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub enum Signal {
        Repeats = "repeats",
        Errors = "errors",
        Cost = "cost",
        Messages = "messages",
    }
}

impl Signal {
    /// Unit of the figures of its evidence.
    #[must_use]
    pub const fn unit(self) -> &'static str {
        match self {
            Self::Repeats | Self::Errors => "per minute",
            Self::Cost => "ms per lookup",
            Self::Messages => "per device and minute",
        }
    }
}

/// How sure the detector is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// A person should look at it.
    Propose,
    /// A share of the cohort may be refused without a person.
    Apply,
}

/// A cohort that stands out at present.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Finding {
    pub cohort: CohortTag,
    pub signal: Signal,
    pub level: Level,
    pub evidence: Evidence,
}

/// Why a cohort stands out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evidence {
    /// The figure of the last minute. For repeats and errors: events per minute, each site once. For cost:
    /// milliseconds per look-up. For messages: messages per device and minute.
    pub observed: f64,
    /// The same figure as the rest of the fleet, or the cohort itself before, lets expect.
    pub expected: f64,
    /// Score of the detector.
    pub score: f64,
    /// Devices of the cohort.
    pub devices: f64,
    /// Devices of the whole fleet.
    pub fleet: f64,
    /// Hash of the tenant that nearly all events are of, if there is one.
    pub tenant: Option<u64>,
}

/// Share of an exponentially weighted average that is left after `seconds`.
fn decay(seconds: f64, time_constant: f64) -> f64 {
    (-seconds / time_constant).exp()
}
