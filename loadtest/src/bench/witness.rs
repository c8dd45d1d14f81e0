//! Devices that stay while the others storm, and time their heartbeats: in a thread of their own, so that the crowd's tasks don't hold them up.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;

use super::{
    crowd::{By, Crowd},
    device::Account,
};

/// How many there are.
pub const COUNT: usize = 200;
/// How many connect at a time.
const AT_ONCE: usize = 16;
/// How often each sends a heartbeat while it watches.
const EVERY: Duration = Duration::from_millis(250);
/// How often it is looked whether to watch.
const IDLE: Duration = Duration::from_millis(10);
/// Longest time that is told apart from a longer one.
const TIME_MAX: Duration = Duration::from_secs(60);

/// Connected witnesses. They leave when this is dropped.
pub struct Witnesses {
    /// What they saw since [`begin`](Self::begin), in microseconds.
    seen: Arc<Mutex<Histogram<u64>>>,
    watching: Arc<AtomicBool>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Witnesses {
    /// Connects them; they only watch after [`begin`](Self::begin).
    pub async fn start(server: SocketAddr, is_gateway: bool, accounts: &[Account]) -> Result<Self> {
        let seen = Arc::new(Mutex::new(
            Histogram::new_with_max(micros(TIME_MAX), 3).context("making a histogram")?,
        ));
        let (watching, ends) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let crowd = Crowd::new(server, is_gateway, accounts);
        let (connected, is_connected) = tokio::sync::oneshot::channel();
        let thread = std::thread::spawn({
            let (seen, watching, ends) = (Arc::clone(&seen), Arc::clone(&watching), Arc::clone(&ends));
            move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(async {
                    // Whoever asked waits for it, or has gone.
                    let _ = connected.send(crowd.connect(AT_ONCE, By::LookUp).await);
                    watch(&crowd, &seen, &watching, &ends).await;
                });
                Ok(())
            }
        });
        is_connected.await.context("the witnesses' thread")??;
        Ok(Self {
            seen,
            watching,
            ends,
            thread: Some(thread),
        })
    }

    /// From now on heartbeats are timed.
    pub fn begin(&self) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).reset();
        self.watching.store(true, Ordering::Relaxed);
    }

    /// How long the slowest hundredth of the heartbeats since [`begin`](Self::begin) took at least.
    pub fn p99(&self) -> Duration {
        self.watching.store(false, Ordering::Relaxed);
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        Duration::from_micros(seen.value_at_quantile(0.99))
    }
}

impl Drop for Witnesses {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join()); // what went wrong with them has shown in what they saw
        }
    }
}

async fn watch(crowd: &Crowd, seen: &Arc<Mutex<Histogram<u64>>>, watching: &AtomicBool, ends: &AtomicBool) {
    let step = EVERY.div_f64(crowd.len() as f64);
    let mut at = tokio::time::Instant::now();
    let mut index = 0;
    while !ends.load(Ordering::Relaxed) {
        if !watching.load(Ordering::Relaxed) {
            tokio::time::sleep(IDLE).await;
            at = tokio::time::Instant::now();
            continue;
        }
        at += step;
        tokio::time::sleep_until(at).await;
        // In a task of its own: a slow answer must not put off the next question.
        let (each, seen) = (crowd.clone(), Arc::clone(seen));
        tokio::spawn(async move {
            let begun = Instant::now();
            let answered = each.heartbeat(index).await;
            let took = match answered {
                Ok(()) => micros(begun.elapsed()),
                // Lost: as bad as can be.
                Err(_) => u64::MAX,
            };
            seen.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .saturating_record(took);
        });
        index = (index + 1) % crowd.len();
    }
    crowd.drop_all().await;
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
