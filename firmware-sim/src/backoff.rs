//! How long a device waits before it reconnects: policies behind the `backoff` crate's [`Backoff`] trait.
//!
//! A policy here is a view, made for one decision: it borrows the device's count of [`Attempts`] and the caller's random
//! source, so that a device keeps one byte between decisions. The crate's own retry loop is not used: it takes a server's
//! hint without counting the attempt, and gives up after 15 minutes.

use std::time::Duration;

pub use backoff::backoff::Backoff;
use rand::Rng;

/// Longest wait after the first attempt without an answer; doubles with each further one. See docs/design/slots.md.
pub const BASE: Duration = Duration::from_secs(1);
/// Longest wait, until a gateway's welcome says otherwise.
pub const CAP_DEFAULT: Duration = Duration::from_secs(60);
/// A welcome can't raise the cap beyond this: a device that a slip in a setting sent away for weeks is lost.
pub const CAP_MAX: Duration = Duration::from_secs(3600);
/// The first return after a session is drawn from 0 to this. RFC 6455 §7.2.3.
pub const FIRST_RETURN_MAX: Duration = Duration::from_secs(5);
/// A hint below this is taken as this: a gateway that says 0 must not make its fleet spin.
pub const HINT_MIN: Duration = Duration::from_millis(100);
/// A hint beyond this is taken as this: 30 days, so that one bad number loses no device for good, and yet so far out that
/// no real hint is cut, which would take the spread from a fleet's hints.
pub const HINT_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// Attempts since the last stable session. Stops counting at 255; the waits stop growing long before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attempts(u8);

impl Attempts {
    /// A device that has just been switched on.
    pub const NONE: Self = Self(0);

    /// One more attempt, or a session that ended before it was stable.
    pub const fn count(&mut self) {
        self.0 = self.0.saturating_add(1);
    }

    /// A session was stable.
    pub const fn reset(&mut self) {
        self.0 = 0;
    }

    /// How many.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// `min(cap, BASE · 2^attempts)`.
    fn ceiling(self, cap: Duration) -> Duration {
        let factor = 1_u32.checked_shl(u32::from(self.0)).unwrap_or(u32::MAX);
        BASE.saturating_mul(factor).min(cap)
    }
}

/// Uniform between nothing and a ceiling that doubles: the reference device's wait where the gateway gave no hint.
#[derive(Debug)]
pub struct FullJitter<'a, R> {
    pub attempts: &'a mut Attempts,
    pub cap: Duration,
    pub rng: &'a mut R,
}

impl<R: Rng> Backoff for FullJitter<'_, R> {
    fn next_backoff(&mut self) -> Option<Duration> {
        let ceiling = self.attempts.ceiling(self.cap);
        self.attempts.count();
        Some(up_to(ceiling, self.rng))
    }

    fn reset(&mut self) {
        self.attempts.reset();
    }
}

/// The first return after a session that ended without a hint: uniform between nothing and 5 s, or what [`FullJitter`]
/// would draw where that is more (the sessions before this one were not stable either). Counts nothing: the end of an
/// unstable session is counted by whoever saw it.
#[derive(Debug)]
pub struct FirstReturn<'a, R> {
    pub attempts: Attempts,
    pub cap: Duration,
    pub rng: &'a mut R,
}

impl<R: Rng> Backoff for FirstReturn<'_, R> {
    fn next_backoff(&mut self) -> Option<Duration> {
        let ceiling = self.attempts.ceiling(self.cap).max(FIRST_RETURN_MAX);
        Some(up_to(ceiling, self.rng))
    }
}

/// What the gateway asked for, to the millisecond: the gateway has drawn it, so nothing is added. Counts the attempt, so
/// that a gateway that then falls silent is met with patience.
#[derive(Debug)]
pub struct Hinted<'a> {
    pub attempts: &'a mut Attempts,
    pub hint: Duration,
}

impl Backoff for Hinted<'_> {
    fn next_backoff(&mut self) -> Option<Duration> {
        self.attempts.count();
        Some(self.hint.clamp(HINT_MIN, HINT_MAX))
    }

    fn reset(&mut self) {
        self.attempts.reset();
    }
}

/// 1, 2, 4, … s up to the cap, without any jitter: devices that failed together return together.
#[derive(Debug)]
pub struct Exponential<'a> {
    pub attempts: &'a mut Attempts,
    pub cap: Duration,
}

impl Backoff for Exponential<'_> {
    fn next_backoff(&mut self) -> Option<Duration> {
        let wait = self.attempts.ceiling(self.cap);
        self.attempts.count();
        Some(wait)
    }

    fn reset(&mut self) {
        self.attempts.reset();
    }
}

/// Always the same wait.
#[derive(Debug)]
pub struct Fixed(pub Duration);

impl Backoff for Fixed {
    fn next_backoff(&mut self) -> Option<Duration> {
        Some(self.0)
    }
}

/// Uniform between nothing and `ceiling`, to the microsecond.
pub(crate) fn up_to(ceiling: Duration, rng: &mut impl Rng) -> Duration {
    between(Duration::ZERO, ceiling, rng)
}

/// Uniform between two spans, to the microsecond.
pub(crate) fn between(least: Duration, most: Duration, rng: &mut impl Rng) -> Duration {
    let micros = |span: Duration| u64::try_from(span.as_micros()).unwrap_or(u64::MAX);
    Duration::from_micros(rng.random_range(micros(least)..=micros(most).max(micros(least))))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;

    proptest! {
        #[test]
        fn full_jitter_stays_under_its_doubling_ceiling(seed: u64, cap_s in 1_u64..3600) {
            let cap = Duration::from_secs(cap_s);
            let (mut attempts, mut rng) = (Attempts::default(), SmallRng::seed_from_u64(seed));
            for n in 0..40_u32 {
                let ceiling = Duration::from_secs(1_u64 << n.min(20)).min(cap);

                let wait = FullJitter { attempts: &mut attempts, cap, rng: &mut rng }.next_backoff().unwrap();

                prop_assert!(wait <= ceiling, "{wait:?} after {n} attempts");
            }
        }

        #[test]
        fn hint_is_obeyed_exactly_within_its_bounds(hint_ms: u64) {
            let mut attempts = Attempts::default();
            let hint = Duration::from_millis(hint_ms);

            let wait = Hinted { attempts: &mut attempts, hint }.next_backoff().unwrap();

            prop_assert_eq!(wait, hint.clamp(HINT_MIN, HINT_MAX));
            prop_assert_eq!(attempts.get(), 1);
        }
    }

    #[test]
    fn full_jitter_uses_its_whole_range() {
        let mut rng = SmallRng::seed_from_u64(7);
        let waits: Vec<Duration> = (0..1000).map(|_| up_to(Duration::from_secs(1), &mut rng)).collect();

        assert!(waits.iter().any(|wait| wait.as_millis() < 20));
        assert!(waits.iter().any(|wait| wait.as_millis() > 980));
    }

    #[test]
    fn exponential_doubles_to_the_cap_and_resets() {
        let mut attempts = Attempts::default();
        let mut policy = Exponential {
            attempts: &mut attempts,
            cap: CAP_DEFAULT,
        };

        let waits: Vec<u64> = (0..8).map(|_| policy.next_backoff().unwrap().as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);

        policy.reset();
        assert_eq!(policy.next_backoff(), Some(BASE));
    }

    #[test]
    fn first_return_grows_only_where_sessions_were_unstable() {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut longest = |attempts| {
            (0..500)
                .map(|_| {
                    FirstReturn {
                        attempts: Attempts(attempts),
                        cap: CAP_DEFAULT,
                        rng: &mut rng,
                    }
                    .next_backoff()
                    .unwrap()
                })
                .max()
                .unwrap()
        };

        assert!(longest(0) <= FIRST_RETURN_MAX);
        assert!(longest(5) > Duration::from_secs(20));
        assert!(longest(200) <= CAP_DEFAULT);
    }
}
