//! What every part of one gateway shares. Built once by [`crate::serve`]; nothing in it is global, so several gateways run in one process.

use std::sync::{Arc, Mutex, PoisonError};

use seawall_proto::{session::SessionLimits, time::WallTime};
use serde::Serialize;

use crate::{
    clock::Clock,
    cohorts::Cohorts,
    config::Config,
    drain::Drain,
    events::{Body, Events},
    history::History,
    lookup::Gate,
    metrics::Metrics,
    resume::Resume,
    rules::Rules,
    sessions::Sessions,
    store::{DatabaseStatus, PlanReport, Store},
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
    pub store: Store,
    pub gate: Gate,
    pub resume: Arc<Resume>,
    pub rules: Rules,
    pub sessions: Sessions,
    pub cohorts: Cohorts,
    pub history: History,
    pub events: Events,
    pub drain: Drain,
    pub metrics: Arc<Metrics>,
    pub tokens: Tokens,
    /// What the plan guard saw last.
    pub plan: Plan,
    /// What all sessions have in common.
    pub session_limits: Arc<SessionLimits>,
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

/// Answer of `/readyz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Readiness {
    /// New devices should be sent here.
    pub ready: bool,
    /// What is not as it should be; some of it does not make the node unready.
    pub reasons: Vec<&'static str>,
}

impl State {
    /// Ready from the first contact with rules and registry on, unless draining. Never unready for overload, a plan alarm or a database lost
    /// later: that would move the storm to the other nodes.
    #[must_use]
    pub fn readiness(&self) -> Readiness {
        let mut reasons = Vec::new();
        let had_contact = self.store.is_ready() && self.rules.is_confirmed();
        if !had_contact {
            reasons.push("registry_not_reached_yet");
        }
        if self.drain.is_on() {
            reasons.push("draining");
        }
        let ready = reasons.is_empty();
        if had_contact && self.store.state().status == DatabaseStatus::Away {
            reasons.push("database_unavailable");
        }
        if self.plan.get().is_some_and(|report| report.is_alarm()) {
            reasons.push("plan_alarm");
        }
        Readiness { ready, reasons }
    }

    /// Tells operators of something to look at, or of its end.
    pub fn alarm(&self, alarm: &'static str, raised: bool, detail: impl Into<String>) {
        let detail = detail.into();
        if raised {
            tracing::error!(alarm, detail, "alarm raised");
        } else {
            tracing::info!(alarm, detail, "alarm ended");
        }
        self.events
            .notice(self.clock.wall(), Body::Alarm { alarm, raised, detail });
    }
}
