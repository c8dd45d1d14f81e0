//! Admission: which devices may be looked up in the registry now, and when the others should return.
//!
//! Four bounds, each independent of the others: a ceiling on keys per second, a limit on keys in flight, queues
//! bounded in time, and a deadline for each device. A breaker in front answers at once while the database is away.
//! A refused device gets a slot (see [`crate::slots`]). docs/design/admission.md has the reasons.
//!
//! Start with [`Admission`]. It runs no query: the caller does what [`Admission::poll_output`] returns. It does not
//! authenticate devices, and knows neither rules nor connections.

use std::{collections::VecDeque, num::NonZeroU32, time::Duration};

use rand::Rng;

mod batches;
mod breaker;
mod ceiling;
mod classes;
mod config;
mod cost;
mod decision;
mod limit;
mod linger;
mod queue;
mod throttle;

pub use breaker::{BreakerState, Registry};
pub use config::{AdmissionConfig, Figure, InvalidAdmission};
pub use cost::{CohortTag, Costly};
pub use decision::{AdmissionState, Answered, Arrival, BatchFailure, Cause, Decision, Output, Refused, Told};
pub use limit::LimitReason;
pub use queue::{Batch, BatchId, Ticket};
pub use throttle::{Outcome, Right};

use self::{
    breaker::Breaker,
    ceiling::Ceiling,
    cost::Costs,
    limit::{Limiter, Meter, OVERBOOKING, Reference},
    linger::Linger,
    queue::{Late, Queue},
    throttle::Throttle,
};
use crate::{
    hint::{self, draw},
    id::{CredentialTag, DeviceId, Network},
    slots::{HINT_MIN, Slots, Standing, Weights},
    time::{Instant, WallTime},
};

/// Maximum time from a device's arrival to its lookup: a lookup of [`LOOKUP_MAX`] then still ends in time.
pub const SEND_WITHIN: Duration = Duration::from_millis(1_800);
/// Maximum time from a device's arrival to its answer. docs/PROTOCOL.md promises 3 s.
pub const ANSWER_WITHIN: Duration = Duration::from_millis(2_800);
/// Maximum time of a lookup statement. The caller enforces it, and reports [`BatchFailure::TimedOut`] then.
pub const LOOKUP_MAX: Duration = Duration::from_secs(1);
/// Time after which a statement whose end was not reported is handled as timed out. No device waits for it by then, and
/// its keys must not stay in flight for ever.
const STATEMENT_LOST_AFTER: Duration = ANSWER_WITHIN;
/// Maximum number of times that [`hint::UNTOLD`] is doubled.
const UNTOLD_DOUBLINGS_MAX: u32 = 4;
/// Maximum number of shared statements in flight: while one runs, the next one fills.
const BATCHES_IN_FLIGHT_MAX: usize = 2;
/// Maximum number of statements in flight: one more, for isolated cohorts.
pub const STATEMENTS_IN_FLIGHT_MAX: usize = BATCHES_IN_FLIGHT_MAX + 1;
/// Part of the limit that one statement of an isolated cohort may take.
const ISOLATED_PART: usize = 4;

/// The lookups of one node: limit, queue, breaker and throttle. `R` is the result of a lookup, `W` the caller's data
/// for a device that waits.
#[derive(Debug)]
pub struct Admission<R, W> {
    config: AdmissionConfig,
    /// Number of nodes that share the database.
    nodes: u32,
    queue: Queue<W>,
    limit: Limiter,
    meter: Meter,
    reference: Reference,
    ceiling: Ceiling,
    breaker: Breaker,
    throttle: Throttle,
    costs: Costs,
    linger: Linger,
    /// Answers that the caller has not fetched: a record, or why there is none. Bounded by the devices that wait, and
    /// those that left since the last call of [`poll_output`](Self::poll_output).
    pending: VecDeque<(Ticket, Result<Option<R>, Cause>)>,
    /// Time at which nothing was due and no statement could be sent; `None` after any change since.
    settled_at: Option<Instant>,
}

impl<R: Clone, W> Admission<R, W> {
    /// Lookups are allowed from the start, unless [`Registry::Absent`] is reported.
    #[must_use]
    pub fn new(config: AdmissionConfig, now: Instant) -> Self {
        Self {
            queue: Queue::new(Weights::new(&config.tenant_weights)),
            limit: Limiter::new(config.keys_in_flight_max, config.batch_keys_max, now),
            meter: Meter::default(),
            reference: Reference::new(config.lookups_per_second_max, now),
            ceiling: Ceiling::new(config.lookups_per_second_max),
            breaker: Breaker::new(now),
            throttle: Throttle::default(),
            costs: Costs::default(),
            linger: Linger::new(now),
            pending: VecDeque::new(),
            settled_at: None,
            nodes: 1,
            config,
        }
    }

    /// Decides on a device that needs a lookup. `kept` is called if it waits. If it is refused, its slot comes from
    /// `slots`.
    pub fn attempt(
        &mut self,
        arrival: &Arrival<'_>,
        kept: impl FnOnce() -> W,
        slots: &mut Slots,
        (now, wall): (Instant, WallTime),
        rng: &mut impl Rng,
    ) -> Decision {
        self.limit.seed(rng);
        let device = arrival.device;
        let standing = slots.standing(device, arrival.slot_token, now, wall);
        let claim = (device, arrival.credential.proof());
        let shown = (device, arrival.credential);
        let (cause, at_least) = if self.throttle.is_throttled(shown, arrival.network, standing.is_due, now) {
            let at_least = draw(hint::THROTTLED, rng);
            if standing.is_due {
                // Anybody can name this device id, so the remembered slot does not change.
                let hint = slots.hint_without_slot(device, &standing, at_least, (now, wall), rng);
                let cause = Cause::Throttle;
                return Decision::Refused(Refused { cause, hint });
            }
            (Cause::Throttle, at_least)
        } else if arrival.is_known_absent {
            self.throttle.begin(claim, arrival.network);
            self.throttle.end(claim, arrival.network, Outcome::Wrong, now);
            return Decision::KnownAbsent;
        } else if !self.breaker.is_closed() {
            (Cause::Breaker, self.breaker.floor(now, rng))
        } else if let Some(ticket) = self.admit_to_queue(arrival, kept, &standing, now) {
            self.throttle.begin(claim, arrival.network);
            self.settled_at = None;
            return Decision::Queued(ticket);
        } else {
            (Cause::QueueFull, HINT_MIN)
        };
        let pace = self.costs.pace(arrival.cohort, self.k_ref(now), OVERBOOKING, now);
        let hint = slots.refuse(device, &standing, at_least, pace, (now, wall), rng);
        Decision::Refused(Refused { cause, hint })
    }

    /// The devices that wait, by arrival.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = (Ticket, &W)> {
        self.queue.waiting()
    }

    /// The device has left. Its key is not sent, unless others wait for it or it is in flight. Returns `None` if it no
    /// longer waits.
    pub fn abandon(&mut self, ticket: Ticket, now: Instant) -> Option<W> {
        let is_asked = self.queue.is_sent(ticket);
        self.queue.leave(ticket);
        let waiter = self.queue.take(ticket)?;
        let outcome = if is_asked { Outcome::Left } else { Outcome::Open };
        self.throttle
            .end((waiter.device, waiter.proof), waiter.network, outcome, now);
        self.settled_at = None;
        Some(waiter.kept)
    }

    /// Reports the result of an answered device's credential check; [`Outcome::Wrong`] for an unregistered device as
    /// well. A wrong proof of one kind is counted for that kind alone.
    pub fn end(&mut self, answered: Answered, outcome: Outcome, now: Instant) {
        let Answered { claim, network, .. } = answered;
        self.throttle.end(claim, network, outcome, now);
    }

    /// Reports the credentials of a device whose lookup found another one than it showed. A call of
    /// [`end`](Self::end) or [`refuse`](Self::refuse) follows.
    pub fn learn(&mut self, answered: &Answered, right: Right) {
        self.throttle.learn(answered.claim, right);
    }

    fn refuse_all_waiting(&mut self) {
        let waiting = self.queue.drain();
        self.refuse_later(waiting, Cause::Breaker);
    }

    fn refuse_later(&mut self, waiting: impl IntoIterator<Item = Ticket>, cause: Cause) {
        self.pending
            .extend(waiting.into_iter().map(|ticket| (ticket, Err(cause))));
    }

    /// Reports the state of the registry as seen by calls other than lookups. If that opens the breaker, all waiting
    /// devices are refused.
    pub fn handle_registry(&mut self, registry: Registry, now: Instant) {
        self.settled_at = None;
        if self.breaker.handle_registry(registry, now) {
            self.refuse_all_waiting();
        }
    }

    /// Whether lookups have succeeded. [`Registry::Present`] alone is not enough: until the first probes are answered,
    /// devices are refused.
    #[must_use]
    pub const fn had_contact(&self) -> bool {
        self.breaker.had_contact()
    }

    /// The device was registered, or got another credential: its earlier attempts are forgotten.
    pub fn handle_registered(&mut self, device: DeviceId) {
        self.throttle.forgive(device);
    }

    /// Many devices were registered: all earlier attempts are forgotten.
    pub fn handle_many_registered(&mut self) {
        self.throttle.forgive_all();
    }

    /// Whether a device proves by a slot token that it returns at its slot. The limits on its address then do not
    /// apply.
    #[must_use]
    pub fn is_at_its_slot(
        &self,
        slots: &Slots,
        (device, credential): (DeviceId, CredentialTag),
        slot_token: &str,
        network: Network,
        (now, wall): (Instant, WallTime),
    ) -> bool {
        // A throttled device gains nothing by its slot, and could otherwise return without limit.
        let is_throttled = self.throttle.is_throttled((device, credential), network, true, now);
        !is_throttled && slots.shows_due(device, slot_token, now, wall)
    }

    /// Isolated cohorts whose lookups were found to cost far more than those of others.
    pub fn costly(&self) -> impl Iterator<Item = Costly> {
        self.costs.costly()
    }

    /// The plan guard found, or no longer finds, a lookup that reads a whole table: the limit is cut to 2 keys.
    pub fn set_limit_cut(&mut self, is_cut: bool, now: Instant) {
        self.settled_at = None;
        self.limit.set_cut(is_cut, now);
    }

    /// Reports the number of nodes that share the database, this one included. It is one until then. Each has an equal
    /// share of `lookups_per_second_max`, of `keys_in_flight_max` and of the measured capacity.
    pub fn handle_peers(&mut self, nodes: NonZeroU32, now: Instant) {
        if nodes.get() != self.nodes {
            let change = f64::from(self.nodes) / f64::from(nodes.get());
            self.nodes = nodes.get();
            self.reference.scale(change);
            self.share_bounds(now);
        }
    }

    /// Changes the bounds of all nodes together.
    pub fn set_bounds(&mut self, lookups_per_second_max: u32, keys_in_flight_max: u32, now: Instant) {
        self.config.lookups_per_second_max = lookups_per_second_max;
        self.config.keys_in_flight_max = keys_in_flight_max;
        self.share_bounds(now);
    }

    fn share_bounds(&mut self, now: Instant) {
        self.settled_at = None;
        let per_second = (self.config.lookups_per_second_max / self.nodes).max(1);
        let in_flight = (self.config.keys_in_flight_max / self.nodes).max(1);
        self.ceiling.set_rate(per_second);
        self.reference.set_ceiling(per_second);
        self.limit.set_ceiling(in_flight, self.config.batch_keys_max, now);
    }

    /// Sets the best rate of a previous process, in keys per second. Slots are issued at this rate until one is
    /// measured. A value that is not a rate is ignored.
    pub fn set_last_known_good(&mut self, keys_per_second: f64) {
        self.reference.set_last_known_good(keys_per_second);
    }

    /// Makes the recent best rate the last known good. Call it once per minute. Returns the value to keep for
    /// [`set_last_known_good`](Self::set_last_known_good), if it is new.
    pub fn take_last_known_good(&mut self, now: Instant) -> Option<f64> {
        self.reference.take_last_known_good(now)
    }

    /// Returns the caller's next action. Call it until [`Output::Wait`], after every other call and at the time that it
    /// names. A caller that stops earlier, to release a lock for a moment, calls again at once.
    pub fn poll_output(
        &mut self,
        slots: &mut Slots,
        (now, wall): (Instant, WallTime),
        rng: &mut impl Rng,
    ) -> Output<R, W> {
        if self.settled_at != Some(now) {
            self.handle_timeout(now);
            if let Some(batch) = self.next_batch(now) {
                return Output::Send(batch);
            }
            self.settled_at = Some(now);
        }
        while let Some((ticket, outcome)) = self.pending.pop_front() {
            // It may have left meanwhile.
            let Some(waiter) = self.queue.take(ticket) else {
                continue;
            };
            let kept = waiter.kept;
            let answered = Answered {
                claim: (waiter.device, waiter.proof),
                network: waiter.network,
                cohort: waiter.cohort,
                standing: waiter.standing,
            };
            let cause = match outcome {
                Ok(record) => {
                    return Output::Answer {
                        ticket,
                        kept,
                        record,
                        answered,
                    };
                }
                Err(cause) => cause,
            };
            let refused = self.refuse(answered, cause, slots, (now, wall), rng);
            return Output::Refuse { ticket, kept, refused };
        }
        Output::Wait(self.next_timeout(now))
    }

    /// Refuses a device that waited, with a slot. With [`Cause::LookupUntold`] its attempt ends as one with a wrong
    /// credential: nobody learns by the throttle, or by the hint, whether an id is registered.
    pub fn refuse(
        &mut self,
        answered: Answered,
        cause: Cause,
        slots: &mut Slots,
        (now, wall): (Instant, WallTime),
        rng: &mut impl Rng,
    ) -> Refused {
        let device = answered.device();
        let Answered {
            claim,
            network,
            cohort,
            standing,
        } = answered;
        let mut at_least = self.breaker.floor(now, rng).max(HINT_MIN);
        let outcome = if cause == Cause::LookupUntold {
            at_least = at_least.max(untold_for(&standing, rng));
            Outcome::Wrong
        } else {
            Outcome::Open
        };
        self.throttle.end(claim, network, outcome, now);
        let pace = self.costs.pace(cohort, self.k_ref(now), OVERBOOKING, now);
        let hint = slots.refuse(device, &standing, at_least, pace, (now, wall), rng);
        Refused { cause, hint }
    }

    /// Refuses devices whose deadline has passed, and ends lost statements and probations.
    fn handle_timeout(&mut self, now: Instant) {
        while let Some((id, _)) = self.lost_statement().filter(|(_, lost_at)| *lost_at <= now) {
            self.handle_failed(id, BatchFailure::TimedOut, now);
        }
        while let Some((ticket, late)) = self.queue.pop_late(now) {
            let cause = match late {
                Late::NotSent => Cause::Deadline,
                Late::NotAnswered => Cause::LookupTimedOut,
            };
            self.refuse_later([ticket], cause);
        }
        let transition = self.costs.handle_timeout(now);
        self.follow(transition);
    }

    /// The statement that is lost first, and when.
    fn lost_statement(&self) -> Option<(BatchId, Instant)> {
        let (id, sent_at) = self.queue.oldest_statement()?;
        Some((id, sent_at + STATEMENT_LOST_AFTER))
    }

    /// Time at which something is due if nothing else happens before.
    fn next_timeout(&self, now: Instant) -> Option<Instant> {
        let free = self.free_keys();
        let may_send = free > 0 && self.queue.has_unsent();
        let linger = self.lingering_until(self.share().min(free), now);
        let allowed = self.ceiling.blocked_until();
        [
            self.lost_statement().map(|(_, lost_at)| lost_at),
            self.queue.next_deadline(),
            self.breaker.poll_timeout().filter(|_| free > 0),
            linger.or(allowed).filter(|_| may_send),
            self.next_isolated_at(now),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Reference capacity in keys per second: the rate at which slots are issued.
    #[must_use]
    pub fn k_ref(&self, now: Instant) -> f64 {
        self.reference.keys_per_second(now)
    }

    /// Figures for people and metrics.
    #[must_use]
    pub fn state(&self, now: Instant) -> AdmissionState {
        let in_flight = to_u32(self.queue.in_flight());
        AdmissionState {
            limit: to_u32(self.keys_max()).max(in_flight),
            in_flight,
            queue: self.queue.len(),
            k_ref: self.k_ref(now),
            k_peak: self.reference.peak(now),
            k_last_known_good: self.reference.last_known_good(),
            limit_ceiling: self.limit.ceiling(),
            limit_reason: self.limit.reason(),
            is_ceiling_too_low: self.queue.has_unsent() && self.limit.is_ceiling_too_low(now),
            elasticity: self.limit.elasticity(),
            rate: self.meter.rate(),
            took_p90: self.meter.took_p90(),
            breaker: self.breaker.state(),
            cohorts_apart: self.costs.costly().count(),
        }
    }
}

fn untold_for(standing: &Standing, rng: &mut impl Rng) -> Duration {
    let refusals = standing.slot.map_or(0, |slot| u32::from(slot.refusals));
    draw(hint::UNTOLD, rng) * (1 << refusals.min(UNTOLD_DOUBLINGS_MAX))
}

fn to_usize(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn to_u32(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
