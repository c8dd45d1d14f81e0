//! Whether the database answers, since when, and whether it was ever ready.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::SystemTime,
};

use seawall_proto::time::WallTime;
use tokio::sync::watch;

use super::error::{StoreError, in_one_line};

/// The state of the database, as the polls see it. Lookups have their own breaker, which follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseState {
    pub status: DatabaseStatus,
    /// When `status` began.
    pub since: WallTime,
    /// Why it is not available, for operators. It holds no password.
    pub reason: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatabaseStatus {
    /// Not reached since the start.
    Starting,
    Available,
    /// It answers, and accepts no writes: most likely a standby.
    ReadOnly,
    Away,
}

impl DatabaseStatus {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Available => "available",
            Self::ReadOnly => "read_only",
            Self::Away => "unavailable",
        }
    }

    /// Whether reads are answered.
    #[must_use]
    pub const fn is_answering(self) -> bool {
        match self {
            Self::Available | Self::ReadOnly => true,
            Self::Starting | Self::Away => false,
        }
    }
}

#[derive(Debug)]
pub(super) struct Health {
    /// Address of the database, without its password.
    database: String,
    ready: watch::Sender<bool>,
    state: watch::Sender<DatabaseState>,
    /// Result of the last answered poll.
    is_read_only: AtomicBool,
}

impl Health {
    pub fn new(database: String) -> Self {
        Self {
            database,
            ready: watch::Sender::new(false),
            state: watch::Sender::new(DatabaseState {
                status: DatabaseStatus::Starting,
                since: now(),
                reason: None,
            }),
            is_read_only: AtomicBool::new(false),
        }
    }

    pub fn state(&self) -> DatabaseState {
        self.state.borrow().clone()
    }

    /// Returns a receiver that is notified of each change, and of each call that finds the database unavailable.
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

    /// Records that the schema exists, for the life of the process.
    pub fn set_ready(&self) {
        self.set_available();
        self.ready.send_replace(true);
    }

    /// Records a poll's outcome. Only a missing answer makes the database unavailable, since devices are refused then.
    /// Before it is ready, the start's own error says more.
    pub fn observe<T>(&self, outcome: &Result<T, StoreError>) {
        match outcome {
            _ if !self.is_ready() => {}
            Ok(_) => self.set_available(),
            Err(error) if error.is_away() => self.set_away(error),
            Err(_) => {}
        }
    }

    /// Records whether the server accepts writes.
    pub fn set_read_only(&self, is_read_only: bool) {
        let was = self.is_read_only.swap(is_read_only, Ordering::Relaxed);
        if was != is_read_only && self.is_ready() {
            self.set_available();
        }
    }

    fn set_available(&self) {
        let is_read_only = self.is_read_only.load(Ordering::Relaxed);
        let status = if is_read_only {
            DatabaseStatus::ReadOnly
        } else {
            DatabaseStatus::Available
        };
        let reason = is_read_only.then(|| StoreError::ReadOnlyServer.to_string());
        self.state.send_if_modified(|state| {
            if state.status == status {
                return false;
            }
            let from = state.status.as_str();
            match &reason {
                Some(reason) => tracing::warn!(from, reason, "database is read-only"),
                None => tracing::info!(from, "database is available"),
            }
            *state = DatabaseState {
                status,
                since: now(),
                reason: reason.clone(),
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
                DatabaseStatus::Available | DatabaseStatus::ReadOnly | DatabaseStatus::Away => DatabaseStatus::Away,
            };
            if state.status != status {
                state.since = now();
            }
            // At the start the reason matters as well; later, only the change.
            let is_news = state.status != status
                || (status == DatabaseStatus::Starting && state.reason.as_ref() != Some(&reason));
            if is_news {
                tracing::warn!(database = self.database, reason, "database is unavailable");
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
        let health = Health::new(String::new());
        health.set_ready();
        health
    }

    #[test]
    fn read_only_server_answers_and_its_state_outlasts_an_outage() {
        let health = available();

        health.set_read_only(true);
        health.observe(&Ok(()));
        assert_eq!(health.state().status, DatabaseStatus::ReadOnly);
        assert!(health.state().reason.is_some_and(|reason| reason.contains("read-only")));
        health.observe(&TIMED_OUT);
        assert_eq!(health.state().status, DatabaseStatus::Away);
        health.observe(&Ok(()));
        assert_eq!(health.state().status, DatabaseStatus::ReadOnly);
        health.set_read_only(false);

        assert_eq!(health.state().status, DatabaseStatus::Available);
    }

    #[test]
    fn shortage_of_connections_and_a_refused_write_do_not_call_the_database_away() {
        let health = available();

        for error in [
            StoreError::NoConnectionFree("too many".into()),
            StoreError::ReadOnlyServer,
            StoreError::Unusable("no".into()),
        ] {
            health.observe(&Err::<(), _>(error));
        }

        assert_eq!(health.state().status, DatabaseStatus::Available);
    }

    #[test]
    fn polls_before_the_schema_is_there_do_not_hide_what_is_missing() {
        let health = Health::new(String::new());
        health.set_away(&StoreError::Unusable("permission denied for schema public".into()));

        health.observe(&Err::<(), _>(StoreError::Unavailable(
            "the migrations have not run yet".into(),
        )));

        assert!(
            health
                .state()
                .reason
                .is_some_and(|reason| reason.contains("schema public"))
        );
    }

    #[test]
    fn each_call_that_finds_it_away_is_told_and_an_answer_once() {
        let health = available();
        let mut told = health.subscribe();
        told.mark_unchanged();

        for _ in 0..2 {
            health.observe(&TIMED_OUT);
            assert!(told.has_changed().unwrap());
            told.mark_unchanged();
        }
        health.observe(&Ok(()));
        assert!(told.has_changed().unwrap());
        told.mark_unchanged();
        health.observe(&Ok(()));

        assert!(!told.has_changed().unwrap());
    }
}
