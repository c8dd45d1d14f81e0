//! Presence: what this node can say of a device's connection, from the socket it holds and from what it remembers.

use seawall_proto::{id::DeviceId, time::WallTime};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{events::format_time, history::History, sessions::Sessions};

/// A device's presence, as the API shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Presence {
    /// `online`: this node holds its socket. `offline`: its last socket ended. `unknown`: this node has not seen it since it started.
    pub state: PresenceState,
    /// When that began, RFC 3339; absent where it is not known.
    pub since: Option<String>,
    /// When this was read, RFC 3339.
    pub as_of: String,
    /// The node that says so.
    pub node: String,
    /// Why it is offline: a label of `seawall_closes_total`.
    pub reason: Option<&'static str>,
}

/// Whether a device is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PresenceState {
    Online,
    Offline,
    Unknown,
}

impl PresenceState {
    /// As the API writes it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Offline => "offline",
            Self::Unknown => "unknown",
        }
    }
}

impl Presence {
    /// What `sessions` and `history` know of `device`.
    #[must_use]
    pub fn of(device: DeviceId, sessions: &Sessions, history: &History, node: &str, as_of: WallTime) -> Self {
        let presence = |state, since: Option<WallTime>, reason| Self {
            state,
            since: since.map(format_time),
            as_of: format_time(as_of),
            node: node.to_owned(),
            reason,
        };
        if let Some(session) = sessions.get(device) {
            return presence(PresenceState::Online, Some(session.info.since), None);
        }
        match history.record(device).and_then(|record| record.offline) {
            Some(offline) => presence(PresenceState::Offline, Some(offline.since), Some(offline.reason)),
            None => presence(PresenceState::Unknown, None, None),
        }
    }
}
