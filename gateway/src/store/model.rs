//! What goes into the store and comes out of it. Plain values; the statements are in the files beside this one.

use std::time::Duration;

use seawall_proto::{
    id::{DeviceId, Label, SecretHash},
    record::{DeviceRecord, DeviceState},
    time::WallTime,
};
use serde::Serialize;
use uuid::Uuid;

/// Tenant of a device for which nobody named one.
pub const DEFAULT_TENANT: &str = "default";

/// Shown for the role of a token that this version does not know.
pub const UNKNOWN_ROLE: &str = "unknown";

/// Longest page of any list.
pub const PAGE_MAX: u32 = 1_000;

/// One page of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page<T, C> {
    pub items: Vec<T>,
    /// Where the next page begins; `None` on the last one.
    pub next_cursor: Option<C>,
}

impl<T, C> Page<T, C> {
    /// From up to `limit + 1` rows: the one too many begins the next page.
    pub(super) fn from_rows(mut items: Vec<T>, limit: u32, cursor: impl FnOnce(&T) -> C) -> Self {
        let next_cursor = items.get(limit as usize).map(cursor);
        items.truncate(limit as usize);
        Self { items, next_cursor }
    }
}

/// Who changes what, and when. The store itself adds subject, before and after, from the rows that it changes, in the
/// transaction that changes them: so no caller can write a secret there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audit {
    pub at: WallTime,
    /// The token's name, or `gateway` for what it does by itself.
    pub actor: String,
    /// `device.create`, `rule.delete`, `drain.start`, …
    pub action: &'static str,
}

/// One line of the audit log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AuditRecord {
    pub seq: i64,
    pub at: WallTime,
    pub actor: String,
    pub action: String,
    /// What was changed: an id, or a word for what has none.
    pub subject: String,
    pub before: Option<serde_json::Value>,
    pub after: Option<serde_json::Value>,
}

/// A device as operators see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRow {
    pub record: DeviceRecord,
    /// What the device is called outside, where that is not a UUID.
    pub external_id: Option<Label>,
    pub created_at: WallTime,
    pub updated_at: WallTime,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDevice {
    pub id: DeviceId,
    /// What the device is called outside, where that is not a UUID.
    pub external_id: Option<Label>,
    /// `default` where `None`.
    pub tenant: Option<Label>,
    pub model: Option<Label>,
    pub secret: SecretHash,
}

/// What to change of a device; `None` leaves it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceChange {
    pub state: Option<DeviceState>,
    pub tenant: Option<Label>,
    /// `Some(None)` takes the model away.
    pub model: Option<Option<Label>>,
}

/// Which devices a list shows; all conditions at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceFilter {
    pub tenant: Option<Label>,
    pub model: Option<Label>,
    pub state: Option<DeviceState>,
}

/// A new credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    pub secret: SecretHash,
    /// How long the old one stays valid beside it; zero ends it at once.
    pub overlap: Duration,
}

/// A device with a new credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rotated {
    pub row: DeviceRow,
    /// End of an earlier rotation's overlap, which was still running: its credential ended with this one.
    pub ended_overlap: Option<WallTime>,
}

/// What a token's bearer may do. Each role may do what the ones before it may.
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

    /// The role of this name; `None` where this version has none.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == name)
    }
}

/// An ops token; only the hash of it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRow {
    pub id: Uuid,
    pub name: String,
    /// `None`: a role of a later version, which opens nothing here.
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

/// The end of the year 9999, the last that RFC 3339 can write.
const LAST_MS: i64 = 253_402_300_799_999;

/// Wall time from how it is stored; times before 1970 become 1970, and those after the year 9999 its end.
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
        assert_eq!(
            crate::events::format_time(from_ms(i64::MAX)),
            "9999-12-31T23:59:59.999Z"
        );
    }
}
