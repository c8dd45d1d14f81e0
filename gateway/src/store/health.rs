//! Whether the database answers, since when, and whether it was ever ready.

use std::time::SystemTime;

use seawall_proto::time::WallTime;
use tokio::sync::watch;

use super::{
    error::{StoreError, in_one_line},
    failures::Operation,
};

/// What is known of the database, from the calls made to it (look-ups aside: those have their breaker, which heeds this).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseState {
    pub status: DatabaseStatus,
    /// When `status` was reached.
    pub since: WallTime,
    /// Why it is away: for operators, without a password.
    pub reason: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatabaseStatus {
    /// Not reached yet since the start.
    Starting,
    Available,
    Away,
}

impl DatabaseStatus {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Available => "available",
            Self::Away => "away",
        }
    }
}

#[derive(Debug)]
pub(super) struct Health {
    ready: watch::Sender<bool>,
    state: watch::Sender<DatabaseState>,
}

impl Health {
    pub fn new() -> Self {
        Self {
            ready: watch::Sender::new(false),
            state: watch::Sender::new(DatabaseState {
                status: DatabaseStatus::Starting,
                since: now(),
                reason: None,
            }),
        }
    }

    pub fn state(&self) -> DatabaseState {
        self.state.borrow().clone()
    }

    /// Tells of each change, and of each call that finds the database away.
    pub fn subscribe(&self) -> watch::Receiver<DatabaseState> {
        self.state.subscribe()
    }

    pub fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    pub async fn ready(&self) {
        // The sender lives as long as `self`, so that waiting can't fail.
        let _ = self.ready.subscribe().wait_for(|ready| *ready).await;
    }

    /// The schema is there. Stays so until the process ends.
    pub fn set_ready(&self) {
        self.set_available();
        self.ready.send_replace(true);
    }

    /// Takes note of a call's outcome. Only an answer that never came counts against the database, and one that took too long only
    /// where it never does while all is well: devices are refused by this.
    pub fn observe<T>(&self, operation: Operation, outcome: &Result<T, StoreError>) {
        match outcome {
            Ok(_) if self.is_ready() => self.set_available(),
            Err(StoreError::TimedOut) if !operation.is_quick() => {}
            Err(error) if error.is_away() => self.set_away(error),
            Ok(_) | Err(_) => {}
        }
    }

    fn set_available(&self) {
        self.state.send_if_modified(|state| {
            if state.status == DatabaseStatus::Available {
                return false;
            }
            tracing::info!(from = state.status.as_str(), "database is available");
            *state = DatabaseState {
                status: DatabaseStatus::Available,
                since: now(),
                reason: None,
            };
            true
        });
    }

    /// Logs each change once, not each failed call.
    pub fn set_away(&self, error: &StoreError) {
        let reason = in_one_line(error);
        self.state.send_modify(|state| {
            let status = match state.status {
                DatabaseStatus::Starting => DatabaseStatus::Starting,
                DatabaseStatus::Available | DatabaseStatus::Away => DatabaseStatus::Away,
            };
            if state.status != status {
                state.since = now();
            }
            // At start it matters what it is that is still missing; later, only that the database went away.
            let is_news = state.status != status
                || (status == DatabaseStatus::Starting && state.reason.as_ref() != Some(&reason));
            if is_news {
                tracing::warn!(reason, "database is away");
            }
            state.status = status;
            state.reason = Some(reason);
        });
    }
}

fn now() -> WallTime {
    let since_epoch = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    WallTime::from_unix_ms(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMED_OUT: Result<(), StoreError> = Err(StoreError::TimedOut);

    fn available() -> Health {
        let health = Health::new();
        health.set_ready();
        health
    }

    #[test]
    fn calls_that_may_take_long_do_not_call_a_slow_database_away() {
        let health = available();

        for operation in Operation::ALL {
            health.observe(operation, &TIMED_OUT);
            let is_away = health.state().status == DatabaseStatus::Away;
            assert_eq!(is_away, operation.is_quick(), "{operation:?}");
            health.observe(operation, &Ok(()));
        }

        health.observe(
            Operation::Read,
            &Err::<(), _>(StoreError::Unavailable("refused".into())),
        );
        assert_eq!(health.state().status, DatabaseStatus::Away);
    }

    #[test]
    fn each_call_that_finds_it_away_is_told_and_an_answer_once() {
        let health = available();
        let mut told = health.subscribe();
        told.mark_unchanged();

        for _ in 0..2 {
            health.observe(Operation::Rules, &TIMED_OUT);
            assert!(told.has_changed().unwrap());
            told.mark_unchanged();
        }
        health.observe(Operation::Rules, &Ok(()));
        assert!(told.has_changed().unwrap());
        told.mark_unchanged();
        health.observe(Operation::Rules, &Ok(()));

        assert!(!told.has_changed().unwrap());
    }
}
