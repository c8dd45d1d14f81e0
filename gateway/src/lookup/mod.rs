//! The lookup service: connects `seawall_proto`'s connect machine to the database.
//!
//! Connection tasks wait here. Each [`worker`] sends statements in a separate task, so a device that disconnects drops
//! a channel and never a query. A deadline timer refuses devices that have waited too long. The machine is behind a
//! mutex that is held for a few microseconds at a time, and never across an `.await`.
//!
//! Start with [`Lookups`]. No policy is here.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use seawall_proto::{
    admission::{AdmissionConfig, AdmissionState, Costly, Registry, STATEMENTS_IN_FLIGHT_MAX},
    close::EndReason,
    connect::{Attempt, Conclusion},
    id::{CredentialTag, DeviceId, Network},
    proving::{Change, Member, Tested},
    refusal::{Hint, Refusal},
    slots::{RegistryIndex, SlotKeys, SlotsState},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

mod driver;
mod worker;

use self::driver::{Driver, Entered};
use crate::{
    fleet::{resume::Resume, rules::Rules},
    metrics::Metrics,
    runtime::{clock::Clock, lifecycle::Lifecycle},
    session::departures::Departures,
    store::{Store, StoredVersion, StoredVersions},
};

/// Dependencies of decisions, beside the registry.
pub struct Dependencies {
    pub metrics: Arc<Metrics>,
    pub resume: Arc<Resume>,
    pub rules: Arc<Rules>,
    pub departures: Arc<Departures>,
    /// Number of sessions of this node.
    pub sessions: Arc<AtomicUsize>,
}

/// Decides on connecting devices, and looks them up. Clones share one service.
#[derive(Clone)]
pub struct Lookups(Arc<Driver>);

impl Lookups {
    /// Starts the service and its tasks, which end with `life`. Until the store is ready, devices are refused with
    /// slots.
    #[must_use]
    pub fn start(
        config: AdmissionConfig,
        keys: SlotKeys,
        store: &Store,
        clock: Clock,
        dependencies: Dependencies,
        life: &Lifecycle,
    ) -> Self {
        let driver = Arc::new(Driver::new(config, keys, clock, dependencies));
        driver.change(|connect, now| {
            if !store.is_ready() {
                connect.handle_registry(Registry::Absent, now);
            }
        });
        for _ in 0..STATEMENTS_IN_FLIGHT_MAX {
            let worker = worker::run(Arc::clone(&driver), store.lookup_worker(), life.hard().clone());
            life.spawn("lookup worker", worker);
        }
        let until = |stop: &CancellationToken| stop.clone().cancelled_owned();
        let (timer, stopped) = (Arc::clone(&driver), until(life.hard()));
        life.spawn("lookup deadlines", async move {
            tokio::select! {
                () = timer.keep_deadlines() => {}
                () = stopped => {}
            }
        });
        let (contact, stopped, store) = (Arc::clone(&driver), until(life.hard()), store.clone());
        life.spawn("registry contact", async move {
            tokio::select! {
                () = contact.follow_database(&store) => {}
                () = stopped => {}
            }
        });
        Self(driver)
    }

    /// Decides on one device, from its hello to its answer, in under 3 s from its arrival. The rules in force are
    /// evaluated again while it waits and after its lookup.
    ///
    /// # Cancel safety
    /// Dropping the future removes the device from the queue. Its key is not sent, unless others wait for it or it is
    /// in flight.
    pub async fn connect(&self, attempt: Attempt<'_>) -> Conclusion {
        let device = attempt.device;
        match self.0.enter(attempt) {
            Entered::Concluded(conclusion) => conclusion,
            Entered::Waiting(waiting) => waiting.answer().await.unwrap_or_else(|| {
                Conclusion::refused(Refusal::registry_unavailable(
                    self.slot_for_close(device, Duration::ZERO),
                ))
            }),
        }
    }

    /// Gives a slot to a device whose session is closed, not before `at_least` from now.
    #[must_use]
    pub fn slot_for_close(&self, device: DeviceId, at_least: Duration) -> Hint {
        self.slot_for_rejected(device, None, at_least)
    }

    /// Gives a slot to a device that the node has no room for, and that may show one, not before `at_least` from now.
    #[must_use]
    pub fn slot_for_rejected(&self, device: DeviceId, slot_token: Option<&str>, at_least: Duration) -> Hint {
        let times = (self.0.clock.now(), self.0.clock.wall());
        let core = &mut *self.0.lock();
        core.connect
            .give_slot(device, slot_token, at_least, times, &mut core.rng)
    }

    /// Whether a device was seen authenticated, or is registered as far as this node knows.
    #[must_use]
    pub fn is_known(&self, device: DeviceId, slot_token: Option<&str>) -> bool {
        let (now, wall) = (self.0.clock.now(), self.0.clock.wall());
        self.0.lock().connect.slots().is_known(device, slot_token, now, wall)
    }

    /// Whether a device proves by a slot token that it returns at its slot.
    #[must_use]
    pub fn is_at_its_slot(&self, shown: (DeviceId, CredentialTag), slot_token: &str, network: Network) -> bool {
        let times = (self.0.clock.now(), self.0.clock.wall());
        let core = self.0.lock();
        core.connect.is_at_its_slot(shown, slot_token, network, times)
    }

    /// A device was registered, or changed: its remembered absence and attempts are forgotten.
    pub fn forget(&self, device: DeviceId) {
        self.0.lock().connect.handle_registered(device);
    }

    /// Many devices were registered.
    pub fn forget_all(&self) {
        self.0.lock().connect.handle_many_registered();
    }

    /// The registry has the device with this tenant, whatever the registry index says.
    pub fn learn(&self, device: DeviceId, tenant: &str) {
        self.0.lock().connect.handle_tenant(device, tenant);
    }

    /// The index of registered devices.
    #[must_use]
    pub fn registry_index(&self) -> Arc<RegistryIndex> {
        Arc::clone(self.0.lock().connect.slots().registry_index())
    }

    /// Sets the index of registered devices. Every other device is unknown until it is admitted.
    pub fn set_registry_index(&self, registry_index: Arc<RegistryIndex>) {
        let previous = self.0.lock().connect.set_registry_index(registry_index);
        // Outside the lock, because dropping a large index takes a moment.
        drop(previous);
    }

    /// Whether lookups have succeeded since the start. A connected store is not enough: until its first probes are
    /// answered, devices are refused.
    #[must_use]
    pub fn had_contact(&self) -> bool {
        self.0.lock().connect.had_contact()
    }

    /// Whether a device that the registry does not have is handled as not registered. Otherwise it is refused as one
    /// that cannot be verified now.
    #[must_use]
    pub fn believes_absence(&self) -> bool {
        self.0.lock().connect.believes_absence()
    }

    pub fn set_believes_absence(&self, is_believed: bool) {
        self.0.lock().connect.set_believes_absence(is_believed);
    }

    /// Waits until the registry lacks a device that it had when the registry index was read, since the last call.
    ///
    /// # Cancel safety
    /// Waiting changes nothing.
    pub async fn doubted(&self) {
        self.0.doubted.notified().await;
    }

    /// Number of the last doubt, which `seawall_proto::connect` counts.
    #[must_use]
    pub fn last_doubt(&self) -> u64 {
        self.0.lock().connect.doubts().last()
    }

    /// Whether devices of the registry index were missing, and no later count found the registry complete.
    #[must_use]
    pub fn has_open_doubts(&self) -> bool {
        self.0.lock().connect.doubts().are_open()
    }

    /// Records that a count which began after the doubt of this number found the registry complete: devices that were
    /// missing before are not registered.
    pub fn settle_doubts(&self, last: u64) {
        self.0.lock().connect.settle_doubts(last);
    }

    /// Changes the maximum rate of lookups, and the maximum number of keys in flight.
    pub fn set_bounds(&self, lookups_per_second_max: u32, keys_in_flight_max: u32) {
        self.0
            .change(|connect, now| connect.set_bounds(lookups_per_second_max, keys_in_flight_max, now));
    }

    /// The plan guard found, or no longer finds, a lookup that reads a whole table: the limit is cut to 2 keys.
    pub fn set_limit_cut(&self, is_cut: bool) {
        self.0.change(|connect, now| connect.set_limit_cut(is_cut, now));
    }

    /// Sets the best rate of a previous process, in keys per second. Slots are issued at this rate until one is
    /// measured.
    pub fn set_last_known_good(&self, keys_per_second: f64) {
        self.0.lock().connect.set_last_known_good(keys_per_second);
    }

    /// Returns the value for [`set_last_known_good`](Self::set_last_known_good) in the next process, if it is new. Call
    /// it once per minute.
    #[must_use]
    pub fn take_last_known_good(&self) -> Option<f64> {
        let now = self.0.clock.now();
        self.0.lock().connect.take_last_known_good(now)
    }

    /// Devices per second that can be readmitted; see [`Admission::k_ref`](seawall_proto::admission::Admission::k_ref).
    #[must_use]
    pub fn k_ref(&self) -> f64 {
        self.state().k_ref
    }

    /// Takes stored versions. Versions are limited from the first call on.
    pub fn handle_versions(&self, stored: &StoredVersions) {
        let now = self.0.clock.now();
        let mut core = self.0.lock();
        let proving = core.connect.proving_mut();
        for version in &stored.versions {
            proving.handle_stored(version.model.as_ref(), version.firmware.as_ref(), version.state, now);
        }
        proving.handle_loaded(stored.is_young);
        self.0.note_testing(&core);
    }

    /// Takes the state of a version that was stored.
    pub fn handle_version(&self, version: &StoredVersion) {
        let now = self.0.clock.now();
        let mut core = self.0.lock();
        let proving = core.connect.proving_mut();
        proving.handle_stored(version.model.as_ref(), version.firmware.as_ref(), version.state, now);
        self.0.note_testing(&core);
    }

    /// Looks at the evidence about unproven versions; once a second. Returns what changed.
    #[must_use]
    pub fn judge_versions(&self) -> Vec<Change> {
        let sessions = self.0.dependencies.sessions.load(Ordering::Relaxed);
        let now = self.0.clock.now();
        let mut core = self.0.lock();
        core.connect.handle_second(sessions, now);
        let proving = core.connect.proving_mut();
        let changes = std::iter::from_fn(|| proving.poll_change()).collect();
        self.0.note_testing(&core);
        changes
    }

    /// The versions under test, and the number of attempts refused for one so far.
    #[must_use]
    pub fn tested_versions(&self) -> (Vec<Tested>, u64) {
        let now = self.0.clock.now();
        let core = self.0.lock();
        let proving = core.connect.proving();
        (proving.tested(now).collect(), proving.refused())
    }

    /// A session began. Takes a lock only while a version is tested.
    pub fn handle_session_opened(&self, member: Member) {
        if self.0.is_testing() {
            let now = self.0.clock.now();
            self.0.lock().connect.proving_mut().handle_opened(member, now);
        }
    }

    /// The session that began at `opened_at` ended. `None`: the device never heard of it.
    pub fn handle_session_ended(&self, member: Member, opened_at: Instant, reason: Option<EndReason>) {
        if self.0.is_testing() {
            let now = self.0.clock.now();
            let mut core = self.0.lock();
            core.connect.proving_mut().handle_ended(member, opened_at, reason, now);
        }
    }

    /// Isolated cohorts, whose lookups cost far more than those of others.
    #[must_use]
    pub fn costly(&self) -> Vec<Costly> {
        self.0.lock().connect.costly().collect()
    }

    /// Figures of admission, for the API.
    #[must_use]
    pub fn state(&self) -> AdmissionState {
        self.0.lock().connect.state(self.0.clock.now())
    }

    /// Figures of slots, for the API.
    #[must_use]
    pub fn slots(&self) -> SlotsState {
        self.0.lock().connect.slots().state()
    }
}
