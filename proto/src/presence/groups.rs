//! The group test: whether many devices that went silent together are offline, or only out of sight. Start with
//! [`Groups`].
//!
//! Devices die one by one. A path that breaks, or a node that fails, silences many at once, and what they have in
//! common says which of both it is. Nothing here is done for a device that answers its pings.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    ops::Bound,
    sync::Arc,
    time::Duration,
};

use crate::{
    id::SessionId,
    presence::{
        Cause,
        observer::{HEALTH_LAGGING, Observed},
        usual::{COUNT_MIN, UsualShare},
    },
};

/// Share of a group's members that must be silent.
const SHARE_MIN: f64 = 0.3;

/// A group of which at least this share is silent is silent as a whole: then the widest such group is the one to name.
const SHARE_WHOLE: f64 = 0.8;

/// Time for which a group is held. Devices return from a broken path within it, by an answer or a new session.
pub const GRACE: Duration = Duration::from_mins(5);

/// Those that are left after the grace go offline within about this time, and at least [`RELEASED_MIN`] per step.
const RELEASE_WITHIN_STEPS: u32 = 60;
/// Least number of devices per step that go offline after the grace.
pub const RELEASED_MIN: u32 = 20;

/// Once a node that lagged is well, the members that it held are asked again within about this time. Per step these are
/// at least [`ASKED_MIN`].
const ASK_WITHIN_STEPS: u32 = 20;
/// Least number of devices per step that are asked again: their pings cost well under 100 ms of processor time.
const ASKED_MIN: u32 = 1_000;

/// Maximum number of groups that are held at a time. If there are more, the whole node is held as one more group.
pub const HELD_MAX: usize = 64;
/// Maximum number of groups among which silent devices are counted. Devices of further groups count for their node and
/// tenant.
const COUNTED_MAX: usize = 16_384;
/// Maximum number of sites among those. There may be as many as devices, and the wider groups need room.
const SITES_COUNTED_MAX: usize = COUNTED_MAX / 2;

/// Devices of held groups that have an event each in a step, if they are heard again. If there are more, their
/// groups have an event instead.
const TOLD_SINGLY_MAX: u32 = 20;
/// Maximum number of tenants that an event of a group names.
pub const TENANTS_MAX: usize = 16;

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

/// A site: one IPv4 address, or one IPv6 /64. The devices behind one router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Site {
    V4(u32),
    /// The upper half.
    V6(u64),
}

impl From<IpAddr> for Site {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address.to_bits()),
            IpAddr::V6(address) => Self::V6((address.to_bits() >> 64) as u64),
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::V4(bits) => std::net::Ipv4Addr::from_bits(*bits).fmt(f),
            Self::V6(upper) => write!(f, "{}/64", std::net::Ipv6Addr::from_bits(u128::from(*upper) << 64)),
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
        Site = "site",
    }
}

/// Devices that have something in common.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// All sessions of this node.
    Node,
    Tenant(Arc<str>),
    AddressBlock(Block),
    Site(Site),
}

impl Group {
    #[must_use]
    pub const fn kind(&self) -> GroupKind {
        match self {
            Self::Node => GroupKind::Node,
            Self::Tenant(_) => GroupKind::Tenant,
            Self::AddressBlock(_) => GroupKind::AddressBlock,
            Self::Site(_) => GroupKind::Site,
        }
    }

    /// Its name among groups of its kind: the tenant, the block or the address; empty for the node.
    #[must_use]
    pub fn key(&self) -> String {
        match self {
            Self::Node => String::new(),
            Self::Tenant(tenant) => tenant.to_string(),
            Self::AddressBlock(block) => block.to_string(),
            Self::Site(site) => site.to_string(),
        }
    }

    /// Whether `member` belongs to it.
    pub fn has(&self, member: &impl Member) -> bool {
        match self {
            Self::Node => true,
            Self::Tenant(tenant) => tenant == member.tenant(),
            Self::AddressBlock(block) => *block == member.address().into(),
            Self::Site(site) => *site == member.address().into(),
        }
    }
}

/// A session, as far as its groups go. Cheap to clone.
pub trait Member: Clone {
    fn tenant(&self) -> &Arc<str>;
    fn address(&self) -> IpAddr;
}

/// What to do about a suspect that left its last ping unanswered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Ask again: no test has seen it yet, or this node does not trust itself.
    Wait,
    /// A group that it belongs to is held. It keeps its socket, and is told when the grace is over.
    Held,
    /// It was held while this node lagged, which is over: ask it once more, as one whose deadline has just passed.
    AskAgain,
    /// It is offline.
    Offline,
}

/// Event that follows when a silent device is heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// It was not held: none.
    NotHeld,
    /// It was held: its own.
    Singly,
    /// It was held, and so were many others that are heard: its group's.
    WithGroup,
}

/// How far a held group is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Members that fall silent are held with it.
    Open,
    /// The grace is over: so many members go offline per step.
    Releasing { per_step: u32 },
    /// The lag is over: so many members are asked again per step.
    Asking { per_step: u32 },
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
    /// Tenants of the members that were held. `None`: more than [`TENANTS_MAX`].
    pub tenants: Option<BTreeSet<Arc<str>>>,
    phase: Phase,
    /// It is held since this node lagged, and for as long.
    ends_with_lag: bool,
    /// Its [`Change::Held`] was named.
    is_told: bool,
    /// Members were heard that have no event of their own.
    has_untold: bool,
}

impl Held {
    fn take(&mut self, tenant: &Arc<str>) {
        self.held += 1;
        self.left += 1;
        if let Some(tenants) = &mut self.tenants
            && !tenants.contains(tenant)
        {
            tenants.insert(Arc::clone(tenant));
            if tenants.len() > TENANTS_MAX {
                self.tenants = None;
            }
        }
    }
}

/// What a step has changed about a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is held, with all its members that are silent now.
    Held(Held),
    /// Many of its members were heard again.
    Resolving(Held),
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
    Held,
    /// The grace of its group is over.
    Released,
}

#[derive(Debug)]
struct Entry<M> {
    member: M,
    state: State,
    /// The group with which it became unknown.
    group: Option<HeldId>,
}

impl<M> Entry<M> {
    /// It counts for its groups: none holds it, and the grace of none that held it is over.
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
    usual: UsualShare,
    stepped_at: Observed,
    /// Begin of the last test that found no group to hold.
    tested_at: Observed,
    /// Silent devices by group, as counted in this step.
    counts: BTreeMap<Group, u32>,
    sites_counted: usize,
    /// Sessions up to here were gone over in this pass.
    cursor: Option<SessionId>,
    /// Devices that had an event each in this step.
    told_singly: u32,
}

impl<M> Default for Groups<M> {
    fn default() -> Self {
        Self {
            silent: BTreeMap::new(),
            suspects: 0,
            held: BTreeMap::new(),
            last_id: 0,
            usual: UsualShare::default(),
            stepped_at: Observed::ZERO,
            tested_at: Observed::ZERO,
            counts: BTreeMap::new(),
            sites_counted: 0,
            cursor: None,
            told_singly: 0,
        }
    }
}

impl<M: Member> Groups<M> {
    /// A device left two pings unanswered.
    pub fn handle_silent(&mut self, id: SessionId, member: M) {
        self.silent.entry(id).or_insert(Entry {
            member,
            state: State::Silent,
            group: None,
        });
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

    /// A silent device was heard, in its session or in a newer one. Says how that is told.
    pub fn handle_heard(&mut self, id: SessionId) -> Heard {
        let Some(group) = self.remove(id) else {
            return Heard::NotHeld;
        };
        self.told_singly = self.told_singly.saturating_add(1);
        let is_single = self.told_singly <= TOLD_SINGLY_MAX;
        if let Some(held) = self.held.get_mut(&group) {
            held.resolved += 1;
            held.has_untold |= !is_single;
        }
        if is_single { Heard::Singly } else { Heard::WithGroup }
    }

    /// A session has ended: its device is offline, or has a newer session.
    pub fn handle_ended(&mut self, id: SessionId) {
        self.remove(id);
    }

    /// Returns the group with which it became unknown.
    fn remove(&mut self, id: SessionId) -> Option<HeldId> {
        let entry = self.silent.remove(&id)?;
        if matches!(entry.state, State::Suspect { .. }) {
            self.suspects -= 1;
        }
        // The grace of a released one is over: it is not among those that are left.
        let group = entry.group.filter(|_| entry.state != State::Released)?;
        if let Some(held) = self.held.get_mut(&group) {
            held.left -= 1;
        }
        Some(group)
    }

    /// What to do about a suspect. `health`: local health of the node.
    #[must_use]
    pub fn verdict(&self, id: SessionId, health: u8) -> Verdict {
        match self.silent.get(&id).map(|entry| entry.state) {
            Some(State::Held) => Verdict::Held,
            // Its session has asked before: it was held meanwhile.
            Some(State::Silent) => Verdict::AskAgain,
            Some(State::Suspect { since }) if since < self.tested_at && health < HEALTH_LAGGING => Verdict::Offline,
            Some(State::Suspect { .. }) => Verdict::Wait,
            Some(State::Released) | None => Verdict::Offline,
        }
    }

    /// Begins a step. Returns whether suspects wait for a test. `sessions`: all sessions of the node.
    pub fn begin_step(&mut self, sessions: u32, now: Observed) -> bool {
        let elapsed = now.saturating_since(self.stepped_at);
        self.stepped_at = now;
        self.told_singly = 0;
        self.cursor = None;
        self.counts.clear();
        self.sites_counted = 0;
        if self.held.is_empty() {
            self.usual.handle(self.unheld(), sessions, elapsed);
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
                Group::AddressBlock(entry.member.address().into()),
                Group::Site(entry.member.address().into()),
            ];
            for group in groups {
                let is_site = group.kind() == GroupKind::Site;
                if let Some(count) = self.counts.get_mut(&group) {
                    *count += 1;
                } else if self.counts.len() < COUNTED_MAX && !(is_site && self.sites_counted >= SITES_COUNTED_MAX) {
                    self.sites_counted += usize::from(is_site);
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
        let many = self.counts.iter().filter(|(_, silent)| **silent >= COUNT_MIN);
        many.map(|(group, _)| group.clone()).collect()
    }

    /// Ends the test of a step: holds the group that explains most of the silence, if there is one. `counts`: members
    /// of the [candidates](Self::candidates). `health`: local health of the node.
    pub fn handle_counts(&mut self, counts: &[Count], sessions: u32, health: u8) {
        if self.suspects == 0 {
            self.tested_at = self.stepped_at;
            return;
        }
        if health >= HEALTH_LAGGING {
            return self.hold(Group::Node, sessions, Cause::NodeLagging, true);
        }
        let found = counts.iter().filter_map(|count| {
            let silent = *self.counts.get(&count.group)?;
            let share = f64::from(silent) / f64::from(count.members.max(silent));
            (share > SHARE_MIN && self.usual.is_exceeded(silent, count.members)).then_some((share, count))
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
            // What hits so many groups is none of theirs.
            Some(_) if self.held.len() >= HELD_MAX => self.hold(Group::Node, sessions, Cause::Path, false),
            // The others wait: one fault may have silenced several groups, and a step holds one of them.
            Some((_, count)) => self.hold(count.group.clone(), count.members, Cause::Path, false),
            None => self.tested_at = self.stepped_at,
        }
    }

    fn hold(&mut self, group: Group, members: u32, cause: Cause, ends_with_lag: bool) {
        let is_it = |held: &Held| held.group == group && held.phase == Phase::Open;
        if self.held.values().any(is_it) {
            return;
        }
        let held = Held {
            group,
            cause,
            since: self.stepped_at,
            members,
            held: 0,
            resolved: 0,
            left: 0,
            tenants: Some(BTreeSet::new()),
            phase: Phase::Open,
            ends_with_lag,
            is_told: false,
            has_untold: false,
        };
        self.last_id = self.last_id.wrapping_add(1);
        self.held.insert(self.last_id, held);
    }

    /// Goes over the next silent sessions, at most `max` of them. Returns those that belong to a held group: they are
    /// held from now on. `None` once all were gone over.
    pub fn poll_held(&mut self, max: usize) -> Option<Vec<(M, Cause)>> {
        if !self.held.values().any(|held| held.phase == Phase::Open) {
            return None;
        }
        let mut found = Vec::new();
        let mut seen = 0;
        for (session, entry) in after(&mut self.silent, self.cursor).take(max) {
            (seen, self.cursor) = (seen + 1, Some(*session));
            if !entry.is_free() {
                continue;
            }
            let mut groups = self.held.iter_mut().filter(|(_, held)| held.phase == Phase::Open);
            let Some((id, held)) = groups.find(|(_, held)| held.group.has(&entry.member)) else {
                continue;
            };
            if matches!(entry.state, State::Suspect { .. }) {
                self.suspects -= 1;
            }
            entry.state = State::Held;
            held.take(entry.member.tenant());
            found.push((entry.member.clone(), held.cause));
            let before = entry.group.replace(*id);
            if let Some(before) = before.and_then(|id| self.held.get_mut(&id)) {
                before.left -= 1;
            }
        }
        if seen == 0 {
            self.cursor = None;
            return None;
        }
        Some(found)
    }

    /// Members whose grace is over, or that are to be asked again, as many as may be in this step: once a step. Each is
    /// to ask for its [verdict](Self::verdict).
    pub fn poll_released(&mut self, health: u8, now: Observed) -> Vec<M> {
        if health >= HEALTH_LAGGING {
            return Vec::new();
        }
        let mut room = BTreeMap::new();
        for (id, held) in &mut self.held {
            if held.phase == Phase::Open && held.ends_with_lag && health == 0 {
                let per_step = held.left.div_ceil(ASK_WITHIN_STEPS).max(ASKED_MIN);
                held.phase = Phase::Asking { per_step };
            } else if held.phase == Phase::Open && !held.ends_with_lag && now >= held.since + GRACE {
                let per_step = held.left.div_ceil(RELEASE_WITHIN_STEPS).max(RELEASED_MIN);
                held.phase = Phase::Releasing { per_step };
            }
            match held.phase {
                Phase::Open => {}
                Phase::Releasing { per_step } => {
                    room.insert(*id, (per_step.min(held.left), State::Released));
                }
                Phase::Asking { per_step } => {
                    room.insert(*id, (per_step.min(held.left), State::Silent));
                }
            }
        }
        let mut left: u32 = room.values().map(|(room, _)| room).sum();
        let mut released = Vec::new();
        for entry in self.silent.values_mut() {
            if left == 0 {
                break;
            }
            let (State::Held, Some(id)) = (entry.state, entry.group) else {
                continue;
            };
            let (Some((room, state)), Some(held)) = (room.get_mut(&id), self.held.get_mut(&id)) else {
                continue;
            };
            if *room > 0 {
                entry.state = *state;
                *room -= 1;
                left -= 1;
                held.left -= u32::from(*state == State::Released);
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
        let empty = self.held.iter().find(|(_, held)| held.left == 0).map(|(id, _)| *id);
        if let Some(held) = empty.and_then(|id| self.held.remove(&id)) {
            return if held.held > 0 {
                Some(Change::Released(held))
            } else {
                self.poll_change()
            };
        }
        let held = self.held.values_mut().find(|held| held.has_untold)?;
        held.has_untold = false;
        Some(Change::Resolving(held.clone()))
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
}

#[cfg(test)]
mod tests;
