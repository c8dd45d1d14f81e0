//! The group test: whether many devices that went silent together are offline, or only out of sight. Start with
//! [`Groups`].
//!
//! Devices die one by one. A path that breaks, or a node that fails, silences many at once, and what they have in
//! common says which of both it is. Nothing here is done for a device that answers its pings.

use std::{collections::BTreeMap, fmt, net::IpAddr, ops::Bound, sync::Arc, time::Duration};

use crate::{
    id::SessionId,
    presence::{
        Cause,
        observer::{HEALTH_LAGGING, Observed},
    },
};

/// Minimum number of silent members of a group that is held: fewer may well have died one by one.
const SILENT_MIN: u32 = 20;

/// Share of a group's members that must be silent.
const SHARE_MIN: f64 = 0.3;

/// A group of which at least this share is silent is silent as a whole: then the widest such group is the one to name.
const SHARE_WHOLE: f64 = 0.8;

/// Natural logarithm of the probability below which as many silent members are not chance: 1e-9.
const CHANCE_MAX_LN: f64 = -20.72;

/// The least share of silent devices that is taken for usual.
const BASELINE_MIN: f64 = 0.001;
/// Time constant of the usual share.
const BASELINE_WINDOW: Duration = Duration::from_hours(24);

/// Time for which a group is held. Devices return from a broken path within it, by an answer or a new session.
pub const GRACE: Duration = Duration::from_mins(5);

/// Those that are left after the grace go offline within about this time, and at least [`RELEASED_MIN`] per step.
const RELEASE_WITHIN_STEPS: u32 = 60;
/// Least number of devices per step that go offline after the grace.
pub const RELEASED_MIN: u32 = 20;

/// Maximum number of groups that are held at a time. Silent devices of further groups go offline one by one.
pub const HELD_MAX: usize = 64;
/// Maximum number of groups among which silent devices are counted. Devices of further groups count for their node and
/// tenant.
const COUNTED_MAX: usize = 16_384;

/// A block of addresses: IPv4 /20, IPv6 /48. What one fault of a provider is likely to hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Block {
    /// The upper 20 bits; the others are 0.
    V4(u32),
    /// The upper 48 bits of the upper half; the others are 0.
    V6(u64),
}

impl From<IpAddr> for Block {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address.to_bits() & !0xfff),
            IpAddr::V6(address) => {
                let [a, b, c, d, e, f, ..] = address.octets();
                Self::V6(u64::from_be_bytes([a, b, c, d, e, f, 0, 0]))
            }
        }
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::V4(bits) => write!(f, "{}/20", std::net::Ipv4Addr::from_bits(*bits)),
            Self::V6(upper) => write!(f, "{}/48", std::net::Ipv6Addr::from_bits(u128::from(*upper) << 64)),
        }
    }
}

crate::labels! {
    /// What the devices of a group have in common.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub enum GroupKind {
        Node = "node",
        Tenant = "tenant",
        AddressBlock = "address_block",
    }
}

/// Devices that have something in common.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// All sessions of this node.
    Node,
    Tenant(Arc<str>),
    AddressBlock(Block),
}

impl Group {
    #[must_use]
    pub const fn kind(&self) -> GroupKind {
        match self {
            Self::Node => GroupKind::Node,
            Self::Tenant(_) => GroupKind::Tenant,
            Self::AddressBlock(_) => GroupKind::AddressBlock,
        }
    }

    /// Its name among groups of its kind: the tenant or the block; empty for the node.
    #[must_use]
    pub fn key(&self) -> String {
        match self {
            Self::Node => String::new(),
            Self::Tenant(tenant) => tenant.to_string(),
            Self::AddressBlock(block) => block.to_string(),
        }
    }

    /// Whether `member` belongs to it.
    pub fn has(&self, member: &impl Member) -> bool {
        match self {
            Self::Node => true,
            Self::Tenant(tenant) => tenant == member.tenant(),
            Self::AddressBlock(block) => *block == member.block(),
        }
    }
}

/// A session, as far as its groups go. Cheap to clone.
pub trait Member: Clone {
    fn tenant(&self) -> &Arc<str>;
    fn block(&self) -> Block;
}

/// What to do about a suspect that left its last ping unanswered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Ask again: no test has seen it yet, or this node does not trust itself.
    Wait,
    /// A group that it belongs to is held. It keeps its socket, and is told when the grace is over.
    Held,
    /// It is offline.
    Offline,
}

/// A group whose silent members are neither online nor offline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    pub group: Group,
    pub cause: Cause,
    pub since: Observed,
    /// Members when it was held, silent and not.
    pub members: u32,
    /// Members that were held, all in all.
    pub held: u32,
    /// Held members that have been heard again.
    pub resolved: u32,
    /// Held members that nobody has heard since.
    pub left: u32,
    /// Members that go offline per step; 0 during the grace.
    release_per_step: u32,
    /// Its [`Change::Held`] was named.
    is_told: bool,
}

/// What a step has changed about a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is held, with all its members that are silent now.
    Held(Held),
    /// None of its members is held any more.
    Released(Held),
}

/// Number of members of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Count {
    pub group: Group,
    pub members: u32,
}

/// Number of the held group, for as long as it is held.
type HeldId = u32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Silent,
    /// Its deadline has passed.
    Suspect {
        since: Observed,
    },
    Held(HeldId),
    /// The grace of its group is over.
    Released,
}

#[derive(Debug)]
struct Entry<M> {
    member: M,
    state: State,
}

impl<M> Entry<M> {
    /// It counts for its groups: no group holds it, or has held it.
    const fn is_free(&self) -> bool {
        matches!(self.state, State::Silent | State::Suspect { .. })
    }
}

/// The entries behind `cursor`.
fn after<M>(
    silent: &mut BTreeMap<SessionId, Entry<M>>,
    cursor: Option<SessionId>,
) -> impl Iterator<Item = (&SessionId, &mut Entry<M>)> {
    let from = cursor.map_or(Bound::Unbounded, Bound::Excluded);
    silent.range_mut((from, Bound::Unbounded))
}

/// All sessions of a node that left two pings unanswered, and the groups that are held.
///
/// The caller repeats a step about once a second. If [`begin_step`](Self::begin_step) asks for a test:
/// [`count_some`](Self::count_some), [`candidates`](Self::candidates) and [`handle_counts`](Self::handle_counts). In
/// any case [`poll_held`](Self::poll_held), [`poll_released`](Self::poll_released) and
/// [`poll_change`](Self::poll_change). The steps that go over all silent sessions do so in parts, so that a lock
/// around this need not be held for long.
///
/// An entry per silent session, so never more than there are sessions. A device counts from its second unanswered
/// ping on, long before its deadline: the deadlines of a group that fell silent at one moment are spread over a
/// heartbeat.
#[derive(Debug)]
pub struct Groups<M> {
    silent: BTreeMap<SessionId, Entry<M>>,
    suspects: u32,
    held: BTreeMap<HeldId, Held>,
    last_id: HeldId,
    /// Usual share of silent devices.
    baseline: f64,
    stepped_at: Observed,
    /// Begin of the last test that found no group to hold.
    tested_at: Observed,
    /// Silent devices by group, as counted in this step.
    counts: BTreeMap<Group, u32>,
    /// Sessions up to here were gone over in this pass.
    cursor: Option<SessionId>,
}

impl<M> Default for Groups<M> {
    fn default() -> Self {
        Self {
            silent: BTreeMap::new(),
            suspects: 0,
            held: BTreeMap::new(),
            last_id: 0,
            baseline: BASELINE_MIN,
            stepped_at: Observed::ZERO,
            tested_at: Observed::ZERO,
            counts: BTreeMap::new(),
            cursor: None,
        }
    }
}

impl<M: Member> Groups<M> {
    /// A device left two pings unanswered.
    pub fn handle_silent(&mut self, id: SessionId, member: M) {
        let state = State::Silent;
        self.silent.entry(id).or_insert(Entry { member, state });
    }

    /// The deadline of a silent device has passed, and its kernel buffer holds nothing of it.
    pub fn handle_suspect(&mut self, id: SessionId, now: Observed) {
        if let Some(entry) = self.silent.get_mut(&id)
            && entry.state == State::Silent
        {
            entry.state = State::Suspect { since: now };
            self.suspects += 1;
        }
    }

    /// A silent device was heard. True if it was held.
    pub fn handle_heard(&mut self, id: SessionId) -> bool {
        let held = self.remove(id);
        if let Some(held) = held.and_then(|id| self.held.get_mut(&id)) {
            held.resolved += 1;
        }
        held.is_some()
    }

    /// A session has ended: its device is offline, or has a newer session.
    pub fn handle_ended(&mut self, id: SessionId) {
        self.remove(id);
    }

    /// Returns the group that held it.
    fn remove(&mut self, id: SessionId) -> Option<HeldId> {
        match self.silent.remove(&id)?.state {
            State::Suspect { .. } => self.suspects -= 1,
            State::Held(group) => {
                if let Some(held) = self.held.get_mut(&group) {
                    held.left -= 1;
                }
                return Some(group);
            }
            State::Silent | State::Released => {}
        }
        None
    }

    /// What to do about a suspect. `health`: local health of the node.
    #[must_use]
    pub fn verdict(&self, id: SessionId, health: u8) -> Verdict {
        match self.silent.get(&id).map(|entry| entry.state) {
            Some(State::Held(_)) => Verdict::Held,
            Some(State::Suspect { since }) if since < self.tested_at && health < HEALTH_LAGGING => Verdict::Offline,
            Some(State::Suspect { .. } | State::Silent) => Verdict::Wait,
            Some(State::Released) | None => Verdict::Offline,
        }
    }

    /// Begins a step. Returns whether suspects wait for a test. `sessions`: all sessions of the node.
    pub fn begin_step(&mut self, sessions: u32, now: Observed) -> bool {
        let elapsed = now.saturating_since(self.stepped_at);
        self.stepped_at = now;
        self.cursor = None;
        self.counts.clear();
        if self.held.is_empty() && sessions > 0 {
            let share = f64::from(self.unheld()) / f64::from(sessions);
            let weight = (elapsed.as_secs_f64() / BASELINE_WINDOW.as_secs_f64()).min(1.0);
            self.baseline = (self.baseline + (share - self.baseline) * weight).max(BASELINE_MIN);
        }
        if self.held.len() >= HELD_MAX {
            self.tested_at = now;
            return false;
        }
        self.suspects > 0
    }

    /// Counts the next silent devices by group, at most `max` of them. True if there are more.
    pub fn count_some(&mut self, max: usize) -> bool {
        let mut seen = 0;
        for (id, entry) in after(&mut self.silent, self.cursor).take(max) {
            (seen, self.cursor) = (seen + 1, Some(*id));
            if !entry.is_free() {
                continue;
            }
            let groups = [
                Group::Node,
                Group::Tenant(Arc::clone(entry.member.tenant())),
                Group::AddressBlock(entry.member.block()),
            ];
            for group in groups {
                if let Some(count) = self.counts.get_mut(&group) {
                    *count += 1;
                } else if self.counts.len() < COUNTED_MAX {
                    self.counts.insert(group, 1);
                }
            }
        }
        let is_over = seen < max;
        if is_over {
            self.cursor = None;
        }
        !is_over
    }

    /// The groups whose members are to be counted, once all silent devices are.
    #[must_use]
    pub fn candidates(&self) -> Vec<Group> {
        let many = self.counts.iter().filter(|(_, silent)| **silent >= SILENT_MIN);
        many.map(|(group, _)| group.clone()).collect()
    }

    /// Ends the test of a step: holds the group that explains most of the silence, if there is one. `counts`: members
    /// of the [candidates](Self::candidates). `health`: local health of the node.
    pub fn handle_counts(&mut self, counts: &[Count], sessions: u32, health: u8) {
        if self.suspects == 0 || self.held.len() >= HELD_MAX {
            self.tested_at = self.stepped_at;
            return;
        }
        if health >= HEALTH_LAGGING {
            return self.hold(Group::Node, sessions, health);
        }
        let found = counts.iter().filter_map(|count| {
            let silent = *self.counts.get(&count.group)?;
            self.is_improbable(silent, count.members)
                .then(|| (f64::from(silent) / f64::from(count.members.max(silent)), count))
        });
        // The widest that is silent as a whole; otherwise the one that is silent most.
        let found = found.max_by(|(one_share, one), (other_share, other)| {
            let whole = |share: f64| share >= SHARE_WHOLE;
            let (one_whole, other_whole) = (whole(*one_share), whole(*other_share));
            one_whole.cmp(&other_whole).then_with(|| {
                let by_share = one_share.total_cmp(other_share);
                let by_width = one.members.cmp(&other.members).then(other.group.cmp(&one.group));
                if one_whole { by_width } else { by_share.then(by_width) }
            })
        });
        match found {
            // The others wait: one fault may have silenced several groups, and a step holds one of them.
            Some((_, count)) => self.hold(count.group.clone(), count.members, health),
            None => self.tested_at = self.stepped_at,
        }
    }

    fn hold(&mut self, group: Group, members: u32, health: u8) {
        if self
            .held
            .values()
            .any(|held| held.group == group && held.release_per_step == 0)
        {
            return;
        }
        let is_ours = group == Group::Node || health >= HEALTH_LAGGING;
        let held = Held {
            group,
            cause: if is_ours { Cause::NodeLagging } else { Cause::Path },
            since: self.stepped_at,
            members,
            held: 0,
            resolved: 0,
            left: 0,
            release_per_step: 0,
            is_told: false,
        };
        self.last_id = self.last_id.wrapping_add(1);
        self.held.insert(self.last_id, held);
    }

    /// Goes over the next silent sessions, at most `max` of them. Returns those that belong to a held group: they are
    /// held from now on. `None` once all were gone over.
    pub fn poll_held(&mut self, max: usize) -> Option<Vec<(M, Cause)>> {
        let is_open = |held: &Held| held.release_per_step == 0;
        if !self.held.values().any(is_open) {
            return None;
        }
        let mut found = Vec::new();
        let mut seen = 0;
        for (session, entry) in after(&mut self.silent, self.cursor).take(max) {
            (seen, self.cursor) = (seen + 1, Some(*session));
            if !entry.is_free() {
                continue;
            }
            let mut groups = self.held.iter_mut().filter(|(_, held)| is_open(held));
            if let Some((id, held)) = groups.find(|(_, held)| held.group.has(&entry.member)) {
                if matches!(entry.state, State::Suspect { .. }) {
                    self.suspects -= 1;
                }
                entry.state = State::Held(*id);
                held.held += 1;
                held.left += 1;
                found.push((entry.member.clone(), held.cause));
            }
        }
        if seen == 0 {
            self.cursor = None;
            return None;
        }
        Some(found)
    }

    /// Members whose grace is over, as many as may go offline in this step: once a step. Each is to ask for its
    /// [verdict](Self::verdict).
    pub fn poll_released(&mut self, health: u8, now: Observed) -> Vec<M> {
        if health >= HEALTH_LAGGING {
            return Vec::new();
        }
        let mut room = BTreeMap::new();
        for (id, held) in &mut self.held {
            if now < held.since + GRACE {
                continue;
            }
            if held.release_per_step == 0 {
                held.release_per_step = held.left.div_ceil(RELEASE_WITHIN_STEPS).max(RELEASED_MIN);
            }
            room.insert(*id, held.release_per_step.min(held.left));
        }
        let mut left: u32 = room.values().sum();
        let mut released = Vec::new();
        for entry in self.silent.values_mut() {
            if left == 0 {
                break;
            }
            let State::Held(id) = entry.state else { continue };
            let (Some(room), Some(held)) = (room.get_mut(&id), self.held.get_mut(&id)) else {
                continue;
            };
            if *room > 0 {
                entry.state = State::Released;
                *room -= 1;
                left -= 1;
                held.left -= 1;
                released.push(entry.member.clone());
            }
        }
        released
    }

    /// What this step has changed about the groups.
    pub fn poll_change(&mut self) -> Option<Change> {
        if let Some(held) = self.held.values_mut().find(|held| !held.is_told && held.held > 0) {
            held.is_told = true;
            return Some(Change::Held(held.clone()));
        }
        let empty = self.held.iter().find(|(_, held)| held.left == 0);
        let id = *empty?.0;
        let held = self.held.remove(&id)?;
        if held.held > 0 {
            Some(Change::Released(held))
        } else {
            self.poll_change()
        }
    }

    /// Groups that are held, oldest first.
    pub fn held(&self) -> impl Iterator<Item = &Held> {
        self.held.values()
    }

    /// Sessions that left two pings unanswered and are not held.
    #[must_use]
    pub fn unheld(&self) -> u32 {
        let held: u32 = self.held.values().map(|held| held.left).sum();
        u32::try_from(self.silent.len())
            .unwrap_or(u32::MAX)
            .saturating_sub(held)
    }

    /// Sessions that are held.
    #[must_use]
    pub fn unknown(&self) -> u32 {
        self.held.values().map(|held| held.left).sum()
    }

    /// Sessions whose deadline has passed, and that wait for their verdict.
    #[must_use]
    pub const fn suspects(&self) -> u32 {
        self.suspects
    }

    /// Whether so many silent members are more than chance (Chernoff's bound of the binomial tail).
    fn is_improbable(&self, silent: u32, members: u32) -> bool {
        let share = f64::from(silent) / f64::from(members.max(1));
        if silent < SILENT_MIN || share <= SHARE_MIN || share <= self.baseline {
            return false;
        }
        let share = share.min(1.0);
        let gone = share * (share / self.baseline).ln();
        let there = if share < 1.0 {
            (1.0 - share) * ((1.0 - share) / (1.0 - self.baseline)).ln()
        } else {
            0.0
        };
        -f64::from(members) * (gone + there) < CHANCE_MAX_LN
    }
}

#[cfg(test)]
mod tests;
