//! The breaker's rules: how they are made and recognised, and the share of the fleet that they hold back.

use std::{collections::BTreeMap, time::Duration};

use super::{Breaker, Detector};
use crate::{
    cohort::CohortTag,
    firmware::{MISSING, Range},
    id::{Label, RuleId},
    rules::{Effect, Match, Rule, RuleSpec, Subject},
    time::WallTime,
};

/// Maximum share of the fleet in cohorts that are gated without a person, in percent.
const FLEET_PERCENT_MAX: u64 = 20;

/// Devices of other tenants in a cohort whose evidence is of one tenant, from which a rule is for this tenant alone: at
/// least this number, and a fifth of the cohort.
const OTHERS_MIN: u64 = 20;
const OTHERS_PART: u64 = 5;

/// A refused device returns after this time, at most twice this time: most return while the rule holds.
const RETRY_AFTER: Duration = Duration::from_secs(300);
/// Public reason of a rule of the breaker, by which all nodes know it.
const REASON: &str = "many devices with this version fail: most of them wait";

/// The rule that the breaker makes for a cohort, or for the devices of one tenant in it: it admits a tenth of them, for
/// 15 minutes. `None` if no rule can match the cohort.
#[must_use]
pub fn rule_for(model: Option<&str>, firmware: Option<&str>, tenant: Option<&str>, wall: WallTime) -> Option<RuleSpec> {
    let version = firmware.unwrap_or(MISSING);
    let matches = Match {
        firmware: Some(format!("={version}").parse::<Range>().ok()?),
        model: match model {
            Some(model) => Some(Label::parse(model).ok().flatten()?),
            None => None,
        },
        ..Match::default()
    };
    let spec = spec_for(matches, wall + Breaker::GATE);
    let cohort = Subject {
        firmware,
        model,
        ..Subject::default()
    };
    // A version with a comma in it would be read as several conditions.
    let mut spec = spec.is_for(&cohort).then_some(spec)?;
    if let Some(tenant) = tenant {
        spec.matches.tenant = Some(Label::parse(tenant).ok().flatten()?);
    }
    Some(spec)
}

/// Whether the evidence about a cohort is about one tenant alone: `devices` of the cohort are the tenant's, and `others`
/// are not.
#[must_use]
pub const fn is_of_one_tenant(devices: u64, others: u64) -> bool {
    others >= OTHERS_MIN && others.saturating_mul(OTHERS_PART) >= devices.saturating_add(others)
}

/// Whether rules of the breaker may hold back cohorts of `held` devices, of `fleet` devices on all nodes.
#[must_use]
pub const fn may_hold(held: u64, fleet: u64) -> bool {
    held.saturating_mul(100) <= fleet.saturating_mul(FLEET_PERCENT_MAX)
}

fn spec_for(matches: Match, expires_at: WallTime) -> RuleSpec {
    RuleSpec {
        admit_percent: Breaker::ADMIT_PERCENT,
        expires_at: Some(expires_at),
        retry_after: RETRY_AFTER,
        reason: REASON.to_owned(),
        ..RuleSpec::new(matches, Effect::Block)
    }
}

/// A rule of the breaker that is in force, whichever node made it.
#[derive(Clone, Copy, Debug)]
pub struct BreakerRule {
    pub rule: RuleId,
    pub cohort: CohortTag,
    /// Time since it was made. Extensions do not change that.
    pub age: Duration,
    /// Time until it expires; zero, if it has.
    pub left: Duration,
}

impl BreakerRule {
    /// `None` for a rule that is not as the breaker makes them: a person made or changed it.
    #[must_use]
    pub fn of(rule: &Rule, wall: WallTime) -> Option<Self> {
        let spec = &rule.spec;
        if spec.reason != REASON {
            return None;
        }
        let expires_at = spec.expires_at?;
        let firmware = spec.matches.firmware.as_ref()?.as_str().strip_prefix('=')?;
        (*spec == spec_for(spec.matches.clone(), expires_at)).then(|| Self {
            rule: rule.id,
            cohort: CohortTag::confirmed(spec.matches.model.as_deref(), Some(firmware)),
            age: wall.saturating_since(rule.created_at),
            left: expires_at.saturating_since(wall),
        })
    }

    /// Whether it has not expired.
    #[must_use]
    pub const fn holds(&self) -> bool {
        !self.left.is_zero()
    }
}

/// Devices of the gated cohorts, and of the fleet. Those that the rules hold back count in both.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    gated: f64,
    fleet: f64,
}

impl Share {
    /// `applied`: gated cohorts with the devices that they had when their rules began. Of other gates only the
    /// admitted share is seen.
    pub fn of(gates: &[BreakerRule], applied: impl Iterator<Item = (CohortTag, f64)>, detector: &Detector) -> Self {
        let holding = gates.iter().filter(|gate| gate.holds());
        let mut cohorts: BTreeMap<CohortTag, f64> = holding
            .map(|gate| (gate.cohort, estimated(gate.cohort, detector)))
            .collect();
        cohorts.extend(applied);
        let mut share = Self {
            gated: 0.0,
            fleet: detector.fleet(),
        };
        for (cohort, before) in cohorts {
            let connected = detector.devices(cohort);
            let all = before.max(connected);
            share.gated += all;
            share.fleet += all - connected;
        }
        share
    }

    /// Whether the gated cohorts with `more` devices are within the limit.
    pub fn allows(&self, more: f64) -> bool {
        self.gated + more <= FLEET_PERCENT_MAX as f64 / 100.0 * self.fleet
    }
}

/// Devices of a cohort of which only the admitted share is connected.
pub(super) fn estimated(cohort: CohortTag, detector: &Detector) -> f64 {
    detector.devices(cohort) * 100.0 / f64::from(Breaker::ADMIT_PERCENT)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const WALL: WallTime = WallTime::from_unix_ms(5_000);

    #[test]
    fn a_rule_of_the_breaker_is_known_on_each_node_until_a_person_changes_it() {
        for (model, firmware, tenant) in [
            (Some("box"), Some("v3.8.0-b3"), None),
            (None, Some("2.0"), None),
            (Some("box"), None, None),
            (Some("box"), Some("2.0"), Some("acme")),
        ] {
            let mut rule = Rule {
                id: RuleId(Uuid::nil()),
                spec: rule_for(model, firmware, tenant, WALL).unwrap(),
                created_at: WALL,
                revision: 1,
            };
            let later = WALL + Duration::from_secs(60);

            let found = BreakerRule::of(&rule, later).unwrap();

            let of_cohort = CohortTag::confirmed(model, firmware);
            assert_eq!(found.cohort, of_cohort, "{model:?} {firmware:?}");
            let minutes = |count: u64| Duration::from_secs(count * 60);
            assert_eq!((found.age, found.left), (minutes(1), minutes(14)));
            rule.spec.admit_percent = 50;
            assert!(BreakerRule::of(&rule, later).is_none());
        }
    }

    #[test]
    fn rule_is_for_one_tenant_where_others_have_the_version_and_no_trouble() {
        for (connected, others, expected) in [(80, 20, true), (81, 20, false), (10, 19, false), (0, 1_000, true)] {
            assert_eq!(is_of_one_tenant(connected, others), expected, "{connected} {others}");
        }
        let rule = rule_for(Some("box"), Some("2.0"), Some("acme"), WALL).unwrap();

        let of = |tenant| Subject {
            model: Some("box"),
            firmware: Some("2.0"),
            tenant,
            ..Subject::default()
        };
        assert!(rule.is_for(&of(Some("acme"))) && !rule.is_for(&of(Some("other"))) && !rule.is_for(&of(None)));
    }

    #[test]
    fn version_that_no_range_can_match_has_no_rule() {
        let without_version = rule_for(Some("box"), None, None, WALL).unwrap();

        assert_eq!(without_version.matches.firmware.unwrap().as_str(), "=(none)");
        assert_eq!(rule_for(Some("box"), Some("1.0,2.0"), None, WALL), None);
    }
}
