//! The gate: where `seawall_proto`'s admission meets the database.
//!
//! Connection tasks wait here; [`Workers`](worker) send what admission lets through, each statement in a task of its own, so
//! that a device which hangs up drops a channel and never a query. A keeper task minds deadlines. Admission is behind a mutex
//! that is held for a few microseconds at a time, and never across an `.await`.
//!
//! Start with [`Gate`]. No policy is here.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rand::{SeedableRng as _, rngs::SmallRng};
use seawall_proto::{
    admission::{
        AdmissionConfig, AdmissionState, Arrival, Cause, CohortTag, Costly, Refused, STATEMENTS_IN_FLIGHT_MAX,
    },
    handshake::{self, Admitted, Unproven},
    id::{DeviceId, Network},
    record::DeviceRecord,
    refusal::{Code, Hint, Refusal},
    resume::Generation,
    rules::OwnedSubject,
    slots::{Roster, SlotKeys},
    time::Instant,
};
use tokio::sync::Notify;

mod absent;
mod doubts;
mod inner;
mod worker;

use self::{
    absent::Absent,
    doubts::Doubts,
    inner::{Admission, Core, Entered, Inner, Waiting},
};
use crate::{clock::Clock, lifecycle::Lifecycle, metrics::Metrics, resume::Resume, rules::Rules, store::Store};

/// A device whose credential is wrong comes back not before this, while nobody is told that a device is not registered.
const UNBELIEVED_FOR: Duration = Duration::from_secs(10);

/// What a look-up came to.
#[derive(Clone, Debug)]
pub enum LookUp {
    /// The registry's record.
    Found(Found),
    /// There is no such device.
    Absent,
    /// It was not looked up: come back later.
    Refused(Refused),
    /// It was not looked up: a firmware rule that came into force while it waited refuses it.
    Blocked(Refusal),
}

/// What became of an unproven device.
#[derive(Debug)]
pub struct Concluded {
    pub result: Result<Admitted, Refusal>,
    /// How long the database took for the statement that found it; `None` where it was not found.
    pub took: Option<Duration>,
}

impl Concluded {
    /// Refused without a look-up.
    #[must_use]
    pub const fn refused(refusal: Refusal) -> Self {
        Self {
            result: Err(refusal),
            took: None,
        }
    }
}

/// A record, and what it cost.
#[derive(Clone, Debug)]
pub struct Found {
    pub record: Arc<DeviceRecord>,
    /// How long the database took for the statement.
    pub took: Duration,
    /// The revocations that were known before it was sent.
    pub as_of: Generation,
}

/// Parts of the gateway that a gate uses beside the registry.
pub struct Dependencies {
    pub metrics: Arc<Metrics>,
    pub resume: Arc<Resume>,
    pub rules: Arc<Rules>,
}

/// The way to the registry for connecting devices. Clones are the same gate.
#[derive(Clone)]
pub struct Gate(Arc<Inner>);

impl Gate {
    /// Starts the gate and its tasks, which end with `life`. Until the store was ready once, devices are refused with slots.
    #[must_use]
    pub fn start(
        config: AdmissionConfig,
        keys: SlotKeys,
        store: &Store,
        clock: Clock,
        dependencies: Dependencies,
        life: &Lifecycle,
    ) -> Self {
        let Dependencies { metrics, resume, rules } = dependencies;
        let now = clock.now();
        let mut admission = Admission::new(config, keys, now);
        if !store.is_ready() {
            admission.handle_registry_absent(now);
        }
        let gate = Self(Arc::new(Inner {
            core: Mutex::new(Core {
                admission,
                waiting: BTreeMap::new(),
                rng: SmallRng::from_os_rng(),
                keeper_wakes: now,
                screened_by: rules.current(),
                doubts: Doubts::default(),
            }),
            absent: Absent::new(),
            believes_absence: AtomicBool::new(true),
            doubted: Notify::new(),
            work: Notify::new(),
            rearm: Notify::new(),
            clock,
            metrics,
            resume,
            rules,
        }));
        gate.0.publish(&gate.0.lock(), now);
        for _ in 0..STATEMENTS_IN_FLIGHT_MAX {
            life.spawn(
                "lookup worker",
                worker::run(Arc::clone(&gate.0), store.lookup_worker(), life.hard().clone()),
            );
        }
        let (inner, hard) = (Arc::clone(&gate.0), life.hard().clone());
        life.spawn("lookup keeper", async move {
            tokio::select! {
                () = inner.keep() => {}
                () = hard.cancelled() => {}
            }
        });
        let (inner, hard, store) = (Arc::clone(&gate.0), life.hard().clone(), store.clone());
        life.spawn("registry contact", async move {
            tokio::select! {
                () = inner.heed(&store) => {}
                () = hard.cancelled() => {}
            }
        });
        gate
    }

    /// All that is between an unproven device and its session: throttles, admission, look-up, credential, rules by registry
    /// data. The rules in force are evaluated again while the device waits and after its look-up.
    ///
    /// # Cancel safety
    /// As for [`look_up`](Self::look_up).
    pub async fn admit(&self, unproven: Unproven, network: Network, arrived: Instant) -> Concluded {
        let device = unproven.device();
        let hello = unproven.hello();
        if let Some(tenant) = unproven.vouched() {
            self.0.lock().admission.handle_vouched(device, tenant);
        }
        let arrival = Arrival {
            device,
            cohort: CohortTag::of(hello.model.as_deref(), hello.firmware.as_deref()),
            slot_token: hello.slot.as_deref(),
            arrived,
            is_known_absent: false,
            proof: unproven.proof(),
            network,
        };
        let (waiting, answer) = self.ask(arrival, hello.owned_claims()).await;
        let found = match answer {
            LookUp::Found(found) => Some(found),
            LookUp::Absent => None,
            LookUp::Refused(refused) => return Concluded::refused(refused.into()),
            LookUp::Blocked(refusal) => return Concluded::refused(refusal),
        };
        let record = found.as_ref().map(|found| &*found.record);
        let as_of = found.as_ref().map(|found| found.as_of).unwrap_or_default();
        let rules = self.0.rules.current();
        let result = handshake::conclude(unproven, record, as_of, &rules, self.0.clock.wall(), &mut rand::rng());
        // Whose absence was known has been counted already.
        if let Some(waiting) = waiting {
            match &result {
                Ok(admitted) => waiting.handle_admitted(device, admitted.tenant()),
                Err(refusal) if refusal.code == Code::Unauthorized => waiting.handle_wrong_credential(),
                Err(_) => waiting.handle_right_credential(),
            }
        }
        let is_wrong = |refusal: &Refusal| refusal.code == Code::Unauthorized;
        let result = match result {
            // Who is not registered is told this now, and must not be told apart from who is.
            Err(refusal) if is_wrong(&refusal) && found.is_some() && !self.believes_absence() => Err(
                Refusal::registry_unavailable(self.slot_for_close(device, UNBELIEVED_FOR)),
            ),
            result => result,
        };
        Concluded {
            result,
            took: found.map(|found| found.took),
        }
    }

    /// Looks a device up, if admission lets it, and says nothing of its credential. The answer comes in under 3 s from the arrival.
    /// `claims` are screened again when other rules come into force while it waits. Whether the device is known to be absent is
    /// filled in here.
    ///
    /// # Cancel safety
    /// Dropping the future takes the device out of the queue; its key is not sent, unless others wait for it or it is under way.
    pub async fn look_up(&self, arrival: Arrival<'_>, claims: OwnedSubject) -> LookUp {
        self.ask(arrival, claims).await.1
    }

    /// The answer, with what keeps the attempt open until its credential is judged. There is none where nothing was asked.
    async fn ask(&self, mut arrival: Arrival<'_>, claims: OwnedSubject) -> (Option<Waiting>, LookUp) {
        arrival.is_known_absent = self.0.absent.contains(arrival.device);
        let (waiting, answer) = match self.0.enter(&arrival, claims) {
            Entered::Answered(answer) => return (None, answer),
            Entered::Waiting(waiting, answer) => (waiting, answer),
        };
        let answer = answer.await.unwrap_or_else(|_| {
            // The sender goes without a word only when the gate itself ends.
            LookUp::Refused(Refused {
                cause: Cause::Breaker,
                hint: self.slot_for_close(arrival.device, Duration::ZERO),
            })
        });
        (Some(waiting), answer)
    }

    /// The device was authenticated, and is let in. `tenant` is the registry's.
    pub fn handle_admitted(&self, device: DeviceId, tenant: &str) {
        self.0.lock().admission.handle_admitted(device, tenant);
    }

    /// A slot for a device whose session is closed, not before `at_least` from now.
    #[must_use]
    pub fn slot_for_close(&self, device: DeviceId, at_least: Duration) -> Hint {
        let (now, wall) = (self.0.clock.now(), self.0.clock.wall());
        let core = &mut *self.0.lock();
        core.admission
            .slot_for_close(device, at_least, now, wall, &mut core.rng)
    }

    /// A slot for a device that there is no room for, and that may carry one, not before `at_least` from now.
    #[must_use]
    pub fn slot_for_turned(&self, device: DeviceId, slot_token: Option<&str>, at_least: Duration) -> Hint {
        let times = (self.0.clock.now(), self.0.clock.wall());
        let core = &mut *self.0.lock();
        core.admission
            .slot_for_turned(device, slot_token, at_least, times, &mut core.rng)
    }

    /// Whether a device was seen authenticated, or is registered as far as this node knows.
    #[must_use]
    pub fn is_known(&self, device: DeviceId, slot_token: Option<&str>) -> bool {
        let (now, wall) = (self.0.clock.now(), self.0.clock.wall());
        self.0.lock().admission.is_known(device, slot_token, now, wall)
    }

    /// Whether a device shows by a token of ours that it comes at its slot.
    #[must_use]
    pub fn is_at_its_slot(&self, device: DeviceId, slot_token: &str, network: Network) -> bool {
        let (now, wall) = (self.0.clock.now(), self.0.clock.wall());
        self.0
            .lock()
            .admission
            .is_at_its_slot(device, slot_token, network, now, wall)
    }

    /// A device was registered, or changed: whatever is remembered of its absence and of its attempts no longer counts.
    pub fn forget(&self, device: DeviceId) {
        self.0.lock().admission.handle_registered(device);
        self.0.absent.forget(device);
    }

    /// The registry has the device with this tenant, whatever the roster says.
    pub fn learn(&self, device: DeviceId, tenant: &str) {
        self.0.lock().admission.handle_tenant(device, tenant);
    }

    /// Who is registered, as far as is known.
    #[must_use]
    pub fn roster(&self) -> Arc<Roster> {
        Arc::clone(self.0.lock().admission.roster())
    }

    /// Who is registered: everybody else is a stranger until let in.
    pub fn set_roster(&self, roster: Arc<Roster>) {
        // The lock is given back before the old one ends, which takes a moment where it is large.
        let _before = {
            let mut core = self.0.lock();
            core.doubts.clear();
            core.admission.set_roster(roster)
        };
    }

    /// Whether a device that the registry does not have is not registered; otherwise it is refused as one that can't be verified now.
    #[must_use]
    pub fn believes_absence(&self) -> bool {
        self.0.believes_absence()
    }

    /// Says it anew.
    pub fn set_believes_absence(&self, is_believed: bool) {
        self.0.believes_absence.store(is_believed, Ordering::Release);
        if !is_believed {
            // What was learnt shortly before may be wrong as well. After the store, or a look-up could learn something in between.
            self.0.absent.forget_all();
        }
    }

    /// Waits until the registry does not have a device that it had when the roster was read, since the last such wait.
    ///
    /// # Cancel safety
    /// Waiting changes nothing.
    pub async fn doubted(&self) {
        self.0.doubted.notified().await;
    }

    /// Number of the last time that a device of the roster was missed.
    #[must_use]
    pub fn last_doubt(&self) -> u64 {
        self.0.lock().doubts.last()
    }

    /// Whether devices of the roster were missed, and no later count has found the registry whole.
    #[must_use]
    pub fn has_open_doubts(&self) -> bool {
        self.0.lock().doubts.are_open()
    }

    /// A count that began after the doubt of this number has found the registry whole: devices that were missed before are not registered.
    pub fn settle_doubts(&self, last: u64) {
        self.0.lock().doubts.settle(last);
    }

    /// Many devices were registered.
    pub fn forget_all(&self) {
        self.0.lock().admission.handle_many_registered();
        self.0.absent.forget_all();
    }

    /// The plan guard found, or no longer finds, a look-up that reads a whole table: the limit is cut to 2 keys.
    pub fn set_limit_cut(&self, is_cut: bool) {
        let now = self.0.clock.now();
        let mut core = self.0.lock();
        core.admission.set_limit_cut(is_cut, now);
        self.0.publish(&core, now);
    }

    /// The best rate of an earlier life, in keys a second, to give slots out by until one is measured.
    pub fn set_last_known_good(&self, keys_per_second: f64) {
        self.0.lock().admission.set_last_known_good(keys_per_second);
    }

    /// To be called once a minute: the figure for [`set_last_known_good`](Self::set_last_known_good) in the next life, if there is news.
    #[must_use]
    pub fn take_last_known_good(&self) -> Option<f64> {
        let now = self.0.clock.now();
        self.0.lock().admission.take_last_known_good(now)
    }

    /// Devices a second that can be taken back, on what is known.
    #[must_use]
    pub fn k_ref(&self) -> f64 {
        self.state().k_ref
    }

    /// Cohorts that are looked up apart, because their look-ups cost far more than the others'.
    #[must_use]
    pub fn costly(&self) -> Vec<Costly> {
        self.0.lock().admission.costly().collect()
    }

    /// Figures for people.
    #[must_use]
    pub fn state(&self) -> AdmissionState {
        self.0.lock().admission.state(self.0.clock.now())
    }
}
