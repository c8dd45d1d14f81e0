//! The way between a device and its gateway: round trips, late timers, and the edge that accepts connections.
//!
//! A request is at the gateway half a round trip after the device began, and what the edge makes it wait; the answer is at the device half a
//! round trip after it was given. TCP's and TLS's own round trips are not told apart from these: they delay every attempt alike.

use std::time::Duration;

use rand::Rng;
use seawall_proto::time::Instant;

use super::{
    database::exponential,
    settings::{Edge as EdgeSettings, Overflow},
};

/// No round trip is longer.
pub const ROUND_TRIP_MAX: Duration = Duration::from_secs(2);
/// When TCP sends a SYN again that was not answered, in seconds after the try before: 1, 3, 7, 15, 31 and 63 s after the first (Linux's
/// `tcp_syn_retries`). A device that gives up earlier sends none of those behind.
const SYN_AGAIN: [u64; 6] = [1, 2, 4, 8, 16, 32];

/// Distances and timers.
#[derive(Clone, Copy, Debug)]
pub struct Network {
    pub round_trip: Duration,
    /// Mean of what is longer.
    pub extra: Duration,
    pub wake_noise: Duration,
}

impl Network {
    /// Half a round trip, in microseconds: drawn once for each device.
    pub fn draw_half_trip(&self, rng: &mut impl Rng) -> u32 {
        let extra = Duration::from_secs_f64(exponential(self.extra.as_secs_f64(), rng));
        let trip = (self.round_trip + extra).min(ROUND_TRIP_MAX);
        u32::try_from(trip.as_micros() / 2).unwrap_or(u32::MAX)
    }

    /// What a timer is late by.
    pub fn draw_noise(&self, rng: &mut impl Rng) -> Duration {
        let noise = u64::try_from(self.wake_noise.as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(rng.random_range(0..=noise))
    }
}

/// What a SYN comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// Its request is complete at this time.
    At(Instant),
    /// No room. It is sent again after this time.
    Again(Duration),
    /// No room, and it was the last try: the device hears nothing.
    Lost,
    /// No room, and the device is told so.
    Reset,
}

/// One node's edge: a queue of fixed length, served in order at a fixed rate. The time at which its last entry is done says all of it.
#[derive(Clone, Copy, Debug)]
pub struct Edge {
    /// Nanoseconds, as are the others: a fast edge takes less than a microsecond.
    service: u64,
    backlog: u64,
    overflow: Overflow,
    busy_until: u64,
}

impl Edge {
    #[must_use]
    pub fn new(settings: &EdgeSettings) -> Self {
        Self {
            service: nanos(Duration::from_secs_f64(1.0 / settings.handshakes_per_second)),
            backlog: nanos(Duration::from_secs_f64(settings.backlog_seconds)),
            overflow: settings.overflow,
            busy_until: 0,
        }
    }

    /// A SYN came: the `tries`-th again.
    pub fn accept(&mut self, tries: u8, now: Instant) -> Accepted {
        let now = now.as_micros().saturating_mul(1_000);
        if self.busy_until.saturating_sub(now) >= self.backlog {
            return match (self.overflow, SYN_AGAIN.get(usize::from(tries))) {
                (Overflow::Reset, _) => Accepted::Reset,
                (Overflow::Drop, Some(after)) => Accepted::Again(Duration::from_secs(*after)),
                (Overflow::Drop, None) => Accepted::Lost,
            };
        }
        self.busy_until = self.busy_until.max(now) + self.service;
        Accepted::At(Instant::from_micros(self.busy_until / 1_000))
    }
}

fn nanos(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edge(overflow: Overflow) -> Edge {
        Edge::new(&EdgeSettings {
            handshakes_per_second: 1_000.0,
            backlog_seconds: 0.1,
            overflow,
        })
    }

    #[test]
    fn edge_serves_in_order_at_its_rate() {
        let mut edge = edge(Overflow::Drop);

        let last = (0..50).map(|_| edge.accept(0, Instant::ZERO)).last();

        assert_eq!(last, Some(Accepted::At(Instant::from_micros(50_000))));
    }

    #[test]
    fn full_backlog_drops_silently_or_resets() {
        let mut dropping = edge(Overflow::Drop);
        let mut resetting = edge(Overflow::Reset);
        for _ in 0..100 {
            assert!(matches!(dropping.accept(0, Instant::ZERO), Accepted::At(_)));
            resetting.accept(0, Instant::ZERO);
        }

        let tries: Vec<Accepted> = [0, 1, 5, 6].map(|tries| dropping.accept(tries, Instant::ZERO)).into();

        assert_eq!(
            tries,
            [
                Accepted::Again(Duration::from_secs(1)),
                Accepted::Again(Duration::from_secs(2)),
                Accepted::Again(Duration::from_secs(32)),
                Accepted::Lost
            ]
        );
        assert_eq!(resetting.accept(0, Instant::ZERO), Accepted::Reset);
        assert!(matches!(
            dropping.accept(1, Instant::from_micros(1_000_000)),
            Accepted::At(_)
        ));
    }
}
