//! Which limit refused a device that is told `throttled`.

crate::labels! {
    /// The limit behind a `throttled` answer. A closed set: label `limit` of `seawall_throttled_total`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub enum Limit {
        /// The address holds its share of the connections.
        AddressConnections = "address_connections",
        /// The address holds more than its share of the handshakes, while others wait for a permit.
        AddressHandshakes = "address_handshakes",
        /// The address began more handshakes per second than the configured maximum.
        AddressRate = "address_rate",
        /// Too many wrong credentials for the device id.
        Credential = "credential",
        /// The rate of a firmware rule with effect `throttle`.
        Rule = "rule",
    }
}

impl Limit {
    /// Value of `detail` in the answer.
    pub(super) const fn detail(self) -> &'static str {
        match self {
            Self::AddressConnections => "too many connections from this address",
            Self::AddressHandshakes => "too many unfinished requests from this address while others wait",
            Self::AddressRate => "too many attempts from this address",
            Self::Rule => "an operator limits how often devices of this firmware connect",
            Self::Credential => "too many attempts with wrong credentials for this id",
        }
    }
}
