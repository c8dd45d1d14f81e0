//! Counts registered devices by tenant and model, for counts of presence. Start with [`count`].

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::presence_returns::{has_time, is_alone};
use crate::node::Shared;

/// Time after which the registry is counted again: another node may have changed it.
const INTERVAL: Duration = Duration::from_secs(60);
/// Minimum rest between two counts.
const REST_MIN: Duration = Duration::from_millis(250);
/// The rest, as a multiple of the time that a count took: counting takes a hundredth of one connection's time.
const REST_FACTOR: u32 = 100;
/// Interval of checks whether the database has time.
const BUSY_REST: Duration = Duration::from_secs(1);

/// Counts at the start, every minute, and on request, until `stop`.
pub async fn count(state: Shared, stop: CancellationToken) {
    let work = async {
        state.store.ready().await;
        loop {
            while !has_time(&state) {
                sleep(BUSY_REST).await;
            }
            let begun = Instant::now();
            // With one node, memory knows which of them were seen. With several, only the database does.
            match state.store.device_kinds(!is_alone(&state)).await {
                Ok(counted) => state.registered.set(counted),
                Err(error) => tracing::debug!(%error, "registered devices not counted: trying again"),
            }
            sleep((begun.elapsed() * REST_FACTOR).max(REST_MIN)).await;
            // Waits for a request or the interval.
            let _ = timeout(INTERVAL, state.registered.asked()).await;
        }
    };
    // Endless: dropped with the gateway.
    let _: Option<std::convert::Infallible> = stop.run_until_cancelled(work).await;
}
