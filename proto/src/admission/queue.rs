//! Devices waiting for a look-up, and the keys under way: who goes next, single flight by key, batches, second tries.
//!
//! Keys wait, not devices: several devices that ask for one key wait for one look-up. Start with [`Queue`]. It knows
//! neither limits nor slots; [`super::Admission`] asks them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::{
    id::DeviceId,
    slots::{STRANGERS_SHARE, Standing},
    time::Instant,
};

/// A device that waits for an answer. Never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// A statement under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BatchId(u64);

/// One statement to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub id: BatchId,
    /// Distinct, at least one.
    pub keys: Vec<DeviceId>,
    /// Asks whether the registry answers at all: no device waits for it, and its key belongs to none.
    pub is_probe: bool,
}

/// Who goes first. The order of the variants is the order of service, but for the share that due strangers are sure of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    Holder,
    WalkIn,
    StrangerHolder,
    StrangerWalkIn,
}

impl Class {
    const COUNT: usize = 4;
    /// In the order of service.
    const ALL: [Self; Self::COUNT] = [Self::Holder, Self::WalkIn, Self::StrangerHolder, Self::StrangerWalkIn];

    const fn index(self) -> usize {
        match self {
            Self::Holder => 0,
            Self::WalkIn => 1,
            Self::StrangerHolder => 2,
            Self::StrangerWalkIn => 3,
        }
    }
}

/// Every n-th key taken is a due stranger's, if one waits: the inverse of their share.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a small positive constant"
)]
const STRANGER_EVERY: u32 = (1.0 / STRANGERS_SHARE) as u32;

/// A device that waits.
#[derive(Clone, Debug)]
pub(super) struct Waiter {
    pub device: DeviceId,
    pub standing: Standing,
    /// Not sent after this.
    pub send_by: Instant,
    /// Answered by this, whatever happens.
    pub answer_by: Instant,
}

#[derive(Debug)]
struct Key {
    waiters: Vec<Ticket>,
    state: KeyState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KeyState {
    Waiting {
        class: Class,
        place: u64,
    },
    /// Its statement failed, and it waits for a second try.
    Retrying {
        round: u64,
    },
    InFlight {
        batch: BatchId,
    },
}

/// A statement that was sent.
#[derive(Debug)]
struct Sent {
    keys: Vec<DeviceId>,
    is_retry: bool,
    is_probe: bool,
}

/// A half of a failed statement.
#[derive(Debug)]
struct Retry {
    round: u64,
    keys: Vec<DeviceId>,
}

/// What became of a statement, and of those who waited for it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// Not ours, or ended before.
    Unknown,
    Probe,
    /// The devices are to be answered, each with its key's record or its absence.
    Answered {
        keys: usize,
        waiters: Vec<(Ticket, DeviceId)>,
    },
    /// The devices are to be refused; those for whom there is time are tried for again.
    Failed {
        keys: usize,
        waiters: Vec<Ticket>,
        is_retried: bool,
    },
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
    lines: [BTreeMap<u64, DeviceId>; Class::COUNT],
    retries: VecDeque<Retry>,
    deadlines: BTreeSet<(Instant, Ticket)>,
    sent: BTreeMap<BatchId, Sent>,
    in_flight: usize,
    taken: u32,
}

impl Queue {
    /// Devices that wait for an answer.
    pub fn len(&self) -> usize {
        self.waiters.len()
    }

    /// Keys that wait in the lines of these classes.
    pub fn line_len(&self, classes: &[Class]) -> usize {
        classes.iter().map(|class| self.lines[class.index()].len()).sum()
    }

    /// Keys sent and not answered.
    pub const fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Statements sent and not answered.
    pub fn batches_in_flight(&self) -> usize {
        self.sent.len()
    }

    pub fn has_unsent(&self) -> bool {
        !self.retries.is_empty() || self.lines.iter().any(|line| !line.is_empty())
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
        if let (KeyState::Waiting { class: was, place }, Some(class)) = (key.state, class)
            && class < was
        {
            key.state = KeyState::Waiting { class, place };
            self.lines[was.index()].remove(&place);
            self.lines[class.index()].insert(place, device);
        }
        self.wait(ticket, waiter);
        Some(ticket)
    }

    /// Waits at the end of the line of its class.
    pub fn enqueue(&mut self, waiter: Waiter, class: Class) -> Ticket {
        debug_assert!(!self.holds(waiter.device), "one key, one place");
        let device = waiter.device;
        let ticket = self.next_ticket();
        let place = ticket.0;
        self.keys.insert(
            device,
            Key {
                waiters: vec![ticket],
                state: KeyState::Waiting { class, place },
            },
        );
        self.lines[class.index()].insert(place, device);
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

    /// Forgets a key that nobody waits for, unless it is under way.
    fn drop_key(&mut self, device: DeviceId) {
        let Some(key) = self.keys.get(&device) else {
            return;
        };
        match key.state {
            KeyState::InFlight { .. } => return,
            KeyState::Waiting { class, place } => {
                self.lines[class.index()].remove(&place);
            }
            KeyState::Retrying { .. } => {}
        }
        self.keys.remove(&device);
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

    /// The next statement of at most `keys_max` keys, as far as `may_send` allows one more key. Halves of failed ones go first.
    pub fn next_batch(&mut self, keys_max: usize, mut may_send: impl FnMut() -> bool) -> Option<Batch> {
        self.drop_dead_retries();
        let id = BatchId(self.counter + 1);
        let mut keys = Vec::new();
        let is_retry = !self.retries.is_empty();
        while keys.len() < keys_max && self.has_next(is_retry) && may_send() {
            let Some(device) = self.take_next(is_retry) else {
                break;
            };
            if let Some(key) = self.keys.get_mut(&device) {
                key.state = KeyState::InFlight { batch: id };
                keys.push(device);
            }
            if is_retry && self.retries.front().is_none_or(|retry| retry.keys.is_empty()) {
                break;
            }
        }
        self.drop_dead_retries();
        if keys.is_empty() {
            return None;
        }
        Some(self.send(id, keys, is_retry, false))
    }

    /// A statement for nobody, with a key that belongs to none.
    pub fn probe(&mut self) -> Batch {
        let id = BatchId(self.counter + 1);
        self.send(id, vec![DeviceId::from_uuid(uuid::Uuid::nil())], false, true)
    }

    fn send(&mut self, id: BatchId, keys: Vec<DeviceId>, is_retry: bool, is_probe: bool) -> Batch {
        self.counter = id.0;
        self.in_flight += keys.len();
        self.sent.insert(
            id,
            Sent {
                keys: keys.clone(),
                is_retry,
                is_probe,
            },
        );
        Batch { id, keys, is_probe }
    }

    fn has_next(&self, is_retry: bool) -> bool {
        if is_retry {
            self.retries.front().is_some_and(|retry| !retry.keys.is_empty())
        } else {
            self.lines.iter().any(|line| !line.is_empty())
        }
    }

    fn take_next(&mut self, is_retry: bool) -> Option<DeviceId> {
        if is_retry {
            return self.retries.front_mut()?.keys.pop();
        }
        self.taken = self.taken.wrapping_add(1);
        let strangers_turn = self.taken.is_multiple_of(STRANGER_EVERY);
        let first = strangers_turn.then_some(Class::StrangerHolder);
        first
            .into_iter()
            .chain(Class::ALL)
            .find_map(|class| self.lines[class.index()].pop_first())
            .map(|(_, device)| device)
    }

    /// Keys of failed statements that nobody waits for any more, or that have started anew since.
    fn drop_dead_retries(&mut self) {
        while let Some(retry) = self.retries.front_mut() {
            let round = retry.round;
            let keys = &self.keys;
            retry.keys.retain(|device| {
                keys.get(device)
                    .is_some_and(|key| key.state == KeyState::Retrying { round })
            });
            if !retry.keys.is_empty() {
                return;
            }
            self.retries.pop_front();
        }
    }

    /// A statement was answered.
    pub fn handle_answered(&mut self, id: BatchId) -> Ended {
        let Some(sent) = self.take_sent(id) else {
            return Ended::Unknown;
        };
        if sent.is_probe {
            return Ended::Probe;
        }
        let mut waiters = Vec::with_capacity(sent.keys.len());
        for device in &sent.keys {
            for ticket in self.take_waiters(*device, id) {
                waiters.push((ticket, *device));
            }
        }
        Ended::Answered {
            keys: sent.keys.len(),
            waiters,
        }
    }

    /// A statement failed. If it may be tried again and somebody has time to wait, it is, in two halves: one key that the
    /// database can't bear must not take 255 others down.
    pub fn handle_failed(&mut self, id: BatchId, may_retry: bool, now: Instant) -> Ended {
        let Some(sent) = self.take_sent(id) else {
            return Ended::Unknown;
        };
        if sent.is_probe {
            return Ended::Probe;
        }
        let keys = sent.keys.len();
        let may_retry = may_retry && !sent.is_retry;
        self.counter += 1;
        let round = self.counter;
        let mut alive = Vec::new();
        let mut waiters = Vec::new();
        for device in sent.keys {
            if may_retry && self.retry_key(device, id, round, now) {
                alive.push(device);
            } else {
                waiters.extend(self.take_waiters(device, id));
            }
        }
        let is_retried = !alive.is_empty();
        let second = alive.split_off(alive.len().div_ceil(2));
        for half in [alive, second] {
            if !half.is_empty() {
                self.retries.push_back(Retry { round, keys: half });
            }
        }
        Ended::Failed {
            keys,
            waiters,
            is_retried,
        }
    }

    /// False where nobody waits for the key any more, or nobody has the time.
    fn retry_key(&mut self, device: DeviceId, batch: BatchId, round: u64, now: Instant) -> bool {
        let waiters = &self.waiters;
        let has_time = |ticket: &Ticket| waiters.get(ticket).is_some_and(|waiter| waiter.send_by > now);
        match self.keys.get_mut(&device) {
            Some(key) if key.state == (KeyState::InFlight { batch }) && key.waiters.iter().any(has_time) => {
                key.state = KeyState::Retrying { round };
                true
            }
            Some(_) | None => false,
        }
    }

    /// Everybody who waits, whether sent or not. They no longer do.
    pub fn drain(&mut self) -> Vec<(Ticket, Waiter)> {
        let waiters = std::mem::take(&mut self.waiters);
        self.deadlines.clear();
        self.retries.clear();
        for line in &mut self.lines {
            line.clear();
        }
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

    fn take_sent(&mut self, id: BatchId) -> Option<Sent> {
        let sent = self.sent.remove(&id)?;
        debug_assert!(self.in_flight >= sent.keys.len(), "what was sent was counted");
        self.in_flight -= sent.keys.len();
        Some(sent)
    }

    fn take_waiters(&mut self, device: DeviceId, batch: BatchId) -> Vec<Ticket> {
        match self.keys.get(&device) {
            Some(key) if key.state == (KeyState::InFlight { batch }) => {
                self.keys.remove(&device).map(|key| key.waiters).unwrap_or_default()
            }
            Some(_) | None => Vec::new(),
        }
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
