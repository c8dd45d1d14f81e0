//! Failed calls to the database, counted by what they were for. Start with [`Failures`].

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use seawall_proto::slots::HINT_MAX;

use super::error::{StoreError, in_one_line};

/// Time for which a trouble is told after it was last met: calls that would meet it may be few.
const TROUBLE_TOLD_FOR: Duration = Duration::from_secs(60);
/// The same for troubles that only certain devices meet: longer than any of them is told to stay away.
const RARE_TROUBLE_TOLD_FOR: Duration = Duration::from_mins(15);
const _: () = assert!(RARE_TROUBLE_TOLD_FOR.as_secs() > HINT_MAX.as_secs());

/// What a call to the database was for. Label `operation` of `seawall_database_errors_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Connecting devices, one statement for many of them.
    Lookup,
    /// Rules, written by operators and polled by every node.
    Rules,
    /// Revocations of resume tokens, polled by every node.
    Revocations,
    /// What the API, the tokens' poll and the roster read.
    Read,
    /// What the API changes, rules and imports apart.
    Write,
    Import,
    /// The plan guard's look at the statements of the connect path.
    Plan,
}

impl Operation {
    pub const ALL: [Self; 7] = [
        Self::Lookup,
        Self::Rules,
        Self::Revocations,
        Self::Read,
        Self::Write,
        Self::Import,
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
            Self::Plan => "plan",
        }
    }
}

/// What failed calls are a sign of, as far as it does not end by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// A look-up failed, for whatever reason.
    Lookups,
    /// The database answers, and refuses statements of ours: rights, schema, damage.
    Refuses,
    /// Rows hold what can't be read.
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

/// How many calls failed since the start, by operation, and what they were a sign of.
#[derive(Debug, Default)]
pub(super) struct Failures {
    counts: [AtomicU64; Operation::ALL.len()],
    troubles: Mutex<[Option<(Instant, String)>; TROUBLES]>,
}

impl Failures {
    /// Takes note of a call's outcome. What the caller did wrong is no failure of the database's.
    pub fn observe<T>(&self, operation: Operation, outcome: &Result<T, StoreError>) {
        let Some(error) = self.count(operation, outcome) else {
            return;
        };
        if operation == Operation::Lookup {
            self.note(Trouble::Lookups, in_one_line(error));
        }
        self.note_error(error);
    }

    /// Counts a call's outcome, and says nothing about the database. Returns what failed.
    pub fn count<'a, T>(&self, operation: Operation, outcome: &'a Result<T, StoreError>) -> Option<&'a StoreError> {
        let error = outcome.as_ref().err().filter(|error| error.is_failure())?;
        self.counts[operation as usize].fetch_add(1, Ordering::Relaxed);
        Some(error)
    }

    /// What an error is a sign of that does not fail the whole call.
    pub fn note_error(&self, error: &StoreError) {
        if let Some(trouble) = error.trouble() {
            self.note(trouble, in_one_line(error));
        }
    }

    pub fn note(&self, trouble: Trouble, detail: String) {
        self.note_at(trouble, detail, Instant::now());
    }

    fn note_at(&self, trouble: Trouble, detail: String, at: Instant) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        troubles[trouble as usize] = Some((at, detail));
    }

    /// The trouble as last met; `None` where that is long ago.
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
        assert_eq!(counted, [0, 0, 0, 0, 1, 0, 0]);
    }
}
