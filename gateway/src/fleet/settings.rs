//! Settings of a running node: those of its start, and those that were read again since. Start with [`Settings`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use seawall_proto::time::Instant;

use crate::runtime::config::Config;

/// The configuration as it was last read and found valid.
///
/// Only settings of [`Config::is_reloaded`] are used from here. All others are those of the start.
#[derive(Debug)]
pub struct Settings {
    current: ArcSwap<Config>,
    status: Mutex<Status>,
}

/// How current the configuration is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Number of configurations so far that were used, that of the start included.
    pub revision: u64,
    /// When a URL last answered as it should. `None`: not since the start.
    pub confirmed: Option<Instant>,
    /// Whether it is confirmed by a URL, which may be away. A file is always there.
    pub is_shared: bool,
    /// Why the configuration that was last offered is not used.
    pub refused: Option<String>,
    /// Settings that were changed since the start, and need a restart.
    pub restart_needed: Vec<String>,
}

impl Settings {
    /// The configuration of the start, which nothing has confirmed yet.
    #[must_use]
    pub fn new(config: Arc<Config>) -> Self {
        let status = Status {
            revision: 1,
            confirmed: None,
            is_shared: !config.source.urls.is_empty(),
            refused: None,
            restart_needed: Vec::new(),
        };
        Self {
            current: ArcSwap::new(config),
            status: Mutex::new(status),
        }
    }

    #[must_use]
    pub fn current(&self) -> Arc<Config> {
        self.current.load_full()
    }

    #[must_use]
    pub fn status(&self) -> Status {
        self.lock().clone()
    }

    /// Uses a valid configuration. Returns the settings that it changes, by their paths.
    pub fn set(&self, config: Config, of_start: &Config) -> Vec<String> {
        let mut status = self.lock();
        let changed: Vec<String> = self.current.load().changes(&config).into_iter().collect();
        if !changed.is_empty() {
            status.revision += 1;
            let waits = |path: &String| !Config::is_reloaded(path);
            status.restart_needed = of_start.changes(&config).into_iter().filter(waits).collect();
            self.current.store(Arc::new(config));
        }
        changed
    }

    /// The configuration in use was read; and at this time a URL confirmed it, if one did.
    pub fn handle_confirmed(&self, at: Option<Instant>) {
        let mut status = self.lock();
        status.confirmed = at.or(status.confirmed);
        status.refused = None;
    }

    /// The configuration that was read last cannot be used.
    pub fn handle_refused(&self, reason: String) {
        self.lock().refused = Some(reason);
    }

    fn lock(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_that_wait_for_a_restart_are_named_until_they_are_taken_back() {
        let start = Config::default();
        let settings = Settings::new(Arc::new(start.clone()));
        let mut other = start.clone();
        other.drain.rate_per_second = 7;
        other.limits.head_bytes_max = 9_000;

        assert_eq!(
            settings.set(other.clone(), &start),
            ["drain.rate_per_second", "limits.head_bytes_max"]
        );
        assert_eq!(settings.status().restart_needed, ["limits.head_bytes_max"]);
        assert_eq!(settings.current().drain.rate_per_second, 7);
        assert!(settings.set(other, &start).is_empty());
        assert_eq!(settings.status().revision, 2);

        assert_eq!(settings.set(start.clone(), &start).len(), 2);
        assert!(settings.status().restart_needed.is_empty());
        assert_eq!(settings.status().revision, 3);
    }
}
