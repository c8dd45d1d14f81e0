//! The life of the process: what asks it to stop, what must end before it does, and what it says when it ends.
//!
//! Two tokens: *soft* begins the drain, *hard* ends what is left at once. Every long task is spawned here, so that it has a
//! name, is waited for, and a panic in it is noticed: it stops the gateway. Tasks that a gateway can do without for a while
//! are started again instead, see [`crate::supervise`]. Start with [`Lifecycle`].

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

/// Time for what is left after the hard token: enough for every session's 1012.
pub const HARD_STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Shared by everything that runs as long as the gateway does. Clones are the same life.
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

    /// Cancelled when the gateway should leave: refuse newcomers, close sessions at a pace.
    #[must_use]
    pub fn soft(&self) -> &CancellationToken {
        &self.soft
    }

    /// Cancelled when what is left must end within [`HARD_STOP_TIMEOUT`].
    #[must_use]
    pub fn hard(&self) -> &CancellationToken {
        &self.hard
    }

    /// Runs a task that lives as long as the gateway. It should end by itself after the hard token.
    ///
    /// A panic in it is logged, remembered as [`Self::failure`], and begins the drain.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let life = self.clone();
        self.tasks.spawn(async move {
            if let Err(panic) = AssertUnwindSafe(task).catch_unwind().await {
                life.fail(format!("task {name} panicked: {}", panic_text(panic.as_ref())));
            }
        });
    }

    /// Stops the gateway because it can't go on; the first reason counts.
    pub fn fail(&self, reason: String) {
        tracing::error!(reason, "gateway can't go on and leaves");
        // A later reason is a consequence of the first.
        let _ = self.failure.set(reason);
        self.soft.cancel();
    }

    /// Why the gateway ended by itself; `None` where it was asked to.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Cancels the hard token and waits for the tasks. False: some were still running after [`HARD_STOP_TIMEOUT`].
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

/// The signals that a gateway listens to. From the moment this exists they no longer end the process by themselves.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// SIGTERM or Ctrl-C: leave.
    Leave,
    /// SIGHUP: read the log level and certificates again.
    Reload,
}

impl Signals {
    /// # Errors
    /// The handlers can't be installed.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// The next signal.
    ///
    /// # Cancel safety
    /// No signal is lost when this is dropped.
    pub async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::Leave,
            _ = self.interrupt.recv() => Asked::Leave,
            _ = self.hang_up.recv() => Asked::Reload,
        }
    }

    /// The next signal to leave. Others wait for [`Self::next`].
    pub async fn leave(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
