//! Staged changes of a firmware rule, which advance on evidence, without an operator.
//!
//! A [`Rollout`] changes one rule's `admit_percent` stage by stage, in either [`Direction`]. It compares the devices
//! that a stage treats with others of the same minutes, by a sequential test. It has no counters or storage of its own.
//! Every node may call it: only the one that drives it changes anything.

mod counting;
mod plan;
mod sequential;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use counting::{Counting, Side};
use plan::FEW_DEVICES;
pub use plan::{Plan, PlanError};
pub use sequential::{Counts, Totals};
pub(crate) use sequential::{Finding, Sequential};

use crate::time::WallTime;

/// Time without a sign of the driving node after which another one takes over, and evidence starts again: 15 s.
pub const SILENCE_MAX: Duration = Duration::from_secs(15);
/// Time of a stage without a decision after which it is paused: this multiple of the bake, and at least a day.
/// A version that is worse by 1 % may take many hours to show it at the first stage.
const STAGE_BAKES_MAX: u32 = 24;
const STAGE_MAX_MIN: Duration = Duration::from_secs(24 * 60 * 60);
/// Gaps in the evidence of one stage after which it is paused.
const GAPS_MAX: usize = 10;
/// Steps that are remembered: the newest.
pub const STEPS_MAX: usize = 100;
/// Bakes that a stage of few devices waits for its connects.
const FEW_DEVICES_BAKES: u32 = 3;
/// A session that lives this long has proved itself, unless the bake is shorter: 120 s.
pub(crate) const SHORT_SESSION: Duration = Duration::from_secs(120);

crate::labels! {
    /// Which way a rollout leads.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    pub enum Direction {
        /// A refused cohort is admitted again: the share of it that the rule admits rises.
        Release = "release",
        /// A new rule comes into force: the share of the matched devices that it is enforced on rises.
        Rollout = "rollout",
    }
}

crate::labels! {
    /// State of a rollout.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    pub enum State {
        Running = "running",
        /// By a person, or because the rule was changed.
        Paused = "paused",
        /// The treated devices did worse. It went back one stage.
        Halted = "halted",
        /// All stages are passed.
        Done = "done",
        /// The rule acts as before.
        Reverted = "reverted",
    }
}

crate::labels! {
    /// Why a rollout took a step.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    pub enum Verdict {
        Started = "started",
        /// The treated devices do not do worse: the next stage, or the end.
        Fine = "fine",
        /// The treated devices do worse: one stage back.
        Worse = "worse",
        Paused = "paused",
        Resumed = "resumed",
        Reverted = "reverted",
        /// Somebody changed the rule meanwhile: paused.
        RuleChanged = "rule_changed",
        /// There was a gap in the evidence, so that the stage's evidence starts again.
        EvidenceLost = "evidence_lost",
        /// Too many of the devices that the rule has sent away did not return in time: one stage back.
        Missing = "missing",
        /// The stage had no decisive evidence in its time: paused.
        NoEvidence = "no_evidence",
    }
}

/// A step of a rollout: where it led, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    pub at: WallTime,
    /// Number of stages reached after it.
    pub stage: u8,
    /// Share of the matched devices that is treated after it.
    pub percent: u8,
    pub verdict: Verdict,
}

/// What a rule's rollout is at, as it is stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    direction: Direction,
    plan: Plan,
    state: State,
    /// Number of stages reached: 0 before the first.
    stage: u8,
    /// The rule's share before, to which a release goes back.
    admit_before: u8,
    /// Matched devices, as far as they are known; 0: unknown.
    devices: u64,
    /// Number of the evidence window. Counts of another window are not used.
    window: u64,
    /// When the window began.
    since: WallTime,
    /// When the driving node last had evidence.
    seen_at: WallTime,
    /// The run of a node that drives it.
    driver: Option<Uuid>,
    /// Revision of the rule as this left it.
    rule_revision: u64,
    /// Counts of this window.
    totals: Totals,
    test: Sequential,
    /// Oldest first.
    steps: Vec<Step>,
}

/// What [`Rollout::handle_evidence`] has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handled {
    /// Nothing: another node drives it, or it does not run.
    Ignored,
    /// It has noted the evidence: to be stored.
    Noted,
    /// It has taken a step: to be stored together with the rule.
    Stepped(Step),
}

/// A state that can't be reached from the present one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a rollout that is {from} can't become {to}", from = .from.as_str(), to = .to.as_str())]
pub struct NotPossible {
    pub from: State,
    pub to: State,
}

impl Rollout {
    /// Begins with the first stage. `devices`: number of the matched devices, 0 if unknown. `admit_before`: the rule's
    /// present share.
    ///
    /// Stages that were ordered are kept. The first of the default stages has at least 20 devices where there are that
    /// many: smaller ones are left out.
    ///
    /// # Errors
    /// The plan is not valid, or a release has no stage above the present share.
    pub fn begin(
        direction: Direction,
        plan: Plan,
        admit_before: u8,
        devices: u64,
        now: WallTime,
    ) -> Result<Self, PlanError> {
        plan.validate()?;
        let treated = match direction {
            Direction::Release => admit_before,
            Direction::Rollout => 0,
        };
        let mut rollout = Self {
            direction,
            plan: plan.fitted(devices, treated)?,
            state: State::Running,
            stage: 1,
            admit_before,
            devices,
            window: 0,
            since: now,
            seen_at: now,
            driver: None,
            rule_revision: 0,
            totals: Totals::default(),
            test: Sequential::new(now),
            steps: Vec::new(),
        };
        rollout.step(Verdict::Started, now);
        Ok(rollout)
    }

    #[must_use]
    pub const fn direction(&self) -> Direction {
        self.direction
    }

    /// The stages that it takes, and what each of them needs.
    #[must_use]
    pub const fn plan(&self) -> &Plan {
        &self.plan
    }

    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// Number of stages reached; 0 before the first.
    #[must_use]
    pub const fn stage(&self) -> u8 {
        self.stage
    }

    /// Number of the evidence window, which nodes count for.
    #[must_use]
    pub const fn window(&self) -> u64 {
        self.window
    }

    /// Revision of the rule as this left it. A rule with another one was changed by somebody else.
    #[must_use]
    pub const fn rule_revision(&self) -> u64 {
        self.rule_revision
    }

    /// The rule was written together with this, and has this revision.
    pub const fn set_rule_revision(&mut self, revision: u64) {
        self.rule_revision = revision;
    }

    /// Counts of this window.
    #[must_use]
    pub const fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Oldest first; at most [`STEPS_MAX`].
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Logarithm of the likelihood ratio of "worse" to "not worse". Of the values that fit the control's rate, the one
    /// next to 0.
    #[must_use]
    pub const fn log_likelihood_ratio(&self) -> f64 {
        self.test.log_likelihood_ratio()
    }

    /// Share of the matched devices that is treated now, in percent.
    #[must_use]
    pub fn percent(&self) -> u8 {
        match (usize::from(self.stage).checked_sub(1), self.direction) {
            (Some(stage), _) => self.plan.stages.get(stage).copied().unwrap_or(100),
            (None, Direction::Release) => self.admit_before,
            (None, Direction::Rollout) => 0,
        }
    }

    /// The `admit_percent` that the rule must have now.
    #[must_use]
    pub fn admit_percent(&self) -> u8 {
        match self.direction {
            Direction::Release => self.percent(),
            Direction::Rollout => 100 - self.percent().min(100),
        }
    }

    /// Connects of treated devices that the present stage needs: `connects_min`, or half of the stage's devices where
    /// these are fewer. 0 where it is expected to have no device.
    #[must_use]
    pub fn connects_needed(&self) -> u64 {
        let most = u64::from(self.plan.connects_min);
        match self.expected_devices() {
            None => most,
            Some(0) => 0,
            Some(devices) => most.min(devices / 2).max(1),
        }
    }

    /// Devices that the present stage has by its share; `None` if the number of matched devices is unknown. The hash
    /// that chooses them may give it fewer, or none.
    fn expected_devices(&self) -> Option<u64> {
        let devices = self.devices.saturating_mul(u64::from(self.percent())) / 100;
        (self.devices > 0).then_some(devices)
    }

    /// Whether the stage no longer waits for connects. Few devices may be fewer than expected, and stay connected. So
    /// after some bakes those that came are enough, even if none came. A stage without devices does not wait at all.
    fn is_done_waiting(&self, now: WallTime) -> bool {
        let is_late = now.saturating_since(self.since) >= self.plan.bake * FEW_DEVICES_BAKES;
        let is_enough = |devices| devices == 0 || (is_late && devices < FEW_DEVICES);
        self.expected_devices().is_some_and(is_enough)
    }

    /// A session that ends within this time, other than by us, has failed: 120 s, or the bake where that is shorter.
    #[must_use]
    pub fn short_session(&self) -> Duration {
        self.plan.bake.min(SHORT_SESSION)
    }

    /// Time between two looks at the evidence: a tenth of the bake, 1 s to 5 s.
    #[must_use]
    pub fn interval(&self) -> Duration {
        (self.plan.bake / 10).clamp(Duration::from_secs(1), Duration::from_secs(5))
    }

    /// Takes what all nodes have counted in this window, for the node `by`; `rule_revision` is the present one of the
    /// rule. `now` is the time of the database, in which the rollout is stored.
    ///
    /// Advances on time, connects and evidence together. Goes back one stage and halts as soon as the treated devices
    /// do worse. After a gap the stage stays, and its evidence starts again.
    pub fn handle_evidence(&mut self, by: Uuid, totals: Totals, rule_revision: u64, now: WallTime) -> Handled {
        if self.state != State::Running {
            return Handled::Ignored;
        }
        let is_silent = now < self.seen_at || now.saturating_since(self.seen_at) > SILENCE_MAX;
        if self.driver.is_some_and(|driver| driver != by) && !is_silent {
            return Handled::Ignored;
        }
        if rule_revision != self.rule_revision {
            self.state = State::Paused;
            return Handled::Stepped(self.step(Verdict::RuleChanged, now));
        }
        if is_silent {
            self.driver = Some(by);
            let gaps = self.steps.iter().rev();
            let gaps = gaps.take_while(|step| step.verdict == Verdict::EvidenceLost).count();
            if gaps >= GAPS_MAX {
                return Handled::Stepped(self.give_up(now));
            }
            return Handled::Stepped(self.step(Verdict::EvidenceLost, now));
        }
        self.driver = Some(by);
        self.seen_at = now;
        self.totals = totals;
        let interval = (self.plan.bake / 10).clamp(Duration::from_secs(1), Duration::from_secs(60));
        let needed = self.connects_needed();
        match self.test.handle_totals(&totals, needed, interval, now) {
            Finding::Worse => Handled::Stepped(self.halt(Verdict::Worse, now)),
            Finding::Fine | Finding::Open if totals.are_missing() => Handled::Stepped(self.halt(Verdict::Missing, now)),
            Finding::Fine | Finding::Open if now.saturating_since(self.since) < self.plan.bake => Handled::Noted,
            Finding::Fine if totals.treated.connects >= needed => Handled::Stepped(self.advance(now)),
            Finding::Fine => self.advance_if(self.is_done_waiting(now), now),
            // Too few connects to decide: none of them may have failed.
            Finding::Open => self.advance_if(self.is_done_waiting(now) && totals.treated.failed == 0, now),
        }
    }

    fn advance_if(&mut self, may_advance: bool, now: WallTime) -> Handled {
        if may_advance {
            Handled::Stepped(self.advance(now))
        } else if now.saturating_since(self.since) >= self.stage_max() {
            Handled::Stepped(self.give_up(now))
        } else {
            Handled::Noted
        }
    }

    /// Maximum time of a stage without a decision.
    #[must_use]
    pub fn stage_max(&self) -> Duration {
        (self.plan.bake * STAGE_BAKES_MAX).max(STAGE_MAX_MIN)
    }

    fn halt(&mut self, verdict: Verdict, now: WallTime) -> Step {
        self.state = State::Halted;
        self.stage = self.stage.saturating_sub(1);
        self.step(verdict, now)
    }

    fn give_up(&mut self, now: WallTime) -> Step {
        self.state = State::Paused;
        self.step(Verdict::NoEvidence, now)
    }

    fn advance(&mut self, now: WallTime) -> Step {
        let is_last = usize::from(self.stage) >= self.plan.stages.len();
        if is_last {
            self.state = State::Done;
        } else {
            self.stage += 1;
        }
        // A rule that is enforced on all that it matches has no control any more.
        if self.direction == Direction::Rollout && self.percent() == 100 {
            self.state = State::Done;
        }
        self.step(Verdict::Fine, now)
    }

    /// Stops where it is, until a person resumes or reverts it.
    ///
    /// # Errors
    /// It does not run.
    pub fn pause(&mut self, now: WallTime) -> Result<Step, NotPossible> {
        self.allow(State::Paused, &[State::Running])?;
        Ok(self.step(Verdict::Paused, now))
    }

    /// Resumes, with no evidence for its stage.
    ///
    /// # Errors
    /// It is neither paused nor halted.
    pub fn resume(&mut self, now: WallTime) -> Result<Step, NotPossible> {
        self.allow(State::Running, &[State::Paused, State::Halted])?;
        self.stage = self.stage.max(1);
        self.driver = None;
        Ok(self.step(Verdict::Resumed, now))
    }

    /// Makes the rule act as before: a release admits what it did before, a rollout enforces on nobody.
    ///
    /// # Errors
    /// It is reverted already.
    pub fn revert(&mut self, now: WallTime) -> Result<Step, NotPossible> {
        let from = [State::Running, State::Paused, State::Halted, State::Done];
        self.allow(State::Reverted, &from)?;
        self.stage = 0;
        Ok(self.step(Verdict::Reverted, now))
    }

    /// Whether a person may begin another one of the same rule.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        match self.state {
            State::Running | State::Paused => false,
            State::Halted | State::Done | State::Reverted => true,
        }
    }

    fn allow(&mut self, to: State, from: &[State]) -> Result<(), NotPossible> {
        if !from.contains(&self.state) {
            return Err(NotPossible { from: self.state, to });
        }
        self.state = to;
        Ok(())
    }

    /// Records a step. If it is still running, its evidence starts again.
    fn step(&mut self, verdict: Verdict, now: WallTime) -> Step {
        if self.state == State::Running {
            self.window += 1;
            self.since = now;
            self.seen_at = now;
            self.totals = Totals::default();
            self.test = Sequential::new(now);
        }
        let step = Step {
            at: now,
            stage: self.stage,
            percent: self.percent(),
            verdict,
        };
        if self.steps.len() >= STEPS_MAX {
            self.steps.remove(0);
        }
        self.steps.push(step);
        step
    }
}

#[cfg(test)]
mod tests;
