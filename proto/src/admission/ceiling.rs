//! Maximum rate of lookups: keys per second on this node. A hard figure, never adapted upward.

use super::{linger::WAIT_MAX, to_u32, to_usize};
use crate::{
    rate::{Gcra, Rate},
    time::Instant,
};

/// Keys that an idle ceiling admits at once, as a part of a second's: a tenth, so that no second has more than 1.1
/// times its share.
const BURST_PART: u32 = 10;

#[derive(Debug)]
pub(super) struct Ceiling {
    rate: Rate,
    gcra: Gcra,
    /// Maximum number of keys that a statement waits for.
    at_once: u32,
    /// Time from which blocked keys are admitted.
    blocked_until: Option<Instant>,
    /// The last statement was blocked before it was admitted.
    has_waited: bool,
}

impl Ceiling {
    pub fn new(keys_per_second: u32) -> Self {
        let burst = (keys_per_second / BURST_PART).max(1);
        Self {
            rate: Rate::per_second(keys_per_second, burst),
            gcra: Gcra::default(),
            at_once: at_once(keys_per_second).min(burst),
            blocked_until: None,
            has_waited: false,
        }
    }

    /// Changes the rate. Keys that were admitted earlier are accounted at their time.
    pub fn set_rate(&mut self, keys_per_second: u32) {
        *self = Self {
            gcra: self.gcra,
            ..Self::new(keys_per_second)
        };
    }

    /// Takes the keys of one statement that are admitted now: all or none, up to the number that fills within
    /// [`WAIT_MAX`]. A statement of the few keys that are left would cost the database as much as one of them all, a
    /// moment later.
    pub fn take(&mut self, keys: usize, now: Instant) -> usize {
        let wanted = to_u32(keys).min(self.at_once);
        if wanted == 0 || self.blocked_until.is_some_and(|until| now < until) {
            return 0;
        }
        let had_to_wait = self.blocked_until.is_some();
        self.blocked_until = self.gcra.take(wanted, self.rate, now).err();
        match self.blocked_until {
            Some(_) => 0,
            None => {
                self.has_waited = had_to_wait;
                to_usize(wanted)
            }
        }
    }

    /// Whether statements wait for the ceiling: the current one, or the last one.
    pub const fn is_reached(&self) -> bool {
        self.blocked_until.is_some() || self.has_waited
    }

    /// Time from which keys are admitted, if the last ones were blocked.
    pub const fn blocked_until(&self) -> Option<Instant> {
        self.blocked_until
    }
}

/// Keys that fill up within [`WAIT_MAX`], at least one.
fn at_once(keys_per_second: u32) -> u32 {
    let keys = u128::from(keys_per_second) * WAIT_MAX.as_millis() / 1_000;
    u32::try_from(keys).unwrap_or(u32::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Asks for `keys` at a time for ten seconds. Returns the keys admitted, and the statements.
    fn ask_for_ten_seconds(keys: usize) -> (usize, usize) {
        let mut now = Instant::ZERO + Duration::from_secs(5);
        let mut ceiling = Ceiling::new(1_000);
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
