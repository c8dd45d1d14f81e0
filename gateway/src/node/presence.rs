//! Where a node tells what has become of a device's connection: to its history, and to those who read events.
//!
//! The methods are called in the order in which things happen to a session. Only the newest session of a device counts.

use std::sync::Arc;

use seawall_proto::{
    close::EndReason,
    id::{DeviceId, Label},
    presence::{Cause, Evidence, Known, Presence},
    time::WallTime,
};

use crate::{
    fleet::{
        events::Body,
        history::{Began, Offline, groups::Group},
    },
    node::State,
    session::sessions::Session,
    store::{PresenceState, Reason},
};

/// How a device's newest session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    pub reason: EndReason,
    pub evidence: Evidence,
    /// Repeats in a row, this session included.
    pub repeats: u8,
}

impl State {
    /// A device has a session. Returns whether that is a return: see
    /// [`CameOnline::returned`](crate::fleet::history::CameOnline::returned).
    pub fn note_session(&self, session: &Session) -> Option<u8> {
        let info = &session.info;
        let began = Began {
            epoch: session.id,
            cohort: &info.cohort,
            tenant: &info.tenant,
            since: info.since,
            at: info.opened_at,
        };
        let came = self.history.came_online(info.device, began);
        // A device that stays online in a newer session gives no event.
        if !came.was_online {
            self.note(session, Presence::Online, Reason::CONNECTED, info.since, came.group);
        }
        came.returned
    }

    /// A device's newest session ended.
    pub fn note_offline(&self, session: &Session, ended: Ended, at: WallTime) {
        let info = &session.info;
        let group = if session.is_deleted() {
            self.history.forget(info.device);
            None
        } else {
            let offline = Offline {
                since: at,
                at: self.clock.now(),
                reason: ended.reason,
                evidence: ended.evidence,
                repeats: ended.repeats,
            };
            self.history.went_offline(info.device, session.id, offline)
        };
        let group = group.unwrap_or_else(|| self.history.groups().of(&info.cohort, &info.tenant));
        self.note(
            session,
            Presence::Offline(ended.evidence),
            ended.reason.into(),
            at,
            group,
        );
    }

    /// A device is silent, and so are many others of its group: whether it is still there can't be known.
    pub fn note_held(&self, session: &Session, cause: Cause, at: WallTime) {
        self.note_change(session, Presence::Unknown(cause), cause.into(), at);
    }

    /// A device that was [held](Self::note_held) was heard again, in the same session.
    pub fn note_resolved(&self, session: &Session, at: WallTime) {
        self.note_change(session, Presence::Online, Reason::HEARD, at);
    }

    /// A device did not return in time after a restart of its node.
    pub fn note_given_up(&self, device: DeviceId) {
        let at = self.clock.wall();
        if let Some(record) = self.history.give_up(device, at)
            && let Some(group) = record.group
        {
            self.publish(device, None, record.known, Reason::NOT_BACK, at, group);
        }
    }

    /// How far this node lags behind what its sockets hold, in milliseconds.
    #[must_use]
    pub fn observer_lag_ms(&self) -> u64 {
        u64::try_from(self.observer.lag().as_millis()).unwrap_or(u64::MAX)
    }

    fn note_change(&self, session: &Session, presence: Presence, reason: Reason, at: WallTime) {
        let report = Known {
            epoch: session.id,
            presence,
            since: at,
        };
        if let Some(group) = self.history.handle(session.info.device, report, reason) {
            self.note(session, presence, reason, at, group);
        }
    }

    fn note(&self, session: &Session, presence: Presence, reason: Reason, at: WallTime, group: Arc<Group>) {
        let info = &session.info;
        let external_id = info.external_id.as_deref().cloned();
        let known = Known {
            epoch: session.id,
            presence,
            since: at,
        };
        self.publish(info.device, external_id, known, reason, at, group);
    }

    fn publish(
        &self,
        device: DeviceId,
        external_id: Option<Label>,
        known: Known,
        reason: Reason,
        at: WallTime,
        group: Arc<Group>,
    ) {
        let state = PresenceState::of(known.presence).as_str();
        self.metrics.presence_changes.increment(state);
        let body = Body::Presence {
            device,
            external_id,
            known,
            node: Arc::clone(&self.node),
            reason: reason.as_str(),
            group,
        };
        self.events.notice(at, body);
    }
}
