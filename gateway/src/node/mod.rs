//! The parts of one gateway. Only connections, API calls and background tasks use [`State`]; a part gets its
//! dependencies when it is created. There are no globals, so several gateways can run in one process.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Duration,
};

use seawall_proto::{
    duplicates::{Duplicates, Found},
    id::DeviceId,
    presence::{known::Boot, observer::HEALTH_LAGGING},
    session::SessionLimits,
    slots::RegistryIndex,
    time::{Instant, WallTime},
};
use serde::Serialize;
use uuid::Uuid;

use crate::{
    edge::{
        proxy::Proxies,
        tls::{EXPIRY_NOTICE, Tls},
    },
    fleet::{
        alarms::Alarms,
        audit_journal::AuditJournal,
        breaker::CohortBreaker,
        cohorts::Cohorts,
        events::Events,
        faults::{Fault, Faults},
        history::History,
        panics::Panics,
        registered::Registered,
        registry::Registry,
        registry_index::Wanted,
        resume::Resume,
        rollouts::Rollouts,
        rules::{LOCAL_ALARM, LOST_ALARM, Rules, UNSUPPORTED_ALARM},
        settings::Settings,
        webhook::Webhook,
    },
    lookup::Lookups,
    metrics::Metrics,
    runtime::{clock::Clock, config::Config, memory::Memory},
    session::{
        departures::Departures, observer::ObserverClock, restricted::RestrictedSessions, sessions::Sessions,
        silence::Silence, socket::SocketLimits,
    },
    store::{DatabaseStatus, PlanReport, Store},
    tokens::Tokens,
};

pub mod presence;
pub mod preview;
pub mod rule_write;

/// The parts of a gateway.
pub struct State {
    /// The configuration of the start.
    pub config: Arc<Config>,
    /// The configuration as it was last read, for the few settings that a running node changes.
    pub settings: Settings,
    pub clock: Clock,
    /// Start time of this process.
    pub started: WallTime,
    /// This node's name in the API, logs and events.
    pub node: Arc<str>,
    /// Id of this run of the node, to tell it from earlier runs.
    pub run: Uuid,
    /// This run, as the ids of its sessions tell it.
    pub boot: Boot,
    /// Whether what the database has of presence was read. Until then a device that is not known may have been seen
    /// before.
    pub is_presence_restored: AtomicBool,
    pub store: Store,
    pub lookups: Lookups,
    pub resume: Arc<Resume>,
    pub registry_index_wanted: Wanted,
    /// Registered devices by tenant and model.
    pub registered: Registered,
    pub rules: Arc<Rules>,
    /// Audit records that wait for the database.
    pub audit_journal: Arc<AuditJournal>,
    /// Running staged changes of rules, with their evidence.
    pub rollouts: Rollouts,
    pub sessions: Sessions,
    /// The clock of pings and of silence.
    pub observer: Arc<ObserverClock>,
    /// Devices that left pings unanswered.
    pub silence: Silence,
    /// Devices so far that went offline by themselves, or became unknown.
    pub lost: AtomicU64,
    pub restricted: RestrictedSessions,
    pub cohorts: Cohorts,
    /// Finds a cohort whose devices fail.
    pub breaker: CohortBreaker,
    pub history: History,
    pub events: Arc<Events>,
    pub alarms: Arc<Alarms>,
    pub webhook: Arc<Webhook>,
    pub departures: Arc<Departures>,
    pub metrics: Arc<Metrics>,
    pub tokens: Tokens,
    pub tls: Tls,
    pub proxies: Arc<Proxies>,
    pub memory: Arc<Memory>,
    /// Faults of the database, its registry and the disk.
    pub faults: Faults,
    /// Whether the registry is believed.
    pub registry: Registry,
    /// Last report of the plan guard.
    pub plan: Plan,
    /// Panics so far.
    pub panics: Arc<Panics>,
    /// Ids that several devices seem to share.
    pub shared_ids: SharedIds,
    /// Limits of all sessions.
    pub session_limits: Arc<SessionLimits>,
    /// Limits of all sockets.
    pub socket_limits: Arc<SocketLimits>,
}

/// The state as tasks hold it.
pub type Shared = Arc<State>;

/// The last report of the plan guard.
#[derive(Debug, Default)]
pub struct Plan(Mutex<Option<PlanReport>>);

impl Plan {
    pub fn set(&self, report: PlanReport) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
    }

    #[must_use]
    pub fn get(&self) -> Option<PlanReport> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Counts sessions that replace each other.
#[derive(Debug, Default)]
pub struct SharedIds(Mutex<(Duplicates, Found)>);

impl SharedIds {
    /// A session of `device` was replaced by a newer one.
    pub fn handle_replaced(&self, device: DeviceId, now: Instant) {
        self.lock().0.handle_replaced(device, now);
    }

    /// Updates the duplicate ids. Returns the previous ones and the current ones.
    pub fn update(&self, now: Instant) -> (Found, Found) {
        let mut guard = self.lock();
        let found = guard.0.find(now);
        (std::mem::replace(&mut guard.1, found), found)
    }

    /// Result of the last update.
    #[must_use]
    pub fn found(&self) -> Found {
        self.lock().1
    }

    fn lock(&self) -> MutexGuard<'_, (Duplicates, Found)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answer of `/readyz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Readiness {
    /// Whether new devices should be sent here.
    pub ready: bool,
    /// Problems. Some of them do not make the node unready.
    pub reasons: Vec<&'static str>,
}

impl State {
    /// The node is ready from the first contact with rules, revocations and registry, unless it drains. The contact
    /// with the registry ends with the decision whether it is believed. Overload, an alarm, a registry that is not
    /// believed, or a database lost later never make the node unready: that would move the storm to other nodes.
    #[must_use]
    pub fn readiness(&self) -> Readiness {
        let mut reasons = Vec::new();
        let had_contact = self.lookups.had_contact()
            && self.rules.is_confirmed()
            && self.resume.had_contact()
            && self.registry.was_judged();
        if !had_contact {
            reasons.push("registry_not_reached_yet");
        }
        if self.departures.is_leaving() {
            reasons.push("draining");
        }
        let ready = reasons.is_empty();
        match self.store.state().status {
            DatabaseStatus::Away if had_contact => reasons.push("database_unavailable"),
            DatabaseStatus::ReadOnly => reasons.push("database_read_only"),
            DatabaseStatus::Starting | DatabaseStatus::Available | DatabaseStatus::Away => {}
        }
        if self.store.scarce_connections().is_some() {
            reasons.push("database_connections_scarce");
        }
        let lasting = Fault::ALL.into_iter().filter(|fault| self.faults.is_on(*fault));
        reasons.extend(lasting.map(Fault::as_str));
        if self.plan.get().is_some_and(|report| report.is_alarm()) {
            reasons.push("plan_alarm");
        }
        if !self.rules.current().unsupported().is_empty() {
            reasons.push(UNSUPPORTED_ALARM);
        }
        if !self.rules.lost().is_empty() || !self.rules.returned().is_empty() {
            reasons.push(LOST_ALARM);
        }
        if !self.rules.local().writes.is_empty() {
            reasons.push(LOCAL_ALARM);
        }
        if self.memory.is_full() {
            reasons.push("memory_short");
        }
        if self.shared_ids.found().count > 0 {
            reasons.push("duplicate_id");
        }
        if self.observer.health() >= HEALTH_LAGGING {
            reasons.push("node_lagging");
        }
        if self.silence.is_holding() {
            reasons.push("presence_group");
        }
        let of_fleet = ["presence_unknown", "presence_changes"];
        reasons.extend(of_fleet.into_iter().filter(|kind| self.alarms.is_active(kind)));
        if self.panics.has_panicked() {
            reasons.push("panic");
        }
        if self.panics.is_failing() {
            reasons.push("task_failed");
        }
        if self.tls.problem().is_some() {
            reasons.push("tls_files");
        }
        if self.is_certificate_ending() {
            reasons.push("certificate_expires");
        }
        if self.is_revocation_list_out_of_date() {
            reasons.push("revocation_list_out_of_date");
        }
        Readiness { ready, reasons }
    }

    /// Whether a certificate of a listener is valid for less than [`EXPIRY_NOTICE`].
    #[must_use]
    pub fn is_certificate_ending(&self) -> bool {
        let notice = self.clock.wall() + EXPIRY_NOTICE;
        self.tls.expires().is_some_and(|end| end < notice)
    }

    /// Whether a revocation list should have been replaced by a newer one.
    #[must_use]
    pub fn is_revocation_list_out_of_date(&self) -> bool {
        self.tls.lists_until().is_some_and(|until| until < self.clock.wall())
    }

    /// Age of the registry index; time since the start if there is none.
    #[must_use]
    pub fn registry_index_age(&self) -> Duration {
        let now = self.clock.now();
        if let Some(read) = self.registry.index_read() {
            return now.saturating_since(read.at);
        }
        // From the disk, or none. The wall clock is asked at the start alone: it may be set meanwhile.
        let registry_index = self.lookups.registry_index();
        let is_none = registry_index.as_of() == RegistryIndex::empty().as_of();
        let since = if is_none { self.started } else { registry_index.as_of() };
        self.started.saturating_since(since) + now.saturating_since(Instant::ZERO)
    }
}
