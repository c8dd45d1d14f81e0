//! The capacity that slots are given out by.

use std::time::Duration;

use crate::time::Instant;

/// The best rate measured fades with this time constant.
const PEAK_FADES: Duration = Duration::from_secs(600);
/// Slots are given out a quarter faster than the best measured: unused ones cost nothing, idle time does.
pub(in crate::admission) const OVERBOOKING: f64 = 1.25;
/// The reference never falls below this part of the ceiling, or an outage seen first would be taken for the capacity.
const FLOOR_PART: f64 = 0.25;

/// `K_ref = clamp(1.25 · max(best of the last 10 min, last known good), ceiling / 4, ceiling)`, in keys a second; the ceiling where nothing
/// was ever measured.
#[derive(Clone, Debug)]
pub(in crate::admission) struct Reference {
    ceiling: f64,
    last_known_good: f64,
    peak: f64,
    peak_at: Instant,
    /// A measurement came since the last known good was taken.
    is_news: bool,
}

impl Reference {
    pub fn new(ceiling: u32, now: Instant) -> Self {
        Self {
            ceiling: f64::from(ceiling.max(1)),
            last_known_good: 0.0,
            peak: 0.0,
            peak_at: now,
            is_news: false,
        }
    }

    /// A figure that is no rate counts as none.
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

    /// The best rate measured lately becomes the last known good. A time without measurements changes nothing: an idle night says
    /// nothing of the database.
    pub fn take_last_known_good(&mut self) -> Option<f64> {
        let is_news = std::mem::take(&mut self.is_news);
        is_news.then(|| {
            self.last_known_good = self.peak;
            self.peak
        })
    }

    pub fn handle_measured(&mut self, keys_per_second: f64, now: Instant) {
        self.peak = self.peak(now).max(keys_per_second);
        self.peak_at = now;
        self.is_news |= self.peak > 0.0;
    }

    /// The best rate measured, faded.
    pub fn peak(&self, now: Instant) -> f64 {
        let age = now.saturating_since(self.peak_at).as_secs_f64();
        self.peak * (-age / PEAK_FADES.as_secs_f64()).exp()
    }

    pub fn keys_per_second(&self, now: Instant) -> f64 {
        if self.peak <= 0.0 && self.last_known_good <= 0.0 {
            // Nothing was ever measured. Slots that come too close cost an attempt more; slots too far apart leave the database idle.
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

    fn assert_is(reference: &Reference, now: Instant, keys_per_second: f64) {
        let is = reference.keys_per_second(now);
        assert!((is - keys_per_second).abs() < 1e-9, "{is}");
    }

    #[test]
    fn reference_starts_at_the_ceiling_and_follows_the_best_measured_down_to_a_quarter() {
        let mut reference = Reference::new(10_000, at(0));
        assert_is(&reference, at(0), 10_000.0);

        reference.handle_measured(4_000.0, at(0));
        reference.handle_measured(100.0, at(0));

        assert_is(&reference, at(0), 5_000.0);
        assert_is(&reference, at(7_200_000), 2_500.0);
        reference.handle_measured(1e9, at(7_200_000));
        assert_is(&reference, at(7_200_000), 10_000.0);
    }

    #[test]
    fn last_known_good_outlives_an_idle_night_but_not_a_slower_day() {
        let (night, day) = (at(36_000_000), at(72_000_000));
        let mut reference = Reference::new(10_000, at(0));
        reference.handle_measured(4_000.0, at(0));
        assert_eq!(reference.take_last_known_good(), Some(4_000.0));

        assert_eq!(reference.take_last_known_good(), None, "nothing new");
        assert_is(&reference, night, 5_000.0);

        reference.handle_measured(2_400.0, day);
        assert_eq!(reference.take_last_known_good(), Some(2_400.0));
        assert_is(&reference, day, 3_000.0);
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
