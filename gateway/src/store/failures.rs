//! Failed calls to the database, counted by what they were for. Start with [`Failures`].

use std::sync::atomic::{AtomicU64, Ordering};

use super::error::StoreError;

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

/// How many calls failed since the start, by operation.
#[derive(Debug, Default)]
pub(super) struct Failures([AtomicU64; Operation::ALL.len()]);

impl Failures {
    /// Takes note of a call's outcome. What the caller did wrong is no failure of the database's.
    pub fn observe<T>(&self, operation: Operation, outcome: &Result<T, StoreError>) {
        if outcome.as_ref().is_err_and(StoreError::is_failure) {
            self.0[operation as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn of(&self, operation: Operation) -> u64 {
        self.0[operation as usize].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
