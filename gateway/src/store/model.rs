//! The values that the store takes and returns.

use std::{sync::Arc, time::Duration};

use seawall_proto::{
    id::{DeviceId, Label, SecretHash},
    record::{DeviceRecord, DeviceState},
    time::WallTime,
};
use serde::Serialize;
use uuid::Uuid;

/// Tenant of a device without one.
pub const DEFAULT_TENANT: &str = "default";

/// Shown for a role that this version does not know.
pub const UNKNOWN_ROLE: &str = "unknown";

/// Maximum number of kinds of devices that are counted apart: as many as [groups](crate::fleet::history::groups).
pub const DEVICE_KINDS_MAX: u32 = 16_384;

/// Maximum number of items of a page.
pub const PAGE_MAX: u32 = 1_000;

/// One page of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page<T, C> {
    pub items: Vec<T>,
    /// The first item of the next page; `None` on the last page.
    pub next_cursor: Option<C>,
}

/// The actor, action and time of a change. The store itself adds the subject and its states from the rows that it
/// changes, so that no caller can write a secret there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audit {
    /// Id of the change. A change of the rules with the same id is made at most once.
    pub id: Uuid,
    pub at: WallTime,
    /// The token's name, or `gateway` for the gateway's own actions.
    pub actor: String,
    /// `device.create`, `rule.delete`, `drain.start`, …
    pub action: &'static str,
}

/// One line of the audit log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AuditRecord {
    pub seq: i64,
    pub at: WallTime,
    /// When it reached the database, if it waited in a node's journal.
    pub arrived_at: Option<WallTime>,
    pub actor: String,
    pub action: String,
    /// The changed object: its id, or a word for an object without one.
    pub subject: String,
    pub before: Option<serde_json::Value>,
    pub after: Option<serde_json::Value>,
}

/// A device as operators see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRow {
    pub record: DeviceRecord,
    /// The device's name, if it is not a UUID.
    pub external_id: Option<Label>,
    pub created_at: WallTime,
    pub updated_at: WallTime,
}

/// Devices that were read, in the order of ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceRows {
    pub items: Vec<DeviceRow>,
    /// Devices between them whose rows can't be read.
    pub unreadable: Vec<DeviceId>,
    /// The first device of the next page; `None` on the last page.
    pub next_cursor: Option<DeviceId>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDevice {
    pub id: DeviceId,
    /// The device's name, if it is not a UUID.
    pub external_id: Option<Label>,
    /// `default` where `None`.
    pub tenant: Option<Label>,
    pub model: Option<Label>,
    pub secret: SecretHash,
}

/// Changes of a device. `None` leaves a field as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceChange {
    pub state: Option<DeviceState>,
    pub tenant: Option<Label>,
    /// `Some(None)` removes the model.
    pub model: Option<Option<Label>>,
}

/// The filter of a list of devices. Every condition must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceFilter {
    pub tenant: Option<Label>,
    pub model: Option<Label>,
    pub state: Option<DeviceState>,
}

/// Numbers of registered devices by tenant and model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceKinds {
    /// The kinds with most devices, at most [`DEVICE_KINDS_MAX`].
    pub kinds: Vec<DeviceKind>,
    /// Devices of further kinds.
    pub rest: u64,
}

/// Devices of one tenant and model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceKind {
    pub tenant: Arc<str>,
    pub model: Option<Arc<str>>,
    pub devices: u64,
}

/// A new credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    pub secret: SecretHash,
    /// Time for which the old one stays valid; zero ends it at once.
    pub overlap: Duration,
}

/// A device with a new credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rotated {
    pub row: DeviceRow,
    /// Planned end of an earlier rotation's overlap, which this rotation ended.
    pub ended_overlap: Option<WallTime>,
}

/// The permissions of a token. Each role includes the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Viewer,
    Operator,
    Admin,
}

impl Role {
    pub const ALL: [Self; 3] = [Self::Viewer, Self::Operator, Self::Admin];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }

    /// Returns the role with this name; `None` if this version has none.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == name)
    }
}

/// An ops token. Only its hash is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRow {
    pub id: Uuid,
    pub name: String,
    /// `None`: a role of a later version, which permits nothing here.
    pub role: Option<Role>,
    pub sha256: SecretHash,
    pub created_at: WallTime,
    pub revoked_at: Option<WallTime>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewToken {
    pub id: Uuid,
    pub name: String,
    pub role: Role,
    pub sha256: SecretHash,
}

/// Wall time as it is stored.
pub(super) fn to_ms(at: WallTime) -> i64 {
    i64::try_from(at.as_unix_ms()).unwrap_or(i64::MAX)
}

/// The end of the year 9999, the last one of RFC 3339.
const LAST_MS: i64 = 253_402_300_799_999;

/// Reads a stored wall time. Times before 1970 become 1970, and times after the year 9999 its end.
pub(super) fn from_ms(ms: i64) -> WallTime {
    WallTime::from_unix_ms(u64::try_from(ms.min(LAST_MS)).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_that_no_calendar_has_are_clamped_when_they_are_read() {
        assert_eq!(from_ms(i64::MIN).as_unix_ms(), 0);
        assert_eq!(from_ms(1).as_unix_ms(), 1);
        assert_eq!(from_ms(i64::MAX).to_rfc3339(), "9999-12-31T23:59:59.999Z");
    }
}
