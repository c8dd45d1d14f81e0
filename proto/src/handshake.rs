//! The order of decisions about a connecting device, written once (contract section 2). Gateway and simulator both come through here.
//!
//! Each step takes the state before it and gives the state behind it, so that none can be left out or done twice:
//!
//! ```text
//! Hello ──screen──▶ Screened ──resume──▶ Unproven ──(throttles, admission, look-up)──▶ conclude ──▶ Admitted
//!                                  └────────────────── a token that counts ───────────────────────▶ Admitted
//! ```
//!
//! What stands in brackets belongs to admission and to the registry; a device that does not
//! get through it is refused by them. Everything before it costs no query.

use rand::Rng;

use crate::{
    hello::Hello,
    id::{Credential, DeviceId, Label, Proof, SessionId},
    record::{DeviceRecord, DeviceState},
    refusal::{Peers, Refusal},
    resume::{Counted, Generation, Grant, Judge, Unusable},
    rules::{Effect, RuleSet, Subject},
    time::WallTime,
};

/// What the node decides by before it looks a device up.
#[derive(Clone, Copy, Debug)]
pub struct Policy<'a> {
    pub rules: &'a RuleSet,
    /// Set while this node is leaving.
    pub draining: Option<Peers>,
    pub wall: WallTime,
}

/// A device that may go on: no rule refuses what it says of itself, and it has shown a credential.
#[derive(Debug)]
pub struct Screened {
    hello: Hello,
    credential: Credential,
}

/// A device that may be looked up: it has shown no resume token that counts.
#[derive(Debug)]
pub struct Unproven {
    hello: Hello,
    credential: Credential,
    vouched: Option<Label>,
}

/// A device that is registered, authenticated and welcome.
#[derive(Debug)]
pub struct Admitted {
    pub hello: Hello,
    /// The device's own word, else the registry's.
    pub model: Option<Label>,
    /// What the registry says of it, for its resume tokens.
    pub grant: Grant,
    /// The session whose resume token let it in; `None`: it was looked up.
    pub resumed: Option<SessionId>,
}

impl Admitted {
    /// The registry's, whatever the device claimed.
    #[must_use]
    pub const fn tenant(&self) -> &Label {
        &self.grant.tenant
    }
}

/// What a device's resume token came to.
#[derive(Debug)]
pub struct Resumption {
    /// `None` where it showed none.
    pub outcome: Option<ResumeOutcome>,
    pub next: Next,
}

/// What is next for a device whose resume token was weighed.
#[derive(Debug)]
pub enum Next {
    /// Its token counts: nothing is looked up.
    Session(Box<Admitted>),
    LookUp(Unproven),
    /// A rule refuses it by what its token says of it.
    Refused(Refusal),
}

/// What became of a resume token that was shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResumeOutcome {
    /// It counted.
    Resumed,
    /// It counted although its life was over, since the database is away.
    Graced,
    /// It counted, and a rule by registry data refused its device.
    Blocked,
    /// Not ours, another device's, another credential's, damaged, or from the future. Ignored.
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

impl From<&Unusable> for ResumeOutcome {
    fn from(unusable: &Unusable) -> Self {
        match unusable {
            Unusable::Invalid => Self::Invalid,
            Unusable::Expired(_) => Self::Expired,
            Unusable::Revoked(_) => Self::Revoked,
        }
    }
}

/// Draining, then rules on what the device says of itself, then whether it shows a credential at all. No query, no token.
///
/// # Errors
/// `draining`, `firmware_blocked` or `unauthorized`.
pub fn screen(hello: Hello, policy: &Policy<'_>, rng: &mut impl Rng) -> Result<Screened, Refusal> {
    if let Some(peers) = policy.draining {
        return Err(Refusal::draining(peers, rng));
    }
    if let Some(refusal) = screen_claims(&hello.claims(), policy.rules, policy.wall, rng) {
        return Err(refusal);
    }
    match hello.credential {
        Some(credential) => Ok(Screened { hello, credential }),
        None => Err(Refusal::unauthorized(rng)),
    }
}

/// The refusal of a device by the firmware rules on what it says of itself.
///
/// For [`screen`], and for devices that wait for their look-up when other rules come into force: they must cost no query.
/// A tenant that a device does not name is not known before its look-up, so rules on tenants do not match it here.
pub fn screen_claims(claims: &Subject<'_>, rules: &RuleSet, wall: WallTime, rng: &mut impl Rng) -> Option<Refusal> {
    refusal(rules, claims, wall, rng)
}

/// Whether the device shows a resume token that counts; then the rules by what the registry said of it. No query. A token that
/// does not count is ignored.
pub fn resume(
    screened: Screened,
    judge: &Judge<'_>,
    rules: &RuleSet,
    wall: WallTime,
    rng: &mut impl Rng,
) -> Resumption {
    let Screened { hello, credential } = screened;
    let weighed = hello
        .resume
        .as_deref()
        .map(|token| judge.weigh(hello.device, &credential, token, wall));
    let unusable = match weighed {
        Some(Ok(counted)) => return resumed(hello, counted, rules, wall, rng),
        Some(Err(unusable)) => Some(unusable),
        None => None,
    };
    Resumption {
        outcome: unusable.as_ref().map(Into::into),
        next: Next::LookUp(Unproven {
            hello,
            credential,
            vouched: unusable.as_ref().and_then(Unusable::tenant).cloned(),
        }),
    }
}

fn resumed(hello: Hello, counted: Counted, rules: &RuleSet, wall: WallTime, rng: &mut impl Rng) -> Resumption {
    let outcome = if counted.is_graced {
        ResumeOutcome::Graced
    } else {
        ResumeOutcome::Resumed
    };
    let (outcome, next) = match judged_by_registry_data(hello, counted.grant, Some(counted.session), rules, wall, rng) {
        Ok(admitted) => (outcome, Next::Session(Box::new(admitted))),
        Err(refusal) => (ResumeOutcome::Blocked, Next::Refused(refusal)),
    };
    Resumption {
        outcome: Some(outcome),
        next,
    }
}

impl Unproven {
    /// What the device says of itself.
    #[must_use]
    pub const fn hello(&self) -> &Hello {
        &self.hello
    }

    /// What its claim to be this device rests on.
    #[must_use]
    pub const fn proof(&self) -> Proof {
        self.credential.proof()
    }

    /// The tenant that a resume token says it is of: one of ours that does not count any more. Good for a place in a queue, and no more.
    #[must_use]
    pub const fn vouched(&self) -> Option<&Label> {
        self.vouched.as_ref()
    }

    /// The key to look up.
    #[must_use]
    pub const fn device(&self) -> DeviceId {
        self.hello.device
    }
}

/// Whether the credential is right, then whether the device is disabled, then rules by the registry's data.
///
/// `record` is the answer of the look-up; `None` where the device is not registered. Unknown, wrong and revoked are one
/// answer, so that nobody learns which ids exist. `as_of`: what was known of revocations before the look-up was sent.
///
/// # Errors
/// `unauthorized`, `device_disabled` or `firmware_blocked`.
pub fn conclude(
    unproven: Unproven,
    record: Option<&DeviceRecord>,
    as_of: Generation,
    rules: &RuleSet,
    wall: WallTime,
    rng: &mut impl Rng,
) -> Result<Admitted, Refusal> {
    let Unproven { hello, credential, .. } = unproven;
    let Some(record) = record.filter(|record| record.accepts(&credential, wall)) else {
        return Err(Refusal::unauthorized(rng));
    };
    match record.state {
        DeviceState::Enabled => {}
        DeviceState::Disabled => return Err(Refusal::device_disabled(rng)),
        DeviceState::Revoked => return Err(Refusal::unauthorized(rng)),
    }
    let grant = Grant {
        device: hello.device,
        credential,
        tenant: record.tenant.clone(),
        model: record.model.clone(),
        generation: as_of,
        credential_until: record.ends(&credential),
    };
    judged_by_registry_data(hello, grant, None, rules, wall, rng)
}

/// Rules on tenant, and on model where the device names none.
fn judged_by_registry_data(
    hello: Hello,
    grant: Grant,
    resumed: Option<SessionId>,
    rules: &RuleSet,
    wall: WallTime,
    rng: &mut impl Rng,
) -> Result<Admitted, Refusal> {
    let model = hello.model.clone().or_else(|| grant.model.clone());
    let known = Subject {
        firmware: hello.firmware.as_deref(),
        model: model.as_deref(),
        tenant: Some(grant.tenant.as_str()),
    };
    if let Some(refusal) = refusal(rules, &known, wall, rng) {
        return Err(refusal);
    }
    Ok(Admitted {
        hello,
        model,
        grant,
        resumed,
    })
}

/// What the rule that counts for `subject` does to it.
fn refusal(rules: &RuleSet, subject: &Subject<'_>, wall: WallTime, rng: &mut impl Rng) -> Option<Refusal> {
    let rule = rules.evaluate(subject, wall)?;
    match rule.spec.effect {
        Effect::Block => Some(Refusal::firmware_blocked(
            rule.id,
            &rule.spec.reason,
            rule.spec.retry_after,
            rng,
        )),
        // A rule set holds none of these as enforced: this version can't carry them out, and refuses nobody instead.
        Effect::Restrict | Effect::Throttle => None,
    }
}

#[cfg(test)]
mod tests;
