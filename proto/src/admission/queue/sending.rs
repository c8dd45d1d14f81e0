//! The queue's other end: statements that are sent, answered, and tried again.

use std::collections::btree_map::Entry;

use super::{super::cost::CohortTag, Class, KeyState, Queue, Ticket};
use crate::{id::DeviceId, slots::STRANGERS_SHARE, time::Instant};

/// A statement under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BatchId(u64);

#[cfg(test)]
impl BatchId {
    pub(in crate::admission) const fn numbered(number: u64) -> Self {
        Self(number)
    }
}

/// One statement to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub id: BatchId,
    /// Distinct, at least one.
    pub keys: Vec<DeviceId>,
    /// Asks whether the registry answers at all: no device waits for it, and its key belongs to none.
    pub is_probe: bool,
}

/// What became of a statement, and of those who waited for it.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::admission) enum Ended {
    /// Not ours, or ended before.
    Unknown,
    Probe,
    /// The devices no longer wait for the key.
    Ran {
        statement: Ran,
        waiters: Vec<(Ticket, DeviceId)>,
    },
}

/// What there is to know of a statement that ended.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::admission) struct Ran {
    pub keys: usize,
    pub cohorts: Vec<(CohortTag, u32)>,
    pub sent_at: Instant,
    /// It was of this cohort alone, beside the others.
    pub apart: Option<CohortTag>,
}

/// A statement that was sent.
#[derive(Debug)]
pub(super) struct Sent {
    pub keys: Vec<DeviceId>,
    pub is_retry: bool,
    pub is_probe: bool,
    pub cohorts: Vec<(CohortTag, u32)>,
    pub sent_at: Instant,
    pub apart: Option<CohortTag>,
}

impl Sent {
    fn ran(&self) -> Ran {
        Ran {
            keys: self.keys.len(),
            cohorts: self.cohorts.clone(),
            sent_at: self.sent_at,
            apart: self.apart,
        }
    }
}

/// A half of a failed statement.
#[derive(Debug)]
pub(super) struct Retry {
    pub round: u64,
    pub keys: Vec<DeviceId>,
}

/// Every n-th key taken is of a device that was bounced often, if one waits: they have a quarter. overload.md section 4.
const EXPRESS_EVERY: u32 = 4;
/// Every n-th key taken is a due stranger's, if one waits: the inverse of their share.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a small positive constant"
)]
const STRANGER_EVERY: u32 = (1.0 / STRANGERS_SHARE) as u32;

impl Queue {
    /// Keys that there are for the next statement.
    pub fn next_len(&mut self) -> usize {
        self.drop_dead_retries();
        match self.retries.front() {
            Some(retry) => retry.keys.len(),
            None => self.unsent(),
        }
    }

    /// The next statement of at most `keys_max` keys. Halves of failed ones go first.
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
        let sent = Sent {
            keys,
            is_retry,
            is_probe: false,
            cohorts: counted(cohorts),
            sent_at: now,
            apart: None,
        };
        Some(self.send(id, sent))
    }

    /// The next statement of a cohort apart.
    pub fn next_apart_batch(&mut self, cohort: CohortTag, keys_max: usize, now: Instant) -> Option<Batch> {
        let id = BatchId(self.counter + 1);
        let mut keys = Vec::new();
        while let Some(line) = self.apart.get_mut(&cohort) {
            if keys.len() >= keys_max {
                break;
            }
            let taken = line.pop_first();
            if line.is_empty() {
                self.apart.remove(&cohort);
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
        self.apart_served = Some(cohort);
        self.apart_in_flight = keys.len();
        let sent = Sent {
            cohorts: vec![(cohort, u32::try_from(keys.len()).unwrap_or(u32::MAX))],
            keys,
            is_retry: false,
            is_probe: false,
            sent_at: now,
            apart: Some(cohort),
        };
        Some(self.send(id, sent))
    }

    /// A statement for nobody, with a key that belongs to none.
    pub fn probe(&mut self, now: Instant) -> Batch {
        let id = BatchId(self.counter + 1);
        let sent = Sent {
            keys: vec![DeviceId::from_uuid(uuid::Uuid::nil())],
            is_retry: false,
            is_probe: true,
            cohorts: Vec::new(),
            sent_at: now,
            apart: None,
        };
        self.send(id, sent)
    }

    fn send(&mut self, id: BatchId, sent: Sent) -> Batch {
        self.counter = id.0;
        self.in_flight += sent.keys.len();
        let batch = Batch {
            id,
            keys: sent.keys.clone(),
            is_probe: sent.is_probe,
        };
        self.sent.insert(id, sent);
        batch
    }

    fn has_next(&self, is_retry: bool) -> bool {
        if is_retry {
            self.retries.front().is_some_and(|retry| !retry.keys.is_empty())
        } else {
            !self.lines.is_empty()
        }
    }

    fn take_next(&mut self, is_retry: bool) -> Option<DeviceId> {
        if is_retry {
            return self.retries.front_mut()?.keys.pop();
        }
        self.taken = self.taken.wrapping_add(1);
        let first = if self.taken.is_multiple_of(STRANGER_EVERY) {
            Some(Class::StrangerHolder)
        } else {
            (self.taken % EXPRESS_EVERY == 1).then_some(Class::Express)
        };
        first
            .into_iter()
            .chain(Class::ALL)
            .find_map(|class| self.lines.pop(class, &self.weights))
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
        let statement = sent.ran();
        let mut waiters = Vec::with_capacity(sent.keys.len());
        for device in sent.keys {
            self.take_waiters(device, id, &mut waiters);
        }
        Ended::Ran { statement, waiters }
    }

    /// A statement failed. If it may be tried again and somebody has time to wait, it is, in two halves: one key that the
    /// database can't bear must not take 255 others down. The second value says whether it is.
    pub fn handle_failed(&mut self, id: BatchId, may_retry: bool, now: Instant) -> (Ended, bool) {
        let Some(sent) = self.take_sent(id) else {
            return (Ended::Unknown, false);
        };
        if sent.is_probe {
            return (Ended::Probe, false);
        }
        let statement = sent.ran();
        let may_retry = may_retry && !sent.is_retry && sent.apart.is_none();
        self.counter += 1;
        let round = self.counter;
        let mut alive = Vec::new();
        let mut waiters = Vec::new();
        for device in sent.keys {
            if may_retry && self.retry_key(device, id, round, now) {
                alive.push(device);
            } else {
                self.take_waiters(device, id, &mut waiters);
            }
        }
        let is_retried = !alive.is_empty();
        let second = alive.split_off(alive.len().div_ceil(2));
        for half in [alive, second] {
            if !half.is_empty() {
                self.retries.push_back(Retry { round, keys: half });
            }
        }
        (Ended::Ran { statement, waiters }, is_retried)
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

    fn take_sent(&mut self, id: BatchId) -> Option<Sent> {
        let sent = self.sent.remove(&id)?;
        debug_assert!(self.in_flight >= sent.keys.len(), "what was sent was counted");
        self.in_flight -= sent.keys.len();
        if sent.apart.is_some() {
            self.apart_in_flight = 0;
        }
        Some(sent)
    }

    /// Moves those who wait for a key of this statement to `waiters`, and forgets the key.
    fn take_waiters(&mut self, device: DeviceId, batch: BatchId, waiters: &mut Vec<(Ticket, DeviceId)>) {
        if let Entry::Occupied(key) = self.keys.entry(device)
            && key.get().state == (KeyState::InFlight { batch })
        {
            waiters.extend(key.remove().waiters.into_iter().map(|ticket| (ticket, device)));
        }
    }
}

/// Each cohort once, with how often it is there.
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
