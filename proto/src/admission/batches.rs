//! The statements of admission: which one may be sent, and what follows from its end.

use super::{
    Admission, BATCHES_IN_FLIGHT_MAX, Batch, BatchFailure, BatchId, Cause, ISOLATED_PART, Told,
    cost::{CohortTag, Transition},
    queue::{Kind, Sent},
    to_usize,
};
use crate::{id::DeviceId, time::Instant};

impl<R: Clone, W> Admission<R, W> {
    /// The next statement, if one may be sent now.
    pub(super) fn next_batch(&mut self, now: Instant) -> Option<Batch> {
        if !self.breaker.is_closed() {
            let may_probe = self.free_keys() > 0 && self.breaker.take_probe(now);
            return may_probe.then(|| self.queue.probe(now));
        }
        if let Some(batch) = self.next_isolated_batch(now) {
            return Some(batch);
        }
        let free = self.free_keys();
        if free == 0 {
            return None;
        }
        let keys_max = self.share().min(free);
        let has_unsent = self.queue.has_unsent();
        let is_lingering = has_unsent && self.lingering_until(keys_max, now).is_some();
        if !has_unsent || (is_lingering && self.ceiling.blocked_until().is_none()) {
            self.meter.handle_idle(now);
        } else {
            self.meter.handle_busy(now);
        }
        if !has_unsent || is_lingering {
            return None;
        }
        let allowed = self.ceiling.take(self.queue.next_len().min(keys_max), now);
        let batch = self.queue.next_batch(allowed, now)?;
        self.linger.handle_sent(batch.keys.len(), now);
        let probe = self.limit.handle_sent(batch.keys.len(), self.queue.shared_in_flight());
        self.queue.set_probe(batch.id, probe);
        Some(batch)
    }

    /// Maximum number of keys in one statement: half of the limit, so that one can fill while the other runs. At the
    /// ceiling per second a second statement would gain nothing, and one may have the whole limit.
    pub(super) fn share(&self) -> usize {
        let limit = to_usize(self.limit.keys());
        let share = if self.ceiling.is_reached() {
            limit
        } else {
            limit.div_ceil(BATCHES_IN_FLIGHT_MAX)
        };
        share.min(to_usize(self.config.batch_keys_max))
    }

    /// Time until which the next statement waits for more keys, if it does.
    pub(super) fn lingering_until(&self, keys_max: usize, now: Instant) -> Option<Instant> {
        let is_at_ceiling = self.ceiling.blocked_until().is_some();
        let is_full = self.queue.unsent() >= keys_max;
        if is_full || self.queue.has_retries() {
            return None;
        }
        Some(self.linger.until(is_at_ceiling, now)).filter(|until| *until > now)
    }

    /// The next statement of an isolated cohort, beside those of the others: one at a time, of few keys.
    fn next_isolated_batch(&mut self, now: Instant) -> Option<Batch> {
        let cohort = self.next_isolated_cohort()?;
        let free = self.keys_max().saturating_sub(self.queue.in_flight());
        if self.queue.isolated_in_flight() > 0 || free == 0 || now < self.costs.idle_until(cohort) {
            return None;
        }
        let keys_max = self.isolated_keys().min(free);
        let allowed = self.ceiling.take(self.queue.isolated_len(cohort).min(keys_max), now);
        self.queue.next_isolated_batch(cohort, allowed, now)
    }

    fn next_isolated_cohort(&self) -> Option<CohortTag> {
        let on_probation = self
            .costs
            .on_probation()
            .filter(|cohort| self.queue.isolated_len(*cohort) > 0);
        on_probation.or_else(|| self.queue.next_isolated())
    }

    /// Time at which the next statement of an isolated cohort may be sent, if it only waits for that.
    pub(super) fn next_isolated_at(&self, now: Instant) -> Option<Instant> {
        if self.queue.isolated_in_flight() > 0 || self.keys_max() <= self.queue.in_flight() {
            return None;
        }
        let idle_until = self.costs.idle_until(self.next_isolated_cohort()?);
        self.ceiling
            .blocked_until()
            .max(Some(idle_until).filter(|until| *until > now))
    }

    /// Number of keys of isolated cohorts that are in flight, or would be next.
    fn isolated_keys(&self) -> usize {
        let in_flight = self.queue.isolated_in_flight();
        match self.next_isolated_cohort() {
            Some(cohort) if in_flight == 0 => {
                let part = (to_usize(self.limit.keys()) / ISOLATED_PART).max(1);
                self.costs.keys_at_a_time(cohort).min(part)
            }
            Some(_) | None => in_flight,
        }
    }

    /// Maximum number of keys in flight: the limit, which is measured without isolated cohorts, plus their keys.
    pub(super) fn keys_max(&self) -> usize {
        to_usize(self.limit.keys())
            .saturating_add(self.isolated_keys())
            .min(to_usize(self.limit.bound()))
    }

    /// Number of keys that may be sent now in a shared statement, regardless of the ceiling per second.
    pub(super) fn free_keys(&self) -> usize {
        if self.queue.batches_in_flight() >= BATCHES_IN_FLIGHT_MAX {
            return 0;
        }
        let shared_max = self.keys_max().saturating_sub(self.isolated_keys());
        shared_max.saturating_sub(self.queue.shared_in_flight())
    }

    /// A statement ended. If it was answered, the function returns what the answer says about a key. It is called once
    /// for each key, whether a device still waits for it or not. A device without a reliable answer is refused with a
    /// slot. Does nothing if the statement had ended before.
    pub fn handle_batch_done(
        &mut self,
        id: BatchId,
        result: Result<impl FnMut(DeviceId) -> Told<R>, BatchFailure>,
        now: Instant,
    ) {
        self.settled_at = None;
        match result {
            Ok(told) => self.handle_answered(id, told, now),
            Err(failure) => self.handle_failed(id, failure, now),
        }
    }

    fn handle_answered(&mut self, id: BatchId, mut told: impl FnMut(DeviceId) -> Told<R>, now: Instant) {
        let Some(sent) = self.queue.take_sent(id) else {
            return;
        };
        if sent.kind == Kind::Probe {
            if self.breaker.handle_probed(true, now) {
                self.limit.handle_recovered(now);
                self.meter.handle_recovered();
            }
            return;
        }
        for device in &sent.keys {
            let outcome = match told(*device) {
                Told::Found(record) => Ok(Some(record)),
                Told::Absent => Ok(None),
                Told::Nothing => Err(Cause::LookupUntold),
            };
            let waiters = self.queue.take_waiters(&sent, *device);
            let outcomes = std::iter::repeat_n(outcome, waiters.len());
            self.pending.extend(waiters.into_iter().zip(outcomes));
        }
        self.breaker.handle_outcome(true, now);
        self.learn_cost(&sent, now);
        self.measure(&sent, true, now);
    }

    pub(super) fn handle_failed(&mut self, id: BatchId, failure: BatchFailure, now: Instant) {
        let Some(sent) = self.queue.take_sent(id) else {
            return;
        };
        if sent.kind == Kind::Probe {
            self.breaker.handle_probed(false, now);
            if self.breaker.is_suspected() {
                // Until then only other calls had reported the failure.
                self.limit.handle_outage(now);
            }
            return;
        }
        let (may_retry, cause) = match failure {
            BatchFailure::Failed => (self.breaker.is_closed(), Cause::LookupFailed),
            BatchFailure::TimedOut => (false, Cause::LookupTimedOut),
        };
        let (waiters, is_retried) = self.queue.handle_failed(&sent, may_retry, now);
        self.refuse_later(waiters, cause);
        // An isolated cohort is expected to be slow.
        let is_expected = sent.is_isolated() && failure == BatchFailure::TimedOut;
        // If it is retried, its halves show whether the cause was the database or a single key.
        if !is_retried && !is_expected && self.breaker.handle_outcome(false, now) {
            self.limit.handle_outage(now);
            self.refuse_all_waiting();
        }
        // A statement that failed at once says nothing about the cost of its keys.
        if failure == BatchFailure::TimedOut {
            self.learn_cost(&sent, now);
        }
        self.measure(&sent, false, now);
    }

    /// Adjusts the limit and the rates after a shared statement.
    fn measure(&mut self, sent: &Sent, is_answered: bool, now: Instant) {
        if sent.is_isolated() {
            return;
        }
        let took = now.saturating_since(sent.sent_at);
        self.limit
            .handle_ended(sent.probe, sent.keys.len(), is_answered, took, now);
        self.linger.handle_ended(took);
        let answered = if is_answered { sent.keys.len() } else { 0 };
        if let Some(window) = self.meter.handle_ended(answered, took, now)
            && window.is_backlogged
        {
            self.reference.handle_measured(window.rate(), now);
        }
    }

    fn learn_cost(&mut self, sent: &Sent, now: Instant) {
        let took = now.saturating_since(sent.sent_at);
        let transition = match sent.kind {
            Kind::Isolated(cohort) => self.costs.handle_isolated(cohort, &sent.cohorts, took, now),
            Kind::Shared { .. } | Kind::Probe => self.costs.handle_shared(&sent.cohorts, took, now),
        };
        self.follow(transition);
    }

    pub(super) fn follow(&mut self, transition: Option<Transition>) {
        match transition {
            Some(Transition::Isolated(cohort)) => self.queue.set_isolated(cohort, true),
            Some(Transition::Released(cohort)) => self.queue.set_isolated(cohort, false),
            None => {}
        }
    }
}
