//! Rate limits in time that the caller supplies: [`Gcra`] for single events, [`Bucket`] for a quota that is taken
//! in parts.

use std::time::Duration;

use crate::time::Instant;

/// A rate with its burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rate {
    interval_ns: u64,
    burst: u32,
}

impl Rate {
    /// One event per `interval`, and at most `burst` at once. A burst of 0 is handled as 1.
    pub const fn every(interval: Duration, burst: u32) -> Self {
        Self {
            interval_ns: nanos(interval),
            burst: if burst == 0 { 1 } else { burst },
        }
    }

    /// `events` per second (at least one), and at most `burst` at once.
    pub const fn per_second(events: u32, burst: u32) -> Self {
        let events = if events == 0 { 1 } else { events };
        Self {
            interval_ns: 1_000_000_000 / events as u64,
            burst: if burst == 0 { 1 } else { burst },
        }
    }

    const fn span_ns(self, events: u32) -> u64 {
        self.interval_ns.saturating_mul(events as u64)
    }
}

/// State of the generic cell rate algorithm (ITU-T I.371): the time at which all events taken so far are paid back. In
/// nanoseconds, because an interval may be shorter than a microsecond.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Gcra {
    paid_at_ns: u64,
}

impl Gcra {
    /// Takes `events` if the rate allows all of them now. A number above the burst is never allowed.
    ///
    /// # Errors
    /// The earliest time at which the rate allows them, if nothing else is taken before. Nothing is taken.
    pub fn take(&mut self, events: u32, rate: Rate, now: Instant) -> Result<(), Instant> {
        let paid_at_ns = self.paid_at_ns.max(now_ns(now)).saturating_add(rate.span_ns(events));
        let allowed_at_ns = paid_at_ns.saturating_sub(rate.span_ns(rate.burst));
        if allowed_at_ns > now_ns(now) {
            return Err(Instant::from_micros(allowed_at_ns.div_ceil(1_000)));
        }
        self.paid_at_ns = paid_at_ns;
        Ok(())
    }

    /// Takes one event at the earliest time at which the rate allows it, and returns that time.
    pub fn reserve(&mut self, rate: Rate, now: Instant) -> Instant {
        self.paid_at_ns = self.paid_at_ns.max(now_ns(now)).saturating_add(rate.interval_ns);
        let allowed_at_ns = self.paid_at_ns.saturating_sub(rate.span_ns(rate.burst));
        Instant::from_micros(allowed_at_ns.div_ceil(1_000)).max(now)
    }

    /// Takes one event regardless of the rate. At most a burst is owed afterwards.
    pub fn charge(&mut self, rate: Rate, now: Instant) {
        let paid_at_ns = self.paid_at_ns.max(now_ns(now)).saturating_add(rate.interval_ns);
        self.paid_at_ns = paid_at_ns.min(now_ns(now).saturating_add(rate.span_ns(rate.burst)));
    }

    /// Number of events that are not paid back yet, rounded up.
    pub fn owed(self, rate: Rate, now: Instant) -> u32 {
        let left_ns = self.paid_at_ns.saturating_sub(now_ns(now));
        u32::try_from(left_ns.div_ceil(rate.interval_ns.max(1))).unwrap_or(u32::MAX)
    }

    /// Time at which all events are paid back, in nanoseconds. Of two that share a rate, the later one owes more.
    pub const fn clean_at_ns(self) -> u64 {
        self.paid_at_ns
    }

    /// Whether all events are paid back.
    pub fn is_clean(self, now: Instant) -> bool {
        self.paid_at_ns <= now_ns(now)
    }
}

/// A token bucket. Rate and burst are passed with each call, because both may change.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Bucket {
    tokens: f64,
    refilled_at: Instant,
}

impl Bucket {
    /// Creates a bucket with `tokens`.
    pub const fn new(tokens: f64, now: Instant) -> Self {
        Self {
            tokens,
            refilled_at: now,
        }
    }

    /// Adds the tokens earned since the last refill. The bucket holds at most `burst` tokens afterwards.
    pub fn refill(&mut self, per_second: f64, burst: f64, now: Instant) {
        let earned = now.saturating_since(self.refilled_at).as_secs_f64() * per_second;
        self.tokens = (self.tokens + earned).min(burst);
        self.refilled_at = self.refilled_at.max(now);
    }

    /// Takes whole tokens, at most `wanted`. Returns how many.
    pub fn take(&mut self, wanted: usize) -> usize {
        let taken = (self.tokens.floor() as usize).min(wanted);
        self.tokens -= taken as f64;
        taken
    }

    /// Time at which the bucket holds a whole token.
    pub fn poll_timeout(&self, per_second: f64) -> Instant {
        let missing = (1.0 - self.tokens).max(0.0);
        self.refilled_at + Duration::try_from_secs_f64(missing / per_second).unwrap_or(Duration::MAX)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "saturates before that, after 584 years")]
const fn nanos(span: Duration) -> u64 {
    let nanos = span.as_nanos();
    if nanos > u64::MAX as u128 {
        u64::MAX
    } else {
        nanos as u64
    }
}

const fn now_ns(now: Instant) -> u64 {
    now.as_micros().saturating_mul(1_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Instant {
        Instant::from_micros(ms * 1_000)
    }

    #[test]
    fn burst_passes_at_once_and_the_rate_for_ever() {
        let rate = Rate::per_second(10, 5);
        let mut gcra = Gcra::default();

        let at_once = (0..20).filter(|_| gcra.take(1, rate, at(0)).is_ok()).count();
        let later = (1..=100).filter(|n| gcra.take(1, rate, at(n * 100)).is_ok()).count();

        assert_eq!((at_once, later), (5, 100));
    }

    #[test]
    fn events_that_are_not_allowed_cost_nothing_and_their_time_is_named() {
        let rate = Rate::per_second(1_000, 100);
        let mut gcra = Gcra::default();
        gcra.take(100, rate, at(0)).unwrap();

        assert_eq!(gcra.take(50, rate, at(10)), Err(at(50)));
        assert_eq!(gcra.take(50, rate, at(50)), Ok(()));
        assert!(gcra.take(101, rate, at(10_000)).is_err(), "more than the burst");
    }

    #[test]
    fn reserved_events_take_their_turn() {
        let rate = Rate::per_second(10, 2);
        let mut gcra = Gcra::default();

        let reserved = [(); 5].map(|()| gcra.reserve(rate, at(0)));

        assert_eq!(reserved, [at(0), at(0), at(100), at(200), at(300)]);
        assert_eq!(gcra.take(1, rate, at(350)), Err(at(400)));
    }

    #[test]
    fn what_is_charged_is_owed_up_to_the_burst_and_paid_back_with_time() {
        let rate = Rate::every(Duration::from_secs(30), 10);
        let mut gcra = Gcra::default();
        for _ in 0..100 {
            gcra.charge(rate, at(0));
        }

        assert_eq!(gcra.owed(rate, at(0)), 10);
        assert_eq!(gcra.owed(rate, at(30_001)), 9, "a part counts as one");
        assert!(gcra.is_clean(at(300_000)));
    }

    #[test]
    fn bucket_earns_its_rate_and_holds_at_most_its_burst() {
        let mut bucket = Bucket::new(1.0, Instant::ZERO);
        let at = |ms| Instant::ZERO + Duration::from_millis(ms);

        assert_eq!((bucket.take(5), bucket.take(5)), (1, 0));
        assert_eq!(bucket.poll_timeout(10.0), at(100));
        bucket.refill(10.0, 4.0, at(250));
        assert_eq!((bucket.take(1), bucket.take(5)), (1, 1));
        bucket.refill(10.0, 4.0, at(60_000));
        assert_eq!(bucket.take(5), 4);
        bucket.refill(10.0, 4.0, at(1_000));
        assert_eq!(bucket.take(5), 0, "time does not go back");
    }
}
