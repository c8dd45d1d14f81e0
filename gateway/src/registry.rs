//! Whether the registry is believed when it says that a device is not in it. One that is suddenly empty, or far smaller than it was, is
//! not: a lost volume, a wrong database and a half-restored backup look so. Devices that it does not have are then refused as ones that
//! can't be verified now, and no session ends.
//!
//! The roster says what it had; devices that were deleted through the API are on record. A device of the roster that is missed is refused so
//! too until a later count has found the registry whole. A person who knows better puts a file named
//! [`ACCEPT_FILE`] into the data directory. Start with [`guard`].

use std::{
    fs, io,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use seawall_proto::slots::believable_len;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    faults::{self, Fault},
    state::{Shared, State},
    store::StoreError,
};

/// The file, in the data directory, that says that the registry is right as it is. It is taken away when it has been read.
pub const ACCEPT_FILE: &str = "accept-registry";

/// How often the devices are counted while all is well. A device that is missed is looked into at once.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// Time between two counts at least, while devices are missed that were deleted since the roster was read.
const DOUBT_INTERVAL: Duration = Duration::from_secs(5);
/// Time between two counts while the registry is not believed.
const HELD_INTERVAL: Duration = Duration::from_secs(1);
/// Most devices that are counted. A larger registry that has lost some, and still has as many, is found out when the roster is read.
const COUNT_MAX: usize = 50_000;
/// How much clocks of nodes may differ in what is on record.
const SKEW: Duration = Duration::from_secs(60);

/// What is known of the registry.
#[derive(Debug, Default)]
pub struct Registry {
    /// It was believed at least once since the start.
    was_believed: AtomicBool,
    /// A person has said that it is right as it is; until the roster was read.
    is_accepted: AtomicBool,
}

impl Registry {
    #[must_use]
    pub fn was_believed(&self) -> bool {
        self.was_believed.load(Ordering::Acquire)
    }

    /// A roster was taken that holds what the registry has.
    pub fn handle_roster(&self) {
        self.is_accepted.store(false, Ordering::Release);
    }
}

/// Whether the registry is believed, which was just read as a whole and has so many devices. False where it can't be found out.
pub async fn may_believe(state: &State, devices: usize) -> bool {
    let found = Found { devices, is_all: true };
    conclude(state, found).await.unwrap_or(false)
}

/// Whether the absence of a single device may be believed now.
pub async fn may_believe_absence(state: &State) -> bool {
    check(state).await.unwrap_or(false)
}

/// Counts the devices, and says whether the registry is believed.
///
/// # Errors
/// They can't be counted.
pub async fn check(state: &State) -> Result<bool, StoreError> {
    let most = believable_len(known(state), 0).min(COUNT_MAX);
    let devices = if most == 0 {
        0
    } else {
        state.store.devices_up_to(most).await?
    };
    let is_all = devices < most;
    conclude(state, Found { devices, is_all }).await
}

struct Found {
    devices: usize,
    /// Otherwise there are more.
    is_all: bool,
}

async fn conclude(state: &State, found: Found) -> Result<bool, StoreError> {
    let known = known(state);
    let mut is_believed = !found.is_all || found.devices >= believable_len(known, 0);
    if !is_believed {
        let changed = state.store.changed_since(state.gate.roster().as_of(), SKEW).await?;
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
        state.registry.was_believed.store(true, Ordering::Release);
    }
    if state.gate.believes_absence() != is_believed {
        state.gate.set_believes_absence(is_believed);
    }
    faults::take_note(state, Fault::RegistryShrunken, detail);
    Ok(is_believed)
}

fn known(state: &State) -> usize {
    if state.registry.is_accepted.load(Ordering::Acquire) {
        0
    } else {
        state.gate.roster().len()
    }
}

/// Counts the devices every so often, and heeds a person's word, until `stop`.
pub async fn guard(state: Shared, stop: CancellationToken) {
    let work = async {
        state.store.ready().await;
        loop {
            heed_acceptance(&state).await;
            let was_believed = state.gate.believes_absence();
            let last_doubt = state.gate.last_doubt();
            let checked = check(&state).await;
            let is_believed = matches!(checked, Ok(true));
            match checked {
                Ok(true) => state.gate.settle_doubts(last_doubt),
                Ok(false) => {}
                Err(error) if was_believed && state.gate.has_open_doubts() => {
                    tracing::warn!(%error, "registered devices are missing and can't be counted: unknown devices are refused as registry_unavailable");
                    state.gate.set_believes_absence(false);
                }
                Err(error) => tracing::debug!(%error, "the registered devices can't be counted"),
            }
            if is_believed && !was_believed {
                state.roster_wanted.ask();
            }
            if is_believed {
                sleep(DOUBT_INTERVAL).await;
                // Due, or a device is missed.
                let _ = timeout(CHECK_INTERVAL, state.gate.doubted()).await;
            } else {
                sleep(HELD_INTERVAL).await;
            }
        }
    };
    // Endless: dropped with the gateway.
    let _: Option<std::convert::Infallible> = stop.run_until_cancelled(work).await;
}

/// Looks for the file that a person makes. One that was made without need is taken away, too: it must not count for another time.
async fn heed_acceptance(state: &Shared) {
    let path = state.config.server.data_dir.join(ACCEPT_FILE);
    let taken = tokio::task::spawn_blocking(move || fs::remove_file(path)).await;
    match taken.unwrap_or_else(|panicked| Err(io::Error::other(panicked))) {
        Ok(()) => {
            tracing::warn!(file = ACCEPT_FILE, "a person says that the registry is right as it is");
            state.registry.is_accepted.store(true, Ordering::Release);
            state.roster_wanted.ask();
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(file = ACCEPT_FILE, %error, "the file can't be taken away, and does not count"),
    }
}
