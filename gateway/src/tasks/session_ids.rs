//! Stores on disk the time up to which this node may have issued session ids. Start with [`keep`].

use std::{io, time::Duration};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::{node::Shared, session::ids::save};

/// Interval of checks whether the mark must be stored. Well below the time that a mark reserves.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Stores marks ahead of the ids, until `stop`. The exact mark is stored when no session can register any more
/// ([`Running::stop`](crate::serve::Running::stop)).
pub async fn keep(state: Shared, stop: CancellationToken) {
    let mut is_failing = false;
    while stop.run_until_cancelled(sleep(CHECK_INTERVAL)).await.is_some() {
        let (node, mark) = {
            let ids = state.sessions.ids();
            (ids.node(), ids.mark_due(state.clock.wall()))
        };
        if let Some(mark) = mark {
            let data_dir = state.config.server.data_dir.clone();
            let saved = tokio::task::spawn_blocking(move || save(&data_dir, node, mark)).await;
            let saved = saved.unwrap_or_else(|panicked| Err(io::Error::other(panicked)));
            match &saved {
                Ok(()) => state.sessions.ids().handle_marked(mark),
                Err(error) if !is_failing => {
                    tracing::warn!(%error, "session-ids.json can't be written: free space or repair the data directory. If the clock is set back before the next start, its sessions would be older")
                }
                Err(_) => {}
            }
            is_failing = saved.is_err();
        }
    }
}
