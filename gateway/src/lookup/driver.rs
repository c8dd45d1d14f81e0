//! The connect machine behind its lock: passes events to it, and carries out its outputs.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rand::{SeedableRng as _, rngs::SmallRng};
use seawall_proto::{
    admission::{AdmissionConfig, BatchFailure, Registry, STATEMENTS_IN_FLIGHT_MAX, Ticket},
    connect::{self, Attempt, Conclusion, Conditions, Output, Row, Statement, Step},
    slots::SlotKeys,
    time::Instant,
};
use tokio::sync::{Notify, oneshot};

use super::Dependencies;
use crate::{
    runtime::clock::Clock,
    store::{self, DatabaseStatus, Store},
};

/// Maximum sleep of the deadline timer. Gauges that change with time are published at least this often.
const SLEEP_MAX: Duration = Duration::from_secs(1);
/// Minimum sleep. Work that is due but waits for a worker must not keep a core busy.
const SLEEP_MIN: Duration = Duration::from_millis(1);
/// Maximum number of devices answered while the lock is held. The deadline timer answers the rest in further parts.
const ANSWERS_AT_A_TIME: usize = 512;

/// Channel for the answer to a waiting connection.
type Answer = oneshot::Sender<Conclusion>;
type Connect = connect::Connect<Answer>;

/// State shared by all clones of a lookup service.
pub(super) struct Driver {
    core: Mutex<Core>,
    /// Notified when the registry lacks a device that it had when the registry index was read.
    pub(super) doubted: Notify,
    /// Notified when a statement is ready to be sent.
    work: Notify,
    /// Notified when the deadline timer must wake earlier.
    rearm: Notify,
    pub(super) clock: Clock,
    pub(super) dependencies: Dependencies,
    /// Whether any version is tested, so that sessions need to be reported.
    is_testing: AtomicBool,
}

/// State behind the mutex.
pub(super) struct Core {
    pub(super) connect: Connect,
    pub(super) rng: SmallRng,
    /// Statements that no worker has taken yet: at most [`STATEMENTS_IN_FLIGHT_MAX`].
    statements: VecDeque<Statement>,
    /// Time at which the deadline timer wakes.
    wakes: Instant,
}

pub(super) enum Entered {
    Concluded(Conclusion),
    Waiting(Waiting),
}

/// A device that waits for its lookup. If dropped before the answer, the device has left.
pub(super) struct Waiting {
    driver: Arc<Driver>,
    ticket: Option<Ticket>,
    answer: oneshot::Receiver<Conclusion>,
}

impl Waiting {
    /// `None` if the service ends first.
    pub(super) async fn answer(mut self) -> Option<Conclusion> {
        let conclusion = (&mut self.answer).await.ok()?;
        self.ticket = None;
        Some(conclusion)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.driver.change(|connect, now| connect.handle_gone(ticket, now));
        }
    }
}

impl Driver {
    pub(super) fn new(config: AdmissionConfig, keys: SlotKeys, clock: Clock, dependencies: Dependencies) -> Self {
        let now = clock.now();
        Self {
            core: Mutex::new(Core {
                connect: Connect::new(config, keys, now),
                rng: SmallRng::from_os_rng(),
                statements: VecDeque::new(),
                wakes: now,
            }),
            doubted: Notify::new(),
            work: Notify::new(),
            rearm: Notify::new(),
            clock,
            dependencies,
            is_testing: AtomicBool::new(false),
        }
    }

    /// Whether sessions need to be reported.
    pub(super) fn is_testing(&self) -> bool {
        self.is_testing.load(Ordering::Relaxed)
    }

    /// A panic while the lock was held is a bug that ends the gateway elsewhere. Waiting devices still get their
    /// answers meanwhile.
    pub(super) fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `decide` with the node's current conditions.
    fn by_conditions<T>(&self, decide: impl FnOnce(&Conditions<'_>) -> T) -> T {
        let Dependencies {
            resume,
            rules,
            departures,
            sessions,
            ..
        } = &self.dependencies;
        let rules = rules.current();
        resume.with_verifier(&self.clock, |verifier| {
            decide(&Conditions {
                rules: &rules,
                verifier,
                draining: departures.peers(),
                sessions: sessions.load(Ordering::Relaxed),
                now: self.clock.now(),
                wall: self.clock.wall(),
            })
        })
    }

    /// Acts on the machine under its lock. The conditions are read after the lock was taken: rules that were read
    /// before may be older than those that the machine knows.
    fn act<T>(&self, act: impl FnOnce(&mut Core, &Conditions<'_>) -> T) -> T {
        let core = &mut *self.lock();
        let acted = self.by_conditions(|conditions| act(core, conditions));
        self.note_testing(core);
        acted
    }

    /// To be called under the lock that a version may have come or gone under.
    pub(super) fn note_testing(&self, core: &Core) {
        self.is_testing
            .store(core.connect.proving().is_testing(), Ordering::Relaxed);
    }

    pub(super) fn enter(self: &Arc<Self>, attempt: Attempt<'_>) -> Entered {
        // Read before: the machine's lock is never taken while the conditions are held.
        let names_tenants = self.dependencies.rules.current().name_tenants();
        let known = || self.lock().connect.claimed_tenant(&attempt, self.clock.now());
        let known_tenant = names_tenants.then(known).flatten();
        let screening =
            self.by_conditions(|conditions| connect::screen(attempt, conditions, |_| known_tenant, &mut rand::rng()));
        if let Some(outcome) = screening.resume {
            self.dependencies.metrics.resumes.increment(outcome.as_str());
        }
        let screened = match screening.next {
            Ok(screened) => screened,
            Err(conclusion) => return Entered::Concluded(conclusion),
        };
        let mut receiver = None;
        let caller = || {
            let (sender, answer) = oneshot::channel();
            receiver = Some(answer);
            sender
        };
        let step = self.act(|core, conditions| {
            let step = core
                .connect
                .handle_screened(screened, caller, conditions, &mut core.rng);
            // A device that does not wait does not affect others. Most of a fleet resumes by token.
            if matches!(step, Step::Waiting(_)) {
                self.settle_and_rearm(core, conditions);
            }
            step
        });
        match (step, receiver) {
            (Step::Waiting(ticket), Some(answer)) => Entered::Waiting(Waiting {
                driver: Arc::clone(self),
                ticket: Some(ticket),
                answer,
            }),
            (Step::Concluded(conclusion), _) => {
                self.count(&conclusion);
                Entered::Concluded(conclusion)
            }
            (Step::Waiting(_), None) => unreachable!("a device that waits has a channel"),
        }
    }

    /// Changes the machine, and carries out its outputs.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Connect, Instant) -> T) -> T {
        self.act(|core, conditions| {
            let changed = change(&mut core.connect, conditions.now);
            self.settle_and_rearm(core, conditions);
            changed
        })
    }

    /// A statement ended.
    pub(super) fn handle_done(
        &self,
        statement: &Statement,
        found: Result<store::Answer, BatchFailure>,
        took: Duration,
    ) {
        let found = found.map(|answer| {
            let records = answer.records.into_iter().map(|record| (record.id, record));
            (records.collect::<BTreeMap<_, _>>(), answer.unreadable)
        });
        self.act(|core, conditions| {
            let now = conditions.now;
            match found {
                Ok((mut records, unreadable)) => {
                    let row = |device| match records.remove(&device) {
                        Some(record) => Row::Found(record),
                        None if unreadable.contains(&device) => Row::Unreadable,
                        None => Row::Missing,
                    };
                    core.connect.handle_answered(statement, row, took, now, &mut core.rng);
                }
                Err(failure) => core.connect.handle_failed(statement, failure, now),
            }
            self.settle_and_rearm(core, conditions);
        });
    }

    /// Carries out the outputs of the machine, and adjusts the deadline timer.
    fn settle_and_rearm(&self, core: &mut Core, conditions: &Conditions<'_>) {
        let wakes = self.settle(core, conditions);
        if wakes < core.wakes {
            core.wakes = wakes;
            self.rearm.notify_one();
        }
    }

    /// Carries out the outputs of the machine. Returns when the deadline timer must wake at the latest.
    fn settle(&self, core: &mut Core, conditions: &Conditions<'_>) -> Instant {
        let now = conditions.now;
        let mut answered = 0;
        let due = loop {
            match core.connect.poll_output(conditions, &mut core.rng) {
                Output::Send(statement) => {
                    if core.statements.len() >= STATEMENTS_IN_FLIGHT_MAX {
                        // The machine has given it up: no worker took it for seconds.
                        core.statements.pop_front();
                    }
                    core.statements.push_back(statement);
                    self.work.notify_one();
                }
                Output::Conclusion { caller, conclusion, .. } => {
                    self.count(&conclusion);
                    // A device that left at this moment needs no answer.
                    let _ = caller.send(conclusion);
                    answered += 1;
                    if answered == ANSWERS_AT_A_TIME {
                        break Some(now);
                    }
                }
                Output::CountRegistry => self.doubted.notify_one(),
                Output::Wait(due) => break due,
            }
        };
        self.publish(core, now);
        due.unwrap_or(Instant::FAR_FUTURE)
            .clamp(now + SLEEP_MIN, now + SLEEP_MAX)
    }

    fn count(&self, conclusion: &Conclusion) {
        if let Some(outcome) = conclusion.look_up.and_then(connect::LookUp::as_str) {
            self.dependencies.metrics.lookups.increment(outcome);
        }
    }

    /// Waits for the next statement to send.
    ///
    /// # Cancel safety
    /// It has taken none if dropped before it is ready.
    pub(super) async fn next_statement(&self) -> Statement {
        loop {
            let woken = self.work.notified();
            let next = {
                let statements = &mut self.lock().statements;
                let next = statements.pop_front();
                if !statements.is_empty() {
                    // Wakes another worker.
                    self.work.notify_one();
                }
                next
            };
            match next {
                Some(statement) => return statement,
                None => woken.await,
            }
        }
    }

    /// Wakes the machine at its deadlines. Never returns.
    pub(super) async fn keep_deadlines(&self) {
        loop {
            let rearmed = self.rearm.notified();
            let wakes = self.lock().wakes;
            tokio::select! {
                () = tokio::time::sleep_until(self.clock.deadline(wakes)) => {
                    self.act(|core, conditions| core.wakes = self.settle(core, conditions));
                }
                () = rearmed => {}
            }
        }
    }

    /// Reports the health of the database as seen by the gateway's other calls to the machine, as long as the store
    /// lives.
    pub(super) async fn follow_database(&self, store: &Store) {
        let mut found = store.subscribe();
        store.ready().await;
        self.report(Registry::Present);
        loop {
            match found.borrow_and_update().status {
                DatabaseStatus::Starting => {}
                DatabaseStatus::Available | DatabaseStatus::ReadOnly => self.report(Registry::Confirmed),
                DatabaseStatus::Away => self.report(Registry::Suspected),
            }
            if found.changed().await.is_err() {
                return;
            }
        }
    }

    fn report(&self, registry: Registry) {
        self.change(|connect, now| connect.handle_registry(registry, now));
    }

    /// Under the lock, so that no scrape sees more keys in flight than the limit.
    fn publish(&self, core: &Core, now: Instant) {
        let state = core.connect.state(now);
        let metrics = &self.dependencies.metrics;
        metrics.admission_limit.set(f64::from(state.limit));
        metrics.lookups_in_flight.set(f64::from(state.in_flight));
        metrics.admission_queue.set(state.queue as f64);
        metrics.lookup_cohorts_apart.set(state.cohorts_apart as f64);
    }
}
