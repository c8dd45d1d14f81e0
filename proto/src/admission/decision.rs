//! The words of admission: what it is asked, what it says, and what the caller owes.

use std::time::Duration;

use super::{BreakerState, CohortTag, LimitReason, Ticket};
use crate::{
    id::{DeviceId, Network, Proof},
    refusal::{Code, Hint, Limit, Refusal},
    time::Instant,
};

/// A device that wants to be looked up.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'a> {
    pub device: DeviceId,
    /// What it says it is. One whose look-ups cost far more than the others' is looked up apart.
    pub cohort: CohortTag,
    pub slot_token: Option<&'a str>,
    /// When its request was complete. Deadlines count from here.
    pub arrived: Instant,
    /// The caller remembers that there is no such device. Throttles come first all the same.
    pub is_known_absent: bool,
    /// What its claim rests on. What strangers try with the id of a device never counts against its certificate.
    pub proof: Proof,
    /// Where it comes from. What is tried from one network with the id of a device counts little against it elsewhere.
    pub network: Network,
}

/// More devices than one part in this many of the limit: then look-ups need the database's time.
const TO_SPARE_PART: usize = 4;

/// What admission says of an arrival.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It waits. An [`Action`] with this ticket follows, unless [`abandon`](super::Admission::abandon) is called before.
    Queued(Ticket),
    /// There is no such device; nothing was asked of the database.
    KnownAbsent,
    /// To be answered now.
    Refused(Refused),
}

/// A refusal that names the limit which refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub cause: Cause,
    /// With a slot, always.
    pub hint: Hint,
}

/// Why admission refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// Wrong credentials too often with this id.
    Throttle,
    /// Too many devices wait.
    QueueFull,
    /// It waited too long for its turn.
    Deadline,
    /// The database is away, or was never there.
    Breaker,
    /// The look-up failed twice.
    LookupFailed,
    /// The look-up was answered, and the answer says nothing of this device that can be relied on.
    LookupUntold,
    /// The look-up was not answered in time.
    LookupTimedOut,
}

impl Cause {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Throttle => "throttle",
            Self::QueueFull => "queue_full",
            Self::Deadline => "deadline",
            Self::Breaker => "breaker",
            Self::LookupFailed => "lookup_failed",
            Self::LookupUntold => "lookup_untold",
            Self::LookupTimedOut => "lookup_timed_out",
        }
    }

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

/// What the caller owes a waiting device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action<R> {
    /// Answer it. `None`: the registry does not have the device. Then report the result of its credential with
    /// [`handle_right_credential`](super::Admission::handle_right_credential),
    /// [`handle_wrong_credential`](super::Admission::handle_wrong_credential) or [`abandon`](super::Admission::abandon).
    Answer {
        ticket: Ticket,
        device: DeviceId,
        record: Option<R>,
    },
    /// Refuse it.
    Refuse { ticket: Ticket, refused: Refused },
}

/// What an answered statement says of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told<R> {
    /// The device's record.
    Found(R),
    /// The registry does not have the device.
    Absent,
    /// Nothing that can be relied on: the record cannot be read, or its absence is not to be believed now.
    Nothing,
}

/// Why a statement was not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchFailure {
    /// It failed, and says nothing about its keys.
    Failed,
    /// No answer within [`LOOKUP_MAX`](super::LOOKUP_MAX). Not tried again: there would be no time.
    TimedOut,
}

/// Figures for people and metrics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdmissionState {
    /// Keys that may be in flight. Where the limit has shrunk, it falls as what was sent before is answered.
    pub limit: u32,
    /// The most that the limit may come to.
    pub limit_ceiling: u32,
    /// Why the limit is what it is.
    pub limit_reason: LimitReason,
    /// The ceiling holds throughput back: for 10 s and more devices have waited, and more in flight would have given more answers.
    pub is_ceiling_too_low: bool,
    /// How much of one percent more in flight came out as answers, lately: 1 below the database's knee, 0 at it.
    pub elasticity: f64,
    /// Keys answered a second when devices last waited for a second on end; 0 where they never did.
    pub rate: f64,
    /// Nine of ten statements took no longer in the last second that had some, to the accuracy of a fifth; 0 where there were none yet.
    pub took_p90: Duration,
    /// Keys sent and not answered.
    pub in_flight: u32,
    /// Devices waiting for an answer.
    pub queue: usize,
    /// Keys a second that slots are given out by.
    pub k_ref: f64,
    /// The best rate measured in the last minutes, in keys a second; 0 where none was.
    pub k_peak: f64,
    /// The best rate known from before, in keys a second; 0 where none is.
    pub k_last_known_good: f64,
    pub breaker: BreakerState,
    /// Devices whose slot is remembered.
    pub slots: usize,
    /// Slots given out so far that live in their token alone.
    pub slots_stateless: u64,
    /// Devices that are no strangers although the roster does not have them so.
    pub known: usize,
    /// Cohorts that are looked up apart, because their look-ups cost far more than the others'.
    pub cohorts_apart: usize,
}

impl AdmissionState {
    /// Whether look-ups leave the database time for work that nobody waits for. While one cohort's look-ups cost far more than
    /// the others', they don't: whatever makes them costly may make other reads costly.
    #[must_use]
    pub fn has_time_to_spare(&self) -> bool {
        let limit = usize::try_from(self.limit).unwrap_or(usize::MAX);
        self.breaker == BreakerState::Closed
            && self.cohorts_apart == 0
            && self.queue.saturating_mul(TO_SPARE_PART) <= limit
    }
}
