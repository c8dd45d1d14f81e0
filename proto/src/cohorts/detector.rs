//! The detector: names the cohort that is bad, and nobody else.

use std::collections::BTreeMap;

use super::{
    Evidence, Finding, Level, Signal, decay,
    ratio::{self, Cost, Lookups, Messages, Sorted},
    watch::Watch,
};
use crate::{cohort::CohortTag, time::Instant};

/// Maximum number of cohorts watched. Further ones are not judged until an idle one makes room.
pub const COHORTS_MAX: usize = 2_048;
/// Time constant with which the number of a cohort's devices falls, in seconds: devices in a crash loop are away at
/// times.
const DEVICES: f64 = 600.0;
/// Maximum time between two calls that counts, in seconds. A process that stood still has missed events.
const ELAPSED_MAX: u64 = 30;
/// Interval between two looks at message rates, in seconds.
const MESSAGES_INTERVAL: u64 = 10;

crate::labels! {
    /// What happened to a device.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum EventKind {
        /// A session ended that was a repeat: short, and soon after another one of the device.
        Repeat = "repeat",
        /// A session of more than two minutes ended, and its device is in a loop; see
        /// [`Past::is_in_loop`](super::Past::is_in_loop).
        SlowRepeat = "slow_repeat",
        /// The device broke the protocol or a limit, or its credential was refused.
        Error = "error",
    }
}

/// An event of one device. What the server did of its own accord is none.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    pub kind: EventKind,
    pub cohort: CohortTag,
    /// The failure domain that the device is in; see [`Sites::domain`](super::Sites::domain).
    pub domain: u64,
    /// Hash of the device's tenant.
    pub tenant: u64,
    /// Whether the device's session before was a repeat as well.
    pub is_again: bool,
}

/// Judges each cohort against the rest of the fleet. To be called with every event, and once a second.
///
/// Memory: about 700 bytes per cohort, and 32 bytes per failure domain with an event within the last minute. A cohort
/// has at most 512 of these.
#[derive(Debug, Default)]
pub struct Detector {
    index: BTreeMap<CohortTag, u32>,
    cohorts: Vec<Watched>,
    fleet: f64,
    repeats: Watch,
    slow_repeats: Watch,
    errors: Watch,
    /// Cohorts with look-ups in this second.
    looked_up: Vec<(u32, Lookups)>,
    second: u64,
    /// Second of the last look at message rates.
    messages_at: u64,
}

#[derive(Debug)]
struct Watched {
    tag: CohortTag,
    /// Hash of its model.
    model: u64,
    devices: f64,
    devices_at: u64,
    seen: u64,
    cost: Cost,
    messages: Messages,
    /// Messages in this second.
    fresh_messages: u64,
}

impl Detector {
    /// Notes how many sessions a cohort has, and what it did since the last second. `model`: a hash.
    pub fn handle_cohort(&mut self, cohort: CohortTag, model: u64, sessions: usize, work: (u32, u64, u64)) {
        let Some(slot) = self.slot(cohort, model) else {
            return;
        };
        let (keys, micros, messages) = work;
        let now = self.second;
        let watched = &mut self.cohorts[slot as usize];
        let before = watched.devices;
        let kept = before * decay(now.saturating_sub(watched.devices_at) as f64, DEVICES);
        watched.devices = (sessions as f64).max(kept);
        watched.devices_at = now;
        watched.fresh_messages += messages;
        if sessions > 0 {
            watched.seen = now;
        }
        self.fleet = (self.fleet + watched.devices - before).max(0.0);
        if keys > 0 {
            self.looked_up.push((slot, Lookups { keys, micros }));
        }
    }

    /// Counts an event of a device of a cohort that was noted before.
    pub fn handle_event(&mut self, event: &Event) {
        let Some(slot) = self.index.get(&event.cohort).copied() else {
            return;
        };
        let watch = match event.kind {
            EventKind::Repeat => &mut self.repeats,
            EventKind::SlowRepeat => &mut self.slow_repeats,
            EventKind::Error => &mut self.errors,
        };
        watch.handle_event(slot, event.domain, event.tenant, event.is_again, self.second);
    }

    /// Ends a second, and returns the cohorts that stand out at present.
    pub fn handle_second(&mut self, now: Instant) -> Vec<Finding> {
        let second = now.as_micros() / 1_000_000;
        let elapsed = second.saturating_sub(self.second).clamp(1, ELAPSED_MAX) as f64;
        let mut findings = Vec::new();
        let (cohorts, fleet) = (&self.cohorts, self.fleet);
        // Only short repeats are a reason to refuse devices without a person.
        for (signal, level_max, watch) in [
            (Signal::Repeats, Level::Apply, &mut self.repeats),
            (Signal::Repeats, Level::Propose, &mut self.slow_repeats),
            (Signal::Errors, Level::Propose, &mut self.errors),
        ] {
            let devices = |slot: u32| cohorts[slot as usize].devices;
            watch.handle_second(self.second, elapsed, fleet, devices, |found| {
                let watched = &cohorts[found.slot as usize];
                findings.push(Finding {
                    cohort: watched.tag,
                    signal,
                    level: found.level.min(level_max),
                    evidence: Evidence {
                        observed: found.observed,
                        expected: found.expected,
                        score: found.score,
                        devices: watched.devices,
                        fleet,
                        tenant: found.tenant,
                    },
                });
            });
        }
        self.judge_cost(&mut findings);
        self.judge_messages(&mut findings);
        self.second = second.max(self.second + 1);
        findings
    }

    /// Whether a cohort is still bad by this signal: far above what is expected, if perhaps on few devices. Slow
    /// repeats are left out: two of them would renew a rule that holds devices back for short ones.
    #[must_use]
    pub fn is_bad(&self, cohort: CohortTag, signal: Signal) -> bool {
        let Some(slot) = self.index.get(&cohort).copied() else {
            return false;
        };
        let watched = &self.cohorts[slot as usize];
        match signal {
            Signal::Repeats => self.repeats.is_bad(slot),
            Signal::Errors => self.errors.is_bad(slot),
            Signal::Cost => watched.cost.is_bad(self.second),
            Signal::Messages => watched.messages.is_bad(),
        }
    }

    /// How far a cohort stands out at present, by its greatest score: from 1 on a proposal is due, if enough devices
    /// are concerned. 0: not at all.
    #[must_use]
    pub fn stands_out(&self, cohort: CohortTag) -> f64 {
        let Some(slot) = self.index.get(&cohort).copied() else {
            return 0.0;
        };
        let watched = &self.cohorts[slot as usize];
        let watches = [&self.repeats, &self.slow_repeats, &self.errors];
        let of_events = watches.iter().map(|watch| watch.stands_out(slot));
        let others = [watched.cost.stands_out(self.second), watched.messages.stands_out()];
        of_events.chain(others).fold(0.0, f64::max)
    }

    /// Devices of a cohort, those in a crash loop included.
    #[must_use]
    pub fn devices(&self, cohort: CohortTag) -> f64 {
        let slot = self.index.get(&cohort);
        slot.map_or(0.0, |slot| self.cohorts[*slot as usize].devices)
    }

    /// Devices of all cohorts.
    #[must_use]
    pub const fn fleet(&self) -> f64 {
        self.fleet
    }

    fn judge_cost(&mut self, findings: &mut Vec<Finding>) {
        if self.looked_up.is_empty() {
            return;
        }
        let sorted = Sorted::new(std::mem::take(&mut self.looked_up));
        for (slot, lookups, others, median) in sorted.compared() {
            let watched = &mut self.cohorts[slot as usize];
            let found = watched.cost.handle_second(lookups, others, median, self.second);
            findings.extend(found.map(|found| watched.finding(Signal::Cost, found, self.fleet)));
        }
    }

    fn judge_messages(&mut self, findings: &mut Vec<Finding>) {
        let elapsed = self.second.saturating_sub(self.messages_at);
        if elapsed < MESSAGES_INTERVAL {
            return;
        }
        self.messages_at = self.second;
        let elapsed = elapsed.min(ELAPSED_MAX) as f64;
        let mut usual: BTreeMap<u64, f64> = BTreeMap::new();
        for watched in &self.cohorts {
            if let Some(peak) = watched.messages.usual() {
                let of_model = usual.entry(watched.model).or_default();
                *of_model = of_model.max(peak);
            }
        }
        for watched in &mut self.cohorts {
            let messages = std::mem::take(&mut watched.fresh_messages) as f64;
            let of_model = usual.get(&watched.model).copied();
            let found = watched
                .messages
                .handle_second(messages, watched.devices, of_model, elapsed);
            findings.extend(found.map(|found| watched.finding(Signal::Messages, found, self.fleet)));
        }
    }

    /// The place of a cohort, made where there is none and room for it.
    fn slot(&mut self, tag: CohortTag, model: u64) -> Option<u32> {
        if let Some(slot) = self.index.get(&tag) {
            return Some(*slot);
        }
        let slot = if self.cohorts.len() < COHORTS_MAX {
            self.cohorts.len()
        } else {
            self.idle_slot()?
        };
        let watched = Watched {
            tag,
            model,
            devices: 0.0,
            devices_at: self.second,
            seen: self.second,
            cost: Cost::default(),
            messages: Messages::default(),
            fresh_messages: 0,
        };
        match self.cohorts.get_mut(slot) {
            Some(place) => {
                self.fleet = (self.fleet - place.devices).max(0.0);
                self.index.remove(&place.tag);
                *place = watched;
            }
            None => self.cohorts.push(watched),
        }
        self.repeats.reset(slot);
        self.slow_repeats.reset(slot);
        self.errors.reset(slot);
        let slot = u32::try_from(slot).ok()?;
        self.index.insert(tag, slot);
        Some(slot)
    }

    /// The cohort without sessions, events or look-ups that had a session longest ago.
    fn idle_slot(&self) -> Option<usize> {
        let is_idle = |slot: &usize| {
            let looked_up = self.looked_up.iter().any(|(of, _)| *of as usize == *slot);
            let watches = [&self.repeats, &self.slow_repeats, &self.errors];
            self.cohorts[*slot].devices < 1.0 && watches.iter().all(|watch| watch.is_idle(*slot)) && !looked_up
        };
        let idle = (0..self.cohorts.len()).filter(is_idle);
        idle.min_by_key(|slot| self.cohorts[*slot].seen)
    }
}

impl Watched {
    fn finding(&self, signal: Signal, (observed, expected, score): ratio::Found, fleet: f64) -> Finding {
        Finding {
            cohort: self.tag,
            signal,
            level: Level::Propose,
            evidence: Evidence {
                observed,
                expected,
                score,
                devices: self.devices,
                fleet,
                tenant: None,
            },
        }
    }
}
