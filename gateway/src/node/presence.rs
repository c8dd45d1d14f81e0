//! Where a node tells what has become of a device's connection: to its history, and to those who read events.
//!
//! The methods are called in the order in which things happen to a session. Only the newest session of a device counts.

use std::sync::{Arc, atomic::Ordering};

use seawall_proto::{
    close::{EndReason, EndedBy},
    cohorts::Past,
    id::{DeviceId, Label, SessionId},
    presence::{Cause, Evidence, Known, Presence, groups::Heard},
    time::WallTime,
};

use crate::{
    fleet::{
        events::Body,
        history::{Began, Change, Offline},
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
    /// The device's past, this session included.
    pub past: Past,
}

impl State {
    /// A device has a session, which has `replaced` an older one. Returns its past, if that is a return: see
    /// [`CameOnline::returned`](crate::fleet::history::CameOnline::returned).
    pub fn note_session(&self, session: &Session, replaced: Option<&Session>) -> Option<Past> {
        let mut heard = Heard::NotHeld;
        if let Some(older) = replaced {
            self.silence.handle_heard(older.id, |how| heard = how);
        }
        let info = &session.info;
        let began = Began {
            session: session.id,
            group: &info.group,
            since: info.since,
            at: info.opened_at,
        };
        let came = self
            .history
            .came_online(info.device, began, |known| self.epoch_above(known));
        // A device that stays online in a newer session gives no event.
        if !came.was_online {
            let change = Change {
                known: Known {
                    epoch: came.epoch,
                    presence: Presence::Online,
                    since: info.since,
                },
                reason: Reason::CONNECTED,
                group: came.group,
            };
            self.count_change(&change);
            if heard != Heard::WithGroup {
                self.note(session, change, info.since);
            }
        }
        came.returned
    }

    /// A device's newest session ended.
    pub fn note_offline(&self, session: &Session, ended: Ended, at: WallTime) {
        let info = &session.info;
        let change = if session.is_deleted() {
            self.history.forget(info.device);
            None
        } else {
            let offline = Offline {
                since: at,
                at: self.clock.now(),
                reason: ended.reason,
                evidence: ended.evidence,
                past: ended.past,
            };
            self.history.went_offline(info.device, session.id, offline)
        };
        let change = change.unwrap_or_else(|| Change {
            known: Known {
                epoch: session.id,
                presence: Presence::Offline(ended.evidence),
                since: at,
            },
            reason: ended.reason.into(),
            group: Arc::clone(&info.group),
        });
        self.count_change(&change);
        if ended.reason.ended_by() != EndedBy::Gateway {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        self.note(session, change, at);
    }

    /// The database has a state of a device with a greater epoch, `stored`. If the device's socket is here, this node
    /// claims it: its clock was behind that of the node that reported the other state.
    pub fn claim(&self, device: DeviceId, stored: SessionId) {
        let at = self.clock.wall();
        if let Some(change) = self.history.claim(device, stored, |stored| self.epoch_above(stored)) {
            tracing::debug!(device.id = %device, "device claimed from a node whose clock is ahead");
            self.count_change(&change);
            self.publish(device, None, change, at);
        }
    }

    /// Returns an epoch that is greater than one of another node. All later ones are greater as well.
    fn epoch_above(&self, seen: SessionId) -> SessionId {
        let at = self.clock.wall();
        let mut ids = self.sessions.ids();
        ids.observe(seen, at);
        ids.next(at)
    }

    /// A device is silent, and so are many others of its group: whether it is still there can't be known. The event is
    /// its group's.
    pub fn note_held(&self, session: &Session, cause: Cause, at: WallTime) {
        if self
            .note_change(session, Presence::Unknown(cause), cause.into(), at)
            .is_some()
        {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A device that was [held](Self::note_held) was heard again, in the same session.
    pub fn note_resolved(&self, session: &Session, heard: Heard, at: WallTime) {
        let change = self.note_change(session, Presence::Online, Reason::HEARD, at);
        if let Some(change) = change.filter(|_| heard == Heard::Singly) {
            self.note(session, change, at);
        }
    }

    /// A device did not return in time after a restart of its node. `concluded_from`: see
    /// [`Lost`](crate::fleet::history::Lost).
    pub fn note_given_up(&self, device: DeviceId, concluded_from: Option<u64>) {
        let at = self.clock.wall();
        if let Some(change) = self.history.give_up(device, at, concluded_from) {
            self.count_change(&change);
            self.publish(device, None, change, at);
        }
    }

    /// How far this node lags behind what its sockets hold, in milliseconds.
    #[must_use]
    pub fn observer_lag_ms(&self) -> u64 {
        u64::try_from(self.observer.lag().as_millis()).unwrap_or(u64::MAX)
    }

    /// Returns the change, if there is one.
    fn note_change(&self, session: &Session, presence: Presence, reason: Reason, at: WallTime) -> Option<Change> {
        let report = Known {
            epoch: session.id,
            presence,
            since: at,
        };
        let change = self.history.handle(session.info.device, report, reason)?;
        self.count_change(&change);
        Some(change)
    }

    fn count_change(&self, change: &Change) {
        let state = PresenceState::of(change.known.presence).as_str();
        self.metrics.presence_changes.increment(state);
    }

    fn note(&self, session: &Session, change: Change, at: WallTime) {
        let external_id = session.info.external_id.as_deref().cloned();
        self.publish(session.info.device, external_id, change, at);
    }

    fn publish(&self, device: DeviceId, external_id: Option<Label>, change: Change, at: WallTime) {
        let Change { known, reason, group } = change;
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
