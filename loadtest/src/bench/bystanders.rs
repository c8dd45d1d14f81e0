//! Devices that stay connected during a storm and measure their heartbeats. They have their own thread, so that the
//! storm's tasks do not delay them.

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
    device::Account,
    pool::{By, DevicePool},
};

/// Number of bystanders.
pub const COUNT: usize = 200;
/// Number of bystanders that connect at a time.
const AT_ONCE: usize = 16;
/// Time between two heartbeats of a bystander while it measures.
const EVERY: Duration = Duration::from_millis(250);
/// Time between two checks of whether to measure.
const IDLE: Duration = Duration::from_millis(10);
/// Maximum duration that is recorded.
const TIME_MAX: Duration = Duration::from_secs(60);

/// Connected bystanders. They leave when this is dropped.
pub struct Bystanders {
    /// Durations of heartbeats since [`begin`](Self::begin), in microseconds.
    seen: Arc<Mutex<Histogram<u64>>>,
    watching: Arc<AtomicBool>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Bystanders {
    /// Connects the bystanders. They measure only after [`begin`](Self::begin).
    pub async fn start(server: SocketAddr, is_gateway: bool, accounts: &[Account]) -> Result<Self> {
        let seen = Arc::new(Mutex::new(
            Histogram::new_with_max(micros(TIME_MAX), 3).context("making a histogram")?,
        ));
        let (watching, ends) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let pool = DevicePool::new(server, is_gateway, accounts);
        let (connected, is_connected) = tokio::sync::oneshot::channel();
        let thread = std::thread::spawn({
            let (seen, watching, ends) = (Arc::clone(&seen), Arc::clone(&watching), Arc::clone(&ends));
            move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(async {
                    // The caller waits for it, or has left.
                    let _ = connected.send(pool.connect(AT_ONCE, By::LookUp).await);
                    watch(&pool, &seen, &watching, &ends).await;
                });
                Ok(())
            }
        });
        is_connected.await.context("the bystanders' thread")??;
        Ok(Self {
            seen,
            watching,
            ends,
            thread: Some(thread),
        })
    }

    /// Starts to measure heartbeats.
    pub fn begin(&self) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).reset();
        self.watching.store(true, Ordering::Relaxed);
    }

    /// The 99th percentile of the durations of heartbeats since [`begin`](Self::begin).
    pub fn p99(&self) -> Duration {
        self.watching.store(false, Ordering::Relaxed);
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        Duration::from_micros(seen.value_at_quantile(0.99))
    }
}

impl Drop for Bystanders {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join()); // a failure shows in the durations
        }
    }
}

async fn watch(pool: &DevicePool, seen: &Arc<Mutex<Histogram<u64>>>, watching: &AtomicBool, ends: &AtomicBool) {
    let step = EVERY.div_f64(pool.len() as f64);
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
        // In its own task: a slow answer must not delay the next ping.
        let (each, seen) = (pool.clone(), Arc::clone(seen));
        tokio::spawn(async move {
            let begun = Instant::now();
            let answered = each.heartbeat(index).await;
            let took = match answered {
                Ok(()) => micros(begun.elapsed()),
                // A lost heartbeat counts as the longest.
                Err(_) => u64::MAX,
            };
            seen.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .saturating_record(took);
        });
        index = (index + 1) % pool.len();
    }
    pool.drop_all().await;
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
