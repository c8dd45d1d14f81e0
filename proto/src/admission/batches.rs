//! Admission's other end: the statements that may be sent, and what becomes of them.

use super::{
    APART_PART, Admission, BATCHES_IN_FLIGHT_MAX, Batch, BatchFailure, BatchId, Cause, Owed, Told,
    cost::{CohortTag, Move, Statement},
    queue::{Ended, Ran},
    to_usize,
};
use crate::{id::DeviceId, time::Instant};

impl<R> Admission<R> {
    /// The next statement to send, if one may be sent now. Call until `None`, after every other call.
    pub fn poll_batch(&mut self, now: Instant) -> Option<Batch> {
        self.handle_timeout(now);
        if !self.breaker.is_closed() {
            let may_probe = self.free_keys() > 0 && self.breaker.take_probe(now);
            return may_probe.then(|| self.queue.probe(now));
        }
        if let Some(batch) = self.next_apart_batch(now) {
            return Some(batch);
        }
        let free = self.free_keys();
        if free == 0 {
            return None;
        }
        if !self.queue.has_unsent() {
            self.meter.handle_idle();
            return None;
        }
        let keys_max = self.share().min(free);
        if self.gathering_until(keys_max, now).is_some() {
            if self.ceiling.blocked_until().is_none() {
                self.meter.handle_idle();
            }
            return None;
        }
        let allowed = self.ceiling.take(self.queue.next_len().min(keys_max), now);
        let batch = self.queue.next_batch(allowed, now)?;
        self.gather.handle_sent(batch.keys.len(), now);
        self.limit
            .handle_sent(batch.id, batch.keys.len(), self.queue.shared_in_flight(), now);
        Some(batch)
    }

    /// Most keys in one statement: half of the limit, so that one can gather while the other runs, however small the limit.
    pub(super) fn share(&self) -> usize {
        let share = to_usize(self.limit.keys()).div_ceil(BATCHES_IN_FLIGHT_MAX);
        share.min(to_usize(self.config.batch_keys_max))
    }

    /// Until when the next statement waits for more keys than are there, if it does.
    pub(super) fn gathering_until(&self, keys_max: usize, now: Instant) -> Option<Instant> {
        let is_at_ceiling = self.ceiling.blocked_until().is_some();
        let is_full = self.queue.unsent() >= keys_max;
        if is_full || self.queue.has_retries() {
            return None;
        }
        Some(self.gather.until(is_at_ceiling, now)).filter(|until| *until > now)
    }

    /// The next statement of a cohort apart, beside those of the others: one at a time, of few keys.
    fn next_apart_batch(&mut self, now: Instant) -> Option<Batch> {
        let cohort = self.whose_turn_apart()?;
        let free = self.keys_max().saturating_sub(self.queue.in_flight());
        if self.queue.apart_in_flight() > 0 || free == 0 || now < self.costs.rests_until(cohort) {
            return None;
        }
        let keys_max = self.apart_keys().min(free);
        let allowed = self.ceiling.take(self.queue.apart_len(cohort).min(keys_max), now);
        self.queue.next_apart_batch(cohort, allowed, now)
    }

    fn whose_turn_apart(&self) -> Option<CohortTag> {
        let on_trial = self.costs.on_trial().filter(|cohort| self.queue.apart_len(*cohort) > 0);
        on_trial.or_else(|| self.queue.next_apart())
    }

    /// When the next statement of a cohort apart may be sent, if it waits for the time alone.
    pub(super) fn next_apart_at(&self, now: Instant) -> Option<Instant> {
        if self.queue.apart_in_flight() > 0 || self.keys_max() <= self.queue.in_flight() {
            return None;
        }
        let rested = self.costs.rests_until(self.whose_turn_apart()?);
        self.ceiling
            .blocked_until()
            .max(Some(rested).filter(|until| *until > now))
    }

    /// Keys of cohorts apart that are in flight, or would be next: what the others leave to them.
    fn apart_keys(&self) -> usize {
        let in_flight = self.queue.apart_in_flight();
        match self.whose_turn_apart() {
            Some(cohort) if in_flight == 0 => {
                let part = (to_usize(self.limit.keys()) / APART_PART).max(1);
                self.costs.keys_at_a_time(cohort).min(part)
            }
            Some(_) | None => in_flight,
        }
    }

    /// Keys that may be in flight in all: the limit, which is found for the others, and what is in flight beside them.
    pub(super) fn keys_max(&self) -> usize {
        to_usize(self.limit.keys())
            .saturating_add(self.apart_keys())
            .min(to_usize(self.limit.bound()))
    }

    /// Keys that may be sent now in a statement for all, the ceiling a second apart.
    pub(super) fn free_keys(&self) -> usize {
        if self.queue.batches_in_flight() >= BATCHES_IN_FLIGHT_MAX {
            return 0;
        }
        let shared_max = self.keys_max().saturating_sub(self.apart_keys());
        shared_max.saturating_sub(self.queue.shared_in_flight())
    }

    /// A statement ended. Where it was answered, the function gives what the answer says of a key, once for each device that waits for it. A
    /// device of which it says nothing can't be verified now: it is refused, with a slot. Harmless where the statement had ended before.
    pub fn handle_batch_done(
        &mut self,
        id: BatchId,
        result: Result<impl FnMut(DeviceId) -> Told<R>, BatchFailure>,
        now: Instant,
    ) {
        match result {
            Ok(told) => self.handle_answered(id, told, now),
            Err(failure) => self.handle_failed(id, failure, now),
        }
    }

    fn handle_answered(&mut self, id: BatchId, mut told: impl FnMut(DeviceId) -> Told<R>, now: Instant) {
        match self.queue.handle_answered(id) {
            Ended::Unknown => {}
            Ended::Probe => {
                if self.breaker.handle_probed(true, now) {
                    self.limit.handle_recovered(now);
                }
            }
            Ended::Ran { statement, waiters } => {
                for (ticket, device) in waiters {
                    let Some(waiter) = self.queue.finish(ticket) else {
                        continue;
                    };
                    let record = match told(device) {
                        Told::Found(record) => Some(record),
                        Told::Absent => None,
                        Told::Nothing => {
                            let cause = Cause::LookupUntold;
                            self.owed.push_back(Owed::Refuse { ticket, waiter, cause });
                            continue;
                        }
                    };
                    self.owed.push_back(Owed::Answer { ticket, waiter, record });
                }
                self.breaker.handle_outcome(true, now);
                self.learn_cost(&statement, now);
                self.measure(id, Some(statement.keys), now);
            }
        }
    }

    pub(super) fn handle_failed(&mut self, id: BatchId, failure: BatchFailure, now: Instant) {
        let (may_retry, cause) = match failure {
            BatchFailure::Failed => (self.breaker.is_closed(), Cause::LookupFailed),
            BatchFailure::TimedOut => (false, Cause::LookupTimedOut),
        };
        let (ended, is_retried) = self.queue.handle_failed(id, may_retry, now);
        match ended {
            Ended::Unknown => {}
            Ended::Probe => {
                self.breaker.handle_probed(false, now);
                if self.breaker.is_said_away() {
                    // Until now there was only the word of others.
                    self.limit.handle_outage(now);
                }
            }
            Ended::Ran { statement, waiters } => {
                for (ticket, _) in waiters {
                    if let Some(waiter) = self.queue.finish(ticket) {
                        self.owed.push_back(Owed::Refuse { ticket, waiter, cause });
                    }
                }
                // That a cohort apart is too slow is why it is apart.
                let is_expected = statement.apart.is_some() && failure == BatchFailure::TimedOut;
                // Its halves will tell whether it was the database or a single key.
                if !is_retried && !is_expected && self.breaker.handle_outcome(false, now) {
                    self.limit.handle_outage(now);
                    self.refuse_all_waiting();
                }
                // One that failed at once says nothing of its keys' cost.
                if failure == BatchFailure::TimedOut {
                    self.learn_cost(&statement, now);
                }
                self.measure(id, None, now);
            }
        }
    }

    /// Adjusts the limit and the rates after a statement; `answered` is the number of its keys where it was answered.
    fn measure(&mut self, id: BatchId, answered: Option<usize>, now: Instant) {
        let Some(took) = self.limit.handle_ended(id, answered.is_some(), now) else {
            return;
        };
        self.gather.handle_ended(took);
        if let Some(window) = self.meter.handle_ended(answered.unwrap_or(0), took, now)
            && window.is_backlogged
        {
            self.reference.handle_measured(window.rate(), now);
        }
    }

    fn learn_cost(&mut self, ran: &Ran, now: Instant) {
        let statement = Statement {
            cohorts: &ran.cohorts,
            took: now.saturating_since(ran.sent_at),
        };
        let moved = match ran.apart {
            Some(cohort) => self.costs.handle_apart(cohort, &statement, now),
            None => self.costs.handle_shared(&statement, now),
        };
        self.follow(moved);
    }

    pub(super) fn follow(&mut self, moved: Option<Move>) {
        match moved {
            Some(Move::Apart(cohort)) => self.queue.set_apart(cohort, true),
            Some(Move::Back(cohort)) => self.queue.set_apart(cohort, false),
            None => {}
        }
    }
}
