//! Alarms: conditions with a beginning and an end that an operator should look at. Start with [`Alarms::set`].

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use seawall_proto::time::{Instant, WallTime};
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
    conditions: Mutex<Conditions>,
    events: Arc<Events>,
    webhook: Arc<Webhook>,
    clock: Clock,
}

#[derive(Debug, Default)]
struct Conditions {
    active: BTreeMap<Key, Active>,
    /// Since when a condition is other than its alarm says, where that has to last: see [`Hold`].
    changing: BTreeMap<Key, Instant>,
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

/// How long a condition lasts before its alarm is raised, and how long it is over before the alarm ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hold {
    raise_after: Duration,
    end_after: Duration,
}

/// For conditions that decide themselves when they begin and end.
const AT_ONCE: Hold = Hold {
    raise_after: Duration::ZERO,
    end_after: Duration::ZERO,
};
/// For conditions that come and go: one alarm and not many.
const END_LATER: Hold = Hold {
    end_after: Duration::from_secs(60),
    ..AT_ONCE
};
/// For a node that was late once: that is over before an operator could look.
const LATE_NODE: Hold = Hold {
    raise_after: Duration::from_secs(10),
    ..END_LATER
};

/// Every kind of alarm, with its usual action. docs/OPERATIONS.md has a runbook for each.
const KINDS: [(&str, Severity, Option<&str>, Hold); 33] = [
    ("lookups_fail", Critical, Some("seawall doctor"), AT_ONCE),
    ("database_refuses", Critical, Some("seawall doctor"), AT_ONCE),
    ("database_file", Critical, Some("seawall doctor"), AT_ONCE),
    ("registry_unreadable", Critical, Some("seawall doctor"), AT_ONCE),
    ("registry_older", Critical, Some("seawall audit"), AT_ONCE),
    ("registry_shrunken", Critical, Some("seawall devices list"), AT_ONCE),
    ("rules_unsupported", Critical, Some("seawall rules list"), AT_ONCE),
    ("rules_lost", Critical, Some("seawall rules list"), AT_ONCE),
    ("disk_full", Critical, Some("df -h -i"), AT_ONCE),
    ("disk_read_only", Critical, Some("seawall doctor"), AT_ONCE),
    ("memory_short", Critical, Some("seawall nodes"), AT_ONCE),
    ("bad_cohort", Critical, Some("seawall proposals list"), AT_ONCE),
    ("config_stale", Critical, Some("seawall nodes"), AT_ONCE),
    ("version_worse", Critical, Some("seawall firmware"), AT_ONCE),
    ("admission_ceiling", Warning, Some("seawall config show"), END_LATER),
    ("certificate_expires", Warning, Some("seawall config show"), AT_ONCE),
    ("config_refused", Warning, Some("seawall nodes"), AT_ONCE),
    ("costly_cohort", Warning, Some("seawall firmware"), AT_ONCE),
    ("duplicate_id", Warning, None, AT_ONCE),
    ("node_lagging", Warning, Some("seawall nodes"), LATE_NODE),
    ("panic", Warning, None, AT_ONCE),
    ("plan", Warning, Some("seawall doctor"), AT_ONCE),
    ("presence_changes", Warning, Some("seawall nodes"), END_LATER),
    ("presence_group", Warning, Some("seawall nodes"), AT_ONCE),
    ("presence_queue", Warning, Some("seawall doctor"), AT_ONCE),
    ("presence_unknown", Warning, Some("seawall nodes"), END_LATER),
    ("rollout_halted", Warning, None, AT_ONCE),
    ("rules_conflict", Warning, Some("seawall rules list"), AT_ONCE),
    ("rules_local", Warning, Some("seawall doctor"), AT_ONCE),
    (
        "revocation_list_out_of_date",
        Warning,
        Some("seawall config show"),
        AT_ONCE,
    ),
    ("task_failed", Warning, None, AT_ONCE),
    ("tls_files", Warning, Some("seawall config show"), AT_ONCE),
    ("version_waiting", Warning, Some("seawall firmware"), AT_ONCE),
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
        known(kind).map_or(Warning, |(_, severity, ..)| *severity)
    }

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Critical => "critical",
            Warning => "warning",
        }
    }
}

fn known(kind: &str) -> Option<&'static (&'static str, Severity, Option<&'static str>, Hold)> {
    KINDS.iter().find(|(name, ..)| *name == kind)
}

impl Conditions {
    /// Whether a condition has been as it is now for as long as its kind wants.
    fn has_lasted(&mut self, key: Key, is_raised: bool, hold: Hold, now: Instant) -> bool {
        let wait = if is_raised { hold.raise_after } else { hold.end_after };
        if self.active.contains_key(&key) == is_raised || wait.is_zero() {
            self.changing.remove(&key);
            return true;
        }
        let since = *self.changing.entry(key.clone()).or_insert(now);
        let has_lasted = now.saturating_since(since) >= wait;
        if has_lasted {
            self.changing.remove(&key);
        }
        has_lasted
    }
}

impl Alarms {
    /// Creates an empty set of alarms.
    #[must_use]
    pub fn new(events: Arc<Events>, webhook: Arc<Webhook>, clock: Clock) -> Self {
        Self {
            conditions: Mutex::default(),
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
    ///
    /// Some kinds have a time for which the condition must last or be over before. They are to be set about once a
    /// second.
    pub fn set_for(&self, kind: &'static str, subject: &str, is_raised: bool, detail: impl Into<String>) {
        let known = known(kind);
        let hold = known.map_or(AT_ONCE, |(.., hold)| *hold);
        let key = (kind, subject.to_owned());
        if !self.lock().has_lasted(key, is_raised, hold, self.clock.now()) {
            return;
        }
        if is_raised {
            let action = known.and_then(|(_, _, action, _)| *action).map(Cow::Borrowed);
            self.raise(kind, subject, detail.into(), action);
        } else {
            self.end(kind, subject, detail.into());
        }
    }

    /// Raises an alarm with its own action. See [`set_for`](Self::set_for).
    pub fn raise(&self, kind: &'static str, subject: &str, detail: String, action: Option<Cow<'static, str>>) {
        debug_assert!(known(kind).is_some(), "{kind} is not one of the kinds");
        let now = self.clock.wall();
        let mut conditions = self.lock();
        let active = &mut conditions.active;
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
        drop(conditions);
    }

    fn end(&self, kind: &'static str, subject: &str, detail: String) {
        let mut conditions = self.lock();
        if let Some(ended) = conditions.active.remove(&(kind, subject.to_owned())) {
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
            .active
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
        self.lock().active.keys().any(|(other, _)| *other == kind)
    }

    /// All active alarms with kind and subject, critical ones first.
    #[must_use]
    pub fn active(&self) -> Vec<(&'static str, String, Active)> {
        let mut active: Vec<_> = self
            .lock()
            .active
            .iter()
            .map(|((kind, subject), alarm)| (*kind, subject.clone(), alarm.clone()))
            .collect();
        active.sort_by_key(|(kind, ..)| Severity::of(kind));
        active
    }

    fn lock(&self) -> MutexGuard<'_, Conditions> {
        self.conditions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Quotes a word of a command for a POSIX shell.
#[must_use]
pub fn quoted(word: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:=@%+,".contains(&byte);
    if !word.is_empty() && word.bytes().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
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
    fn condition_of_a_kind_that_waits_has_to_last_before_its_alarm_is_raised_and_ends() {
        let mut conditions = Conditions::default();
        let key = || ("node_lagging", NODE.to_owned());
        let at = |seconds| Instant::ZERO + Duration::from_secs(seconds);
        let mut set = |is_raised, seconds| {
            let has_lasted = conditions.has_lasted(key(), is_raised, LATE_NODE, at(seconds));
            if has_lasted && is_raised {
                conditions.active.entry(key()).or_insert(Active {
                    since: WallTime::default(),
                    detail: String::new(),
                    action: None,
                });
            } else if has_lasted {
                conditions.active.remove(&key());
            }
            conditions.active.contains_key(&key())
        };

        assert!(!set(true, 0) && !set(true, 9) && !set(false, 10), "it was late once");
        assert!(!set(true, 20) && !set(true, 29) && set(true, 30));
        assert!(set(false, 40) && set(false, 99) && set(true, 100), "it is not over");
        assert!(set(false, 110) && set(false, 169) && !set(false, 170));
        assert!(conditions.changing.is_empty());
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
