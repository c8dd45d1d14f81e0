//! Transitions that are not in the database yet, in the order in which they happened.
//!
//! The writer copies the oldest ones, and removes them once they are stored: one that fails is written again. Each has a
//! position, so that two writers that stored the same ones remove them once. While the queue is full, further
//! transitions are dropped and counted. [`History`](super::History) keeps the newest state of each device, and queues it
//! once there is room.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use seawall_proto::{
    id::DeviceId,
    presence::{Known, known::NUMBER_STEP},
    time::WallTime,
};

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
    /// Greater than that of each earlier transition on this node, unless it is about the session of another node.
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
    /// Position of the oldest entry: the number of those that were removed.
    front: u64,
    last_number: u64,
}

/// Entries that follow each other.
#[derive(Clone, Debug)]
pub struct Copied {
    pub entries: Vec<Entry>,
    /// Position of the first.
    pub start: u64,
}

impl Queue {
    pub(super) fn new(len_max: usize) -> Self {
        Self {
            waiting: Mutex::new(Waiting {
                entries: VecDeque::new(),
                front: 0,
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

    /// Queues a transition, and gives it a number if it has none (0). Returns false if the queue is full.
    pub(super) fn push(&self, mut transition: Transition) -> bool {
        let mut waiting = self.lock();
        if waiting.entries.len() >= self.len_max {
            drop(waiting);
            self.count_dropped(1);
            self.is_behind.store(true, Ordering::Relaxed);
            return false;
        }
        if transition.number == 0 {
            waiting.last_number += NUMBER_STEP;
            transition.number = waiting.last_number;
        }
        waiting.entries.push_back(Entry::Transition(transition));
        true
    }

    /// Queues the deletion of a device, even if the queue is full: a deletion needs the database, so few can wait.
    /// Beyond twice the queue's length it is dropped, and counted.
    pub(super) fn forget(&self, device: DeviceId) {
        let mut waiting = self.lock();
        if waiting.entries.len() < 2 * self.len_max {
            waiting.entries.push_back(Entry::Forget(device));
        } else {
            drop(waiting);
            self.count_dropped(1);
        }
    }

    /// Position of the oldest entry. It grows with each that is removed.
    #[must_use]
    pub fn front(&self) -> u64 {
        self.lock().front
    }

    /// Copies entries from position `from` on, at most `len_max`; from the oldest on if that one was removed.
    #[must_use]
    pub fn copy(&self, from: u64, len_max: usize) -> Copied {
        let waiting = self.lock();
        let start = from.max(waiting.front);
        let skipped = usize::try_from(start - waiting.front).unwrap_or(usize::MAX);
        Copied {
            entries: waiting.entries.iter().skip(skipped).take(len_max).cloned().collect(),
            start,
        }
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

    /// Removes the entries before position `end`, which are stored. Those that were removed already are not counted
    /// again.
    pub fn remove_until(&self, end: u64) {
        let mut waiting = self.lock();
        let len = usize::try_from(end.saturating_sub(waiting.front)).unwrap_or(usize::MAX);
        let len = len.min(waiting.entries.len());
        waiting.front += len as u64;
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

    /// Counts changes that are not stored.
    pub fn count_dropped(&self, len: u64) {
        self.dropped.fetch_add(len, Ordering::Relaxed);
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
