//! Alarms: conditions with a beginning and an end that an operator should look at. Start with [`Alarms::set`].

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use seawall_proto::time::WallTime;
use serde_json::json;

use crate::{
    fleet::{
        events::{AlarmNotice, Body, Events},
        webhook::Webhook,
    },
    runtime::clock::Clock,
};

/// Subject of an alarm about the whole node.
pub const NODE: &str = "node";

/// Active alarms of this node, one per kind and subject.
#[derive(Debug)]
pub struct Alarms {
    active: Mutex<BTreeMap<Key, Active>>,
    events: Arc<Events>,
    webhook: Arc<Webhook>,
    clock: Clock,
}

type Key = (&'static str, String);

/// An active alarm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Active {
    pub since: WallTime,
    /// Cause, and what to do.
    pub detail: String,
    /// A command that repairs the cause or shows more about it, ready to paste.
    pub action: Option<Cow<'static, str>>,
}

/// How urgent an alarm is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Devices are refused, or data can be lost.
    Critical,
    /// Everything works, but not for ever.
    Warning,
}

use Severity::{Critical, Warning};

/// Every kind of alarm, with its usual action. docs/OPERATIONS.md has a runbook for each.
const KINDS: [(&str, Severity, Option<&str>); 27] = [
    ("lookups_fail", Critical, Some("seawall doctor")),
    ("database_refuses", Critical, Some("seawall doctor")),
    ("database_file", Critical, Some("seawall doctor")),
    ("registry_unreadable", Critical, Some("seawall doctor")),
    ("registry_older", Critical, Some("seawall audit")),
    ("registry_shrunken", Critical, Some("seawall devices list")),
    ("rules_unsupported", Critical, Some("seawall rules list")),
    ("rules_lost", Critical, Some("seawall rules list")),
    ("disk_full", Critical, Some("df -h -i")),
    ("disk_read_only", Critical, Some("seawall doctor")),
    ("memory_short", Critical, Some("seawall nodes")),
    ("bad_cohort", Critical, Some("seawall proposals list")),
    ("admission_ceiling", Warning, Some("seawall config show")),
    ("certificate_expires", Warning, Some("seawall config show")),
    ("costly_cohort", Warning, Some("seawall firmware")),
    ("duplicate_id", Warning, None),
    ("node_lagging", Warning, Some("seawall nodes")),
    ("panic", Warning, None),
    ("plan", Warning, Some("seawall doctor")),
    ("presence_group", Warning, Some("seawall nodes")),
    ("presence_queue", Warning, Some("seawall doctor")),
    ("rollout_halted", Warning, None),
    ("rules_conflict", Warning, Some("seawall rules list")),
    ("rules_local", Warning, Some("seawall doctor")),
    ("revocation_list_out_of_date", Warning, Some("seawall config show")),
    ("task_failed", Warning, None),
    ("tls_files", Warning, Some("seawall config show")),
];

/// Names of all kinds.
#[must_use]
pub fn kinds() -> [&'static str; KINDS.len()] {
    KINDS.map(|(kind, ..)| kind)
}

impl Severity {
    /// Severity of a kind of alarm.
    #[must_use]
    pub fn of(kind: &str) -> Self {
        known(kind).map_or(Warning, |(_, severity, _)| *severity)
    }

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Critical => "critical",
            Warning => "warning",
        }
    }
}

fn known(kind: &str) -> Option<&'static (&'static str, Severity, Option<&'static str>)> {
    KINDS.iter().find(|(name, ..)| *name == kind)
}

impl Alarms {
    /// Creates an empty set of alarms.
    #[must_use]
    pub fn new(events: Arc<Events>, webhook: Arc<Webhook>, clock: Clock) -> Self {
        Self {
            active: Mutex::default(),
            events,
            webhook,
            clock,
        }
    }

    /// Raises or ends an alarm about the whole node. See [`set_for`](Self::set_for).
    pub fn set(&self, kind: &'static str, is_raised: bool, detail: impl Into<String>) {
        self.set_for(kind, NODE, is_raised, detail);
    }

    /// Raises or ends an alarm about a part of the node: in the list, in the log and as an event. If it is already
    /// active, only its detail is replaced. If it is not active, it is not ended.
    pub fn set_for(&self, kind: &'static str, subject: &str, is_raised: bool, detail: impl Into<String>) {
        if is_raised {
            let action = known(kind).and_then(|(.., action)| *action).map(Cow::Borrowed);
            self.raise(kind, subject, detail.into(), action);
        } else {
            self.end(kind, subject, detail.into());
        }
    }

    /// Raises an alarm with its own action. See [`set_for`](Self::set_for).
    pub fn raise(&self, kind: &'static str, subject: &str, detail: String, action: Option<Cow<'static, str>>) {
        debug_assert!(known(kind).is_some(), "{kind} is not one of the kinds");
        let now = self.clock.wall();
        let mut active = self.lock();
        if let Some(alarm) = active.get_mut(&(kind, subject.to_owned())) {
            (alarm.detail, alarm.action) = (detail, action);
            return;
        }
        let alarm = Active {
            since: now,
            detail,
            action,
        };
        active.insert((kind, subject.to_owned()), alarm.clone());
        tracing::error!(
            alarm = kind,
            subject,
            detail = alarm.detail,
            action = alarm.action.as_deref(),
            "alarm raised"
        );
        // Before the lock is released: otherwise a reader could see the end of the alarm first.
        self.notice(kind, subject, "raised", alarm, now);
        drop(active);
    }

    fn end(&self, kind: &'static str, subject: &str, detail: String) {
        let mut active = self.lock();
        if let Some(ended) = active.remove(&(kind, subject.to_owned())) {
            tracing::info!(alarm = kind, subject, detail, "alarm ended");
            let alarm = Active {
                detail,
                action: None,
                ..ended
            };
            self.notice(kind, subject, "cleared", alarm, self.clock.wall());
        }
    }

    fn notice(&self, kind: &'static str, subject: &str, state: &'static str, alarm: Active, now: WallTime) {
        let (severity, since) = (Severity::of(kind).as_str(), alarm.since.to_rfc3339());
        let mut data = json!({
            "kind": kind,
            "subject": subject,
            "severity": severity,
            "state": state,
            "since": since,
            "detail": alarm.detail,
        });
        if let Some(action) = &alarm.action {
            data["action"] = action.as_ref().into();
        }
        self.webhook
            .notify(&format!("alarm.{state}"), now, self.clock.now(), data);
        let body = Body::Alarm(Box::new(AlarmNotice {
            kind,
            subject: subject.to_owned(),
            severity,
            state,
            since,
            detail: alarm.detail,
            action: alarm.action,
        }));
        self.events.notice(now, body);
    }

    /// Ends the alarms of a kind whose subject no longer exists.
    pub fn retain(&self, kind: &str, is_there: impl Fn(&str) -> bool) {
        let gone: Vec<Key> = self
            .lock()
            .keys()
            .filter(|(other, subject)| *other == kind && !is_there(subject))
            .cloned()
            .collect();
        for (kind, subject) in gone {
            self.end(kind, &subject, "it is no longer watched".to_owned());
        }
    }

    /// Whether an alarm of this kind is active, for any subject.
    #[must_use]
    pub fn is_active(&self, kind: &str) -> bool {
        self.lock().keys().any(|(other, _)| *other == kind)
    }

    /// All active alarms with kind and subject, critical ones first.
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
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn alarm_is_active_and_told_from_its_beginning_to_its_end() {
        let events = Arc::new(Events::default());
        let alarms = Alarms::new(Arc::clone(&events), Arc::default(), Clock::start());

        alarms.set("panic", true, "a");
        alarms.set_for("costly_cohort", "box/1", true, "b");
        alarms.raise("costly_cohort", "box/2", "c".to_owned(), Some("act".into()));
        alarms.set("disk_full", true, "d");
        alarms.set("panic", true, "e");
        alarms.set_for("costly_cohort", "box/1", false, "f");
        alarms.set_for("costly_cohort", "box/1", false, "f");

        let active = alarms.active();
        let shown: Vec<_> = active
            .iter()
            .map(|(kind, subject, alarm)| (*kind, subject.as_str(), alarm.detail.as_str(), alarm.action.as_deref()))
            .collect();
        assert_eq!(
            shown,
            [
                ("disk_full", NODE, "d", Some("df -h -i")),
                ("costly_cohort", "box/2", "c", Some("act")),
                ("panic", NODE, "e", None),
            ]
        );
        let told = events.after(0, 10, usize::MAX).events;
        let told: Vec<_> = told
            .iter()
            .map(|event| serde_json::to_value(&event.body).unwrap())
            .collect();
        let states: Vec<_> = told.iter().map(|body| (&body["kind"], &body["state"])).collect();
        assert_eq!(
            states,
            [
                (&json!("panic"), &json!("raised")),
                (&json!("costly_cohort"), &json!("raised")),
                (&json!("costly_cohort"), &json!("raised")),
                (&json!("disk_full"), &json!("raised")),
                (&json!("costly_cohort"), &json!("cleared")),
            ]
        );
        assert_eq!(
            (&told[4]["subject"], &told[4]["since"]),
            (&json!("box/1"), &told[1]["since"])
        );
        alarms.retain("costly_cohort", |_| false);
        let ended = events.after(0, 10, usize::MAX).events;
        let ended = serde_json::to_value(&ended.last().unwrap().body).unwrap();
        assert_eq!(
            (&ended["subject"], &ended["state"]),
            (&json!("box/2"), &json!("cleared"))
        );
        assert!(alarms.is_active("panic") && !alarms.is_active("costly_cohort"));
    }

    #[test]
    fn raised_and_cleared_are_told_in_the_order_in_which_they_happen() {
        let events = Arc::new(Events::default());
        let alarms = Alarms::new(Arc::clone(&events), Arc::default(), Clock::start());

        std::thread::scope(|scope| {
            for is_raised in [true, false, true, false] {
                let alarms = &alarms;
                scope.spawn(move || (0..100).for_each(|_| alarms.set("panic", is_raised, "")));
            }
        });

        let told = events.after(0, 1_000, usize::MAX).events;
        let states: Vec<_> = told
            .iter()
            .map(|event| serde_json::to_value(&event.body).unwrap()["state"].clone())
            .collect();
        assert_eq!(states.first(), Some(&json!("raised")));
        assert!(states.windows(2).all(|pair| pair[0] != pair[1]), "{states:?}");
        assert_eq!(states.last() == Some(&json!("raised")), alarms.is_active("panic"));
    }

    #[test]
    fn every_kind_has_a_runbook() {
        let runbooks = include_str!("../../../docs/OPERATIONS.md");
        for kind in kinds() {
            assert!(runbooks.contains(&format!("`{kind}`")), "{kind}");
        }
    }
}
