//! Reads the registry into this node's registry index: at the start, when the index is old, and on request. Start with
//! [`follow`].

use std::{io, sync::Arc, time::Duration};

use rand::Rng as _;
use seawall_proto::{
    admission::BreakerState,
    slots::{REGISTRY_INDEX_MAX, RegistryIndex, RegistryIndexBuilder},
};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    fleet::{registry::IndexRead, registry_index::keep},
    node::{Shared, State},
    tasks::registry,
};

/// Age at which the index is read again, ± [`AGE_SPREAD`]. Until then, devices that were registered through other nodes
/// and did not connect here are unknown.
const AGE: Duration = Duration::from_mins(30);
/// Spreads the reads of nodes that started together.
const AGE_SPREAD: f64 = 0.25;
/// Minimum time between the end of one read and the start of the next.
const PAUSE_MIN: Duration = Duration::from_secs(5);
/// Pause between two pages, as a multiple of a page's time: reading takes at most a fifth of one connection's time.
const PAGE_PAUSE_FACTOR: u32 = 4;
const PAGE_PAUSE_MIN: Duration = Duration::from_millis(10);
/// Maximum time of a page at the usual rate. A page takes 0.5 ms in the database; a longer one is costly there.
const PAGE_USUAL_MAX: Duration = Duration::from_millis(250);
/// The pause after a costly page, as a multiple of the page's time: reading takes 2 % of one connection's time.
const COSTLY_PAGE_PAUSE_FACTOR: u32 = 49;
/// Pause after a page that could not be read.
const RETRY_PAUSE: Duration = Duration::from_secs(5);
/// Interval of checks whether devices still wait.
const QUIET_CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// Age from which the index is stale. Then newly registered devices must not stay unknown, even if devices wait all the
/// time.
const AGE_STALE: Duration = Duration::from_hours(1);
/// With a stale index, a page is read at this interval even while devices wait.
const STALE_PAGE_INTERVAL: Duration = Duration::from_secs(1);

/// Reads the registry at the start, when the index is old, and on request, until `stop`.
pub async fn follow(state: Shared, stop: CancellationToken) {
    let work = async {
        state.store.ready().await;
        // Whatever the file contains: it may be a copy from a node of another registry.
        let mut due = Instant::now();
        let mut is_failing = false;
        loop {
            // Waits for a request or the interval.
            let _ = timeout(
                due.saturating_duration_since(Instant::now()),
                state.registry_index_wanted.0.notified(),
            )
            .await;
            let Some((registry_index, begun, kept)) = read(&state).await else {
                sleep(RETRY_PAUSE).await;
                continue;
            };
            let registry_index = Arc::new(registry_index);
            tracing::debug!(devices = registry_index.len(), "registry index read");
            if !registry::may_believe(&state, kept).await {
                // The previous index stays, here and on disk, to judge the registry by.
                sleep(PAUSE_MIN).await;
                due = Instant::now() + age_max();
                continue;
            }
            state.lookups.set_registry_index(Arc::clone(&registry_index));
            state.registry.handle_registry_index(begun);
            let data_dir = state.config.server.data_dir.clone();
            let kept = tokio::task::spawn_blocking(move || keep(&data_dir, &registry_index)).await;
            let kept = kept.unwrap_or_else(|panicked| Err(io::Error::other(panicked)));
            if let Err(error) = &kept
                && !is_failing
            {
                tracing::warn!(%error, "registry index not written to disk");
            }
            is_failing = kept.is_err();
            sleep(PAUSE_MIN).await;
            due = Instant::now() + age_max();
        }
    };
    // Endless: dropped with the gateway.
    let _: Option<std::convert::Infallible> = stop.run_until_cancelled(work).await;
}

/// The pause after a page, by the time that it took.
fn page_pause(took: Duration) -> Duration {
    let factor = if took > PAGE_USUAL_MAX {
        COSTLY_PAGE_PAUSE_FACTOR
    } else {
        PAGE_PAUSE_FACTOR
    };
    (took * factor).max(PAGE_PAUSE_MIN)
}

fn age_max() -> Duration {
    AGE.mul_f64(rand::rng().random_range(1.0 - AGE_SPREAD..=1.0 + AGE_SPREAD))
}

/// Reads the whole registry, however long it takes. Returns the index, the beginning of the reading, and the number of
/// devices of the previous index that are still there. `None`: the result was lost by a bug.
async fn read(state: &State) -> Option<(RegistryIndex, IndexRead, usize)> {
    let previous = state.lookups.registry_index();
    let mut kept = 0;
    let mut builder = RegistryIndexBuilder::new(rand::random());
    quiet(state).await;
    let as_of = state.clock.wall();
    let begun = IndexRead {
        at: state.clock.now(),
        revision: state.resume.revision(),
    };
    let mut cursor = None;
    loop {
        let page_begun = Instant::now();
        let page = match state.store.registry_index_page(cursor.as_ref()).await {
            Ok(page) => page,
            Err(error) => {
                tracing::debug!(%error, "page of registered devices not readable: retrying");
                sleep(RETRY_PAUSE).await;
                quiet(state).await;
                continue;
            }
        };
        kept += page.items.iter().filter(|row| previous.has(row.device)).count();
        let has_room = page.items.iter().all(|row| builder.add(row.device, &row.tenant));
        if !has_room {
            tracing::warn!(
                devices_max = REGISTRY_INDEX_MAX,
                "registry exceeds the maximum of the index: further devices are unknown until a node has seen them"
            );
            break;
        }
        cursor = page.next_cursor;
        if cursor.is_none() {
            break;
        }
        sleep(page_pause(page_begun.elapsed())).await;
        quiet(state).await;
    }
    // Sorting the largest index takes a second.
    let finish = move || builder.finish(as_of);
    let finished = tokio::task::spawn_blocking(finish).await;
    finished
        .inspect_err(|error| tracing::error!(%error, "registered devices were read, but sorting them failed"))
        .ok()
        .map(|registry_index| (registry_index, begun, kept))
}

/// Waits until lookups leave the database time for a page.
async fn quiet(state: &State) {
    let begun = Instant::now();
    loop {
        let admission = state.lookups.state();
        let is_there = admission.breaker == BreakerState::Closed && state.store.state().status.is_answering();
        let is_turn_of_blind = begun.elapsed() >= STALE_PAGE_INTERVAL
            && is_blind(&state.lookups.registry_index(), state.registry_index_age());
        if is_there && (admission.has_time_to_spare() || is_turn_of_blind) {
            return;
        }
        sleep_until(Instant::now() + QUIET_CHECK_INTERVAL).await;
    }
}

/// Whether a registry index of this age is useless.
fn is_blind(registry_index: &RegistryIndex, age: Duration) -> bool {
    registry_index.is_empty() || age >= AGE_STALE
}

#[cfg(test)]
mod tests {
    use seawall_proto::{id::DeviceId, time::WallTime};

    use super::*;

    #[test]
    fn reading_the_registry_takes_a_fifth_of_a_connections_time_and_a_fiftieth_where_pages_are_costly() {
        let millis = Duration::from_millis;

        assert_eq!(page_pause(millis(1)), millis(10));
        assert_eq!(page_pause(millis(250)), millis(1_000));
        assert_eq!(page_pause(millis(251)), millis(251 * 49));
    }

    #[test]
    fn devices_that_wait_do_not_hold_up_the_reading_where_there_is_no_registry_index_or_one_an_hour_old() {
        let minutes = Duration::from_mins;
        let mut builder = RegistryIndexBuilder::new([1; 16]);
        assert!(builder.add(DeviceId::from_uuid(uuid::Uuid::from_u128(1)), "acme"));
        let registry_index = builder.finish(WallTime::from_unix_ms(1_800_000_000_000));

        assert!(is_blind(&RegistryIndex::empty(), Duration::ZERO));
        assert!(!is_blind(&registry_index, minutes(59)));
        assert!(is_blind(&registry_index, minutes(60)));
    }
}
