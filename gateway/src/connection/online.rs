//! A device's presence on this node, for as long as its session lives: registered at the beginning, taken back at the end.

use std::sync::Arc;

use crate::{
    events::Body,
    history::Identity,
    sessions::{Session, SessionInfo},
    state::Shared,
};

/// Holds a session registered. Ends it when it is dropped, so that no way out of a task leaves a dead session behind.
pub(super) struct Online {
    shared: Shared,
    session: Arc<Session>,
    /// A label of `seawall_closes_total`.
    reason: &'static str,
    /// Whether the device ever heard of it.
    is_session: bool,
}

impl Online {
    /// Makes this the one session of its device; an older one is told to close.
    pub(super) fn begin(shared: &Shared, info: SessionInfo) -> Self {
        let (since, opened_at) = (info.since, info.opened_at);
        let registered = shared.sessions.register(info, |registered| {
            let session = &registered.session;
            let identity = Identity {
                cohort: Arc::clone(&session.info.cohort),
                tenant: Arc::clone(&session.info.tenant),
            };
            if shared.history.came_online(session.info.device, identity, opened_at) {
                session.info.cohort.repeated();
            }
            if registered.replaced.is_none() {
                shared.events.notice(since, presence(session, "online", "connected"));
            }
        });
        if registered.replaced.is_some() {
            shared.metrics.replacements.increment(1);
            let now = shared.clock.now();
            shared.shared_ids.handle_replaced(registered.session.info.device, now);
        }
        let session = registered.session;
        shared.metrics.sessions.set(len_of(shared));
        Self {
            shared: Arc::clone(shared),
            session,
            reason: "shutdown",
            is_session: true,
        }
    }

    pub(super) const fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(super) const fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// The session was ordered to end, for this reason: it is the reason where the process ends first.
    pub(super) const fn set_order(&mut self, reason: &'static str) {
        self.reason = reason;
    }

    /// The reason that was given last.
    pub(super) const fn order(&self) -> &'static str {
        self.reason
    }

    /// The session ended, for this reason: a label of `seawall_closes_total`.
    pub(super) fn end(mut self, reason: &'static str) {
        self.reason = reason;
    }

    /// The device left before it was upgraded: there never was a session.
    pub(super) fn cancel(mut self) {
        self.reason = "client_gone";
        self.is_session = false;
    }
}

impl Drop for Online {
    fn drop(&mut self) {
        let shared = &self.shared;
        if std::thread::panicking() {
            self.reason = "failed";
        }
        if self.is_session {
            let duration = shared.clock.now().saturating_since(self.session.info.opened_at);
            shared.metrics.closes.increment(self.reason);
            shared.metrics.session_duration_seconds.record(duration);
        }
        // A session that was replaced says nothing about its device, which is online in the newer one.
        shared.sessions.unregister(&self.session, || {
            let (now, wall) = (shared.clock.now(), shared.clock.wall());
            let device = self.session.info.device;
            if self.session.is_deleted() {
                shared.history.forget(device);
            } else {
                shared.history.went_offline(device, (now, wall), self.reason);
            }
            shared
                .events
                .notice(wall, presence(&self.session, "offline", self.reason));
        });
        shared.metrics.sessions.set(len_of(shared));
    }
}

fn presence(session: &Session, state: &'static str, reason: &'static str) -> Body {
    Body::Presence {
        device: session.info.device,
        external_id: session.info.external_id.as_deref().cloned(),
        state,
        reason,
        cohort: Arc::clone(&session.info.cohort),
    }
}

#[expect(clippy::cast_precision_loss, reason = "a node holds far fewer than 2^52 sessions")]
fn len_of(shared: &Shared) -> f64 {
    shared.sessions.len() as f64
}
