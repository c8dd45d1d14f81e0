//! Devices waiting for a look-up, and the keys under way: who goes next, single flight by key, batches, second tries.
//!
//! Keys of a cohort apart (see [`super::cost`]) have a line of their own, and statements of their own.
//!
//! Keys wait, not devices: several devices that ask for one key wait for one look-up. Start with [`Queue`]. It knows
//! neither limits nor slots; [`super::Admission`] asks them.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Bound,
};

mod lines;
mod sending;

use lines::Lines;
pub use sending::{Batch, BatchId};
pub(super) use sending::{Ended, Ran};
use sending::{Retry, Sent};

use super::cost::CohortTag;
use crate::{
    id::{DeviceId, Network, Proof},
    slots::{Standing, TenantTag, Weights},
    time::Instant,
};

/// Most devices that wait for one key. A device has one connection, or two while it replaces the first; more are somebody else's.
const WAITERS_PER_KEY_MAX: usize = 8;

/// A device that waits for an answer. Never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// Order of service. [`Class::ALL`] has the classes in this order; `Express` and `StrangerHolder` also have a guaranteed share of the keys
/// (see [`Queue::next_batch`]). Within a class tenants take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    Holder,
    /// Holders that were refused often, by the time of their first refusal.
    Express,
    WalkIn,
    StrangerHolder,
    StrangerWalkIn,
}

impl Class {
    const COUNT: usize = 5;
    /// In the order of service.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Holder,
        Self::Express,
        Self::WalkIn,
        Self::StrangerHolder,
        Self::StrangerWalkIn,
    ];

    const fn index(self) -> usize {
        match self {
            Self::Holder => 0,
            Self::Express => 1,
            Self::WalkIn => 2,
            Self::StrangerHolder => 3,
            Self::StrangerWalkIn => 4,
        }
    }

    /// Whether a key of this class is served earlier than one of `other`. `Express` is the best: it has a guaranteed share and is also served
    /// among the holders.
    const fn is_better_than(self, other: Self) -> bool {
        self.rank() < other.rank()
    }

    const fn rank(self) -> usize {
        match self {
            Self::Express => 0,
            Self::Holder => 1,
            Self::WalkIn => 2,
            Self::StrangerHolder => 3,
            Self::StrangerWalkIn => 4,
        }
    }

    /// Whether only devices of a tenant wait in it.
    const fn is_of_known(self) -> bool {
        matches!(self, Self::Holder | Self::Express | Self::WalkIn)
    }
}

/// A device that waits.
#[derive(Clone, Debug)]
pub(super) struct Waiter {
    pub device: DeviceId,
    pub proof: Proof,
    pub network: Network,
    pub cohort: CohortTag,
    pub standing: Standing,
    /// Not sent after this.
    pub send_by: Instant,
    /// Answered by this, whatever happens.
    pub answer_by: Instant,
}

#[derive(Debug)]
struct Key {
    /// At most [`WAITERS_PER_KEY_MAX`].
    waiters: Vec<Ticket>,
    /// The ticket of the device that asked first: the key's place among those of its class.
    first: Ticket,
    /// Of the device that asked first, unless another took the key out of an isolated cohort's queue.
    cohort: CohortTag,
    /// The tenant whose share it is served from.
    tenant: Option<TenantTag>,
    state: KeyState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KeyState {
    Waiting {
        class: Class,
        place: u64,
        line: Line,
    },
    /// Its statement failed, and it waits for a second try.
    Retrying {
        round: u64,
    },
    InFlight {
        batch: BatchId,
    },
}

/// The cohort and the tenant that a key counts for.
type Crowd = (CohortTag, Option<TenantTag>);

/// Where a key waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// With all others of its class.
    Shared,
    /// With its cohort's.
    Apart,
}

/// A device that waits with others for one key.
#[derive(Debug)]
pub(super) struct Joined {
    pub ticket: Ticket,
    /// The device that no longer waits, because more than [`WAITERS_PER_KEY_MAX`] would. It is to be refused.
    pub displaced: Option<(Ticket, Waiter)>,
}

/// Why a device's time ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Late {
    /// It never came to its turn.
    NotSent,
    /// Its look-up failed, or was not answered in time.
    NotAnswered,
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    counter: u64,
    /// Bounded by `waiting_max`.
    waiters: BTreeMap<Ticket, Waiter>,
    /// At most one a waiter and one a key in flight.
    keys: BTreeMap<DeviceId, Key>,
    lines: Lines,
    weights: Weights,
    /// Never empty ones.
    apart: BTreeMap<CohortTag, BTreeMap<(Class, u64), DeviceId>>,
    /// The cohort apart that was served last.
    apart_served: Option<CohortTag>,
    retries: VecDeque<Retry>,
    deadlines: BTreeSet<(Instant, Ticket)>,
    sent: BTreeMap<BatchId, Sent>,
    in_flight: usize,
    apart_in_flight: usize,
    taken: u32,
}

impl Queue {
    pub fn new(weights: Weights) -> Self {
        Self {
            weights,
            ..Self::default()
        }
    }

    /// Devices that wait for an answer.
    pub fn len(&self) -> usize {
        self.waiters.len()
    }

    /// Keys that wait in the lines of these classes.
    pub fn line_len(&self, classes: &[Class]) -> usize {
        classes.iter().map(|class| self.lines.len(*class)).sum()
    }

    /// Keys sent and not answered.
    pub const fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Those of them that were sent in the statement of a cohort apart: there is one at a time.
    pub const fn apart_in_flight(&self) -> usize {
        self.apart_in_flight
    }

    /// Those of them that were sent in statements for all.
    pub const fn shared_in_flight(&self) -> usize {
        self.in_flight - self.apart_in_flight
    }

    /// Statements sent and not answered, those of cohorts apart left out.
    pub fn batches_in_flight(&self) -> usize {
        self.sent.len() - usize::from(self.apart_in_flight > 0)
    }

    /// The statement that was sent first of those not answered, and when.
    pub fn oldest_statement(&self) -> Option<(BatchId, Instant)> {
        self.sent.first_key_value().map(|(id, sent)| (*id, sent.sent_at))
    }

    /// Keys of a cohort apart that wait.
    pub fn apart_len(&self, cohort: CohortTag) -> usize {
        self.apart.get(&cohort).map_or(0, BTreeMap::len)
    }

    /// The cohort apart whose turn it is, if one has a key to send.
    pub fn next_apart(&self) -> Option<CohortTag> {
        let after = self.apart_served.map_or(Bound::Unbounded, Bound::Excluded);
        let next = self.apart.range((after, Bound::Unbounded)).next();
        next.or_else(|| self.apart.first_key_value()).map(|(cohort, _)| *cohort)
    }

    /// Somebody waits in the shared lines, or for a second try.
    pub fn has_unsent(&self) -> bool {
        self.has_retries() || !self.lines.is_empty()
    }

    /// Keys of a failed statement wait for a second try.
    pub fn has_retries(&self) -> bool {
        !self.retries.is_empty()
    }

    /// Keys that wait in the shared lines.
    pub fn unsent(&self) -> usize {
        self.line_len(&Class::ALL)
    }

    pub fn holds(&self, device: DeviceId) -> bool {
        self.keys.contains_key(&device)
    }

    /// Whether the key that the device waits for is under way.
    pub fn is_sent(&self, ticket: Ticket) -> bool {
        let key = self
            .waiters
            .get(&ticket)
            .and_then(|waiter| self.keys.get(&waiter.device));
        key.is_some_and(|key| matches!(key.state, KeyState::InFlight { .. }))
    }

    /// Waits with the others that asked for the same key. A joiner that would be served earlier on its own makes the key earlier, and one that
    /// is not of an isolated cohort takes it out of that cohort's queue. `None` where nothing waits for the key.
    ///
    /// Where too many wait for the key, one of them stops waiting; see [`Joined::displaced`].
    pub fn join(&mut self, waiter: Waiter, class: Option<Class>, is_apart: bool) -> Option<Joined> {
        let device = waiter.device;
        let displaced = self
            .displaced_by(&waiter)
            .and_then(|ticket| Some((ticket, self.leave_key(ticket)?)));
        let ticket = self.next_ticket();
        let key = self.keys.get_mut(&device)?;
        key.waiters.push(ticket);
        if let (
            KeyState::Waiting {
                class: was,
                place,
                line,
            },
            Some(class),
        ) = (key.state, class)
        {
            // Who is not known must not take keys of an isolated cohort to all others.
            let is_freed = line == Line::Apart && !is_apart && class.is_of_known();
            if is_freed || class.is_better_than(was) {
                let from = (key.cohort, key.tenant);
                let line_to = if is_freed { Line::Shared } else { line };
                if is_freed {
                    key.cohort = waiter.cohort;
                }
                key.tenant = waiter.standing.tenant;
                let to = (key.cohort, key.tenant);
                let place_to = place_in(class, &waiter.standing, key.first);
                key.state = KeyState::Waiting {
                    class,
                    place: place_to,
                    line: line_to,
                };
                self.leave_line(from, was, place, line);
                self.enter_line(to, class, place_to, line_to, device);
            }
        }
        self.wait(ticket, waiter);
        Some(Joined { ticket, displaced })
    }

    /// Who has to go where `waiter` is one too many for its key: the oldest of the network that has the most waiting for it. So who asks for
    /// another's key again and again displaces only itself.
    fn displaced_by(&self, waiter: &Waiter) -> Option<Ticket> {
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

    /// Waits at the end of the line of its class, or of its cohort if that is apart.
    pub fn enqueue(&mut self, waiter: Waiter, class: Class, is_apart: bool) -> Ticket {
        debug_assert!(!self.holds(waiter.device), "one key, one place");
        let (device, cohort, tenant) = (waiter.device, waiter.cohort, waiter.standing.tenant);
        let ticket = self.next_ticket();
        let place = place_in(class, &waiter.standing, ticket);
        let line = if is_apart { Line::Apart } else { Line::Shared };
        self.keys.insert(
            device,
            Key {
                waiters: vec![ticket],
                first: ticket,
                cohort,
                tenant,
                state: KeyState::Waiting { class, place, line },
            },
        );
        self.enter_line((cohort, tenant), class, place, line, device);
        self.wait(ticket, waiter);
        ticket
    }

    /// The device has gone. A key that nobody waits for is not sent.
    pub fn leave(&mut self, ticket: Ticket) -> Option<Waiter> {
        let waiter = self.leave_key(ticket)?;
        if self.keys.get(&waiter.device).is_some_and(|key| key.waiters.is_empty()) {
            self.drop_key(waiter.device);
        }
        Some(waiter)
    }

    /// The device no longer waits; its key stays where it is.
    fn leave_key(&mut self, ticket: Ticket) -> Option<Waiter> {
        let waiter = self.finish(ticket)?;
        if let Some(key) = self.keys.get_mut(&waiter.device) {
            key.waiters.retain(|other| *other != ticket);
        }
        Some(waiter)
    }

    /// Takes the newest key from the tenant that has the most waiting for its weight, if `tenant` has fewer: those who waited for it.
    pub fn make_room(&mut self, class: Class, tenant: Option<TenantTag>) -> Vec<(Ticket, Waiter)> {
        let newest = self.lines.newest_of_longest(class, tenant, &self.weights);
        let Some(key) = newest.and_then(|device| self.keys.get(&device)) else {
            return Vec::new();
        };
        let tickets = key.waiters.clone();
        tickets
            .into_iter()
            .filter_map(|ticket| Some((ticket, self.leave(ticket)?)))
            .collect()
    }

    /// Forgets a key that nobody waits for, unless it is under way.
    fn drop_key(&mut self, device: DeviceId) {
        let Some(key) = self.keys.get(&device) else {
            return;
        };
        match key.state {
            KeyState::InFlight { .. } => return,
            KeyState::Waiting { class, place, line } => self.leave_line((key.cohort, key.tenant), class, place, line),
            KeyState::Retrying { .. } => {}
        }
        self.keys.remove(&device);
    }

    fn enter_line(&mut self, (cohort, tenant): Crowd, class: Class, place: u64, line: Line, device: DeviceId) {
        match line {
            Line::Shared => self.lines.insert(class, tenant, place, device),
            Line::Apart => {
                self.apart.entry(cohort).or_default().insert((class, place), device);
            }
        }
    }

    fn leave_line(&mut self, (cohort, tenant): Crowd, class: Class, place: u64, line: Line) {
        match line {
            Line::Shared => {
                self.lines.remove(class, tenant, place);
            }
            Line::Apart => {
                if let Some(own) = self.apart.get_mut(&cohort) {
                    own.remove(&(class, place));
                    if own.is_empty() {
                        self.apart.remove(&cohort);
                    }
                }
            }
        }
    }

    /// The cohort's waiting keys go to a line of their own, or back to where they would be without one.
    pub fn set_apart(&mut self, cohort: CohortTag, is_apart: bool) {
        let to = if is_apart { Line::Apart } else { Line::Shared };
        let mut moved = Vec::new();
        for (device, key) in self.keys.iter_mut().filter(|(_, key)| key.cohort == cohort) {
            if let KeyState::Waiting { class, place, line } = key.state
                && line != to
            {
                key.state = KeyState::Waiting { class, place, line: to };
                moved.push((*device, (key.cohort, key.tenant), class, place, line));
            }
        }
        for (device, crowd, class, place, from) in moved {
            self.leave_line(crowd, class, place, from);
            self.enter_line(crowd, class, place, to, device);
        }
    }

    /// The next device whose time has run out; it no longer waits.
    pub fn pop_late(&mut self, now: Instant) -> Option<(Ticket, Waiter, Late)> {
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
                Some(KeyState::Waiting { .. }) => Late::NotSent,
            };
            if let Some(waiter) = self.leave(ticket) {
                return Some((ticket, waiter, late));
            }
        }
    }

    /// When the next device's time runs out.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(due, _)| *due)
    }

    /// Everybody who waits, whether sent or not. They no longer do.
    pub fn drain(&mut self) -> Vec<(Ticket, Waiter)> {
        let waiters = std::mem::take(&mut self.waiters);
        self.deadlines.clear();
        self.retries.clear();
        self.lines.clear();
        self.apart.clear();
        self.keys
            .retain(|_, key| matches!(key.state, KeyState::InFlight { .. }));
        for key in self.keys.values_mut() {
            key.waiters.clear();
        }
        waiters.into_iter().collect()
    }

    /// The device behind a ticket, which no longer waits: its key has been answered or refused.
    pub fn finish(&mut self, ticket: Ticket) -> Option<Waiter> {
        let waiter = self.waiters.remove(&ticket)?;
        self.deadlines.remove(&(waiter.send_by, ticket));
        self.deadlines.remove(&(waiter.answer_by, ticket));
        Some(waiter)
    }

    fn wait(&mut self, ticket: Ticket, waiter: Waiter) {
        self.deadlines.insert((waiter.send_by, ticket));
        self.waiters.insert(ticket, waiter);
    }

    fn next_ticket(&mut self) -> Ticket {
        self.counter += 1;
        Ticket(self.counter)
    }
}

/// The place of a key among those of its class: the lowest is served first. In `Express` by the time of the first refusal, elsewhere by
/// the time of asking.
fn place_in(class: Class, standing: &Standing, first: Ticket) -> u64 {
    match (class, standing.slot) {
        (Class::Express, Some(slot)) => u64::from(slot.first_unix_s) << 32 | first.0 & u64::from(u32::MAX),
        (_, _) => first.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slots::{Place, Slot};

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
                bounces: 3,
                tenant,
                place: Place::Kept,
            }),
            is_due: true,
        }
    }

    fn waiter(n: u128, firmware: &str, standing: Standing) -> Waiter {
        let answer_by = Instant::from_micros(2_800_000);
        Waiter {
            device: device(n),
            proof: Proof::Secret,
            network: Network::V4(1),
            cohort: CohortTag::of(None, Some(firmware)),
            standing,
            send_by: answer_by,
            answer_by,
        }
    }

    fn order(queue: &mut Queue) -> Vec<DeviceId> {
        let batch = queue.next_batch(100, Instant::ZERO);
        batch.map(|batch| batch.keys).unwrap_or_default()
    }

    #[test]
    fn second_connection_of_a_device_often_refused_does_not_move_it_behind_all_holders() {
        let mut queue = Queue::default();
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
        let mut queue = Queue::default();
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
        let mut queue = Queue::default();
        let known = standing(Some("acme"), None);
        queue.enqueue(waiter(1, COSTLY, known), Class::Holder, true);

        let unknown = waiter(1, "2.0.0", standing(None, None));
        queue.join(unknown, Some(Class::StrangerHolder), false).unwrap();
        assert_eq!(
            (queue.unsent(), queue.apart_len(CohortTag::of(None, Some(COSTLY)))),
            (0, 1)
        );

        queue
            .join(waiter(1, "2.0.0", known), Some(Class::WalkIn), false)
            .unwrap();
        assert_eq!(
            (queue.unsent(), queue.apart_len(CohortTag::of(None, Some(COSTLY)))),
            (1, 0)
        );
        assert_eq!(order(&mut queue), [device(1)]);
    }
}
