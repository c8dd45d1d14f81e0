//! What every part of one gateway shares. Built once by [`crate::serve`]; nothing in it is global, so several gateways run in one process.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use seawall_proto::{
    duplicates::{Duplicates, Found},
    id::DeviceId,
    session::SessionLimits,
    time::{Instant, WallTime},
};
use serde::Serialize;
use uuid::Uuid;

use crate::{
    alarms::{Alarms, NODE},
    clock::Clock,
    cohorts::Cohorts,
    config::Config,
    drain::Drain,
    events::{Body, Events},
    faults::{Fault, Faults},
    history::History,
    lookup::Gate,
    memory::Memory,
    metrics::Metrics,
    proxy::Proxies,
    registry::Registry,
    resume::Resume,
    roster::Wanted,
    rules::{LOST_ALARM, Rules, UNSUPPORTED_ALARM},
    sessions::Sessions,
    socket::SocketLimits,
    store::{DatabaseStatus, PlanReport, Store},
    supervise::Panics,
    tls::{EXPIRY_NOTICE, Tls},
    tokens::Tokens,
};

/// A gateway's parts.
pub struct State {
    pub config: Arc<Config>,
    pub clock: Clock,
    /// When this process started.
    pub started: WallTime,
    /// This node's name in the API, logs and events.
    pub node: String,
    /// This run of the node, where others tell it from those before.
    pub run: Uuid,
    pub store: Store,
    pub gate: Gate,
    pub resume: Arc<Resume>,
    pub roster_wanted: Wanted,
    pub rules: Arc<Rules>,
    pub sessions: Sessions,
    pub cohorts: Cohorts,
    pub history: History,
    pub events: Events,
    pub alarms: Alarms,
    pub drain: Drain,
    pub metrics: Arc<Metrics>,
    pub tokens: Tokens,
    pub tls: Tls,
    pub proxies: Proxies,
    pub memory: Arc<Memory>,
    /// What is wrong with the database, the registry in it and the disk.
    pub faults: Faults,
    /// Whether the registry is believed.
    pub registry: Registry,
    /// What the plan guard saw last.
    pub plan: Plan,
    /// What has panicked.
    pub panics: Panics,
    /// Ids that several devices seem to share.
    pub shared_ids: SharedIds,
    /// What all sessions have in common.
    pub session_limits: Arc<SessionLimits>,
    /// What all sockets have in common.
    pub socket_limits: Arc<SocketLimits>,
}

/// How tasks hold the state.
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

    /// Looks which ids are duplicates now; what was found before, and what is found.
    pub fn look(&self, now: Instant) -> (Found, Found) {
        let mut guard = self.lock();
        let found = guard.0.find(now);
        (std::mem::replace(&mut guard.1, found), found)
    }

    /// What the last look has found.
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
    /// New devices should be sent here.
    pub ready: bool,
    /// What is not as it should be; some of it does not make the node unready.
    pub reasons: Vec<&'static str>,
}

impl State {
    /// Ready from the first contact with rules and registry on, unless draining; a registry that has far fewer devices than this node knew
    /// at its start is no contact until a person says so. Never unready for overload, an alarm or a database lost
    /// later: that would move the storm to the other nodes.
    #[must_use]
    pub fn readiness(&self) -> Readiness {
        let mut reasons = Vec::new();
        let had_contact = self.store.is_ready() && self.rules.is_confirmed();
        if !had_contact {
            reasons.push("registry_not_reached_yet");
        }
        // One that is not believed from the start on may be another one: balancers send devices to other nodes.
        let is_suspect = had_contact && !self.gate.believes_absence() && !self.registry.was_believed();
        if is_suspect {
            reasons.push(Fault::RegistryShrunken.as_str());
        }
        if self.drain.is_on() {
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
        reasons.extend(
            lasting
                .filter(|fault| !(is_suspect && *fault == Fault::RegistryShrunken))
                .map(Fault::as_str),
        );
        if self.plan.get().is_some_and(|report| report.is_alarm()) {
            reasons.push("plan_alarm");
        }
        if !self.rules.current().unsupported().is_empty() {
            reasons.push(UNSUPPORTED_ALARM);
        }
        if !self.rules.lost().is_empty() || !self.rules.returned().is_empty() {
            reasons.push(LOST_ALARM);
        }
        if self.memory.is_full() {
            reasons.push("memory_short");
        }
        if self.shared_ids.found().count > 0 {
            reasons.push("duplicate_id");
        }
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

    /// Whether a certificate of ours has less than [`EXPIRY_NOTICE`] to go.
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

    /// Tells operators of something to look at, or of its end.
    pub fn alarm(&self, alarm: &'static str, raised: bool, detail: impl Into<String>) {
        self.alarm_about(alarm, NODE, raised, detail);
    }

    /// The same about a part of the node.
    pub fn alarm_about(&self, alarm: &'static str, subject: &str, raised: bool, detail: impl Into<String>) {
        let detail = detail.into();
        if raised {
            self.alarms.raise(alarm, subject, &detail, self.clock.wall());
        } else {
            self.alarms.end(alarm, subject);
        }
        if raised {
            tracing::error!(alarm, detail, "alarm raised");
        } else {
            tracing::info!(alarm, detail, "alarm ended");
        }
        self.events
            .notice(self.clock.wall(), Body::Alarm { alarm, raised, detail });
    }
}
