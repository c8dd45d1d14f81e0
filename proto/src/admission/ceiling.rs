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
    Quota, RateLimiter,
    clock::Clock,
    middleware::NoOpMiddleware,
    nanos::Nanos,
    state::{InMemoryState, NotKeyed},
};

use crate::time::Instant;

/// Keys that an idle ceiling lets through at once, as a part of a second's: a tenth, so that no second has more than 1.1 times its share.
const BURST_PART: u32 = 10;

/// Time for keys to gather where the ceiling holds them up: half of what it takes to fill the burst, so that nothing is lost.
const GATHER: Duration = Duration::from_millis(50);

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
    /// When a key may go that may not now.
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
            blocked_until: None,
        }
    }

    /// Whether one more key may go now; it counts as gone. Once one was stopped, keys gather for [`GATHER`], so that a fleet at the ceiling
    /// costs a few statements of many keys rather than one a key.
    pub fn take(&mut self, now: Instant) -> bool {
        if self.blocked_until.is_some_and(|until| now < until) {
            return false;
        }
        self.clock.0.store(nanos(now), Ordering::Relaxed);
        match self.limiter.check() {
            Ok(()) => {
                self.blocked_until = None;
                true
            }
            Err(not_until) => {
                let micros = not_until.earliest_possible().as_u64().div_ceil(1_000);
                self.blocked_until = Some(Instant::from_micros(micros).max(now + GATHER));
                false
            }
        }
    }

    /// When a key may go, if the last was stopped.
    pub const fn blocked_until(&self) -> Option<Instant> {
        self.blocked_until
    }
}

fn nanos(now: Instant) -> u64 {
    now.as_micros().saturating_mul(1_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lets_the_rate_through_and_says_when_the_next_may_go() {
        let mut now = Instant::ZERO + Duration::from_secs(5);
        let mut ceiling = Ceiling::new(1_000, now);
        let end = now + Duration::from_secs(10);
        let (mut taken, mut waits) = (0, 0);

        while now < end {
            if ceiling.take(now) {
                taken += 1;
            } else {
                let next = ceiling.blocked_until().unwrap();
                assert!(next > now);
                now = next;
                waits += 1;
            }
        }

        assert!((10_000..=10_101).contains(&taken), "{taken}");
        assert!(waits <= 201, "keys gather, 50 at a time: {waits}");
    }
}
