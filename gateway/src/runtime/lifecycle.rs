//! Lifecycle of the process: requests to stop, the tasks that must end first, and the reason of its end.
//!
//! Two tokens: *soft* begins the drain, *hard* ends all remaining work at once. Every long-running task is spawned
//! here, so that it has a name and is awaited. A panic in it stops the gateway. Tasks that a gateway can do without for
//! a while are restarted instead, see `tasks::supervise`. Start with [`Lifecycle`].

use std::{
    any::Any,
    future::Future,
    panic::AssertUnwindSafe,
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures_util::FutureExt;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Maximum time for remaining work after the hard token: enough for the 1012 of every session.
pub const HARD_STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Shared by all long-running parts. Clones share the same state.
#[derive(Clone, Debug, Default)]
pub struct Lifecycle {
    soft: CancellationToken,
    hard: CancellationToken,
    tasks: TaskTracker,
    failure: Arc<OnceLock<String>>,
}

impl Lifecycle {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancelled when the gateway should leave: it refuses new devices and closes sessions at a pace.
    #[must_use]
    pub fn soft(&self) -> &CancellationToken {
        &self.soft
    }

    /// Cancelled when remaining work must end within [`HARD_STOP_TIMEOUT`].
    #[must_use]
    pub fn hard(&self) -> &CancellationToken {
        &self.hard
    }

    /// Spawns a task that runs as long as the gateway. It should end on its own after the hard token.
    ///
    /// A panic in it is logged, kept as [`Self::failure`], and begins the drain.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let life = self.clone();
        self.tasks.spawn(async move {
            if let Err(panic) = AssertUnwindSafe(task).catch_unwind().await {
                life.fail(format!("task {name} panicked: {}", panic_text(panic.as_ref())));
            }
        });
    }

    /// Stops the gateway after a fatal error. The first reason is kept.
    pub fn fail(&self, reason: String) {
        tracing::error!(reason, "fatal error: shutting down");
        // A later reason is a consequence of the first.
        let _ = self.failure.set(reason);
        self.soft.cancel();
    }

    /// Why the gateway stopped on its own; `None` if it was asked to.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Cancels the hard token and waits for the tasks. Returns `false` if some were still running after
    /// [`HARD_STOP_TIMEOUT`].
    pub async fn stop(&self) -> bool {
        self.soft.cancel();
        self.hard.cancel();
        self.tasks.close();
        tokio::time::timeout(HARD_STOP_TIMEOUT, self.tasks.wait()).await.is_ok()
    }
}

pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
}

/// The signals that a gateway handles. While this exists they do not end the process.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

/// Effect of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// SIGTERM or Ctrl-C: drain and exit.
    Leave,
    /// SIGHUP: read the log level and certificates again.
    Reload,
}

impl Signals {
    /// # Errors
    /// The handlers cannot be installed.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for the next signal.
    ///
    /// # Cancel safety
    /// No signal is lost if this is dropped.
    pub async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::Leave,
            _ = self.interrupt.recv() => Asked::Leave,
            _ = self.hang_up.recv() => Asked::Reload,
        }
    }

    /// Waits for the next signal to leave. Other signals stay for [`Self::next`].
    pub async fn leave(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Runs `work` on a thread that may block, and returns its result; `None` if the runtime ends before.
///
/// # Panics
/// If `work` does. So the panic is reported as one of the caller, and is not mistaken for the end of the runtime.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Some(done),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    #[should_panic(expected = "out of luck")]
    async fn panic_of_blocking_work_goes_on_in_its_caller() {
        blocking(|| panic!("out of {}", "luck")).await;
    }

    #[tokio::test]
    async fn panic_in_a_task_begins_the_drain_and_is_remembered() {
        let life = Lifecycle::new();

        life.spawn("probe", async { panic!("out of {}", "luck") });
        life.soft().cancelled().await;

        assert_eq!(life.failure(), Some("task probe panicked: out of luck"));
    }

    #[tokio::test]
    async fn stop_waits_for_tasks_but_not_for_ever() {
        let obedient = Lifecycle::new();
        let hard = obedient.hard().clone();
        obedient.spawn("obedient", async move { hard.cancelled().await });
        let stubborn = Lifecycle::new();
        stubborn.spawn("stubborn", std::future::pending());

        assert!(obedient.stop().await);
        assert!(!stubborn.stop().await);
    }
}
