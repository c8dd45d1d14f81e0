//! Transitions that are not in the database yet, in the order in which they happened.
//!
//! The writer copies the oldest ones, and removes them once they are stored: one that fails is written again. While the
//! queue is full, further transitions are dropped and counted. [`History`](super::History) keeps the newest state of
//! each device, and queues it once there is room.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use seawall_proto::{id::DeviceId, presence::Known, time::WallTime};

use super::groups::Group;
use crate::store::Reason;

/// Maximum number of entries: some 20 MB.
pub const QUEUE_LEN_MAX: usize = 200_000;
/// Numbers for each millisecond between two starts.
const NUMBERS_PER_MS: u64 = 1 << 20;

/// An entry.
#[derive(Clone, Debug)]
pub enum Entry {
    Transition(Transition),
    /// The device was deleted, and all that is stored of its presence with it.
    Forget(DeviceId),
}

/// A change of what is known of a device.
#[derive(Clone, Debug)]
pub struct Transition {
    pub device: DeviceId,
    pub known: Known,
    /// When it happened. Differs from the state's `since` after a takeover.
    pub at: WallTime,
    pub reason: Reason,
    /// Greater than that of each earlier transition on this node.
    pub number: u64,
    pub group: Arc<Group>,
}

/// The queue.
#[derive(Debug)]
pub struct Queue {
    waiting: Mutex<Waiting>,
    len_max: usize,
    /// Transitions dropped since the start.
    dropped: AtomicU64,
    /// A device has a newer state than what was queued of it.
    is_behind: AtomicBool,
}

#[derive(Debug)]
struct Waiting {
    entries: VecDeque<Entry>,
    last_number: u64,
}

impl Queue {
    pub(super) fn new(len_max: usize) -> Self {
        Self {
            waiting: Mutex::new(Waiting {
                entries: VecDeque::new(),
                last_number: 0,
            }),
            len_max,
            dropped: AtomicU64::new(0),
            is_behind: AtomicBool::new(false),
        }
    }

    /// Numbers from now on are greater than all that an earlier start gave. `boot`: a time that no earlier start has
    /// reached.
    pub fn set_boot(&self, boot: WallTime) {
        let mut waiting = self.lock();
        waiting.last_number = waiting
            .last_number
            .max(boot.as_unix_ms().saturating_mul(NUMBERS_PER_MS));
    }

    /// Queues a transition, and gives it a number. Returns false if the queue is full.
    pub(super) fn push(&self, mut transition: Transition) -> bool {
        let mut waiting = self.lock();
        if waiting.entries.len() >= self.len_max {
            drop(waiting);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            self.is_behind.store(true, Ordering::Relaxed);
            return false;
        }
        waiting.last_number += 1;
        transition.number = waiting.last_number;
        waiting.entries.push_back(Entry::Transition(transition));
        true
    }

    /// Queues the deletion of a device, even if the queue is full: a deletion needs the database, so few can wait.
    pub(super) fn forget(&self, device: DeviceId) {
        self.lock().entries.push_back(Entry::Forget(device));
    }

    /// Copies the oldest entries, at most `len_max`.
    #[must_use]
    pub fn oldest(&self, len_max: usize) -> Vec<Entry> {
        let waiting = self.lock();
        waiting.entries.iter().take(len_max).cloned().collect()
    }

    /// Copies the transitions of a device, oldest first, since it was forgotten last. Looks at every entry.
    #[must_use]
    pub fn of(&self, device: DeviceId) -> Vec<Transition> {
        let waiting = self.lock();
        let mut found = Vec::new();
        for entry in &waiting.entries {
            match entry {
                Entry::Transition(transition) if transition.device == device => found.push(transition.clone()),
                Entry::Forget(forgotten) if *forgotten == device => found.clear(),
                Entry::Transition(_) | Entry::Forget(_) => {}
            }
        }
        found
    }

    /// Removes the oldest entries, which are stored.
    pub fn remove(&self, len: usize) {
        let mut waiting = self.lock();
        let len = len.min(waiting.entries.len());
        let stored: Vec<Entry> = waiting.entries.drain(..len).collect();
        if waiting.entries.len() < waiting.entries.capacity() / 8 {
            let len = waiting.entries.len();
            waiting.entries.shrink_to(2 * len);
        }
        drop(waiting);
        drop(stored);
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().entries.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it takes no more.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.len() >= self.len_max
    }

    /// Free places.
    #[must_use]
    pub fn room(&self) -> usize {
        self.len_max.saturating_sub(self.len())
    }

    /// Transitions dropped since the start.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Whether a device has a newer state than what was queued of it.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.is_behind.load(Ordering::Relaxed)
    }

    pub(super) fn set_behind(&self, is_behind: bool) {
        self.is_behind.store(is_behind, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
