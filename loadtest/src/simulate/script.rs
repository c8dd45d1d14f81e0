//! The scenario's phases in virtual time: which devices connect, drop, churn and change version, and when. Terms are
//! those of [`crate::phases`], which does the same with real devices.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use rand::Rng;
use seawall_proto::{
    id::RuleId,
    rules::{Effect, Match, Rule, RuleSet, RuleSpec},
    time::Instant,
};
use uuid::Uuid;

use super::{
    checks::Violation,
    database::exponential,
    event::Event,
    world::{SWEEP_MAX, World},
};
use crate::{
    phases::describe,
    scenario::{Action, GROUP_ALL, Phase, Trouble, Until},
};

/// Time between two checks of whether the phase is over. As in a real run.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Checks between two sweeps.
const LOOKS_A_SWEEP: u64 = 10;
/// Maximum number of random draws for a connected device of a group. As in a real run.
const DRAWS_MAX: u32 = 64;

/// Minimum time between the end of the last phase and the end of the run.
const CLOSING: Duration = Duration::from_millis(100);

/// What is left to do in the current phase.
#[derive(Debug)]
pub(super) struct Agenda {
    phase: u8,
    started: Instant,
    length: Duration,
    /// Devices that connect first, at this rate.
    connect_per_second: f64,
    /// Devices that change version, evenly over the phase, in this order.
    upgrades: Vec<u32>,
    /// How many of this phase's devices have been told to connect, or to change.
    done: usize,
    /// Devices that wait for their upgrade. Churn does not touch them.
    set_aside: BTreeSet<u32>,
    churn_next: Option<Instant>,
    looks: u64,
    /// Whether the last phase is over.
    is_closing: bool,
    /// Whether the run is over.
    pub is_over: bool,
}

impl Default for Agenda {
    fn default() -> Self {
        Self {
            phase: 0,
            started: Instant::ZERO,
            length: Duration::ZERO,
            connect_per_second: 0.0,
            upgrades: Vec::new(),
            done: 0,
            set_aside: BTreeSet::new(),
            churn_next: None,
            looks: 0,
            is_closing: false,
            is_over: false,
        }
    }
}

impl World<'_> {
    pub(super) fn begin_first_phase(&mut self) -> Result<(), Violation> {
        self.begin_phase(0)
    }

    /// The current phase.
    #[must_use]
    pub(super) fn phase(&self) -> &Phase {
        &self.scenario.phases[usize::from(self.agenda.phase)]
    }

    fn begin_phase(&mut self, number: u8) -> Result<(), Violation> {
        let scenario = self.scenario;
        let phase = &scenario.phases[usize::from(number)];
        self.recorder
            .begin_phase(&phase.name, describe(&phase.action), self.now);
        self.agenda = Agenda {
            phase: number,
            started: self.now,
            length: phase.time_max(),
            looks: self.agenda.looks,
            ..Agenda::default()
        };
        match &phase.action {
            // Only sessions notice, which are simulated on their own.
            Action::Hold | Action::Gateway(_) => {}
            Action::Connect { per_second } => self.agenda.connect_per_second = *per_second,
            Action::DropAll => self.drop_group(GROUP_ALL)?,
            Action::Drop { group } => self.drop_group(group)?,
            Action::Grow { firmware, to } => {
                self.agenda.upgrades = self.devices.draw_upgrades(firmware, *to, &mut self.rng);
                self.agenda.set_aside = self.agenda.upgrades.iter().copied().collect();
            }
            Action::Database(trouble) => self.trouble(Some(*trouble)),
            Action::Block {
                range,
                reason,
                evict,
                retry_after,
            } => self.block(range, reason, *evict, retry_after.as_deref())?,
            Action::Unblock => {
                self.revision += 1;
                self.rules = Arc::new(RuleSet::compile(self.revision, Vec::new()));
            }
        }
        let assumed = &scenario.simulate;
        let brings_strangers = match &assumed.strangers_from {
            Some(name) => *name == phase.name,
            None => number == 0,
        };
        if brings_strangers && assumed.strangers_per_second > 0.0 {
            self.calendar.push(self.now, Event::Stranger);
        }
        for (number, incident) in (0_u8..).zip(&assumed.incidents) {
            if incident.phase == phase.name {
                let at = self.now + Duration::from_secs_f64(incident.after_seconds);
                self.calendar.push(at, Event::Incident { number });
            }
        }
        if phase.churn_per_second > 0.0 {
            self.agenda.churn_next = Some(self.now + self.pause(phase.churn_per_second));
        }
        let (phase, started) = (number, self.agenda.started);
        self.calendar
            .push(started + self.agenda.length, Event::PhaseEnd { phase });
        self.calendar.push(started, Event::Look { phase });
        self.calendar.push(started, Event::Act { phase });
        Ok(())
    }

    pub(super) fn phase_over(&mut self, phase: u8) -> Result<(), Violation> {
        if phase != self.agenda.phase || self.agenda.is_closing {
            return Ok(());
        }
        if matches!(self.phase().action, Action::Database(_)) {
            self.trouble(None);
        }
        let next = phase + 1;
        if usize::from(next) < self.scenario.phases.len() {
            return self.begin_phase(next);
        }
        // The recorder ends a moment later, as in a real run, which reads the gateway's counters first.
        self.agenda.is_closing = true;
        let grace = CLOSING + 4 * (self.network.round_trip + self.network.extra);
        self.calendar.push(self.now + grace, Event::Finish);
        Ok(())
    }

    /// Ends the run.
    pub(super) fn finish(&mut self) -> Result<(), Violation> {
        self.agenda.is_over = true;
        self.sweep(usize::MAX)
    }

    /// Updates gauges and checks whether the phase is over, ten times a second. Once a second it checks everything
    /// else.
    pub(super) fn look_at_phase(&mut self, phase: u8) -> Result<(), Violation> {
        if phase != self.agenda.phase || self.agenda.is_closing {
            return Ok(());
        }
        self.agenda.looks += 1;
        let k_ref = self.nodes.iter().map(|node| node.state(self.now).k_ref).sum();
        self.recorder.gauge(self.now, |_, second| second.k_ref = Some(k_ref));
        if self.agenda.looks.is_multiple_of(LOOKS_A_SWEEP) {
            self.sweep(SWEEP_MAX)?;
        }
        if self.phase().until == Some(Until::Connected) && self.is_settled() {
            return self.phase_over(phase);
        }
        self.calendar.push(self.now + LOOK_EVERY, Event::Look { phase });
        Ok(())
    }

    fn is_settled(&self) -> bool {
        let agenda = &self.agenda;
        let has_begun_all = agenda.connect_per_second == 0.0 || self.begun == self.devices.len();
        let has_upgraded_all = agenda.done == agenda.upgrades.len() || agenda.upgrades.is_empty();
        has_begun_all && has_upgraded_all && self.recorder.standing().missing == 0
    }

    /// Does what is due now, and schedules the next action.
    pub(super) fn act_of_phase(&mut self, phase: u8) -> Result<(), Violation> {
        if phase != self.agenda.phase || self.agenda.is_closing {
            return Ok(());
        }
        let end = self.agenda.started + self.agenda.length;
        let mut next = Instant::FAR_FUTURE;
        while self.agenda.connect_per_second > 0.0 && self.begun < self.devices.len() {
            // The first of this phase is due at its start, even where an earlier phase has begun some.
            let after = to_f64(self.agenda.done) / self.agenda.connect_per_second;
            let at = self.agenda.started + Duration::from_secs_f64(after);
            if at > self.now {
                next = next.min(at);
                break;
            }
            let device = self.begun;
            self.recorder.due(device, at, true);
            self.restart(device)?;
            self.begun += 1;
            self.agenda.done += 1;
        }
        while let Some(device) = self.agenda.upgrades.get(self.agenda.done).copied() {
            let part = to_f64(self.agenda.done) / to_f64(self.agenda.upgrades.len());
            let at = self.agenda.started + self.agenda.length.mul_f64(part);
            if at > self.now {
                next = next.min(at);
                break;
            }
            self.upgrade(device as usize, at)?;
            self.agenda.set_aside.remove(&device);
            self.agenda.done += 1;
        }
        while let Some(at) = self.agenda.churn_next {
            if at > self.now {
                next = next.min(at);
                break;
            }
            if let Some(device) = self.draw_connected() {
                self.recorder.due(device, at, false);
                self.restart(device)?;
            }
            let pause = self.pause(self.phase().churn_per_second);
            self.agenda.churn_next = Some(at + pause);
        }
        if next < end {
            self.calendar.push(next, Event::Act { phase });
        }
        Ok(())
    }

    /// Restarts a device: it forgets everything and connects at once.
    pub(super) fn restart(&mut self, device: usize) -> Result<(), Violation> {
        let number = u32::try_from(device).unwrap_or(u32::MAX);
        self.abort(number);
        self.devices.machines[device] = self.devices.machine_from(device, self.now);
        self.devices.set_promised(device, None);
        self.act(number)
    }

    fn drop_group(&mut self, group: &str) -> Result<(), Violation> {
        let group = self.recorder.group(group).unwrap_or_default();
        for device in 0..self.begun {
            if self.recorder.is_connected(device) && self.recorder.is_in(device, group) {
                self.reset(device)?;
            }
        }
        Ok(())
    }

    /// The connection of a device is reset.
    pub(super) fn reset(&mut self, device: usize) -> Result<(), Violation> {
        self.recorder.due(device, self.now, true);
        self.devices.machines[device].handle_closed(None, self.now, &mut self.rng);
        self.act(u32::try_from(device).unwrap_or(u32::MAX))
    }

    fn upgrade(&mut self, device: usize, at: Instant) -> Result<(), Violation> {
        let scenario = self.scenario;
        if let Action::Grow { firmware, .. } = &scenario.phases[usize::from(self.agenda.phase)].action {
            self.devices.upgrade(device, firmware);
        }
        let version = self.devices.cohort(device).version;
        self.recorder.upgraded(device, version);
        if device < self.begun {
            self.recorder.due(device, at, true);
            self.restart(device)?;
        }
        Ok(())
    }

    fn draw_connected(&mut self) -> Option<usize> {
        if self.begun == 0 {
            return None;
        }
        let group = self.phase().churn_group.as_deref().unwrap_or(GROUP_ALL);
        let group = self.recorder.group(group)?;
        (0..DRAWS_MAX).find_map(|_| {
            let device = self.rng.random_range(0..self.begun);
            let is_free = u32::try_from(device).is_ok_and(|number| !self.agenda.set_aside.contains(&number));
            let fits = is_free && self.recorder.is_connected(device) && self.recorder.is_in(device, group);
            fits.then_some(device)
        })
    }

    /// Time to the next arrival of a Poisson process.
    fn pause(&mut self, per_second: f64) -> Duration {
        Duration::from_secs_f64(exponential(1.0 / per_second, &mut self.rng))
    }

    fn trouble(&mut self, trouble: Option<Trouble>) {
        for id in self.database.set_trouble(trouble, self.now) {
            self.calendar.push(self.now, Event::StatementFailed { statement: id.0 });
        }
        self.forecast();
    }

    /// Makes a rule as the API does. A range that is not valid was refused before the start.
    fn block(&mut self, range: &str, reason: &str, evict: bool, retry_after: Option<&str>) -> Result<(), Violation> {
        let Ok(spec) = rule(range, reason, evict, retry_after) else {
            return Ok(());
        };
        self.revision += 1;
        let made = Rule {
            id: RuleId(Uuid::from_u128(self.revision.into())),
            spec,
            created_at: self.wall(),
            revision: self.revision,
        };
        let mut rules = self.rules.rules().to_vec();
        rules.push(made);
        self.rules = Arc::new(RuleSet::compile(self.revision, rules));
        for node in (0_u8..).take(self.nodes.len()) {
            self.settle(node)?;
            self.rules_changed(node);
        }
        Ok(())
    }
}

/// Returns the rule that a phase asks for.
///
/// # Errors
/// Its range or its `retry_after` is not valid.
pub fn rule(range: &str, reason: &str, evict: bool, retry_after: Option<&str>) -> Result<RuleSpec, String> {
    let matches = Match {
        firmware: Some(range.parse().map_err(|error| format!("{range:?}: {error}"))?),
        ..Match::default()
    };
    let mut spec = RuleSpec::new(matches, Effect::Block);
    reason.clone_into(&mut spec.reason);
    spec.evict = evict;
    if let Some(text) = retry_after {
        spec.retry_after = humantime::parse_duration(text).map_err(|error| format!("{text:?}: {error}"))?;
    }
    Ok(spec)
}

#[expect(clippy::cast_precision_loss, reason = "at most 16,000,000 devices")]
const fn to_f64(count: usize) -> f64 {
    count as f64
}
