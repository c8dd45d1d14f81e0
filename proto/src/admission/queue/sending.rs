//! Statements of the queue: sent, answered, retried.

use std::collections::btree_map::Entry;

use super::{
    super::{cost::CohortTag, limit::ProbeId},
    Class, KeyState, Queue, Ticket,
};
use crate::{id::DeviceId, slots::UNKNOWN_SHARE, time::Instant};

/// Id of a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BatchId(u64);

/// One statement to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub id: BatchId,
    /// Distinct keys, at least one.
    pub keys: Vec<DeviceId>,
    /// Whether it only checks that the registry answers. No device waits for it, and its key belongs to none.
    pub is_probe: bool,
}

/// A statement that was sent.
#[derive(Debug)]
pub(in crate::admission) struct Sent {
    id: BatchId,
    pub keys: Vec<DeviceId>,
    pub kind: Kind,
    /// Its cohorts, with their number of keys. Empty for a probe.
    pub cohorts: Vec<(CohortTag, u32)>,
    pub sent_at: Instant,
    /// The probe window in which it was sent, if the limit measures it.
    pub probe: Option<ProbeId>,
}

/// Purpose of a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::admission) enum Kind {
    /// Checks that the registry answers, for no device.
    Probe,
    /// Keys of all cohorts that are not isolated.
    Shared { is_retry: bool },
    /// Keys of an isolated cohort, beside the others.
    Isolated(CohortTag),
}

impl Sent {
    pub const fn is_isolated(&self) -> bool {
        matches!(self.kind, Kind::Isolated(_))
    }
}

/// A half of a failed statement.
#[derive(Debug)]
pub(super) struct Retry {
    pub round: u64,
    pub keys: Vec<DeviceId>,
}

/// Every n-th key sent is of `Express`, if one waits.
const EXPRESS_EVERY: u32 = 4;
/// Every n-th key sent is of `UnknownHolder`, if one waits: the inverse of their share.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a small positive constant"
)]
const UNKNOWN_EVERY: u32 = (1.0 / UNKNOWN_SHARE) as u32;

impl<W> Queue<W> {
    /// Number of keys for the next statement.
    pub fn next_len(&mut self) -> usize {
        self.drop_dead_retries();
        match self.retries.front() {
            Some(retry) => retry.keys.len(),
            None => self.unsent(),
        }
    }

    /// Sends the next statement, of at most `keys_max` keys. Halves of failed ones go first.
    pub fn next_batch(&mut self, keys_max: usize, now: Instant) -> Option<Batch> {
        self.drop_dead_retries();
        let id = BatchId(self.counter + 1);
        let mut keys = Vec::new();
        let mut cohorts = Vec::new();
        let is_retry = !self.retries.is_empty();
        while keys.len() < keys_max && self.has_next(is_retry) {
            let Some(device) = self.take_next(is_retry) else {
                break;
            };
            if let Some(key) = self.keys.get_mut(&device) {
                key.state = KeyState::InFlight { batch: id };
                keys.push(device);
                cohorts.push(key.cohort);
            }
            if is_retry && self.retries.front().is_none_or(|retry| retry.keys.is_empty()) {
                break;
            }
        }
        self.drop_dead_retries();
        if keys.is_empty() {
            return None;
        }
        Some(self.send(id, keys, Kind::Shared { is_retry }, counted(cohorts), now))
    }

    /// Sends the next statement of an isolated cohort.
    pub fn next_isolated_batch(&mut self, cohort: CohortTag, keys_max: usize, now: Instant) -> Option<Batch> {
        let id = BatchId(self.counter + 1);
        let mut keys = Vec::new();
        while let Some(own) = self.isolated.get_mut(&cohort) {
            if keys.len() >= keys_max {
                break;
            }
            let taken = own.pop_first();
            if own.is_empty() {
                self.isolated.remove(&cohort);
            }
            if let Some((_, device)) = taken
                && let Some(key) = self.keys.get_mut(&device)
            {
                key.state = KeyState::InFlight { batch: id };
                keys.push(device);
            }
        }
        if keys.is_empty() {
            return None;
        }
        self.isolated_served = Some(cohort);
        self.isolated_in_flight = keys.len();
        let cohorts = vec![(cohort, u32::try_from(keys.len()).unwrap_or(u32::MAX))];
        Some(self.send(id, keys, Kind::Isolated(cohort), cohorts, now))
    }

    /// Creates a statement for no device, with a key that belongs to none.
    pub fn probe(&mut self, now: Instant) -> Batch {
        let keys = vec![DeviceId::from_uuid(uuid::Uuid::nil())];
        self.send(BatchId(self.counter + 1), keys, Kind::Probe, Vec::new(), now)
    }

    fn send(
        &mut self,
        id: BatchId,
        keys: Vec<DeviceId>,
        kind: Kind,
        cohorts: Vec<(CohortTag, u32)>,
        sent_at: Instant,
    ) -> Batch {
        self.counter = id.0;
        self.in_flight += keys.len();
        let sent = Sent {
            id,
            keys: keys.clone(),
            kind,
            cohorts,
            sent_at,
            probe: None,
        };
        self.sent.insert(id, sent);
        let is_probe = kind == Kind::Probe;
        Batch { id, keys, is_probe }
    }

    /// Keeps the probe window of a statement.
    pub fn set_probe(&mut self, id: BatchId, probe: Option<ProbeId>) {
        if let Some(sent) = self.sent.get_mut(&id) {
            sent.probe = probe;
        }
    }

    /// Removes a statement that ended. `None` if it is unknown, or ended before.
    pub fn take_sent(&mut self, id: BatchId) -> Option<Sent> {
        let sent = self.sent.remove(&id)?;
        debug_assert!(self.in_flight >= sent.keys.len(), "every sent key is counted");
        self.in_flight -= sent.keys.len();
        if sent.is_isolated() {
            self.isolated_in_flight = 0;
        }
        Some(sent)
    }

    fn has_next(&self, is_retry: bool) -> bool {
        if is_retry {
            self.retries.front().is_some_and(|retry| !retry.keys.is_empty())
        } else {
            !self.by_class.is_empty()
        }
    }

    fn take_next(&mut self, is_retry: bool) -> Option<DeviceId> {
        if is_retry {
            return self.retries.front_mut()?.keys.pop();
        }
        self.taken = self.taken.wrapping_add(1);
        let first = if self.taken.is_multiple_of(UNKNOWN_EVERY) {
            Some(Class::UnknownHolder)
        } else {
            (self.taken % EXPRESS_EVERY == 1).then_some(Class::Express)
        };
        first
            .into_iter()
            .chain(Class::ALL)
            .find_map(|class| self.by_class.pop(class, &self.weights))
    }

    /// Drops keys of failed statements for which no device waits any more, or that were requested again since.
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

    /// Removes a key of a statement that ended. Returns the devices that waited for it.
    pub fn take_waiters(&mut self, sent: &Sent, device: DeviceId) -> Vec<Ticket> {
        match self.keys.entry(device) {
            Entry::Occupied(key) if key.get().state == (KeyState::InFlight { batch: sent.id }) => {
                let waiters = key.remove().waiters;
                waiters.iter().for_each(|ticket| self.stop_deadline(*ticket));
                waiters
            }
            Entry::Occupied(_) | Entry::Vacant(_) => Vec::new(),
        }
    }

    /// A statement failed. If it may be retried and a device has time to wait, it is retried in two halves: one key
    /// that the database cannot process must not fail 255 others. Returns the devices that no longer wait, and whether
    /// the statement is retried.
    pub fn handle_failed(&mut self, sent: &Sent, may_retry: bool, now: Instant) -> (Vec<Ticket>, bool) {
        let may_retry = may_retry && sent.kind == Kind::Shared { is_retry: false };
        self.counter += 1;
        let round = self.counter;
        let mut alive = Vec::new();
        let mut waiters = Vec::new();
        for device in &sent.keys {
            if may_retry && self.retry_key(*device, sent.id, round, now) {
                alive.push(*device);
            } else {
                waiters.extend(self.take_waiters(sent, *device));
            }
        }
        let is_retried = !alive.is_empty();
        let second = alive.split_off(alive.len().div_ceil(2));
        for half in [alive, second] {
            if !half.is_empty() {
                self.retries.push_back(Retry { round, keys: half });
            }
        }
        (waiters, is_retried)
    }

    /// Retries a key if a device that waits for it still has time. Returns whether it does.
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
}

/// Each cohort once, with its number of keys.
fn counted(mut cohorts: Vec<CohortTag>) -> Vec<(CohortTag, u32)> {
    cohorts.sort_unstable();
    let mut counted: Vec<(CohortTag, u32)> = Vec::new();
    for cohort in cohorts {
        match counted.last_mut() {
            Some((last, keys)) if *last == cohort => *keys += 1,
            Some(_) | None => counted.push((cohort, 1)),
        }
    }
    counted
}
