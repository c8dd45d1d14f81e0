//! Checks once per second for faults of the database, the registry and the disks. Start with [`follow`].

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use seawall_proto::admission::BreakerState;
use tokio::{
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{
    fleet::faults::{Edge, Fault},
    node::{Shared, State},
    store::Trouble,
};

/// Interval of the checks.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Free space below which a disk is full, in bytes: SQLite's additional files take at least 32 KiB.
const DISK_BYTES_MIN: u64 = 64 << 10;

/// Records a fault or its absence after a check. Raises and ends its alarm.
pub fn take_note(state: &State, fault: Fault, detail: Option<String>) {
    let told = detail.clone().unwrap_or_default();
    let Some(edge) = state.faults.take_note(fault, detail, Instant::now()) else {
        return;
    };
    let is_raised = edge == Edge::Raised;
    state
        .metrics
        .faults
        .set(fault.as_str(), if is_raised { 1.0 } else { 0.0 });
    let words = if is_raised { told } else { fault.over().to_owned() };
    state.alarms.set(fault.as_str(), is_raised, words);
}

/// Checks for faults until `stop`. [`crate::fleet::registry`] finds [`Fault::RegistryShrunken`].
pub async fn follow(state: Shared, stop: CancellationToken) {
    let mut checks = interval(CHECK_INTERVAL);
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut disks = DiskCheck::default();
    while stop.run_until_cancelled(checks.tick()).await.is_some() {
        check(&state);
        let shared = Arc::clone(&state);
        let found = disks.next(move || check_disks(&shared)).await;
        if let Some((full, read_only)) = found {
            take_note(&state, Fault::DiskFull, full);
            take_note(&state, Fault::DiskReadOnly, read_only);
        }
    }
}

/// The check of the disks, one at a time and on a separate thread: a disk that hangs delays nothing else.
struct DiskCheck<T>(Option<JoinHandle<T>>);

impl<T> Default for DiskCheck<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Send + 'static> DiskCheck<T> {
    /// Result of the previous check. Starts the next one. `None` while a check still runs.
    async fn next(&mut self, check: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        if self.0.as_ref().is_some_and(|running| !running.is_finished()) {
            return None;
        }
        let finished = self.0.replace(tokio::task::spawn_blocking(check))?;
        finished
            .await
            .inspect_err(|error| tracing::error!(%error, "disk check failed"))
            .ok()
    }
}

fn check(state: &State) {
    let store = &state.store;
    let failing = match state.lookups.state().breaker {
        // Without a cause it is being tried for the first time.
        BreakerState::Open | BreakerState::HalfOpen => store
            .trouble(Trouble::Lookups)
            .or_else(|| store.state().reason)
            .map(|cause| format!("devices are refused because lookups fail: {cause}")),
        BreakerState::Closed | BreakerState::Absent => None,
    };
    take_note(state, Fault::LookupsFail, failing);
    for (fault, trouble) in [
        (Fault::DatabaseRefuses, Trouble::Refuses),
        (Fault::RegistryUnreadable, Trouble::Unreadable),
    ] {
        take_note(state, fault, store.trouble(trouble));
    }
    take_note(state, Fault::DatabaseFile, store.trouble(Trouble::FileChanged));
    if state.lookups.believes_absence() {
        take_note(state, Fault::RegistryShrunken, None);
    }
}

/// Faults of the disks of the data directory and of an SQLite database: full, and read-only.
fn check_disks(state: &State) -> (Option<String>, Option<String>) {
    state.store.check_file();
    let data_dir = state.config.server.data_dir.as_path();
    let file = state.config.database_url().sqlite_path();
    let folder = file
        .as_deref()
        .and_then(Path::parent)
        .filter(|folder| !folder.as_os_str().is_empty());
    // The check itself shows when a disk has free space again.
    let told = file.is_none().then(|| state.store.trouble(Trouble::DiskFull)).flatten();
    let (mut full, mut read_only) = (told, None);
    for folder in [Some(data_dir), folder].into_iter().flatten() {
        let Ok(disk) = rustix::fs::statvfs(folder) else {
            continue;
        };
        let is_full = disk.f_blocks > 0 && disk.f_bavail.saturating_mul(disk.f_frsize) < DISK_BYTES_MIN;
        let has_no_files_left = disk.f_files > 0 && disk.f_favail == 0;
        if disk.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
            read_only = Some(format!(
                "the disk of {} is read-only: mount it for writing; the gateway then recovers on its own",
                folder.display()
            ));
        } else if is_full || has_no_files_left {
            full = Some(format!(
                "the disk of {} is full: free space; the gateway then recovers on its own",
                folder.display()
            ));
        }
    }
    (full, read_only)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn disk_that_hangs_delays_no_other_check() {
        let (release, hangs) = std::sync::mpsc::channel::<()>();
        let mut disks = DiskCheck::default();

        assert_eq!(disks.next(move || hangs.recv().is_err()).await, None);
        for _ in 0..3 {
            assert_eq!(disks.next(|| unreachable!("one check at a time")).await, None);
        }
        drop(release);

        let deadline = Instant::now() + Duration::from_secs(10);
        while disks.next(|| false).await != Some(true) {
            assert!(Instant::now() < deadline, "the check has ended");
            tokio::task::yield_now().await;
        }
    }
}
