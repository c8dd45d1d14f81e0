//! Recorder of one run: what happened to which device, by phase and by group.
//!
//! Latency is measured from the time at which a device should have been connected ([`Recorder::due`]), not from its
//! last attempt. It belongs to the phase of that time, so that a server that makes devices wait can't hide it.

mod figures;
pub mod presence;
mod records;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use seawall_proto::refusal::Code;

use self::{
    figures::{GroupCounts, Phase},
    presence::{Comparison, Counts, End, State},
    records::{Device, Records, second},
};
use crate::report::{Group, Presence, Second};

/// An event of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It started to connect.
    Attempt,
    /// The upgrade is done.
    Connected,
    /// The server refused it. `None`: with a code that is not documented.
    Refused(Option<Code>),
    /// There was no answer: no TCP connection, a reset, silence, or no HTTP.
    Failed,
    /// The gateway or the network ended its session, with this close code if there was one.
    Closed(Option<u16>),
    /// The device ended its session, as its profile does or because the test said so.
    Left,
    /// It sent a message.
    Sent,
    /// One of its messages was acknowledged.
    Acked,
    /// A device with the same id replaced its session.
    Replaced,
}

/// Recorder of all devices of a run. Each call takes `now`, so that tests own the clock.
#[derive(Debug)]
pub struct Recorder {
    records: Mutex<Records>,
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
    /// Its counts.
    pub counters: Counters,
    pub presence: Option<Presence>,
    pub groups: BTreeMap<String, Group>,
}

/// Counters of the server and its database, read between two phases.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Lookup statements that the server has sent.
    pub statements: f64,
    /// Lookups of slow devices that the database has seen. `None`: they can't be counted.
    pub slow_lookups: Option<u64>,
}

/// Current counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    pub connected: u64,
    /// Devices that should be connected and are not.
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
    /// `versions`: the version of each device, in order. `groups`: the versions of each group but `all`.
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
        let records = Records {
            started: now,
            devices,
            groups_of,
            group_names,
            phases: Vec::new(),
            seconds: Vec::new(),
            connected: 0,
            presence: None,
        };
        Self {
            records: Mutex::new(records),
        }
    }

    /// Compares what the server publishes with what the devices do. `limit`: see [`Comparison::new`].
    #[must_use]
    pub fn comparing(self, limit: Duration) -> Self {
        {
            let mut records = self.records();
            records.presence = Some(Comparison::new(records.devices.len(), limit));
        }
        self
    }

    /// Ends the current phase and begins the next. `counters`: their current values.
    pub fn begin_phase(&self, now: Instant, counters: Counters) {
        let mut records = self.records();
        records.end_phase(now, counters);
        if let Some(presence) = &mut records.presence {
            presence.begin_phase();
        }
        let groups = records.group_names.iter().map(|_| GroupCounts::new()).collect();
        records.phases.push(Phase {
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

    /// Device `index` should be connected from `at` on: it was dropped then, or connects for the first time. `counts`:
    /// the phase waits for its return.
    pub fn due(&self, index: usize, at: Instant, counts: bool) {
        self.records().due(index, at, counts);
    }

    /// Device `index` goes away until it is [due](Self::due) again: it is not missing meanwhile.
    pub fn went_away(&self, index: usize, end: End, now: Instant) {
        self.records().went_away(index, end, now);
    }

    /// The test begins or ends a disturbance of the server.
    pub fn disturb(&self, is_disturbed: bool, now: Instant) {
        self.compare(now, |presence, now| presence.disturb(is_disturbed, now));
    }

    /// The server published the state of device `index`.
    pub fn published(&self, index: usize, state: State, now: Instant) {
        self.compare(now, |presence, now| presence.published(index, state, now));
    }

    /// It published an event about a group of devices, and lists these as unknown.
    pub fn group_published(&self, is_held: bool, unknown: &BTreeSet<usize>, now: Instant) {
        self.compare(now, |presence, now| presence.group_published(is_held, unknown, now));
    }

    /// Its stream of events has a gap.
    pub fn missed(&self) {
        self.compare(Instant::now(), |presence, _| presence.missed());
    }

    /// It published its counts of devices by state.
    pub fn counted(&self, counts: Counts, now: Instant) {
        let mut records = self.records();
        let (started, since) = (records.started, now.saturating_duration_since(records.started));
        let error = records
            .presence
            .as_mut()
            .map(|presence| presence.counted(counts, since));
        second(&mut records.seconds, started, now).presence_error = error;
    }

    /// Figures of presence of the whole run so far. `None`: nothing is compared.
    #[must_use]
    pub fn presence(&self, now: Instant) -> Option<Presence> {
        let mut total = None;
        self.compare(now, |presence, _| total = Some(presence.total()));
        total
    }

    fn compare(&self, now: Instant, change: impl FnOnce(&mut Comparison, Duration)) {
        let mut records = self.records();
        let now = now.saturating_duration_since(records.started);
        if let Some(presence) = &mut records.presence {
            change(presence, now);
        }
    }

    /// Device `index` runs another version from now on.
    pub fn upgraded(&self, index: usize, version: &str) {
        let mut records = self.records();
        let groups = records.groups_of.get(version).cloned();
        if let Some(device) = records.devices.get_mut(index) {
            device.groups = groups.unwrap_or_else(|| vec![0]);
        }
    }

    pub fn handle(&self, index: usize, event: Event, now: Instant) {
        self.records().handle(index, event, now);
    }

    #[must_use]
    pub fn standing(&self) -> Standing {
        self.records().standing()
    }

    /// Returns the current counts, and records them for the second of `now`.
    pub fn tick(&self, now: Instant) -> Standing {
        let mut records = self.records();
        let standing = records.standing();
        let started = records.started;
        second(&mut records.seconds, started, now).connected = standing.connected;
        standing
    }

    /// Attempts of all devices so far.
    #[must_use]
    pub fn attempts(&self) -> u64 {
        self.records().attempts()
    }

    /// Whether the device is connected, as far as it reported.
    #[must_use]
    pub fn is_connected(&self, index: usize) -> bool {
        self.records()
            .devices
            .get(index)
            .is_some_and(|device| device.is_connected)
    }

    /// Whether the device currently belongs to this group.
    #[must_use]
    pub fn is_in(&self, index: usize, group: &str) -> bool {
        let records = self.records();
        let Some(group) = records.group_names.iter().position(|name| name == group) else {
            return false;
        };
        records
            .devices
            .get(index)
            .is_some_and(|device| device.groups.contains(&group))
    }

    /// Ends the run. Devices that are still missing count with the time for which they have been.
    #[must_use]
    pub fn finish(&self, now: Instant, counters: Counters) -> (Vec<PhaseFigures>, Vec<Second>) {
        let mut records = self.records();
        records.end_phase(now, counters);
        records.count_waiting(now);
        let started = records.started;
        let names = records.group_names.clone();
        let mut presence = Vec::new();
        if let Some(comparison) = &mut records.presence {
            comparison.finish(now.saturating_duration_since(started));
            presence = comparison.phases();
        }
        let mut presence = presence.into_iter();
        let phases = records
            .phases
            .iter()
            .map(|phase| PhaseFigures {
                presence: presence.next(),
                ..phase.figures(started, &names)
            })
            .collect();
        (phases, std::mem::take(&mut records.seconds))
    }

    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
