//! The books of one run: what happened to which device, by phase and by group.
//!
//! Latency counts from the time at which a device should have been connected ([`Recorder::due`]), not from its last attempt, and
//! belongs to the phase of that time: a server that makes devices wait can't hide it.

mod books;
mod figures;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use seawall_proto::refusal::Code;

use self::{
    books::{Books, Device, second},
    figures::{GroupBook, Phase},
};
use crate::report::{Group, Second};

/// What a device tells of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It begins to connect.
    Attempt,
    /// The upgrade is done.
    Connected,
    /// The server answered with a refusal. None: by a code that the contract does not know.
    Refused(Option<Code>),
    /// There was no answer: no TCP connection, a reset, silence, or no HTTP.
    Failed,
    /// The gateway or the network ended a session; the close code where there was one.
    Closed(Option<u16>),
    /// The device ended its session, as its profile does or because the test said so.
    Left,
    /// It sent a message.
    Sent,
    /// A message of its was acked.
    Acked,
    /// A device with the same id has the session now.
    Replaced,
}

/// Shared by all devices of a run. Each call takes `now`, so that tests own the clock.
#[derive(Debug)]
pub struct Recorder {
    books: Mutex<Books>,
}

#[derive(Clone, Debug)]
pub struct PhaseFigures {
    pub starts_seconds: f64,
    pub seconds: f64,
    pub wanted: u64,
    pub t99_seconds: Option<f64>,
    pub t100_seconds: Option<f64>,
    pub attempts_per_device: Option<f64>,
    pub lost_sessions: u64,
    pub missing: u64,
    /// What was counted in it.
    pub counters: Counters,
    pub groups: BTreeMap<String, Group>,
}

/// Counters outside of the devices, read where one phase ends and the next begins.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Look-up statements that the server has sent.
    pub statements: f64,
    /// Look-ups of slow devices that the database has seen. None: it can't be asked.
    pub slow_lookups: Option<u64>,
}

/// How things stand now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    pub connected: u64,
    /// Should be connected, and are not.
    pub missing: u64,
    pub blocked: u64,
    pub lost_sessions: u64,
}

impl Counters {
    fn since(self, earlier: Self) -> Self {
        Self {
            statements: (self.statements - earlier.statements).max(0.0),
            slow_lookups: self
                .slow_lookups
                .zip(earlier.slow_lookups)
                .map(|(now, before)| now.saturating_sub(before)),
        }
    }
}

impl Recorder {
    /// `versions`: the version of each device, in order. `groups`: versions of each group, `all` apart.
    #[must_use]
    pub fn new(versions: &[&str], groups: &BTreeMap<String, Vec<String>>, now: Instant) -> Self {
        let group_names: Vec<String> = std::iter::once(crate::scenario::GROUP_ALL.to_owned())
            .chain(groups.keys().cloned())
            .collect();
        let mut groups_of: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (index, versions) in groups.values().enumerate() {
            for version in versions {
                groups_of
                    .entry(version.clone())
                    .or_insert_with(|| vec![0])
                    .push(index + 1);
            }
        }
        let devices = versions
            .iter()
            .map(|version| Device::new(groups_of.get(*version)))
            .collect();
        let books = Books {
            started: now,
            devices,
            groups_of,
            group_names,
            phases: Vec::new(),
            seconds: Vec::new(),
            connected: 0,
        };
        Self {
            books: Mutex::new(books),
        }
    }

    /// Begins the next phase, and ends the one before. `counters`: as they stand now.
    pub fn begin_phase(&self, now: Instant, counters: Counters) {
        let mut books = self.books();
        books.end_phase(now, counters);
        let groups = books.group_names.iter().map(|_| GroupBook::new()).collect();
        books.phases.push(Phase {
            started: now,
            ended: None,
            wanted: 0,
            wanted_attempts: 0,
            returned: Vec::new(),
            lost_sessions: 0,
            missing: 0,
            counters: (counters, counters),
            groups,
        });
    }

    /// Device `index` should be connected from `at` on: it was dropped then, or is to connect first. `counts`: its return is one
    /// that the phase waits for.
    pub fn due(&self, index: usize, at: Instant, counts: bool) {
        self.books().due(index, at, counts);
    }

    /// Device `index` runs another version now.
    pub fn upgraded(&self, index: usize, version: &str) {
        let mut books = self.books();
        let groups = books.groups_of.get(version).cloned();
        if let Some(device) = books.devices.get_mut(index) {
            device.groups = groups.unwrap_or_else(|| vec![0]);
        }
    }

    pub fn handle(&self, index: usize, event: Event, now: Instant) {
        self.books().handle(index, event, now);
    }

    #[must_use]
    pub fn standing(&self) -> Standing {
        self.books().standing()
    }

    /// The same, noted for the second that `now` is in.
    pub fn tick(&self, now: Instant) -> Standing {
        let mut books = self.books();
        let standing = books.standing();
        let started = books.started;
        second(&mut books.seconds, started, now).connected = standing.connected;
        standing
    }

    /// Is the device connected, as far as it told?
    #[must_use]
    pub fn is_connected(&self, index: usize) -> bool {
        self.books()
            .devices
            .get(index)
            .is_some_and(|device| device.is_connected)
    }

    /// Does it belong to this group now?
    #[must_use]
    pub fn is_in(&self, index: usize, group: &str) -> bool {
        let books = self.books();
        let Some(group) = books.group_names.iter().position(|name| name == group) else {
            return false;
        };
        books
            .devices
            .get(index)
            .is_some_and(|device| device.groups.contains(&group))
    }

    /// Ends the run: devices that still wait count with the time they have waited.
    #[must_use]
    pub fn finish(&self, now: Instant, counters: Counters) -> (Vec<PhaseFigures>, Vec<Second>) {
        let mut books = self.books();
        books.end_phase(now, counters);
        books.count_waiting(now);
        let started = books.started;
        let names = books.group_names.clone();
        let phases = books
            .phases
            .iter()
            .map(|phase| phase.figures(started, &names))
            .collect();
        (phases, std::mem::take(&mut books.seconds))
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
