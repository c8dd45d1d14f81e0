//! Presence: what this node can say of a device's connection, from the socket it holds and from what it remembers.

use seawall_proto::{
    id::DeviceId,
    presence::{Cause, Known, Presence as What},
    time::WallTime,
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    fleet::history::History,
    store::{EvidenceText, PresenceState, Reason, cause_of},
};

/// A device's presence, as the API shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Presence {
    /// `online`: a node holds its socket. `offline`: its last session has ended, and `evidence` proves it. `unknown`:
    /// it may be either, and `cause` says why that can't be known.
    pub state: PresenceState,
    /// When that began, RFC 3339; null if no node has seen the device.
    pub since: Option<String>,
    /// When this was read, RFC 3339.
    pub as_of: String,
    /// The node that says so.
    pub node: String,
    /// Why it changed last: `connected`, `heard` (again), `replaced` (by a newer session), a label of
    /// `seawall_closes_total`, `not_back`, or the cause. Null if no node has seen the device.
    pub reason: Option<&'static str>,
    /// Why it is unknown: `node_lagging`, `path`, `node_lost`, `node_restarted`, `never_seen`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<&'static str>,
    /// What proves that it is offline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evidence: Option<EvidenceText>,
}

/// Who says what a device's presence is, and when.
#[derive(Debug, Clone, Copy)]
pub struct Seer<'a> {
    pub history: &'a History,
    pub node: &'a str,
    pub as_of: WallTime,
    /// Whether what the database had at the start was read.
    pub is_restored: bool,
}

impl Presence {
    /// Presence of `device`, as this node remembers it.
    #[must_use]
    pub fn of(device: DeviceId, seer: Seer<'_>) -> Self {
        match seer.history.record(device) {
            Some(record) if record.group.is_some() => Self::known(record.known, record.reason, seer.node, seer.as_of),
            record => {
                let was_seen = record.is_some_and(|record| record.known.epoch != Known::NEVER_SEEN.epoch);
                let cause = if was_seen {
                    // It was left to another node, which only the database knows of.
                    Cause::NodeLost
                } else if seer.is_restored {
                    Cause::NeverSeen
                } else {
                    Cause::NodeRestarted
                };
                let known = Known {
                    presence: What::Unknown(cause),
                    ..Known::NEVER_SEEN
                };
                Self {
                    since: None,
                    reason: None,
                    ..Self::known(known, Reason::OTHER, seer.node, seer.as_of)
                }
            }
        }
    }

    /// What `node` knows of a device.
    #[must_use]
    pub fn known(known: Known, reason: Reason, node: &str, as_of: WallTime) -> Self {
        Self {
            state: PresenceState::of(known.presence),
            since: Some(known.since.to_rfc3339()),
            as_of: as_of.to_rfc3339(),
            node: node.to_owned(),
            reason: Some(reason.as_str()),
            cause: cause_of(known.presence),
            evidence: EvidenceText::of(known.presence),
        }
    }
}
