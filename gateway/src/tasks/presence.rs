//! Presence on its way into the database: what changes is written behind, and old transitions are deleted.
//!
//! The writer never holds anything up: it works in batches, over a connection of its own, rests as long as each batch
//! took, and waits while the database is away. Start with [`write()`]. [`presence_returns`](super::presence_returns) reads
//! it at the next start.

use std::{collections::BTreeSet, time::Duration};

use rand::Rng as _;
use seawall_proto::{
    epoch::newest_believed,
    id::DeviceId,
    presence::{
        batches::{Batches, Failure, Next},
        gone::{Sign, claims},
    },
};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    fleet::history::queue::{Copied, Entry, QUEUE_LEN_MAX},
    node::{Shared, State},
    store::{DatabaseStatus, PRESENCE_PRUNE_MAX, PRESENCE_WRITE_MAX, PresenceWrite, StoreError, StoredPresence},
};

/// The alarm that operators see while changes are not written, or not fast enough.
pub const QUEUE_ALARM: &str = "presence_queue";
/// Number of waiting changes from which on the alarm is raised: an eighth of those that have room.
const LONG: usize = QUEUE_LEN_MAX / 8;
/// Time without a written change, while some wait, after which the alarm is raised.
const STALLED_AFTER: Duration = Duration::from_secs(30);
/// Interval at which the writer looks for something to write.
const LINGER: Duration = Duration::from_millis(250);
/// Minimum rest after a batch. It rests as long as the batch took, at least.
const REST_MIN: Duration = Duration::from_millis(20);
/// A call that took less has time for twice as much.
const QUICK: Duration = Duration::from_secs(1);
/// Waits after a failed batch: doubled with each.
const RETRY_MIN: Duration = Duration::from_secs(1);
pub(super) const RETRY_MAX: Duration = Duration::from_secs(10);
/// Interval between two searches for old transitions.
const PRUNE_INTERVAL: Duration = Duration::from_secs(60);
/// Rest between two deletions of old transitions.
const PRUNE_REST: Duration = Duration::from_millis(500);
/// After one of this many changes of a device, drawn at random, its history is cut.
const TRIM_ONE_IN: u32 = 64;
/// Maximum time to write what is left at the end of the process.
const FLUSH_MAX: Duration = Duration::from_secs(3);
/// Interval of checks of devices whose sockets several nodes have.
const CONTESTED_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum number of such devices. Further ones are claimed at once.
const CONTESTED_MAX: usize = 1_000;

/// Writes transitions, in order, until `stop`.
pub async fn write(state: Shared, stop: CancellationToken) {
    state.store.ready().await;
    let mut writer = Writer::new();
    loop {
        let rest = if state.store.state().status == DatabaseStatus::Away {
            RETRY_MIN
        } else {
            writer.step(&state).await
        };
        writer.watch_queue(&state);
        if stop.run_until_cancelled(sleep(rest)).await.is_none() {
            return;
        }
    }
}

/// Writes what is left at the end of the process, for a short time.
pub async fn flush(state: &Shared) {
    if !state.store.is_ready() || state.store.state().status == DatabaseStatus::Away {
        return;
    }
    let writing = async {
        let mut writer = Writer::new();
        state.history.catch_up();
        while !state.history.queue().is_empty() {
            if writer.write_batch(state).await == Err(Next::Wait) {
                return false;
            }
        }
        true
    };
    if timeout(FLUSH_MAX, writing).await != Ok(true) {
        tracing::warn!(
            waiting = state.history.queue().len(),
            "changes of presence not written: their devices are unknown after the next start"
        );
    }
}

/// Notes in the database that this run lives, so that others leave its devices to it. If one of them found it gone, the
/// states of its devices are written again.
pub(super) async fn note_run(state: &State) -> Result<(), StoreError> {
    if state.store.presence_node_write(state.boot, &state.node).await? {
        tracing::warn!("another node found this one gone: writing the states of all connected devices again");
        state.history.repeat_held();
    }
    Ok(())
}

/// What the database says about all nodes.
pub(super) async fn signs(state: &State) -> Result<Vec<Sign>, StoreError> {
    let nodes = state.store.presence_nodes().await?;
    Ok(nodes.into_iter().map(|node| node.sign).collect())
}

struct Writer {
    batches: Batches,
    /// Sizes of deletions.
    pieces: Batches,
    retry: Duration,
    /// Nothing is written before the row of this run.
    has_noted: bool,
    has_skipped: bool,
    pruned_at: Instant,
    contested: BTreeSet<DeviceId>,
    contested_at: Instant,
    /// Position of the oldest change in the queue, and when it became the oldest.
    front: (u64, Instant),
}

impl Writer {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            batches: Batches::new(PRESENCE_WRITE_MAX),
            pieces: Batches::new(PRESENCE_PRUNE_MAX as usize),
            retry: RETRY_MIN,
            has_noted: false,
            has_skipped: false,
            pruned_at: now,
            contested: BTreeSet::new(),
            contested_at: now,
            front: (0, now),
        }
    }

    /// Writes one batch, and does what is due beside it. Returns the time to rest.
    async fn step(&mut self, state: &Shared) -> Duration {
        let begun = Instant::now();
        let next = match self.note_first(state).await {
            Ok(()) => {
                state.history.catch_up();
                self.write_batch(state).await
            }
            Err(error) => {
                tracing::debug!(%error, "presence of this node not noted: trying again");
                Err(Next::Wait)
            }
        };
        let took = begun.elapsed().max(REST_MIN);
        match next {
            Ok(true) => {
                self.retry = RETRY_MIN;
                took
            }
            Ok(false) => {
                self.retry = RETRY_MIN;
                if let Err(error) = self.tidy(state).await {
                    tracing::debug!(%error, "stored presence not tidied: trying again");
                }
                took.max(LINGER)
            }
            Err(Next::AtOnce) => took,
            Err(Next::Wait) => {
                let wait = self.retry;
                self.retry = (wait * 2).min(RETRY_MAX);
                wait
            }
        }
    }

    async fn note_first(&mut self, state: &Shared) -> Result<(), StoreError> {
        if !self.has_noted {
            note_run(state).await?;
            self.has_noted = true;
        }
        Ok(())
    }

    /// Writes the oldest entries of one kind. Returns whether more wait, or what to do after a failure.
    async fn write_batch(&mut self, state: &Shared) -> Result<bool, Next> {
        let queue = state.history.queue();
        let (from, size) = (queue.front() + self.batches.aside() as u64, self.batches.size());
        let Copied { mut entries, start } = queue.copy(from, size);
        if entries.is_empty() {
            let is_all_aside = self.batches.aside() > 0;
            return if is_all_aside {
                Err(self.batches.handle_end())
            } else {
                Ok(false)
            };
        }
        let is_same = |entry: &Entry| matches!(entry, Entry::Forget(_)) == matches!(entries[0], Entry::Forget(_));
        let len = entries.iter().take_while(|entry| is_same(entry)).count();
        let is_more = entries.len() == size || len < entries.len();
        entries.truncate(len);
        let begun = Instant::now();
        match store(state, &entries).await {
            Ok(outdone) => {
                let given_up = self.batches.handle_stored(begun.elapsed() < QUICK);
                queue.remove_until(start + len as u64);
                queue.count_dropped(given_up as u64);
                self.handle_outdone(state, outdone).await;
                trim(state, &entries).await;
                Ok(is_more)
            }
            Err(error) => {
                let failure = if error.is_retryable() {
                    Failure::Passing
                } else {
                    Failure::Refused
                };
                let is_aside = len == 1 && failure == Failure::Refused;
                if is_aside && !self.has_skipped {
                    self.has_skipped = true;
                    tracing::warn!(
                        %error,
                        entry = ?entries[0],
                        "the database refuses a change of presence: it is skipped if others are stored. Further ones are only counted"
                    );
                } else {
                    tracing::debug!(%error, len, waiting = queue.len(), "presence not written: trying again");
                }
                Err(self.batches.handle_failed(len, failure))
            }
        }
    }

    /// Claims the devices that have a socket here, and a state with a greater epoch in the database.
    async fn handle_outdone(&mut self, state: &Shared, outdone: Vec<StoredPresence>) {
        let here = |stored: &StoredPresence| state.sessions.get(stored.device).is_some();
        let outdone: Vec<StoredPresence> = outdone.into_iter().filter(here).collect();
        if outdone.is_empty() {
            return;
        }
        // Without an answer, each node is doubted.
        let signs = signs(state).await.unwrap_or_default();
        for stored in outdone {
            if claims(&stored.known, &signs) || self.contested.len() >= CONTESTED_MAX {
                state.claim(stored.device, stored.known.epoch);
            } else {
                self.contested.insert(stored.device);
            }
        }
    }

    /// Deletes old transitions, and checks devices of which several nodes have a socket, where that is due.
    async fn tidy(&mut self, state: &Shared) -> Result<(), StoreError> {
        if self.contested_at.elapsed() >= CONTESTED_INTERVAL {
            self.contested_at = Instant::now();
            let devices: Vec<DeviceId> = std::mem::take(&mut self.contested).into_iter().collect();
            let stored = match state.store.presence_among(&devices).await {
                Ok(stored) => stored,
                Err(error) => {
                    self.contested.extend(devices);
                    return Err(error);
                }
            };
            self.handle_outdone(state, stored).await;
        }
        if self.pruned_at.elapsed() >= PRUNE_INTERVAL {
            let before = state.clock.wall() - state.config.presence.history();
            let (begun, size) = (Instant::now(), self.pieces.size());
            let deleted = state
                .store
                .presence_prune(before, u32::try_from(size).unwrap_or(PRESENCE_PRUNE_MAX))
                .await;
            match deleted {
                Ok(deleted) => {
                    self.pieces.handle_stored(begun.elapsed() < QUICK);
                    if deleted < size as u64 {
                        self.pruned_at = Instant::now();
                    } else {
                        sleep(PRUNE_REST).await;
                    }
                }
                Err(error) => {
                    self.pieces.handle_failed(size.max(2), Failure::Passing);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Raises and ends the alarm about changes that are not written.
    fn watch_queue(&mut self, state: &Shared) {
        let queue = state.history.queue();
        let (front, len) = (queue.front(), queue.len());
        if self.front.0 != front || len == 0 {
            self.front = (front, Instant::now());
        }
        let detail = if queue.is_behind() && queue.dropped() > 0 {
            format!(
                "the database does not take changes of presence fast enough: {len} wait, and {} were dropped since the start. The newest state of each device is kept",
                queue.dropped()
            )
        } else if len >= LONG {
            format!(
                "the database does not take changes of presence fast enough: {len} wait. Beyond {QUEUE_LEN_MAX} further ones are dropped"
            )
        } else if self.front.1.elapsed() >= STALLED_AFTER {
            format!(
                "the database takes no changes of presence: {len} wait. Beyond {QUEUE_LEN_MAX} further ones are dropped"
            )
        } else {
            if len < LONG / 2 {
                let over = "changes of presence are written again";
                state.alarms.set(QUEUE_ALARM, false, over);
            }
            return;
        };
        state.alarms.set(QUEUE_ALARM, true, detail);
    }
}

/// Stores entries of one kind. Returns the stored states that are newer.
async fn store(state: &Shared, entries: &[Entry]) -> Result<Vec<StoredPresence>, StoreError> {
    let (mut writes, mut forgotten) = (Vec::with_capacity(entries.len()), Vec::new());
    for entry in entries {
        match entry {
            Entry::Transition(transition) => writes.push(PresenceWrite {
                device: transition.device,
                known: transition.known,
                at: transition.at,
                reason: transition.reason,
                number: transition.number,
                tenant: &transition.group.tenant,
                model: transition.group.cohort.model.as_deref(),
                firmware: transition.group.cohort.firmware.as_deref(),
            }),
            Entry::Forget(device) => forgotten.push(*device),
        }
    }
    if !forgotten.is_empty() {
        state.store.presence_forget(&forgotten).await?;
    }
    if writes.is_empty() {
        return Ok(Vec::new());
    }
    let believed = newest_believed(state.clock.wall());
    state.store.presence_write(&writes, believed).await
}

/// Cuts the histories of some of the devices. Which ones is left to chance: a device that changes often is drawn often.
async fn trim(state: &Shared, entries: &[Entry]) {
    let drawn: BTreeSet<DeviceId> = {
        let mut rng = rand::rng();
        let devices = entries.iter().filter_map(|entry| match entry {
            Entry::Transition(transition) => Some(transition.device),
            Entry::Forget(_) => None,
        });
        devices.filter(|_| rng.random_ratio(1, TRIM_ONE_IN)).collect()
    };
    if drawn.is_empty() {
        return;
    }
    let drawn: Vec<DeviceId> = drawn.into_iter().collect();
    if let Err(error) = state.store.presence_trim(&drawn).await {
        tracing::debug!(%error, "histories of devices not cut: later changes cut them");
    }
}
