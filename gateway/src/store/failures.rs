//! Failed calls to the database, counted by operation. Start with [`Failures`].

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use seawall_proto::slots::HINT_MAX;

use super::{
    connection::Row,
    error::{StoreError, in_one_line},
};

/// Time for which a problem is reported after it was last met: few calls may meet it.
const TROUBLE_TOLD_FOR: Duration = Duration::from_secs(60);
/// The same for problems that only certain devices meet: longer than any retry hint.
const RARE_TROUBLE_TOLD_FOR: Duration = Duration::from_mins(15);
const _: () = assert!(RARE_TROUBLE_TOLD_FOR.as_secs() > HINT_MAX.as_secs());

/// The purpose of a call to the database. Label `operation` of `seawall_database_errors_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Connecting devices, one statement for many of them.
    Lookup,
    /// Rules, written by operators and polled by every node.
    Rules,
    /// Revocations of resume tokens, polled by every node.
    Revocations,
    /// Reads of the API, of the tokens' poll and of the registry index.
    Read,
    /// Changes by the API, except rules and imports.
    Write,
    Import,
    /// Presence of devices, written behind.
    Presence,
    /// The plan guard's check of the statements of the connect path.
    Plan,
}

impl Operation {
    pub const ALL: [Self; 8] = [
        Self::Lookup,
        Self::Rules,
        Self::Revocations,
        Self::Read,
        Self::Write,
        Self::Import,
        Self::Presence,
        Self::Plan,
    ];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::Rules => "rules",
            Self::Revocations => "revocations",
            Self::Read => "read",
            Self::Write => "write",
            Self::Import => "import",
            Self::Presence => "presence",
            Self::Plan => "plan",
        }
    }
}

/// A lasting problem behind failed calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// A lookup failed, for any reason.
    Lookups,
    /// The database answers, and can't run statements of the gateway: rights, schema, damage.
    Refuses,
    /// Rows hold values that can't be read.
    Unreadable,
    /// SQLite's file was deleted, emptied or replaced.
    FileChanged,
    /// The database's disk is full.
    DiskFull,
}

const TROUBLES: usize = 5;

impl Trouble {
    const fn told_for(self) -> Duration {
        match self {
            Self::Refuses | Self::Unreadable => RARE_TROUBLE_TOLD_FOR,
            Self::Lookups | Self::FileChanged | Self::DiskFull => TROUBLE_TOLD_FOR,
        }
    }
}

/// Number of failed calls since the start, by operation, and the problems behind them.
#[derive(Debug, Default)]
pub(super) struct Failures {
    counts: [AtomicU64; Operation::ALL.len()],
    troubles: Mutex<[Option<(Instant, String)>; TROUBLES]>,
}

impl Failures {
    /// Records a call's outcome. An error of the caller is not a failure of the database.
    pub fn observe<T>(&self, operation: Operation, outcome: &Result<T, StoreError>) {
        let Some(error) = self.count(operation, outcome) else {
            return;
        };
        if operation == Operation::Lookup {
            self.note(Trouble::Lookups, in_one_line(error));
        }
        self.note_error(error);
    }

    /// Counts a call's outcome without drawing conclusions about the database. Returns the failure.
    pub fn count<'a, T>(&self, operation: Operation, outcome: &'a Result<T, StoreError>) -> Option<&'a StoreError> {
        let error = outcome.as_ref().err().filter(|error| error.is_failure())?;
        self.counts[operation as usize].fetch_add(1, Ordering::Relaxed);
        Some(error)
    }

    /// Records the problem behind an error that does not fail the whole call.
    pub fn note_error(&self, error: &StoreError) {
        if let Some(trouble) = error.trouble() {
            self.note(trouble, in_one_line(error));
        }
    }

    /// Notes a row that can't be read, with its device if it has one.
    pub fn note_unreadable(&self, row: &Row, error: &StoreError) {
        let detail = match row.uuid("id").or_else(|_| row.uuid("device")) {
            Ok(device) => format!("the row of device {device}: {}", in_one_line(error)),
            Err(_) => in_one_line(error),
        };
        self.note(Trouble::Unreadable, detail);
    }

    pub fn note(&self, trouble: Trouble, detail: String) {
        self.note_at(trouble, detail, Instant::now());
    }

    fn note_at(&self, trouble: Trouble, detail: String, at: Instant) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        troubles[trouble as usize] = Some((at, detail));
    }

    /// Returns the problem as it was last met; `None` if that is long ago.
    pub fn trouble(&self, trouble: Trouble) -> Option<String> {
        self.trouble_at(trouble, Instant::now())
    }

    fn trouble_at(&self, trouble: Trouble, now: Instant) -> Option<String> {
        let troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, detail) = troubles[trouble as usize].as_ref()?;
        (now.saturating_duration_since(*at) < trouble.told_for()).then(|| detail.clone())
    }

    pub fn of(&self, operation: Operation) -> u64 {
        self.counts[operation as usize].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_that_lasts_is_told_with_its_cause_and_one_that_ends_by_itself_is_not() {
        let failures = Failures::default();
        let unusable = StoreError::Unusable("permission denied for table devices".into());

        failures.observe(Operation::Lookup, &Err::<(), _>(unusable));
        failures.observe(Operation::Read, &Err::<(), _>(StoreError::TimedOut));

        let told = failures.trouble(Trouble::Refuses).unwrap();
        assert!(told.contains("permission denied for table devices"), "{told}");
        assert_eq!(failures.trouble(Trouble::Lookups), Some(told));
        assert_eq!(failures.trouble(Trouble::Unreadable), None);
    }

    #[test]
    fn trouble_of_a_device_is_told_until_the_device_has_come_back() {
        let (failures, met) = (Failures::default(), Instant::now());
        for trouble in [Trouble::Refuses, Trouble::Unreadable, Trouble::Lookups] {
            failures.note_at(trouble, "bad".into(), met);
        }
        let is_told = |trouble, seconds| {
            failures
                .trouble_at(trouble, met + Duration::from_secs(seconds))
                .is_some()
        };

        assert!(is_told(Trouble::Refuses, 600) && is_told(Trouble::Unreadable, 600));
        assert!(!is_told(Trouble::Refuses, 900) && !is_told(Trouble::Unreadable, 900));
        assert!(is_told(Trouble::Lookups, 59) && !is_told(Trouble::Lookups, 60));
    }

    #[test]
    fn failures_count_for_their_operation_and_refusals_for_none() {
        let failures = Failures::default();

        failures.observe(Operation::Rules, &Ok(()));
        failures.observe(Operation::Rules, &Err::<(), _>(StoreError::Conflict("there".into())));
        failures.observe(Operation::Write, &Err::<(), _>(StoreError::Invalid("bad".into())));
        failures.observe(Operation::Write, &Err::<(), _>(StoreError::TimedOut));

        let counted = Operation::ALL.map(|operation| failures.of(operation));
        assert_eq!(counted, [0, 0, 0, 0, 1, 0, 0, 0]);
    }
}
