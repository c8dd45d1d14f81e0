//! The database of the simulation: keys share what it can do.
//!
//! A key takes `service` while at most `knee` keys are being looked up. Beyond the knee keys share what there is, and each
//! one more costs a part `overload` of the rate (contention; 0 for none). A statement's keys are worked on together and
//! answered together. The figures are in docs/design/simulation.md; a real database's curve is measured, not assumed.
//!
//! Start with [`Database`]. It is told the time, and says when the next statement will be done if nothing changes.

use std::time::Duration;

use rand::Rng;
use seawall_proto::time::Instant;

use crate::scenario::Trouble;

/// What a connection attempt to a killed database takes until it is refused.
pub const REFUSED_AFTER: Duration = Duration::from_millis(2);

/// How fast the database is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Curve {
    /// Keys per second that it answers from the knee on.
    pub keys_per_second: f64,
    /// Keys in flight at which it is as fast as it can be.
    pub knee: f64,
    /// What each key beyond the knee costs, as a part of the rate.
    pub overload: f64,
}

/// A statement that it works on, by the caller's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StatementId(pub u32);

#[derive(Clone, Copy, Debug)]
struct Running {
    id: StatementId,
    keys: u32,
    /// Progress at which it is done.
    done_at: f64,
}

/// All that is being looked up, of all nodes.
#[derive(Debug)]
pub struct Database {
    curve: Curve,
    trouble: Option<Trouble>,
    /// Three a node at most.
    running: Vec<Running>,
    keys: u32,
    /// Seconds of work done on each key since the start.
    progress: f64,
    since: Instant,
    /// Goes up with every change: a forecast of another version counts no more.
    version: u32,
}

impl Database {
    #[must_use]
    pub const fn new(curve: Curve) -> Self {
        Self {
            curve,
            trouble: None,
            running: Vec::new(),
            keys: 0,
            progress: 0.0,
            since: Instant::ZERO,
            version: 0,
        }
    }

    /// The time that a key takes on average while the database is not busy, in seconds.
    fn service(&self) -> f64 {
        self.curve.knee / self.curve.keys_per_second
    }

    /// How fast each key's work advances, with so many: 1 while there is no trouble and none waits for another.
    #[must_use]
    pub fn speed(&self, keys: u32) -> f64 {
        let keys = f64::from(keys.max(1));
        let beyond = (keys - self.curve.knee).max(0.0);
        let speed = (self.curve.knee / keys).min(1.0) / (1.0 + self.curve.overload * beyond);
        match self.trouble {
            None => speed,
            Some(Trouble::Slow { factor }) => speed / factor,
            Some(Trouble::Frozen | Trouble::Killed) => 0.0,
        }
    }

    /// Something is wrong with it from now on, or no longer. The statements that this ends at once, all failed.
    pub fn set_trouble(&mut self, trouble: Option<Trouble>, now: Instant) -> Vec<StatementId> {
        self.advance(now);
        self.trouble = trouble;
        if trouble != Some(Trouble::Killed) {
            return Vec::new();
        }
        self.keys = 0;
        self.running.drain(..).map(|running| running.id).collect()
    }

    #[must_use]
    pub fn is_killed(&self) -> bool {
        self.trouble == Some(Trouble::Killed)
    }

    /// Something is wrong with it.
    #[must_use]
    pub const fn has_trouble(&self) -> bool {
        self.trouble.is_some()
    }

    /// Starts a statement of `keys` keys, which also scans the whole table for `scan` seconds of work.
    pub fn start(&mut self, id: StatementId, keys: u32, scan: f64, now: Instant, rng: &mut impl Rng) {
        self.advance(now);
        let keys = keys.max(1);
        // Each key's work is drawn, and the statement's keys share it.
        let drawn: f64 = (0..keys).map(|_| exponential(1.0, rng)).sum();
        let work = self.service() * drawn / f64::from(keys) + scan;
        self.keys += keys;
        self.running.push(Running {
            id,
            keys,
            done_at: self.progress + work,
        });
    }

    /// The caller waits for it no longer.
    pub fn cancel(&mut self, id: StatementId, now: Instant) {
        self.advance(now);
        self.take(|running| running.id == id);
    }

    /// The statement that is done now, if one is. Call until `None`.
    pub fn poll_done(&mut self, now: Instant) -> Option<StatementId> {
        self.advance(now);
        // A microsecond is the calendar's unit: what is due within it is due.
        let due = self.progress + 1e-6 * self.speed(self.keys);
        self.take(|running| running.done_at <= due)
    }

    /// When to call [`poll_done`](Self::poll_done) next, and the version that this holds for.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let speed = self.speed(self.keys);
        let next = self.running.iter().map(|running| running.done_at).reduce(f64::min)?;
        (speed > 0.0).then(|| self.since + Duration::from_secs_f64(((next - self.progress) / speed).max(0.0)))
    }

    /// See [`poll_timeout`](Self::poll_timeout).
    #[must_use]
    pub const fn version(&self) -> u32 {
        self.version
    }

    fn take(&mut self, which: impl Fn(&Running) -> bool) -> Option<StatementId> {
        let at = self.running.iter().position(which)?;
        let running = self.running.swap_remove(at);
        self.keys -= running.keys;
        Some(running.id)
    }

    fn advance(&mut self, now: Instant) {
        let passed = now.saturating_since(self.since).as_secs_f64();
        self.progress += passed * self.speed(self.keys);
        self.since = now;
        self.version = self.version.wrapping_add(1);
    }
}

/// Drawn from an exponential distribution with this mean.
pub fn exponential(mean: f64, rng: &mut impl Rng) -> f64 {
    let uniform: f64 = rng.random();
    -mean * (1.0 - uniform).ln()
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;

    const CURVE: Curve = Curve {
        keys_per_second: 2_000.0,
        knee: 32.0,
        overload: 0.002,
    };

    /// Keys per second at two statements of `keys` each, over ten seconds.
    fn rate(curve: Curve, trouble: Option<Trouble>, keys: u32) -> f64 {
        let mut rng = SmallRng::seed_from_u64(7);
        let mut database = Database::new(curve);
        database.set_trouble(trouble, Instant::ZERO);
        for number in 0..2 {
            database.start(StatementId(number), keys, 0.0, Instant::ZERO, &mut rng);
        }
        let (mut now, mut answered) = (Instant::ZERO, 0_u32);
        let end = Instant::ZERO + Duration::from_secs(10);
        while let Some(at) = database.poll_timeout().filter(|at| *at < end) {
            now = at.max(now);
            while let Some(done) = database.poll_done(now) {
                answered += keys;
                database.start(done, keys, 0.0, now, &mut rng);
            }
        }
        f64::from(answered) / 10.0
    }

    fn assert_near(rate: f64, expected: f64) {
        assert!((rate / expected - 1.0).abs() < 0.05, "{rate} instead of {expected}");
    }

    #[test]
    fn rate_grows_to_the_knee_and_falls_slowly_behind_it() {
        assert_near(rate(CURVE, None, 8), 1_000.0);
        assert_near(rate(CURVE, None, 16), 2_000.0);
        assert_near(rate(CURVE, None, 250), 2_000.0 / (1.0 + 0.002 * 468.0));
    }

    #[test]
    fn slow_database_answers_by_its_factor_slower_and_a_frozen_one_never() {
        assert_near(rate(CURVE, Some(Trouble::Slow { factor: 4.0 }), 16), 500.0);
        assert!(rate(CURVE, Some(Trouble::Frozen), 16).abs() < 1e-9);
    }

    #[test]
    fn killed_database_fails_what_it_was_asked_and_a_cancelled_statement_frees_its_share() {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut database = Database::new(CURVE);
        for number in 0..3 {
            database.start(StatementId(number), 64, 0.0, Instant::ZERO, &mut rng);
        }

        database.cancel(StatementId(1), Instant::ZERO);
        let failed = database.set_trouble(Some(Trouble::Killed), Instant::ZERO);

        assert_eq!(failed, [StatementId(0), StatementId(2)]);
        assert_eq!(database.keys, 0);
        assert_eq!(database.poll_timeout(), None);
    }
}
