//! What is wrong with the database, the registry in it and the disk, as far as somebody has to mend it: a reason in `/readyz`, an alarm
//! and a metric while it lasts, and one line in the log. Start with [`follow`].
//!
//! Who meets a trouble counts and goes on; nobody else tells of it. What is looked at here is looked at once a second.

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use seawall_proto::admission::BreakerState;
use tokio::{
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{
    state::{Shared, State},
    store::Trouble,
};

/// How often it is looked at what is wrong.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A fault that was not seen for so long is over.
const QUIET: Duration = Duration::from_secs(3);
/// A disk with less room than this is full: SQLite's companion files take 32 KiB at least.
const DISK_BYTES_MIN: u64 = 64 << 10;

/// What can be wrong. The name is that of the reason, of the alarm, and the label of `seawall_faults`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Devices are refused because look-ups fail.
    LookupsFail,
    /// The database refuses statements of ours: rights, schema, damage.
    DatabaseRefuses,
    /// Rows can't be read.
    RegistryUnreadable,
    /// The registry has far fewer devices than it had.
    RegistryShrunken,
    /// SQLite's file was deleted, emptied or replaced.
    DatabaseFile,
    DiskFull,
    DiskReadOnly,
}

impl Fault {
    pub const ALL: [Self; 7] = [
        Self::LookupsFail,
        Self::DatabaseRefuses,
        Self::RegistryUnreadable,
        Self::RegistryShrunken,
        Self::DatabaseFile,
        Self::DiskFull,
        Self::DiskReadOnly,
    ];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::LookupsFail => "lookups_fail",
            Self::DatabaseRefuses => "database_refuses",
            Self::RegistryUnreadable => "registry_unreadable",
            Self::RegistryShrunken => "registry_shrunken",
            Self::DatabaseFile => "database_file",
            Self::DiskFull => "disk_full",
            Self::DiskReadOnly => "disk_read_only",
        }
    }

    const fn over(self) -> &'static str {
        match self {
            Self::LookupsFail => "devices are looked up again",
            Self::DatabaseRefuses => "the database no longer refuses statements",
            Self::RegistryUnreadable => "no unreadable rows were met lately",
            Self::RegistryShrunken => "the registry is believed again",
            Self::DatabaseFile => "the database file is the one that was opened",
            Self::DiskFull => "there is room on the disk again",
            Self::DiskReadOnly => "the disk can be written again",
        }
    }
}

/// What is wrong now.
#[derive(Debug, Default)]
pub struct Faults(Mutex<[Option<Seen>; Fault::ALL.len()]>);

#[derive(Debug)]
struct Seen {
    detail: String,
    at: Instant,
}

/// What a look has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Edge {
    Raised,
    Ended,
}

impl Faults {
    #[must_use]
    pub fn is_on(&self, fault: Fault) -> bool {
        self.lock()[fault as usize].is_some()
    }

    /// What is known of it, while it is on.
    #[must_use]
    pub fn detail(&self, fault: Fault) -> Option<String> {
        self.lock()[fault as usize].as_ref().map(|seen| seen.detail.clone())
    }

    fn take_note(&self, fault: Fault, detail: Option<String>, now: Instant) -> Option<Edge> {
        let seen = &mut self.lock()[fault as usize];
        match (detail, &seen) {
            (Some(detail), _) => {
                let before = seen.replace(Seen { detail, at: now });
                before.is_none().then_some(Edge::Raised)
            }
            (None, Some(known)) if now.saturating_duration_since(known.at) >= QUIET => {
                *seen = None;
                Some(Edge::Ended)
            }
            (None, _) => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, [Option<Seen>; Fault::ALL.len()]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes note of a fault, or that it was looked for and is not there; tells operators of its begin and its end.
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
    state.alarm(fault.as_str(), is_raised, words);
}

/// Looks at what is wrong until `stop`. [`Fault::RegistryShrunken`] is found by [`crate::registry`].
pub async fn follow(state: Shared, stop: CancellationToken) {
    let mut looks = interval(LOOK_INTERVAL);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut disks = DiskLook::default();
    while stop.run_until_cancelled(looks.tick()).await.is_some() {
        look(&state);
        let looked = Arc::clone(&state);
        let found = disks.next(move || look_at_disks(&looked)).await;
        if let Some((full, read_only)) = found {
            take_note(&state, Fault::DiskFull, full);
            take_note(&state, Fault::DiskReadOnly, read_only);
        }
    }
}

/// The look at the disks, one at a time and on a thread of its own: a disk that hangs holds up nothing else.
struct DiskLook<T>(Option<JoinHandle<T>>);

impl<T> Default for DiskLook<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Send + 'static> DiskLook<T> {
    /// What the look before this one has found. Starts the next one. `None` while a look goes on.
    async fn next(&mut self, look: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        if self.0.as_ref().is_some_and(|running| !running.is_finished()) {
            return None;
        }
        let finished = self.0.replace(tokio::task::spawn_blocking(look))?;
        finished
            .await
            .inspect_err(|error| tracing::error!(%error, "the disk could not be looked at"))
            .ok()
    }
}

fn look(state: &State) {
    let store = &state.store;
    let failing = match state.gate.state().breaker {
        // Without a cause it is being tried for the first time.
        BreakerState::Open | BreakerState::HalfOpen => store
            .trouble(Trouble::Lookups)
            .or_else(|| store.state().reason)
            .map(|cause| format!("devices are refused because look-ups fail: {cause}")),
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
    if state.gate.believes_absence() {
        take_note(state, Fault::RegistryShrunken, None);
    }
}

/// What is wrong with the disks of the data directory and of an SQLite database: full, and read-only.
fn look_at_disks(state: &State) -> (Option<String>, Option<String>) {
    state.store.look_at_file();
    let data_dir = state.config.server.data_dir.as_path();
    let file = state.config.database_url().sqlite_path();
    let folder = file
        .as_deref()
        .and_then(Path::parent)
        .filter(|folder| !folder.as_os_str().is_empty());
    // A disk that can be looked at says by itself when there is room again.
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
                "the disk of {} is read-only: mount it for writing, the gateway then goes on by itself",
                folder.display()
            ));
        } else if is_full || has_no_files_left {
            full = Some(format!(
                "the disk of {} is full: free space, the gateway then goes on by itself",
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
    async fn disk_that_hangs_holds_up_no_other_look() {
        let (release, hangs) = std::sync::mpsc::channel::<()>();
        let mut disks = DiskLook::default();

        assert_eq!(disks.next(move || hangs.recv().is_err()).await, None);
        for _ in 0..3 {
            assert_eq!(disks.next(|| unreachable!("one look at a time")).await, None);
        }
        drop(release);

        let deadline = Instant::now() + Duration::from_secs(10);
        while disks.next(|| false).await != Some(true) {
            assert!(Instant::now() < deadline, "the look has ended");
            tokio::task::yield_now().await;
        }
    }

    #[test]
    fn fault_is_raised_once_and_ends_once_it_was_not_seen_for_a_while() {
        let faults = Faults::default();
        let at = Instant::now();
        let note = |detail: Option<&str>, seconds| {
            let now = at + Duration::from_secs(seconds);
            faults.take_note(Fault::DiskFull, detail.map(str::to_owned), now)
        };

        assert_eq!(note(None, 0), None);
        assert_eq!(note(Some("full"), 1), Some(Edge::Raised));
        assert_eq!(note(Some("still full"), 2), None);
        assert_eq!(note(None, 3), None);
        assert_eq!(note(Some("full again"), 4), None, "no second alarm for one that flaps");
        assert_eq!(note(None, 7), Some(Edge::Ended));
        assert_eq!(note(None, 8), None);
    }
}
