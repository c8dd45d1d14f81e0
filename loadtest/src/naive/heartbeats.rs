//! Presence as a heartbeat service keeps it: a table of stamps, and a sweep.
//!
//! A heartbeat is stamped when it is processed, not when it arrived. A device is offline if its stamp is older than a
//! fixed deadline. Sessions continue meanwhile: as in the outage of 2023, only the status is wrong.
//! The sweep has its own thread; in most such services it is a separate program. Start with [`Heartbeats`].

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use seawall_proto::id::DeviceId;
use tokio::sync::broadcast;

/// Time between two sweeps.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// Events kept for a slow reader.
const EVENTS_MAX: usize = 65_536;

/// The service. One row per device that was ever connected.
#[derive(Debug)]
pub(super) struct Heartbeats {
    every: Duration,
    deadline: Duration,
    table: Mutex<Table>,
    events: broadcast::Sender<String>,
    ends: AtomicBool,
}

#[derive(Debug, Default)]
struct Table {
    rows: BTreeMap<DeviceId, Row>,
    sessions: u64,
}

#[derive(Debug)]
struct Row {
    /// When the last heartbeat was processed.
    stamp: Instant,
    is_online: bool,
    session: u64,
}

/// A session that is held.
#[derive(Debug)]
pub(super) struct Held {
    device: DeviceId,
    session: u64,
}

impl Heartbeats {
    pub(super) fn start(every: Duration, deadline: Duration) -> Arc<Self> {
        let heartbeats = Arc::new(Self {
            every,
            deadline,
            table: Mutex::default(),
            events: broadcast::Sender::new(EVENTS_MAX),
            ends: AtomicBool::new(false),
        });
        let sweeping = Arc::clone(&heartbeats);
        std::thread::spawn(move || {
            while !sweeping.ends.load(Ordering::Relaxed) {
                sweeping.sweep(Instant::now());
                std::thread::sleep(SWEEP_EVERY);
            }
        });
        heartbeats
    }

    /// Ends the sweep.
    pub(super) fn stop(&self) {
        self.ends.store(true, Ordering::Relaxed);
    }

    /// Time between two pings.
    pub(super) const fn every(&self) -> Duration {
        self.every
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<String> {
        self.events.subscribe()
    }

    /// A device is connected.
    pub(super) fn begin(&self, device: DeviceId) -> Held {
        let mut table = self.table();
        table.sessions += 1;
        let session = table.sessions;
        let row = Row {
            stamp: Instant::now(),
            is_online: true,
            session,
        };
        table.rows.insert(device, row);
        self.publish(device, "online", "connected");
        Held { device, session }
    }

    /// A frame of the device is processed.
    pub(super) fn processed(&self, held: &Held) {
        let mut table = self.table();
        if let Some(row) = table.rows.get_mut(&held.device) {
            row.stamp = Instant::now();
            if !row.is_online {
                row.is_online = true;
                self.publish(held.device, "online", "heartbeat");
            }
        }
    }

    /// The session has ended.
    pub(super) fn end(&self, held: &Held) {
        let mut table = self.table();
        let row = table.rows.get_mut(&held.device);
        if let Some(row) = row.filter(|row| row.session == held.session && row.is_online) {
            row.is_online = false;
            self.publish(held.device, "offline", "closed");
        }
    }

    /// Devices of which no heartbeat was processed for too long are offline.
    fn sweep(&self, now: Instant) {
        let mut table = self.table();
        let is_overdue = |row: &Row| row.is_online && now.saturating_duration_since(row.stamp) > self.deadline;
        for (device, row) in table.rows.iter_mut().filter(|(_, row)| is_overdue(row)) {
            row.is_online = false;
            self.publish(*device, "offline", "heartbeat_missed");
        }
    }

    /// As `GET /api/v1/presence?by=tenant` answers.
    pub(super) fn counts(&self) -> String {
        let table = self.table();
        let online = table.rows.values().filter(|row| row.is_online).count();
        let item = serde_json::json!({
            "key": "all", "online": online, "offline": table.rows.len() - online, "unknown": 0,
        });
        serde_json::json!({"items": [item]}).to_string()
    }

    fn publish(&self, device: DeviceId, state: &str, reason: &str) {
        let event = format!(r#"{{"type":"presence","device":"{device}","state":"{state}","reason":"{reason}"}}"#);
        // Nobody may be reading.
        let _ = self.events.send(event);
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn device_whose_heartbeats_are_processed_late_is_called_offline_and_online_again() {
        let heartbeats = Heartbeats::start(Duration::from_secs(30), Duration::from_secs(90));
        let mut events = heartbeats.subscribe();
        let device = DeviceId::from_uuid(Uuid::from_u128(1));

        let held = heartbeats.begin(device);
        heartbeats.sweep(Instant::now() + Duration::from_secs(80));
        heartbeats.sweep(Instant::now() + Duration::from_secs(100));
        assert!(heartbeats.counts().contains("\"offline\":1"));
        heartbeats.processed(&held);
        let newer = heartbeats.begin(device);
        heartbeats.end(&held);
        heartbeats.end(&newer);
        heartbeats.stop();

        let told: Vec<String> = std::iter::from_fn(|| events.try_recv().ok()).collect();
        let states = ["online", "offline", "online", "online", "offline"];
        assert_eq!(told.len(), states.len(), "{told:?}");
        for (event, state) in told.iter().zip(states) {
            assert!(event.contains(&format!("\"state\":\"{state}\"")), "{event}");
        }
    }
}
