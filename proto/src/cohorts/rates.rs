//! Rates of a cohort: of the last minute and of the last hour, beside its totals.

use super::{Outcome, decay};

crate::labels! {
    /// A count of a cohort beside the outcomes of its attempts.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Figure {
        /// Time from the first byte to the answer of admitted devices, in microseconds.
        ConnectMicros = "connect_micros",
        /// Devices looked up.
        LookupKeys = "lookup_keys",
        /// Time that they waited for the database, in microseconds.
        LookupMicros = "lookup_micros",
        /// Their statements, in parts of [`STATEMENT_PARTS`]. A statement counts in equal parts for its keys, which may
        /// be of several cohorts.
        StatementParts = "statement_parts",
        /// Repeats: short sessions of devices that had another one a short time before.
        Repeats = "repeats",
        /// Sessions that a device ended by breaking the protocol or a limit, and refused credentials of devices that
        /// were authenticated before.
        Errors = "errors",
        /// Sessions that ended.
        SessionsEnded = "sessions_ended",
        /// Duration of the sessions that ended, in milliseconds.
        SessionMillis = "session_millis",
        /// Messages from devices.
        Messages = "messages",
        /// Payload bytes from and to devices.
        Bytes = "bytes",
    }
}

/// Parts of a statement in [`Figure::StatementParts`].
pub const STATEMENT_PARTS: u64 = 1_000_000;

const COUNT: usize = Outcome::COUNT + Figure::ALL.len();

/// Counts of a cohort since it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Totals([u64; COUNT]);

impl Default for Totals {
    fn default() -> Self {
        Self([0; COUNT])
    }
}

impl Totals {
    /// `outcome` and `figure` return the counts.
    pub fn of(outcome: impl Fn(Outcome) -> u64, figure: impl Fn(Figure) -> u64) -> Self {
        let mut totals = [0; COUNT];
        for (at, of) in Outcome::all().enumerate() {
            totals[at] = outcome(of);
        }
        for (at, of) in Figure::ALL.into_iter().enumerate() {
            totals[Outcome::COUNT + at] = figure(of);
        }
        Self(totals)
    }

    #[must_use]
    pub const fn figure(&self, figure: Figure) -> u64 {
        self.0[Outcome::COUNT + figure as usize]
    }

    /// What happened since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self(std::array::from_fn(|at| self.0[at].saturating_sub(before.0[at])))
    }
}

/// Rates per second: exponentially weighted averages with time constants of a minute and of an hour.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    minute: [f32; COUNT],
    hour: [f32; COUNT],
    /// Time since counting began, in seconds: a younger average is not too low for that.
    age: f32,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            minute: [0.0; COUNT],
            hour: [0.0; COUNT],
            age: 0.0,
        }
    }
}

/// The span that a rate is averaged over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    Minute,
    Hour,
}

impl Window {
    const fn seconds(self) -> f64 {
        match self {
            Self::Minute => 60.0,
            Self::Hour => 3_600.0,
        }
    }
}

impl Rates {
    /// Adds what happened in the last `seconds`, more than 0.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "rates need no more precision than a float has"
    )]
    pub fn handle(&mut self, fresh: &Totals, seconds: f64) {
        for (window, rates) in [(Window::Minute, &mut self.minute), (Window::Hour, &mut self.hour)] {
            let kept = decay(seconds, window.seconds());
            for (rate, count) in rates.iter_mut().zip(fresh.0) {
                *rate = (f64::from(*rate) * kept + count as f64 / seconds * (1.0 - kept)) as f32;
            }
        }
        self.age = (f64::from(self.age) + seconds) as f32;
    }

    /// Attempts with this outcome, per second.
    #[must_use]
    pub fn outcome(&self, outcome: Outcome, window: Window) -> f64 {
        self.at(outcome.index(), window)
    }

    /// Events or units per second.
    #[must_use]
    pub fn figure(&self, figure: Figure, window: Window) -> f64 {
        self.at(Outcome::COUNT + figure as usize, window)
    }

    fn at(&self, at: usize, window: Window) -> f64 {
        let rates = match window {
            Window::Minute => &self.minute,
            Window::Hour => &self.hour,
        };
        let counted = 1.0 - decay(f64::from(self.age), window.seconds());
        if counted > 0.0 {
            f64::from(rates[at]) / counted
        } else {
            0.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refusal::Code;

    fn repeats(count: u64) -> Totals {
        Totals::of(|_| 0, |figure| if figure == Figure::Repeats { count } else { 0 })
    }

    #[test]
    fn a_steady_rate_is_shown_from_the_first_second_on() {
        let mut rates = Rates::default();

        for second in 0..300 {
            rates.handle(&repeats(3), 1.0);
            for window in [Window::Minute, Window::Hour] {
                let rate = rates.figure(Figure::Repeats, window);
                assert!((rate - 3.0).abs() < 0.01, "{rate} after {second} s");
            }
        }
    }

    #[test]
    fn the_minute_forgets_what_the_hour_remembers() {
        let mut rates = Rates::default();
        (0..60).for_each(|_| rates.handle(&repeats(60), 1.0));
        (0..600).for_each(|_| rates.handle(&repeats(0), 1.0));

        let (minute, hour) = (
            rates.figure(Figure::Repeats, Window::Minute),
            rates.figure(Figure::Repeats, Window::Hour),
        );

        assert!(minute < 0.01, "{minute}");
        assert!((4.0..7.0).contains(&hour), "3,600 in 11 minutes: {hour}");
    }

    #[test]
    fn outcomes_and_figures_stand_apart() {
        let refused = Outcome::Refused(Code::Overloaded);
        let before = Totals::of(|_| 1, |_| 1);
        let after = Totals::of(|outcome| if outcome == refused { 8 } else { 1 }, |_| 1);
        let mut rates = Rates::default();

        rates.handle(&after.since(&before), 7.0);

        assert!((rates.outcome(refused, Window::Minute) - 1.0).abs() < 0.001);
        for outcome in Outcome::all().filter(|outcome| *outcome != refused) {
            assert!(
                rates.outcome(outcome, Window::Minute).abs() < f64::EPSILON,
                "{outcome:?}"
            );
        }
        for figure in Figure::ALL {
            assert!(rates.figure(figure, Window::Hour).abs() < f64::EPSILON, "{figure:?}");
        }
        assert_eq!(Rates::default().figure(Figure::Repeats, Window::Minute), 0.0);
    }
}
