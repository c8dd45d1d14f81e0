//! Recorder of a fleet: an [`Observer`] that turns events into [`Stats`].

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use seawall_proto::time::Instant;

use crate::{
    driver::{Event, Observer, Refused},
    stats::{Latency, Stats, VersionStats},
};

/// One lock for all devices: an event holds it for well under a microsecond, and a machine makes about 50,000 events
/// per second.
#[derive(Debug)]
pub(crate) struct Recorder(Mutex<Records>);

#[derive(Debug)]
struct Records {
    versions: Vec<(Arc<str>, VersionStats)>,
    devices: Vec<Entry>,
    connect_latency: Latency,
    return_latency: Latency,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    version: u16,
    /// Version that it runs after its current session or attempt.
    next_version: Option<u16>,
    status: Status,
    has_been_connected: bool,
    /// When it meant to make its current attempt.
    intended: Instant,
    /// When it lost its session. `None` before the first attempt and in a session.
    away_since: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Waiting,
    Connecting,
    Connected,
    Stopped,
}

impl Recorder {
    /// `version_of`: an index into `versions` for each device.
    pub(crate) fn new(versions: &[Arc<str>], version_of: impl Iterator<Item = usize>) -> Self {
        let mut versions: Vec<_> = versions
            .iter()
            .map(|name| (Arc::clone(name), VersionStats::default()))
            .collect();
        let devices = version_of
            .map(|version| {
                if let Some((_, stats)) = versions.get_mut(version) {
                    stats.devices += 1;
                    stats.waiting += 1;
                }
                Entry {
                    version: u16::try_from(version).unwrap_or(0),
                    next_version: None,
                    status: Status::Waiting,
                    has_been_connected: false,
                    intended: Instant::ZERO,
                    away_since: None,
                }
            })
            .collect();
        Self(Mutex::new(Records {
            versions,
            devices,
            connect_latency: Latency::default(),
            return_latency: Latency::default(),
        }))
    }

    /// A device runs another version from its next start on. Attempts under way still count for the old one.
    pub(crate) fn set_version(&self, device: usize, name: &Arc<str>) {
        let mut records = self.lock();
        let Records { versions, devices, .. } = &mut *records;
        let Some(entry) = devices.get_mut(device) else {
            return;
        };
        let version = versions.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
            versions.push((Arc::clone(name), VersionStats::default()));
            versions.len() - 1
        });
        entry.next_version = u16::try_from(version).ok();
        entry.change_version(versions);
    }

    pub(crate) fn stats(&self, elapsed: Duration) -> Stats {
        let records = self.lock();
        Stats {
            elapsed_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
            versions: records
                .versions
                .iter()
                .map(|(name, stats)| (name.to_string(), stats.clone()))
                .collect(),
            connect_latency: records.connect_latency.clone(),
            return_latency: records.return_latency.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Records> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Recorder {
    fn observe(&self, device: usize, event: Event<'_>, now: Instant) {
        let mut records = self.lock();
        let Records {
            versions,
            devices,
            connect_latency,
            return_latency,
        } = &mut *records;
        let Some(entry) = devices.get_mut(device) else {
            return;
        };
        let Some((_, stats)) = versions.get_mut(usize::from(entry.version)) else {
            return;
        };
        match event {
            Event::Attempt { intended } => {
                stats.attempts += 1;
                entry.intended = intended;
                entry.away_since.get_or_insert(intended);
                entry.move_to(Status::Connecting, stats);
            }
            Event::Connected => {
                stats.reconnects += u64::from(entry.has_been_connected);
                entry.has_been_connected = true;
                connect_latency.record(now.saturating_since(entry.intended));
                if let Some(since) = entry.away_since.take() {
                    return_latency.record(now.saturating_since(since));
                }
                entry.move_to(Status::Connected, stats);
            }
            Event::Refused(refused) => {
                *stats.refused.entry(code_of(refused)).or_default() += 1;
                entry.move_to(Status::Waiting, stats);
            }
            Event::Failed { .. } => {
                stats.failed += 1;
                entry.move_to(Status::Waiting, stats);
            }
            Event::Closed { code, .. } => {
                let code = code.map_or_else(|| "lost".to_owned(), |code| code.to_string());
                *stats.closed.entry(code).or_default() += 1;
                entry.away_since = Some(now);
                entry.move_to(Status::Waiting, stats);
            }
            Event::Stopped { .. } => entry.move_to(Status::Stopped, stats),
            Event::Message => stats.messages += 1,
            Event::Update => stats.updates += 1,
            Event::Sent => stats.sent += 1,
            Event::Acked => stats.acked += 1,
        }
        entry.change_version(versions);
    }
}

impl Entry {
    fn move_to(&mut self, status: Status, stats: &mut VersionStats) {
        *count_of(stats, self.status) -= 1;
        *count_of(stats, status) += 1;
        self.status = status;
    }

    fn change_version(&mut self, versions: &mut [(Arc<str>, VersionStats)]) {
        if matches!(self.status, Status::Connecting | Status::Connected) {
            return;
        }
        let Some(version) = self.next_version.take() else {
            return;
        };
        if let Some((_, old)) = versions.get_mut(usize::from(self.version)) {
            old.devices -= 1;
            *count_of(old, self.status) -= 1;
        }
        if let Some((_, new)) = versions.get_mut(usize::from(version)) {
            new.devices += 1;
            *count_of(new, self.status) += 1;
        }
        self.version = version;
    }
}

const fn count_of(stats: &mut VersionStats, status: Status) -> &mut u64 {
    match status {
        Status::Waiting => &mut stats.waiting,
        Status::Connecting => &mut stats.connecting,
        Status::Connected => &mut stats.connected,
        Status::Stopped => &mut stats.stopped,
    }
}

/// A closed set: bodies of a foreign server must not make the statistics grow.
fn code_of(refused: &Refused) -> String {
    match refused.known_code() {
        Some(code) => code.as_str().to_owned(),
        None => format!("http_{}", refused.status),
    }
}
