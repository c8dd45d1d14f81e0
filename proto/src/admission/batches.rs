//! Admission's other end: the statements that may be sent, and what becomes of them.

use super::{
    APART_PART, Admission, BATCHES_IN_FLIGHT_MAX, Batch, BatchId, BatchOutcome, Cause, Owed,
    cost::{CohortTag, Move, Statement},
    queue::{Ended, Ran},
    to_usize,
};
use crate::{id::DeviceId, time::Instant};

impl Admission {
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

    /// A statement ended, and where it was answered, the answer says of every key whether it is registered.
    pub fn handle_batch_done(&mut self, id: BatchId, outcome: BatchOutcome, now: Instant) {
        self.handle_ended(id, outcome, |_| true, now);
    }

    /// A statement was answered. A device that the answer does not tell of can't be verified now: it is refused, with a slot.
    pub fn handle_batch_answered(&mut self, id: BatchId, is_told: impl Fn(DeviceId) -> bool, now: Instant) {
        self.handle_ended(id, BatchOutcome::Answered, is_told, now);
    }

    fn handle_ended(&mut self, id: BatchId, outcome: BatchOutcome, is_told: impl Fn(DeviceId) -> bool, now: Instant) {
        let is_answered = outcome == BatchOutcome::Answered;
        let ended = match outcome {
            BatchOutcome::Answered => self.queue.handle_answered(id),
            BatchOutcome::Failed => self.queue.handle_failed(id, self.breaker.is_closed(), now),
            BatchOutcome::TimedOut => self.queue.handle_failed(id, false, now),
        };
        let ran = match ended {
            Ended::Unknown => return,
            Ended::Probe => {
                if self.breaker.handle_probed(is_answered, now) {
                    self.limit.handle_recovered(now);
                } else if !is_answered && self.breaker.is_said_away() {
                    // Until now there was only the word of others.
                    self.limit.handle_outage(now);
                }
                return;
            }
            Ended::Answered { statement, waiters } => {
                for (ticket, device) in waiters {
                    let Some(waiter) = self.queue.finish(ticket) else {
                        continue;
                    };
                    let owed = if is_told(device) {
                        Owed::Answer { ticket, waiter }
                    } else {
                        let cause = Cause::LookupFailed;
                        Owed::Refuse { ticket, waiter, cause }
                    };
                    self.owed.push_back(owed);
                }
                self.breaker.handle_outcome(true, now);
                statement
            }
            Ended::Failed {
                statement,
                waiters,
                is_retried,
            } => {
                let cause = match outcome {
                    BatchOutcome::TimedOut => Cause::LookupTimedOut,
                    BatchOutcome::Failed | BatchOutcome::Answered => Cause::LookupFailed,
                };
                for ticket in waiters {
                    if let Some(waiter) = self.queue.finish(ticket) {
                        self.owed.push_back(Owed::Refuse { ticket, waiter, cause });
                    }
                }
                // That a cohort apart is too slow is why it is apart.
                let is_expected = statement.apart.is_some() && outcome == BatchOutcome::TimedOut;
                // Its halves will tell whether it was the database or a single key.
                if !is_retried && !is_expected && self.breaker.handle_outcome(false, now) {
                    self.limit.handle_outage(now);
                    self.refuse_all_waiting();
                }
                statement
            }
        };
        self.learn_cost(&ran, outcome, now);
        let Some(took) = self.limit.handle_ended(id, is_answered, now) else {
            return;
        };
        self.gather.handle_ended(took);
        let answered = if is_answered { ran.keys } else { 0 };
        if let Some(window) = self.meter.handle_ended(answered, took, now)
            && window.is_backlogged
        {
            self.reference.handle_measured(window.rate(), now);
        }
    }

    /// One that failed at once says nothing of its keys' cost.
    fn learn_cost(&mut self, ran: &Ran, outcome: BatchOutcome, now: Instant) {
        if outcome == BatchOutcome::Failed {
            return;
        }
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
