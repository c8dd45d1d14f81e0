//! A worker: one connection, one statement at a time, for as long as the gateway lives.

use std::sync::Arc;

use seawall_proto::admission::{BatchFailure, LOOKUP_MAX};
use tokio_util::sync::CancellationToken;

use super::inner::{Inner, Sent};
use crate::store::{self, LookupWorker, StoreError};

/// Sends what admission lets through until `hard` is cancelled.
pub(super) async fn run(gate: Arc<Inner>, mut worker: LookupWorker, hard: CancellationToken) {
    loop {
        let woken = gate.work.notified();
        let Some(sent) = gate.next_batch() else {
            tokio::select! {
                () = woken => continue,
                () = hard.cancelled() => return,
            }
        };
        let begun = gate.clock.now();
        // A probe looks nobody up.
        if !sent.batch.is_probe {
            gate.metrics.lookup_statements.increment(1);
        }
        let found = tokio::select! {
            found = worker.find(&sent.batch.keys, LOOKUP_MAX) => found,
            () = hard.cancelled() => return,
        };
        let took = gate.clock.now().saturating_since(begun);
        gate.metrics.lookup_duration_seconds.record(took.as_secs_f64());
        gate.handle_done(&sent, outcome(&sent, found), took);
    }
}

/// Logged at most once a statement: the breaker opens soon, and what fails then are probes, one a second, for as long as it takes.
fn outcome(sent: &Sent, found: Result<store::Answer, StoreError>) -> Result<store::Answer, BatchFailure> {
    found.map_err(|error| {
        if sent.batch.is_probe {
            tracing::debug!(%error, "probe failed");
        } else {
            tracing::warn!(keys = sent.batch.keys.len(), %error, "look-up failed");
        }
        if matches!(error, StoreError::TimedOut) {
            BatchFailure::TimedOut
        } else {
            BatchFailure::Failed
        }
    })
}
