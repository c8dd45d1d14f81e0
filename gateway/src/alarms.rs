//! Alarms: conditions with a beginning and an end, which a person should look at. [`State::alarm`](crate::state::State::alarm) raises
//! and ends them.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use seawall_proto::time::WallTime;

/// Subject of an alarm about the whole node.
pub const NODE: &str = "node";

/// Alarms that are active on this node, one for each kind and subject.
#[derive(Debug, Default)]
pub struct Alarms(Mutex<BTreeMap<Key, Active>>);

type Key = (&'static str, String);

/// An active alarm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Active {
    pub since: WallTime,
    /// What is wrong, and what to do.
    pub detail: String,
}

/// How urgent an alarm is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Devices are refused, or data can be lost.
    Critical,
    /// Everything works, and will not for ever.
    Warning,
}

/// Alarms that mean refused devices or lost data.
const CRITICAL: [&str; 10] = [
    "lookups_fail",
    "database_refuses",
    "database_file",
    "registry_unreadable",
    "registry_shrunken",
    "rules_unsupported",
    "rules_lost",
    "disk_full",
    "disk_read_only",
    "memory_short",
];

impl Severity {
    /// Severity of a kind of alarm.
    #[must_use]
    pub fn of(kind: &str) -> Self {
        if CRITICAL.contains(&kind) {
            Self::Critical
        } else {
            Self::Warning
        }
    }

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Critical => "critical",
            Self::Warning => "warning",
        }
    }
}

impl Alarms {
    /// Raises an alarm, or replaces the detail of one that is active since earlier.
    pub fn raise(&self, kind: &'static str, subject: &str, detail: &str, now: WallTime) {
        let mut active = self.lock();
        let alarm = active.entry((kind, subject.to_owned())).or_insert_with(|| Active {
            since: now,
            detail: String::new(),
        });
        detail.clone_into(&mut alarm.detail);
    }

    pub fn end(&self, kind: &'static str, subject: &str) {
        self.lock().remove(&(kind, subject.to_owned()));
    }

    /// Ends the alarms of a kind whose subject is gone.
    pub fn retain(&self, kind: &str, is_there: impl Fn(&str) -> bool) {
        self.lock()
            .retain(|(other, subject), _| *other != kind || is_there(subject));
    }

    /// Every active alarm: kind, subject, alarm; critical ones first.
    #[must_use]
    pub fn active(&self) -> Vec<(&'static str, String, Active)> {
        let mut active: Vec<_> = self
            .lock()
            .iter()
            .map(|((kind, subject), alarm)| (*kind, subject.clone(), alarm.clone()))
            .collect();
        active.sort_by_key(|(kind, ..)| Severity::of(kind));
        active
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Active>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alarm_is_active_from_its_beginning_to_its_end() {
        let alarms = Alarms::default();
        let at = WallTime::from_unix_ms;

        alarms.raise("panic", NODE, "a", at(1));
        alarms.raise("costly_cohort", "box/1", "b", at(2));
        alarms.raise("costly_cohort", "box/2", "c", at(3));
        alarms.raise("disk_full", NODE, "d", at(4));
        alarms.raise("panic", NODE, "e", at(5));
        alarms.end("costly_cohort", "box/1");

        let active = alarms.active();
        let shown: Vec<_> = active
            .iter()
            .map(|(kind, subject, alarm)| (*kind, subject.as_str(), alarm.since, alarm.detail.as_str()))
            .collect();
        assert_eq!(
            shown,
            [
                ("disk_full", NODE, at(4), "d"),
                ("costly_cohort", "box/2", at(3), "c"),
                ("panic", NODE, at(1), "e"),
            ]
        );
        alarms.retain("costly_cohort", |_| false);
        assert_eq!(alarms.active().len(), 2);
    }
}
