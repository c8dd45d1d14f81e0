//! Keeps the measured capacity on disk. Start with [`keep`].

use std::{io, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{fleet::last_known_good::save, node::Shared};

/// Interval between two writes of the measured capacity. See docs/design/limiter.md.
const KEEP_INTERVAL: Duration = Duration::from_secs(60);

/// Writes the measured capacity, each minute if it is new, and once more at `stop`.
pub async fn keep(state: Shared, stop: CancellationToken) {
    let mut is_failing = false;
    loop {
        let is_last = tokio::time::timeout(KEEP_INTERVAL, stop.cancelled()).await.is_ok();
        if let Some(rate) = state.lookups.take_last_known_good() {
            let data_dir = state.config.server.data_dir.clone();
            let saved = tokio::task::spawn_blocking(move || save(&data_dir, rate)).await;
            let saved = saved.unwrap_or_else(|panicked| Err(io::Error::other(panicked)));
            if let Err(error) = &saved
                && !is_failing
            {
                tracing::warn!(error = %error, "measured capacity not written to disk");
            }
            is_failing = saved.is_err();
        }
        if is_last {
            return;
        }
    }
}
