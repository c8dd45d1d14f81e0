//! Observed time: the time for which this process has really watched its devices. Start with [`Observer`].
//!
//! Silence only proves something while somebody listens. A process that was stopped hears nothing, nor does an event
//! loop that did not run. So this clock stands still meanwhile, and so do the deadlines on it.

use std::{ops::Add, time::Duration};

/// Interval between two ticks of the [`Observer`].
pub const TICK: Duration = Duration::from_millis(100);

/// Maximum advance of the clock per tick. What lies beyond it was not watched. An event loop that is late by as much is
/// not running.
const STEP_MAX: Duration = Duration::from_millis(250);

/// Lag that costs local health: one point for each multiple of it.
const LAG_MAX: Duration = Duration::from_millis(500);

/// Time without such a lag that gives one point of local health back.
pub const RECOVERY: Duration = Duration::from_secs(5);

/// The worst local health, as in Lifeguard (arXiv 1707.00788).
pub const HEALTH_WORST: u8 = 7;

/// From this local health on a node publishes nobody as offline for silence: it is its own silence that it may hear.
pub const HEALTH_LAGGING: u8 = 3;

/// Microseconds of one unit of [`Observed`].
const UNIT_MICROS: u64 = TICK.as_micros() as u64;

/// A point in observed time, in tenths of a second since the process started.
///
/// Four bytes, since every session has several. It ends after 13 years.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Observed(u32);

impl Observed {
    /// The start of the process.
    pub const ZERO: Self = Self(0);
    /// Later than every time that can be reached.
    pub const FAR_FUTURE: Self = Self(u32::MAX);

    /// `units`: tenths of a second.
    #[must_use]
    pub const fn from_units(units: u32) -> Self {
        Self(units)
    }

    /// Tenths of a second.
    #[must_use]
    pub const fn as_units(self) -> u32 {
        self.0
    }

    /// `span` before `self`, rounded up to be later; at least [`Observed::ZERO`].
    #[must_use]
    pub fn before(self, span: Duration) -> Self {
        let units = span.as_micros() / u128::from(UNIT_MICROS);
        Self(self.0.saturating_sub(u32::try_from(units).unwrap_or(u32::MAX)))
    }

    /// Observed time from `earlier` to `self`; zero if `earlier` is later.
    #[must_use]
    pub const fn saturating_since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0) as u64 * UNIT_MICROS)
    }
}

/// Rounds up: no deadline is early. Saturates at [`Observed::FAR_FUTURE`].
impl Add<Duration> for Observed {
    type Output = Self;

    fn add(self, span: Duration) -> Self {
        let units = span.as_micros().div_ceil(u128::from(UNIT_MICROS));
        Self(self.0.saturating_add(u32::try_from(units).unwrap_or(u32::MAX)))
    }
}

/// What the caller has measured since the tick before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tick {
    /// Monotonic time since the tick before.
    pub elapsed: Duration,
    /// Time that a task needed to run after it was woken, or for which it has not run yet.
    pub loop_lag: Duration,
    /// How late the latest of the pings was that went out.
    pub ping_lag: Duration,
}

/// A clock that stops while its process does not watch, and how far the process can trust what it sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observer {
    observed_micros: u64,
    lag: Duration,
    health: u8,
    /// Observed time since the last lag that cost local health.
    clean: Duration,
}

impl Observer {
    /// To be called each [`TICK`], as well as that can be done.
    pub fn handle_tick(&mut self, tick: Tick) {
        let step = if tick.loop_lag < STEP_MAX {
            tick.elapsed.min(STEP_MAX)
        } else {
            Duration::ZERO
        };
        self.observed_micros += u64::try_from(step.as_micros()).unwrap_or(0);
        let lag = tick.elapsed.saturating_sub(TICK).max(tick.loop_lag).max(tick.ping_lag);
        self.lag = lag.max(self.lag * 9 / 10);
        if lag > LAG_MAX {
            let points = lag.as_millis() / LAG_MAX.as_millis();
            let points = u8::try_from(points).unwrap_or(HEALTH_WORST);
            self.health = self.health.saturating_add(points).min(HEALTH_WORST);
            self.clean = Duration::ZERO;
        } else {
            self.clean += step;
            if self.clean >= RECOVERY {
                self.health = self.health.saturating_sub(1);
                self.clean = Duration::ZERO;
            }
        }
    }

    /// Observed time.
    #[must_use]
    pub fn now(&self) -> Observed {
        Observed(u32::try_from(self.observed_micros / UNIT_MICROS).unwrap_or(u32::MAX))
    }

    /// How late the process ran lately: the longest lag, falling by a tenth per tick.
    #[must_use]
    pub const fn lag(&self) -> Duration {
        self.lag
    }

    /// Local health: 0 is well, [`HEALTH_WORST`] is the worst.
    #[must_use]
    pub const fn health(&self) -> u8 {
        self.health
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn tick(elapsed: u64, loop_lag: u64) -> Tick {
        Tick {
            elapsed: ms(elapsed),
            loop_lag: ms(loop_lag),
            ping_lag: Duration::ZERO,
        }
    }

    /// A minute in which nothing is wrong.
    fn calm(observer: &mut Observer) {
        (0..600).for_each(|_| observer.handle_tick(tick(100, 0)));
    }

    #[test]
    fn clock_runs_with_the_process_and_stops_with_it() {
        let mut observer = Observer::default();
        calm(&mut observer);
        assert_eq!(observer.now(), Observed::from_units(600));

        observer.handle_tick(tick(300_000, 0));

        assert_eq!(
            observer.now(),
            Observed::from_units(602),
            "a stop of five minutes is a quarter of a second"
        );
        calm(&mut observer);
        assert_eq!(observer.now(), Observed::from_units(1_202));
    }

    #[test]
    fn clock_stops_while_the_event_loop_does_not_run() {
        let mut observer = Observer::default();

        // The thread that ticks runs on.
        (1..=300).for_each(|n| observer.handle_tick(tick(100, n * 100)));

        assert_eq!(
            observer.now(),
            Observed::from_units(2),
            "until the loop was late by a quarter of a second"
        );
        assert_eq!((observer.lag(), observer.health()), (ms(30_000), HEALTH_WORST));
    }

    #[test]
    fn small_delays_cost_no_time_and_no_health() {
        let mut observer = Observer::default();

        (0..300).for_each(|_| observer.handle_tick(tick(200, 90)));

        assert_eq!(observer.now(), Observed::from_units(600));
        assert_eq!((observer.lag(), observer.health()), (ms(100), 0));
    }

    #[test]
    fn health_falls_with_the_lag_and_returns_a_point_each_five_seconds() {
        let health_after = |lag| {
            let mut observer = Observer::default();
            observer.handle_tick(tick(100, lag));
            observer.health()
        };
        assert_eq!(
            [500, 501, 1_000, 3_000, 3_600, 600_000].map(health_after),
            [0, 1, 2, 6, 7, 7]
        );

        let mut observer = Observer::default();
        observer.handle_tick(tick(60_000, 0));
        let mut seen = Vec::new();
        for _ in 0..400 {
            observer.handle_tick(tick(100, 0));
            seen.push(observer.health());
        }
        assert_eq!([seen[48], seen[50], seen[348], seen[350]], [7, 6, 1, 0]);
        assert!(observer.lag() < ms(1));
    }

    #[test]
    fn pings_that_go_out_late_cost_health_but_no_time() {
        let mut observer = Observer::default();

        observer.handle_tick(Tick {
            ping_lag: ms(1_500),
            ..tick(100, 0)
        });

        assert_eq!((observer.now(), observer.health()), (Observed::from_units(1), 3));
    }

    #[test]
    fn spans_are_rounded_up() {
        let at = Observed::from_units(10) + ms(101);

        assert_eq!(at, Observed::from_units(12));
        assert_eq!(at.saturating_since(Observed::from_units(10)), ms(200));
        assert_eq!(Observed::from_units(1) + Duration::MAX, Observed::FAR_FUTURE);
    }
}
