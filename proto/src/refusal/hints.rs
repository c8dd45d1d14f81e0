//! Hints of contract section 3: the spans that they are drawn from.

use std::{ops::RangeInclusive, time::Duration};

pub(super) const UNAUTHORIZED: RangeInclusive<Duration> = Duration::from_secs(60)..=Duration::from_secs(300);
pub(super) const DISABLED: RangeInclusive<Duration> = Duration::from_secs(900)..=Duration::from_secs(1800);
pub(super) const DRAINING_WITH_PEERS: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(5);
pub(super) const DRAINING_ALONE: RangeInclusive<Duration> = Duration::from_secs(10)..=Duration::from_secs(30);
pub(super) const THROTTLED: RangeInclusive<Duration> = Duration::from_secs(5)..=Duration::from_secs(15);

/// Whether other nodes can take the devices of one that leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peers {
    /// Come back soon: the balancer finds another node.
    Some,
    /// Come back when this node has restarted.
    None,
}

impl Peers {
    /// How long a device that meets a draining node should stay away.
    #[must_use]
    pub const fn hint_range(self) -> RangeInclusive<Duration> {
        match self {
            Self::Some => DRAINING_WITH_PEERS,
            Self::None => DRAINING_ALONE,
        }
    }
}
