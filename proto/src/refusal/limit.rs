//! Which limit refused a device that is told `throttled`.

/// The limit that a `throttled` device has met. Closed: label `limit` of `seawall_throttled_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Limit {
    /// Its address holds its share of the connections.
    AddressConnections,
    /// Its address holds more than its share of the handshakes under way, and others wait for one.
    AddressHandshakes,
    /// Its address began too many handshakes, by the operator's figure.
    AddressRate,
    /// Wrong credentials came too often with its id.
    Credential,
}

impl Limit {
    /// Every limit, in the order of the enum.
    pub const ALL: [Self; 4] = [
        Self::AddressConnections,
        Self::AddressHandshakes,
        Self::AddressRate,
        Self::Credential,
    ];

    /// The word in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AddressConnections => "address_connections",
            Self::AddressHandshakes => "address_handshakes",
            Self::AddressRate => "address_rate",
            Self::Credential => "credential",
        }
    }

    /// What the device is told.
    pub(super) const fn detail(self) -> &'static str {
        match self {
            Self::AddressConnections => "too many connections from this address",
            Self::AddressHandshakes => "too many unfinished requests from this address while others wait",
            Self::AddressRate => "too many attempts from this address",
            Self::Credential => "too many attempts with wrong credentials for this id",
        }
    }
}
