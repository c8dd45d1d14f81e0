//! Devices of processes that ended: what the database has of them is read, and those that do not return in time are
//! offline. Other nodes that are gone are found here as well. Start with [`follow`].
//!
//! [`seawall_proto::presence::gone`] decides.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use seawall_proto::{
    admission::BreakerState,
    epoch::{newest_believed, node_of},
    id::{DeviceId, Label, SessionId},
    presence::{
        Cause,
        gone::{Awaited, Peers, Return, Sign, fate, has_moved, returned},
        known::RETURN_GRACE,
    },
};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::presence::{RETRY_MAX, note_run, signs};
use crate::{
    fleet::history::{Lost, Restored, Stored},
    node::{Shared, State},
    runtime::lifecycle::blocking,
    store::{DatabaseStatus, StoreError, StoredPresence},
};

/// Interval at which this node notes that it lives, and looks whether others do.
const NOTE_INTERVAL: Duration = Duration::from_secs(10);
/// Interval at which devices that did not return are given up.
const STEP_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of devices in a step that are checked for another node.
const AWAY_MAX: usize = 2_000;
/// Rest between two pages.
const PAGE_REST: Duration = Duration::from_millis(20);
/// Interval of checks whether the queue has room.
const ROOM_REST: Duration = Duration::from_millis(250);
/// Room in the queue without which no page is read: each device of a page may be written.
const ROOM_MIN: usize = 100_000;

/// Reads stored presence once, and again for each node that is gone; turns devices offline that do not return; until
/// `stop`.
pub async fn follow(state: Shared, stop: CancellationToken) {
    state.store.ready().await;
    let mut returns = Returns::new();
    while !stop.is_cancelled() {
        if state.store.state().status != DatabaseStatus::Away {
            returns.note(&state).await;
            if returns.is_due && Instant::now() >= returns.retry_at {
                returns.read(&state, &stop).await;
            }
            if let Err(error) = returns.give_up(&state).await {
                tracing::debug!(%error, "devices that did not return are not given up: trying again");
            }
            if let Err(error) = returns.leave_moved(&state).await {
                tracing::debug!(%error, "devices of other nodes are not looked for: trying again");
            }
        }
        let _ = stop.run_until_cancelled(sleep(STEP_INTERVAL)).await;
    }
}

#[derive(Debug)]
struct Returns {
    peers: Peers,
    awaited: Awaited,
    noted_at: Option<Instant>,
    /// Stored presence must be read, since the process started or a node is gone.
    is_due: bool,
    /// All that is stored was read once.
    has_read: bool,
    retry_at: Instant,
    /// The next device that is checked for another node.
    next_away: Option<DeviceId>,
}

impl Returns {
    fn new() -> Self {
        Self {
            peers: Peers::default(),
            awaited: Awaited::default(),
            noted_at: None,
            is_due: true,
            has_read: false,
            retry_at: Instant::now(),
            next_away: None,
        }
    }

    /// Notes that this node lives, and looks whether others are gone, if that is due.
    async fn note(&mut self, state: &Shared) {
        if self.noted_at.is_some_and(|at| at.elapsed() < NOTE_INTERVAL) {
            return;
        }
        let noted = async {
            note_run(state).await?;
            let mut signs = signs(state).await?;
            signs.retain(|sign| sign.boot.node != state.boot.node);
            for (node, written) in self.peers.handle_read(&signs, state.observer.now()) {
                if state.store.presence_node_gone(node, written).await? {
                    tracing::warn!(
                        node.tag = node.0,
                        "a node is gone: its devices are unknown until they return"
                    );
                    self.is_due = true;
                }
            }
            Ok::<_, StoreError>(())
        };
        match noted.await {
            Ok(()) => self.noted_at = Some(Instant::now()),
            Err(error) => tracing::debug!(%error, "this node is not noted as living: trying again"),
        }
    }

    /// Reads all that is stored.
    async fn read(&mut self, state: &Shared, stop: &CancellationToken) {
        // Set again by a node that is found gone meanwhile.
        self.is_due = false;
        match self.read_pages(state, stop).await {
            Ok(found) => {
                self.has_read = true;
                state.is_presence_restored.store(true, Ordering::Relaxed);
                if found > 0 {
                    tracing::info!(
                        devices = found,
                        grace_seconds = RETURN_GRACE.as_secs(),
                        "devices of a process that ended are unknown until they return"
                    );
                }
            }
            Err(error) => {
                tracing::debug!(%error, "stored presence could not be read: trying again");
                if !self.has_read {
                    // All are read again.
                    self.awaited = Awaited::default();
                }
                self.is_due = true;
                self.retry_at = Instant::now() + RETRY_MAX;
            }
        }
    }

    /// Reads page after page. Returns the number of devices that are unknown because of it.
    async fn read_pages(&mut self, state: &Shared, stop: &CancellationToken) -> Result<usize, StoreError> {
        let (mut found, mut unreadable, mut cursor) = (0, 0, None);
        loop {
            let page = state.store.presence_page(cursor).await?;
            unreadable += page.unreadable;
            // Read after the page: a node that has written since has changed none of its rows.
            let signs = signs(state).await?;
            observe(state, &page.items);
            for stored in &page.items {
                if let Some(cause) = fate(stored.known.epoch, state.boot, &signs, is_alone(state))
                    && self.restore(state, stored, cause)
                {
                    found += 1;
                }
            }
            cursor = page.next_cursor;
            if cursor.is_none() || stop.is_cancelled() {
                break;
            }
            sleep(PAGE_REST).await;
            self.note(state).await;
            while state.history.queue().room() < ROOM_MIN && !stop.is_cancelled() {
                sleep(ROOM_REST).await;
                self.note(state).await;
            }
        }
        if unreadable > 0 {
            tracing::warn!(
                rows = unreadable,
                "stored presence of some devices can't be read: they are left out"
            );
        }
        Ok(found)
    }

    /// Takes a stored state whose socket is lost. Returns whether the device is unknown now.
    fn restore(&mut self, state: &State, stored: &StoredPresence, cause: Cause) -> bool {
        let tenant = match Label::parse(&stored.tenant) {
            Ok(Some(label)) => state.cohorts.tenant(&label),
            Ok(None) | Err(_) => Arc::from(stored.tenant.as_str()),
        };
        let cohort = state
            .cohorts
            .intern(stored.model.as_deref(), stored.firmware.as_deref());
        let wall = state.clock.wall();
        let mut known = stored.known;
        if known.epoch > newest_believed(wall) {
            // No session could be newer.
            known.epoch = SessionId(0);
        }
        let model = stored.registered_model.as_deref();
        let group = state.history.groups().of(&cohort, &tenant, model);
        let lost = Lost {
            cause,
            at: if cause == Cause::NodeRestarted {
                state.started
            } else {
                wall
            },
            concluded_from: concluded_from(state, stored),
        };
        let restored = state.history.restore(
            Stored {
                known,
                reason: stored.reason,
                group: &group,
                device: stored.device,
            },
            lost,
        );
        match restored {
            Restored::Known => false,
            Restored::Awaited { is_new } => {
                // After a panic of this task nobody waits for the devices that it had read.
                if is_new || !self.has_read {
                    self.awaited.insert(stored.device);
                }
                is_new
            }
            Restored::Outdone => {
                state.claim(stored.device, known.epoch);
                false
            }
        }
    }

    /// Turns devices offline whose time for a return is over.
    async fn give_up(&mut self, state: &Shared) -> Result<(), StoreError> {
        let over = self.awaited.handle_step(state.observer.now(), is_admitting(state));
        if over.is_empty() {
            return Ok(());
        }
        let devices: Vec<DeviceId> = over.iter().map(|(_, device)| *device).collect();
        settle(state, &devices).await?;
        self.awaited.remove(&over);
        Ok(())
    }

    /// Checks the next devices without a socket here, and leaves those to other nodes that have seen them since.
    async fn leave_moved(&mut self, state: &Shared) -> Result<(), StoreError> {
        if is_alone(state) || !has_time(state) {
            return Ok(());
        }
        let (shared, first) = (Arc::clone(state), self.next_away);
        let mut away = blocking(move || shared.history.away(first, AWAY_MAX + 1))
            .await
            .unwrap_or_default();
        let next = away.get(AWAY_MAX).copied();
        away.truncate(AWAY_MAX);
        let stored = state.store.sessions_among(&away).await?;
        if !stored.is_empty() {
            leave(state, &stored, &signs(state).await?);
        }
        self.next_away = next;
        Ok(())
    }
}

/// Whether lookups leave the database time.
pub(super) fn has_time(state: &State) -> bool {
    let admission = state.lookups.state();
    admission.breaker == BreakerState::Closed
        && admission.has_time_to_spare()
        && state.store.state().status.is_answering()
}

/// Leaves devices to other nodes that have seen them since, by what is stored. They are counted there alone from now on.
pub fn leave(state: &State, stored: &[StoredPresence], signs: &[Sign]) {
    let believed = newest_believed(state.clock.wall());
    for row in stored.iter().filter(|row| row.known.epoch <= believed) {
        let history = &state.history;
        history.leave_moved(row.device, |known| has_moved(known, &row.known, state.boot, signs));
    }
}

/// Decides about devices that did not return to this node, by what the database has of them.
///
/// # Errors
/// The database does not answer: nothing is decided.
pub async fn settle(state: &State, devices: &[DeviceId]) -> Result<(), StoreError> {
    let stored = state.store.presence_among(devices).await?;
    let signs = signs(state).await?;
    observe(state, &stored);
    let stored: BTreeMap<DeviceId, StoredPresence> = stored.into_iter().map(|row| (row.device, row)).collect();
    for device in devices {
        let Some(record) = state.history.record(*device) else {
            continue;
        };
        let row = stored.get(device);
        let fate = row.and_then(|row| fate(row.known.epoch, state.boot, &signs, is_alone(state)));
        match returned(&record.known, row.map(|row| &row.known), fate) {
            Return::NotBack => {
                let from = row.and_then(|row| concluded_from(state, row));
                state.note_given_up(*device, from);
            }
            Return::Elsewhere => state.history.leave(*device),
        }
    }
    Ok(())
}

/// Whether devices can return: the node is ready, and looks them up.
fn is_admitting(state: &State) -> bool {
    state.readiness().ready && state.lookups.state().breaker == BreakerState::Closed
}

/// Whether no other node uses the database.
pub fn is_alone(state: &State) -> bool {
    state.config.database_url().sqlite_path().is_some()
}

/// The number of a state that another node wrote.
fn concluded_from(state: &State, stored: &StoredPresence) -> Option<u64> {
    let is_other = node_of(stored.known.epoch) != state.boot.node && !is_alone(state);
    is_other.then_some(stored.number)
}

/// Later sessions of this node are newer than what is stored.
fn observe(state: &State, stored: &[StoredPresence]) {
    if let Some(newest) = stored.iter().map(|stored| stored.known.epoch).max() {
        state.sessions.ids().observe(newest, state.clock.wall());
    }
}
