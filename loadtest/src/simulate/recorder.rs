//! The recorder of a simulation: what [`crate::recorder::Recorder`] keeps of a real run, in a few bytes per device and
//! in virtual time.
//!
//! Rules and words are the recorder's: latency counts from the time at which a device should have been connected, and
//! belongs to that time's phase; a phase's return times are those of the devices that it disconnected, or let connect
//! first.

use std::{collections::BTreeMap, time::Duration};

use hdrhistogram::Histogram;
use seawall_proto::{refusal::Code, time::Instant};

use super::presence::Bits;
use crate::report::{Group, Latency, PhaseReport, Second, Summary, histogram};

/// Flag of a device that a rule refuses: it is not missing.
const BLOCKED: u8 = 1;
/// Number that stands for no phase.
const NONE: u8 = u8::MAX;
/// Maximum number of phases.
pub const PHASES_MAX: usize = 254;
/// Time that stands for a device that is not due.
const NOT_DUE: u64 = u64::MAX;

/// An event of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observation {
    Attempt,
    Connected,
    Refused(Code),
    /// The attempt got no answer.
    Failed,
    /// A rule ended its session.
    Evicted,
}

#[derive(Debug)]
pub struct Recorder {
    devices: Vec<Entry>,
    connected: Bits,
    /// Groups of each version's devices, by the version's number; the first, `all`, always.
    groups_of: Vec<Vec<usize>>,
    group_names: Vec<String>,
    phases: Vec<Phase>,
    seconds: Vec<Second>,
    standing: Standing,
    attempts_max: u16,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Microseconds at which it should have been connected.
    due_at: u64,
    /// Attempts since then.
    attempts: u16,
    due_phase: u8,
    /// Phase that counts its return and its attempts.
    wanted_in: u8,
    flags: u8,
    version: u8,
}

/// Current counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    pub connected: u64,
    /// Devices that should be connected and are not.
    pub missing: u64,
    pub blocked: u64,
}

#[derive(Debug)]
struct Phase {
    name: String,
    action: String,
    started: Instant,
    ended: Option<Instant>,
    wanted: u64,
    wanted_attempts: u64,
    /// Microseconds since the start of the phase, ascending.
    returned: Vec<u64>,
    missing: u64,
    gauges: Gauges,
    groups: Vec<GroupCounts>,
}

/// Figures of all nodes together in one phase.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gauges {
    pub statements: u64,
    pub slow_lookups: u64,
    pub in_flight_max: u64,
    pub limit_max: u64,
    pub queue_max: u64,
}

#[derive(Debug)]
struct GroupCounts {
    devices: u64,
    connected: u64,
    attempts: u64,
    admitted: u64,
    refused: BTreeMap<&'static str, u64>,
    failed: u64,
    latency: Histogram<u64>,
}

impl Recorder {
    /// `versions`: the number of each device's version, in order. `groups_of`: the groups of each version.
    #[must_use]
    pub fn new(versions: impl Iterator<Item = usize>, groups_of: Vec<Vec<usize>>, group_names: Vec<String>) -> Self {
        let entry = |version: usize| Entry {
            due_at: NOT_DUE,
            attempts: 0,
            due_phase: NONE,
            wanted_in: NONE,
            flags: 0,
            version: u8::try_from(version).unwrap_or(u8::MAX),
        };
        let devices: Vec<Entry> = versions.map(entry).collect();
        Self {
            connected: Bits::new(devices.len()),
            devices,
            groups_of,
            group_names,
            phases: Vec::new(),
            seconds: Vec::new(),
            standing: Standing::default(),
            attempts_max: 0,
        }
    }

    pub fn begin_phase(&mut self, name: &str, action: String, now: Instant) {
        self.end_phase(now);
        debug_assert!(self.phases.len() < PHASES_MAX, "checked before the start");
        self.phases.push(Phase {
            name: name.to_owned(),
            action,
            started: now,
            ended: None,
            wanted: 0,
            wanted_attempts: 0,
            returned: Vec::new(),
            missing: 0,
            gauges: Gauges::default(),
            groups: self.group_names.iter().map(|_| GroupCounts::new()).collect(),
        });
    }

    /// A device should be connected from `at` on: it was dropped then, or connects for the first time. `counts`: the
    /// phase waits for its return.
    pub fn due(&mut self, device: usize, at: Instant, counts: bool) {
        let current = self.phase_number();
        let entry = &mut self.devices[device];
        if self.connected.get(device) {
            self.connected.set(device, false);
            self.standing.connected -= 1;
        }
        // One that waits already continues to wait from when it first did.
        if entry.due_at == NOT_DUE {
            self.standing.missing += 1;
            (entry.due_at, entry.due_phase, entry.attempts) = (at.as_micros(), current, 0);
        }
        if counts && entry.wanted_in != current {
            entry.wanted_in = current;
            if let Some(phase) = self.phases.get_mut(usize::from(current)) {
                phase.wanted += 1;
            }
        }
    }

    /// A device runs another version from now on.
    pub fn upgraded(&mut self, device: usize, version: usize) {
        self.devices[device].version = u8::try_from(version).unwrap_or(u8::MAX);
    }

    pub fn handle(&mut self, device: usize, observation: Observation, now: Instant) {
        let entry = &mut self.devices[device];
        let groups = &self.groups_of[usize::from(entry.version)];
        let second = second(&mut self.seconds, now);
        let Some(phase) = self.phases.last_mut() else {
            return;
        };
        match observation {
            Observation::Attempt => {
                phase.count(groups, |counts| counts.attempts += 1);
                second.attempts += 1;
                entry.attempts = entry.attempts.saturating_add(1);
                if let Some(wanted) = self.phases.get_mut(usize::from(entry.wanted_in)) {
                    wanted.wanted_attempts += 1;
                }
            }
            Observation::Connected => {
                phase.count(groups, |counts| counts.admitted += 1);
                second.admitted += 1;
                self.attempts_max = self.attempts_max.max(entry.attempts);
                if entry.flags & BLOCKED != 0 {
                    entry.flags &= !BLOCKED;
                    self.standing.blocked -= 1;
                }
                if !self.connected.get(device) {
                    self.connected.set(device, true);
                    self.standing.connected += 1;
                }
                let wanted = std::mem::replace(&mut entry.wanted_in, NONE);
                if let Some(phase) = self.phases.get_mut(usize::from(wanted)) {
                    phase.returned.push(micros_since(now, phase.started));
                    second.returned += 1;
                }
                if entry.due_at != NOT_DUE {
                    let due = (std::mem::replace(&mut entry.due_at, NOT_DUE), entry.due_phase);
                    self.standing.missing -= 1;
                    record(&mut self.phases, groups, due, now);
                }
            }
            Observation::Refused(code) => {
                phase.count(groups, |counts| *counts.refused.entry(code.as_str()).or_default() += 1);
                second.refused += 1;
                if matches!(code, Code::FirmwareBlocked | Code::DeviceDisabled) {
                    self.excuse(device);
                }
            }
            Observation::Failed => {
                phase.count(groups, |counts| counts.failed += 1);
                second.failed += 1;
            }
            Observation::Evicted => {
                if self.connected.get(device) {
                    self.connected.set(device, false);
                    self.standing.connected -= 1;
                    self.excuse(device);
                }
            }
        }
    }

    /// Removes a device that a rule refuses from the missing ones and from its phase.
    fn excuse(&mut self, device: usize) {
        let entry = &mut self.devices[device];
        if entry.flags & BLOCKED == 0 {
            entry.flags |= BLOCKED;
            self.standing.blocked += 1;
        }
        if entry.due_at != NOT_DUE {
            entry.due_at = NOT_DUE;
            self.standing.missing -= 1;
        }
        let wanted = std::mem::replace(&mut entry.wanted_in, NONE);
        if let Some(phase) = self.phases.get_mut(usize::from(wanted)) {
            phase.wanted -= 1;
        }
    }

    #[must_use]
    pub const fn standing(&self) -> Standing {
        self.standing
    }

    #[must_use]
    pub fn is_connected(&self, device: usize) -> bool {
        self.connected.get(device)
    }

    #[must_use]
    pub fn is_in(&self, device: usize, group: usize) -> bool {
        self.groups_of[usize::from(self.devices[device].version)].contains(&group)
    }

    /// The connected devices.
    #[must_use]
    pub const fn connected(&self) -> &Bits {
        &self.connected
    }

    /// See [`Devices::fetch`](super::devices::Devices::fetch).
    pub fn fetch(&self, device: usize) {
        std::hint::black_box(self.devices.get(device).map(|entry| entry.flags));
    }

    /// The number of a group.
    #[must_use]
    pub fn group(&self, name: &str) -> Option<usize> {
        self.group_names.iter().position(|known| known == name)
    }

    /// Maximum number of attempts that a device made until it was connected.
    #[must_use]
    pub const fn attempts_max(&self) -> u16 {
        self.attempts_max
    }

    /// Changes the gauges of the current phase and second.
    pub fn gauge(&mut self, now: Instant, change: impl FnOnce(&mut Gauges, &mut Second)) {
        if let Some(phase) = self.phases.last_mut() {
            let second = second(&mut self.seconds, now);
            second.connected = self.standing.connected;
            change(&mut phase.gauges, second);
        }
    }

    fn phase_number(&self) -> u8 {
        u8::try_from(self.phases.len().saturating_sub(1)).unwrap_or(NONE)
    }

    fn end_phase(&mut self, now: Instant) {
        let Some(phase) = self.phases.last_mut().filter(|phase| phase.ended.is_none()) else {
            return;
        };
        phase.ended = Some(now);
        phase.missing = self.standing.missing;
        for (device, entry) in self.devices.iter().enumerate() {
            for group in &self.groups_of[usize::from(entry.version)] {
                if let Some(counts) = phase.groups.get_mut(*group) {
                    counts.devices += 1;
                    counts.connected += u64::from(self.connected.get(device));
                }
            }
        }
    }

    /// Ends the run. Devices that are still missing count with the time for which they have been.
    #[must_use]
    pub fn finish(mut self, capacity_per_second: f64, now: Instant) -> (Vec<PhaseReport>, Vec<Second>) {
        self.end_phase(now);
        for entry in &self.devices {
            if entry.due_at != NOT_DUE {
                let groups = &self.groups_of[usize::from(entry.version)];
                record(&mut self.phases, groups, (entry.due_at, entry.due_phase), now);
            }
        }
        let phases = self
            .phases
            .iter()
            .map(|phase| phase.report(&self.group_names, capacity_per_second))
            .collect();
        (phases, self.seconds)
    }
}

fn record(phases: &mut [Phase], groups: &[usize], (at, phase): (u64, u8), now: Instant) {
    let us = now.as_micros().saturating_sub(at).max(1);
    if let Some(phase) = phases.get_mut(usize::from(phase)) {
        phase.count(groups, |counts| counts.latency.saturating_record(us));
    }
}

impl Phase {
    fn count(&mut self, groups: &[usize], mut change: impl FnMut(&mut GroupCounts)) {
        for group in groups {
            if let Some(counts) = self.groups.get_mut(*group) {
                change(counts);
            }
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "counts of a simulation are far below 2^52")]
    fn report(&self, names: &[String], capacity_per_second: f64) -> PhaseReport {
        let back = |part: f64| {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a part of a count of devices"
            )]
            let needed = (self.wanted as f64 * part).ceil() as usize;
            let us = self.returned.get(needed.checked_sub(1)?)?;
            Some(Duration::from_micros(*us).as_secs_f64())
        };
        let wanted = (self.wanted > 0).then_some(self.wanted as f64);
        let summary = Summary {
            t99_seconds: back(0.99),
            t100_seconds: back(1.0),
            optimum_seconds: wanted.map(|wanted| wanted / capacity_per_second),
            attempts_per_device: wanted.map(|wanted| self.wanted_attempts as f64 / wanted),
            statements: self.gauges.statements as f64,
            in_flight_max: self.gauges.in_flight_max as f64,
            limit_max: Some(self.gauges.limit_max as f64),
            over_limit: 0.0,
            queue_max: self.gauges.queue_max as f64,
            // Nothing here ends a session but the script, its rules and the device itself.
            lost_sessions: 0.0,
            missing: self.missing as f64,
            slow_lookups: Some(self.gauges.slow_lookups as f64),
            rss_start_bytes: None,
            rss_max_bytes: None,
            presence: None,
        };
        let ended = self.ended.unwrap_or(self.started);
        PhaseReport {
            name: self.name.clone(),
            action: self.action.clone(),
            starts_seconds: self.started.saturating_since(Instant::ZERO).as_secs_f64(),
            seconds: ended.saturating_since(self.started).as_secs_f64(),
            summary,
            drift: None,
            generator: None,
            groups: names
                .iter()
                .zip(&self.groups)
                .map(|(name, counts)| (name.clone(), counts.report()))
                .collect(),
        }
    }
}

impl GroupCounts {
    fn new() -> Self {
        Self {
            devices: 0,
            connected: 0,
            attempts: 0,
            admitted: 0,
            refused: BTreeMap::new(),
            failed: 0,
            latency: histogram(),
        }
    }

    fn report(&self) -> Group {
        Group {
            devices: self.devices,
            connected: self.connected,
            attempts: self.attempts,
            admitted: self.admitted,
            refused: self.refused.clone(),
            failed: self.failed,
            // Sessions are not simulated, nor what they say.
            sent: 0,
            acked: 0,
            latency: Latency::of(&self.latency),
        }
    }
}

fn micros_since(now: Instant, earlier: Instant) -> u64 {
    now.as_micros().saturating_sub(earlier.as_micros())
}

fn second(seconds: &mut Vec<Second>, now: Instant) -> &mut Second {
    let index = usize::try_from(now.as_micros() / 1_000_000).unwrap_or(usize::MAX);
    while seconds.len() <= index {
        #[expect(clippy::cast_precision_loss, reason = "seconds of a simulation are far below 2^52")]
        let at_seconds = seconds.len() as f64;
        seconds.push(Second {
            at_seconds,
            ..Second::default()
        });
    }
    &mut seconds[index]
}
