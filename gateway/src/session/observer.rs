//! Observed time in the running process: a thread of its own ticks, and the event loop answers each tick.
//!
//! Start with [`ObserverClock`]. [`seawall_proto::presence::observer`] decides what a tick is worth.

use std::{
    sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use seawall_proto::{
    presence::observer::{Observed, Observer, TICK, Tick},
    session::Moment,
    time::Instant,
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::runtime::clock::Clock;

/// The observed time of this process, and how late it runs. Reading it costs a load from memory.
#[derive(Debug)]
pub struct ObserverClock {
    clock: Clock,
    observed: AtomicU32,
    health: AtomicU8,
    lag_micros: AtomicU64,
    /// Monotonic time of the last tick, in microseconds.
    ticked_at: AtomicU64,
    /// When the event loop was woken, in microseconds of monotonic time; 0 if it has run since.
    woken_at: AtomicU64,
    /// The longest lags since the last tick, in microseconds.
    loop_lag: AtomicU64,
    ping_lag: AtomicU64,
    wake: Notify,
}

impl ObserverClock {
    /// A clock that stands still until [`tick_until`](Self::tick_until) runs.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        Self {
            clock,
            observed: AtomicU32::new(0),
            health: AtomicU8::new(0),
            lag_micros: AtomicU64::new(0),
            ticked_at: AtomicU64::new(clock.now().as_micros()),
            woken_at: AtomicU64::new(0),
            loop_lag: AtomicU64::new(0),
            ping_lag: AtomicU64::new(0),
            wake: Notify::new(),
        }
    }

    /// Observed time.
    #[must_use]
    pub fn now(&self) -> Observed {
        Observed::from_units(self.observed.load(Ordering::Relaxed))
    }

    /// This moment on both clocks.
    #[must_use]
    pub fn moment(&self) -> Moment {
        Moment {
            real: self.clock.now(),
            observed: self.now(),
        }
    }

    /// Local health: 0 is well, 7 is the worst.
    #[must_use]
    pub fn health(&self) -> u8 {
        self.health.load(Ordering::Relaxed)
    }

    /// How late this process ran lately, and how long it has not run at all.
    #[must_use]
    pub fn lag(&self) -> Duration {
        let known = Duration::from_micros(self.lag_micros.load(Ordering::Relaxed));
        let ticked_at = Instant::from_micros(self.ticked_at.load(Ordering::Relaxed));
        let overdue = self.clock.now().saturating_since(ticked_at).saturating_sub(TICK);
        known.max(overdue)
    }

    /// Ticks until `stop`, in the thread of the caller.
    pub fn tick_until(&self, stop: &CancellationToken) {
        let mut observer = Observer::default();
        let mut last = self.clock.now();
        while !stop.is_cancelled() {
            thread::sleep(TICK);
            let now = self.clock.now();
            let woken_at = self.woken_at.load(Ordering::Acquire);
            let mut loop_lag = Duration::from_micros(self.loop_lag.swap(0, Ordering::Relaxed));
            if woken_at > 0 {
                loop_lag = loop_lag.max(now.saturating_since(Instant::from_micros(woken_at)));
            }
            observer.handle_tick(Tick {
                elapsed: now.saturating_since(last),
                loop_lag,
                ping_lag: Duration::from_micros(self.ping_lag.swap(0, Ordering::Relaxed)),
            });
            last = now;
            self.publish(&observer, now);
            if woken_at == 0 {
                self.woken_at.store(now.as_micros().max(1), Ordering::Release);
                // From outside of the runtime: this also wakes a worker if all those that run are blocked.
                self.wake.notify_one();
            }
        }
    }

    fn publish(&self, observer: &Observer, now: Instant) {
        self.health.store(observer.health(), Ordering::Relaxed);
        self.lag_micros.store(micros(observer.lag()), Ordering::Relaxed);
        self.ticked_at.store(now.as_micros(), Ordering::Relaxed);
        self.observed.store(observer.now().as_units(), Ordering::Relaxed);
    }

    /// Waits for the next tick. For one task alone, which is to call [`note_run`](Self::note_run) at once.
    ///
    /// # Cancel safety
    /// Safe: a tick that nobody waits for is kept for the next caller.
    pub async fn ticked(&self) {
        self.wake.notified().await;
    }

    /// The event loop runs. Returns how late it does.
    pub fn note_run(&self) -> Duration {
        let woken_at = Instant::from_micros(self.woken_at.load(Ordering::Acquire));
        let lag = self.clock.now().saturating_since(woken_at);
        self.loop_lag.fetch_max(micros(lag), Ordering::Relaxed);
        self.woken_at.store(0, Ordering::Release);
        lag
    }

    /// A ping goes out so long after it was due. Returns how late it is: not at all within the tick after its time.
    pub fn note_ping(&self, after: Duration) -> Duration {
        let lag = after.saturating_sub(TICK);
        self.ping_lag.fetch_max(micros(lag), Ordering::Relaxed);
        lag
    }
}

fn micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// A clock with its thread.
    fn running() -> (Arc<ObserverClock>, CancellationToken) {
        let (observer, stop) = (Arc::new(ObserverClock::new(Clock::start())), CancellationToken::new());
        let (ticked, until) = (Arc::clone(&observer), stop.clone());
        thread::spawn(move || ticked.tick_until(&until));
        (observer, stop)
    }

    async fn answer(observer: Arc<ObserverClock>) {
        loop {
            observer.ticked().await;
            observer.note_run();
        }
    }

    #[tokio::test]
    async fn clock_runs_while_the_event_loop_answers_and_stands_still_while_it_does_not() {
        let (observer, stop) = running();
        let answering = tokio::spawn(answer(Arc::clone(&observer)));
        tokio::time::sleep(Duration::from_secs(1)).await;
        let ran = observer.now();

        // The one worker of this runtime is blocked.
        thread::sleep(Duration::from_secs(2));
        let stood = observer.now();

        assert!(ran >= Observed::from_units(5), "{ran:?}");
        let advanced = stood.saturating_since(ran);
        assert!(advanced <= Duration::from_millis(600), "{advanced:?} of 2 s");
        assert!(observer.health() > 0 && observer.lag() > Duration::from_secs(1));
        stop.cancel();
        answering.abort();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_blocked_worker_of_two_does_not_stop_the_clock() {
        let (observer, stop) = running();
        let answering = tokio::spawn(answer(Arc::clone(&observer)));
        tokio::time::sleep(Duration::from_millis(500)).await;
        let before = observer.now();

        // A task that blocks is the fault that is tested for.
        let blocked = tokio::spawn(async { thread::sleep(Duration::from_secs(3)) });
        blocked.await.unwrap();

        let advanced = observer.now().saturating_since(before);
        assert!(advanced >= Duration::from_secs(1), "{advanced:?} of 3 s");
        stop.cancel();
        answering.abort();
    }

    #[test]
    fn ping_within_the_tick_after_its_time_is_not_late() {
        let observer = ObserverClock::new(Clock::start());

        let lags = [0, 100, 101, 1_600].map(|ms| observer.note_ping(Duration::from_millis(ms)).as_millis());

        assert_eq!(lags, [0, 0, 1, 1_500]);
        assert_eq!(observer.ping_lag.load(Ordering::Relaxed), 1_500_000, "the longest");
    }
}
