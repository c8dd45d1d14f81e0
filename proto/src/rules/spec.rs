//! One rule: what an operator writes, and what is wrong with it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Subject, text};
use crate::{
    firmware::Range,
    id::{Label, RuleId},
    time::WallTime,
};

/// What an operator asks for, as it is written in the API, stored and shown.
///
/// Defaults: `enforce`, 0 %, no reason, 15 minutes, no expiry, no evict. `match` and `effect` have none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleSpec {
    /// Which devices.
    #[serde(rename = "match")]
    pub matches: Match,
    /// What happens to them.
    pub effect: Effect,
    /// Share of the matched devices that is let through all the same, in percent. Default 0.
    #[serde(default)]
    pub admit_percent: u8,
    #[serde(default)]
    pub mode: Mode,
    /// Shown to the devices: public. At most [`RuleSpec::REASON_LEN_MAX`] bytes, no control characters. Default empty.
    #[serde(default)]
    pub reason: String,
    /// A refused device is told to come back between this and twice this. Default 15 minutes, 1 second to 7 days.
    #[serde(default = "RuleSpec::default_retry_after", with = "text::span")]
    pub retry_after: Duration,
    /// From then on the rule matches nothing. Default never.
    #[serde(default, with = "text::time")]
    pub expires_at: Option<WallTime>,
    /// Whether sessions that match are closed too, paced. Default no.
    #[serde(default)]
    pub evict: bool,
}

/// Which devices a rule is for: all conditions that are given must hold. None given means every device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Match {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<Range>,
    /// The very same text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<Label>,
    /// The very same text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<Label>,
}

/// What a rule does; the first is the strictest. Of several rules that match, the strictest wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    Block,
    Restrict,
    Throttle,
}

impl Effect {
    /// As the API writes it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Block => "block",
            Self::Restrict => "restrict",
            Self::Throttle => "throttle",
        }
    }
}

/// Whether a rule acts, or only counts what it would do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    #[default]
    Enforce,
    DryRun,
}

impl Mode {
    /// As the API writes it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::DryRun => "dry_run",
        }
    }
}

/// A stored rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    pub id: RuleId,
    pub spec: RuleSpec,
    pub created_at: WallTime,
    /// Revision of the rule set at which this rule was last changed.
    pub revision: u64,
}

impl Rule {
    /// Shortest time that an evicted device is told to stay away: a rule that was a mistake is often removed within seconds.
    pub const EVICTED_MIN: Duration = Duration::from_secs(30);

    /// How long a device that this rule evicts now is told to stay away, at least; at most twice that.
    ///
    /// As long as the rule has been in force as it is, from [`Rule::EVICTED_MIN`] up to its `retry_after`. So a rule that is removed or changed
    /// back soon keeps nobody away for long.
    #[must_use]
    pub fn evicted_for(&self, in_force: Duration) -> Duration {
        in_force.max(Self::EVICTED_MIN).min(self.spec.retry_after)
    }

    /// Whether the rule's time is over.
    #[must_use]
    pub fn is_expired(&self, wall: WallTime) -> bool {
        self.spec.validate_expiry(wall).is_err()
    }
}

impl RuleSpec {
    /// Longest reason, in bytes.
    pub const REASON_LEN_MAX: usize = 256;
    /// Shortest `retry_after`.
    pub const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
    /// Longest `retry_after`.
    pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(7 * 24 * 60 * 60);

    /// A rule with `effect` and all defaults.
    #[must_use]
    pub fn new(matches: Match, effect: Effect) -> Self {
        Self {
            matches,
            effect,
            admit_percent: 0,
            mode: Mode::Enforce,
            reason: String::new(),
            retry_after: Self::default_retry_after(),
            expires_at: None,
            evict: false,
        }
    }

    /// Whether this rule is for `subject`. For one rule at a time; a [`super::RuleSet`] finds the one that counts.
    #[must_use]
    pub fn is_for(&self, subject: &Subject<'_>) -> bool {
        let is_same =
            |wanted: &Option<Label>, stated: Option<&str>| wanted.as_ref().is_none_or(|wanted| stated == Some(wanted));
        is_same(&self.matches.model, subject.model)
            && is_same(&self.matches.tenant, subject.tenant)
            && self
                .matches
                .firmware
                .as_ref()
                .is_none_or(|range| range.matches(subject.firmware))
    }

    /// Whether a new rule may say this.
    ///
    /// # Errors
    /// The first field that may not be as it is.
    pub fn validate(&self) -> Result<(), SpecError> {
        match self.effect {
            Effect::Block => {}
            Effect::Restrict | Effect::Throttle => return Err(SpecError::EffectNotAvailable(self.effect.as_str())),
        }
        match self.mode {
            Mode::Enforce => {}
            Mode::DryRun => return Err(SpecError::DryRunNotAvailable),
        }
        if self.admit_percent > 100 {
            return Err(SpecError::AdmitPercent(self.admit_percent));
        }
        if self.admit_percent > 0 {
            return Err(SpecError::AdmitPercentNotAvailable(self.admit_percent));
        }
        if self.reason.len() > Self::REASON_LEN_MAX {
            return Err(SpecError::ReasonTooLong(self.reason.len()));
        }
        if self.reason.contains(char::is_control) {
            return Err(SpecError::ReasonControlCharacter);
        }
        if !(Self::RETRY_AFTER_MIN..=Self::RETRY_AFTER_MAX).contains(&self.retry_after) {
            return Err(SpecError::RetryAfter);
        }
        Ok(())
    }

    /// Whether a rule that says this matches anything at all from `wall` on: to be asked when it is written, whatever is changed of it.
    ///
    /// # Errors
    /// Its time is over.
    pub fn validate_expiry(&self, wall: WallTime) -> Result<(), SpecError> {
        if self.expires_at.is_some_and(|expires_at| expires_at <= wall) {
            return Err(SpecError::Expired);
        }
        Ok(())
    }

    const fn default_retry_after() -> Duration {
        Duration::from_secs(15 * 60)
    }
}

/// Why a rule is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    #[error("effect `{0}` is not available in this version; use `block`")]
    EffectNotAvailable(&'static str),
    #[error("mode `dry_run` is not available in this version; use `enforce`, and preview the rule first")]
    DryRunNotAvailable,
    #[error("admit_percent {0} is not available in this version; leave it out or use 0")]
    AdmitPercentNotAvailable(u8),
    #[error("admit_percent {0} is more than 100")]
    AdmitPercent(u8),
    #[error("reason has {0} bytes; at most {max} are allowed", max = RuleSpec::REASON_LEN_MAX)]
    ReasonTooLong(usize),
    #[error("reason has control characters")]
    ReasonControlCharacter,
    #[error("retry_after must be from 1s to 7days")]
    RetryAfter,
    #[error("this time is over by the gateway's clock, so the rule would match nothing; give a later one, or none")]
    Expired,
}

impl SpecError {
    /// The field that is wrong, as the API writes it.
    #[must_use]
    pub const fn field(&self) -> &'static str {
        match self {
            Self::EffectNotAvailable(_) => "effect",
            Self::DryRunNotAvailable => "mode",
            Self::AdmitPercentNotAvailable(_) | Self::AdmitPercent(_) => "admit_percent",
            Self::ReasonTooLong(_) | Self::ReasonControlCharacter => "reason",
            Self::RetryAfter => "retry_after",
            Self::Expired => "expires_at",
        }
    }
}
