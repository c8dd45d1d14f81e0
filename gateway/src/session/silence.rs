//! The silent sessions of this node, and the groups that are held: the group test behind a lock. Start with
//! [`Silence`].

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use seawall_proto::{
    id::SessionId,
    presence::{
        groups::{Block, Count, Group, Groups, Heard, Held, Member, Site, Verdict},
        observer::Observed,
    },
};

use crate::session::sessions::{Session, Sessions};

/// A session among the silent ones.
#[derive(Debug, Clone)]
pub struct SilentSession(pub Arc<Session>);

impl Member for SilentSession {
    fn tenant(&self) -> &Arc<str> {
        self.0.info.tenant()
    }

    fn address(&self) -> IpAddr {
        self.0.info.address
    }
}

/// The group test of this node. It holds nothing of a session that answers its pings.
#[derive(Debug, Default)]
pub struct Silence(Mutex<Groups<SilentSession>>);

/// Figures of the group test.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Figures {
    /// Sessions that left two pings unanswered, and are not held.
    pub silent: u32,
    /// Those among them whose deadline has passed.
    pub suspects: u32,
    /// Sessions that are held.
    pub unknown: u32,
    pub held: Vec<Held>,
}

impl Silence {
    /// The group test. Its lock holds up every session that falls silent or is heard again: be quick.
    pub fn groups(&self) -> MutexGuard<'_, Groups<SilentSession>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn handle_silent(&self, session: &Arc<Session>) {
        let silent = SilentSession(Arc::clone(session));
        self.groups().handle_silent(session.id, silent);
    }

    pub fn handle_suspect(&self, session: SessionId, now: Observed) {
        self.groups().handle_suspect(session, now);
    }

    /// A device was heard, in its session or in a newer one. `resolve`: what is to be told of it if it was held, before
    /// anything else can happen to it.
    pub fn handle_heard(&self, session: SessionId, resolve: impl FnOnce(Heard)) {
        let mut groups = self.groups();
        match groups.handle_heard(session) {
            Heard::NotHeld => {}
            heard @ (Heard::Singly | Heard::WithGroup) => resolve(heard),
        }
    }

    pub fn handle_ended(&self, session: SessionId) {
        self.groups().handle_ended(session);
    }

    #[must_use]
    pub fn verdict(&self, session: SessionId, health: u8) -> Verdict {
        self.groups().verdict(session, health)
    }

    /// Whether a group is held.
    #[must_use]
    pub fn is_holding(&self) -> bool {
        self.groups().held().next().is_some()
    }

    #[must_use]
    pub fn figures(&self) -> Figures {
        let groups = self.groups();
        Figures {
            silent: groups.unheld(),
            suspects: groups.suspects(),
            unknown: groups.unknown(),
            held: groups.held().cloned().collect(),
        }
    }
}

/// Time for which numbers of members are good enough. Counting goes over all sessions.
const COUNTS_AGE_MAX: Duration = Duration::from_secs(10);

/// Numbers of members, as last counted.
#[derive(Debug, Default)]
pub struct MemberCounts {
    at: Observed,
    counts: Vec<Count>,
}

impl MemberCounts {
    /// Members of each of `groups`. Goes over all sessions, shard by shard: not for an async task.
    pub fn of(&mut self, sessions: &Sessions, groups: Vec<Group>, now: Observed) -> &[Count] {
        let known: BTreeSet<&Group> = self.counts.iter().map(|count| &count.group).collect();
        let is_known = |group: &Group| known.contains(group);
        if now.saturating_since(self.at) >= COUNTS_AGE_MAX || !groups.iter().all(is_known) {
            self.counts = count(sessions, groups);
            self.at = now;
        }
        &self.counts
    }
}

fn count(sessions: &Sessions, groups: Vec<Group>) -> Vec<Count> {
    let mut tenants: BTreeMap<Arc<str>, u32> = BTreeMap::new();
    let mut blocks: BTreeMap<Block, u32> = BTreeMap::new();
    let mut sites: BTreeMap<Site, u32> = BTreeMap::new();
    for group in &groups {
        match group {
            Group::Node => {}
            Group::Tenant(tenant) => {
                tenants.insert(Arc::clone(tenant), 0);
            }
            Group::AddressBlock(block) => {
                blocks.insert(*block, 0);
            }
            Group::Site(site) => {
                sites.insert(*site, 0);
            }
        }
    }
    if !(tenants.is_empty() && blocks.is_empty() && sites.is_empty()) {
        sessions.for_each(|session| {
            if let Some(members) = tenants.get_mut(session.info.tenant()) {
                *members += 1;
            }
            if let Some(members) = blocks.get_mut(&Block::from(session.info.address)) {
                *members += 1;
            }
            if let Some(members) = sites.get_mut(&Site::from(session.info.address)) {
                *members += 1;
            }
        });
    }
    let members = |group: &Group| match group {
        Group::Node => u32::try_from(sessions.len()).unwrap_or(u32::MAX),
        Group::Tenant(tenant) => tenants.get(tenant).copied().unwrap_or(0),
        Group::AddressBlock(block) => blocks.get(block).copied().unwrap_or(0),
        Group::Site(site) => sites.get(site).copied().unwrap_or(0),
    };
    let counts = groups.into_iter().map(|group| Count {
        members: members(&group),
        group,
    });
    counts.collect()
}
