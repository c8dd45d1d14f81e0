//! A proposal of the cohort breaker: what becomes of it with time, and of its rule.

use std::time::Duration;

use uuid::Uuid;

use super::{
    Action, Detector, Evidence, Finding, Level, Signal,
    gates::{BreakerRule, Share, estimated},
};
use crate::{cohort::CohortTag, id::RuleId, time::Instant};

/// Time after which an open proposal expires, if its cohort no longer stands out.
pub(super) const OPEN_QUIET_MAX: Duration = Duration::from_secs(900);
/// Time before the end of a rule at which it is renewed.
const RENEW_BEFORE: Duration = Duration::from_secs(300);
/// A cohort that was bad within this time is bad.
const BAD_WITHIN: Duration = Duration::from_secs(120);
/// Evidence older than this is not acted upon.
const SURE_WITHIN: Duration = Duration::from_secs(5);
/// Time from an alarm to the earliest automatic rule: others may alarm as well, and then the cause is a common one.
const HOLD: Duration = Duration::from_secs(10);
/// Time after a failed write until it is tried again, and maximum time of a write. A rule is in force by then.
pub(super) const RETRY: Duration = Duration::from_secs(10);

/// Id of a proposal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProposalId(pub Uuid);

crate::labels! {
    /// State of a proposal.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum ProposalState {
        Open = "open",
        Applied = "applied",
        Dismissed = "dismissed",
        Expired = "expired",
    }
}

/// A rule that the breaker would make.
#[derive(Clone, Copy, Debug)]
pub struct Proposal {
    pub id: ProposalId,
    pub cohort: CohortTag,
    pub signal: Signal,
    pub evidence: Evidence,
    pub created_at: Instant,
    pub state: ProposalState,
    /// The rule that was made.
    pub rule: Option<RuleId>,
    /// When the evidence was last strong enough to act without a person.
    pub(super) sure_at: Option<Instant>,
    /// When its cohort stood out last, or was still bad.
    pub(super) bad_at: Instant,
    /// When the state changed.
    pub(super) changed_at: Instant,
    /// End of the rule.
    pub(super) until: Instant,
    /// No rule is written before.
    pub(super) next_try: Instant,
    /// Until then its rule may be on its way to the database.
    pub(super) busy_until: Instant,
    /// Devices of the cohort when its rule began.
    pub(super) devices: f64,
    /// No person has asked for its rule.
    pub(super) is_automatic: bool,
}

impl Proposal {
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.state == ProposalState::Open
    }

    /// Id of the rule that it makes: the same for each try, so that it is made once.
    #[must_use]
    pub const fn rule_id(&self) -> RuleId {
        RuleId(self.id.0)
    }

    /// Whether no person has asked for its rule.
    #[must_use]
    pub const fn is_automatic(&self) -> bool {
        self.is_automatic
    }

    /// Whether it is open, and its rule is not being written.
    pub(super) fn is_free(&self, now: Instant) -> bool {
        self.is_open() && self.busy_until <= now
    }

    pub(super) fn begin_rule(&mut self, rule: RuleId, is_automatic: bool, left: Duration, devices: f64, now: Instant) {
        self.state = ProposalState::Applied;
        self.rule = Some(rule);
        self.changed_at = now;
        self.until = now + left;
        self.devices = devices;
        self.is_automatic = is_automatic;
    }

    /// Follows its rule, which others may extend, change or delete. An open proposal takes over a rule for its cohort.
    pub(super) fn handle_gates(&mut self, gates: &[BreakerRule], detector: &Detector, now: Instant) -> Option<Action> {
        match self.state {
            ProposalState::Applied => {
                if let Some(gate) = gates.iter().find(|gate| Some(gate.rule) == self.rule) {
                    self.until = now + gate.left;
                } else if self.until > now && self.changed_at + RETRY <= now {
                    self.state = ProposalState::Dismissed;
                    self.changed_at = now;
                    return Some(Action::Dismissed(self.id));
                }
                None
            }
            // From the second after its first one on: then it was announced.
            ProposalState::Open if self.is_free(now) && self.created_at < now => {
                let mut holding = gates.iter().filter(|gate| gate.holds());
                let gate = holding.find(|gate| gate.cohort == self.cohort)?;
                let is_older = now.saturating_since(self.created_at) < gate.age;
                let devices = if is_older {
                    estimated(self.cohort, detector)
                } else {
                    detector.devices(self.cohort)
                };
                self.begin_rule(gate.rule, true, gate.left, devices, now);
                Some(Action::Applied(self.id))
            }
            ProposalState::Open | ProposalState::Dismissed | ProposalState::Expired => None,
        }
    }

    /// Repeats weigh most: they may be applied.
    pub(super) fn update(&mut self, finding: &Finding, now: Instant) {
        self.bad_at = now;
        if finding.level == Level::Apply {
            self.sure_at = Some(now);
        }
        let is_repeats = finding.signal == Signal::Repeats && self.signal != Signal::Repeats;
        let is_stronger = finding.signal == self.signal && finding.evidence.score >= self.evidence.score;
        if is_repeats || is_stronger {
            (self.signal, self.evidence) = (finding.signal, finding.evidence);
        }
    }

    /// What time demands.
    pub(super) fn due(&mut self, share: Share, now: Instant) -> Option<Action> {
        let is_bad = self.bad_at + BAD_WITHIN > now;
        let is_over = match self.state {
            ProposalState::Open => self.bad_at + OPEN_QUIET_MAX <= now && self.is_free(now),
            ProposalState::Applied => self.until <= now,
            ProposalState::Dismissed | ProposalState::Expired => false,
        };
        if is_over {
            self.state = ProposalState::Expired;
            self.changed_at = now;
            return Some(Action::Expired(self.id));
        }
        let ends_soon = self.until <= now + RENEW_BEFORE && self.next_try <= now;
        let is_allowed = !self.is_automatic || share.allows(0.0);
        if self.state == ProposalState::Applied && is_bad && ends_soon && is_allowed {
            self.next_try = now + RETRY;
            return Some(Action::Renew(self.id));
        }
        None
    }

    pub(super) fn is_applicable(&self, detector: &Detector, share: Share, now: Instant) -> bool {
        self.is_free(now)
            && self.sure_at.is_some_and(|sure| sure + SURE_WITHIN > now)
            && self.created_at + HOLD <= now
            && self.next_try <= now
            && share.allows(detector.devices(self.cohort))
    }
}
