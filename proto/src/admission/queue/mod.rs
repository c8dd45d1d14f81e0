//! Devices waiting for a look-up, and the keys under way: who goes next, single flight by key, batches, second tries.
//!
//! Keys of a cohort apart (see [`super::cost`]) have a line of their own, and statements of their own.
//!
//! Keys wait, not devices: several devices that ask for one key wait for one look-up. Start with [`Queue`]. It knows
//! neither limits nor slots; [`super::Admission`] asks them.

use std::{
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

/// A device that waits for an answer. Never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// Who goes first. The order of the variants is the order of service, but for the shares that due strangers and those often bounced are
/// sure of. Within a class tenants take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    Holder,
    /// Holders that were sent away often, the one first that came first of all.
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
    waiters: Vec<Ticket>,
    /// Of the device that asked first.
    cohort: CohortTag,
    /// Whose turn it waits for.
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

    /// Waits with the others that asked for the same key. If it may go earlier than they, the key goes earlier.
    pub fn join(&mut self, waiter: Waiter, class: Option<Class>) -> Option<Ticket> {
        let device = waiter.device;
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
            && class < was
        {
            let (cohort, from, to) = (key.cohort, key.tenant, waiter.standing.tenant);
            key.state = KeyState::Waiting { class, place, line };
            key.tenant = to;
            self.leave_line((cohort, from), was, place, line);
            self.enter_line((cohort, to), class, place, line, device);
        }
        self.wait(ticket, waiter);
        Some(ticket)
    }

    /// Waits at the end of the line of its class, or of its cohort if that is apart.
    pub fn enqueue(&mut self, waiter: Waiter, class: Class, is_apart: bool) -> Ticket {
        debug_assert!(!self.holds(waiter.device), "one key, one place");
        let (device, cohort, tenant) = (waiter.device, waiter.cohort, waiter.standing.tenant);
        let ticket = self.next_ticket();
        let place = match (class, waiter.standing.slot) {
            (Class::Express, Some(slot)) => u64::from(slot.first_unix_s) << 32 | ticket.0 & u64::from(u32::MAX),
            (_, _) => ticket.0,
        };
        let line = if is_apart { Line::Apart } else { Line::Shared };
        self.keys.insert(
            device,
            Key {
                waiters: vec![ticket],
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
        let waiter = self.waiters.remove(&ticket)?;
        self.deadlines.remove(&(waiter.send_by, ticket));
        self.deadlines.remove(&(waiter.answer_by, ticket));
        if let Some(key) = self.keys.get_mut(&waiter.device) {
            key.waiters.retain(|other| *other != ticket);
            if key.waiters.is_empty() {
                self.drop_key(waiter.device);
            }
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
            let waiter = self.waiters.get(&ticket)?;
            let state = self.keys.get(&waiter.device).map(|key| key.state);
            let late = match state {
                Some(KeyState::InFlight { .. }) if waiter.answer_by > now => {
                    self.deadlines.insert((waiter.answer_by, ticket));
                    continue;
                }
                Some(KeyState::InFlight { .. } | KeyState::Retrying { .. }) | None => Late::NotAnswered,
                Some(KeyState::Waiting { .. }) => Late::NotSent,
            };
            let waiter = self.leave(ticket)?;
            return Some((ticket, waiter, late));
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
