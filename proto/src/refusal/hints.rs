//! Hints of contract section 3: the spans that they are drawn from.

use std::{ops::RangeInclusive, time::Duration};

pub(super) const UNAUTHORIZED: RangeInclusive<Duration> = Duration::from_secs(60)..=Duration::from_secs(300);
pub(super) const DISABLED: RangeInclusive<Duration> = Duration::from_secs(900)..=Duration::from_secs(1800);
pub(super) const DRAINING_WITH_PEERS: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(5);
pub(super) const DRAINING_ALONE: RangeInclusive<Duration> = Duration::from_secs(10)..=Duration::from_secs(30);
pub(super) const THROTTLED: RangeInclusive<Duration> = Duration::from_secs(5)..=Duration::from_secs(15);

/// Shortest and longest of the hints of a [`Crush`].
const CRUSH: RangeInclusive<Duration> = Duration::from_millis(500)..=Duration::from_secs(10);

/// Handshakes that wait for places, and how fast they complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crush {
    /// How long it has lasted.
    pub lasted: Duration,
    /// Handshakes under way now.
    pub under_way: usize,
    /// Handshakes that have completed since it began.
    pub completed: u64,
}

impl Crush {
    /// How long a handshake that is given up should stay away: about as long as those under way take at the pace so far. While none
    /// completes that is as long again as the crush has lasted, so that a new one is short, and an attack keeps its crowd away.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "counts of handshakes are far below 2^53")]
    pub fn hint_range(&self) -> RangeInclusive<Duration> {
        let under_way = self.under_way.max(1) as f64;
        let wait = self.lasted.mul_f64(under_way / (under_way + self.completed as f64));
        let from = (wait / 2).clamp(*CRUSH.start() / 2, *CRUSH.end() / 2);
        from..=from * 2
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    const fn crush(lasted_ms: u64, under_way: usize, completed: u64) -> Crush {
        Crush {
            lasted: Duration::from_millis(lasted_ms),
            under_way,
            completed,
        }
    }

    #[test]
    fn a_crush_that_has_just_begun_sends_nobody_away_for_long() {
        let range = crush(300, 4_500, 0).hint_range();

        assert_eq!(range, Duration::from_millis(250)..=Duration::from_millis(500));
    }

    #[test]
    fn a_fleet_that_gets_in_is_told_a_short_time_however_long_it_takes() {
        let range = crush(20_000, 4_500, 400_000).hint_range();

        assert!(*range.end() <= Duration::from_millis(500), "{range:?}");
    }

    #[test]
    fn the_longer_nobody_completes_the_longer_the_hint_up_to_ten_seconds() {
        assert_eq!(*crush(4_000, 4_500, 0).hint_range().end(), Duration::from_secs(4));
        assert_eq!(*crush(3_600_000, 4_500, 0).hint_range().end(), Duration::from_secs(10));
    }
}
