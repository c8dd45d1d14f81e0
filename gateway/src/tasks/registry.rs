//! Counts the registered devices at intervals, and decides whether the registry is believed. Start with [`guard`].

use std::{fs, io, sync::atomic::Ordering, time::Duration};

use seawall_proto::slots::believable_len;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    fleet::{faults::Fault, registry::ACCEPT_FILE},
    node::{Shared, State},
    store::StoreError,
    tasks::faults,
};

/// Interval of the counts while all is well. A missing device causes a count at once.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// Minimum time between two counts while devices are missing that were deleted since the registry index was read.
const DOUBT_INTERVAL: Duration = Duration::from_secs(5);
/// Time between two counts while the registry is not believed.
const HELD_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of devices that are counted. A loss in a larger registry that still has as many is found when the
/// registry index is read.
const COUNT_MAX: usize = 50_000;
/// Tolerated difference between the clocks of nodes in recorded deletions.
const SKEW: Duration = Duration::from_secs(60);

/// Whether the registry, which was just read completely and has `devices`, is believed. `false` if that cannot be
/// decided.
pub async fn may_believe(state: &State, devices: usize) -> bool {
    let found = Found { devices, is_all: true };
    conclude(state, found, None).await.unwrap_or(false)
}

/// Whether the absence of a single device may be believed now.
pub async fn may_believe_absence(state: &State) -> bool {
    check(state).await.unwrap_or(false)
}

/// Counts the devices, and decides whether the registry is believed. If it is, earlier doubts are settled.
///
/// # Errors
/// They cannot be counted.
pub async fn check(state: &State) -> Result<bool, StoreError> {
    let last_doubt = state.lookups.last_doubt();
    let most = believable_len(known(state), 0).min(COUNT_MAX);
    let devices = if most == 0 {
        0
    } else {
        state.store.devices_up_to(most).await?
    };
    let is_all = devices < most;
    conclude(state, Found { devices, is_all }, Some(last_doubt)).await
}

struct Found {
    devices: usize,
    /// Whether these are all devices, not the maximum of the count.
    is_all: bool,
}

/// `last_doubt`: the last doubt before the devices were counted.
async fn conclude(state: &State, found: Found, last_doubt: Option<u64>) -> Result<bool, StoreError> {
    let known = known(state);
    let mut is_believed = !found.is_all || found.devices >= believable_len(known, 0);
    if !is_believed {
        let revision = state.registry.index_read().and_then(|read| read.revision);
        let changed = match revision {
            Some(revision) => state.store.changed_after(revision).await?,
            // The index is from the disk.
            None => {
                let as_of = state.lookups.registry_index().as_of();
                state.store.changed_since(as_of, SKEW).await?
            }
        };
        is_believed = found.devices >= believable_len(known, changed);
    }
    let detail = (!is_believed).then(|| {
        format!(
            "the registry has {} devices, and had {known} when this node read it last. Those that are missing are refused as \
             `registry_unavailable`, and no session ends. Restore the database or name the right one; where it is right as it is, \
             make the file {}",
            found.devices,
            state.config.server.data_dir.join(ACCEPT_FILE).display()
        )
    });
    if is_believed {
        // First, so that no device that was missing before is refused once the registry is believed.
        if let Some(last_doubt) = last_doubt {
            state.lookups.settle_doubts(last_doubt);
        }
        state.registry.was_believed.store(true, Ordering::Release);
    }
    if state.lookups.believes_absence() != is_believed {
        state.lookups.set_believes_absence(is_believed);
    }
    faults::take_note(state, Fault::RegistryShrunken, detail);
    Ok(is_believed)
}

fn known(state: &State) -> usize {
    if state.registry.is_accepted.load(Ordering::Acquire) {
        0
    } else {
        state.lookups.registry_index().len()
    }
}

/// Counts the devices at intervals, and applies an operator's acceptance, until `stop`.
pub async fn guard(state: Shared, stop: CancellationToken) {
    let work = async {
        state.store.ready().await;
        loop {
            take_acceptance(&state).await;
            let was_believed = state.lookups.believes_absence();
            let checked = check(&state).await;
            let is_believed = matches!(checked, Ok(true));
            match checked {
                Ok(_) => {}
                Err(error) if was_believed && state.lookups.has_open_doubts() => {
                    tracing::warn!(%error, "registered devices are missing, and their count failed: unknown devices are refused with registry_unavailable");
                    state.lookups.set_believes_absence(false);
                }
                Err(error) => tracing::debug!(%error, "count of registered devices failed"),
            }
            if is_believed && !was_believed {
                state.registry_index_wanted.ask();
            }
            if is_believed {
                sleep(DOUBT_INTERVAL).await;
                // Waits for the interval, or for a missing device.
                let _ = timeout(CHECK_INTERVAL, state.lookups.doubted()).await;
            } else {
                sleep(HELD_INTERVAL).await;
            }
        }
    };
    // Endless: dropped with the gateway.
    let _: Option<std::convert::Infallible> = stop.run_until_cancelled(work).await;
}

/// Checks for the file by which an operator accepts the registry. It is removed even if it was not needed, so that it
/// has no effect later.
async fn take_acceptance(state: &Shared) {
    let path = state.config.server.data_dir.join(ACCEPT_FILE);
    let taken = tokio::task::spawn_blocking(move || fs::remove_file(path)).await;
    match taken.unwrap_or_else(|panicked| Err(io::Error::other(panicked))) {
        Ok(()) => {
            tracing::warn!(file = ACCEPT_FILE, "registry accepted by an operator");
            state.registry.is_accepted.store(true, Ordering::Release);
            state.registry_index_wanted.ask();
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(file = ACCEPT_FILE, %error, "file not removable, so it is ignored"),
    }
}
