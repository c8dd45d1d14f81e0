//! Polls the revocations. Start with [`follow`].

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::{node::Shared, tasks::revoked_sessions};

/// Interval at which the revision of the revocations is read: a revocation takes effect on every node within a second.
const POLL_INTERVAL: Duration = Duration::from_millis(400);
/// Pause before it is read after a change made here. Until then the changed devices get no new token.
const NEWS_PAUSE: Duration = Duration::from_millis(50);
/// Number of polls between two prunings of the revocations in the database: an hour.
const POLLS_TO_PRUNE: u32 = 9_000;

/// The alarm about a registry out of a backup.
const OLDER_ALARM: &str = "registry_older";
const OLDER_DETAIL: &str = "the registry is older than what this node has seen of it, as after a restore: devices that were disabled, \
    revoked or given a new secret since the backup are as they were before, and so are firmware rules and API tokens. Repeat these changes";

/// Polls the revocations until `stop`.
pub async fn follow(state: Shared, stop: CancellationToken) {
    let mut is_failing = false;
    let mut was_older = false;
    let mut polls = 0_u32;
    loop {
        let mut outcome = state.resume.poll(&state.store, &state.clock).await;
        if outcome.is_ok() {
            outcome = revoked_sessions::end_revoked_sessions(&state).await;
        }
        if outcome.is_ok() && polls.is_multiple_of(POLLS_TO_PRUNE) {
            outcome = state.store.revocations_prune(state.clock.wall()).await;
        }
        polls = polls.wrapping_add(1);
        match (&outcome, is_failing) {
            (Err(error), false) => tracing::warn!(%error, "revocations not readable: the known ones stay"),
            (Ok(()), true) => tracing::info!("revocations readable again"),
            (Ok(()), false) | (Err(_), true) => {}
        }
        is_failing = outcome.is_err();
        let is_older = state.resume.saw_older_registry(state.clock.now());
        if is_older != was_older {
            state.alarms.set(OLDER_ALARM, is_older, OLDER_DETAIL);
            was_older = is_older;
        }
        tokio::select! {
            () = stop.cancelled() => return,
            // Several changes in a short time are read together.
            () = state.resume.news.notified() => tokio::time::sleep(NEWS_PAUSE).await,
            () = tokio::time::sleep(POLL_INTERVAL) => {}
        }
    }
}
