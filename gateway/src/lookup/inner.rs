//! Behind the gate's lock: admission, those who wait, and the keeper that minds their deadlines.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rand::rngs::SmallRng;
use seawall_proto::{
    admission::{Action, Arrival, Batch, BatchFailure, Cause, Decision, Ticket, Told},
    handshake,
    id::DeviceId,
    refusal::Refusal,
    resume::Generation,
    rules::{OwnedSubject, RuleSet},
    time::{Instant, WallTime},
};
use tokio::sync::{Notify, oneshot};

use super::{
    Found, LookUp,
    absent::{Absent, Epoch},
    doubts::Doubts,
};
use crate::{
    clock::Clock,
    metrics::Metrics,
    resume::Resume,
    rules::Rules,
    store::{self, DatabaseStatus, Store},
};

/// Longest sleep of the keeper: gauges that fade with time are published at least this often.
const KEEPER_SLEEP_MAX: Duration = Duration::from_secs(1);
/// Shortest: what is due but waits for a worker must not keep a core busy.
const KEEPER_SLEEP_MIN: Duration = Duration::from_millis(1);

/// What all clones of a gate share.
pub(super) struct Inner {
    pub(super) core: Mutex<Core>,
    pub(super) absent: Absent,
    /// What the registry does not have is not registered.
    pub(super) believes_absence: AtomicBool,
    /// The registry does not have a device that it had when the roster was read.
    pub(super) doubted: Notify,
    /// Something may be sent.
    pub(super) work: Notify,
    /// The keeper sleeps too long.
    pub(super) rearm: Notify,
    pub(super) clock: Clock,
    pub(super) metrics: Arc<Metrics>,
    pub(super) resume: Arc<Resume>,
    pub(super) rules: Arc<Rules>,
}

/// Most devices answered while the lock is held. The deadline timer answers the rest, one such part after another.
const ANSWERS_AT_A_TIME: usize = 512;

/// Admission whose look-ups find records.
pub(super) type Admission = seawall_proto::admission::Admission<Found>;

/// Behind the mutex.
pub(super) struct Core {
    pub(super) admission: Admission,
    /// Bounded by admission's `waiting_max`.
    pub(super) waiting: BTreeMap<Ticket, Waiter>,
    pub(super) rng: SmallRng,
    pub(super) keeper_wakes: Instant,
    /// The rules that nobody who waits is refused by.
    pub(super) screened_by: Arc<RuleSet>,
    pub(super) doubts: Doubts,
}

/// A device that waits for its look-up.
pub(super) struct Waiter {
    answer: oneshot::Sender<LookUp>,
    claims: OwnedSubject,
}

/// A statement, with what was known when it was sent.
pub(super) struct Sent {
    pub(super) batch: Batch,
    pub(super) epochs: Vec<Epoch>,
    pub(super) as_of: Generation,
}

pub(super) enum Entered {
    Answered(LookUp),
    Waiting(Waiting, oneshot::Receiver<LookUp>),
}

/// A device that waits, or was answered and whose credential is not judged yet. Dropped before that, it has gone.
pub(super) struct Waiting {
    gate: Arc<Inner>,
    ticket: Option<Ticket>,
}

impl Waiting {
    /// The device was answered, and let in as a device of this tenant.
    pub(super) fn handle_admitted(mut self, device: DeviceId, tenant: &str) {
        self.judge(|admission, ticket, now| {
            admission.handle_right_credential(ticket, now);
            admission.handle_admitted(device, tenant);
        });
    }

    /// The device was answered. Its credential was right, but it is refused for another reason.
    pub(super) fn handle_right_credential(mut self) {
        self.judge(Admission::handle_right_credential);
    }

    /// The device was answered, and not authenticated: wrong credential, or no such device.
    pub(super) fn handle_wrong_credential(mut self) {
        self.judge(Admission::handle_wrong_credential);
    }

    fn judge(&mut self, say: impl FnOnce(&mut Admission, Ticket, Instant)) {
        if let Some(ticket) = self.ticket.take() {
            let now = self.gate.clock.now();
            say(&mut self.gate.lock().admission, ticket, now);
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            let mut core = self.gate.lock();
            core.waiting.remove(&ticket);
            core.admission.abandon(ticket, self.gate.clock.now());
        }
    }
}

impl Inner {
    /// A panic while the lock was held is a bug that ends the gateway elsewhere; those who still wait get their answers meanwhile.
    pub(super) fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn enter(self: &Arc<Self>, arrival: &Arrival<'_>, claims: OwnedSubject) -> Entered {
        let (now, wall) = (self.clock.now(), self.clock.wall());
        let guard = &mut *self.lock();
        self.screen_waiting(guard, wall);
        // Rules may have come into force since its own screening.
        let claimed = claims.as_subject();
        if let Some(refusal) = handshake::screen_claims(&claimed, &guard.screened_by, wall, &mut guard.rng) {
            return Entered::Answered(LookUp::Blocked(refusal));
        }
        let entered = match guard.admission.attempt(arrival, now, wall, &mut guard.rng) {
            Decision::Queued(ticket) => {
                let (sender, answer) = oneshot::channel();
                guard.waiting.insert(ticket, Waiter { answer: sender, claims });
                self.work.notify_one();
                let waiting = Waiting {
                    gate: Arc::clone(self),
                    ticket: Some(ticket),
                };
                Entered::Waiting(waiting, answer)
            }
            Decision::Refused(refused) => Entered::Answered(LookUp::Refused(refused)),
            Decision::KnownAbsent => {
                self.metrics.lookups.increment("cached");
                Entered::Answered(LookUp::Absent)
            }
        };
        // It may have displaced others.
        self.answer_all(guard, now, wall);
        self.publish(guard, now);
        self.rearm_keeper(guard, now);
        entered
    }

    /// The next statement to send.
    pub(super) fn next_batch(&self) -> Option<Sent> {
        let (now, wall) = (self.clock.now(), self.clock.wall());
        let core = &mut *self.lock();
        self.screen_waiting(core, wall);
        let batch = core.admission.poll_batch(now);
        self.answer_all(core, now, wall);
        self.publish(core, now);
        self.rearm_keeper(core, now);
        let batch = batch?;
        let epochs = batch.keys.iter().map(|device| self.absent.epoch(*device)).collect();
        // There may be more, for the other worker.
        self.work.notify_one();
        let as_of = self.resume.known();
        Some(Sent { batch, epochs, as_of })
    }

    /// A statement ended.
    pub(super) fn handle_done(&self, sent: &Sent, found: Result<store::Answer, BatchFailure>, took: Duration) {
        let (now, wall) = (self.clock.now(), self.clock.wall());
        let core = &mut *self.lock();
        let id = sent.batch.id;
        match found {
            Ok(answer) => {
                let mut records = BTreeMap::new();
                for record in answer.records {
                    records.insert(record.id, Arc::new(record));
                }
                let is_absent = |device| !records.contains_key(&device) && !answer.unreadable.contains(&device);
                let believes_absence = self.believes_absence();
                let mut not_registered = BTreeSet::new();
                if !sent.batch.is_probe {
                    for (device, epoch) in sent.batch.keys.iter().zip(&sent.epochs) {
                        if is_absent(*device) && self.handle_absent(*device, *epoch, believes_absence, core) {
                            not_registered.insert(*device);
                        }
                    }
                }
                let told = |device| match records.get(&device) {
                    Some(record) => Told::Found(Found {
                        record: Arc::clone(record),
                        took,
                        as_of: sent.as_of,
                    }),
                    None if not_registered.contains(&device) => Told::Absent,
                    None => Told::Nothing,
                };
                core.admission.handle_batch_done(id, Ok(told), now);
            }
            Err(failure) => {
                core.admission.handle_batch_done(id, Err::<fn(_) -> _, _>(failure), now);
            }
        }
        self.answer_all(core, now, wall);
        self.publish(core, now);
        self.rearm_keeper(core, now);
        self.work.notify_one();
    }

    /// Whether a device that the registry does not have is not registered. Otherwise it can't be verified now.
    pub(super) fn believes_absence(&self) -> bool {
        self.believes_absence.load(Ordering::Acquire)
    }

    /// The registry answered, and does not have the device. Returns whether it is not registered: one of the roster may have been lost.
    fn handle_absent(&self, device: DeviceId, epoch: Epoch, believes_absence: bool, core: &mut Core) -> bool {
        let was_there = core.admission.roster().tenant_of(device).is_some();
        if was_there {
            self.doubted.notify_one();
        }
        let is_settled = !was_there || core.doubts.is_settled(device);
        let is_believed = believes_absence && is_settled;
        if is_believed {
            self.absent.learn(device, epoch, &mut core.rng);
        }
        is_believed
    }

    /// Answers the devices as admission says, at most [`ANSWERS_AT_A_TIME`]. What is left makes admission's next time-out due at once.
    fn answer_all(&self, core: &mut Core, now: Instant, wall: WallTime) {
        for _ in 0..ANSWERS_AT_A_TIME {
            let Some(action) = core.admission.poll_action(now, wall, &mut core.rng) else {
                return;
            };
            let (ticket, answer) = match action {
                Action::Answer { ticket, record, .. } => (ticket, record.map_or(LookUp::Absent, LookUp::Found)),
                Action::Refuse { ticket, refused } => (ticket, LookUp::Refused(refused)),
            };
            if let Some(outcome) = outcome_label(&answer) {
                self.metrics.lookups.increment(outcome);
            }
            match core.waiting.remove(&ticket) {
                // A device that went at this very moment needs no answer.
                Some(waiter) => drop(waiter.answer.send(answer)),
                None => core.admission.abandon(ticket, now),
            }
        }
    }

    /// Where other rules are in force than those who wait were screened by, takes those out of the queue that the new rules
    /// refuse: a blocked device costs no query, even when its rule came while it waited.
    fn screen_waiting(&self, core: &mut Core, wall: WallTime) {
        let rules = self.rules.current();
        if Arc::ptr_eq(&rules, &core.screened_by) {
            return;
        }
        let Core { waiting, rng, .. } = core;
        // Many devices wait, and few versions: each is evaluated once, and hints are drawn for the refused alone.
        let mut is_refused: BTreeMap<&OwnedSubject, bool> = BTreeMap::new();
        let mut refused: Vec<(Ticket, Refusal)> = Vec::new();
        for (ticket, waiter) in &*waiting {
            let mut screen = || handshake::screen_claims(&waiter.claims.as_subject(), &rules, wall, rng);
            let may_be_refused = match is_refused.entry(&waiter.claims) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(new) => *new.insert(screen().is_some()),
            };
            if may_be_refused && let Some(refusal) = screen() {
                refused.push((*ticket, refusal));
            }
        }
        core.screened_by = rules;
        for (ticket, refusal) in refused {
            core.admission.abandon(ticket, self.clock.now());
            if let Some(waiter) = core.waiting.remove(&ticket) {
                // A device that went at this very moment needs no answer.
                let _ = waiter.answer.send(LookUp::Blocked(refusal));
            }
        }
    }

    /// Wakes devices whose time is over, and workers when something may be sent that could not before.
    pub(super) async fn keep(&self) {
        loop {
            let rearmed = self.rearm.notified();
            let wake = {
                let (now, wall) = (self.clock.now(), self.clock.wall());
                let core = &mut *self.lock();
                self.screen_waiting(core, wall);
                core.admission.handle_timeout(now);
                self.answer_all(core, now, wall);
                self.publish(core, now);
                let (earliest, latest) = (now + KEEPER_SLEEP_MIN, now + KEEPER_SLEEP_MAX);
                let due = core.admission.poll_timeout(now).unwrap_or(latest);
                core.keeper_wakes = due.clamp(earliest, latest);
                core.keeper_wakes
            };
            tokio::select! {
                () = tokio::time::sleep_until(self.clock.deadline(wake)) => self.work.notify_one(),
                () = rearmed => {}
            }
        }
    }

    fn rearm_keeper(&self, core: &Core, now: Instant) {
        if core
            .admission
            .poll_timeout(now)
            .is_some_and(|due| due < core.keeper_wakes)
        {
            self.rearm.notify_one();
        }
    }

    /// Tells admission what the gateway's other calls find out about the database, for as long as the store lives.
    pub(super) async fn heed(&self, store: &Store) {
        let mut found = store.subscribe();
        store.ready().await;
        self.tell(Admission::handle_registry_present);
        loop {
            match found.borrow_and_update().status {
                DatabaseStatus::Starting => {}
                DatabaseStatus::Available | DatabaseStatus::ReadOnly => {
                    self.tell(|admission, _| admission.handle_registry_said_there())
                }
                DatabaseStatus::Away => self.tell(Admission::handle_registry_said_away),
            }
            if found.changed().await.is_err() {
                return;
            }
        }
    }

    fn tell(&self, news: impl FnOnce(&mut Admission, Instant)) {
        let (now, wall) = (self.clock.now(), self.clock.wall());
        let core = &mut *self.lock();
        news(&mut core.admission, now);
        self.answer_all(core, now, wall);
        self.publish(core, now);
        self.rearm_keeper(core, now);
        self.work.notify_one();
    }

    /// Under the lock, so that no scrape sees more keys in flight than the limit.
    pub(super) fn publish(&self, core: &Core, now: Instant) {
        let state = core.admission.state(now);
        self.metrics.admission_limit.set(f64::from(state.limit));
        self.metrics.lookups_in_flight.set(f64::from(state.in_flight));
        self.metrics.admission_queue.set(state.queue as f64);
        self.metrics.lookup_cohorts_apart.set(state.cohorts_apart as f64);
    }
}

/// Label of `seawall_lookups_total`; `None` where no key was sent for the device.
fn outcome_label(answer: &LookUp) -> Option<&'static str> {
    match answer {
        LookUp::Found(_) => Some("found"),
        LookUp::Absent => Some("not_found"),
        LookUp::Blocked(_) => None,
        LookUp::Refused(refused) => match refused.cause {
            Cause::LookupFailed | Cause::LookupUntold => Some("failed"),
            Cause::LookupTimedOut => Some("timed_out"),
            Cause::Throttle | Cause::QueueFull | Cause::Deadline | Cause::Breaker => None,
        },
    }
}
