//! Input and output of admission.

use std::time::Duration;

use super::{Batch, BreakerState, CohortTag, LimitReason, Ticket, throttle::Claim};
use crate::{
    id::{CredentialTag, DeviceId, Network},
    refusal::{Code, Hint, Limit, Refusal},
    slots::Standing,
    time::Instant,
};

/// A device that wants to be looked up.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'a> {
    pub device: DeviceId,
    /// The cohort that it claims. A costly one is isolated.
    pub cohort: CohortTag,
    pub slot_token: Option<&'a str>,
    /// Time at which its request was complete. Deadlines count from here.
    pub arrived: Instant,
    /// Whether the caller remembers that there is no such device. The throttle is checked first nevertheless.
    pub is_known_absent: bool,
    /// Its credential. Wrong secrets are never counted against a certificate.
    pub credential: CredentialTag,
    /// The network that it comes from. Wrong credentials from one network have little effect on the id elsewhere.
    pub network: Network,
}

/// Part of the limit above which waiting devices need the database's time.
const TO_SPARE_PART: usize = 4;

/// Decision on an arrival.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It waits. An [`Output`] with this ticket follows, unless [`abandon`](super::Admission::abandon) is called
    /// before.
    Queued(Ticket),
    /// There is no such device. The database was not queried.
    KnownAbsent,
    /// It is refused now.
    Refused(Refused),
}

/// A refusal, with its cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub cause: Cause,
    /// It always has a slot.
    pub hint: Hint,
}

crate::labels! {
    /// Why admission refuses.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub enum Cause {
        /// Too many wrong credentials for this id.
        Throttle = "throttle",
        /// Too many devices wait.
        QueueFull = "queue_full",
        /// It waited too long.
        Deadline = "deadline",
        /// The database does not answer, or there was no contact yet.
        Breaker = "breaker",
        /// The lookup failed twice.
        LookupFailed = "lookup_failed",
        /// The lookup was answered, without reliable data about this device. The attempt counts as one with a wrong
        /// credential.
        LookupUntold = "lookup_untold",
        /// The lookup was not answered in time.
        LookupTimedOut = "lookup_timed_out",
    }
}

impl Cause {
    #[must_use]
    pub const fn code(self) -> Code {
        match self {
            Self::Throttle => Code::Throttled,
            Self::QueueFull | Self::Deadline => Code::Overloaded,
            Self::Breaker | Self::LookupFailed | Self::LookupUntold | Self::LookupTimedOut => Code::RegistryUnavailable,
        }
    }
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        match refused.cause {
            Cause::Throttle => Self::throttled_until(Limit::Credential, refused.hint),
            Cause::QueueFull | Cause::Deadline => Self::overloaded(refused.hint),
            Cause::Breaker | Cause::LookupFailed | Cause::LookupUntold | Cause::LookupTimedOut => {
                Self::registry_unavailable(refused.hint)
            }
        }
    }
}

/// The caller's next action.
#[derive(Debug, PartialEq, Eq)]
pub enum Output<R, W> {
    /// Send this statement, and report its end with [`handle_batch_done`](super::Admission::handle_batch_done).
    Send(Batch),
    /// Answer a device that waits. `None`: the registry does not have it. Then report the result of its credential
    /// check with [`end`](super::Admission::end).
    Answer {
        ticket: Ticket,
        kept: W,
        record: Option<R>,
        answered: Answered,
    },
    /// Refuse a device that waits.
    Refuse { ticket: Ticket, kept: W, refused: Refused },
    /// Nothing for now. Call again at this time, or when something else happens.
    Wait(Option<Instant>),
}

/// The attempt of a device that was looked up, and whose credential is not verified yet. It is counted as wrong until
/// it [ends](super::Admission::end).
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Answered {
    pub(super) claim: Claim,
    pub(super) network: Network,
    pub(super) cohort: CohortTag,
    pub(super) standing: Standing,
}

impl Answered {
    #[must_use]
    pub const fn device(&self) -> DeviceId {
        self.claim.0
    }
}

/// Content of an answered statement for one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told<R> {
    /// The device's record.
    Found(R),
    /// The registry does not have the device.
    Absent,
    /// No reliable data: the record cannot be read, or its absence is not believed now.
    Nothing,
}

/// Why a statement was not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchFailure {
    /// It failed, which says nothing about its keys.
    Failed,
    /// No answer within [`LOOKUP_MAX`](super::LOOKUP_MAX). Not retried: there would be no time.
    TimedOut,
}

/// Figures for people and metrics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdmissionState {
    /// Maximum number of keys in flight. After the limit has shrunk, it falls as earlier statements are answered.
    pub limit: u32,
    /// Maximum that the limit may reach.
    pub limit_ceiling: u32,
    /// Why the limit has its value.
    pub limit_reason: LimitReason,
    /// Whether the ceiling holds throughput back: devices have waited for 10 s, and more keys in flight would have
    /// given more answers.
    pub is_ceiling_too_low: bool,
    /// Growth of the answers in percent for one percent more in flight: 1 below the database's knee, 0 at it.
    pub elasticity: f64,
    /// Keys answered a second, in the last second in which devices waited nearly all the time. Zero before the first.
    pub rate: f64,
    /// 90th percentile of the time of a statement in the last second that had one, to within a fifth. Zero before
    /// the first.
    pub took_p90: Duration,
    /// Number of keys sent and not answered.
    pub in_flight: u32,
    /// Number of devices that wait for an answer.
    pub queue: usize,
    /// Reference capacity in keys per second: the rate at which slots are given out.
    pub k_ref: f64,
    /// Best rate measured in the last minutes, in keys per second. Zero if none was.
    pub k_peak: f64,
    /// Best rate known from a previous process, in keys per second. Zero if none is.
    pub k_last_known_good: f64,
    pub breaker: BreakerState,
    /// Number of isolated cohorts whose lookups were found to cost far more than those of others.
    pub cohorts_apart: usize,
}

impl AdmissionState {
    /// Whether lookups leave the database time for background work. They do not while a cohort is isolated: the
    /// cause of its cost may make other reads costly as well.
    #[must_use]
    pub fn has_time_to_spare(&self) -> bool {
        let limit = usize::try_from(self.limit).unwrap_or(usize::MAX);
        self.breaker == BreakerState::Closed
            && self.cohorts_apart == 0
            && self.queue.saturating_mul(TO_SPARE_PART) <= limit
    }
}
