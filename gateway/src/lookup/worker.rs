//! A worker: one database connection, with one statement at a time.

use std::sync::Arc;

use seawall_proto::{
    admission::{BatchFailure, LOOKUP_MAX},
    connect::Statement,
};
use tokio_util::sync::CancellationToken;

use super::driver::Driver;
use crate::store::{self, LookupWorker, StoreError};

/// Sends statements until `hard` is cancelled.
pub(super) async fn run(driver: Arc<Driver>, mut worker: LookupWorker, hard: CancellationToken) {
    let metrics = &driver.dependencies.metrics;
    loop {
        let statement = tokio::select! {
            statement = driver.next_statement() => statement,
            () = hard.cancelled() => return,
        };
        let begun = driver.clock.now();
        // A probe looks up no device.
        if !statement.batch.is_probe {
            metrics.lookup_statements.increment(1);
        }
        let found = tokio::select! {
            found = worker.find(&statement.batch.keys, LOOKUP_MAX) => found,
            () = hard.cancelled() => return,
        };
        let took = driver.clock.now().saturating_since(begun);
        metrics.lookup_duration_seconds.record(took.as_secs_f64());
        driver.handle_done(&statement, outcome(&statement, found), took);
    }
}

/// Logs a failure, at most once per statement. The breaker opens soon, and then only probes can fail, one per second.
fn outcome(statement: &Statement, found: Result<store::Answer, StoreError>) -> Result<store::Answer, BatchFailure> {
    found.map_err(|error| {
        if statement.batch.is_probe {
            tracing::debug!(%error, "probe failed");
        } else {
            tracing::warn!(keys = statement.batch.keys.len(), %error, "lookup failed");
        }
        if matches!(error, StoreError::TimedOut) {
            BatchFailure::TimedOut
        } else {
            BatchFailure::Failed
        }
    })
}
