//! Counts the registered devices at intervals, looks for some of those that the registry had, and decides whether it is
//! believed. Start with [`guard`].

use std::{collections::BTreeSet, fs, io, sync::atomic::Ordering, time::Duration};

use seawall_proto::{
    id::DeviceId,
    slots::{RegistryIndex, believable_len, is_same_registry},
};
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

/// Maximum number of devices that are looked for, to tell the registry from another of a similar size.
const SAMPLE_MAX: usize = 128;

/// Whether the registry, which was just read completely, is believed. `kept`: the number of devices of the previous
/// index that it has. `false` if that cannot be decided.
pub async fn may_believe(state: &State, kept: usize) -> bool {
    let decide = async {
        let index = state.lookups.registry_index();
        let known = known(state, &index);
        let is_same = kept >= believable_len(known, 0)
            || kept >= believable_len(known, changed(state).await?.filter(|device| index.has(*device)).count());
        state.registry.is_another.store(!is_same, Ordering::Release);
        conclude(state, (!is_same).then(|| lacks(kept, known)));
        Ok::<_, StoreError>(is_same)
    };
    decide.await.unwrap_or(false)
}

/// Whether the absence of a single device may be believed now.
pub async fn may_believe_absence(state: &State) -> bool {
    matches!(check(state).await, Ok(Belief::Proven))
}

/// Whether the registry is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Belief {
    /// It has most devices that it had.
    Proven,
    /// It has enough devices, and too few of them are known here to tell it from another. The next reading of the
    /// registry index tells.
    Presumed,
    Refused,
}

/// Counts the devices, and looks for some of those that the registry had. Decides whether it is believed. If it has
/// proved to be the same, earlier doubts are settled. Otherwise the next index settles them.
///
/// # Errors
/// They cannot be counted.
pub async fn check(state: &State) -> Result<Belief, StoreError> {
    let last_doubt = state.lookups.last_doubt();
    let index = state.lookups.registry_index();
    let known = known(state, &index);
    let most = believable_len(known, 0).min(COUNT_MAX);
    // If few devices are known, any registry is believed.
    if most == 0 {
        return Ok(prove(state, last_doubt));
    }
    let devices = state.store.devices_up_to(most).await?;
    if devices < most {
        let changed = changed(state).await?.filter(|device| index.has(*device)).count();
        if devices < believable_len(known, changed) {
            let doubt = format!("the registry has {devices} devices, and had {known} when this node read it last");
            return Ok(refuse(state, doubt));
        }
    }
    let (sample, found, changed) = look_for_sample(state, &index).await?;
    Ok(match is_same_registry(sample, found, changed) {
        Some(true) => prove(state, last_doubt),
        Some(false) => refuse(state, lacks(found, sample)),
        None => {
            let is_another = state.registry.is_another.load(Ordering::Acquire);
            if is_another || state.lookups.has_open_doubts() {
                state.registry_index_wanted.ask();
            }
            if is_another {
                refuse(
                    state,
                    "the registry lacks most devices that it had when this node read it last".to_owned(),
                )
            } else {
                conclude(state, None);
                Belief::Presumed
            }
        }
    })
}

/// The registry has proved to be the one that the registry index was read from.
fn prove(state: &State, last_doubt: u64) -> Belief {
    state.registry.is_another.store(false, Ordering::Release);
    // First, so that no device that was missing before is refused once the registry is believed.
    state.lookups.settle_doubts(last_doubt);
    conclude(state, None);
    Belief::Proven
}

fn refuse(state: &State, doubt: String) -> Belief {
    conclude(state, Some(doubt));
    Belief::Refused
}

fn lacks(found: usize, of: usize) -> String {
    format!("of {of} devices that the registry had when this node read it last, it has {found}")
}

/// Looks for devices of the index that had a session lately. Returns their number, the number of those that are
/// registered, and of the others that changed.
async fn look_for_sample(state: &State, index: &RegistryIndex) -> Result<(usize, usize, usize), StoreError> {
    let seen = state.sessions.sample().chain(state.history.sample());
    let mut sample = BTreeSet::new();
    for device in seen.filter(|device| index.has(*device)) {
        if sample.len() == SAMPLE_MAX {
            break;
        }
        sample.insert(device);
    }
    let sample: Vec<DeviceId> = sample.into_iter().collect();
    if is_same_registry(sample.len(), 0, 0).is_none() {
        return Ok((sample.len(), 0, 0));
    }
    let present = state.store.present_among(&sample).await?;
    let is_missing = |device: &DeviceId| sample.binary_search(device).is_ok() && !present.contains(device);
    let changed = if is_same_registry(sample.len(), present.len(), 0) == Some(true) {
        0
    } else {
        changed(state).await?.filter(is_missing).count()
    };
    Ok((sample.len(), present.len(), changed))
}

/// Devices that changed since the registry index was read, and may have been deleted.
async fn changed(state: &State) -> Result<impl Iterator<Item = DeviceId>, StoreError> {
    let revision = state.registry.index_read().and_then(|read| read.revision);
    let changed = match revision {
        Some(revision) => state.store.changed_after(revision).await?,
        // The index is from the disk.
        None => {
            let as_of = state.lookups.registry_index().as_of();
            state.store.changed_since(as_of, SKEW).await?
        }
    };
    Ok(changed.into_iter())
}

/// Believes the registry, or says why not.
fn conclude(state: &State, doubt: Option<String>) {
    let is_believed = doubt.is_none();
    let detail = doubt.map(|doubt| {
        format!(
            "{doubt}. Those that are missing are refused as `registry_unavailable`, and no session ends. Restore the database or \
             name the right one; where it is right as it is, make the file {}",
            state.config.server.data_dir.join(ACCEPT_FILE).display()
        )
    });
    if state.lookups.believes_absence() != is_believed {
        state.lookups.set_believes_absence(is_believed);
    }
    state.registry.was_judged.store(true, Ordering::Release);
    faults::take_note(state, Fault::RegistryShrunken, detail);
}

/// Number of devices of the index; 0 if an operator accepted the registry as it is.
fn known(state: &State, index: &RegistryIndex) -> usize {
    if state.registry.is_accepted.load(Ordering::Acquire) {
        0
    } else {
        index.len()
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
            let is_believed = matches!(checked, Ok(Belief::Proven | Belief::Presumed));
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
