//! The reference capacity: the rate at which slots are given out.

use std::time::Duration;

use crate::time::Instant;

/// Time constant with which the best measured rate fades, and the last known good with it.
const PEAK_FADES: Duration = Duration::from_secs(600);
/// Maximum time by which the last known good fades at once: the interval at which it is kept. An idle night says
/// nothing about the database.
const FADE_STEP_MAX: Duration = Duration::from_secs(60);
/// Factor by which slots are issued faster than the best measured rate. An unused slot costs nothing, idle time does.
pub(in crate::admission) const OVERBOOKING: f64 = 1.25;
/// Minimum of the reference as a part of the ceiling. Otherwise an outage that is measured first would be taken for the
/// capacity.
const FLOOR_PART: f64 = 0.25;

/// Number of consecutive seconds over which the best rate is averaged; at least half as many are needed.
const RECENT_SECONDS: u32 = 8;
/// Time without a measurement after which a new sequence begins.
const RECENT_GAP: Duration = Duration::from_secs(10);

/// Reference capacity in keys per second: `clamp(1.25 · max(best of the last 10 min, last known good), ceiling / 4,
/// ceiling)`. The ceiling if nothing was ever measured. docs/design/limiter.md has the reasons.
#[derive(Clone, Debug)]
pub(in crate::admission) struct Reference {
    ceiling: f64,
    last_known_good: f64,
    /// Time at which the last known good last faded.
    faded_at: Instant,
    peak: f64,
    peak_at: Instant,
    recent: Recent,
    /// Whether the peak is from too few seconds to compete with later ones.
    is_provisional: bool,
    /// Whether there was a measurement since the last known good was taken.
    is_news: bool,
}

/// Average of the latest consecutive seconds.
#[derive(Clone, Debug, Default)]
struct Recent {
    average: f64,
    seconds: u32,
    at: Instant,
}

impl Recent {
    /// Adds a second. Returns the average, and whether it is from enough seconds to be used.
    fn add(&mut self, keys_per_second: f64, now: Instant) -> (f64, bool) {
        if self.at + RECENT_GAP < now {
            self.seconds = 0;
        }
        self.at = now;
        self.seconds = (self.seconds + 1).min(RECENT_SECONDS);
        self.average += (keys_per_second - self.average) / f64::from(self.seconds);
        (self.average, self.seconds >= RECENT_SECONDS / 2)
    }
}

impl Reference {
    pub fn new(ceiling: u32, now: Instant) -> Self {
        Self {
            ceiling: f64::from(ceiling.max(1)),
            last_known_good: 0.0,
            faded_at: now,
            peak: 0.0,
            peak_at: now,
            recent: Recent::default(),
            is_provisional: false,
            is_news: false,
        }
    }

    pub fn set_ceiling(&mut self, ceiling: u32) {
        self.ceiling = f64::from(ceiling.max(1));
    }

    /// Scales the measurements after this node's share of the database has changed.
    pub fn scale(&mut self, change: f64) {
        self.peak *= change;
        self.last_known_good *= change;
        self.recent.average *= change;
    }

    /// Sets the last known good. A figure that is not a rate is ignored.
    pub fn set_last_known_good(&mut self, keys_per_second: f64) {
        self.last_known_good = if keys_per_second.is_finite() {
            keys_per_second.max(0.0)
        } else {
            0.0
        };
    }

    pub const fn last_known_good(&self) -> f64 {
        self.last_known_good
    }

    /// Lets the last known good fade towards the best measured rate, and returns it, if there was a measurement. It
    /// is never replaced at once: the first minute after a restart may be a slow one.
    pub fn take_last_known_good(&mut self, now: Instant) -> Option<f64> {
        let is_news = std::mem::take(&mut self.is_news);
        is_news.then(|| {
            let span = now.saturating_since(self.faded_at).min(FADE_STEP_MAX);
            self.faded_at = now;
            let faded = self.last_known_good * (-span.as_secs_f64() / PEAK_FADES.as_secs_f64()).exp();
            self.last_known_good = faded.max(self.peak(now));
            debug_assert!(self.last_known_good.is_finite());
            self.last_known_good
        })
    }

    /// Adds the rate of about a second in which devices waited nearly all the time.
    pub fn handle_measured(&mut self, keys_per_second: f64, now: Instant) {
        // The best single second is an outlier, and a larger one on some nodes than on others. Their slots must end
        // together.
        let (average, is_settled) = self.recent.add(keys_per_second, now);
        let is_first = self.peak <= 0.0 || self.is_provisional;
        if is_first {
            self.peak = average;
            self.is_provisional = !is_settled;
        } else if is_settled {
            self.peak = self.peak(now).max(average);
        } else {
            return;
        }
        self.peak_at = now;
        debug_assert!(self.peak.is_finite());
        // The first second alone is not kept.
        self.is_news |= self.peak > 0.0 && !self.is_provisional;
    }

    /// Best measured rate, faded.
    pub fn peak(&self, now: Instant) -> f64 {
        let age = now.saturating_since(self.peak_at).as_secs_f64();
        self.peak * (-age / PEAK_FADES.as_secs_f64()).exp()
    }

    pub fn keys_per_second(&self, now: Instant) -> f64 {
        if self.peak <= 0.0 && self.last_known_good <= 0.0 {
            // Slots that are too close cost another attempt. Slots that are too far apart leave the database idle.
            return self.ceiling;
        }
        (OVERBOOKING * self.peak(now).max(self.last_known_good)).clamp(self.ceiling * FLOOR_PART, self.ceiling)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Instant {
        Instant::from_micros(ms * 1_000)
    }

    /// Measures consecutive seconds of a backlog, the last of which ends at `end`.
    fn measure(reference: &mut Reference, rates: &[f64], end: Instant) {
        for (before, rate) in (0..rates.len()).rev().zip(rates) {
            let second = u64::try_from(before).unwrap();
            reference.handle_measured(*rate, Instant::from_micros(end.as_micros() - second * 1_000_000));
        }
    }

    fn assert_is(reference: &Reference, now: Instant, keys_per_second: f64) {
        let is = reference.keys_per_second(now);
        assert!((is - keys_per_second).abs() < 1e-9, "{is}");
    }

    #[test]
    fn reference_starts_at_the_ceiling_and_follows_the_best_measured_down_to_a_quarter() {
        let mut reference = Reference::new(10_000, at(0));
        assert_is(&reference, at(0), 10_000.0);

        measure(&mut reference, &[4_000.0; 4], at(10_000));
        measure(&mut reference, &[100.0; 4], at(30_000));

        assert!(reference.keys_per_second(at(30_000)) > 4_800.0);
        assert_is(&reference, at(7_200_000), 2_500.0);
        measure(&mut reference, &[1e9; 4], at(7_200_000));
        assert_is(&reference, at(7_200_000), 10_000.0);
    }

    #[test]
    fn one_lucky_second_is_not_the_best_rate() {
        let mut reference = Reference::new(10_000, at(0));
        let rates = [4_000.0, 4_000.0, 4_000.0, 4_000.0, 8_000.0, 4_000.0, 0.0, 4_000.0];

        measure(&mut reference, &rates, at(10_000));

        assert!(reference.peak(at(10_000)) <= 5_000.0, "{}", reference.peak(at(10_000)));
    }

    #[test]
    fn first_second_counts_until_there_are_more() {
        let mut reference = Reference::new(10_000, at(0));

        measure(&mut reference, &[3_200.0], at(10_000));
        assert_is(&reference, at(10_000), 4_000.0);
        measure(&mut reference, &[2_400.0; 3], at(13_000));

        assert_is(&reference, at(13_000), 1.25 * (3_200.0 + 3.0 * 2_400.0) / 4.0);
    }

    #[test]
    fn last_known_good_outlives_an_idle_night_but_not_a_slower_day() {
        let (night, day) = (at(36_000_000), at(72_000_000));
        let mut reference = Reference::new(10_000, at(0));
        measure(&mut reference, &[4_000.0; 4], at(10_000));
        assert_eq!(reference.take_last_known_good(at(10_000)), Some(4_000.0));

        assert_eq!(reference.take_last_known_good(night), None, "nothing new");
        assert_is(&reference, night, 5_000.0);

        for minute in 0..60 {
            let now = day + Duration::from_secs(60 * minute);
            measure(&mut reference, &[2_400.0; 4], now);
            assert!(reference.take_last_known_good(now).is_some());
        }
        let evening = day + Duration::from_secs(60 * 59);
        assert_is(&reference, evening, 3_000.0);
    }

    #[test]
    fn last_known_good_survives_a_slow_minute_after_a_restart() {
        let mut reference = Reference::new(10_000, at(0));
        reference.set_last_known_good(8_000.0);

        measure(&mut reference, &[500.0], at(1_000));
        assert_eq!(
            reference.take_last_known_good(at(1_000)),
            None,
            "one second is not news"
        );
        measure(&mut reference, &[500.0; 50], at(60_000));
        let kept = reference.take_last_known_good(at(60_000)).unwrap();

        assert!((kept - 8_000.0 * (-0.1_f64).exp()).abs() < 1e-6, "{kept}");
        assert_is(&reference, at(60_000), 1.25 * kept);
    }

    #[test]
    fn last_known_good_that_is_no_rate_is_none() {
        for bad in [f64::NAN, f64::INFINITY, -5.0] {
            let mut reference = Reference::new(10_000, at(0));
            reference.set_last_known_good(bad);
            assert_is(&reference, at(0), 10_000.0);
        }
    }
}
