//! Hints for handshakes that are given up while others wait. Start with [`Crush::hint_range`].

use std::{ops::RangeInclusive, time::Duration};

use crate::time::Instant;

/// Minimum and maximum hint.
const HINTS: RangeInclusive<Duration> = Duration::from_millis(500)..=Duration::from_secs(10);
/// Minimum time over which the rate of handshakes is measured. The maximum is about twice as long.
const WINDOW: Duration = Duration::from_secs(1);

/// A time in which handshakes wait for a permit: how long it has lasted, and how fast handshakes complete.
///
/// The rate is that of the last seconds. An average since the beginning would be too low for a fleet after an attack,
/// and too high for an attack after a fleet.
#[derive(Clone, Copy, Debug)]
pub struct Crush {
    began_at: Instant,
    /// Beginning of the window.
    window: Checkpoint,
    /// Beginning of the next window.
    next: Checkpoint,
}

/// Number of handshakes that had completed by a time.
#[derive(Clone, Copy, Debug)]
struct Checkpoint {
    at: Instant,
    completed: u64,
}

impl Crush {
    /// A crush that begins now. `completed` is the number of handshakes completed since the process started, here and
    /// below.
    #[must_use]
    pub const fn begin(now: Instant, completed: u64) -> Self {
        let checkpoint = Checkpoint { at: now, completed };
        Self {
            began_at: now,
            window: checkpoint,
            next: checkpoint,
        }
    }

    /// Advances the window. Call it while handshakes wait.
    pub const fn note(&mut self, now: Instant, completed: u64) {
        if now.saturating_since(self.next.at).as_micros() >= WINDOW.as_micros() {
            self.window = self.next;
            self.next = Checkpoint { at: now, completed };
        }
    }

    /// Hint for a handshake that is given up: the time that the `under_way` handshakes take at the current rate, at
    /// most the age of the crush. While none completes it is that age: a new crush sends devices away briefly only, and
    /// an attack keeps its own devices away.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "counts of handshakes are far below 2^53")]
    pub fn hint_range(&self, now: Instant, completed: u64, under_way: usize) -> RangeInclusive<Duration> {
        let lasted = now.saturating_since(self.began_at);
        let span = now.saturating_since(self.window.at).as_secs_f64();
        let recently = completed.saturating_sub(self.window.completed);
        let wait = match recently {
            0 => lasted,
            recently => {
                let seconds = span * under_way as f64 / recently as f64;
                Duration::try_from_secs_f64(seconds).map_or(lasted, |wait| wait.min(lasted))
            }
        };
        let from = (wait / 2).clamp(*HINTS.start() / 2, *HINTS.end() / 2);
        from..=from * 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(10);
    const UNDER_WAY: usize = 4_500;

    /// A crush in virtual time.
    struct Story {
        now: Instant,
        completed: u64,
        crush: Crush,
    }

    impl Story {
        fn begin() -> Self {
            Self {
                now: Instant::ZERO,
                completed: 7,
                crush: Crush::begin(Instant::ZERO, 7),
            }
        }

        /// So many handshakes complete each second.
        fn pass(&mut self, seconds: f64, per_second: u64) {
            let until = self.now + Duration::from_secs_f64(seconds);
            while self.now < until {
                self.now += STEP;
                self.completed += per_second / 100;
                self.crush.note(self.now, self.completed);
            }
        }

        fn hint_max(&self) -> Duration {
            let range = self.crush.hint_range(self.now, self.completed, UNDER_WAY);
            assert_eq!(*range.start() * 2, *range.end());
            *range.end()
        }
    }

    #[test]
    fn a_crush_that_has_just_begun_sends_nobody_away_for_long() {
        let mut story = Story::begin();
        assert_eq!(story.hint_max(), Duration::from_millis(500));

        story.pass(0.3, 0);

        assert_eq!(story.hint_max(), Duration::from_millis(500));
    }

    #[test]
    fn the_longer_nobody_completes_the_longer_the_hint_up_to_ten_seconds() {
        let mut story = Story::begin();
        story.pass(4.0, 0);
        assert_eq!(story.hint_max(), Duration::from_secs(4));

        story.pass(3_600.0, 0);

        assert_eq!(story.hint_max(), Duration::from_secs(10));
    }

    #[test]
    fn a_fleet_that_gets_in_is_told_how_long_those_under_way_take_however_long_it_lasts() {
        for seconds in [5.0, 20.0, 600.0] {
            let mut story = Story::begin();

            story.pass(seconds, 3_000);

            let hint = story.hint_max().as_secs_f64();
            assert!((1.49..=1.51).contains(&hint), "{hint} s after {seconds} s");
        }
    }

    #[test]
    fn a_fleet_that_gets_in_after_an_attack_is_not_told_the_time_of_the_attack() {
        let mut story = Story::begin();
        story.pass(60.0, 0);
        assert_eq!(story.hint_max(), Duration::from_secs(10));

        story.pass(2.5, 10_000);

        assert_eq!(story.hint_max(), Duration::from_millis(500));
    }

    #[test]
    fn an_attack_after_a_fleet_is_not_told_the_pace_of_the_fleet() {
        let mut story = Story::begin();
        story.pass(20.0, 20_000);
        assert_eq!(story.hint_max(), Duration::from_millis(500));

        story.pass(2.5, 0);

        assert_eq!(story.hint_max(), Duration::from_secs(10));
    }

    #[test]
    fn a_hint_stays_within_its_bounds_whatever_is_under_way() {
        let mut story = Story::begin();
        story.pass(30.0, 100);

        for under_way in [0, 1, usize::MAX] {
            let range = story.crush.hint_range(story.now, story.completed, under_way);
            assert!(*range.start() >= Duration::from_millis(250), "{range:?}");
            assert!(*range.end() <= Duration::from_secs(10), "{range:?}");
        }
    }
}
