//! Faults of the database, its registry and the disk that an operator must repair. Each is a reason in `/readyz`, an
//! alarm and a metric while it lasts, and one line in the log. Start with [`Faults`].
//!
//! Code that meets a fault counts it and continues. Only a check each second reports it.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Time without a sign of a fault after which it ends.
const QUIET: Duration = Duration::from_secs(3);

/// A fault. Its name is the reason, the alarm, and the label of `seawall_faults`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Devices are refused because lookups fail.
    LookupsFail,
    /// The database rejects the gateway's statements: permissions, schema, damage.
    DatabaseRefuses,
    /// Rows cannot be read.
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

    pub(crate) const fn over(self) -> &'static str {
        match self {
            Self::LookupsFail => "lookups succeed again",
            Self::DatabaseRefuses => "the database accepts statements again",
            Self::RegistryUnreadable => "no unreadable rows were read lately",
            Self::RegistryShrunken => "the registry is believed again",
            Self::DatabaseFile => "the database file is the one that was opened",
            Self::DiskFull => "the disk has free space again",
            Self::DiskReadOnly => "the disk is writable again",
        }
    }
}

/// Current faults.
#[derive(Debug, Default)]
pub struct Faults(Mutex<[Option<Seen>; Fault::ALL.len()]>);

#[derive(Debug)]
struct Seen {
    detail: String,
    at: Instant,
}

/// Change after a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Edge {
    Raised,
    Ended,
}

impl Faults {
    #[must_use]
    pub fn is_on(&self, fault: Fault) -> bool {
        self.lock()[fault as usize].is_some()
    }

    /// Its details, while it is active.
    #[must_use]
    pub fn detail(&self, fault: Fault) -> Option<String> {
        self.lock()[fault as usize].as_ref().map(|seen| seen.detail.clone())
    }

    pub(crate) fn take_note(&self, fault: Fault, detail: Option<String>, now: Instant) -> Option<Edge> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(
            note(Some("full again"), 4),
            None,
            "no second alarm for a fault that flaps"
        );
        assert_eq!(note(None, 7), Some(Edge::Ended));
        assert_eq!(note(None, 8), None);
    }
}
