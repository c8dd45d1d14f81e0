//! The record of one attempt to connect, counted once: exactly one of the methods that take `self` is called.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use seawall_proto::{
    cohorts::{EventKind, Figure},
    connect::LookUp,
    hello::Hello,
    id::{DeviceId, Label, Network, RuleId},
    refusal::{Code, Limit, Refusal},
    time::Instant,
};

use super::Early;
use crate::{
    fleet::{
        breaker::Of,
        cohorts::{Cohort, Cohorts, Outcome},
        rules::hits::Hit,
    },
    metrics,
    node::Shared,
};

/// An attempt without an outcome so far.
pub(super) struct AttemptRecord {
    shared: Shared,
    peer: SocketAddr,
    begun_at: Instant,
    claims: Option<Claims>,
    unwinding: Unwinding,
}

/// Counts an attempt whose task panics: the sum of outcomes stays the number of attempts, and the device got no answer.
struct Unwinding(Shared);

impl Drop for Unwinding {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.metrics.connections.increment("request");
            self.0.metrics.handshakes.increment(Outcome::Abandoned.as_str());
        }
    }
}

/// The device's claims, for the record.
struct Claims {
    device: DeviceId,
    model: Option<Label>,
    firmware: Option<Label>,
    /// The cohort of an admitted device. It is authenticated, so its cohort may be new.
    cohort: Option<Arc<Cohort>>,
    /// Time in which the database found it, if it did, and the keys of the statement.
    lookup: Option<(Duration, u32)>,
}

impl Claims {
    /// The cohort to count it under: the claimed one, if authenticated devices have created it. A device that names no
    /// model leaves that to the registry: then the cohort of its last session here is used, with any version.
    fn cohort(&self, cohorts: &Cohorts, last: Option<&Cohort>) -> Arc<Cohort> {
        if let Some(cohort) = &self.cohort {
            return Arc::clone(cohort);
        }
        let registered = || last.and_then(|cohort| cohort.model.as_deref());
        cohorts.known(self.model.as_deref().or_else(registered), self.firmware.as_deref())
    }
}

impl AttemptRecord {
    pub(super) fn begin(shared: &Shared, peer: SocketAddr) -> Self {
        Self {
            shared: Arc::clone(shared),
            peer,
            begun_at: shared.clock.now(),
            claims: None,
            unwinding: Unwinding(Arc::clone(shared)),
        }
    }

    /// The hello was read: the attempt is now a device's.
    pub(super) fn is_by(&mut self, hello: &Hello) {
        if self.shared.rollouts.is_counting() {
            self.shared.rollouts.arrived(hello.device);
        }
        self.claims = Some(Claims {
            device: hello.device,
            model: hello.model.clone(),
            firmware: hello.firmware.clone(),
            cohort: None,
            lookup: None,
        });
    }

    /// A rule in dry-run mode would have applied to the device.
    pub(super) fn count_dry_run(&self, rule: RuleId) {
        self.shared.rules.count_dry_run(rule);
    }

    /// The device got a restricted session.
    pub(super) fn restricted(self, rule: RuleId) {
        self.shared.rules.count(rule, Hit::Restricted);
        self.count_for_rollout(rule);
        self.count(Outcome::Restricted);
    }

    /// The device was decided on. Records the work of its lookup, if there was one.
    pub(super) const fn was_looked_up(&mut self, look_up: Option<LookUp>) {
        if let (Some(claims), Some(LookUp::Found { took, keys })) = (&mut self.claims, look_up) {
            claims.lookup = Some((took, keys));
        }
    }

    pub(super) const fn peer(&self) -> SocketAddr {
        self.peer
    }

    pub(super) fn network(&self) -> Network {
        Network::from(self.peer.ip())
    }

    /// The load balancer has named the client's address.
    pub(super) const fn comes_from(&mut self, origin: SocketAddr) {
        self.peer = origin;
    }

    /// It was not a request. If a limit was the reason, that is counted as well.
    pub(super) fn ended_early(self, early: Early) {
        if let Some(limit) = early.limit {
            self.shared.metrics.throttled.increment(limit.as_str());
        }
        self.shared.metrics.connections.increment(early.outcome);
    }

    /// The device is upgraded. `cohort` is that of the authenticated device, which may be new.
    pub(super) fn admitted(mut self, cohort: Arc<Cohort>) {
        if let Some(claims) = &mut self.claims {
            claims.cohort = Some(cohort);
        }
        self.count(Outcome::Admitted);
    }

    /// The device is about to be refused.
    pub(super) fn refused(self, refusal: &Refusal) {
        self.note_refusal(refusal);
        if let Some(rule) = refusal.rule {
            let is_throttled = refusal.code == Code::Throttled;
            let hit = if is_throttled { Hit::Throttled } else { Hit::Refused };
            self.shared.rules.count(rule, hit);
            // A throttled device is expected to return at its time.
            if !is_throttled {
                self.count_for_rollout(rule);
            }
        }
        self.count(Outcome::Refused(refusal.code));
    }

    /// A rule has refused or restricted the device, which is evidence for a staged change of it.
    fn count_for_rollout(&self, rule: RuleId) {
        if let Some(claims) = &self.claims {
            let now = self.shared.clock.now();
            self.shared.rollouts.refused(rule, claims.device, now);
        }
    }

    /// The client is about to get a hint.
    pub(super) fn note_refusal(&self, refusal: &Refusal) {
        if let Some(hint) = &refusal.hint {
            let limit = refusal.limit.map_or(metrics::NO_LIMIT, Limit::as_str);
            self.shared.metrics.retry_hint_seconds.record([limit], hint.after);
        }
        if let Some(limit) = refusal.limit {
            self.shared.metrics.throttled.increment(limit.as_str());
        }
    }

    /// Counts the outcome in metrics, cohort and history, and logs it at DEBUG.
    pub(super) fn count(self, outcome: Outcome) {
        let Self {
            shared,
            peer,
            begun_at,
            claims,
            unwinding,
        } = self;
        // From here the outcome is counted below.
        drop(unwinding);
        let took = shared.clock.now().saturating_since(begun_at);
        shared.metrics.connections.increment("request");
        shared.metrics.handshakes.increment(outcome.as_str());
        shared.metrics.handshake_duration_seconds.record(took.as_secs_f64());
        let Some(claims) = claims else {
            tracing::debug!(outcome = outcome.as_str(), peer.addr = %peer, "connection attempt ended without a device id");
            return;
        };
        let wall = shared.clock.wall();
        let remembered = match outcome {
            Outcome::Admitted => {
                shared.history.admitted(claims.device, wall);
                None
            }
            Outcome::Restricted | Outcome::Abandoned | Outcome::Refused(_) => {
                shared.history.refused(claims.device, wall, outcome)
            }
        };
        let cohort = claims.cohort(&shared.cohorts, remembered.as_deref());
        cohort.attempted(outcome);
        if outcome == Outcome::Admitted {
            cohort.count(
                Figure::ConnectMicros,
                u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            );
        }
        // Only a device that was authenticated here before with this version is counted. Other claims are not verified,
        // and a client that knows a device id must not choose which version is blamed.
        let is_of_its_cohort = remembered.is_some_and(|last| last.tag() == cohort.tag());
        if outcome == Outcome::Refused(Code::Unauthorized) && is_of_its_cohort {
            cohort.count(Figure::Errors, 1);
            let of = Of {
                device: claims.device,
                address: peer.ip(),
                cohort: &cohort,
                tenant: None,
            };
            shared
                .breaker
                .handle_event(EventKind::Error, &of, false, shared.sessions.len());
        }
        if let Some((took, keys)) = claims.lookup {
            cohort.looked_up(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), keys);
        }
        tracing::debug!(
            outcome = outcome.as_str(),
            device.id = %claims.device,
            firmware.version = claims.firmware.as_deref(),
            peer.addr = %peer,
            duration_ms = took.as_millis(),
            "connection attempt ended"
        );
    }
}
