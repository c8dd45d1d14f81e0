//! Presence in the database: what was stored is read at the start, what changes is written behind, and old transitions
//! are deleted.
//!
//! The writer never holds anything up: it works in batches, over a connection of its own, rests as long as each batch
//! took, and waits while the database is away. Start with [`write()`] and [`restore`].

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use seawall_proto::{
    id::{DeviceId, Label},
    presence::{
        Cause,
        known::{RETURN_GRACE, lost_by, return_due},
    },
    time::Instant as Monotonic,
};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    fleet::history::{Stored, queue::Entry},
    node::Shared,
    store::{
        DatabaseStatus, PRESENCE_PRUNE_MAX, PRESENCE_WRITE_MAX, PresenceNode, PresenceWrite, StoreError, StoredPresence,
    },
};

/// The alarm that operators see while transitions are dropped.
pub const QUEUE_ALARM: &str = "presence_queue";
/// Interval at which the writer looks for something to write.
const LINGER: Duration = Duration::from_millis(250);
/// Minimum rest after a batch. It rests as long as the batch took, at least.
const REST_MIN: Duration = Duration::from_millis(20);
/// Waits after a failed batch: doubled with each.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// Interval at which this node notes that it lives.
const NODE_INTERVAL: Duration = Duration::from_secs(10);
/// Interval between two looks for old transitions.
const PRUNE_INTERVAL: Duration = Duration::from_secs(60);
/// Rest between two deletions of old transitions.
const PRUNE_REST: Duration = Duration::from_millis(500);
/// Maximum time to write what is left at the end of the process.
const FLUSH_MAX: Duration = Duration::from_secs(3);
/// Rest between two pages that are read at the start.
const RESTORE_REST: Duration = Duration::from_millis(20);
/// Interval at which devices that did not return are given up.
const GIVE_UP_INTERVAL: Duration = Duration::from_secs(1);
/// Devices of the queue that are restored only while at least this much room is left in it.
const RESTORE_ROOM_MIN: usize = 100_000;

/// Writes transitions, in order, until `stop`.
pub async fn write(state: Shared, stop: CancellationToken) {
    state.store.ready().await;
    let mut retry = RETRY_MIN;
    let (mut noted_at, mut pruned_at) = (None::<Instant>, Instant::now());
    loop {
        let is_away = state.store.state().status == DatabaseStatus::Away;
        let begun = Instant::now();
        let rest = if is_away {
            RETRY_MIN
        } else {
            let work = write_some(&state, &mut noted_at, &mut pruned_at);
            match work.await {
                Ok(is_more) => {
                    retry = RETRY_MIN;
                    let took = begun.elapsed().max(REST_MIN);
                    if is_more { took } else { took.max(LINGER) }
                }
                Err(error) => {
                    tracing::debug!(%error, waiting = state.history.queue().len(), "presence not written: trying again");
                    let wait = retry;
                    retry = (retry * 2).min(RETRY_MAX);
                    wait
                }
            }
        };
        watch_queue(&state);
        if stop.run_until_cancelled(sleep(rest)).await.is_none() {
            return;
        }
    }
}

/// Writes one batch, and does what is due beside it. Returns whether more waits.
async fn write_some(
    state: &Shared,
    noted_at: &mut Option<Instant>,
    pruned_at: &mut Instant,
) -> Result<bool, StoreError> {
    if noted_at.is_none_or(|at| at.elapsed() >= NODE_INTERVAL) {
        state.store.presence_node_write(state.boot, &state.node).await?;
        *noted_at = Some(Instant::now());
    }
    state.history.catch_up();
    let is_more = write_batch(state).await?;
    if !is_more && pruned_at.elapsed() >= PRUNE_INTERVAL {
        let deleted = prune(state).await?;
        if deleted < PRESENCE_PRUNE_MAX.into() {
            *pruned_at = Instant::now();
        } else {
            sleep(PRUNE_REST).await;
        }
    }
    Ok(is_more)
}

/// Deletes a part of what is older than `presence.history_seconds`. Returns the number of deleted transitions.
async fn prune(state: &Shared) -> Result<u64, StoreError> {
    let before = state.clock.wall() - state.config.presence.history();
    state.store.presence_prune(before).await
}

/// Writes the oldest entries of one kind. Returns whether a whole batch was there.
async fn write_batch(state: &Shared) -> Result<bool, StoreError> {
    let queue = state.history.queue();
    let mut entries = queue.oldest(PRESENCE_WRITE_MAX);
    let is_same = |entry: &Entry| matches!(entry, Entry::Forget(_)) == matches!(entries[0], Entry::Forget(_));
    let len = entries.iter().take_while(|entry| is_same(entry)).count();
    let is_more = entries.len() == PRESENCE_WRITE_MAX || len < entries.len();
    entries.truncate(len);
    let (mut writes, mut forgotten) = (Vec::with_capacity(len), Vec::new());
    for entry in &entries {
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
    if !writes.is_empty() {
        state.store.presence_write(&writes).await?;
    }
    if !forgotten.is_empty() {
        state.store.presence_forget(&forgotten).await?;
    }
    queue.remove(len);
    Ok(is_more)
}

/// Raises and ends the alarm about transitions that are dropped.
fn watch_queue(state: &Shared) {
    let queue = state.history.queue();
    if queue.is_behind() {
        let detail = format!(
            "the database does not take changes of presence fast enough: {} wait, and {} were dropped since the start. The newest state of each device is kept",
            queue.len(),
            queue.dropped()
        );
        state.alarms.set(QUEUE_ALARM, true, detail);
    } else {
        state.alarms.set(
            QUEUE_ALARM,
            false,
            "every change of presence has room in the queue again",
        );
    }
}

/// Writes what is left at the end of the process, for a short time.
pub async fn flush(state: &Shared) {
    if !state.store.is_ready() || state.store.state().status == DatabaseStatus::Away {
        return;
    }
    let writing = async {
        state.history.catch_up();
        while !state.history.queue().is_empty() {
            write_batch(state).await?;
        }
        Ok::<_, StoreError>(())
    };
    if !matches!(timeout(FLUSH_MAX, writing).await, Ok(Ok(()))) {
        tracing::warn!(
            waiting = state.history.queue().len(),
            "changes of presence not written: their devices are unknown after the next start"
        );
    }
}

/// Reads stored presence, and turns devices offline that do not return after the restart, until `stop`.
pub async fn restore(state: Shared, stop: CancellationToken) {
    state.store.ready().await;
    let lost = loop {
        match read_all(&state, &stop).await {
            Ok(lost) => break lost,
            Err(error) => tracing::debug!(%error, "stored presence could not be read: trying again"),
        }
        if stop.run_until_cancelled(sleep(RETRY_MAX)).await.is_none() {
            return;
        }
    };
    state.is_presence_restored.store(true, Ordering::Relaxed);
    if !lost.is_empty() {
        tracing::info!(
            devices = lost.len(),
            grace_seconds = RETURN_GRACE.as_secs(),
            "devices of the last run are unknown until they return"
        );
    }
    give_up(&state, lost, &stop).await;
    stop.cancelled().await;
}

/// Reads all pages. Returns the devices that are unknown, with the time at which each is given up, the earliest first.
async fn read_all(state: &Shared, stop: &CancellationToken) -> Result<VecDeque<(Monotonic, DeviceId)>, StoreError> {
    let nodes = state.store.presence_nodes().await?;
    let is_alone = state.config.database_url().sqlite_path().is_some();
    let mut lost = Vec::new();
    let mut cursor = None;
    loop {
        let page = state.store.presence_page(cursor).await?;
        for stored in &page.items {
            if let Some(cause) = fate(state, stored, &nodes, is_alone)
                && restore_one(state, stored, cause)
            {
                lost.push((state.clock.now() + return_due(stored.device), stored.device));
            }
        }
        cursor = page.next_cursor;
        let is_over = cursor.is_none();
        if is_over || stop.is_cancelled() {
            break;
        }
        sleep(RESTORE_REST).await;
        // Each unknown device is written, at the pace of the writer.
        while state.history.queue().room() < RESTORE_ROOM_MIN && !stop.is_cancelled() {
            sleep(LINGER).await;
        }
    }
    lost.sort_unstable();
    Ok(lost.into())
}

/// Why the session of a stored state is gone, if it has not ended. `None`: this run or another node that lives has it.
fn fate(state: &Shared, stored: &StoredPresence, nodes: &[PresenceNode], is_alone: bool) -> Option<Cause> {
    let epoch = stored.known.epoch;
    if state.boot.has(epoch) {
        return None;
    }
    if state.boot.is_older(epoch) || is_alone {
        return Some(Cause::NodeRestarted);
    }
    let holder = nodes.iter().find(|node| node.has(epoch));
    lost_by(epoch, holder.map(|node| (node.boot, node.is_live)))
}

fn restore_one(state: &Shared, stored: &StoredPresence, cause: Cause) -> bool {
    let tenant = match Label::parse(&stored.tenant) {
        Ok(Some(label)) => state.cohorts.tenant(&label),
        Ok(None) | Err(_) => Arc::from(stored.tenant.as_str()),
    };
    let cohort = state
        .cohorts
        .intern(stored.model.as_deref(), stored.firmware.as_deref());
    let stored = Stored {
        known: stored.known,
        reason: stored.reason,
        cohort: &cohort,
        tenant: &tenant,
        device: stored.device,
    };
    state.history.restore(stored, Some((cause, state.started)))
}

/// Turns devices offline that did not return.
async fn give_up(state: &Shared, mut lost: VecDeque<(Monotonic, DeviceId)>, stop: &CancellationToken) {
    while !lost.is_empty() {
        let now = state.clock.now();
        while let Some((_, device)) = lost.pop_front_if(|(due, _)| *due <= now) {
            state.note_given_up(device);
        }
        if stop.run_until_cancelled(sleep(GIVE_UP_INTERVAL)).await.is_none() {
            return;
        }
    }
}
