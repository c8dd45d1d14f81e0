//! Which devices may wait for a lookup, and in which class. docs/design/admission.md has the table.

use std::time::Duration;

use super::{
    ANSWER_WITHIN, Admission, Arrival, Cause, CohortTag, SEND_WITHIN, Ticket,
    queue::{Class, Waiter},
};
use crate::{
    slots::{Standing, UNKNOWN_SHARE},
    time::Instant,
};

/// Maximum length of the holders' queue, as the time in which the reference capacity answers it: as long as they
/// may wait. Further holders get a new slot at once.
const HOLDERS_QUEUE: Duration = SEND_WITHIN;
/// Minimum number of refusals of a device that is served by seniority.
const EXPRESS_REFUSALS: u8 = 3;
/// Part of the holders' maximum that these devices have in addition.
const EXPRESS_PART: usize = 4;
/// Maximum length of the queue of devices without a due slot, as the time in which the reference capacity answers it.
const WALK_INS_QUEUE: Duration = Duration::from_millis(100);

impl<R: Clone, W> Admission<R, W> {
    /// Queues a device, if there is room for it.
    pub(super) fn admit_to_queue(
        &mut self,
        arrival: &Arrival<'_>,
        kept: impl FnOnce() -> W,
        standing: &Standing,
        now: Instant,
    ) -> Option<Ticket> {
        if self.queue.len() >= self.config.waiting_max {
            return None;
        }
        let device = arrival.device;
        let is_isolated = self.costs.is_isolated(arrival.cohort);
        let class = self.class_with_room(arrival, standing, now);
        let waiter = || Waiter {
            device,
            proof: arrival.credential.proof(),
            network: arrival.network,
            cohort: arrival.cohort,
            standing: *standing,
            send_by: arrival.arrived + SEND_WITHIN,
            answer_by: arrival.arrived + ANSWER_WITHIN,
            kept: kept(),
        };
        if self.queue.holds(device) {
            let joined = self.queue.join(waiter(), class, is_isolated)?;
            self.refuse_later(joined.displaced, Cause::QueueFull);
            return Some(joined.ticket);
        }
        let class = class.or_else(|| self.make_room(arrival, standing, now));
        class.map(|class| self.queue.enqueue(waiter(), class, is_isolated))
    }

    /// Makes room for a due device whose class is full: the tenant with the most holders loses its newest, if the
    /// device's tenant has fewer.
    fn make_room(&mut self, arrival: &Arrival<'_>, standing: &Standing, now: Instant) -> Option<Class> {
        let is_entitled = standing.is_due && self.is_trusted(arrival, standing, now);
        if !is_entitled || self.costs.is_isolated(arrival.cohort) {
            return None;
        }
        let displaced = self.queue.make_room(Class::Holder, standing.tenant);
        let has_room = !displaced.is_empty();
        self.refuse_later(displaced, Cause::QueueFull);
        has_room.then_some(Class::Holder)
    }

    fn is_trusted(&self, arrival: &Arrival<'_>, standing: &Standing, now: Instant) -> bool {
        standing.tenant.is_some() && !self.is_disputed(arrival, now)
    }

    fn is_disputed(&self, arrival: &Arrival<'_>, now: Instant) -> bool {
        let claim = (arrival.device, arrival.credential.proof());
        self.throttle.is_disputed(claim, arrival.network, now)
    }

    /// Returns the best class that the device may wait in, if any has room.
    fn class_with_room(&self, arrival: &Arrival<'_>, standing: &Standing, now: Instant) -> Option<Class> {
        let cohort = arrival.cohort;
        if self.costs.is_costly(cohort) {
            return self.isolated_class(cohort, standing, now);
        }
        let on_probation = self.queue.isolated_len(cohort);
        let reference = self.reference.keys_per_second(now);
        let holders_max = keys_in(HOLDERS_QUEUE, reference);
        let walk_ins_max = keys_in(WALK_INS_QUEUE, reference);
        let is_often_refused = standing.slot.is_some_and(|slot| slot.refusals >= EXPRESS_REFUSALS);
        let len = |classes: &[Class]| self.queue.classes_len(classes) + on_probation;
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
                (standing.is_due && is_often_refused, Class::Express, has_express_room),
                (standing.is_due, Class::Holder, len(&[Class::Holder]) < holders_max),
                (true, Class::WalkIn, known < walk_ins_max),
            ])
        } else {
            // The room that holders leave, and at least a guaranteed share.
            let guaranteed = (holders_max as f64 * UNKNOWN_SHARE).ceil();
            let has_room = (len(&[Class::UnknownHolder]) as f64) < guaranteed
                || len(&[Class::Holder, Class::UnknownHolder]) < holders_max;
            first(&[
                (standing.is_due, Class::UnknownHolder, has_room),
                (true, Class::UnknownWalkIn, all < walk_ins_max),
            ])
        }
    }

    /// The same for an isolated cohort: its queue is bounded in time by the cost of its own lookups.
    fn isolated_class(&self, cohort: CohortTag, standing: &Standing, now: Instant) -> Option<Class> {
        let (rate, len) = (self.costs.rate(cohort, now), self.queue.isolated_len(cohort));
        let (holder, walk_in) = match standing.tenant {
            Some(_) => (Class::Holder, Class::WalkIn),
            None => (Class::UnknownHolder, Class::UnknownWalkIn),
        };
        if standing.is_due && len < keys_in(HOLDERS_QUEUE, rate) {
            return Some(holder);
        }
        (len < keys_in(WALK_INS_QUEUE, rate)).then_some(walk_in)
    }
}

/// Number of keys answered in `span` at `rate` keys per second. At least one, because a slow registry would otherwise
/// admit no device.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positive, and a float too large saturates"
)]
fn keys_in(span: Duration, rate: f64) -> usize {
    ((span.as_secs_f64() * rate) as usize).max(1)
}
