//! The timer of all sessions. Start with [`call_sessions`].

use tokio_util::sync::CancellationToken;

use crate::node::Shared;

/// Wakes the sessions that are due, until `stop`: one timer for all of them. A ping may be late by a tick.
///
/// This task is also what shows that the event loop runs: observed time stands still while it does not.
pub async fn call_sessions(state: Shared, stop: CancellationToken) {
    while stop.run_until_cancelled(state.observer.ticked()).await.is_some() {
        // Behind whatever else is ready to run: else a full queue would not show.
        tokio::task::yield_now().await;
        let lag = state.observer.note_run();
        state.metrics.event_loop_lag_seconds.record(lag);
        state.sessions.call_due(state.clock.now());
    }
}
