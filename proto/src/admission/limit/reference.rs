//! The capacity that slots are given out by.

use std::time::Duration;

use crate::time::Instant;

/// Time constant with which the best rate measured fades, and with it the last known good.
const PEAK_FADES: Duration = Duration::from_secs(600);
/// Longest time that the last known good fades by at once: the interval at which it is kept. Time without measurements says nothing
/// about the database, so an idle night changes nothing.
const FADE_STEP_MAX: Duration = Duration::from_secs(60);
/// Slots are given out a quarter faster than the best measured: unused ones cost nothing, idle time does.
pub(in crate::admission) const OVERBOOKING: f64 = 1.25;
/// The reference never falls below this part of the ceiling, or an outage seen first would be taken for the capacity.
const FLOOR_PART: f64 = 0.25;

/// The best rate is that of about so many seconds in a row, and of half as many at least.
const RECENT_SECONDS: u32 = 8;
/// After a time like this without a measurement, a row begins anew.
const RECENT_GAP: Duration = Duration::from_secs(10);

/// `K_ref = clamp(1.25 · max(best of the last 10 min, last known good), ceiling / 4, ceiling)`, in keys a second; the ceiling where nothing
/// was ever measured.
#[derive(Clone, Debug)]
pub(in crate::admission) struct Reference {
    ceiling: f64,
    last_known_good: f64,
    /// When the last known good faded last.
    faded_at: Instant,
    peak: f64,
    peak_at: Instant,
    recent: Recent,
    /// The peak is of too few seconds to count against later ones.
    is_provisional: bool,
    /// A measurement came since the last known good was taken.
    is_news: bool,
}

/// The average of the latest seconds in a row.
#[derive(Clone, Debug, Default)]
struct Recent {
    average: f64,
    seconds: u32,
    at: Instant,
}

impl Recent {
    /// The average, and whether it is of enough seconds to count.
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

    /// The last known good where there is news. It fades towards the best rate measured lately, and is never replaced by it at
    /// once: the first minute after a restart may be a slow one. A time without measurements changes nothing.
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

    /// The rate of about a second in which devices waited all the time.
    pub fn handle_measured(&mut self, keys_per_second: f64, now: Instant) {
        // The best of many seconds is a lucky one, and luckier on one node of a cluster than on the next: their slots must end together.
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
        // The first second alone is not worth keeping.
        self.is_news |= self.peak > 0.0 && !self.is_provisional;
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

    /// Seconds of a backlog, one after the other, that end at `end`.
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
