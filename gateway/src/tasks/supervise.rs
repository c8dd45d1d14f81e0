//! Auxiliary tasks, which are restarted after a panic.
//!
//! All nodes read the same database, and a row that one task cannot process must not close every session of the fleet
//! at once. So most tasks are *helpers*, which [`spawn_helper`] runs and restarts after a panic. A gateway stops after
//! a panic in one of its *essential* tasks, which [`Lifecycle::spawn`] runs:
//!
//! - `listener` and `api` accept connections. Each connection runs in a task of its own, whose panic ends it alone.
//!   The sockets belong to these tasks, and are closed with them.
//! - `session clock` wakes sessions at their deadlines. It reads no row and no byte of a device: a panic is in the
//!   timers, which are then in an unknown state.
//! - `lookup worker`, `lookup deadlines` and `registry contact` act on the connect machine under its lock, and so do
//!   connections. A panic there leaves the machine in an unknown state: it may admit the wrong device. The lookup
//!   itself reads rows, so its panic is a failed lookup.

use std::{panic::AssertUnwindSafe, pin::pin, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use tokio::time::{Instant, sleep};

use crate::{
    fleet::panics::Panics,
    runtime::lifecycle::{Lifecycle, panic_text},
};

/// Pause before a helper that panicked is restarted. It doubles with each further panic.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// Maximum pause before a helper is restarted.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// Time for which a restarted helper must run before it is considered healthy.
const STEADY_AFTER: Duration = Duration::from_secs(60);

/// Runs a helper task, which should end on its own after the hard token. After a panic it is restarted, with a growing
/// pause.
pub fn spawn_helper<F>(
    life: &Lifecycle,
    panics: &Arc<Panics>,
    name: &'static str,
    start: impl Fn() -> F + Send + 'static,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let (panics, stop) = (Arc::clone(panics), life.hard().clone());
    life.spawn(name, async move {
        let mut pause = PAUSE_MIN;
        let mut is_failing = false;
        loop {
            let began = Instant::now();
            let mut run = pin!(AssertUnwindSafe(start()).catch_unwind());
            let ended = tokio::select! {
                ended = run.as_mut() => ended,
                () = sleep(STEADY_AFTER), if is_failing => {
                    panics.clear_failed_task(name);
                    run.await
                }
            };
            let Err(panic) = ended else { return };
            if began.elapsed() >= STEADY_AFTER {
                pause = PAUSE_MIN;
            }
            let reason = panic_text(panic.as_ref());
            tracing::error!(
                task = name,
                reason,
                pause_ms = pause.as_millis(),
                "helper task panicked"
            );
            is_failing = true;
            panics.count_failed_task(name, pause);
            if stop.run_until_cancelled(sleep(pause)).await.is_none() {
                return;
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::{runtime::config::Config, serve};

    #[tokio::test]
    async fn a_helper_that_panics_is_started_again_and_keeps_the_gateway() {
        let home = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.server.data_dir = home.path().to_owned();
        config.server.listen.set_port(0);
        config.ops.listen.set_port(0);
        let running = serve::start(config).await.unwrap();
        let shared = Arc::clone(&running.state);
        let life = Lifecycle::new();
        let starts = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&starts);

        spawn_helper(&life, &shared.panics, "probe", move || {
            let nth = counted.fetch_add(1, Ordering::Relaxed);
            async move {
                if nth == 0 {
                    panic!("out of luck");
                }
                std::future::pending().await
            }
        });
        let is_restarted = async {
            while starts.load(Ordering::Relaxed) < 2 {
                sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), is_restarted)
            .await
            .unwrap();

        assert!(!life.soft().is_cancelled() && life.failure().is_none());
        assert!(shared.readiness().ready && shared.readiness().reasons.contains(&"task_failed"));
        assert!(shared.metrics.render().contains("seawall_task_panics_total 1\n"));
        let told = format!("{:?}", shared.events.after(0, 1_000, usize::MAX).events);
        assert!(told.contains("task_failed") && !told.contains("out of luck"), "{told}");
        shared.panics.clear_failed_task("probe");
        assert!(shared.readiness().reasons.is_empty());
        running.stop().await.unwrap();
    }
}
