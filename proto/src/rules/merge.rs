//! The rules in force if the database and this node disagree.
//!
//! A database that was restored from a backup, or lost power, may have lost rules or deletions. Rules that it has lost
//! stay in force, and so do those whose rows are damaged. Rules whose deletion it has lost refuse devices again, but
//! close no sessions. Start with [`merge`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Rule, RuleSet, Unsupported};
use crate::{id::RuleId, time::WallTime};

/// Every rule of the database, as of one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRules {
    /// Increases with every change of any rule; 0 before the first.
    pub revision: u64,
    pub rules: Vec<Rule>,
    /// Rules that this version cannot enforce: of a later version, or edited by hand.
    pub unsupported: Vec<Unsupported>,
    /// Lost rules that operators have removed since: no node keeps them in force.
    pub released: Vec<RuleId>,
}

/// Rules to enforce, with those among them that the database does not have as this node knows them.
#[derive(Clone, Debug)]
pub struct InForce {
    pub set: RuleSet,
    pub lost: Vec<Lost>,
    pub returned: Vec<Returned>,
}

impl InForce {
    /// No rules.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            set: RuleSet::empty(),
            lost: Vec::new(),
            returned: Vec::new(),
        }
    }
}

/// A rule in force that the database has lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    pub rule: Rule,
    /// Revision of the database when the loss was found. A later change of the rule there ends it.
    pub since: u64,
}

/// A rule in force that came with an older revision of the database, and that this node did not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Returned {
    pub id: RuleId,
    /// Revision of the database when that was found. A later change of the rule there ends it.
    pub since: u64,
}

/// Merges the rules of the database with those in force on this node. `lost` and `returned` are from the previous
/// merge.
#[must_use]
pub fn merge(stored: StoredRules, in_force: &RuleSet, lost: &[Lost], returned: &[Returned], wall: WallTime) -> InForce {
    let StoredRules {
        revision,
        mut rules,
        mut unsupported,
        released,
    } = stored;
    let readable: BTreeMap<RuleId, u64> = rules.iter().map(|rule| (rule.id, rule.revision)).collect();
    let unreadable: BTreeMap<RuleId, u64> = unsupported.iter().map(|rule| (rule.id, rule.revision)).collect();
    let known: BTreeMap<RuleId, u64> = readable.iter().chain(&unreadable).map(|(id, at)| (*id, *at)).collect();
    // A rule that was changed since is neither lost nor returned.
    let is_changed = |id: &RuleId, since: u64| known.get(id).is_some_and(|changed| *changed > since);
    // A change gives a rule another revision, so a rule that became unreadable at the same revision is damaged. Zero
    // stands for an unreadable revision.
    let is_damaged = |rule: &Rule| {
        let stored = unreadable.get(&rule.id);
        stored.is_some_and(|revision| *revision == rule.revision || *revision == 0)
    };
    let is_missing =
        |rule: &Rule| rule.revision > revision || (revision == in_force.revision() && !known.contains_key(&rule.id));
    let is_older = revision <= in_force.revision();
    let found = in_force
        .rules()
        .iter()
        .filter(|rule| is_damaged(rule) || (is_older && is_missing(rule)))
        .map(|rule| Lost {
            rule: rule.clone(),
            since: revision,
        });
    // The earlier ones are last, so that they keep the revision at which they were found.
    let lost: BTreeMap<RuleId, Lost> = found
        .chain(lost.iter().cloned())
        .map(|lost| (lost.rule.id, lost))
        .collect();
    let is_lost = |lost: &Lost| {
        let is_readable = readable.get(&lost.rule.id) == Some(&lost.rule.revision);
        let is_released = released.contains(&lost.rule.id);
        !lost.rule.is_expired(wall) && !is_changed(&lost.rule.id, lost.since) && !is_readable && !is_released
    };
    let lost: Vec<Lost> = lost.into_values().filter(is_lost).collect();
    let found = rules
        .iter()
        .filter(|rule| revision < in_force.revision() && in_force.rules().iter().all(|other| other.id != rule.id));
    let returned: BTreeMap<RuleId, u64> = found
        .map(|rule| (rule.id, revision))
        .chain(returned.iter().map(|rule| (rule.id, rule.since)))
        .filter(|(id, since)| known.contains_key(id) && !is_changed(id, *since))
        .collect();
    for rule in rules.iter_mut().filter(|rule| returned.contains_key(&rule.id)) {
        rule.spec.evict = false;
    }
    // If a rule was changed in a lost revision, the lost form is used.
    let is_kept = |id: RuleId| lost.binary_search_by_key(&id, |lost| lost.rule.id).is_err();
    rules.retain(|rule| is_kept(rule.id));
    unsupported.retain(|rule| is_kept(rule.id));
    rules.extend(lost.iter().map(|lost| lost.rule.clone()));
    InForce {
        set: RuleSet::compile_stored(revision, rules, unsupported),
        lost,
        returned: returned.into_iter().map(|(id, since)| Returned { id, since }).collect(),
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::rules::{Effect, Match, RuleSpec};

    fn rule(id: u128, revision: u64, reason: &str) -> Rule {
        let mut spec = RuleSpec::new(Match::default(), Effect::Block);
        reason.clone_into(&mut spec.reason);
        Rule {
            id: RuleId(Uuid::from_u128(id)),
            spec,
            created_at: WallTime::from_unix_ms(1),
            revision,
        }
    }

    fn reasons(set: &RuleSet) -> Vec<&str> {
        let mut reasons: Vec<&str> = set.rules().iter().map(|rule| rule.spec.reason.as_str()).collect();
        reasons.sort_unstable();
        reasons
    }

    #[test]
    fn rules_that_the_database_has_lost_stay_in_force_until_it_has_them_again() {
        let in_force = RuleSet::compile(9, vec![rule(1, 3, "old"), rule(2, 8, "changed"), rule(3, 9, "new")]);
        let wall = WallTime::from_unix_ms(5);
        let stored = |revision, rules| StoredRules {
            revision,
            rules,
            unsupported: Vec::new(),
            released: Vec::new(),
        };

        let restored = stored(6, vec![rule(1, 3, "old"), rule(2, 5, "before")]);
        let InForce { set, lost, .. } = merge(restored, &in_force, &[], &[], wall);
        let next = stored(7, vec![rule(1, 3, "old"), rule(2, 7, "again")]);
        let InForce {
            set: next,
            lost: still_lost,
            ..
        } = merge(next, &set, &lost, &[], wall);
        let same = stored(7, vec![rule(1, 3, "old"), rule(2, 7, "again")]);
        let InForce {
            set: same,
            lost: lost_then,
            ..
        } = merge(same, &next, &still_lost, &[], wall);

        assert_eq!((set.revision(), reasons(&set)), (6, vec!["changed", "new", "old"]));
        assert_eq!(lost.len(), 2);
        assert_eq!((next.revision(), reasons(&next)), (7, vec!["again", "new", "old"]));
        assert_eq!((still_lost.len(), still_lost[0].since), (1, 6));
        assert_eq!((same.digest(), lost_then), (next.digest(), still_lost));
    }

    #[test]
    fn rules_that_the_database_lacks_at_the_same_revision_are_lost() {
        let in_force = RuleSet::compile(2, vec![rule(1, 1, "old"), rule(2, 2, "lost")]);
        let stored = StoredRules {
            revision: 2,
            rules: vec![rule(1, 1, "old"), rule(3, 2, "other")],
            unsupported: Vec::new(),
            released: Vec::new(),
        };

        let InForce { set, lost, .. } = merge(stored, &in_force, &[], &[], WallTime::from_unix_ms(5));

        assert_eq!((reasons(&set), lost.len()), (vec!["lost", "old", "other"], 1));
    }

    #[test]
    fn rule_whose_row_is_damaged_stays_in_force_until_it_can_be_read_or_was_changed() {
        let wall = WallTime::from_unix_ms(5);
        let in_force = RuleSet::compile(4, vec![rule(1, 3, "good"), rule(2, 4, "other")]);
        let unreadable = |id, revision| Rule::read(RuleId(Uuid::from_u128(id)), "", wall, revision).unwrap_err();
        let stored = |revision, rules, unsupported| StoredRules {
            revision,
            rules,
            unsupported,
            released: Vec::new(),
        };

        let with_lost = |stored, in_force: &RuleSet, lost: &[Lost]| {
            let InForce { set, lost, .. } = merge(stored, in_force, lost, &[], wall);
            (set, lost)
        };

        for at in [3, 0] {
            let damaged = stored(6, vec![rule(2, 4, "other")], vec![unreadable(1, at)]);
            let (set, lost) = with_lost(damaged.clone(), &in_force, &[]);
            assert_eq!((reasons(&set), set.unsupported().len()), (vec!["good", "other"], 0));
            assert_eq!((lost.len(), lost[0].rule.revision), (1, 3));
            let (again, still) = with_lost(damaged, &set, &lost);
            assert_eq!((again.digest(), &still), (set.digest(), &lost));

            let repaired = stored(6, vec![rule(1, 3, "good"), rule(2, 4, "other")], Vec::new());
            let (repaired, lost_then) = with_lost(repaired, &set, &lost);
            assert_eq!((reasons(&repaired), lost_then), (vec!["good", "other"], Vec::new()));
            let changed = stored(7, vec![rule(2, 4, "other")], vec![unreadable(1, 7)]);
            let (changed, lost_then) = with_lost(changed, &set, &lost);
            assert_eq!((reasons(&changed), changed.unsupported().len()), (vec!["other"], 1));
            assert_eq!(lost_then, []);
        }
        let by_a_later_version = stored(5, vec![rule(2, 4, "other")], vec![unreadable(1, 5)]);
        let (set, lost) = with_lost(by_a_later_version, &in_force, &[]);
        assert_eq!(
            (reasons(&set), set.unsupported().len(), lost),
            (vec!["other"], 1, Vec::new())
        );
    }

    #[test]
    fn rules_that_others_have_deleted_are_not_lost() {
        let in_force = RuleSet::compile(2, vec![rule(1, 1, "old"), rule(2, 2, "deleted")]);
        let stored = StoredRules {
            revision: 3,
            rules: vec![rule(1, 1, "old")],
            unsupported: Vec::new(),
            released: Vec::new(),
        };

        let InForce { set, lost, .. } = merge(stored, &in_force, &[], &[], WallTime::from_unix_ms(5));

        assert_eq!((reasons(&set), lost.len()), (vec!["old"], 0));
    }
}
