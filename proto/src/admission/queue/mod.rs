//! Devices that wait for a lookup, and keys in flight: order of service, one lookup for each key, batches, retries.
//!
//! Keys wait, not devices: several devices that ask for one key wait for one lookup. Keys of an isolated cohort
//! (see [`super::cost`]) have a queue and statements of their own. Start with [`Queue`]. It knows neither limits
//! nor slots; see [`super::Admission`].

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Bound,
};

mod by_class;
mod sending;

use by_class::ByClass;
use sending::Retry;
pub use sending::{Batch, BatchId};
pub(super) use sending::{Kind, Sent};

use super::cost::CohortTag;
use crate::{
    id::{DeviceId, Network, Proof},
    slots::{Standing, TenantTag, Weights},
    time::Instant,
};

/// Maximum number of devices that wait for one key. A device has one connection, or two while it replaces the first.
const WAITERS_PER_KEY_MAX: usize = 8;

/// Id of a device that waits for an answer. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// Classes in their order of service. `Express` and `UnknownHolder` also have a guaranteed share of the keys (see
/// [`Queue::next_batch`]). Within a class tenants take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    /// Known devices at their slot.
    Holder,
    /// Holders that were often refused, by the time of their first refusal.
    Express,
    /// Known devices without a due slot.
    WalkIn,
    /// Unknown devices at their slot.
    UnknownHolder,
    /// Unknown devices without a due slot.
    UnknownWalkIn,
}

impl Class {
    const COUNT: usize = 5;
    pub const ALL: [Self; Self::COUNT] = [
        Self::Holder,
        Self::Express,
        Self::WalkIn,
        Self::UnknownHolder,
        Self::UnknownWalkIn,
    ];

    /// Whether a key of this class is served earlier than one of `other`. `Express` is the best: it has a guaranteed
    /// share and is also served among the holders.
    const fn is_better_than(self, other: Self) -> bool {
        self.rank() < other.rank()
    }

    const fn rank(self) -> usize {
        match self {
            Self::Express => 0,
            Self::Holder => 1,
            Self::WalkIn | Self::UnknownHolder | Self::UnknownWalkIn => self as usize,
        }
    }

    /// Whether only known devices wait in it.
    const fn is_of_known(self) -> bool {
        matches!(self, Self::Holder | Self::Express | Self::WalkIn)
    }
}

/// A device that waits for its answer.
#[derive(Debug)]
pub(super) struct Waiter<W> {
    pub device: DeviceId,
    pub proof: Proof,
    pub network: Network,
    pub cohort: CohortTag,
    pub standing: Standing,
    /// Time after which its key is not sent.
    pub send_by: Instant,
    /// Time by which it is answered in any case.
    pub answer_by: Instant,
    /// The caller's data for it.
    pub kept: W,
}

#[derive(Debug)]
struct Key {
    /// At most [`WAITERS_PER_KEY_MAX`].
    waiters: Vec<Ticket>,
    /// Ticket of the first device that asked. It decides on the key's position.
    first: Ticket,
    /// Cohort of the first device that asked, unless another moved the key out of an isolated cohort's queue.
    cohort: CohortTag,
    /// Tenant from whose share it is served.
    tenant: Option<TenantTag>,
    state: KeyState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KeyState {
    Waiting(Place),
    /// Its statement failed, and it waits for a second try.
    Retrying {
        round: u64,
    },
    InFlight {
        batch: BatchId,
    },
}

/// Where a key waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    queue: QueueOf,
    class: Class,
    position: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum QueueOf {
    /// All keys of a class.
    All,
    /// The keys of an isolated cohort.
    Cohort,
}

/// Cohort and tenant of a key.
type Group = (CohortTag, Option<TenantTag>);

/// A device that waits with others for one key.
#[derive(Debug)]
pub(super) struct Joined {
    pub ticket: Ticket,
    /// The device that no longer waits, because more than [`WAITERS_PER_KEY_MAX`] would. The caller refuses it.
    pub displaced: Option<Ticket>,
}

/// Progress of a device at its deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Late {
    /// Its key was not sent.
    NotSent,
    /// Its lookup failed, or was not answered in time.
    NotAnswered,
}

/// A device leaves in two steps: when its answer is known it no longer waits for its key, and when the caller fetches
/// the answer it is [taken](Self::take).
#[derive(Debug)]
pub(super) struct Queue<W> {
    counter: u64,
    /// Devices without an answer, and those whose answer was not fetched. Bounded by `waiting_max`.
    waiters: BTreeMap<Ticket, Waiter<W>>,
    /// At most one for each waiter, and those in flight.
    keys: BTreeMap<DeviceId, Key>,
    by_class: ByClass,
    weights: Weights,
    /// None is empty.
    isolated: BTreeMap<CohortTag, BTreeMap<(Class, u64), DeviceId>>,
    /// The isolated cohort that was served last.
    isolated_served: Option<CohortTag>,
    retries: VecDeque<Retry>,
    /// One for each device without an answer.
    deadlines: BTreeSet<(Instant, Ticket)>,
    sent: BTreeMap<BatchId, Sent>,
    in_flight: usize,
    isolated_in_flight: usize,
    taken: u32,
}

impl<W> Queue<W> {
    pub fn new(weights: Weights) -> Self {
        Self {
            weights,
            counter: 0,
            waiters: BTreeMap::new(),
            keys: BTreeMap::new(),
            by_class: ByClass::default(),
            isolated: BTreeMap::new(),
            isolated_served: None,
            retries: VecDeque::new(),
            deadlines: BTreeSet::new(),
            sent: BTreeMap::new(),
            in_flight: 0,
            isolated_in_flight: 0,
            taken: 0,
        }
    }

    /// Number of devices that wait for an answer.
    pub fn len(&self) -> usize {
        self.waiters.len()
    }

    /// The devices that wait for an answer, by arrival.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = (Ticket, &W)> {
        self.waiters.iter().map(|(ticket, waiter)| (*ticket, &waiter.kept))
    }

    /// Number of waiting keys of these classes, isolated cohorts left out.
    pub fn classes_len(&self, classes: &[Class]) -> usize {
        classes.iter().map(|class| self.by_class.len(*class)).sum()
    }

    /// Number of keys sent and not answered.
    pub const fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Number of those that were sent in the statement of an isolated cohort. There is one at a time.
    pub const fn isolated_in_flight(&self) -> usize {
        self.isolated_in_flight
    }

    /// Number of those that were sent in statements for all.
    pub const fn shared_in_flight(&self) -> usize {
        self.in_flight - self.isolated_in_flight
    }

    /// Number of statements for all that were sent and not answered.
    pub fn batches_in_flight(&self) -> usize {
        self.sent.len() - usize::from(self.isolated_in_flight > 0)
    }

    /// The oldest statement that is not answered, with the time at which it was sent.
    pub fn oldest_statement(&self) -> Option<(BatchId, Instant)> {
        self.sent.first_key_value().map(|(id, sent)| (*id, sent.sent_at))
    }

    /// Number of waiting keys of an isolated cohort.
    pub fn isolated_len(&self, cohort: CohortTag) -> usize {
        self.isolated.get(&cohort).map_or(0, BTreeMap::len)
    }

    /// The next isolated cohort with a key to send.
    pub fn next_isolated(&self) -> Option<CohortTag> {
        let after = self.isolated_served.map_or(Bound::Unbounded, Bound::Excluded);
        let next = self.isolated.range((after, Bound::Unbounded)).next();
        next.or_else(|| self.isolated.first_key_value())
            .map(|(cohort, _)| *cohort)
    }

    /// Whether keys wait for a statement for all, or for a second try.
    pub fn has_unsent(&self) -> bool {
        self.has_retries() || !self.by_class.is_empty()
    }

    /// Whether keys of a failed statement wait for a second try.
    pub fn has_retries(&self) -> bool {
        !self.retries.is_empty()
    }

    /// Number of keys that wait for a statement for all.
    pub fn unsent(&self) -> usize {
        self.classes_len(&Class::ALL)
    }

    pub fn holds(&self, device: DeviceId) -> bool {
        self.keys.contains_key(&device)
    }

    /// Whether the key for which the device waits is in flight.
    pub fn is_sent(&self, ticket: Ticket) -> bool {
        let key = self
            .waiters
            .get(&ticket)
            .and_then(|waiter| self.keys.get(&waiter.device));
        key.is_some_and(|key| matches!(key.state, KeyState::InFlight { .. }) && key.waiters.contains(&ticket))
    }

    /// Makes a device wait with others for the same key. A device that would be served earlier on its own moves the key
    /// forward. A device that is not of an isolated cohort moves the key out of that cohort's queue. Returns `None` if
    /// no device waits for the key.
    ///
    /// If too many wait for the key, one of them stops waiting; see [`Joined::displaced`].
    pub fn join(&mut self, waiter: Waiter<W>, class: Option<Class>, is_isolated: bool) -> Option<Joined> {
        let device = waiter.device;
        let displaced = self.displaced_by(&waiter);
        if let Some(displaced) = displaced {
            self.leave_key(displaced);
        }
        let ticket = self.next_ticket();
        let key = self.keys.get_mut(&device)?;
        key.waiters.push(ticket);
        if let (KeyState::Waiting(from), Some(class)) = (key.state, class) {
            // An unknown device must not move keys of an isolated cohort to the shared queue.
            let is_freed = from.queue == QueueOf::Cohort && !is_isolated && class.is_of_known();
            if is_freed || class.is_better_than(from.class) {
                let group = (key.cohort, key.tenant);
                let to = Place {
                    queue: if is_freed { QueueOf::All } else { from.queue },
                    class,
                    position: position_in(class, &waiter.standing, key.first),
                };
                if is_freed {
                    key.cohort = waiter.cohort;
                }
                key.tenant = waiter.standing.tenant;
                key.state = KeyState::Waiting(to);
                let group_to = (key.cohort, key.tenant);
                self.remove_waiting(group, from);
                self.insert_waiting(group_to, to, device);
            }
        }
        self.wait(ticket, waiter);
        Some(Joined { ticket, displaced })
    }

    /// The device that stops waiting if `waiter` is one too many for its key: the oldest of the network with the most.
    /// So a client that asks for another device's key again and again displaces only itself.
    fn displaced_by(&self, waiter: &Waiter<W>) -> Option<Ticket> {
        let key = self.keys.get(&waiter.device)?;
        if key.waiters.len() < WAITERS_PER_KEY_MAX {
            return None;
        }
        let network_of = |ticket: &Ticket| self.waiters.get(ticket).map(|waiter| waiter.network);
        let mut of_network: BTreeMap<Network, (usize, Ticket)> = BTreeMap::new();
        for ticket in &key.waiters {
            let (count, _) = of_network.entry(network_of(ticket)?).or_insert((0, *ticket));
            *count += 1;
        }
        if let Some((count, _)) = of_network.get_mut(&waiter.network) {
            *count += 1;
        }
        let most = of_network
            .values()
            .max_by_key(|(count, oldest)| (*count, Reverse(*oldest)));
        most.map(|(_, oldest)| *oldest)
    }

    /// Makes a device wait at the end of its class, or of its cohort's queue if that is isolated.
    pub fn enqueue(&mut self, waiter: Waiter<W>, class: Class, is_isolated: bool) -> Ticket {
        debug_assert!(!self.holds(waiter.device), "one key, one place");
        let (device, cohort, tenant) = (waiter.device, waiter.cohort, waiter.standing.tenant);
        let ticket = self.next_ticket();
        let place = Place {
            queue: if is_isolated { QueueOf::Cohort } else { QueueOf::All },
            class,
            position: position_in(class, &waiter.standing, ticket),
        };
        self.keys.insert(
            device,
            Key {
                waiters: vec![ticket],
                first: ticket,
                cohort,
                tenant,
                state: KeyState::Waiting(place),
            },
        );
        self.insert_waiting((cohort, tenant), place, device);
        self.wait(ticket, waiter);
        ticket
    }

    /// The device no longer waits for its key. A key for which no device waits is not sent.
    pub fn leave(&mut self, ticket: Ticket) {
        if let Some(device) = self.leave_key(ticket)
            && self.keys.get(&device).is_some_and(|key| key.waiters.is_empty())
        {
            self.drop_key(device);
        }
    }

    /// The device no longer waits for its key, which stays where it is.
    fn leave_key(&mut self, ticket: Ticket) -> Option<DeviceId> {
        self.stop_deadline(ticket);
        let device = self.waiters.get(&ticket)?.device;
        if let Some(key) = self.keys.get_mut(&device) {
            key.waiters.retain(|other| *other != ticket);
        }
        Some(device)
    }

    /// Drops the newest key of the tenant that has the most for its weight, if `tenant` has fewer. Returns the
    /// devices that waited for it.
    pub fn make_room(&mut self, class: Class, tenant: Option<TenantTag>) -> Vec<Ticket> {
        let newest = self.by_class.newest_of_longest(class, tenant, &self.weights);
        let Some(key) = newest.and_then(|device| self.keys.get(&device)) else {
            return Vec::new();
        };
        let tickets = key.waiters.clone();
        for ticket in &tickets {
            self.leave(*ticket);
        }
        tickets
    }

    /// Forgets a key for which no device waits, unless it is in flight.
    fn drop_key(&mut self, device: DeviceId) {
        let Some(key) = self.keys.get(&device) else {
            return;
        };
        match key.state {
            KeyState::InFlight { .. } => return,
            KeyState::Waiting(place) => self.remove_waiting((key.cohort, key.tenant), place),
            KeyState::Retrying { .. } => {}
        }
        self.keys.remove(&device);
    }

    fn insert_waiting(&mut self, (cohort, tenant): Group, place: Place, device: DeviceId) {
        match place.queue {
            QueueOf::All => self.by_class.insert(place.class, tenant, place.position, device),
            QueueOf::Cohort => {
                let own = self.isolated.entry(cohort).or_default();
                own.insert((place.class, place.position), device);
            }
        }
    }

    fn remove_waiting(&mut self, (cohort, tenant): Group, place: Place) {
        match place.queue {
            QueueOf::All => self.by_class.remove(place.class, tenant, place.position),
            QueueOf::Cohort => {
                if let Some(own) = self.isolated.get_mut(&cohort) {
                    own.remove(&(place.class, place.position));
                    if own.is_empty() {
                        self.isolated.remove(&cohort);
                    }
                }
            }
        }
    }

    /// Moves the waiting keys of a cohort to a queue of their own, or back to their classes.
    pub fn set_isolated(&mut self, cohort: CohortTag, is_isolated: bool) {
        let queue = if is_isolated { QueueOf::Cohort } else { QueueOf::All };
        let mut moved = Vec::new();
        for (device, key) in self.keys.iter_mut().filter(|(_, key)| key.cohort == cohort) {
            if let KeyState::Waiting(from) = key.state
                && from.queue != queue
            {
                let to = Place { queue, ..from };
                key.state = KeyState::Waiting(to);
                moved.push((*device, (key.cohort, key.tenant), from, to));
            }
        }
        for (device, group, from, to) in moved {
            self.remove_waiting(group, from);
            self.insert_waiting(group, to, device);
        }
    }

    /// Removes the next device whose deadline has passed. It no longer waits for its key.
    pub fn pop_late(&mut self, now: Instant) -> Option<(Ticket, Late)> {
        loop {
            let (due, ticket) = *self.deadlines.first()?;
            if due > now {
                return None;
            }
            self.deadlines.pop_first();
            let Some(waiter) = self.waiters.get(&ticket) else {
                debug_assert!(false, "a deadline has a device that waits");
                continue;
            };
            let state = self.keys.get(&waiter.device).map(|key| key.state);
            let late = match state {
                Some(KeyState::InFlight { .. }) if waiter.answer_by > now => {
                    self.deadlines.insert((waiter.answer_by, ticket));
                    continue;
                }
                Some(KeyState::InFlight { .. } | KeyState::Retrying { .. }) | None => Late::NotAnswered,
                Some(KeyState::Waiting(_)) => Late::NotSent,
            };
            self.leave(ticket);
            return Some((ticket, late));
        }
    }

    /// Time of the next deadline.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(due, _)| *due)
    }

    /// Stops all waiting, for sent and unsent keys. Returns the devices that waited, by arrival.
    pub fn drain(&mut self) -> Vec<Ticket> {
        let waiting = std::mem::take(&mut self.deadlines);
        let mut waiting: Vec<Ticket> = waiting.into_iter().map(|(_, ticket)| ticket).collect();
        waiting.sort_unstable();
        self.retries.clear();
        self.by_class.clear();
        self.isolated.clear();
        self.keys
            .retain(|_, key| matches!(key.state, KeyState::InFlight { .. }));
        for key in self.keys.values_mut() {
            key.waiters.clear();
        }
        waiting
    }

    /// Removes the device of a ticket, which does not wait for its key.
    pub fn take(&mut self, ticket: Ticket) -> Option<Waiter<W>> {
        self.waiters.remove(&ticket)
    }

    fn stop_deadline(&mut self, ticket: Ticket) {
        if let Some(waiter) = self.waiters.get(&ticket)
            && !self.deadlines.remove(&(waiter.send_by, ticket))
        {
            self.deadlines.remove(&(waiter.answer_by, ticket));
        }
    }

    fn wait(&mut self, ticket: Ticket, waiter: Waiter<W>) {
        self.deadlines.insert((waiter.send_by, ticket));
        self.waiters.insert(ticket, waiter);
    }

    fn next_ticket(&mut self) -> Ticket {
        self.counter += 1;
        Ticket(self.counter)
    }
}

/// Position of a key in its class; the lowest is served first. In `Express` by the time of the first refusal,
/// elsewhere by the time of asking.
fn position_in(class: Class, standing: &Standing, first: Ticket) -> u64 {
    match (class, standing.slot) {
        (Class::Express, Some(slot)) => u64::from(slot.first_unix_s) << 32 | first.0 & u64::from(u32::MAX),
        (_, _) => first.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slots::Slot;

    const COSTLY: &str = "1.0.0";

    fn device(n: u128) -> DeviceId {
        DeviceId::from_uuid(uuid::Uuid::from_u128(n))
    }

    fn standing(tenant: Option<&str>, first_unix_s: Option<u32>) -> Standing {
        let tenant = tenant.map(TenantTag::of);
        Standing {
            tenant,
            slot: first_unix_s.map(|first_unix_s| Slot {
                at: Instant::ZERO,
                first_unix_s,
                refusals: 3,
                tenant,
                ownership: crate::slots::Ownership::Sole,
            }),
            is_due: true,
        }
    }

    fn waiter(n: u128, firmware: &str, standing: Standing) -> Waiter<()> {
        let answer_by = Instant::from_micros(2_800_000);
        Waiter {
            device: device(n),
            proof: Proof::Secret,
            network: Network::V4(1),
            cohort: CohortTag::of(None, Some(firmware)),
            standing,
            send_by: answer_by,
            answer_by,
            kept: (),
        }
    }

    fn order(queue: &mut Queue<()>) -> Vec<DeviceId> {
        let batch = queue.next_batch(100, Instant::ZERO);
        batch.map(|batch| batch.keys).unwrap_or_default()
    }

    #[test]
    fn second_connection_of_a_device_often_refused_does_not_move_it_behind_all_holders() {
        let mut queue = Queue::new(Weights::default());
        let senior = standing(Some("acme"), Some(1));
        queue.enqueue(waiter(1, "2.0.0", senior), Class::Express, false);
        for n in 2..6 {
            queue.enqueue(waiter(n, "2.0.0", standing(Some("acme"), None)), Class::Holder, false);
        }

        queue
            .join(waiter(1, "2.0.0", senior), Some(Class::Holder), false)
            .unwrap();

        assert_eq!(order(&mut queue)[0], device(1));
    }

    #[test]
    fn key_that_moves_among_the_often_refused_is_placed_by_its_first_refusal() {
        let mut queue = Queue::new(Weights::default());
        let walk_in = standing(Some("acme"), None);
        queue.enqueue(waiter(1, "2.0.0", walk_in), Class::WalkIn, false);
        queue.enqueue(
            waiter(2, "2.0.0", standing(Some("acme"), Some(5))),
            Class::Express,
            false,
        );

        let younger = standing(Some("acme"), Some(9));
        queue
            .join(waiter(1, "2.0.0", younger), Some(Class::Express), false)
            .unwrap();

        assert_eq!(order(&mut queue), [device(2), device(1)]);
    }

    #[test]
    fn key_held_by_a_false_claim_of_an_isolated_cohort_is_freed_by_the_device_itself_and_by_no_unknown_one() {
        let mut queue = Queue::new(Weights::default());
        let known = standing(Some("acme"), None);
        queue.enqueue(waiter(1, COSTLY, known), Class::Holder, true);

        let unknown = waiter(1, "2.0.0", standing(None, None));
        queue.join(unknown, Some(Class::UnknownHolder), false).unwrap();
        assert_eq!(
            (queue.unsent(), queue.isolated_len(CohortTag::of(None, Some(COSTLY)))),
            (0, 1)
        );

        queue
            .join(waiter(1, "2.0.0", known), Some(Class::WalkIn), false)
            .unwrap();
        assert_eq!(
            (queue.unsent(), queue.isolated_len(CohortTag::of(None, Some(COSTLY)))),
            (1, 0)
        );
        assert_eq!(order(&mut queue), [device(1)]);
    }
}
