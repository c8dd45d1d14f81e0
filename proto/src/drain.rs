//! How fast sessions may be closed, so that their devices come back no faster than they can be taken.
//!
//! [`Pacing`] is used for draining a node and for evicting a blocked version. It says how many sessions may close now; which ones, and
//! what each is told, is the caller's.

use std::{ops::RangeInclusive, time::Duration};

use crate::{refusal::Peers, time::Instant};

/// Closes that were due but not asked for don't pile up beyond this span: a caller that was late must not close in one burst.
const BURST_MAX: Duration = Duration::from_millis(250);
/// The share of the admission rate that evictions may send back (overload.md section 5): the rest is for devices that did nothing wrong.
const EVICTION_SHARE: f64 = 0.1;
/// Evictions of a large cohort take about this long where the admission rate allows it.
const EVICTION_SPAN: Duration = Duration::from_secs(60);
/// Small cohorts leave at this pace, in sessions a second, where the admission rate allows it.
const EVICTION_RATE_MIN: f64 = 20.0;
/// At the end of a drain this much of its time is left for the last closes to be written.
const DRAIN_RESERVE: Duration = Duration::from_secs(2);
/// From the last close of a drain to the next process that listens, with some reserve.
const RESTART_TIME: Duration = Duration::from_millis(2_500);
/// Span from which the return of each device is drawn, so that devices of a small fleet do not come back together.
const RETURN_SPREAD: Duration = Duration::from_secs(1);
/// A drain that takes longer is no restart: devices do not wait for its end.
const RESTART_DRAIN_MAX: Duration = Duration::from_secs(30);

/// Says how many sessions may be closed.
#[derive(Clone, Debug, PartialEq)]
pub struct Pacing {
    rate_per_second: f64,
    allowance: f64,
    last: Instant,
    /// From here on everything that is left is due.
    deadline: Option<Instant>,
}

impl Pacing {
    /// Pacing of `rate_per_second` (at least one a minute), with the first session due at once.
    #[must_use]
    pub fn new(rate_per_second: f64, now: Instant) -> Self {
        Self {
            rate_per_second: rate_per_second.max(1.0 / 60.0),
            allowance: 1.0,
            last: now,
            deadline: None,
        }
    }

    /// Pacing of a drain: `rate_per_second`, or as much more as it takes to be done 2 s before `deadline`. Everything left then is due at once.
    #[must_use]
    pub fn drain(rate_per_second: f64, sessions: usize, deadline: Duration, now: Instant) -> Self {
        let span = deadline
            .saturating_sub(DRAIN_RESERVE)
            .max(Duration::from_millis(500))
            .min(deadline.max(Duration::from_millis(1)));
        let needed = sessions as f64 / span.as_secs_f64();
        let mut pacing = Self::new(rate_per_second.max(needed), now);
        pacing.deadline = Some(now + span);
        pacing
    }

    /// Pacing of an eviction: never over a tenth of the admission rate.
    #[must_use]
    pub fn evict(admission_rate_per_second: f64, sessions: usize, now: Instant) -> Self {
        let wanted = (sessions as f64 / EVICTION_SPAN.as_secs_f64()).max(EVICTION_RATE_MIN);
        Self::new(wanted.min(admission_rate_per_second * EVICTION_SHARE), now)
    }

    /// Sessions a second.
    #[must_use]
    pub const fn rate_per_second(&self) -> f64 {
        self.rate_per_second
    }

    /// From now on everything that is left is due.
    pub fn hurry(&mut self, now: Instant) {
        self.deadline = Some(now);
    }

    /// When the devices of a drain that begins now come back. `capacity`: how many a second can be taken back.
    #[must_use]
    pub fn homecoming(&self, sessions: usize, capacity: f64, now: Instant) -> Homecoming {
        let span = Duration::try_from_secs_f64(sessions as f64 / self.rate_per_second).unwrap_or(Duration::MAX);
        let left = self
            .deadline
            .map_or(span, |deadline| span.min(deadline.saturating_since(now)));
        Homecoming {
            drained_at: (left <= RESTART_DRAIN_MAX).then(|| now + left),
            interval: Duration::try_from_secs_f64(1.0 / capacity).unwrap_or(Duration::from_secs(1)),
            told: 0,
        }
    }

    /// How many of the `left` sessions may close now; they count as closed.
    pub fn take_due(&mut self, left: usize, now: Instant) -> usize {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            return left;
        }
        let burst_max = (self.rate_per_second * BURST_MAX.as_secs_f64()).max(1.0);
        let earned = now.saturating_since(self.last).as_secs_f64() * self.rate_per_second;
        self.last = self.last.max(now);
        self.allowance = (self.allowance + earned).min(burst_max);
        let due = (self.allowance.floor() as usize).min(left);
        self.allowance -= due as f64;
        due
    }

    /// When the next session is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Instant {
        let missing = (1.0 - self.allowance).max(0.0);
        let next = self.last + Duration::from_secs_f64(missing / self.rate_per_second);
        self.deadline.map_or(next, |deadline| next.min(deadline))
    }
}

/// When the devices of a drained node come back: after its restart, one after the other at the rate at which they can be taken back.
///
/// A slot of the virtual queue is never later than this, except where other tenants have a backlog: the queue starts at the time of the close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Homecoming {
    /// When the last session is closed. `None`: too far ahead to be waited for.
    drained_at: Option<Instant>,
    /// Between the returns of two devices.
    interval: Duration,
    /// Devices that were given a time.
    told: u32,
}

impl Homecoming {
    /// Between which times from now the next device comes back, whose session is closed now.
    pub fn next_range(&mut self, now: Instant) -> RangeInclusive<Duration> {
        let Some(drained_at) = self.drained_at else {
            return Peers::None.hint_range();
        };
        let from = drained_at.saturating_since(now) + RESTART_TIME + self.interval.saturating_mul(self.told);
        self.told = self.told.saturating_add(1);
        from..=from + RETURN_SPREAD
    }

    /// Everything that is left is closed now.
    pub const fn hurry(&mut self, now: Instant) {
        self.drained_at = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Between which times the first and the last device come back, of `sessions` that are all closed at once.
    fn homecoming(sessions: usize, capacity: f64, deadline_s: u64) -> RangeInclusive<Duration> {
        let pacing = Pacing::drain(capacity, sessions, Duration::from_secs(deadline_s), Instant::ZERO);
        let mut homecoming = pacing.homecoming(sessions, capacity, Instant::ZERO);
        let ranges: Vec<_> = (0..sessions).map(|_| homecoming.next_range(Instant::ZERO)).collect();
        *ranges[0].start()..=*ranges[sessions - 1].end()
    }

    #[test]
    fn a_small_fleet_is_back_within_four_seconds_of_a_restart() {
        let range = homecoming(200, 2_000.0, 25);

        assert!(*range.start() >= Duration::from_millis(2_500), "{range:?}");
        assert!(*range.end() <= Duration::from_millis(3_800), "{range:?}");
    }

    #[test]
    fn the_return_of_a_large_fleet_is_spread_by_its_size_and_the_capacity() {
        for sessions in [10_000_u16, 50_000] {
            let range = homecoming(sessions.into(), 1_000.0, 25);

            let spread = (*range.end() - *range.start()).as_secs_f64() - RETURN_SPREAD.as_secs_f64();
            assert!((spread - f64::from(sessions) / 1_000.0).abs() < 0.01, "{spread}");
        }
    }

    #[test]
    fn no_device_comes_back_before_the_drain_has_ended() {
        let pacing = Pacing::drain(1_000.0, 10_000, Duration::from_secs(25), Instant::ZERO);
        let mut homecoming = pacing.homecoming(10_000, 1_000.0, Instant::ZERO);
        let last = Instant::ZERO + Duration::from_secs(10);

        for ms in [0, 5_000, 10_000] {
            let now = Instant::ZERO + Duration::from_millis(ms);
            assert!(now + *homecoming.next_range(now).start() > last, "{ms}");
        }
    }

    #[test]
    fn nobody_waits_for_the_end_of_a_long_drain() {
        assert_eq!(homecoming(100_000, 10.0, 3_600), Peers::None.hint_range());
    }

    #[test]
    fn a_hurried_drain_ends_at_once() {
        let pacing = Pacing::drain(1.0, 20, Duration::from_secs(25), Instant::ZERO);
        let mut homecoming = pacing.homecoming(20, 100.0, Instant::ZERO);

        homecoming.hurry(Instant::ZERO);

        assert_eq!(*homecoming.next_range(Instant::ZERO).start(), RESTART_TIME);
    }

    #[test]
    fn closes_at_its_rate_and_never_in_a_burst() {
        let mut pacing = Pacing::new(100.0, Instant::ZERO);
        let (mut now, mut closed) = (Instant::ZERO, 0);

        while closed < 1_000 {
            now = pacing.poll_timeout().max(now);
            let due = pacing.take_due(1_000 - closed, now);
            assert!(due <= 25, "{due} at once");
            closed += due;
        }

        let seconds = now.saturating_since(Instant::ZERO).as_secs_f64();
        assert!((9.9..10.1).contains(&seconds), "{seconds}");
        assert!(
            pacing.take_due(1_000, now + Duration::from_secs(60)) <= 25,
            "a late caller gets no burst"
        );
    }

    #[test]
    fn a_drain_is_done_two_seconds_before_its_deadline() {
        let mut pacing = Pacing::drain(10.0, 50_000, Duration::from_secs(25), Instant::ZERO);
        let (mut now, mut left) = (Instant::ZERO, 50_000);

        while left > 0 {
            now = pacing.poll_timeout().max(now);
            left -= pacing.take_due(left, now);
        }

        assert!(now <= Instant::ZERO + Duration::from_secs(23), "{now:?}");
        assert!(
            now >= Instant::ZERO + Duration::from_secs(22),
            "spread over the time there is: {now:?}"
        );
    }

    #[test]
    fn evictions_stay_below_a_tenth_of_the_admission_rate() {
        let now = Instant::ZERO;

        assert!((Pacing::evict(1_000.0, 1_000_000, now).rate_per_second() - 100.0).abs() < 1e-9);
        assert!((Pacing::evict(1_000.0, 10, now).rate_per_second() - 20.0).abs() < 1e-9);
        assert!((Pacing::evict(50.0, 10, now).rate_per_second() - 5.0).abs() < 1e-9);
    }

    #[test]
    fn hurry_makes_everything_due() {
        let mut pacing = Pacing::new(1.0, Instant::ZERO);
        pacing.take_due(10, Instant::ZERO);

        pacing.hurry(Instant::ZERO);

        assert_eq!(pacing.poll_timeout(), Instant::ZERO);
        assert_eq!(pacing.take_due(9, Instant::ZERO), 9);
    }
}
