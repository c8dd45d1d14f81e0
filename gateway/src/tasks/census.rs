//! Writes the counts of this node's devices to the database, for the other nodes. Start with [`publish`].

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    node::Shared,
    runtime::{
        config::{DatabaseKind, DatabaseUrl},
        lifecycle::blocking,
    },
    session::census::{Census, Published},
};

/// Minimum time between two writes of changed counts.
const WRITE_INTERVAL: Duration = Duration::from_secs(5);
/// Time after which unchanged counts are written again: other nodes use them for 30 s.
const REFRESH_INTERVAL: Duration = Duration::from_secs(10);
/// The same for SQLite, which no other node reads: the counts are for a start after a crash.
const EMBEDDED_WRITE_INTERVAL: Duration = Duration::from_secs(30);
/// Time between two removals of old counts.
const PRUNE_INTERVAL: Duration = Duration::from_mins(10);
/// Counting takes at most this part of the time: 1 in [`COUNTING_SHARE`].
const COUNTING_SHARE: u32 = 100;

/// Writes the counts of this node, until `stop`.
pub async fn publish(state: Shared, stop: CancellationToken) {
    let kind = state.config.database.url.as_ref().map(DatabaseUrl::kind);
    let (write_interval, refresh_interval) = match kind {
        None | Some(DatabaseKind::Sqlite) => (EMBEDDED_WRITE_INTERVAL, None),
        Some(DatabaseKind::Postgres) => (WRITE_INTERVAL, Some(REFRESH_INTERVAL)),
    };
    let mut written: Option<(Published, Instant)> = None;
    let mut pruned: Option<Instant> = None;
    let mut pause = WRITE_INTERVAL.min(write_interval);
    while stop.run_until_cancelled(sleep(pause)).await.is_some() {
        let counting = Instant::now();
        let shared = Arc::clone(&state);
        let counted = blocking(move || {
            let published = Census::of(&shared.sessions, &shared.history).published();
            serde_json::to_string(&published).map(|text| (published, text))
        });
        let Some(Ok((published, text))) = counted.await else {
            continue;
        };
        pause = write_interval.max(counting.elapsed() * COUNTING_SHARE);
        let is_due = match &written {
            // A node without devices has nothing to write.
            None => published != Published::default(),
            Some((before, at)) => {
                published != *before || refresh_interval.is_some_and(|interval| at.elapsed() >= interval)
            }
        };
        if !is_due {
            continue;
        }
        match state.store.counts_write(state.run, &state.node, &text).await {
            Ok(()) => written = Some((published, Instant::now())),
            Err(error) => {
                tracing::debug!(%error, "device counts not written");
                continue;
            }
        }
        if pruned.is_none_or(|at| at.elapsed() >= PRUNE_INTERVAL) && state.store.counts_prune().await.is_ok() {
            pruned = Some(Instant::now());
        }
    }
}
