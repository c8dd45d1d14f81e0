//! The devices of this node, counted by what firmware rules ask of them: model, firmware version, tenant.

use std::{collections::HashMap, sync::Arc};

use seawall_proto::rules::{RuleSpec, Seen, Subject};

use crate::{cohorts::Cohort, state::State};

/// Devices by cohort and tenant. Counting looks at each device: on a thread of its own.
#[derive(Debug, Default)]
pub struct Census {
    /// By the address of the cohort, which each entry keeps.
    groups: HashMap<(usize, Arc<str>), Group>,
}

/// Devices that are alike to every rule.
#[derive(Debug)]
struct Group {
    cohort: Arc<Cohort>,
    connected: u64,
    known: u64,
}

/// Which devices are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Those with a session on this node.
    Connected,
    /// Those that this node has seen authenticated since it started and remembers; the connected ones are among them.
    Known,
}

impl Census {
    /// Counts the devices with a session.
    #[must_use]
    pub fn of_connected(state: &State) -> Self {
        let mut census = Self::default();
        census.count_connected(state);
        census
    }

    /// Counts the devices with a session, and those that are remembered.
    #[must_use]
    pub fn of(state: &State) -> Self {
        let mut census = Self::of_connected(state);
        state
            .history
            .for_each_known(|_, identity| census.group(&identity.cohort, &identity.tenant).known += 1);
        census
    }

    fn count_connected(&mut self, state: &State) {
        state
            .sessions
            .for_each(|session| self.group(&session.info.cohort, &session.info.tenant).connected += 1);
    }

    fn group(&mut self, cohort: &Arc<Cohort>, tenant: &Arc<str>) -> &mut Group {
        let key = (Arc::as_ptr(cohort).addr(), Arc::clone(tenant));
        self.groups.entry(key).or_insert_with(|| Group {
            cohort: Arc::clone(cohort),
            connected: 0,
            known: 0,
        })
    }

    /// The devices, by what rules ask of them.
    pub fn seen(&self, which: Which) -> impl Iterator<Item = Seen<'_>> {
        self.groups.iter().map(move |((_, tenant), group)| Seen {
            subject: Subject {
                firmware: group.cohort.firmware.as_deref(),
                model: group.cohort.model.as_deref(),
                tenant: Some(tenant),
            },
            devices: match which {
                Which::Connected => group.connected,
                Which::Known => group.known,
            },
        })
    }

    /// Connected devices that the rule matches.
    #[must_use]
    pub fn matched(&self, spec: &RuleSpec) -> u64 {
        let matched = self.seen(Which::Connected).filter(|seen| spec.is_for(&seen.subject));
        matched.map(|seen| seen.devices).sum()
    }
}
