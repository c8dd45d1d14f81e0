//! Admission: who may be looked up in the registry now, and when everybody else should come back.
//!
//! Four bounds, each independent of the others: a ceiling on keys a second, a limit on keys in flight, queues bounded in
//! time, and a deadline for each device. A breaker in front answers at once while the database is away. Whoever is refused
//! gets a slot (see [`crate::slots`]).
//!
//! Start with [`Admission`]. It runs no query: the caller sends each [`Batch`] that [`Admission::poll_batch`] gives, and
//! carries out each [`Action`]. It authenticates nobody, and knows neither rules nor connections.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use rand::Rng;

mod batches;
mod breaker;
mod ceiling;
mod config;
mod cost;
mod decision;
mod gather;
mod limit;
mod queue;
mod throttle;

pub use breaker::BreakerState;
pub use config::{AdmissionConfig, Figure, InvalidAdmission};
pub use cost::{CohortTag, Costly};
pub use decision::{Action, AdmissionState, Arrival, BatchFailure, Cause, Decision, Refused, Told};
pub use limit::LimitReason;
pub use queue::{Batch, BatchId, Ticket};

use self::{
    breaker::Breaker,
    ceiling::Ceiling,
    cost::Costs,
    gather::Gather,
    limit::{Limit, Meter, OVERBOOKING, Reference},
    queue::{Class, Late, Queue, Waiter},
    throttle::{Throttle, Verdict},
};
use crate::{
    id::{DeviceId, Network, Proof},
    refusal::{Hint, draw},
    slots::{HINT_MIN, Pace, Roster, STRANGERS_SHARE, SlotKeys, Slots, Standing, Weights},
    time::{Instant, WallTime},
};

/// Slot holders waiting are bounded to what the reference capacity answers in this time, the longest that they may wait. Then they get
/// a new slot at once.
const HOLDERS_QUEUE: Duration = SEND_WITHIN;
/// Devices sent away so often that they are served by seniority. overload.md section 4.
const EXPRESS_BOUNCES: u8 = 3;
/// The part of the holders' bound that they have for themselves.
const EXPRESS_PART: usize = 4;
/// The same for devices without a due slot: they use what holders leave.
const WALK_INS_QUEUE: Duration = Duration::from_millis(100);
/// A device is looked up at most this long after its arrival: a look-up of [`LOOKUP_MAX`] then still ends in time.
pub const SEND_WITHIN: Duration = Duration::from_millis(1_800);
/// A device is answered at the latest this long after its arrival. The contract allows 3 s.
pub const ANSWER_WITHIN: Duration = Duration::from_millis(2_800);
/// Longest look-up statement. The caller enforces it, and reports [`BatchFailure::TimedOut`] then.
pub const LOOKUP_MAX: Duration = Duration::from_secs(1);
/// A statement whose end was not reported after this time is handled as timed out: otherwise its keys would stay in flight for ever. Nobody waits
/// for it any more.
const STATEMENT_LOST_AFTER: Duration = ANSWER_WITHIN;
/// A device of which an answer says nothing comes back not before a time drawn from here, doubled with each refusal up to
/// [`UNTOLD_DOUBLINGS_MAX`] times: the database answers, and more questions do not help it.
const UNTOLD_FOR: std::ops::RangeInclusive<Duration> = Duration::from_secs(5)..=Duration::from_secs(15);
const UNTOLD_DOUBLINGS_MAX: u32 = 4;
/// Statements in flight, those of cohorts apart left out. Two: while one runs, the next gathers.
const BATCHES_IN_FLIGHT_MAX: usize = 2;
/// Statements in flight in all: one more, for cohorts whose look-ups cost far more than the others'.
pub const STATEMENTS_IN_FLIGHT_MAX: usize = BATCHES_IN_FLIGHT_MAX + 1;
/// The part of the limit that one statement of a cohort apart may take.
const APART_PART: usize = 4;
/// A throttled device gets a slot not before a time drawn from here.
const THROTTLED_FOR: std::ops::RangeInclusive<Duration> = Duration::from_secs(5)..=Duration::from_secs(15);

/// An answer that waits to be fetched.
#[derive(Debug)]
enum Owed<R> {
    Answer {
        ticket: Ticket,
        waiter: Waiter,
        record: Option<R>,
    },
    Refuse {
        ticket: Ticket,
        waiter: Waiter,
        cause: Cause,
    },
}

/// Everything between "the rules have nothing against it" and "here is its record", for one node. `R` is what a look-up finds.
#[derive(Debug)]
pub struct Admission<R> {
    config: AdmissionConfig,
    slots: Slots,
    queue: Queue,
    limit: Limit,
    meter: Meter,
    reference: Reference,
    ceiling: Ceiling,
    breaker: Breaker,
    throttle: Throttle,
    costs: Costs,
    gather: Gather,
    /// Bounded by the devices that wait.
    owed: VecDeque<Owed<R>>,
    /// Devices that were answered, and whose credential was not judged yet. Bounded by the caller's connections.
    unjudged: BTreeMap<Ticket, Waiter>,
}

impl<R> Admission<R> {
    /// Look-ups go through from the start; where there was no contact with the registry yet, call
    /// [`handle_registry_absent`](Self::handle_registry_absent).
    #[must_use]
    pub fn new(config: AdmissionConfig, keys: SlotKeys, now: Instant) -> Self {
        Self {
            queue: Queue::new(Weights::new(&config.tenant_weights)),
            slots: Slots::new(&config, keys),
            limit: Limit::new(config.keys_in_flight_max, config.batch_keys_max, now),
            meter: Meter::default(),
            reference: Reference::new(config.lookups_per_second_max, now),
            ceiling: Ceiling::new(config.lookups_per_second_max, now),
            breaker: Breaker::new(now),
            throttle: Throttle::default(),
            costs: Costs::default(),
            gather: Gather::new(now),
            owed: VecDeque::new(),
            unjudged: BTreeMap::new(),
            config,
        }
    }

    /// A device wants to be looked up.
    pub fn attempt(&mut self, arrival: &Arrival<'_>, now: Instant, wall: WallTime, rng: &mut impl Rng) -> Decision {
        self.limit.seed(rng);
        let device = arrival.device;
        let standing = self.slots.standing(device, arrival.slot_token, now, wall);
        let claim = (device, arrival.proof);
        if self.throttle.is_throttled(claim, arrival.network, standing.is_due, now) {
            let at_least = draw(THROTTLED_FOR, rng);
            if standing.is_due {
                // Anybody can name the device at its slot. So this must not move the slot that is remembered.
                let hint = self.slots.hint_apart(device, &standing, at_least, (now, wall), rng);
                let cause = Cause::Throttle;
                return Decision::Refused(Refused { cause, hint });
            }
            return self.refuse(arrival, &standing, Cause::Throttle, at_least, (now, wall), rng);
        }
        if arrival.is_known_absent {
            self.throttle.begin(claim, arrival.network);
            self.throttle.end(claim, arrival.network, Verdict::Wrong, now);
            return Decision::KnownAbsent;
        }
        if !self.breaker.is_closed() {
            let at_least = self.breaker.floor(now, rng);
            return self.refuse(arrival, &standing, Cause::Breaker, at_least, (now, wall), rng);
        }
        match self.admit_to_queue(arrival, &standing, now) {
            Some(ticket) => {
                self.throttle.begin(claim, arrival.network);
                Decision::Queued(ticket)
            }
            None => self.refuse(arrival, &standing, Cause::QueueFull, HINT_MIN, (now, wall), rng),
        }
    }

    fn admit_to_queue(&mut self, arrival: &Arrival<'_>, standing: &Standing, now: Instant) -> Option<Ticket> {
        if self.queue.len() >= self.config.waiting_max {
            return None;
        }
        let device = arrival.device;
        let is_apart = self.costs.is_apart(arrival.cohort);
        let class = self.class_with_room(arrival, standing, now);
        let waiter = Waiter {
            device,
            proof: arrival.proof,
            network: arrival.network,
            cohort: arrival.cohort,
            standing: *standing,
            send_by: arrival.arrived + SEND_WITHIN,
            answer_by: arrival.arrived + ANSWER_WITHIN,
        };
        if self.queue.holds(device) {
            let joined = self.queue.join(waiter, class, is_apart)?;
            let cause = Cause::QueueFull;
            let refused = |(ticket, waiter)| Owed::Refuse { ticket, waiter, cause };
            self.owed.extend(joined.displaced.map(refused));
            return Some(joined.ticket);
        }
        let class = class.or_else(|| self.make_room(arrival, standing, now));
        class.map(|class| self.queue.enqueue(waiter, class, is_apart))
    }

    /// Where holders fill their line, a due device of a tenant with fewer of them takes the place of the longest tenant's newest.
    fn make_room(&mut self, arrival: &Arrival<'_>, standing: &Standing, now: Instant) -> Option<Class> {
        let is_entitled = standing.is_due && self.is_trusted(arrival, standing, now);
        if !is_entitled || self.costs.is_apart(arrival.cohort) {
            return None;
        }
        let gone = self.queue.make_room(Class::Holder, standing.tenant);
        let cause = Cause::QueueFull;
        let has_room = !gone.is_empty();
        let refused = |(ticket, waiter)| Owed::Refuse { ticket, waiter, cause };
        self.owed.extend(gone.into_iter().map(refused));
        has_room.then_some(Class::Holder)
    }

    fn is_trusted(&self, arrival: &Arrival<'_>, standing: &Standing, now: Instant) -> bool {
        standing.tenant.is_some() && !self.is_disputed(arrival, now)
    }

    fn is_disputed(&self, arrival: &Arrival<'_>, now: Instant) -> bool {
        let claim = (arrival.device, arrival.proof);
        self.throttle.is_disputed(claim, arrival.network, now)
    }

    /// The best class that the device may wait in, if any has room.
    fn class_with_room(&self, arrival: &Arrival<'_>, standing: &Standing, now: Instant) -> Option<Class> {
        let cohort = arrival.cohort;
        if self.costs.is_costly(cohort) {
            return self.class_apart(cohort, standing, now);
        }
        let on_trial = self.queue.apart_len(cohort);
        let reference = self.reference.keys_per_second(now);
        let holders_max = keys_in(HOLDERS_QUEUE, reference);
        let walk_ins_max = keys_in(WALK_INS_QUEUE, reference);
        let is_bounced = standing.slot.is_some_and(|slot| slot.bounces >= EXPRESS_BOUNCES);
        let len = |classes: &[Class]| self.queue.line_len(classes) + on_trial;
        let known = len(&[Class::Holder, Class::Express, Class::WalkIn]);
        let all = len(&Class::ALL);
        let first = |candidates: &[(bool, Class, bool)]| {
            let found = candidates
                .iter()
                .find(|(is_entitled, _, has_room)| *is_entitled && *has_room);
            found.map(|(_, class, _)| *class)
        };
        if self.is_trusted(arrival, standing, now) {
            let has_express_room = len(&[Class::Express]) < holders_max.div_ceil(EXPRESS_PART);
            first(&[
                (standing.is_due && is_bounced, Class::Express, has_express_room),
                (standing.is_due, Class::Holder, len(&[Class::Holder]) < holders_max),
                (true, Class::WalkIn, known < walk_ins_max),
            ])
        } else {
            // What holders leave, and at least their share: it must not end where holders fill their queue.
            let guaranteed = (holders_max as f64 * STRANGERS_SHARE).ceil();
            let has_room = (len(&[Class::StrangerHolder]) as f64) < guaranteed
                || len(&[Class::Holder, Class::StrangerHolder]) < holders_max;
            first(&[
                (standing.is_due, Class::StrangerHolder, has_room),
                (true, Class::StrangerWalkIn, all < walk_ins_max),
            ])
        }
    }

    /// The same for a cohort apart: its line is bounded in time by what its own look-ups cost.
    fn class_apart(&self, cohort: CohortTag, standing: &Standing, now: Instant) -> Option<Class> {
        let (rate, len) = (self.costs.rate(cohort, now), self.queue.apart_len(cohort));
        let (holder, walk_in) = match standing.tenant {
            Some(_) => (Class::Holder, Class::WalkIn),
            None => (Class::StrangerHolder, Class::StrangerWalkIn),
        };
        if standing.is_due && len < keys_in(HOLDERS_QUEUE, rate) {
            return Some(holder);
        }
        (len < keys_in(WALK_INS_QUEUE, rate)).then_some(walk_in)
    }

    fn refuse(
        &mut self,
        arrival: &Arrival<'_>,
        standing: &Standing,
        cause: Cause,
        at_least: Duration,
        times: (Instant, WallTime),
        rng: &mut impl Rng,
    ) -> Decision {
        let rate = self.reference.keys_per_second(times.0);
        let pace = self.costs.pace(arrival.cohort, rate, OVERBOOKING, times.0);
        let hint = self.slots.refuse(arrival.device, standing, at_least, pace, times, rng);
        Decision::Refused(Refused { cause, hint })
    }

    /// The device has gone. Unless its key is under way already, or others wait for it, it never reaches the database. Harmless where the
    /// device was refused, or its credential was judged.
    pub fn abandon(&mut self, ticket: Ticket, now: Instant) {
        let is_asked = self.queue.is_sent(ticket);
        match self.queue.leave(ticket) {
            Some(waiter) => {
                let verdict = if is_asked { Verdict::Left } else { Verdict::Open };
                self.end_attempt(&waiter, verdict, now);
            }
            None => self.judge(ticket, Verdict::Left, now),
        }
    }

    fn judge(&mut self, ticket: Ticket, verdict: Verdict, now: Instant) {
        if let Some(waiter) = self.unjudged.remove(&ticket) {
            self.end_attempt(&waiter, verdict, now);
        }
    }

    fn end_attempt(&mut self, waiter: &Waiter, verdict: Verdict, now: Instant) {
        let claim = (waiter.device, waiter.proof);
        self.throttle.end(claim, waiter.network, verdict, now);
    }

    fn refuse_all_waiting(&mut self) {
        let cause = Cause::Breaker;
        let waiting = self.queue.drain();
        self.owed.extend(
            waiting
                .into_iter()
                .map(|(ticket, waiter)| Owed::Refuse { ticket, waiter, cause }),
        );
    }

    /// There is no contact with the registry yet: everybody is refused at once.
    pub fn handle_registry_absent(&mut self, now: Instant) {
        if self.breaker.handle_absent(now) {
            self.refuse_all_waiting();
        }
    }

    /// The registry is there: once a few probes are answered, look-ups go through.
    pub fn handle_registry_present(&mut self, now: Instant) {
        self.breaker.handle_present(now);
    }

    /// Calls to the registry other than look-ups had no answer. Where no look-up was answered lately either, everybody is refused at once,
    /// until probes are answered.
    pub fn handle_registry_said_away(&mut self, now: Instant) {
        if self.breaker.handle_said_away(now) {
            self.refuse_all_waiting();
        }
    }

    /// Calls to the registry other than look-ups are answered.
    pub const fn handle_registry_said_there(&mut self) {
        self.breaker.handle_said_there();
    }

    /// The device was authenticated, and is let in. Its slot is used; it is no stranger from now on. `tenant` is the registry's.
    pub fn handle_admitted(&mut self, device: DeviceId, tenant: &str) {
        self.slots.handle_admitted(device, tenant);
    }

    /// The registry has the device with this tenant, whatever the roster says: it was registered, or changed.
    pub fn handle_tenant(&mut self, device: DeviceId, tenant: &str) {
        self.slots.handle_tenant(device, tenant);
    }

    /// The device has shown a token of ours which says that it is this tenant's, and which does not let it in any more: it is no stranger.
    pub fn handle_vouched(&mut self, device: DeviceId, tenant: &str) {
        self.slots.handle_vouched(device, tenant);
    }

    /// Who is registered, as far as is known.
    #[must_use]
    pub const fn roster(&self) -> &Arc<Roster> {
        self.slots.roster()
    }

    /// Who is registered: whoever is not, and was not seen authenticated, is a stranger. The roster of before, whose end takes a moment
    /// where it is large.
    pub fn set_roster(&mut self, roster: Arc<Roster>) -> Arc<Roster> {
        self.slots.set_roster(roster)
    }

    /// The credential of an answered device was right, whether or not it is let in.
    pub fn handle_right_credential(&mut self, ticket: Ticket, now: Instant) {
        self.judge(ticket, Verdict::Right, now);
    }

    /// An answered device was not authenticated: wrong credential, or no such device. What was wrong with one kind of proof counts
    /// against that kind alone.
    pub fn handle_wrong_credential(&mut self, ticket: Ticket, now: Instant) {
        self.judge(ticket, Verdict::Wrong, now);
    }

    /// The device was registered, or given another credential: it must not wait for its attempts before that.
    pub fn handle_registered(&mut self, device: DeviceId) {
        self.throttle.forgive(device);
    }

    /// Any number of devices were registered.
    pub fn handle_many_registered(&mut self) {
        self.throttle.forgive_all();
    }

    /// A slot for a device whose session is closed, not before `now + at_least`.
    pub fn slot_for_close(
        &mut self,
        device: DeviceId,
        at_least: Duration,
        now: Instant,
        wall: WallTime,
        rng: &mut impl Rng,
    ) -> Hint {
        self.slot_for_turned(device, None, at_least, (now, wall), rng)
    }

    /// A slot for a device that is not even queued, because this node has no room for it, not before `now + at_least`. Where the slot
    /// that it carries is still ahead it is given that again, and its seniority counts either way.
    pub fn slot_for_turned(
        &mut self,
        device: DeviceId,
        slot_token: Option<&str>,
        at_least: Duration,
        (now, wall): (Instant, WallTime),
        rng: &mut impl Rng,
    ) -> Hint {
        let standing = self.slots.standing(device, slot_token, now, wall);
        let rate = self.reference.keys_per_second(now);
        self.slots
            .refuse(device, &standing, at_least, Pace::Shared(rate), (now, wall), rng)
    }

    /// Whether a device was seen authenticated, or is registered as far as this node knows. Anybody may name its id.
    #[must_use]
    pub fn is_known(&self, device: DeviceId, slot_token: Option<&str>, now: Instant, wall: WallTime) -> bool {
        self.slots.standing(device, slot_token, now, wall).tenant.is_some()
    }

    /// Whether a device shows by a token of ours that it comes at its slot: then how often others come from where it is doesn't matter.
    #[must_use]
    pub fn is_at_its_slot(
        &self,
        device: DeviceId,
        slot_token: &str,
        network: Network,
        now: Instant,
        wall: WallTime,
    ) -> bool {
        // Whoever would be throttled all the same gains nothing, and could come as often as it likes.
        let is_throttled = self.throttle.is_throttled((device, Proof::Secret), network, true, now);
        !is_throttled && self.slots.shows_due(device, slot_token, now, wall)
    }

    /// Cohorts whose look-ups are sent apart, because they cost far more than the others'.
    pub fn costly(&self) -> impl Iterator<Item = Costly> {
        self.costs.costly()
    }

    /// The plan guard found, or no longer finds, a look-up that reads a whole table: the limit is cut to 2.
    pub fn set_limit_cut(&mut self, is_cut: bool, now: Instant) {
        self.limit.set_cut(is_cut, now);
    }

    /// The best rate of an earlier life, in keys a second, to give slots out by until one is measured.
    /// A figure that is no rate counts as none.
    pub fn set_last_known_good(&mut self, keys_per_second: f64) {
        self.reference.set_last_known_good(keys_per_second);
    }

    /// To be called once a minute: the best rate measured lately becomes the last known good. The figure to keep for
    /// [`set_last_known_good`](Self::set_last_known_good) in the next life, if there is news.
    pub fn take_last_known_good(&mut self, now: Instant) -> Option<f64> {
        self.reference.take_last_known_good(now)
    }

    /// Time has passed: devices whose deadline is over are refused.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some((id, _)) = self.lost_statement().filter(|(_, lost_at)| *lost_at <= now) {
            self.handle_failed(id, BatchFailure::TimedOut, now);
        }
        while let Some((ticket, waiter, late)) = self.queue.pop_late(now) {
            let cause = match late {
                Late::NotSent => Cause::Deadline,
                Late::NotAnswered => Cause::LookupTimedOut,
            };
            self.owed.push_back(Owed::Refuse { ticket, waiter, cause });
        }
        let moved = self.costs.handle_timeout(now);
        self.follow(moved);
    }

    /// The statement that is lost first, and when.
    fn lost_statement(&self) -> Option<(BatchId, Instant)> {
        let (id, sent_at) = self.queue.oldest_statement()?;
        Some((id, sent_at + STATEMENT_LOST_AFTER))
    }

    /// When to call [`poll_batch`](Self::poll_batch) and [`poll_action`](Self::poll_action) next, if nothing else happens.
    #[must_use]
    pub fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        let free = self.free_keys();
        let may_send = free > 0 && self.queue.has_unsent();
        let gathered = self.gathering_until(self.share().min(free), now);
        let allowed = self.ceiling.blocked_until();
        [
            Some(now).filter(|_| !self.owed.is_empty()),
            self.lost_statement().map(|(_, lost_at)| lost_at),
            self.queue.next_deadline(),
            self.breaker.poll_timeout().filter(|_| free > 0),
            gathered.or(allowed).filter(|_| may_send),
            self.next_apart_at(now),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// The next thing owed to a device. Call until `None`, after every other call.
    pub fn poll_action(&mut self, now: Instant, wall: WallTime, rng: &mut impl Rng) -> Option<Action<R>> {
        match self.owed.pop_front()? {
            Owed::Answer { ticket, waiter, record } => {
                let device = waiter.device;
                self.unjudged.insert(ticket, waiter);
                Some(Action::Answer { ticket, device, record })
            }
            Owed::Refuse { ticket, waiter, cause } => {
                self.end_attempt(&waiter, Verdict::Open, now);
                let at_least = self.breaker.floor(now, rng).max(HINT_MIN);
                let at_least = if cause == Cause::LookupUntold {
                    at_least.max(untold_for(&waiter.standing, rng))
                } else {
                    at_least
                };
                let rate = self.reference.keys_per_second(now);
                let pace = self.costs.pace(waiter.cohort, rate, OVERBOOKING, now);
                let hint = self
                    .slots
                    .refuse(waiter.device, &waiter.standing, at_least, pace, (now, wall), rng);
                let refused = Refused { cause, hint };
                Some(Action::Refuse { ticket, refused })
            }
        }
    }

    /// Figures for people and metrics.
    #[must_use]
    pub fn state(&self, now: Instant) -> AdmissionState {
        let in_flight = to_u32(self.queue.in_flight());
        AdmissionState {
            limit: to_u32(self.keys_max()).max(in_flight),
            in_flight,
            queue: self.queue.len(),
            k_ref: self.reference.keys_per_second(now),
            k_peak: self.reference.peak(now),
            k_last_known_good: self.reference.last_known_good(),
            limit_ceiling: self.limit.ceiling(),
            limit_reason: self.limit.reason(),
            is_ceiling_too_low: self.queue.has_unsent() && self.limit.is_ceiling_too_low(now),
            elasticity: self.limit.elasticity(),
            rate: self.meter.rate(),
            took_p90: self.meter.took_p90(),
            breaker: self.breaker.state(),
            slots: self.slots.remembered(),
            slots_stateless: self.slots.stateless(),
            known: self.slots.known(),
            cohorts_apart: self.costs.costly().count(),
        }
    }
}

fn untold_for(standing: &Standing, rng: &mut impl Rng) -> Duration {
    let bounces = standing.slot.map_or(0, |slot| u32::from(slot.bounces));
    draw(UNTOLD_FOR, rng) * (1 << bounces.min(UNTOLD_DOUBLINGS_MAX))
}

/// Keys answered in `span` at `rate` a second; at least one, or a slow registry would let nobody in.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positive, and a float too large saturates"
)]
fn keys_in(span: Duration, rate: f64) -> usize {
    ((span.as_secs_f64() * rate) as usize).max(1)
}

fn to_usize(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn to_u32(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
