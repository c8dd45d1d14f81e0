//! The facts about a device that rules match.

use crate::id::{DeviceId, Label};

/// A device as rules see it: by its own claims, or by the registry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subject<'a> {
    /// `None` stands for all devices with these facts: a rule with a share applies if it may apply to one of them.
    pub device: Option<DeviceId>,
    /// `None` and blank text mean a missing version.
    pub firmware: Option<&'a str>,
    pub model: Option<&'a str>,
    pub tenant: Option<&'a str>,
}

/// An owned [`Subject`]: the claims of a device that waits for its lookup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnedSubject {
    pub device: Option<DeviceId>,
    pub firmware: Option<Label>,
    pub model: Option<Label>,
    pub tenant: Option<Label>,
}

impl OwnedSubject {
    #[must_use]
    pub fn as_subject(&self) -> Subject<'_> {
        Subject {
            device: self.device,
            firmware: self.firmware.as_deref(),
            model: self.model.as_deref(),
            tenant: self.tenant.as_deref(),
        }
    }
}
