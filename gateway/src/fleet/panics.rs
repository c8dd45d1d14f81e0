//! Panics on this node. Start with [`Panics`].

use std::{sync::Arc, time::Duration};

use crate::fleet::alarms::Alarms;

/// Alarm after a device's connection or an API call has panicked.
const PANIC_ALARM: &str = "panic";
/// Alarm while a background task fails.
const TASK_ALARM: &str = "task_failed";

/// Panics of connections, API calls and background tasks: counted, with an alarm.
#[derive(Debug)]
pub struct Panics {
    total: metrics::Counter,
    alarms: Arc<Alarms>,
}

impl Panics {
    /// Creates the count. Each panic is also counted in `total`.
    #[must_use]
    pub fn new(total: metrics::Counter, alarms: Arc<Alarms>) -> Self {
        Self { total, alarms }
    }

    /// Whether a connection or a call has panicked since the start.
    #[must_use]
    pub fn has_panicked(&self) -> bool {
        self.alarms.is_active(PANIC_ALARM)
    }

    /// Whether a background task fails.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.alarms.is_active(TASK_ALARM)
    }

    /// Counts a panic that ended only `what`. The first one raises an alarm.
    pub fn count(&self, what: &str) {
        self.total.increment(1);
        if !self.has_panicked() {
            let detail = format!(
                "{what} panicked: this is a bug, please report it with the log. The alarm stays until a restart"
            );
            self.alarms.set(PANIC_ALARM, true, detail);
        }
    }

    /// Counts a panic of a background task, which is restarted after `pause`.
    pub fn count_failed_task(&self, name: &'static str, pause: Duration) {
        self.total.increment(1);
        let detail = format!(
            "the task {name:?} panicked: this is a bug, please report it with the log. It restarts in {} s",
            pause.as_secs()
        );
        self.alarms.set_for(TASK_ALARM, name, true, detail);
    }

    /// Ends the alarm about a background task that runs steadily again.
    pub fn clear_failed_task(&self, name: &'static str) {
        let detail = format!("the task {name:?} runs again");
        self.alarms.set_for(TASK_ALARM, name, false, detail);
    }
}
