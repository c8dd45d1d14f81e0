//! A device's presence on this node, for as long as its session lives: registered at the beginning, taken back at the
//! end.

use std::{sync::Arc, time::Duration};

use seawall_proto::{
    close::{EndReason, EndedBy},
    cohorts::{EventKind, Figure, Past},
    presence::Evidence,
    proving::Member,
    rules::Subject,
    time::Instant,
};

use crate::{
    fleet::{breaker::Of, rollouts::is_repeat},
    node::{Shared, presence::Ended},
    session::sessions::{Session, SessionInfo},
};

/// Holds a session registered. Ends it when it is dropped, so that no way out of a task leaves a dead session behind.
pub(super) struct Online {
    shared: Shared,
    session: Arc<Session>,
    /// A label of `seawall_closes_total`.
    reason: EndReason,
    has_ended: bool,
    /// Whether the device ever heard of it.
    is_session: bool,
    /// Whether the device's last session ended a short time ago. Only known where a rollout runs.
    is_repeat: bool,
}

impl Online {
    /// Makes this the one session of its device; an older one is told to close.
    pub(super) fn begin(shared: &Shared, info: SessionInfo) -> Self {
        let (since, opened_at) = (info.since, info.opened_at);
        let is_counting = shared.rollouts.is_counting();
        let is_repeat = is_counting && {
            let record = shared.history.record(info.device);
            is_repeat(record.and_then(|record| record.offline).as_ref(), opened_at)
        };
        let known = shared.history.epoch(info.device);
        let registered = shared.sessions.register(info, known, |registered| {
            let session = &registered.session;
            let returned = shared.note_session(session, registered.replaced.as_deref());
            // A session that is replaced has not ended yet.
            let of_replaced = registered
                .replaced
                .as_deref()
                .map(|older| past_of(older, EndedBy::Replacement, opened_at));
            if let Some(past) = of_replaced.or(returned) {
                session.set_returned(past);
            }
        });
        if registered.replaced.is_some() {
            shared.metrics.replacements.increment(1);
            let now = shared.clock.now();
            shared.shared_ids.handle_replaced(registered.session.info.device, now);
        }
        let session = registered.session;
        shared.breaker.handle_opened(session.info.address);
        shared.lookups.handle_session_opened(member(&session));
        shared.metrics.sessions.set(len_of(shared));
        if is_counting {
            shared
                .rollouts
                .opened(&subject(&session), is_repeat, (opened_at, since));
        }
        Self {
            shared: Arc::clone(shared),
            session,
            reason: EndReason::Shutdown,
            has_ended: false,
            is_session: true,
            is_repeat,
        }
    }

    pub(super) const fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(super) const fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// The session was ordered to end, for this reason: it is the reason where the process ends first.
    pub(super) const fn set_order(&mut self, reason: EndReason) {
        self.reason = reason;
    }

    /// The reason that was given last.
    pub(super) const fn order(&self) -> EndReason {
        self.reason
    }

    /// The session ended, for this reason.
    pub(super) fn end(mut self, reason: EndReason, evidence: Evidence) {
        self.finish(reason, evidence);
    }

    /// Counts a session that ended in its cohort. Returns the past of its device, this session included.
    fn account(&self, reason: EndReason, duration: Duration) -> Past {
        let (shared, info) = (&self.shared, &self.session.info);
        info.cohort().count(Figure::SessionsEnded, 1);
        let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        info.cohort().count(Figure::SessionMillis, millis);
        let of = Of {
            device: info.device,
            address: info.address,
            cohort: info.cohort(),
            tenant: Some(info.tenant()),
        };
        let by = reason.ended_by();
        if by == EndedBy::Fault {
            info.cohort().count(Figure::Errors, 1);
            shared
                .breaker
                .handle_event(EventKind::Error, &of, false, shared.sessions.len());
        }
        let past = past_of(&self.session, by, info.opened_at + duration);
        let event = |kind, is_again| shared.breaker.handle_event(kind, &of, is_again, shared.sessions.len());
        if past.repeats() > 0 {
            info.cohort().count(Figure::Repeats, 1);
            event(EventKind::Repeat, past.repeats() > 1);
        } else if past.is_in_loop() && by.may_be_crash() {
            event(EventKind::SlowRepeat, false);
        }
        past
    }

    /// The device left before it was upgraded: there never was a session.
    pub(super) fn cancel(mut self) {
        self.reason = EndReason::ClientGone;
        self.is_session = false;
    }

    fn finish(&mut self, reason: EndReason, evidence: Evidence) {
        self.has_ended = true;
        let shared = &self.shared;
        shared.silence.handle_ended(self.session.id);
        let mut past = Past::default();
        if self.is_session {
            let duration = shared.clock.now().saturating_since(self.session.info.opened_at);
            shared.metrics.closes.increment(reason.as_str());
            shared.metrics.session_duration_seconds.record(duration);
            past = self.account(reason, duration);
        }
        shared.breaker.handle_closed(self.session.info.address);
        let told = self.is_session.then_some(reason);
        let opened_at = self.session.info.opened_at;
        shared
            .lookups
            .handle_session_ended(member(&self.session), opened_at, told);
        if shared.rollouts.is_counting() {
            let now = shared.clock.now();
            let subject = subject(&self.session);
            shared.rollouts.closed(&subject, opened_at, self.is_repeat, told, now);
        }
        // A session that was replaced says nothing about its device, which is online in the newer one.
        shared.sessions.unregister(&self.session, || {
            let ended = Ended { reason, evidence, past };
            shared.note_offline(&self.session, ended, shared.clock.wall());
        });
        shared.metrics.sessions.set(len_of(shared));
    }
}

impl Drop for Online {
    /// Its task ends without a word: the connection ends with it, and no close frame was sent.
    fn drop(&mut self) {
        if !self.has_ended {
            let reason = if std::thread::panicking() {
                EndReason::Failed
            } else {
                self.reason
            };
            self.finish(reason, Evidence::Reset);
        }
    }
}

/// The past of the device, if this session ended at `now`.
fn past_of(session: &Session, by: EndedBy, now: Instant) -> Past {
    let lived = now.saturating_since(session.info.opened_at);
    Past::after(session.returned(), by, lived)
}

/// The device, for tests of its firmware version.
fn member(session: &Session) -> Member {
    Member {
        device: session.info.device,
        kind: session.info.cohort().kind(),
    }
}

/// The device as rules see it.
fn subject(session: &Session) -> Subject<'_> {
    Subject {
        device: Some(session.info.device),
        firmware: session.info.cohort().firmware.as_deref(),
        model: session.info.cohort().model.as_deref(),
        tenant: Some(session.info.tenant()),
    }
}

#[expect(clippy::cast_precision_loss, reason = "a node holds far fewer than 2^52 sessions")]
fn len_of(shared: &Shared) -> f64 {
    shared.sessions.len() as f64
}
