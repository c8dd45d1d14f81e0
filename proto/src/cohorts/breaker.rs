//! The cohort breaker: makes proposals of what the detector finds, and decides which are applied without a person.

use std::{collections::BTreeMap, time::Duration};

use super::{
    Detector, Finding, Level,
    gates::{BreakerRule, Share},
    proposal::{OPEN_QUIET_MAX, Proposal, ProposalId, ProposalState, RETRY},
};
use crate::{cohort::CohortTag, id::RuleId, time::Instant};

/// Maximum number of proposals kept, closed ones included. While all are open, further cohorts get none.
const PROPOSALS_MAX: usize = 100;
/// Time for which a closed proposal is kept.
const CLOSED_KEPT: Duration = Duration::from_secs(86_400);
/// Time for which no new proposal is made of what a person has dismissed.
const DISMISSED: Duration = Duration::from_secs(3_600);
/// Time for which an applied rule holds; renewed while the admitted share of the cohort is bad.
const GATE: Duration = Duration::from_secs(900);
/// More cohorts than this that begin to stand out within [`COMMON_WITHIN`] have a common cause: none is gated.
const COMMON_COHORTS_MAX: usize = 3;
const COMMON_WITHIN: Duration = Duration::from_secs(60);

/// What the breaker does on its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// It makes no proposals.
    Off,
    /// It makes proposals, and a person decides.
    #[default]
    Propose,
    /// It applies a rule where the evidence is strong enough.
    Apply,
}

/// A cohort that stands out: since when, and when last.
#[derive(Clone, Copy, Debug)]
struct Alarm {
    began: Instant,
    last: Instant,
    /// It began together with many others. While it lasts, its cohort is not gated without a person.
    is_common: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// There is a new proposal.
    Opened(ProposalId),
    /// Another node, or an earlier run of this one, has made its rule.
    Applied(ProposalId),
    /// Its rule is gone: a person deleted or changed it.
    Dismissed(ProposalId),
    /// It is over: the cohort no longer stands out, or its rule ended.
    Expired(ProposalId),
    /// Write its rule, then call [`Breaker::handle_applied`] or [`Breaker::handle_failed`].
    Apply(ProposalId),
    /// Extend its rule to [`Breaker::GATE`] from now.
    Renew(ProposalId),
}

/// Proposals, and the limits on what is done without a person.
///
/// A restart forgets proposals. Rules in force count as before, and a new proposal about such a cohort takes its rule
/// over.
#[derive(Debug, Default)]
pub struct Breaker {
    mode: Mode,
    /// In the order of their ids. Ids are to grow with time.
    proposals: BTreeMap<ProposalId, Proposal>,
    /// Cohorts that stand out or did so lately, at most one entry a cohort.
    alarms: BTreeMap<CohortTag, Alarm>,
    /// End of the time in which nothing is applied, since many cohorts stood out together.
    common_until: Instant,
    applied_at: Option<Instant>,
}

impl Breaker {
    #[must_use]
    pub fn new(mode: Mode) -> Self {
        Self {
            mode,
            ..Self::default()
        }
    }

    /// Changes what happens to findings from now on. Rules in force end at their own times.
    pub const fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
    }

    /// Takes in a second's findings, and all rules of the breaker that are in force. `new_id` returns a fresh id,
    /// greater than those before.
    pub fn handle_second(
        &mut self,
        findings: &[Finding],
        gates: &[BreakerRule],
        detector: &Detector,
        now: Instant,
        mut new_id: impl FnMut() -> ProposalId,
    ) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.mode == Mode::Off {
            return actions;
        }
        for finding in findings {
            self.note_alarm(finding.cohort, now);
            if let Some(opened) = self.handle_finding(finding, now, &mut new_id) {
                actions.push(Action::Opened(opened));
            }
        }
        self.alarms.retain(|_, alarm| alarm.last + OPEN_QUIET_MAX > now);
        for proposal in self.proposals.values_mut() {
            actions.extend(proposal.handle_gates(gates, detector, now));
        }
        let share = self.share(gates, detector);
        let is_calm = self.common_until <= now;
        let mut applies = self.mode == Mode::Apply && is_calm && self.may_apply(gates, now);
        let ended = self.ended_lately(now);
        for proposal in self.proposals.values_mut() {
            match proposal.state {
                ProposalState::Open | ProposalState::Applied => {
                    if detector.is_bad(proposal.cohort, proposal.signal) {
                        proposal.bad_at = now;
                    }
                }
                ProposalState::Dismissed | ProposalState::Expired => continue,
            }
            actions.extend(proposal.due(share, now));
            let alarm = self.alarms.get(&proposal.cohort);
            let is_alone = alarm.is_some_and(|alarm| !alarm.is_common);
            let may_be_gated = is_alone && !ended.contains(&proposal.cohort);
            if applies && may_be_gated && proposal.is_applicable(detector, share, now) {
                proposal.next_try = now + RETRY;
                proposal.busy_until = now + RETRY;
                actions.push(Action::Apply(proposal.id));
                applies = false;
            }
        }
        self.proposals.retain(|_, proposal| {
            let is_closed = matches!(proposal.state, ProposalState::Dismissed | ProposalState::Expired);
            !is_closed || proposal.changed_at + CLOSED_KEPT > now
        });
        actions
    }

    /// A person wants the rule of an open proposal. True: write it, then call [`Breaker::handle_applied`] or
    /// [`Breaker::handle_failed`] within 10 s. False: it is not open, or its rule is being written.
    pub fn begin_apply(&mut self, id: ProposalId, now: Instant) -> bool {
        let open = self.proposals.get_mut(&id).filter(|proposal| proposal.is_free(now));
        open.is_some_and(|proposal| {
            proposal.busy_until = now + RETRY;
            true
        })
    }

    /// A proposal's rule was written, by the breaker or for a person, and ends [`Breaker::GATE`] from now.
    pub fn handle_applied(
        &mut self,
        id: ProposalId,
        rule: RuleId,
        is_automatic: bool,
        detector: &Detector,
        now: Instant,
    ) {
        let Some(proposal) = self.proposals.get_mut(&id).filter(|proposal| proposal.is_open()) else {
            return;
        };
        proposal.begin_rule(rule, is_automatic, GATE, detector.devices(proposal.cohort), now);
        if is_automatic {
            self.applied_at = Some(now);
        }
    }

    /// A proposal's rule could not be written. It is tried again.
    pub fn handle_failed(&mut self, id: ProposalId, now: Instant) {
        if let Some(proposal) = self.proposals.get_mut(&id) {
            proposal.next_try = now + RETRY;
            proposal.busy_until = now;
        }
    }

    /// A person does not want an open proposal. False if it is not open, or its rule is being written.
    pub fn handle_dismissed(&mut self, id: ProposalId, now: Instant) -> bool {
        let open = self.proposals.get_mut(&id).filter(|proposal| proposal.is_free(now));
        open.is_some_and(|proposal| {
            proposal.state = ProposalState::Dismissed;
            proposal.changed_at = now;
            true
        })
    }

    /// Every proposal, newest first.
    pub fn proposals(&self) -> impl Iterator<Item = &Proposal> {
        self.proposals.values().rev()
    }

    #[must_use]
    pub fn get(&self, id: ProposalId) -> Option<&Proposal> {
        self.proposals.get(&id)
    }

    /// State of the breaker of a cohort: `open` while its rule holds, `proposed` while a proposal is open, else
    /// `closed`.
    #[must_use]
    pub fn state(&self, cohort: CohortTag) -> &'static str {
        let states = || {
            let of = self
                .proposals
                .values()
                .filter(move |proposal| proposal.cohort == cohort);
            of.map(|proposal| proposal.state)
        };
        if states().any(|state| state == ProposalState::Applied) {
            "open"
        } else if states().any(|state| state == ProposalState::Open) {
            "proposed"
        } else {
            "closed"
        }
    }

    /// Time for which a rule of the breaker holds: 15 minutes.
    pub const GATE: Duration = GATE;
    /// Minimum time between two automatic rules, of whichever nodes: 10 minutes.
    pub const APPLY_INTERVAL: Duration = Duration::from_secs(600);
    /// Share of a gated cohort that is admitted, in percent: a live sample that shows when it is well again.
    pub const ADMIT_PERCENT: u8 = 10;

    fn note_alarm(&mut self, cohort: CohortTag, now: Instant) {
        let alarm = self.alarms.entry(cohort).or_insert(Alarm {
            began: now,
            last: now,
            is_common: false,
        });
        alarm.last = now;
        let mut recent = |alarm: &&mut Alarm| alarm.began + COMMON_WITHIN > now;
        if self.alarms.values_mut().filter(&mut recent).count() > COMMON_COHORTS_MAX {
            self.common_until = now + COMMON_WITHIN;
            self.alarms
                .values_mut()
                .filter(&mut recent)
                .for_each(|alarm| alarm.is_common = true);
        }
    }

    fn handle_finding(
        &mut self,
        finding: &Finding,
        now: Instant,
        new_id: impl FnOnce() -> ProposalId,
    ) -> Option<ProposalId> {
        let of_cohort = |proposal: &&mut Proposal| proposal.cohort == finding.cohort;
        for proposal in self.proposals.values_mut().filter(of_cohort) {
            match proposal.state {
                ProposalState::Open => {
                    proposal.update(finding, now);
                    return None;
                }
                ProposalState::Applied => {
                    // What may only be proposed does not renew a rule that no person has asked for.
                    if finding.level == Level::Apply || !proposal.is_automatic {
                        proposal.bad_at = now;
                    }
                    return None;
                }
                ProposalState::Dismissed if proposal.changed_at + DISMISSED > now => return None,
                ProposalState::Dismissed | ProposalState::Expired => {}
            }
        }
        self.make_room()?;
        let id = new_id();
        let proposal = Proposal {
            id,
            cohort: finding.cohort,
            signal: finding.signal,
            evidence: finding.evidence,
            created_at: now,
            state: ProposalState::Open,
            rule: None,
            sure_at: (finding.level == Level::Apply).then_some(now),
            bad_at: now,
            changed_at: now,
            until: now,
            next_try: now,
            busy_until: now,
            devices: 0.0,
            is_automatic: false,
        };
        self.proposals.insert(id, proposal);
        Some(id)
    }

    fn make_room(&mut self) -> Option<()> {
        if self.proposals.len() < PROPOSALS_MAX {
            return Some(());
        }
        let mut closed = self
            .proposals
            .values()
            .filter(|proposal| matches!(proposal.state, ProposalState::Dismissed | ProposalState::Expired));
        let oldest = closed.next()?.id;
        self.proposals.remove(&oldest);
        Some(())
    }

    fn may_apply(&self, gates: &[BreakerRule], now: Instant) -> bool {
        let is_recent = gates.iter().any(|gate| gate.age < Self::APPLY_INTERVAL);
        !is_recent
            && self
                .applied_at
                .is_none_or(|applied| applied + Self::APPLY_INTERVAL <= now)
    }

    fn share(&self, gates: &[BreakerRule], detector: &Detector) -> Share {
        let all = self.proposals.values();
        let applied = all.filter(|proposal| proposal.state == ProposalState::Applied);
        Share::of(
            gates,
            applied.map(|proposal| (proposal.cohort, proposal.devices)),
            detector,
        )
    }

    /// Cohorts whose devices still return after a rule: how many there are is not known.
    fn ended_lately(&self, now: Instant) -> Vec<CohortTag> {
        let ended = self.proposals.values().filter(|proposal| {
            proposal.state == ProposalState::Expired && proposal.rule.is_some() && proposal.changed_at + GATE > now
        });
        ended.map(|proposal| proposal.cohort).collect()
    }
}
