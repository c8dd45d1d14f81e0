//! Staged changes of rules on this node: counts for the running ones, and drives those that no other node drives. Start
//! with [`run`].

use std::{collections::BTreeMap, time::Duration};

use seawall_proto::{
    id::RuleId,
    rollout::{Direction, Handled, Rollout, State as Phase, Step, Totals, Verdict},
};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    fleet::{events::Body, rollouts::Watched},
    node::Shared,
    store::{Audit, RolloutWrite, StoreError, StoredRollout},
};

/// Alarm while a rollout is halted, or paused for lack of evidence.
const HALTED_ALARM: &str = "rollout_halted";
/// Actor in the audit log for steps that the gateway takes on its own.
const ACTOR: &str = "gateway";
/// Time between two reads of the rollouts without a sign of a change.
const READ_INTERVAL: Duration = Duration::from_secs(30);
/// The same after a failed read.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum time to put a step in force here. After that the next poll does it.
const RELOAD_MAX: Duration = Duration::from_secs(2);

/// Rollouts that this node has reported.
#[derive(Debug, Default)]
struct Told {
    /// The last step of each rollout that was read.
    steps: BTreeMap<RuleId, Option<Step>>,
    /// Whether rollouts were read at all: those of the first read are not reported.
    has_read: bool,
}

/// Follows the rollouts, until `stop`. They change with the revision of the rules.
pub async fn run(state: Shared, stop: CancellationToken) {
    let mut changes = state.rules.subscribe();
    let mut told = Told::default();
    let mut read_at = Instant::now();
    let mut checks: BTreeMap<RuleId, Check> = BTreeMap::new();
    loop {
        if Instant::now() >= read_at {
            changes.borrow_and_update();
            match state.store.rollouts().await {
                Ok(stored) => {
                    watch(&state, &stored);
                    told.update(&state, &stored);
                    read_at = Instant::now() + READ_INTERVAL;
                }
                Err(error) => {
                    tracing::debug!(%error, "rollouts not readable");
                    read_at = Instant::now() + RETRY_INTERVAL;
                }
            }
        }
        let watched = state.rollouts.watched();
        checks.retain(|rule, _| watched.iter().any(|watched| watched.rule.id == *rule));
        let mut next = read_at;
        for watched in watched.iter() {
            let check = checks.entry(watched.rule.id).or_default();
            let due = check.last.map_or_else(Instant::now, |last| last + watched.interval);
            if due <= Instant::now() {
                check.last = Some(Instant::now());
                if let Err(error) = take(&state, watched, check).await {
                    tracing::debug!(%error, rule.id = %watched.rule.id, "evidence of a rollout not stored");
                }
                next = next.min(Instant::now() + watched.interval);
            } else {
                next = next.min(due);
            }
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
                read_at = Instant::now();
            }
            () = sleep_until(next) => {}
        }
    }
}

/// The last check of the evidence of a rollout.
#[derive(Debug, Default)]
struct Check {
    last: Option<Instant>,
    /// Counts that were written for the other nodes, and their window.
    written: Option<(u64, Totals)>,
}

/// Counts for the running rollouts, once their rules are in force here as the rollouts left them.
fn watch(state: &Shared, stored: &[StoredRollout]) {
    let rules = state.rules.current();
    let running = stored.iter().filter(|stored| stored.rollout.state() == Phase::Running);
    let running = running.filter_map(|stored| {
        let rule = rules.rules().iter().find(|rule| rule.id == stored.rule)?;
        let is_behind = rule.revision < stored.rollout.rule_revision();
        (!is_behind).then(|| (rule.clone(), stored.rollout.clone()))
    });
    state.rollouts.watch(running, state.clock.now());
}

/// Writes this node's counts, and takes the step that all counts require, if this node drives the rollout.
async fn take(state: &Shared, watched: &Watched, check: &mut Check) -> Result<(), StoreError> {
    let rule = watched.rule.id;
    let counted = (watched.window, watched.totals(state.clock.now()));
    if check.written != Some(counted) && counted.1 != Totals::default() {
        state
            .store
            .rollout_count(rule, state.run, counted.0, &counted.1)
            .await?;
        check.written = Some(counted);
    }
    let Some(mut stored) = state.store.rollout(rule).await? else {
        return Ok(());
    };
    let (rule_revision, now) = (stored.rule_revision, stored.now);
    match stored
        .rollout
        .handle_evidence(state.run, stored.totals, rule_revision, now)
    {
        Handled::Ignored => Ok(()),
        Handled::Noted => state.store.rollout_note(&stored).await.map(drop),
        Handled::Stepped(step) => {
            let audit = Audit {
                id: Uuid::now_v7(),
                at: state.clock.wall(),
                actor: ACTOR.to_owned(),
                action: "rollout.step",
            };
            let write = RolloutWrite {
                rule,
                seen: Some(stored.revision),
                rule_revision,
                rollout: stored.rollout,
            };
            match state.store.rollout_step(write, &audit).await {
                Ok(_) => {}
                // Another node was faster.
                Err(StoreError::Conflict(_)) => return Ok(()),
                Err(error) => return Err(error),
            }
            state.metrics.rollout_steps.increment(step.verdict.as_str());
            reload(state).await;
            Ok(())
        }
    }
}

/// Puts a step in force on this node.
async fn reload(state: &Shared) {
    let reloading = state.rules.reload(&state.store, &state.clock, &state.events);
    if !matches!(timeout(RELOAD_MAX, reloading).await, Ok(Ok(()))) {
        tracing::warn!("step of a rollout not in force here in time: the next poll applies it");
    }
}

impl Told {
    /// Reports new steps and halted rollouts, in the log and as events.
    fn update(&mut self, state: &Shared, stored: &[StoredRollout]) {
        for StoredRollout { rule, rollout, .. } in stored {
            let last = rollout.steps().last().copied();
            let before = self.steps.insert(*rule, last);
            let is_new = before.map_or(self.has_read, |before| before != last);
            if let Some(step) = last.filter(|_| is_new) {
                tell(state, *rule, rollout, step);
            }
            let subject = rule.to_string();
            let is_stuck =
                rollout.state() == Phase::Paused && last.is_some_and(|last| last.verdict == Verdict::NoEvidence);
            if rollout.state() == Phase::Halted || is_stuck {
                let action = format!("seawall rules rollout {rule}").into();
                state
                    .alarms
                    .raise(HALTED_ALARM, &subject, halted(*rule, rollout), Some(action));
            } else {
                let detail = format!("the rollout of rule {rule} is {}", rollout.state().as_str());
                state.alarms.set_for(HALTED_ALARM, &subject, false, detail);
            }
        }
        let is_listed = |rule: &RuleId| stored.iter().any(|stored| stored.rule == *rule);
        self.steps.retain(|rule, _| is_listed(rule));
        let is_halted = |subject: &str| stored.iter().any(|stored| stored.rule.to_string() == subject);
        state.alarms.retain(HALTED_ALARM, is_halted);
        self.has_read = true;
    }
}

fn tell(state: &Shared, rule: RuleId, rollout: &Rollout, step: Step) {
    let body = Body::Rollout {
        rule,
        direction: rollout.direction().as_str(),
        state: rollout.state().as_str(),
        stage: step.stage,
        percent: step.percent,
        verdict: step.verdict.as_str(),
    };
    state.events.notice(state.clock.wall(), body);
    let evidence = matches!(step.verdict, Verdict::Worse | Verdict::Missing | Verdict::NoEvidence);
    let evidence = evidence.then(|| compared(rollout));
    tracing::info!(
        rule.id = %rule,
        direction = rollout.direction().as_str(),
        state = rollout.state().as_str(),
        stage = step.stage,
        percent = step.percent,
        verdict = step.verdict.as_str(),
        evidence,
        "rollout stepped"
    );
}

fn halted(rule: RuleId, rollout: &Rollout) -> String {
    let what = match rollout.direction() {
        Direction::Release => "release",
        Direction::Rollout => "rollout",
    };
    if rollout.state() == Phase::Paused {
        return format!(
            "the {what} of rule {rule} was paused at {} %: nothing was decided within {} min ({}). Resume or revert it",
            rollout.percent(),
            rollout.stage_max().as_secs() / 60,
            compared(rollout)
        );
    }
    format!(
        "the {what} of rule {rule} was halted, and returned to {} %: {}. Check it, then resume or revert it",
        rollout.percent(),
        compared(rollout)
    )
}

/// Results of the treated devices and the control.
fn compared(rollout: &Rollout) -> String {
    let (treated, control) = (rollout.totals().treated, rollout.totals().control());
    let returns = rollout.totals().returns;
    format!(
        "{} of {} treated connects failed, and {} of {} of the control; {} of {} devices that were sent away did not return",
        treated.failed, treated.connects, control.failed, control.connects, returns.failed, returns.connects
    )
}
