//! The ceiling: keys looked up a second, node-wide. A hard figure, never adapted upward. `governor` on a clock that is told.

use std::{
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use governor::{
    InsufficientCapacity, Quota, RateLimiter,
    clock::Clock,
    middleware::NoOpMiddleware,
    nanos::Nanos,
    state::{InMemoryState, NotKeyed},
};

use super::{gather::WAIT_MAX, to_usize};
use crate::time::Instant;

/// Keys that an idle ceiling lets through at once, as a part of a second's: a tenth, so that no second has more than 1.1 times its share.
const BURST_PART: u32 = 10;

/// Shows the time it was last told.
#[derive(Clone, Debug, Default)]
struct ToldClock(Arc<AtomicU64>);

impl Clock for ToldClock {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        Nanos::from(self.0.load(Ordering::Relaxed))
    }
}

#[derive(Debug)]
pub(super) struct Ceiling {
    clock: ToldClock,
    limiter: RateLimiter<NotKeyed, InMemoryState, ToldClock, NoOpMiddleware<Nanos>>,
    /// Most keys that are waited for together.
    at_once: NonZeroU32,
    /// When keys may go that may not now.
    blocked_until: Option<Instant>,
}

impl Ceiling {
    pub fn new(keys_per_second: u32, now: Instant) -> Self {
        let clock = ToldClock::default();
        clock.0.store(nanos(now), Ordering::Relaxed);
        let rate = NonZeroU32::new(keys_per_second).unwrap_or(NonZeroU32::MIN);
        let burst = NonZeroU32::new(keys_per_second / BURST_PART).unwrap_or(NonZeroU32::MIN);
        let quota = Quota::per_second(rate).allow_burst(burst);
        Self {
            limiter: RateLimiter::direct_with_clock(quota, clock.clone()),
            clock,
            at_once: at_once(rate).min(burst),
            blocked_until: None,
        }
    }

    /// How many of the keys of one statement may go now; they count as gone. All or none, as far as [`WAIT_MAX`] fills the ceiling: a
    /// statement of what it just leaves would cost the database as much as one of them all, a moment later.
    pub fn take(&mut self, keys: usize, now: Instant) -> usize {
        if self.blocked_until.is_some_and(|until| now < until) {
            return 0;
        }
        let wanted = u32::try_from(keys).unwrap_or(u32::MAX);
        let Some(wanted) = NonZeroU32::new(wanted.min(self.at_once.get())) else {
            return 0;
        };
        self.clock.0.store(nanos(now), Ordering::Relaxed);
        match self.limiter.check_n(wanted) {
            Ok(Ok(())) => {
                self.blocked_until = None;
                to_usize(wanted.get())
            }
            Ok(Err(not_until)) => {
                let micros = not_until.earliest_possible().as_u64().div_ceil(1_000);
                self.blocked_until = Some(Instant::from_micros(micros).max(now + Duration::from_micros(1)));
                0
            }
            // Never: `at_once` is within the burst.
            Err(InsufficientCapacity(_)) => 0,
        }
    }

    /// When keys may go, if the last were stopped.
    pub const fn blocked_until(&self) -> Option<Instant> {
        self.blocked_until
    }
}

/// Keys that fill up within [`WAIT_MAX`], at least one.
fn at_once(keys_per_second: NonZeroU32) -> NonZeroU32 {
    let millis = u32::try_from(WAIT_MAX.as_millis()).unwrap_or(u32::MAX);
    let keys = u64::from(keys_per_second.get()) * u64::from(millis) / 1_000;
    u32::try_from(keys)
        .ok()
        .and_then(NonZeroU32::new)
        .unwrap_or(NonZeroU32::MIN)
}

fn nanos(now: Instant) -> u64 {
    now.as_micros().saturating_mul(1_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks for `keys` at a time for ten seconds; the keys that went, and the statements.
    fn ask_for_ten_seconds(keys: usize) -> (usize, usize) {
        let mut now = Instant::ZERO + Duration::from_secs(5);
        let mut ceiling = Ceiling::new(1_000, now);
        let end = now + Duration::from_secs(10);
        let (mut taken, mut statements) = (0, 0);
        while now < end {
            match ceiling.take(keys, now) {
                0 => {
                    let next = ceiling.blocked_until().unwrap();
                    assert!(next > now);
                    assert!(next <= now + WAIT_MAX, "waits {:?}", next.saturating_since(now));
                    now = next;
                }
                more => {
                    taken += more;
                    statements += 1;
                }
            }
        }
        (taken, statements)
    }

    #[test]
    fn lets_the_rate_through_and_says_when_the_next_may_go() {
        for keys in [1, 7, 64, 100, 256] {
            let (taken, _) = ask_for_ten_seconds(keys);

            assert!((10_000 - keys..=10_101).contains(&taken), "{keys} at a time: {taken}");
        }
    }

    #[test]
    fn keys_of_a_statement_go_together() {
        let (taken, statements) = ask_for_ten_seconds(64);

        assert_eq!(taken, statements * 64);
    }

    #[test]
    fn more_keys_than_fill_up_in_80_ms_are_not_waited_for() {
        let (_, statements) = ask_for_ten_seconds(256);

        assert!((125..=127).contains(&statements), "{statements} of 80 keys");
    }
}
