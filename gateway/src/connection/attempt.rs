//! One attempt to connect, counted once: whatever comes of it, exactly one of the methods that take `self` is called.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use seawall_proto::{
    hello::Hello,
    id::{DeviceId, Label},
    refusal::{Limit, Refusal},
    time::Instant,
};

use super::arrive::Ended;
use crate::{
    cohorts::{Cohort, Cohorts, Outcome},
    metrics,
    state::Shared,
};

/// An attempt whose outcome is still open.
pub(super) struct Attempt {
    shared: Shared,
    peer: SocketAddr,
    begun_at: Instant,
    claims: Option<Claims>,
    unwinding: Unwinding,
}

/// Counts an attempt whose task panics: the sum of outcomes stays the number of attempts, and the device had no answer.
struct Unwinding(Shared);

impl Drop for Unwinding {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.metrics.connections.increment("request");
            self.0.metrics.handshakes.increment(Outcome::Abandoned.as_str());
        }
    }
}

/// What the device said of itself, for the record.
struct Claims {
    device: DeviceId,
    model: Option<Label>,
    firmware: Option<Label>,
    /// Of a device that is let in: authenticated, so that its cohort may be new.
    cohort: Option<Arc<Cohort>>,
    /// How long the database took to find it, if it was asked and did.
    lookup_took: Option<Duration>,
}

impl Claims {
    /// What it counts under: the cohort that it claims to be of, if authenticated devices made that one. Who names no model leaves that
    /// to the registry: then it is the one of its last session here, with whatever version.
    fn cohort(&self, cohorts: &Cohorts, last: Option<&Cohort>) -> Arc<Cohort> {
        if let Some(cohort) = &self.cohort {
            return Arc::clone(cohort);
        }
        let registered = || last.and_then(|cohort| cohort.model.as_deref());
        cohorts.known(self.model.as_deref().or_else(registered), self.firmware.as_deref())
    }
}

impl Attempt {
    pub(super) fn begin(shared: &Shared, peer: SocketAddr) -> Self {
        Self {
            shared: Arc::clone(shared),
            peer,
            begun_at: shared.clock.now(),
            claims: None,
            unwinding: Unwinding(Arc::clone(shared)),
        }
    }

    /// The hello was read: from here on the attempt is a device's.
    pub(super) fn by(mut self, hello: &Hello) -> Self {
        self.claims = Some(Claims {
            device: hello.device,
            model: hello.model.clone(),
            firmware: hello.firmware.clone(),
            cohort: None,
            lookup_took: None,
        });
        self
    }

    /// What the look-up cost, where there was one.
    pub(super) fn looked_up(&mut self, took: Option<Duration>) {
        if let Some(claims) = &mut self.claims {
            claims.lookup_took = took;
        }
    }

    pub(super) const fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Its balancer has said where it comes from.
    pub(super) const fn comes_from(&mut self, origin: SocketAddr) {
        self.peer = origin;
    }

    /// It was no attempt: `outcome` is what became of the connection, a label of `seawall_connections_total`.
    pub(super) fn never_began(self, outcome: &'static str) {
        self.shared.metrics.connections.increment(outcome);
    }

    /// It ended before it could be told anything. Where a limit was the reason, that counts.
    pub(super) fn ended_early(self, ended: Ended) {
        if let Some(limit) = ended.limit {
            self.shared.metrics.throttled.increment(limit.as_str());
        }
        self.never_began(ended.outcome);
    }

    /// It sent nothing, and is about to be told when to come back. No attempt, but its limit and its hint count.
    pub(super) fn refused_silent(self, outcome: &'static str, refusal: &Refusal) {
        self.note_refusal(refusal);
        self.never_began(outcome);
    }

    /// The device is upgraded. `cohort` is that of the authenticated device, which may be new.
    pub(super) fn admitted(mut self, cohort: Arc<Cohort>) {
        if let Some(claims) = &mut self.claims {
            claims.cohort = Some(cohort);
        }
        self.count(Outcome::Admitted);
    }

    /// The device is about to be told no.
    pub(super) fn refused(self, refusal: &Refusal) {
        self.note_refusal(refusal);
        if let Some(rule) = refusal.rule {
            self.shared.rules.count_refused(rule);
        }
        self.count(Outcome::Refused(refusal.code));
    }

    fn note_refusal(&self, refusal: &Refusal) {
        if let Some(hint) = &refusal.hint {
            let limit = refusal.limit.map_or(metrics::NO_LIMIT, Limit::as_str);
            self.shared.metrics.retry_hint_seconds.record([limit], hint.after);
        }
        if let Some(limit) = refusal.limit {
            self.shared.metrics.throttled.increment(limit.as_str());
        }
    }

    /// Counts the outcome in metrics, cohort and history, and logs it where somebody asked for that.
    pub(super) fn count(self, outcome: Outcome) {
        let Self {
            shared,
            peer,
            begun_at,
            claims,
            unwinding,
        } = self;
        // From here on it counts itself.
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
            Outcome::Abandoned | Outcome::Refused(_) => shared.history.refused(claims.device, wall, outcome),
        };
        let cohort = claims.cohort(&shared.cohorts, remembered.as_deref());
        cohort.attempted(outcome);
        if let Some(took) = claims.lookup_took {
            cohort.looked_up(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
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
