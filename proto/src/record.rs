//! What the registry knows of a device. The outcome of a look-up, and all of it that the connect path may see.

use serde::{Deserialize, Serialize};

use crate::{
    id::{DeviceId, Label, SecretHash},
    time::WallTime,
};

/// One registered device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRecord {
    pub id: DeviceId,
    /// `default` where nobody said otherwise.
    pub tenant: Label,
    /// The registry's model, used where the device names none.
    pub model: Option<Label>,
    pub secret: SecretHash,
    /// The credential before the last rotation, and the time from which it no longer counts.
    pub previous_secret: Option<(SecretHash, WallTime)>,
    pub state: DeviceState,
}

/// Whether a device may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceState {
    Enabled,
    /// For now; the device is told to come back later.
    Disabled,
    /// For good; the device is told nothing, and should not come back.
    Revoked,
}

impl DeviceState {
    pub const ALL: [Self; 3] = [Self::Enabled, Self::Disabled, Self::Revoked];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Enabled => "enabled",
            Self::Disabled => "disabled",
            Self::Revoked => "revoked",
        }
    }
}
