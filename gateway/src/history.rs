//! What this node remembers of a device after its socket is gone: its last attempts, and when and why it went offline.
//!
//! Bounded in devices by two generations: the older is dropped whole when the younger is full. Devices that have been authenticated
//! have generations of their own, so that a flood of made-up ids can't push them out.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

use seawall_proto::{id::DeviceId, time::WallTime};

use crate::cohorts::Cohort;

/// Attempts kept for each device (contract section 6).
pub const ATTEMPTS_MAX: usize = 20;
/// Devices in one generation of those that have been authenticated; at most two generations are kept.
const KNOWN_MAX: usize = 250_000;
/// The same for ids that have not.
const STRANGERS_MAX: usize = 5_000;

/// One connect attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    pub at: WallTime,
    /// A label of `seawall_handshakes_total`.
    pub outcome: &'static str,
}

/// The end of a device's last session here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offline {
    pub since: WallTime,
    /// A label of `seawall_closes_total`.
    pub reason: &'static str,
}

/// What a device was when it had a session here last.
#[derive(Debug, Clone)]
pub struct Identity {
    pub cohort: Arc<Cohort>,
    pub tenant: Arc<str>,
}

/// What is remembered of one device.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// Oldest first.
    pub attempts: VecDeque<Attempt>,
    pub offline: Option<Offline>,
    /// Of its last session; `None` where it had none.
    pub identity: Option<Identity>,
}

/// All that is remembered.
#[derive(Debug, Default)]
pub struct History {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    known: Generations,
    strangers: Generations,
}

#[derive(Debug)]
struct Generations {
    young: HashMap<DeviceId, Record>,
    old: HashMap<DeviceId, Record>,
    len_max: usize,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            known: Generations::new(KNOWN_MAX),
            strangers: Generations::new(STRANGERS_MAX),
        }
    }
}

impl History {
    /// A device was admitted: from now on it is known.
    pub fn admitted(&self, device: DeviceId, at: WallTime) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let before = inner.strangers.remove(device);
        let record = inner.known.entry(device);
        if let Some(before) = before {
            record.attempts = before.attempts;
        }
        record.push(Attempt {
            at,
            outcome: "admitted",
        });
        record.offline = None;
    }

    /// A device was refused, or left before its answer.
    pub fn refused(&self, device: DeviceId, at: WallTime, outcome: &'static str) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let generations = if inner.known.contains(device) {
            &mut inner.known
        } else {
            &mut inner.strangers
        };
        generations.entry(device).push(Attempt { at, outcome });
    }

    /// A device has a session.
    pub fn came_online(&self, device: DeviceId, identity: Identity) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.known.entry(device).identity = Some(identity);
    }

    /// Shows every remembered device that had a session, in no order. Nothing else is remembered meanwhile: `each` must be quick.
    pub fn for_each_known(&self, mut each: impl FnMut(DeviceId, &Identity)) {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        for (device, record) in inner.known.young.iter().chain(&inner.known.old) {
            if let Some(identity) = &record.identity {
                each(*device, identity);
            }
        }
    }

    /// A device's newest session ended.
    pub fn went_offline(&self, device: DeviceId, since: WallTime, reason: &'static str) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.known.entry(device).offline = Some(Offline { since, reason });
    }

    #[must_use]
    pub fn record(&self, device: DeviceId) -> Option<Record> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.known.get(device).or_else(|| inner.strangers.get(device)).cloned()
    }

    /// Devices that have been authenticated here and are remembered.
    #[must_use]
    pub fn known_len(&self) -> usize {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.known.young.len() + inner.known.old.len()
    }

    /// Forgets a device that was deleted from the registry.
    pub fn forget(&self, device: DeviceId) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.known.remove(device);
        inner.strangers.remove(device);
    }
}

impl Record {
    fn push(&mut self, attempt: Attempt) {
        if self.attempts.len() == ATTEMPTS_MAX {
            self.attempts.pop_front();
        }
        if self.attempts.capacity() == 0 {
            self.attempts.reserve_exact(1);
        }
        self.attempts.push_back(attempt);
    }
}

impl Generations {
    fn new(len_max: usize) -> Self {
        Self {
            young: HashMap::new(),
            old: HashMap::new(),
            len_max,
        }
    }

    fn contains(&self, device: DeviceId) -> bool {
        self.young.contains_key(&device) || self.old.contains_key(&device)
    }

    fn get(&self, device: DeviceId) -> Option<&Record> {
        self.young.get(&device).or_else(|| self.old.get(&device))
    }

    fn remove(&mut self, device: DeviceId) -> Option<Record> {
        self.young.remove(&device).or_else(|| self.old.remove(&device))
    }

    /// The record of a device, in the young generation.
    fn entry(&mut self, device: DeviceId) -> &mut Record {
        if !self.young.contains_key(&device) && self.young.len() >= self.len_max {
            self.old = std::mem::take(&mut self.young);
        }
        let older = self.old.remove(&device);
        self.young.entry(device).or_insert_with(|| older.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_last_twenty_attempts() {
        let history = History::default();

        for n in 0..30 {
            history.refused(device(1), WallTime::from_unix_ms(n), "overloaded");
        }
        history.admitted(device(1), WallTime::from_unix_ms(30));

        let attempts = history.record(device(1)).unwrap().attempts;
        assert_eq!(attempts.len(), ATTEMPTS_MAX);
        assert_eq!(attempts[0].at, WallTime::from_unix_ms(11));
        assert_eq!(attempts[19].outcome, "admitted");
    }

    #[test]
    fn made_up_ids_neither_grow_it_nor_push_out_real_devices() {
        let history = History::default();
        history.admitted(device(1), WallTime::from_unix_ms(1));

        for n in 0..50_000 {
            history.refused(device(1_000 + n), WallTime::from_unix_ms(2), "unauthorized");
        }

        let strangers = |h: &History| {
            let inner = h.inner.lock().unwrap();
            inner.strangers.young.len() + inner.strangers.old.len()
        };
        assert!(strangers(&history) <= 2 * STRANGERS_MAX);
        assert_eq!(history.record(device(1)).unwrap().attempts.len(), 1);
    }

    fn device(n: u128) -> DeviceId {
        DeviceId::from_uuid(uuid::Uuid::from_u128(n))
    }
}
