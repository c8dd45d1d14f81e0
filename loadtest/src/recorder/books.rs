//! The books themselves: what each device is waited for, and which counts an event moves.

use std::{collections::BTreeMap, time::Instant};

use seawall_proto::refusal::Code;

use super::{
    Counters, Event, Standing,
    figures::{GroupBook, Phase},
};
use crate::report::Second;

/// Close code of a session that a rule evicts: such an end is no loss.
const CLOSE_EVICTED: u16 = 4000;

#[derive(Debug)]
pub(super) struct Books {
    pub(super) started: Instant,
    pub(super) devices: Vec<Device>,
    /// Groups each version belongs to; the first group, `all`, always.
    pub(super) groups_of: BTreeMap<String, Vec<usize>>,
    pub(super) group_names: Vec<String>,
    pub(super) phases: Vec<Phase>,
    pub(super) seconds: Vec<Second>,
    pub(super) connected: u64,
}

#[derive(Debug)]
pub(super) struct Device {
    pub(super) groups: Vec<usize>,
    pub(super) is_connected: bool,
    /// A rule refuses it: nobody waits for it.
    pub(super) is_blocked: bool,
    /// Since when, and from which phase on, it should be connected, and is not.
    due: Option<Due>,
    /// The phase that counts its return and its attempts.
    pub(super) wanted_in: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
struct Due {
    at: Instant,
    phase: usize,
}

impl Books {
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
        }
        // One that waits already goes on waiting from when it first did.
        device.due.get_or_insert(Due { at, phase: current });
        if counts && device.wanted_in != Some(current) {
            device.wanted_in = Some(current);
            if let Some(phase) = self.phases.get_mut(current) {
                phase.wanted += 1;
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
        let mut count = |change: &mut dyn FnMut(&mut GroupBook)| {
            for group in &groups {
                if let Some(book) = phase.groups.get_mut(*group) {
                    change(book);
                }
            }
        };
        let second = second(&mut self.seconds, self.started, now);
        match event {
            Event::Attempt => {
                count(&mut |book| book.attempts += 1);
                second.attempts += 1;
                if let Some(wanted) = device.wanted_in.and_then(|wanted| self.phases.get_mut(wanted)) {
                    wanted.wanted_attempts += 1;
                }
            }
            Event::Connected => {
                count(&mut |book| book.admitted += 1);
                second.admitted += 1;
                device.is_blocked = false;
                if !device.is_connected {
                    device.is_connected = true;
                    self.connected += 1;
                }
                let due = device.due.take();
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
                count(&mut |book| *book.refused.entry(name).or_default() += 1);
                second.refused += 1;
                if matches!(code, Some(Code::FirmwareBlocked | Code::DeviceDisabled)) {
                    self.excuse(index);
                }
            }
            Event::Sent => count(&mut |book| book.sent += 1),
            Event::Acked => count(&mut |book| book.acked += 1),
            Event::Failed => {
                count(&mut |book| book.failed += 1);
                second.failed += 1;
            }
            Event::Closed(_) | Event::Left | Event::Replaced => {
                if !device.is_connected {
                    return; // dropped by the test, which has said so
                }
                device.is_connected = false;
                self.connected -= 1;
                match event {
                    Event::Left
                    | Event::Attempt
                    | Event::Connected
                    | Event::Refused(_)
                    | Event::Failed
                    | Event::Sent
                    | Event::Acked => {}
                    // As long as the other one has the session, nobody waits for this one.
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

    /// A rule refuses it: it is not missing, and no phase waits for it.
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
                if let Some(book) = phase.groups.get_mut(*group) {
                    book.latency.saturating_record(us.max(1));
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
                if let Some(book) = phase.groups.get_mut(*group) {
                    book.devices += 1;
                    book.connected += u64::from(device.is_connected);
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
