//! State of the recorder: since when each device is missing, and the counts that an event changes.

use std::{collections::BTreeMap, time::Instant};

use seawall_proto::refusal::Code;

use super::{
    Counters, Event, Standing,
    figures::{GroupCounts, Phase},
    presence::{Comparison, End},
};
use crate::report::Second;

/// Close code of a session that a rule evicts: such an end is not a loss.
const CLOSE_EVICTED: u16 = 4000;

#[derive(Debug)]
pub(super) struct Records {
    pub(super) started: Instant,
    pub(super) devices: Vec<Device>,
    /// Groups of each version. Each version is in the first group, `all`.
    pub(super) groups_of: BTreeMap<String, Vec<usize>>,
    pub(super) group_names: Vec<String>,
    pub(super) phases: Vec<Phase>,
    pub(super) seconds: Vec<Second>,
    pub(super) connected: u64,
    /// None: nothing that is published is compared.
    pub(super) presence: Option<Comparison>,
}

#[derive(Debug)]
pub(super) struct Device {
    pub(super) groups: Vec<usize>,
    pub(super) is_connected: bool,
    /// A rule refuses it, so that it is not missing.
    pub(super) is_blocked: bool,
    /// Since when it should be connected and is not.
    due: Option<Due>,
    /// Phase that counts its return and its attempts.
    pub(super) wanted_in: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
struct Due {
    at: Instant,
    phase: usize,
}

impl Records {
    pub(super) fn due(&mut self, index: usize, at: Instant, counts: bool) {
        let Some(current) = self.phases.len().checked_sub(1) else {
            debug_assert!(false, "devices are driven within phases only");
            return;
        };
        let Some(device) = self.devices.get_mut(index) else {
            return;
        };
        if device.is_connected {
            device.is_connected = false;
            self.connected -= 1;
            if let Some(presence) = &mut self.presence {
                presence.ended(index, End::Dropped, at.saturating_duration_since(self.started));
            }
        }
        // One that waits already continues to wait from when it first did.
        device.due.get_or_insert(Due { at, phase: current });
        if counts && device.wanted_in != Some(current) {
            device.wanted_in = Some(current);
            if let Some(phase) = self.phases.get_mut(current) {
                phase.wanted += 1;
            }
        }
    }

    /// A device goes away by an order: it is not missing.
    pub(super) fn went_away(&mut self, index: usize, end: End, now: Instant) {
        let Some(device) = self.devices.get_mut(index) else {
            return;
        };
        device.due = None;
        if device.is_connected {
            device.is_connected = false;
            self.connected -= 1;
            if let Some(presence) = &mut self.presence {
                presence.ended(index, end, now.saturating_duration_since(self.started));
            }
        }
    }

    pub(super) fn handle(&mut self, index: usize, event: Event, now: Instant) {
        let Some(current) = self.phases.len().checked_sub(1) else {
            return;
        };
        let (Some(device), Some(phase)) = (self.devices.get_mut(index), self.phases.get_mut(current)) else {
            return;
        };
        let groups = device.groups.clone();
        let mut count = |change: &mut dyn FnMut(&mut GroupCounts)| {
            for group in &groups {
                if let Some(counts) = phase.groups.get_mut(*group) {
                    change(counts);
                }
            }
        };
        let second = second(&mut self.seconds, self.started, now);
        let since_start = now.saturating_duration_since(self.started);
        match event {
            Event::Attempt => {
                count(&mut |counts| counts.attempts += 1);
                second.attempts += 1;
                if let Some(wanted) = device.wanted_in.and_then(|wanted| self.phases.get_mut(wanted)) {
                    wanted.wanted_attempts += 1;
                }
            }
            Event::Connected => {
                count(&mut |counts| counts.admitted += 1);
                second.admitted += 1;
                device.is_blocked = false;
                if !device.is_connected {
                    device.is_connected = true;
                    self.connected += 1;
                }
                if let Some(presence) = &mut self.presence {
                    presence.connected(index, since_start);
                }
                let due = device.due.take();
                if let Some(due) = due {
                    second.connects += 1;
                    second.connect_ms += now.saturating_duration_since(due.at).as_secs_f64() * 1_000.0;
                }
                let wanted = device.wanted_in.take();
                if let Some(phase) = wanted.and_then(|wanted| self.phases.get_mut(wanted)) {
                    phase.returned.push(now.saturating_duration_since(phase.started));
                }
                if let Some(due) = due {
                    self.record(&groups, due, now);
                }
            }
            Event::Refused(code) => {
                let name = code.map_or("unknown", Code::as_str);
                count(&mut |counts| *counts.refused.entry(name).or_default() += 1);
                second.refused += 1;
                if matches!(code, Some(Code::FirmwareBlocked | Code::DeviceDisabled)) {
                    self.excuse(index);
                }
            }
            Event::Sent => count(&mut |counts| counts.sent += 1),
            Event::Acked => count(&mut |counts| counts.acked += 1),
            Event::Failed => {
                count(&mut |counts| counts.failed += 1);
                second.failed += 1;
            }
            Event::Closed(_) | Event::Left | Event::Replaced => {
                if !device.is_connected {
                    return; // dropped by the test, and recorded already
                }
                device.is_connected = false;
                self.connected -= 1;
                if let Some(presence) = &mut self.presence {
                    if let Event::Closed(code) = event {
                        presence.severed(index, code, since_start);
                    } else {
                        presence.ended(index, End::Dropped, since_start);
                    }
                }
                match event {
                    Event::Left
                    | Event::Attempt
                    | Event::Connected
                    | Event::Refused(_)
                    | Event::Failed
                    | Event::Sent
                    | Event::Acked => {}
                    // While the other device has the session, this one is not missing.
                    Event::Replaced => return,
                    Event::Closed(Some(CLOSE_EVICTED)) => return self.excuse(index),
                    Event::Closed(_) => phase.lost_sessions += 1,
                }
                device.due = Some(Due {
                    at: now,
                    phase: current,
                });
            }
        }
    }

    /// Removes a device that a rule refuses from the missing ones and from its phase.
    fn excuse(&mut self, index: usize) {
        let Some(device) = self.devices.get_mut(index) else {
            return;
        };
        device.is_blocked = true;
        device.due = None;
        if let Some(phase) = device.wanted_in.take().and_then(|wanted| self.phases.get_mut(wanted)) {
            phase.wanted -= 1;
        }
    }

    fn record(&mut self, groups: &[usize], due: Due, now: Instant) {
        let us = u64::try_from(now.saturating_duration_since(due.at).as_micros()).unwrap_or(u64::MAX);
        if let Some(phase) = self.phases.get_mut(due.phase) {
            for group in groups {
                if let Some(counts) = phase.groups.get_mut(*group) {
                    counts.latency.saturating_record(us.max(1));
                }
            }
        }
    }

    pub(super) fn standing(&self) -> Standing {
        Standing {
            connected: self.connected,
            missing: self.missing(),
            blocked: self.devices.iter().map(|device| u64::from(device.is_blocked)).sum(),
            lost_sessions: self.phases.iter().map(|phase| phase.lost_sessions).sum(),
        }
    }

    /// The first group has every device.
    pub(super) fn attempts(&self) -> u64 {
        let of_all = self.phases.iter().filter_map(|phase| phase.groups.first());
        of_all.map(|counts| counts.attempts).sum()
    }

    fn missing(&self) -> u64 {
        self.devices.iter().map(|device| u64::from(device.due.is_some())).sum()
    }

    pub(super) fn end_phase(&mut self, now: Instant, counters: Counters) {
        let missing = self.missing();
        let Some(phase) = self.phases.last_mut().filter(|phase| phase.ended.is_none()) else {
            return;
        };
        phase.ended = Some(now);
        phase.missing = missing;
        phase.counters.1 = counters;
        for device in &self.devices {
            for group in &device.groups {
                if let Some(counts) = phase.groups.get_mut(*group) {
                    counts.devices += 1;
                    counts.connected += u64::from(device.is_connected);
                }
            }
        }
    }

    pub(super) fn count_waiting(&mut self, now: Instant) {
        let waiting: Vec<(Vec<usize>, Due)> = self
            .devices
            .iter_mut()
            .filter_map(|device| Some((device.groups.clone(), device.due.take()?)))
            .collect();
        for (groups, due) in waiting {
            self.record(&groups, due, now);
        }
    }
}

impl Device {
    pub(super) fn new(groups: Option<&Vec<usize>>) -> Self {
        Self {
            groups: groups.cloned().unwrap_or_else(|| vec![0]),
            is_connected: false,
            is_blocked: false,
            due: None,
            wanted_in: None,
        }
    }
}

pub(super) fn second(seconds: &mut Vec<Second>, started: Instant, now: Instant) -> &mut Second {
    let index = usize::try_from(now.saturating_duration_since(started).as_secs()).unwrap_or(0);
    while seconds.len() <= index {
        #[expect(clippy::cast_precision_loss, reason = "seconds of a load test are far below 2^52")]
        let at_seconds = seconds.len() as f64;
        seconds.push(Second {
            at_seconds,
            ..Second::default()
        });
    }
    &mut seconds[index]
}
