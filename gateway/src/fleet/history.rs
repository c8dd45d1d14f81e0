//! What this node remembers of a device: its presence, since when and how that is known, and its last attempts to
//! connect.
//!
//! One table: a device takes 64 bytes, and eight more for each attempt before its latest. It is bounded in devices:
//! where it is full, the one that was offline for longest makes room. Ids that were never authenticated have a table of
//! their own, so that a flood of made-up ones can't push devices out. It lies in shards with a lock each: a walk
//! through all of it holds up a connecting device for no longer than a shard takes. What changes is queued for the
//! database: see [`queue`].

use std::{
    collections::{BTreeMap, BinaryHeap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use rand::Rng as _;
use seawall_proto::{
    close::EndReason,
    cohorts::{Past, RETURN_WITHIN},
    id::{DeviceId, SessionId},
    presence::{Cause, Evidence, Known, Presence},
    time::{Instant, WallTime},
};

use self::{
    groups::{Group, Groups},
    packed::Kept,
    queue::{QUEUE_LEN_MAX, Queue, Transition},
};
use crate::{
    fleet::cohorts::{Cohort, Outcome},
    store::{PresenceState, Reason},
};

pub mod groups;
mod packed;
pub mod queue;

/// Attempts kept for each device.
pub const ATTEMPTS_MAX: usize = 20;
/// Maximum number of known devices. A full table takes 85 MB, and up to 240 MB where every device has all its attempts.
pub const KNOWN_MAX: usize = 1_250_000;
/// Ids in one generation of those that were never authenticated; at most two generations are kept.
const STRANGERS_MAX: usize = 5_000;
/// Shards of known devices: a power of two. With a million of them a shard has 1,000. Inserting one moves
/// 64 KB at most, and a walk through it takes some microseconds.
const SHARDS: usize = 1 << SHARD_BITS;
const SHARD_BITS: u32 = 10;
/// Shards of unknown ids: a power of two.
const STRANGER_SHARDS: usize = 16;
/// A shard that is full grows by an eighth: a vector that doubles is a third empty, on average.
const GROWTH_MIN: usize = 4;

/// One connect attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    pub at: WallTime,
    pub outcome: Outcome,
}

/// The end of a device's last session here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offline {
    /// For people. Spans are reckoned from [`at`](Self::at): the wall clock may be set.
    pub since: WallTime,
    /// In whole seconds.
    pub at: Instant,
    pub reason: EndReason,
    pub evidence: Evidence,
    /// The device's past, this session included.
    pub past: Past,
}

/// A session of a device that begins.
#[derive(Debug, Clone, Copy)]
pub struct Began<'a> {
    pub session: SessionId,
    pub group: &'a Arc<Group>,
    pub since: WallTime,
    pub at: Instant,
}

/// What a session that begins changed.
#[derive(Debug, Clone)]
pub struct CameOnline {
    /// `Some` if the device had another session until a short time ago: see [`RETURN_WITHIN`]. Then its past, without a
    /// session that has not ended.
    pub returned: Option<Past>,
    /// Whether the device was online in an older session.
    pub was_online: bool,
    /// The session's id, or the epoch by which this node claimed the device.
    pub epoch: SessionId,
    pub group: Arc<Group>,
}

/// A change of a device's presence that this node knew nothing newer than.
#[derive(Debug, Clone)]
pub struct Change {
    pub known: Known,
    pub reason: Reason,
    pub group: Arc<Group>,
}

/// What became of a state that the database has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restored {
    /// It is known, or something newer is.
    Known,
    /// The device is unknown until it returns, here or elsewhere. Not `is_new`: it was before.
    Awaited { is_new: bool },
    /// The device's socket is here, and the stored epoch is greater: it is to be [claimed](History::claim).
    Outdone,
}

/// Why the socket behind a stored state is gone.
#[derive(Debug, Clone, Copy)]
pub struct Lost {
    pub cause: Cause,
    pub at: WallTime,
    /// Number of the stored state, if another node than this one wrote it.
    pub concluded_from: Option<u64>,
}

/// All that is remembered of one device.
#[derive(Debug, Clone)]
pub struct Record {
    /// Oldest first.
    pub attempts: Vec<Attempt>,
    pub known: Known,
    /// Of the last transition.
    pub reason: Reason,
    /// Where its last session was here, and has ended.
    pub offline: Option<Offline>,
    /// What it was when it had a session last; `None` where it had none.
    pub group: Option<Arc<Group>>,
}

/// All that is remembered.
#[derive(Debug)]
pub struct History {
    /// Each ascending by device.
    shards: Box<[Mutex<Vec<Kept>>]>,
    unknown_ids: Box<[Mutex<UnknownIds>]>,
    groups: Groups,
    queue: Queue,
    known_max: usize,
    known_len: AtomicUsize,
}

/// Attempts of ids that were never authenticated, in two generations: the older is dropped whole when the younger is
/// full.
#[derive(Debug, Default)]
struct UnknownIds {
    young: BTreeMap<DeviceId, Kept>,
    old: BTreeMap<DeviceId, Kept>,
}

impl Default for History {
    fn default() -> Self {
        Self::with_bounds(KNOWN_MAX, QUEUE_LEN_MAX)
    }
}

impl History {
    /// With these bounds: other ones than the usual ones are for tests.
    #[must_use]
    pub fn with_bounds(known_max: usize, queue_len_max: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            unknown_ids: (0..STRANGER_SHARDS).map(|_| Mutex::default()).collect(),
            groups: Groups::default(),
            queue: Queue::new(queue_len_max),
            known_max,
            known_len: AtomicUsize::new(0),
        }
    }

    /// A device was admitted: from now on it is known.
    pub fn admitted(&self, device: DeviceId, at: WallTime) {
        let before = self.unknown(device).remove(device);
        self.with(device, |kept| {
            for attempt in before.map(|kept| kept.record().attempts).unwrap_or_default() {
                kept.push(attempt);
            }
            kept.push(Attempt {
                at,
                outcome: Outcome::Admitted,
            });
        });
    }

    /// A device was refused, or left before its answer. The cohort of its last session here, where it had one.
    pub fn refused(&self, device: DeviceId, at: WallTime, outcome: Outcome) -> Option<Arc<Cohort>> {
        let attempt = Attempt { at, outcome };
        {
            let mut shard = self.shard(device);
            if let Ok(index) = find(&shard, device) {
                let kept = &mut shard[index];
                kept.push(attempt);
                return kept.group.as_ref().map(|group| Arc::clone(&group.cohort));
            }
        }
        self.unknown(device).entry(device).push(attempt);
        None
    }

    /// The greatest epoch that is known of a device. A session that begins gets a greater one.
    #[must_use]
    pub fn epoch(&self, device: DeviceId) -> SessionId {
        let shard = self.shard(device);
        find(&shard, device).map_or(Known::NEVER_SEEN.epoch, |index| shard[index].known().epoch)
    }

    /// A device has a session. Its socket is here, so nothing that another node reported counts more: if a greater epoch
    /// is known, the device is claimed with one of `above`, which returns an epoch greater than the known one.
    pub fn came_online(
        &self,
        device: DeviceId,
        began: Began<'_>,
        above: impl FnOnce(SessionId) -> SessionId,
    ) -> CameOnline {
        let group = Arc::clone(began.group);
        self.with(device, |kept| {
            let before = kept.known();
            let returned = match (before.presence, kept.ended()) {
                (Presence::Offline(_), Some((at, past))) => {
                    (began.at.saturating_since(at) < RETURN_WITHIN).then_some(past)
                }
                (Presence::Online | Presence::Unknown(Cause::Path | Cause::NodeLagging), _) => Some(Past::default()),
                (Presence::Offline(_) | Presence::Unknown(_), _) => None,
            };
            let was_online = before.presence == Presence::Online;
            let reason = if was_online {
                EndReason::Replaced.into()
            } else {
                Reason::CONNECTED
            };
            let is_newest = before.epoch < began.session;
            let epoch = if is_newest { began.session } else { above(before.epoch) };
            let known = Known {
                epoch,
                presence: Presence::Online,
                since: began.since,
            };
            if self.change(kept, known, reason, Some(Arc::clone(&group)), Writing::Queued) && !is_newest {
                kept.set_claim(began.session);
            }
            CameOnline {
                returned,
                was_online,
                epoch,
                group,
            }
        })
    }

    /// A device's newest session ended.
    pub fn went_offline(&self, device: DeviceId, session: SessionId, offline: Offline) -> Option<Change> {
        let known = Known {
            epoch: session,
            presence: Presence::Offline(offline.evidence),
            since: offline.since,
        };
        self.with(device, |kept| {
            if !self.change(kept, known, offline.reason.into(), None, Writing::Queued) {
                return None;
            }
            kept.set_ended(offline.at, offline.past);
            kept.change()
        })
    }

    /// Takes a report about a device's session here.
    pub fn handle(&self, device: DeviceId, report: Known, reason: Reason) -> Option<Change> {
        let mut shard = self.shard(device);
        let index = find(&shard, device).ok()?;
        let kept = &mut shard[index];
        let is_new = self.change(kept, report, reason, None, Writing::Queued);
        kept.change().filter(|_| is_new)
    }

    /// Claims a device whose socket is here, if `stored`, which the database has of it, is greater than its epoch:
    /// `above` returns one that is greater still. Its state stays as it is.
    pub fn claim(
        &self,
        device: DeviceId,
        stored: SessionId,
        above: impl FnOnce(SessionId) -> SessionId,
    ) -> Option<Change> {
        let mut shard = self.shard(device);
        let index = find(&shard, device).ok()?;
        let kept = &mut shard[index];
        let (known, session) = (kept.known(), kept.session());
        if !known.is_held() || known.epoch >= stored {
            return None;
        }
        let claimed = Known {
            epoch: above(stored),
            ..known
        };
        kept.set(claimed, kept.reason());
        kept.set_claim(session);
        self.enqueue(kept, known.since);
        kept.change()
    }

    /// Takes what the database has of a device whose socket is lost. It is not written again, unless the device is unknown
    /// now.
    pub fn restore(&self, stored: Stored<'_>, lost: Lost) -> Restored {
        let group = Arc::clone(stored.group);
        self.with(stored.device, |kept| {
            let before = kept.known();
            if before.is_held() {
                return if before.epoch < stored.known.epoch {
                    Restored::Outdone
                } else {
                    Restored::Known
                };
            }
            self.change(kept, stored.known, stored.reason, Some(group), Writing::Stored);
            let is_it = kept.known().epoch == stored.known.epoch;
            let unknown = kept.known().left_behind(lost.cause, lost.at).filter(|_| is_it);
            if let Some(known) = unknown {
                let writing = lost.concluded_from.map_or(Writing::Queued, Writing::Concluded);
                self.change(kept, known, lost.cause.into(), None, writing);
            }
            let is_awaited = |known: Known| known.given_up(known.since).is_some();
            if is_awaited(kept.known()) {
                Restored::Awaited {
                    is_new: !is_awaited(before),
                }
            } else {
                Restored::Known
            }
        })
    }

    /// A device did not return after a restart of its node: it is offline. `None` if it did. `concluded_from`: see
    /// [`Lost`].
    pub fn give_up(&self, device: DeviceId, at: WallTime, concluded_from: Option<u64>) -> Option<Change> {
        let mut shard = self.shard(device);
        let index = find(&shard, device).ok()?;
        let kept = &mut shard[index];
        let known = kept.known().given_up(at)?;
        let writing = concluded_from.map_or(Writing::Queued, Writing::Concluded);
        self.change(kept, known, Reason::NOT_BACK, None, writing);
        kept.change()
    }

    /// Leaves a device that is waited for to the node that knows more of it. Its attempts are kept.
    pub fn leave(&self, device: DeviceId) {
        let mut shard = self.shard(device);
        let Ok(index) = find(&shard, device) else { return };
        let kept = &mut shard[index];
        let known = kept.known();
        // Nobody else waits for it.
        if known.given_up(known.since).is_some() {
            self.drop_state(kept);
        }
    }

    /// Leaves a device to the node of a newer session, if `has_moved` holds for what is known of it. Its attempts are
    /// kept.
    pub fn leave_moved(&self, device: DeviceId, has_moved: impl FnOnce(&Known) -> bool) {
        let mut shard = self.shard(device);
        let Ok(index) = find(&shard, device) else { return };
        let kept = &mut shard[index];
        if kept.group.is_some() && has_moved(&kept.known()) {
            self.drop_state(kept);
        }
    }

    /// The device is no longer counted here. Its epoch stays.
    fn drop_state(&self, kept: &mut Kept) {
        if let Some(group) = kept.group.take() {
            self.groups.remove(&group, kept.state());
        }
        let never = Known {
            epoch: kept.known().epoch,
            ..Known::NEVER_SEEN
        };
        kept.set(never, Reason::OTHER);
    }

    /// The registry has a device with this tenant and model: from now on it is counted and listed by them.
    pub fn handle_registered(&self, device: DeviceId, tenant: &Arc<str>, model: Option<&str>) {
        let mut shard = self.shard(device);
        let Ok(index) = find(&shard, device) else { return };
        let kept = &mut shard[index];
        let is_other = |group: &&Arc<Group>| group.tenant != *tenant || group.model.as_deref() != model;
        let Some(before) = kept.group.as_ref().filter(is_other) else {
            return;
        };
        let after = self.groups.of(&before.cohort, tenant, model);
        self.groups.remove(before, kept.state());
        self.groups.add(&after, kept.state());
        kept.group = Some(after);
    }

    /// Queues the states of all devices whose sockets are here, at the pace of the writer: another node may have
    /// overwritten them.
    pub fn repeat_held(&self) {
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            for kept in shard.iter_mut().filter(|kept| kept.known().is_held()) {
                kept.set_unsaved();
            }
        }
        self.queue.set_behind(true);
    }

    /// What a device is known as: `None` before its first session.
    #[must_use]
    pub fn group(&self, device: DeviceId) -> Option<Arc<Group>> {
        let shard = self.shard(device);
        let index = find(&shard, device).ok()?;
        shard[index].group.clone()
    }

    #[must_use]
    pub fn record(&self, device: DeviceId) -> Option<Record> {
        {
            let shard = self.shard(device);
            if let Ok(index) = find(&shard, device) {
                return Some(shard[index].record());
            }
        }
        self.unknown(device).get(device).map(Kept::record)
    }

    /// Devices that have been authenticated and are remembered.
    #[must_use]
    pub fn known_len(&self) -> usize {
        self.known_len.load(Ordering::Relaxed)
    }

    /// Known devices by what they are, with their presence.
    #[must_use]
    pub const fn groups(&self) -> &Groups {
        &self.groups
    }

    /// What the database does not have yet.
    #[must_use]
    pub const fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Known devices, one at random of each shard, which begin at a random one. The shards number 1,024.
    pub fn sample(&self) -> impl Iterator<Item = DeviceId> {
        let mut rng = rand::rng();
        let first = rng.random_range(0..SHARDS);
        let shards = self.shards[first..].iter().chain(&self.shards[..first]);
        shards.filter_map(move |shard| {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            let len = shard.len();
            (len > 0).then(|| shard[rng.random_range(0..len)].device)
        })
    }

    /// Known devices from `first` on for which `wanted` holds, in the order of ids, at most `len`. `wanted` is asked
    /// once for each group. `state`: only devices in it. With a million devices it takes up to some 30 ms: not for an
    /// async task.
    #[must_use]
    pub fn page(
        &self,
        first: Option<DeviceId>,
        len: usize,
        state: Option<PresenceState>,
        wanted: impl Fn(&Group) -> bool,
    ) -> Vec<DeviceId> {
        let wanted = self.groups.matching(wanted);
        self.ids(first, len, |kept| {
            let is_in = state.is_none_or(|state| kept.state() == state);
            is_in && kept.group.as_ref().is_some_and(|group| wanted.has(group))
        })
    }

    /// Known devices from `first` on without a socket here, in the order of ids, at most `len`. It takes as long as
    /// [`page`](Self::page).
    #[must_use]
    pub fn away(&self, first: Option<DeviceId>, len: usize) -> Vec<DeviceId> {
        self.ids(first, len, |kept| kept.group.is_some() && !kept.known().is_held())
    }

    fn ids(&self, first: Option<DeviceId>, len: usize, is_wanted: impl Fn(&Kept) -> bool) -> Vec<DeviceId> {
        // The greatest is on top: what is greater can't be on the page, once that is full.
        let mut page = BinaryHeap::with_capacity(len + 1);
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            let start = first.map_or(0, |first| shard.partition_point(|kept| kept.device < first));
            for kept in &shard[start..] {
                let is_full = page.len() == len;
                if is_full && page.peek().is_none_or(|last| kept.device >= *last) {
                    break;
                }
                if is_wanted(kept) {
                    if is_full {
                        page.pop();
                    }
                    page.push(kept.device);
                }
            }
        }
        page.into_sorted_vec()
    }

    /// Queues the newest state of devices of which a transition was dropped, while there is room in the queue.
    pub fn catch_up(&self) {
        if !self.queue.is_behind() {
            return;
        }
        // All that is dropped from here on sets it again.
        self.queue.set_behind(false);
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            for kept in shard.iter_mut().filter(|kept| kept.is_unsaved()) {
                if self.queue.room() == 0 {
                    self.queue.set_behind(true);
                    return;
                }
                let known = kept.known();
                self.enqueue(kept, known.since);
            }
        }
    }

    /// Forgets a device that was deleted from the registry.
    pub fn forget(&self, device: DeviceId) {
        self.unknown(device).remove(device);
        let mut shard = self.shard(device);
        if let Ok(index) = find(&shard, device) {
            let kept = shard.remove(index);
            self.uncount(&kept);
        }
        // Behind the lock: what is queued of it before is forgotten, and what comes later is of a new device.
        self.queue.forget(device);
    }

    /// Takes a report, if it is newer than what is known, and counts it.
    fn change(
        &self,
        kept: &mut Kept,
        mut report: Known,
        reason: Reason,
        group: Option<Arc<Group>>,
        writing: Writing,
    ) -> bool {
        let mut known = kept.known();
        let before = kept.state();
        let session = kept.session();
        let is_claimed = report.epoch == session && known.epoch != session;
        if is_claimed {
            report.epoch = known.epoch;
        }
        if !known.handle(report) {
            return false;
        }
        let was_unsaved = kept.is_unsaved();
        kept.set(known, reason);
        if is_claimed && kept.state() != PresenceState::Offline {
            kept.set_claim(session);
        }
        if was_unsaved {
            kept.set_unsaved();
        }
        if let Some(group) = &kept.group {
            self.groups.remove(group, before);
        }
        if group.is_some() {
            kept.group = group;
        }
        if let Some(group) = &kept.group {
            self.groups.add(group, kept.state());
        }
        match writing {
            Writing::Stored => {}
            Writing::Queued => self.enqueue(kept, report.since),
            Writing::Concluded(stored) => {
                let number = known.concluded_number(stored);
                // Where there is no room, the next start of a node concludes the same.
                if let Some(transition) = transition(kept, report.since, number) {
                    self.queue.push(transition);
                }
            }
        }
        true
    }

    fn enqueue(&self, kept: &mut Kept, at: WallTime) {
        let Some(transition) = transition(kept, at, 0) else {
            return;
        };
        if self.queue.push(transition) {
            kept.set_saved();
        } else {
            kept.set_unsaved();
        }
    }

    /// Runs `work` on the record of a device, which is made if it is new.
    fn with<T>(&self, device: DeviceId, work: impl FnOnce(&mut Kept) -> T) -> T {
        let mut shard = self.shard(device);
        let index = match find(&shard, device) {
            Ok(index) => index,
            Err(mut index) => {
                if shard.len() >= (self.known_max / SHARDS).max(1)
                    && let Some(oldest) = longest_away(&shard)
                {
                    let gone = shard.remove(oldest);
                    self.uncount(&gone);
                    if gone.is_unsaved() {
                        self.queue.count_dropped(1);
                    }
                    index -= usize::from(oldest < index);
                }
                if shard.len() == shard.capacity() {
                    let more = GROWTH_MIN.max(shard.len() / 8);
                    shard.reserve_exact(more);
                }
                shard.insert(index, Kept::new(device));
                self.known_len.fetch_add(1, Ordering::Relaxed);
                index
            }
        };
        work(&mut shard[index])
    }

    fn uncount(&self, kept: &Kept) {
        self.known_len.fetch_sub(1, Ordering::Relaxed);
        if let Some(group) = &kept.group {
            self.groups.remove(group, kept.state());
        }
    }

    fn shard(&self, device: DeviceId) -> MutexGuard<'_, Vec<Kept>> {
        let index = hash(device) >> (u64::BITS - SHARD_BITS);
        let index = usize::try_from(index).unwrap_or_default();
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unknown(&self, device: DeviceId) -> MutexGuard<'_, UnknownIds> {
        let index = usize::from(device.as_bytes()[15]) % STRANGER_SHARDS;
        self.unknown_ids[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a change gets into the database.
#[derive(Debug, Clone, Copy)]
enum Writing {
    /// It is there.
    Stored,
    Queued,
    /// As the next one after the stored number, since it is about the session of another node: the next word of that
    /// node counts more.
    Concluded(u64),
}

/// `number`: 0 if the queue gives it one.
fn transition(kept: &Kept, at: WallTime, number: u64) -> Option<Transition> {
    Some(Transition {
        device: kept.device,
        known: kept.known(),
        at,
        reason: kept.reason(),
        number,
        group: Arc::clone(kept.group.as_ref()?),
    })
}

/// Presence of a device as the database has it.
#[derive(Debug, Clone, Copy)]
pub struct Stored<'a> {
    pub device: DeviceId,
    pub known: Known,
    pub reason: Reason,
    pub group: &'a Arc<Group>,
}

fn find(shard: &[Kept], device: DeviceId) -> Result<usize, usize> {
    shard.binary_search_by(|kept| kept.device.cmp(&device))
}

/// The device that makes room: its socket is not here, and it has been away for longest. One whose newest state waits for
/// room in the queue comes last: the database has an older one.
fn longest_away(shard: &[Kept]) -> Option<usize> {
    let away = shard.iter().enumerate().filter(|(_, kept)| !kept.known().is_held());
    away.min_by_key(|(_, kept)| (kept.is_unsaved(), kept.known().since))
        .map(|(index, _)| index)
}

/// Spreads ids, which may follow each other.
fn hash(device: DeviceId) -> u64 {
    let (high, low) = device.as_uuid().as_u64_pair();
    let mixed = (high ^ low.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

impl UnknownIds {
    fn get(&self, device: DeviceId) -> Option<&Kept> {
        self.young.get(&device).or_else(|| self.old.get(&device))
    }

    fn remove(&mut self, device: DeviceId) -> Option<Kept> {
        self.young.remove(&device).or_else(|| self.old.remove(&device))
    }

    /// Whatever is kept of an id, in the young generation.
    fn entry(&mut self, device: DeviceId) -> &mut Kept {
        if !self.young.contains_key(&device) && self.young.len() >= STRANGERS_MAX / STRANGER_SHARDS {
            self.old = std::mem::take(&mut self.young);
        }
        let old = &mut self.old;
        self.young
            .entry(device)
            .or_insert_with(|| old.remove(&device).unwrap_or_else(|| Kept::new(device)))
    }
}

#[cfg(test)]
mod tests;
