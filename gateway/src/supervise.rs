//! Helper tasks, and what became of code that panicked.
//!
//! A gateway ends without one of its *essential* tasks, which [`Lifecycle::spawn`] runs: `listener`, `api`, `drain`,
//! `session clock` and those of the look-up service. Without them it would accept, answer or close nobody. All others are
//! *helpers*, which [`spawn_helper`] runs: one that panics is started again, because all nodes read the same database, and a row
//! that one helper can't take must not send every device of the fleet away at once.

use std::{
    collections::BTreeSet,
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt as _;
use tokio::time::{Instant, sleep};

use crate::{
    lifecycle::{Lifecycle, panic_text},
    state::{Shared, State},
};

/// Pause before a helper that panicked is started again. It doubles with each further panic.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// Maximum pause before a helper is started again.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// Time for which a restarted helper must run before it is well again.
const STEADY_AFTER: Duration = Duration::from_secs(60);

/// The alarm that operators see when a device's connection or a call of the API has panicked.
const PANIC_ALARM: &str = "panic";
/// The alarm that operators see while a helper task fails.
const TASK_ALARM: &str = "task_failed";

/// What has panicked.
#[derive(Debug, Default)]
pub struct Panics {
    has_panicked: AtomicBool,
    /// Helpers that panicked and have not run for [`STEADY_AFTER`] since.
    failing: Mutex<BTreeSet<&'static str>>,
}

impl Panics {
    /// Whether a connection or a call has panicked since the start.
    #[must_use]
    pub fn has_panicked(&self) -> bool {
        self.has_panicked.load(Ordering::Relaxed)
    }

    /// Whether a helper task fails.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        !self.failing().is_empty()
    }

    fn failing(&self) -> MutexGuard<'_, BTreeSet<&'static str>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Counts a panic that ended no more than `what`. The first one raises an alarm.
    pub fn note_panic(&self, what: &str) {
        self.metrics.task_panics.increment(1);
        if !self.panics.has_panicked.swap(true, Ordering::Relaxed) {
            let detail =
                format!("{what} panicked: a bug, please report it with the log; the alarm stays until a restart");
            self.alarm(PANIC_ALARM, true, detail);
        }
    }

    fn note_failed_task(&self, name: &'static str, pause: Duration) {
        self.metrics.task_panics.increment(1);
        if self.panics.failing().insert(name) {
            let detail = format!(
                "the task {name:?} panicked: a bug, please report it with the log; it is started again in {} s",
                pause.as_secs()
            );
            self.alarm_about(TASK_ALARM, name, true, detail);
        }
    }

    fn note_steady_task(&self, name: &'static str) {
        let was_failing = self.panics.failing().remove(name);
        if was_failing {
            self.alarm_about(TASK_ALARM, name, false, format!("the task {name:?} runs again"));
        }
    }
}

/// Runs a helper task, which should end by itself after the hard token. After a panic it is started again, with a growing pause.
pub fn spawn_helper<F>(life: &Lifecycle, state: &Shared, name: &'static str, start: impl Fn() -> F + Send + 'static)
where
    F: Future<Output = ()> + Send + 'static,
{
    let (state, stop) = (Arc::clone(state), life.hard().clone());
    life.spawn(name, async move {
        let mut pause = PAUSE_MIN;
        let mut is_failing = false;
        loop {
            let began = Instant::now();
            let mut run = pin!(AssertUnwindSafe(start()).catch_unwind());
            let ended = tokio::select! {
                ended = run.as_mut() => ended,
                () = sleep(STEADY_AFTER), if is_failing => {
                    state.note_steady_task(name);
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
            state.note_failed_task(name, pause);
            if stop.run_until_cancelled(sleep(pause)).await.is_none() {
                return;
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;
    use crate::{config::Config, serve};

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

        spawn_helper(&life, &shared, "probe", move || {
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
        shared.note_steady_task("probe");
        assert!(shared.readiness().reasons.is_empty());
        running.stop().await.unwrap();
    }
}
