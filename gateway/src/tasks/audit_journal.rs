//! Moves records of the audit log from this node's journal to the database. Start with [`follow`].

use std::{sync::Arc, time::Duration};

use tokio::{
    task::spawn_blocking,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::node::{Shared, State};

/// Interval of checks of the journal.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of records that one transaction takes.
const MOVED_AT_ONCE_MAX: usize = 100;

/// Moves records until `stop`.
pub async fn follow(state: Shared, stop: CancellationToken) {
    let mut polls = interval(POLL_INTERVAL);
    polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(polls.tick()).await.is_some() {
        while !state.audit_journal.is_empty() && !state.store.is_away() && move_some(&state).await {}
    }
}

/// Moves the oldest records. Returns whether there may be more.
async fn move_some(state: &State) -> bool {
    let journal = Arc::clone(&state.audit_journal);
    let Ok(entries) = spawn_blocking(move || journal.oldest(MOVED_AT_ONCE_MAX)).await else {
        return false;
    };
    if let Err(error) = state.store.audit_arrive(&entries, state.clock.wall()).await {
        tracing::debug!(%error, "audit records not moved to the database");
        return false;
    }
    let moved: Vec<_> = entries.iter().map(|entry| entry.id).collect();
    let journal = Arc::clone(&state.audit_journal);
    match spawn_blocking(move || journal.drop_moved(&moved)).await {
        Ok(Ok(())) => {
            tracing::info!(records = entries.len(), "audit records moved to the database");
            true
        }
        Ok(Err(error)) => {
            tracing::warn!(%error, "audit records not removed from the journal: the database has them");
            false
        }
        Err(_) => false,
    }
}
