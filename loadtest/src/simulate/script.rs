//! The scenario's phases in virtual time: who connects, drops, churns and changes version, and when. The words mean what they mean to
//! [`crate::phases`], which does the same to real devices.

use std::{collections::BTreeSet, time::Duration};

use rand::Rng;
use seawall_proto::{
    close::Close,
    drain::Pacing,
    id::{Label, RuleId},
    rules::{Effect, Match, Rule, RuleSet, RuleSpec, Subject},
    time::Instant,
};
use uuid::Uuid;

use super::{
    checks::Violation,
    database::exponential,
    event::{Content, Event},
    node::Eviction,
    world::{SWEEP_MAX, World},
};
use crate::{
    phases::describe,
    scenario::{Action, GROUP_ALL, Phase, Trouble, Until},
};

/// How often it is looked whether the phase is over. As in a real run.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Looks between two sweeps.
const LOOKS_A_SWEEP: u64 = 10;
/// Tries to find a connected device of a group by chance, before the group is taken to have none. As in a real run.
const DRAWS_MAX: u32 = 64;
/// Shortest time between two looks at which evictions are due. As in the gateway.
pub(super) const PASS_MIN: Duration = Duration::from_millis(10);

/// Shortest time between the end of the last phase and the end of the run.
const CLOSING: Duration = Duration::from_millis(100);

/// What is still to be done in the phase under way.
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
    /// They wait for their upgrade: churn leaves them alone.
    set_aside: BTreeSet<u32>,
    churn_next: Option<Instant>,
    looks: u64,
    /// The last phase is over.
    is_closing: bool,
    /// And so is the run.
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

    /// The phase under way.
    #[must_use]
    pub(super) fn phase(&self) -> &Phase {
        &self.scenario.phases[usize::from(self.agenda.phase)]
    }

    fn begin_phase(&mut self, number: u8) -> Result<(), Violation> {
        let scenario = self.scenario;
        let phase = &scenario.phases[usize::from(number)];
        self.books.begin_phase(&phase.name, describe(&phase.action), self.now);
        self.agenda = Agenda {
            phase: number,
            started: self.now,
            length: phase.time_max(),
            looks: self.agenda.looks,
            ..Agenda::default()
        };
        match &phase.action {
            Action::Hold => {}
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
                self.rules = RuleSet::compile(self.revision, Vec::new());
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
        // The last books are closed a moment later, as those of a real run, which asks the gateway for its counters first.
        self.agenda.is_closing = true;
        let grace = CLOSING + 4 * (self.network.round_trip + self.network.extra);
        self.calendar.push(self.now + grace, Event::Finish);
        Ok(())
    }

    /// Everything is over.
    pub(super) fn finish(&mut self) -> Result<(), Violation> {
        self.agenda.is_over = true;
        self.sweep(usize::MAX)
    }

    /// Ten times a second: gauges, and whether the phase is over. Once a second everything else is looked at.
    pub(super) fn look_at_phase(&mut self, phase: u8) -> Result<(), Violation> {
        if phase != self.agenda.phase || self.agenda.is_closing {
            return Ok(());
        }
        self.agenda.looks += 1;
        let k_ref = self.nodes.iter().map(|node| node.state(self.now).k_ref).sum();
        self.books.gauge(self.now, |_, second| second.k_ref = Some(k_ref));
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
        has_begun_all && has_upgraded_all && self.books.standing().missing == 0
    }

    /// Does what is due now, and has the next in the calendar.
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
            self.books.due(device, at, true);
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
                self.books.due(device, at, false);
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

    /// The device starts anew, with an attempt at once, and knows nothing of its life before.
    pub(super) fn restart(&mut self, device: usize) -> Result<(), Violation> {
        let number = u32::try_from(device).unwrap_or(u32::MAX);
        self.abort(number);
        self.devices.machines[device] = self.devices.machine_from(device, self.now);
        self.devices.set_promised(device, None);
        self.act(number)
    }

    fn drop_group(&mut self, group: &str) -> Result<(), Violation> {
        let group = self.books.group(group).unwrap_or_default();
        for device in 0..self.begun {
            if self.books.is_connected(device) && self.books.is_in(device, group) {
                self.reset(device)?;
            }
        }
        Ok(())
    }

    /// The connection of a device is reset.
    pub(super) fn reset(&mut self, device: usize) -> Result<(), Violation> {
        self.books.due(device, self.now, true);
        self.devices.machines[device].handle_closed(None, self.now, &mut self.rng);
        self.act(u32::try_from(device).unwrap_or(u32::MAX))
    }

    fn upgrade(&mut self, device: usize, at: Instant) -> Result<(), Violation> {
        let scenario = self.scenario;
        if let Action::Grow { firmware, .. } = &scenario.phases[usize::from(self.agenda.phase)].action {
            self.devices.upgrade(device, firmware);
        }
        let version = self.devices.cohort(device).version;
        self.books.upgraded(device, version);
        if device < self.begun {
            self.books.due(device, at, true);
            self.restart(device)?;
        }
        Ok(())
    }

    fn draw_connected(&mut self) -> Option<usize> {
        if self.begun == 0 {
            return None;
        }
        let group = self.phase().churn_group.as_deref().unwrap_or(GROUP_ALL);
        let group = self.books.group(group)?;
        (0..DRAWS_MAX).find_map(|_| {
            let device = self.rng.random_range(0..self.begun);
            let is_free = u32::try_from(device).is_ok_and(|number| !self.agenda.set_aside.contains(&number));
            let fits = is_free && self.books.is_connected(device) && self.books.is_in(device, group);
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

    /// As the API would make it; a range that is none makes no rule, and was refused before the start.
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
        self.rules = RuleSet::compile(self.revision, rules);
        for node in (0_u8..).take(self.nodes.len()) {
            self.screen_waiting(node)?;
            self.calendar.push(self.now, Event::Evict { node });
        }
        Ok(())
    }

    /// One look at which sessions of a node are to end now; all over again until none is left.
    pub(super) fn evict(&mut self, node: u8) {
        let place = usize::from(node);
        let mut eviction = match self.nodes[place].eviction.take() {
            Some(eviction) => eviction,
            None => {
                let left = self.to_evict(node);
                if left.is_empty() {
                    return;
                }
                let k_ref = self.nodes[place].state(self.now).k_ref;
                Eviction {
                    pacing: Pacing::evict(k_ref, left.len(), self.now),
                    left,
                }
            }
        };
        let due = eviction.pacing.take_due(eviction.left.len(), self.now);
        for device in eviction.left.drain(..due).collect::<Vec<_>>() {
            let index = device as usize;
            if let Some(at_least) = self.evicting(index).filter(|_| self.books.is_connected(index)) {
                let close = Close::evicted(at_least, &mut self.rng);
                self.send(device, self.devices.attempt(index), Content::Closed(close));
            }
        }
        let mut next = eviction.pacing.poll_timeout().max(self.now + PASS_MIN);
        if eviction.left.is_empty() {
            // The last close is on its way: then it is seen whether others have come.
            next = self.now + Duration::from_secs(3);
        } else {
            self.nodes[place].eviction = Some(eviction);
        }
        self.calendar.push(next, Event::Evict { node });
    }

    fn to_evict(&self, node: u8) -> Vec<u32> {
        if !self.rules.is_evicting(self.wall()) {
            return Vec::new();
        }
        (0..self.begun)
            .filter(|device| self.devices.home(*device) == node && self.books.is_connected(*device))
            .filter(|device| self.evicting(*device).is_some())
            .filter_map(|device| u32::try_from(device).ok())
            .collect()
    }

    /// How long the rule that wants this session gone keeps it away, at least.
    fn evicting(&self, device: usize) -> Option<Duration> {
        let cohort = self.devices.cohort(device);
        let subject = Subject {
            firmware: Some(self.devices.version_name(cohort.version)),
            model: cohort.model.as_ref().map(Label::as_str),
            tenant: Some(cohort.tenant.as_str()),
        };
        let rule = self.rules.evicting(&subject, self.wall())?;
        Some(rule.evicted_for(self.wall().saturating_since(rule.created_at)))
    }
}

/// The rule that a phase asks for.
///
/// # Errors
/// Its range or its `retry_after` is none.
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
