//! How many keys may be in flight, what was measured, and the reference capacity that slots are given out by.
//!
//! Three figures that must not be mixed up: the *limit* bounds keys in flight now; the *rate measured* is what the database
//! answers while devices wait; the *reference* (`K_ref`) remembers the best of that, and is all that slots and queue bounds go
//! by: slots issued at the rate of a slow moment would put the fleet to sleep (overload.md, finding 3).

use std::time::Duration;

use crate::time::Instant;

/// The limit while the plan guard sees a sequential scan.
const LIMIT_CUT: u32 = 2;
/// Shortest window that is measured.
const WINDOW_MIN: Duration = Duration::from_secs(1);
/// The best rate measured fades with this time constant.
const PEAK_FADES: Duration = Duration::from_secs(600);
/// Slots are given out a quarter faster than the best measured: unused ones cost nothing, idle time does.
const OVERBOOKING: f64 = 1.25;
/// The reference never falls below this part of the ceiling, or an outage seen first would be taken for the capacity.
const FLOOR_PART: f64 = 0.25;

/// Most keys in flight. Fixed for now; [`Limit::handle_window`] is where a limit that adapts takes its measurements.
#[derive(Clone, Debug)]
pub struct Limit {
    fixed: u32,
    is_cut: bool,
    last_window: Option<Window>,
}

impl Limit {
    /// Always `keys`, unless cut.
    #[must_use]
    pub const fn fixed(keys: u32) -> Self {
        Self {
            fixed: keys,
            is_cut: false,
            last_window: None,
        }
    }

    /// Keys that may be in flight.
    #[must_use]
    pub const fn keys(&self) -> u32 {
        if self.is_cut && self.fixed > LIMIT_CUT {
            LIMIT_CUT
        } else {
            self.fixed
        }
    }

    /// The plan guard found, or no longer finds, a look-up that reads a whole table.
    pub const fn set_cut(&mut self, is_cut: bool) {
        self.is_cut = is_cut;
    }

    /// One more window was measured.
    pub const fn handle_window(&mut self, window: Window) {
        self.last_window = Some(window);
    }

    /// What was measured last.
    #[must_use]
    pub const fn last_window(&self) -> Option<Window> {
        self.last_window
    }
}

/// What was measured between two answers of the database.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    pub span: Duration,
    /// Keys answered.
    pub answered: u64,
    /// Keys whose statement failed or timed out.
    pub failed: u64,
    /// The most keys in flight at a time.
    pub in_flight_max: u32,
    /// Devices were waiting all the time: only then does the rate tell the database's capacity, not the fleet's demand.
    pub is_backlogged: bool,
}

impl Window {
    /// Keys answered a second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.answered as f64 / self.span.as_secs_f64().max(1e-6)
    }
}

/// Counts into windows. A window begins and ends with an answer, so that it holds whole statements, however large.
#[derive(Debug, Default)]
pub(super) struct Meter {
    begin: Option<Instant>,
    answered: u64,
    failed: u64,
    in_flight_max: u32,
    was_idle: bool,
}

impl Meter {
    pub fn handle_sent(&mut self, in_flight: u32) {
        self.in_flight_max = self.in_flight_max.max(in_flight);
    }

    /// Nobody waits, although more could be sent.
    pub const fn handle_idle(&mut self) {
        self.was_idle = true;
    }

    /// A statement ended; a window, if that completed one.
    pub fn handle_ended(&mut self, keys: usize, is_answered: bool, in_flight: u32, now: Instant) -> Option<Window> {
        let keys = u64::try_from(keys).unwrap_or(u64::MAX);
        let Some(begin) = self.begin else {
            self.restart(now, in_flight);
            return None;
        };
        if is_answered {
            self.answered += keys;
        } else {
            self.failed += keys;
        }
        let span = now.saturating_since(begin);
        if span < WINDOW_MIN {
            return None;
        }
        let window = Window {
            span,
            answered: self.answered,
            failed: self.failed,
            in_flight_max: self.in_flight_max,
            is_backlogged: !self.was_idle,
        };
        self.restart(now, in_flight);
        Some(window)
    }

    const fn restart(&mut self, now: Instant, in_flight: u32) {
        *self = Self {
            begin: Some(now),
            answered: 0,
            failed: 0,
            in_flight_max: in_flight,
            was_idle: false,
        };
    }
}

/// `K_ref = clamp(1.25 · max(best of the last 10 min, last known good), ceiling / 4, ceiling)`, in keys a second; the ceiling where nothing
/// was ever measured.
#[derive(Clone, Debug)]
pub(super) struct Reference {
    ceiling: f64,
    last_known_good: f64,
    peak: f64,
    peak_at: Instant,
}

impl Reference {
    pub fn new(ceiling: u32, now: Instant) -> Self {
        Self {
            ceiling: f64::from(ceiling.max(1)),
            last_known_good: 0.0,
            peak: 0.0,
            peak_at: now,
        }
    }

    pub const fn set_last_known_good(&mut self, keys_per_second: f64) {
        self.last_known_good = keys_per_second;
    }

    pub fn handle_measured(&mut self, keys_per_second: f64, now: Instant) {
        self.peak = self.peak(now).max(keys_per_second);
        self.peak_at = now;
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

    #[test]
    fn reference_starts_at_the_ceiling_and_follows_the_best_measured_down_to_a_quarter() {
        let mut reference = Reference::new(10_000, at(0));
        assert!((reference.keys_per_second(at(0)) - 10_000.0).abs() < 1e-9);

        reference.handle_measured(4_000.0, at(0));
        reference.handle_measured(100.0, at(0));

        assert!((reference.keys_per_second(at(0)) - 5_000.0).abs() < 1e-9);
        assert!((reference.keys_per_second(at(7_200_000)) - 2_500.0).abs() < 1e-9);
        reference.handle_measured(1e9, at(7_200_000));
        assert!((reference.keys_per_second(at(7_200_000)) - 10_000.0).abs() < 1e-9);
    }

    #[test]
    fn window_counts_what_came_after_its_first_answer() {
        let mut meter = Meter::default();
        assert_eq!(meter.handle_ended(256, true, 256, at(0)), None);
        assert_eq!(meter.handle_ended(200, true, 256, at(500)), None);
        assert_eq!(meter.handle_ended(50, false, 256, at(900)), None);

        let window = meter.handle_ended(200, true, 256, at(1_000)).unwrap();

        assert!((window.rate() - 400.0).abs() < 1e-9);
        assert_eq!((window.failed, window.in_flight_max), (50, 256));
        assert!(window.is_backlogged);
    }

    #[test]
    fn window_with_idle_time_says_nothing_of_capacity() {
        let mut meter = Meter::default();
        meter.handle_ended(1, true, 0, at(0));
        meter.handle_idle();

        let window = meter.handle_ended(1, true, 0, at(2_000)).unwrap();

        assert!(!window.is_backlogged);
    }

    #[test]
    fn plan_alarm_cuts_the_limit_to_two() {
        let mut limit = Limit::fixed(512);

        limit.set_cut(true);

        assert_eq!(limit.keys(), 2);
        limit.set_cut(false);
        assert_eq!(limit.keys(), 512);
    }
}
