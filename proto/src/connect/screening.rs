//! The first part of the order: decisions that need neither shared state nor a query.

use std::sync::Arc;

use rand::Rng;

use super::{Admitted, Conclusion, Conditions, Decision, throttles::Throttle};
use crate::{
    close::Close,
    id::{Credential, DeviceId, Label, Network, RuleId},
    refusal::Refusal,
    resume::{Accepted, Rejected},
    rules::{OwnedSubject, Rule, RuleSet, Ruling, Subject},
    slots::TenantTag,
    time::{Instant, WallTime},
};

/// The tenant of a device that names none and that nothing is known of.
const TENANT_DEFAULT: &str = "default";

/// The claims of a connecting device, and its network. Nothing in it is verified.
#[derive(Clone, Copy, Debug)]
pub struct Attempt<'a> {
    pub device: DeviceId,
    pub credential: Option<Credential>,
    pub firmware: Option<&'a Label>,
    pub model: Option<&'a Label>,
    /// The claimed tenant. After the lookup the registry's tenant is used.
    pub tenant: Option<&'a Label>,
    /// A slot token. An invalid one is ignored.
    pub slot: Option<&'a str>,
    /// A resume token. An invalid one is ignored.
    pub resume: Option<&'a str>,
    /// Wrong credentials are counted by this.
    pub network: Network,
    /// Time at which its request was complete. Deadlines start here.
    pub arrived: Instant,
}

impl<'a> Attempt<'a> {
    /// The device by its claims, for `rules`. Its tenant is the one with the tag `proven`, of a token or of this node's
    /// memory; else the one that it names; else `default`.
    #[must_use]
    pub fn claims<'r>(&self, proven: Option<TenantTag>, rules: &'r RuleSet) -> Subject<'r>
    where
        'a: 'r,
    {
        Subject {
            device: Some(self.device),
            firmware: self.firmware.map(Label::as_str),
            model: self.model.map(Label::as_str),
            tenant: Some(claimed_tenant(self.tenant, proven, rules)),
        }
    }

    /// A copy of its claims, to keep while it waits.
    pub(super) fn owned_claims(&self) -> OwnedSubject {
        OwnedSubject {
            device: Some(self.device),
            firmware: self.firmware.cloned(),
            model: self.model.cloned(),
            tenant: self.tenant.cloned(),
        }
    }
}

/// The tenant that `rules` see before a lookup.
pub(super) fn claimed_tenant<'r>(named: Option<&'r Label>, proven: Option<TenantTag>, rules: &'r RuleSet) -> &'r str {
    match proven {
        Some(tag) => rules.tenant_of(tag),
        None => named.map_or(TENANT_DEFAULT, Label::as_str),
    }
}

/// Result of the first part of the order.
#[derive(Debug)]
pub struct Screening<'a> {
    /// Result of the resume token; `None` if the device showed none, or was refused before.
    pub resume: Option<ResumeOutcome>,
    pub next: Result<Screened<'a>, Conclusion>,
}

/// A device that has passed the first part. [`Connect::handle_screened`](super::Connect::handle_screened) decides the
/// rest.
#[derive(Debug)]
#[must_use]
pub struct Screened<'a> {
    pub(super) attempt: Attempt<'a>,
    pub(super) credential: Credential,
    /// The rules that do not refuse it.
    pub(super) rules: Arc<RuleSet>,
    /// Its tenant by a token or this node's memory. `None` if neither has one, or if no rule names a tenant.
    pub(super) tenant: Option<TenantTag>,
    pub(super) standing: Standing,
    pub(super) dry_run: Option<RuleId>,
    /// The rule whose rate it needs a permit of.
    pub(super) throttle: Option<Throttle>,
}

/// Effect of its resume token.
#[derive(Debug)]
pub(super) enum Standing {
    /// It is valid, so that no lookup is needed.
    Resumed(Admitted),
    /// It must be looked up. An earlier token of this fleet names its tenant.
    Unproven { hinted: Option<Label> },
}

/// Result of a resume token that was shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResumeOutcome {
    Resumed,
    /// It was accepted in its grace, because the database is away.
    Graced,
    /// It was accepted, and a rule by registry data refused its device.
    Blocked,
    /// Not issued for this device and credential, damaged, or from the future. Ignored.
    Invalid,
    /// Ignored.
    Expired,
    /// The device was changed in the registry since. Ignored.
    Revoked,
}

impl ResumeOutcome {
    pub const ALL: [Self; 6] = [
        Self::Resumed,
        Self::Graced,
        Self::Blocked,
        Self::Invalid,
        Self::Expired,
        Self::Revoked,
    ];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Resumed => "resumed",
            Self::Graced => "graced",
            Self::Blocked => "blocked",
            Self::Invalid => "invalid",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
        }
    }
}

/// Decides as far as no lookup and no shared state is needed: draining, then rules on the device's claims, then whether
/// it shows a credential, then its resume token.
///
/// `known_tenant` returns the tenant by its slot token or this node's memory ([`Connect::claimed_tenant`]). It is called
/// only if rules name tenants and its resume token does not.
///
/// [`Connect::claimed_tenant`]: super::Connect::claimed_tenant
pub fn screen<'a>(
    attempt: Attempt<'a>,
    conditions: &Conditions<'_>,
    known_tenant: impl FnOnce(&Attempt<'a>) -> Option<TenantTag>,
    rng: &mut impl Rng,
) -> Screening<'a> {
    let ended = |decision, dry_run| Screening {
        resume: None,
        next: Err(concluded(decision, dry_run)),
    };
    if let Some(peers) = conditions.draining {
        return ended(Decision::Refused(Refusal::draining(peers, rng)), None);
    }
    // A tenant is read from a token before the rules, and the token is judged after them.
    let by_tenant = conditions.rules.name_tenants();
    let verify = || verify(&attempt, attempt.credential.as_ref()?, conditions);
    let mut verified = None;
    let tenant = if by_tenant {
        verified = verify();
        let named = verified.as_ref().and_then(tenant_in);
        named.map(TenantTag::of).or_else(|| known_tenant(&attempt))
    } else {
        None
    };
    let claims = attempt.claims(tenant, conditions.rules);
    let mut ruled = ruled(conditions.rules, &claims, conditions.wall, rng);
    if let Some(decision) = ruled.decision {
        return ended(decision, ruled.dry_run);
    }
    let Some(credential) = attempt.credential else {
        return ended(Decision::Refused(Refusal::unauthorized(rng)), ruled.dry_run);
    };
    let verified = if by_tenant { verified } else { verify() };
    let (resume, standing) = match verified {
        None => (None, Ok(Standing::Unproven { hinted: None })),
        Some(Ok(accepted)) => resumed(&attempt, accepted, conditions, &mut ruled, rng),
        Some(Err(rejected)) => {
            let hinted = rejected.tenant().cloned();
            (Some(rejected.into()), Ok(Standing::Unproven { hinted }))
        }
    };
    let next = match standing {
        Ok(standing) => Ok(Screened {
            attempt,
            credential,
            rules: Arc::clone(conditions.rules),
            tenant,
            standing,
            dry_run: ruled.dry_run,
            throttle: ruled.throttle,
        }),
        Err(decision) => Err(concluded(decision, ruled.dry_run)),
    };
    Screening { resume, next }
}

fn verify(
    attempt: &Attempt<'_>,
    credential: &Credential,
    conditions: &Conditions<'_>,
) -> Option<Result<Accepted, Rejected>> {
    let token = attempt.resume?;
    let verifier = &conditions.verifier;
    Some(verifier.verify(attempt.device, credential, token, conditions.wall))
}

/// The tenant that a resume token names whose MAC is right.
fn tenant_in(verified: &Result<Accepted, Rejected>) -> Option<&str> {
    match verified {
        Ok(accepted) => Some(accepted.grant.tenant.as_str()),
        Err(rejected) => rejected.tenant().map(Label::as_str),
    }
}

fn resumed(
    attempt: &Attempt<'_>,
    accepted: Accepted,
    conditions: &Conditions<'_>,
    by_claims: &mut Ruled,
    rng: &mut impl Rng,
) -> (Option<ResumeOutcome>, Result<Standing, Decision>) {
    let outcome = if accepted.is_graced {
        ResumeOutcome::Graced
    } else {
        ResumeOutcome::Resumed
    };
    let admitted = Admitted {
        model: attempt.model.cloned().or_else(|| accepted.grant.model.clone()),
        grant: accepted.grant,
        resumed: Some(accepted.session),
    };
    let known = admitted.subject(attempt.firmware);
    let ruled = ruled(conditions.rules, &known, conditions.wall, rng);
    by_claims.dry_run = by_claims.dry_run.or(ruled.dry_run);
    by_claims.throttle = ruled.throttle.or(by_claims.throttle);
    match ruled.decision {
        None => (Some(outcome), Ok(Standing::Resumed(admitted))),
        Some(decision) => (Some(ResumeOutcome::Blocked), Err(decision)),
    }
}

/// A decision without a lookup.
pub(super) const fn concluded(decision: Decision, dry_run: Option<RuleId>) -> Conclusion {
    Conclusion {
        decision,
        look_up: None,
        dry_run,
    }
}

/// Result of the rules for a device.
pub(super) struct Ruled {
    /// `None`: no rule decides on the device.
    pub decision: Option<Decision>,
    /// The rule in dry-run mode that would have applied.
    pub dry_run: Option<RuleId>,
    /// The rule that throttles it.
    pub throttle: Option<Throttle>,
}

/// Evaluates the rules for `subject`.
pub(super) fn ruled(rules: &RuleSet, subject: &Subject<'_>, wall: WallTime, rng: &mut impl Rng) -> Ruled {
    let verdict = rules.verdict(subject, wall);
    let mut throttle = None;
    let decision = match verdict.enforced {
        Some(Ruling::Block(rule)) => Some(Decision::Refused(blocked(rule, rng))),
        Some(Ruling::Restrict(rule)) => Some(Decision::Restricted(Box::new(Restriction::of(rules, rule, rng)))),
        Some(Ruling::Throttle(rule)) => {
            throttle = Some(Throttle::by(rule));
            None
        }
        None => None,
    };
    Ruled {
        decision,
        dry_run: verdict.dry_run.map(|ruling| ruling.rule().id),
        throttle,
    }
}

fn blocked(rule: &Rule, rng: &mut impl Rng) -> Refusal {
    Refusal::firmware_blocked(rule.id, &rule.spec.reason, rule.spec.retry_after, rng)
}

/// A session without authentication: the device receives its update notice, and is closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restriction {
    pub rule: RuleId,
    /// The only frame, as text. All devices of the rule share it.
    pub frame: Arc<str>,
    /// How the session ends, right behind the frame.
    pub close: Close,
    /// The answer instead, if the node has no room for another restricted session.
    pub refusal: Refusal,
}

impl Restriction {
    fn of(rules: &RuleSet, rule: &Rule, rng: &mut impl Rng) -> Self {
        let refusal = blocked(rule, rng);
        let after = refusal.hint.as_ref().map_or(rule.spec.retry_after, |hint| hint.after);
        Self {
            rule: rule.id,
            frame: rules.update_frame(rule),
            close: Close::Evicted { after },
            refusal,
        }
    }
}

impl From<Rejected> for ResumeOutcome {
    fn from(rejected: Rejected) -> Self {
        match rejected {
            Rejected::Invalid => Self::Invalid,
            Rejected::Expired(_) => Self::Expired,
            Rejected::Revoked(_) => Self::Revoked,
        }
    }
}
