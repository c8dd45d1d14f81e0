//! A worker: one database connection, with one statement at a time.

use std::{panic::AssertUnwindSafe, sync::Arc};

use futures_util::FutureExt as _;
use seawall_proto::{
    admission::{BatchFailure, LOOKUP_MAX},
    connect::Statement,
};
use tokio_util::sync::CancellationToken;

use super::driver::Driver;
use crate::{
    runtime::lifecycle::panic_text,
    store::{self, LookupWorker, StoreError},
};

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
            found = isolated(worker.find(&statement.batch.keys, LOOKUP_MAX)) => found,
            () = hard.cancelled() => return,
        };
        let found = found.unwrap_or_else(|panic| {
            metrics.task_panics.increment(1);
            Err(panic)
        });
        let took = driver.clock.now().saturating_since(begun);
        metrics.lookup_duration_seconds.record(took.as_secs_f64());
        driver.handle_done(&statement, outcome(&statement, found), took);
    }
}

/// Turns a panic into a failed lookup: the inner result. All nodes read the same rows, and one that none of them can
/// process must not end them all.
async fn isolated<T>(work: impl Future<Output = Result<T, StoreError>>) -> Result<Result<T, StoreError>, StoreError> {
    AssertUnwindSafe(work).catch_unwind().await.map_err(|panic| {
        let reason = panic_text(panic.as_ref());
        tracing::error!(reason, "lookup panicked");
        StoreError::Unusable("the lookup failed by a bug of the gateway: see its log".to_owned())
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lookup_that_panics_is_one_that_failed() {
        let row = isolated(async { Ok(7) }).await;
        let poison = isolated(async { panic!("out of {}", "luck") });

        assert!(matches!(row, Ok(Ok(7))));
        let poison: Result<Result<(), _>, _> = poison.await;
        assert!(matches!(poison, Err(StoreError::Unusable(told)) if !told.contains("luck")));
    }
}
