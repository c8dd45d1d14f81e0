//! The devices of all nodes, counted by what firmware rules ask of them: model, firmware version, tenant.
//!
//! Each node counts its own and writes the counts to the database every few seconds, so that the check of a new rule
//! sees the cluster. Nothing is written when a device connects.

use std::{collections::HashMap, sync::Arc};

use seawall_proto::rules::{RuleSpec, Seen, Subject};
use serde::{Deserialize, Serialize};

use crate::{
    fleet::{cohorts::Cohort, history::History},
    session::sessions::Sessions,
};

/// Maximum number of groups that a node writes, those with most devices. The others are written as one sum.
const GROUPS_MAX: usize = 2_000;

/// Devices by cohort and tenant. Counting looks at each device: on a thread of its own.
#[derive(Debug, Default)]
pub struct Census {
    /// By the address of the cohort, which each entry keeps.
    groups: HashMap<(usize, Arc<str>), (Arc<Cohort>, Counts)>,
}

/// How many devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Counts {
    /// With a session on the node.
    pub connected: u64,
    /// Seen authenticated since the node started, and remembered; the connected ones are among them.
    pub known: u64,
}

/// Devices that are alike to every rule.
#[derive(Clone, Copy, Debug)]
pub struct Group<'a> {
    pub subject: Subject<'a>,
    pub counts: Counts,
}

impl<'a> Group<'a> {
    /// Those that are connected.
    #[must_use]
    pub const fn connected(self) -> Seen<'a> {
        Seen {
            subject: self.subject,
            devices: self.counts.connected,
        }
    }

    /// Those that are known.
    #[must_use]
    pub const fn known(self) -> Seen<'a> {
        Seen {
            subject: self.subject,
            devices: self.counts.known,
        }
    }
}

impl Census {
    /// Counts the devices with a session.
    #[must_use]
    pub fn of_connected(sessions: &Sessions) -> Self {
        let mut census = Self::default();
        sessions.for_each(|session| census.counts(session.info.cohort(), session.info.tenant()).connected += 1);
        census
    }

    /// Counts the devices with a session, and those that are remembered.
    #[must_use]
    pub fn of(sessions: &Sessions, history: &History) -> Self {
        let mut census = Self::of_connected(sessions);
        let (groups, _) = history.groups().all();
        for (group, counts) in groups {
            census.counts(&group.cohort, &group.tenant).known += counts.total();
        }
        census
    }

    fn counts(&mut self, cohort: &Arc<Cohort>, tenant: &Arc<str>) -> &mut Counts {
        let key = (Arc::as_ptr(cohort).addr(), Arc::clone(tenant));
        let (_, counts) = self
            .groups
            .entry(key)
            .or_insert_with(|| (Arc::clone(cohort), Counts::default()));
        counts
    }

    /// The devices, by what rules ask of them, in no order.
    pub fn groups(&self) -> impl Iterator<Item = Group<'_>> {
        self.groups.iter().map(|((_, tenant), (cohort, counts))| Group {
            subject: Subject {
                device: None,
                firmware: cohort.firmware.as_deref(),
                model: cohort.model.as_deref(),
                tenant: Some(tenant),
            },
            counts: *counts,
        })
    }

    /// Devices that this node remembers, the connected ones among them.
    #[must_use]
    pub fn known(&self) -> u64 {
        self.groups.values().map(|(_, counts)| counts.known).sum()
    }

    /// Connected devices that the rule matches.
    #[must_use]
    pub fn matched(&self, spec: &RuleSpec) -> u64 {
        let matched = self.groups().filter(|group| spec.is_for(&group.subject));
        matched.map(|group| group.counts.connected).sum()
    }

    /// What is written for other nodes.
    #[must_use]
    pub fn published(&self) -> Published {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        let mut groups: Vec<PublishedGroup> = self
            .groups()
            .map(|group| PublishedGroup {
                firmware: owned(group.subject.firmware),
                model: owned(group.subject.model),
                tenant: owned(group.subject.tenant),
                counts: group.counts,
            })
            .collect();
        groups.sort_unstable_by(|a, b| b.counts.known.cmp(&a.counts.known).then_with(|| a.cmp(b)));
        let rest = groups.split_off(groups.len().min(GROUPS_MAX));
        Published {
            rest: Counts {
                connected: rest.iter().map(|group| group.counts.connected).sum(),
                known: rest.iter().map(|group| group.counts.known).sum(),
            },
            groups,
        }
    }
}

/// The devices of a node, as it writes them. A later version may have written it: unknown fields are ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    groups: Vec<PublishedGroup>,
    /// Devices of groups that are not listed.
    #[serde(default)]
    pub rest: Counts,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct PublishedGroup {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    firmware: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tenant: Option<String>,
    #[serde(flatten)]
    counts: Counts,
}

impl Published {
    /// Devices that the node remembered.
    #[must_use]
    pub fn known(&self) -> u64 {
        self.groups.iter().map(|group| group.counts.known).sum::<u64>() + self.rest.known
    }

    /// The devices, by what rules ask of them.
    pub fn groups(&self) -> impl Iterator<Item = Group<'_>> {
        self.groups.iter().map(|group| Group {
            subject: Subject {
                device: None,
                firmware: group.firmware.as_deref(),
                model: group.model.as_deref(),
                tenant: group.tenant.as_deref(),
            },
            counts: group.counts,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_lists_the_greatest_groups_and_sums_up_the_others() {
        let cohorts = crate::fleet::cohorts::Cohorts::new();
        let mut census = Census::default();
        let tenant: Arc<str> = "t".into();
        for number in 0..=GROUPS_MAX {
            let cohort = cohorts.intern(Some("m"), Some(&number.to_string()));
            *census.counts(&cohort, &tenant) = Counts {
                connected: 1,
                known: if number == 7 { 2 } else { 3 },
            };
        }

        let text = serde_json::to_string(&census.published()).unwrap();
        let read: Published = serde_json::from_str(&text).unwrap();

        assert_eq!(read, census.published());
        assert_eq!(read.groups().count(), GROUPS_MAX);
        assert_eq!(read.rest, Counts { connected: 1, known: 2 });
        assert!(read.groups().all(|group| group.subject.firmware != Some("7")));
    }

    #[test]
    fn counts_of_a_later_version_are_read() {
        let text = r#"{"groups":[{"firmware":"1","site":"a","connected":2,"known":3}],"sites":1}"#;

        let read: Published = serde_json::from_str(text).unwrap();

        assert_eq!(read.groups().next().unwrap().counts, Counts { connected: 2, known: 3 });
    }
}
