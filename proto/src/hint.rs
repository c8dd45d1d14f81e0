//! Hints: when a device should return, and the ranges from which they are drawn. docs/PROTOCOL.md lists them.

use std::{ops::RangeInclusive, time::Duration};

use rand::Rng;

/// 401.
pub(crate) const UNAUTHORIZED: RangeInclusive<Duration> = seconds(60, 300);
/// 403 and close 4002, for a disabled device.
pub(crate) const DISABLED: RangeInclusive<Duration> = seconds(900, 1_800);
/// 503 by a limit on an address or an id.
pub(crate) const THROTTLED: RangeInclusive<Duration> = seconds(5, 15);
/// A device without reliable data in the registry's answer. Doubled with each refusal: the database answers, and more
/// lookups do not help it.
pub(crate) const UNTOLD: RangeInclusive<Duration> = seconds(5, 15);
/// Close 4001: a path that broke for many devices does not get all of them back at once.
pub(crate) const HEARTBEAT_MISSED: RangeInclusive<Duration> = seconds(1, 10);
/// Close 4003.
pub(crate) const DISCONNECTED: RangeInclusive<Duration> = seconds(1, 5);
const DRAINING_WITH_PEERS: RangeInclusive<Duration> = seconds(1, 5);
const DRAINING_ALONE: RangeInclusive<Duration> = seconds(10, 30);

const fn seconds(from: u64, to: u64) -> RangeInclusive<Duration> {
    Duration::from_secs(from)..=Duration::from_secs(to)
}

/// The range of hints for an operator's minimum.
pub(crate) const fn up_to_twice(at_least: Duration) -> RangeInclusive<Duration> {
    at_least..=at_least.saturating_mul(2)
}

/// When a device should return, and what it should show then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hint {
    /// Time from now, sent in whole milliseconds.
    pub after: Duration,
    /// A slot token, which gives priority at that time.
    pub slot: Option<Box<str>>,
}

impl Hint {
    /// Draws a hint without a slot, uniformly and to the millisecond, so that devices that were refused together do not
    /// return together.
    pub fn draw(between: RangeInclusive<Duration>, rng: &mut impl Rng) -> Self {
        Self {
            after: draw(between, rng),
            slot: None,
        }
    }

    /// The hint in whole milliseconds.
    #[must_use]
    pub fn after_ms(&self) -> u64 {
        millis(self.after)
    }
}

/// A uniform draw in whole milliseconds; the bounds are included.
pub(crate) fn draw(between: RangeInclusive<Duration>, rng: &mut impl Rng) -> Duration {
    let from = millis(*between.start());
    let to = millis(*between.end()).max(from);
    Duration::from_millis(rng.random_range(from..=to))
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// Whether other nodes can take the devices of a draining one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peers {
    /// The device returns soon: the load balancer finds another node.
    Some,
    /// The device returns when this node has restarted.
    None,
}

impl Peers {
    /// Range of the hint for a device that connects to a draining node.
    #[must_use]
    pub const fn hint_range(self) -> RangeInclusive<Duration> {
        match self {
            Self::Some => DRAINING_WITH_PEERS,
            Self::None => DRAINING_ALONE,
        }
    }
}
