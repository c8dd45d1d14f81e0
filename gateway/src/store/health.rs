//! Whether the database answers, since when, and whether it was ever ready.

use std::{
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use seawall_proto::time::WallTime;
use tokio::sync::watch;

use super::error::{StoreError, in_one_line};

/// What is known of the database, from the calls made to it (look-ups aside: those have their breaker).
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
    state: Mutex<DatabaseState>,
}

impl Health {
    pub fn new() -> Self {
        Self {
            ready: watch::Sender::new(false),
            state: Mutex::new(DatabaseState {
                status: DatabaseStatus::Starting,
                since: now(),
                reason: None,
            }),
        }
    }

    pub fn state(&self) -> DatabaseState {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
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

    /// Takes note of a call's outcome. Only an answer that never came counts against the database.
    pub fn observe<T>(&self, outcome: &Result<T, StoreError>) {
        match outcome {
            Ok(_) if self.is_ready() => self.set_available(),
            Err(error) if error.is_away() => self.set_away(error),
            Ok(_) | Err(_) => {}
        }
    }

    fn set_available(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.status != DatabaseStatus::Available {
            tracing::info!(from = state.status.as_str(), "database is available");
            *state = DatabaseState {
                status: DatabaseStatus::Available,
                since: now(),
                reason: None,
            };
        }
    }

    /// Logs each change once, not each failed call.
    pub fn set_away(&self, error: &StoreError) {
        let reason = in_one_line(error);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let status = match state.status {
            DatabaseStatus::Starting => DatabaseStatus::Starting,
            DatabaseStatus::Available | DatabaseStatus::Away => DatabaseStatus::Away,
        };
        if state.status != status {
            state.since = now();
        }
        // At start it matters what it is that is still missing; later, only that the database went away.
        let is_news =
            state.status != status || (status == DatabaseStatus::Starting && state.reason.as_ref() != Some(&reason));
        if is_news {
            tracing::warn!(reason, "database is away");
        }
        state.status = status;
        state.reason = Some(reason);
    }
}

fn now() -> WallTime {
    let since_epoch = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    WallTime::from_unix_ms(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
}
