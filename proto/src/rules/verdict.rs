//! The verdict of a rule set on one device: refusal, metric and log line derive from it.

use siphasher::sip::SipHasher24;

use super::{Effect, Rule};
use crate::id::{DeviceId, RuleId};

/// Number of buckets that a rule spreads devices over.
const BUCKETS: u32 = 10_000;

/// The rules that apply to a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict<'r> {
    /// Effect on the device; `None`: no rule applies.
    pub enforced: Option<Ruling<'r>>,
    /// Effect that the rules in dry-run mode would have, if they were enforced and there were no others.
    pub dry_run: Option<Ruling<'r>>,
}

/// A rule that applies, by its effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ruling<'r> {
    /// The device is refused.
    Block(&'r Rule),
    /// The device gets a restricted session.
    Restrict(&'r Rule),
    /// The device shares a rate with others.
    Throttle(&'r Rule),
}

impl<'r> Ruling<'r> {
    pub(super) const fn of(rule: &'r Rule) -> Self {
        match rule.spec.effect {
            Effect::Block => Self::Block(rule),
            Effect::Restrict => Self::Restrict(rule),
            Effect::Throttle => Self::Throttle(rule),
        }
    }

    #[must_use]
    pub const fn rule(self) -> &'r Rule {
        match self {
            Self::Block(rule) | Self::Restrict(rule) | Self::Throttle(rule) => rule,
        }
    }
}

impl Rule {
    /// Whether the rule admits the device: its list names the device, or the device is in its share.
    ///
    /// A larger share contains the devices of a smaller one, so raising `admit_percent` refuses no device that was
    /// admitted. Different rules admit different devices first.
    #[must_use]
    pub fn admits(&self, device: DeviceId) -> bool {
        let is_in_share = || bucket(self.id, device) < u32::from(self.spec.admit_percent) * (BUCKETS / 100);
        self.spec.allow.contains(&device) || is_in_share()
    }
}

/// The device's bucket, the same on all nodes: SipHash-2-4 of its id, with the rule's id as the key.
fn bucket(rule: RuleId, device: DeviceId) -> u32 {
    let hash = SipHasher24::new_with_key(rule.0.as_bytes()).hash(device.as_bytes());
    // The upper half of the product is below `BUCKETS`.
    ((u128::from(hash) * u128::from(BUCKETS)) >> 64) as u32
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::{
        rules::{Match, RuleSpec},
        time::WallTime,
    };

    fn admitting(rule: u128, admit_percent: u8) -> Rule {
        Rule {
            id: RuleId(Uuid::from_u128(rule)),
            spec: RuleSpec {
                admit_percent,
                ..RuleSpec::new(Match::default(), Effect::Block)
            },
            created_at: WallTime::from_unix_ms(1),
            revision: 1,
        }
    }

    fn devices() -> impl Iterator<Item = DeviceId> {
        (0..10_000).map(|number| DeviceId::from_uuid(Uuid::from_u128(number)))
    }

    /// All nodes of a fleet, of any version, admit the same devices.
    #[test]
    fn buckets_are_the_same_in_all_versions() {
        let bucket = |rule, device| {
            bucket(
                RuleId(Uuid::from_u128(rule)),
                DeviceId::from_uuid(Uuid::from_u128(device)),
            )
        };

        assert_eq!(
            [bucket(1, 1), bucket(1, 2), bucket(2, 1), bucket(u128::MAX, 0)],
            [7525, 193, 5464, 2100]
        );
    }

    #[test]
    fn a_rule_lets_its_share_of_the_devices_through_and_raising_it_refuses_nobody() {
        let admitted = |percent| devices().map(move |device| admitting(1, percent).admits(device));

        assert!(admitted(0).all(|is_admitted| !is_admitted) && admitted(100).all(|is_admitted| is_admitted));
        for percent in 1..=100 {
            assert!(
                admitted(percent - 1)
                    .zip(admitted(percent))
                    .all(|(before, after)| after || !before)
            );
            let share = admitted(percent).filter(|is_admitted| *is_admitted).count();
            assert!(share.abs_diff(usize::from(percent) * 100) < 150, "{percent}: {share}");
        }
    }

    #[test]
    fn two_rules_let_different_devices_through() {
        let (first, second) = (admitting(1, 10), admitting(2, 10));

        let both = devices()
            .filter(|device| first.admits(*device) && second.admits(*device))
            .count();

        assert!(
            (60..140).contains(&both),
            "{both} of 10,000 where a hundred are expected"
        );
    }
}
