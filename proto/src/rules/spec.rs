//! One rule as an operator writes it, and its validation.

use std::{collections::BTreeSet, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Subject, text};
use crate::{
    firmware::Range,
    id::{DeviceId, Label, RuleId},
    time::WallTime,
};

/// The content of a rule, as written in the API, stored and shown.
///
/// Defaults: `enforce`, 0 %, no reason, 15 minutes, no expiry, no evict. `match` and `effect` have none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleSpec {
    /// Conditions on the devices.
    #[serde(rename = "match")]
    pub matches: Match,
    /// Effect on the matched devices.
    pub effect: Effect,
    /// Share of the matched devices that the rule admits, in percent. Default 0, maximum 100.
    ///
    /// Always the same devices: a larger share contains those of a smaller one.
    #[serde(default)]
    pub admit_percent: u8,
    #[serde(default)]
    pub mode: Mode,
    /// Public reason, shown to the devices. At most [`RuleSpec::REASON_LEN_MAX`] bytes, no control characters. Default
    /// empty.
    #[serde(default)]
    pub reason: String,
    /// Minimum hint for a refused device; the maximum is twice this. Default 15 minutes, 1 second to 7 days.
    #[serde(default = "RuleSpec::default_retry_after", with = "text::span")]
    pub retry_after: Duration,
    /// Time from which the rule matches nothing. Default never.
    #[serde(default, with = "text::time")]
    pub expires_at: Option<WallTime>,
    /// Whether matching sessions are also closed, at a paced rate. Default no.
    #[serde(default)]
    pub evict: bool,
    /// Public notice for devices in a restricted session. At most [`RuleSpec::UPDATE_LEN_MAX`] bytes of JSON, and
    /// [`RuleSpec::UPDATE_LEVELS_MAX`] nested objects and arrays. Required by effect `restrict`; other effects have
    /// none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update: Option<Box<Map<String, Value>>>,
    /// Connect attempts per second that effect `throttle` admits on a node, 1 to [`RuleSpec::RATE_MAX`]. Default: a
    /// twentieth of the lookups per second that the database is known to answer. Other effects have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_per_second: Option<u32>,
    /// Devices that the rule never applies to; at most [`RuleSpec::ALLOW_MAX`]. Default none.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub allow: BTreeSet<DeviceId>,
}

/// Conditions on a device: all that are given must hold. Without any, every device matches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Match {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<Range>,
    /// Matches the exact text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<Label>,
    /// Matches the exact text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<Label>,
}

crate::labels! {
    /// Effect of a rule; the first is the strictest. Of several rules that match, the strictest applies.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    pub enum Effect {
        Block = "block",
        Restrict = "restrict",
        Throttle = "throttle",
    }
}

crate::labels! {
    /// Whether a rule is enforced, or only counted.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    pub enum Mode {
        #[default]
        Enforce = "enforce",
        DryRun = "dry_run",
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
    /// Minimum hint for an evicted device: a rule that was a mistake is often removed within seconds.
    pub const EVICTED_MIN: Duration = Duration::from_secs(30);

    /// Minimum hint for a device that this rule evicts now; the maximum is twice that.
    ///
    /// It is the time for which the rule has been in force unchanged, between [`Rule::EVICTED_MIN`] and its
    /// `retry_after`. So a rule that is soon removed or changed back keeps no device away for long.
    #[must_use]
    pub fn evicted_for(&self, in_force: Duration) -> Duration {
        in_force.max(Self::EVICTED_MIN).min(self.spec.retry_after)
    }

    /// Whether the rule has expired.
    #[must_use]
    pub fn is_expired(&self, wall: WallTime) -> bool {
        self.spec.validate_expiry(wall).is_err()
    }
}

impl RuleSpec {
    /// Maximum length of a reason, in bytes.
    pub const REASON_LEN_MAX: usize = 256;
    /// Maximum length of `update`, in bytes of JSON without white space.
    pub const UPDATE_LEN_MAX: usize = 4 * 1024;
    /// Maximum number of nested objects and arrays in `update`, itself included.
    pub const UPDATE_LEVELS_MAX: usize = 32;
    /// Maximum `rate_per_second`.
    pub const RATE_MAX: u32 = 100_000;
    /// Maximum number of devices in `allow`.
    pub const ALLOW_MAX: usize = 1_000;
    /// Minimum `retry_after`.
    pub const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
    /// Maximum `retry_after`.
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
            update: None,
            rate_per_second: None,
            allow: BTreeSet::new(),
        }
    }

    /// Whether this rule matches `subject`. For a single rule; a [`super::RuleSet`] finds the one that applies.
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

    /// Whether both rules do the same to the same devices, and tell them the same. Their ranges may be written
    /// differently.
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        let is_same_range = match (&self.matches.firmware, &other.matches.firmware) {
            (None, None) => true,
            (Some(own), Some(range)) => own.is_same_as(range),
            (Some(_), None) | (None, Some(_)) => false,
        };
        if !is_same_range {
            return false;
        }
        let mut rewritten = self.clone();
        rewritten.matches.firmware.clone_from(&other.matches.firmware);
        rewritten == *other
    }

    /// Whether the rule refuses no device, whatever it matches: it is in dry-run mode, or admits all of them.
    #[must_use]
    pub fn is_harmless(&self) -> bool {
        self.mode == Mode::DryRun || self.admit_percent >= 100
    }

    /// Whether the rule applies only to some of the devices that it matches: it has a share, or a list of allowed
    /// devices.
    #[must_use]
    pub fn is_partial(&self) -> bool {
        self.admit_percent > 0 || !self.allow.is_empty()
    }

    /// Whether the rule may refuse or evict devices that it did not refuse or evict as `before`.
    #[must_use]
    pub fn is_wider_than(&self, before: &Self) -> bool {
        let is_slower = self.effect == before.effect
            && match (before.rate_per_second, self.rate_per_second) {
                (Some(before), Some(after)) => after < before,
                // Without a figure the rate is the node's, which may be higher or lower.
                (before, after) => before != after,
            };
        // Effects are in the order of strictness.
        let is_wider = self.matches != before.matches
            || self.effect < before.effect
            || self.mode != before.mode
            || self.admit_percent < before.admit_percent
            || is_slower
            || !before.allow.is_subset(&self.allow)
            || self.expires_at != before.expires_at
            || (self.evict && !before.evict);
        is_wider && !self.is_harmless()
    }

    /// Of `devices` that the rule matches, those that it does not admit, rounded up.
    #[must_use]
    pub const fn affected_of(&self, devices: u64) -> u64 {
        let percent = 100_u8.saturating_sub(self.admit_percent) as u128;
        let affected = (devices as u128 * percent).div_ceil(100);
        // At most `devices`, which fits.
        affected as u64
    }

    /// Checks that a new rule may have this content.
    ///
    /// # Errors
    /// The first invalid field.
    pub fn validate(&self) -> Result<(), SpecError> {
        match (self.effect, &self.update) {
            (Effect::Block | Effect::Throttle, None) => {}
            (Effect::Restrict, Some(update)) => {
                if update
                    .values()
                    .any(|value| is_deeper(value, Self::UPDATE_LEVELS_MAX - 1))
                {
                    return Err(SpecError::UpdateTooDeep);
                }
                let len = serde_json::to_string(update).map_or(usize::MAX, |json| json.len());
                if len > Self::UPDATE_LEN_MAX {
                    return Err(SpecError::UpdateTooLong(len));
                }
            }
            (Effect::Restrict, None) => return Err(SpecError::UpdateMissing),
            (Effect::Block | Effect::Throttle, Some(_)) => return Err(SpecError::UpdateUnused(self.effect.as_str())),
        }
        match (self.effect, self.rate_per_second) {
            (_, None) => {}
            (Effect::Throttle, Some(1..=Self::RATE_MAX)) => {}
            (Effect::Throttle, Some(_)) => return Err(SpecError::Rate),
            (Effect::Block | Effect::Restrict, Some(_)) => return Err(SpecError::RateUnused(self.effect.as_str())),
        }
        if self.effect == Effect::Throttle && self.evict {
            return Err(SpecError::EvictThrottled);
        }
        if self.allow.len() > Self::ALLOW_MAX {
            return Err(SpecError::AllowTooLong(self.allow.len()));
        }
        if self.admit_percent > 100 {
            return Err(SpecError::AdmitPercent(self.admit_percent));
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

    /// Checks that a rule with this content does not expire before `wall`. Call it whenever a rule is written.
    ///
    /// # Errors
    /// The rule has expired.
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

/// Whether more than `levels` objects and arrays are nested.
fn is_deeper(value: &Value, levels: usize) -> bool {
    let is_inner_deeper = |inner: &Value| is_deeper(inner, levels - 1);
    match value {
        Value::Array(inner) => levels == 0 || inner.iter().any(is_inner_deeper),
        Value::Object(inner) => levels == 0 || inner.values().any(is_inner_deeper),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

/// Why a rule is rejected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    #[error("rate_per_second must be from 1 to {max}", max = RuleSpec::RATE_MAX)]
    Rate,
    #[error("effect `{0}` has no rate_per_second; remove it, or use `throttle`")]
    RateUnused(&'static str),
    #[error("effect `throttle` admits its devices again, so it closes no sessions; use evict false, or another effect")]
    EvictThrottled,
    #[error("allow has {0} devices; at most {max} are allowed", max = RuleSpec::ALLOW_MAX)]
    AllowTooLong(usize),
    #[error("effect `restrict` needs an update, a JSON object that devices are told, as in {{\"url\":\"…\"}}")]
    UpdateMissing,
    #[error("effect `{0}` has no update; remove it, or use `restrict`")]
    UpdateUnused(&'static str),
    #[error("update has {0} bytes of JSON; at most {max} are allowed", max = RuleSpec::UPDATE_LEN_MAX)]
    UpdateTooLong(usize),
    #[error("update has over {max} objects and arrays within each other", max = RuleSpec::UPDATE_LEVELS_MAX)]
    UpdateTooDeep,
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
    /// The invalid field, by its name in the API.
    #[must_use]
    pub const fn field(&self) -> &'static str {
        match self {
            Self::Rate | Self::RateUnused(_) => "rate_per_second",
            Self::EvictThrottled => "evict",
            Self::AllowTooLong(_) => "allow",
            Self::UpdateMissing | Self::UpdateUnused(_) | Self::UpdateTooLong(_) | Self::UpdateTooDeep => "update",
            Self::AdmitPercent(_) => "admit_percent",
            Self::ReasonTooLong(_) | Self::ReasonControlCharacter => "reason",
            Self::RetryAfter => "retry_after",
            Self::Expired => "expires_at",
        }
    }
}
