//! Pressure: whether connections wait because all handshake permits are taken.

use std::{
    ops::RangeInclusive,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use seawall_proto::{refusal::Crush, time::Instant};

use crate::runtime::clock::Clock;

/// Time for which a connection that found no free permit counts as pressure.
const PRESSURE_SPAN: Duration = Duration::from_secs(1);

/// Whether all permits were taken lately, and for how long.
pub(super) struct Pressure {
    clock: Clock,
    /// Time at which they last were, in microseconds of the clock, plus one; 0: never.
    noted_at: AtomicU64,
    /// Number of complete heads since the start.
    completed: AtomicU64,
    /// The current crush, or the last one.
    crush: Mutex<Crush>,
}

impl Pressure {
    pub(super) fn new() -> Self {
        Self {
            clock: Clock::start(),
            noted_at: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            crush: Mutex::new(Crush::begin(Instant::ZERO, 0)),
        }
    }

    /// Records that all permits are taken, and a connection waits.
    pub(super) fn note(&self) {
        let (now, completed) = (self.clock.now(), self.completed.load(Ordering::Relaxed));
        let mut crush = self.crush();
        if self.was_on_lately() {
            crush.note(now, completed);
        } else {
            *crush = Crush::begin(now, completed);
        }
        drop(crush);
        self.noted_at.store(now.as_micros() + 1, Ordering::Relaxed);
    }

    /// Records a complete head.
    pub(super) fn note_head(&self) {
        self.completed.fetch_add(1, Ordering::Relaxed);
    }

    /// Range of the hint for a handshake that is given up, while `under_way` handshakes run.
    pub(super) fn hint_range(&self, under_way: usize) -> RangeInclusive<Duration> {
        let (now, completed) = (self.clock.now(), self.completed.load(Ordering::Relaxed));
        let mut crush = self.crush();
        crush.note(now, completed);
        crush.hint_range(now, completed, under_way)
    }

    pub(super) fn was_on_lately(&self) -> bool {
        let noted_at = self.noted_at.load(Ordering::Relaxed);
        noted_at > 0 && self.clock.now().saturating_since(Instant::from_micros(noted_at)) < PRESSURE_SPAN
    }

    fn crush(&self) -> MutexGuard<'_, Crush> {
        self.crush.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
