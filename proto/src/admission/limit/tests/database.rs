//! A simulated database in virtual time, which always has statements to work on.

use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

use super::super::*;

/// How the database slows down under load.
#[derive(Clone, Copy, Debug)]
pub enum Curve {
    /// `keys` keys run in parallel at full speed; each further one slows all down a little.
    Knee { keys: f64 },
    /// The same, but a key takes `key` seconds, and the keys of a statement share its work and end together (as in
    /// loadtest's simulator).
    Together { keys: f64, key: f64 },
    /// A statement takes `each` seconds, and `key` seconds for each of its keys, on a connection of its own.
    Statements { each: f64, key: f64 },
    /// The same, on one connection for all statements.
    OneReader { each: f64, key: f64 },
}

/// Time that a key takes below the knee, in seconds.
const KEY_SECONDS: f64 = 0.008;
/// Slowdown of all keys by each key beyond the knee.
const CONTENTION: f64 = 0.004;
/// Maximum relative difference between the times of equal statements, in either direction.
const NOISE: f64 = 0.3;
/// Time after which the caller gives up on a statement, in seconds.
const TIMEOUT: f64 = 1.0;

/// Source of the limit on keys in flight.
pub enum Who {
    Fixed(usize),
    Found(Box<Limiter>),
}

struct Statement {
    probe: Option<ProbeId>,
    sent_at: Instant,
    keys: usize,
    sent: f64,
    /// Remaining work of each key, the longest first, as a time on the common clock of work; or of the statement as a
    /// whole.
    left: Vec<f64>,
}

pub struct Database {
    curve: Curve,
    /// Factor by which it is slower than a healthy database.
    pub slowness: f64,
    /// Keys that other clients have in flight.
    pub others: f64,
    /// Keys per second that arrive; `None`: as many as the limit allows.
    pub demand: Option<f64>,
    pub who: Who,
    waiting: f64,
    running: Vec<Statement>,
    worked: f64,
    seconds: f64,
    rng: SmallRng,
    pub in_flight_max: usize,
}

impl Database {
    pub fn new(curve: Curve, who: Who, seed: u64) -> Self {
        Self {
            curve,
            slowness: 1.0,
            others: 0.0,
            demand: None,
            who,
            waiting: 0.0,
            running: Vec::new(),
            worked: 0.0,
            seconds: 0.0,
            rng: SmallRng::seed_from_u64(seed),
            in_flight_max: 0,
        }
    }

    pub fn limit(&self) -> &Limiter {
        match &self.who {
            Who::Found(limit) => limit,
            Who::Fixed(_) => panic!("this one is fixed"),
        }
    }

    /// Keys answered per second over the next `seconds`.
    pub fn goodput(&mut self, seconds: f64) -> f64 {
        let (begin, end) = (self.seconds, self.seconds + seconds);
        let mut answered = 0;
        while self.seconds < end {
            self.send();
            if let Some(statement) = self.work() {
                let is_answered = self.seconds - statement.sent < TIMEOUT;
                answered += if is_answered { statement.keys } else { 0 };
                let now = self.now();
                if let Who::Found(limit) = &mut self.who {
                    let took = now.saturating_since(statement.sent_at);
                    limit.handle_ended(statement.probe, statement.keys, is_answered, took, now);
                }
            }
        }
        answered as f64 / (self.seconds - begin)
    }

    pub fn now(&self) -> Instant {
        Instant::ZERO + Duration::from_secs_f64(self.seconds)
    }

    fn in_flight(&self) -> usize {
        self.running.iter().map(|statement| statement.keys).sum()
    }

    /// Sends as admission does: two statements of half the limit each.
    fn send(&mut self) {
        while self.running.len() < BATCHES_IN_FLIGHT_MAX {
            let limit = match &self.who {
                Who::Fixed(keys) => *keys,
                Who::Found(limit) => to_usize(limit.keys()),
            };
            let free = limit.saturating_sub(self.in_flight());
            let mut keys = free.min(limit.div_ceil(2));
            if self.demand.is_some() {
                keys = keys.min(self.waiting as usize);
            }
            if keys == 0 {
                return;
            }
            self.waiting -= keys as f64;
            let left = self.work_of(keys);
            let in_flight = self.in_flight() + keys;
            self.in_flight_max = self.in_flight_max.max(in_flight);
            let probe = match &mut self.who {
                Who::Found(limit) => limit.handle_sent(keys, in_flight),
                Who::Fixed(_) => None,
            };
            self.running.push(Statement {
                probe,
                sent_at: self.now(),
                keys,
                sent: self.seconds,
                left,
            });
        }
    }

    fn work_of(&mut self, keys: usize) -> Vec<f64> {
        match self.curve {
            Curve::Knee { .. } => {
                let worked = self.worked;
                let mut left: Vec<f64> = (0..keys)
                    .map(|_| worked + KEY_SECONDS * (0.5 - 0.5 * (1.0 - self.rng.random::<f64>()).ln()))
                    .collect();
                left.sort_by(|a, b| b.total_cmp(a));
                left
            }
            Curve::Together { key, .. } => {
                let drawn: f64 = (0..keys).map(|_| -(1.0 - self.rng.random::<f64>()).ln()).sum();
                vec![self.worked + key * drawn / keys as f64]
            }
            Curve::Statements { each, key } | Curve::OneReader { each, key } => {
                let noise = self.rng.random_range(1.0 - NOISE..1.0 + NOISE);
                vec![(each + key * keys as f64) * noise]
            }
        }
    }

    /// Advances to the end of the next key or statement. Returns the statement if that was its last key.
    fn work(&mut self) -> Option<Statement> {
        if self.running.is_empty() {
            self.pass(0.001);
            return None;
        }
        let last = |statement: &Statement| statement.left.last().copied().unwrap_or(0.0);
        let first = (0..self.running.len())
            .min_by(|a, b| last(&self.running[*a]).total_cmp(&last(&self.running[*b])))
            .unwrap_or(0);
        match self.curve {
            Curve::Knee { keys } | Curve::Together { keys, .. } => {
                let count = |statement: &Statement| match self.curve {
                    Curve::Together { .. } => statement.keys,
                    Curve::Knee { .. } | Curve::Statements { .. } | Curve::OneReader { .. } => statement.left.len(),
                };
                let busy: usize = self.running.iter().map(count).sum();
                let busy = busy as f64 + self.others;
                let speed = (keys / busy).min(1.0) / (1.0 + CONTENTION * (busy - keys).max(0.0)) / self.slowness;
                let probe = self.running[first].left.pop()?;
                self.pass((probe - self.worked).max(0.0) / speed);
                self.worked = probe;
                self.running[first].left.is_empty().then(|| self.running.remove(first))
            }
            Curve::Statements { .. } => {
                let work = self.running[first].left[0];
                self.pass(work * self.slowness);
                for statement in &mut self.running {
                    statement.left[0] -= work;
                }
                Some(self.running.remove(first))
            }
            Curve::OneReader { .. } => {
                self.pass(self.running[0].left[0] * self.slowness);
                Some(self.running.remove(0))
            }
        }
    }

    fn pass(&mut self, seconds: f64) {
        self.seconds += seconds;
        self.waiting += seconds * self.demand.unwrap_or(0.0);
    }
}
