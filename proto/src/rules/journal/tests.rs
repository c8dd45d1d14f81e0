use proptest::prelude::*;

use super::*;
use crate::rules::{Effect, Match};

fn spec(reason: &str) -> RuleSpec {
    let mut spec = RuleSpec::new(Match::default(), Effect::Block);
    reason.clone_into(&mut spec.reason);
    spec
}

fn id(number: u128) -> RuleId {
    RuleId(Uuid::from_u128(number))
}

fn write(number: u128, rule: u128, before: Option<&str>, after: Option<&str>) -> LocalWrite {
    LocalWrite {
        id: Uuid::from_u128(number),
        rule: id(rule),
        at: WallTime::from_unix_ms(7),
        actor: "ada".into(),
        is_confirmed: false,
        before: before.map(spec),
        after: after.map(spec),
    }
}

fn set(rules: &[(u128, &str)]) -> RuleSet {
    let rules = rules.iter().map(|(number, reason)| Rule {
        id: id(*number),
        spec: spec(reason),
        created_at: WallTime::from_unix_ms(1),
        revision: 3,
    });
    RuleSet::compile(3, rules.collect())
}

fn shown(rules: &RuleSet) -> Vec<(u128, &str)> {
    let mut shown: Vec<_> = rules
        .rules()
        .iter()
        .map(|rule| (rule.id.0.as_u128(), rule.spec.reason.as_str()))
        .collect();
    shown.sort_unstable();
    shown
}

#[test]
fn each_change_does_what_its_author_saw_or_the_stricter_thing() {
    let (a, b, c) = (Some("a"), Some("b"), spec("c"));
    let (is_a, is_b) = (spec("a"), spec("b"));
    for (before, after, stored, settlement) in [
        (None, b, Stored::Missing, Settlement::Inserted),
        (None, b, Stored::Rule(&is_b), Settlement::Unchanged),
        (None, b, Stored::Rule(&c), Settlement::Unchanged),
        (a, b, Stored::Rule(&is_a), Settlement::Updated),
        (a, b, Stored::Rule(&is_b), Settlement::Unchanged),
        (a, b, Stored::Rule(&c), Settlement::Split),
        (a, b, Stored::Unsupported, Settlement::Split),
        (a, b, Stored::Missing, Settlement::Restored),
        (a, None, Stored::Rule(&is_a), Settlement::Deleted),
        (a, None, Stored::Missing, Settlement::Deleted),
        (a, None, Stored::Rule(&c), Settlement::Kept),
        (a, None, Stored::Unsupported, Settlement::Kept),
    ] {
        let write = write(9, 1, before, after);

        assert_eq!(write.settlement(stored), settlement, "{before:?} {after:?} {stored:?}");
    }
}

#[test]
fn changes_of_one_rule_follow_each_other() {
    let stored = set(&[(1, "a"), (2, "x")]);
    let writes = [
        write(11, 3, None, Some("new")),
        write(12, 1, Some("a"), Some("b")),
        write(13, 1, Some("b"), Some("c")),
        write(14, 2, Some("x"), None),
        write(15, 4, None, Some("gone")),
        write(16, 4, Some("gone"), None),
    ];

    let (rules, local) = overlay(&stored, &writes);

    assert_eq!(shown(&rules), [(1, "c"), (3, "new")]);
    assert_eq!(local, [id(1), id(3)]);
    assert_eq!(rules.revision(), 3);
}

#[test]
fn change_of_a_rule_that_somebody_else_changed_leaves_both_in_force() {
    let changed_elsewhere = set(&[(1, "theirs")]);

    let (rules, local) = overlay(&changed_elsewhere, &[write(11, 1, Some("a"), Some("ours"))]);

    assert_eq!(shown(&rules), [(1, "theirs"), (11, "ours")]);
    assert_eq!(local, [id(11)]);
    let (rules, _) = overlay(&changed_elsewhere, &[write(11, 1, Some("a"), None)]);
    assert_eq!(shown(&rules), [(1, "theirs")]);
    let (rules, _) = overlay(&set(&[]), &[write(11, 1, Some("a"), Some("ours"))]);
    assert_eq!(shown(&rules), [(1, "ours")]);
}

#[test]
fn form_that_its_author_withdrew_reaches_no_other_node() {
    let back = [
        write(11, 1, Some("a"), Some("b")),
        write(12, 1, Some("b"), Some("a")),
        write(13, 2, None, Some("new")),
        write(14, 2, Some("new"), None),
    ];
    let theirs = set(&[(1, "theirs")]);

    let chained = chains(&back);
    let settlements: Vec<_> = chained
        .iter()
        .map(|chain| net(chain).unwrap())
        .zip([Stored::Rule(&spec("theirs")), Stored::Missing])
        .map(|(net, stored)| net.settlement(stored))
        .collect();

    assert_eq!(settlements, [Settlement::Unchanged, Settlement::Unchanged]);
    assert_eq!(shown(&overlay(&theirs, &back).0), [(1, "theirs")]);
    assert_eq!(shown(&overlay(&set(&[(1, "a")]), &back[..1]).0), [(1, "b")]);
}

#[test]
fn chain_ends_where_somebody_elses_change_came_between() {
    let writes = [
        write(11, 1, Some("a"), Some("b")),
        write(12, 2, None, Some("x")),
        write(13, 1, Some("b"), Some("c")),
        write(14, 1, Some("theirs"), Some("d")),
    ];

    let chained = chains(&writes);
    let ids: Vec<Vec<u128>> = chained
        .iter()
        .map(|chain| chain.iter().map(|write| write.id.as_u128()).collect())
        .collect();

    assert_eq!(ids, [vec![11, 13], vec![12], vec![14]]);
    let net = net(&chained[0]).unwrap();
    assert_eq!(
        (net.id.as_u128(), net.before, net.after),
        (13, Some(spec("a")), Some(spec("c")))
    );
}

#[test]
fn chain_is_confirmed_until_a_later_change_refuses_other_devices() {
    let confirmed = |number, before: &str, after: &str| LocalWrite {
        is_confirmed: true,
        ..write(number, 1, Some(before), Some(after))
    };
    let mut wider = write(3, 1, Some("c"), Some("d"));
    wider.after.as_mut().unwrap().evict = true;
    let steps = [confirmed(1, "a", "b"), write(2, 1, Some("b"), Some("c")), wider];

    assert!(net(&[&steps[0], &steps[1]]).unwrap().is_confirmed);
    assert!(net(&[&steps[0], &steps[1], &steps[2]]).unwrap().needs_check());
    assert!(write(1, 1, None, Some("a")).needs_check());
    assert!(!write(1, 1, Some("a"), None).needs_check());
}

#[test]
fn rule_that_the_database_lost_or_got_back_is_changed_without_a_conflict() {
    let mut stored = spec("a");
    stored.evict = true;
    for (after, stored, settlement) in [
        (Some("b"), Stored::Rule(&stored), Settlement::Updated),
        (None, Stored::Rule(&stored), Settlement::Deleted),
        (Some("b"), Stored::Lost, Settlement::Inserted),
        (None, Stored::Lost, Settlement::Deleted),
        (Some("b"), Stored::Damaged, Settlement::Updated),
        (None, Stored::Damaged, Settlement::Deleted),
    ] {
        let found = write(9, 1, Some("a"), after).settlement(stored);

        assert_eq!(found, settlement, "{after:?} {stored:?}");
    }
}

/// The database's side of [`LocalWrite::settlement`].
fn settle(rules: &RuleSet, chain: &[&LocalWrite]) -> RuleSet {
    let write = net(chain).unwrap();
    let stored = rules.rules().iter().find(|rule| rule.id == write.rule);
    let stored = stored.map_or(Stored::Missing, |rule| Stored::Rule(&rule.spec));
    let settlement = write.settlement(stored);
    let mut rules: Vec<Rule> = rules.rules().to_vec();
    if settlement == Settlement::Deleted {
        rules.retain(|rule| rule.id != write.rule);
    }
    if let Some((id, spec)) = write.written(settlement) {
        rules.retain(|rule| rule.id != id);
        rules.push(Rule {
            id,
            spec: spec.clone(),
            created_at: write.at,
            revision: 4,
        });
    }
    RuleSet::compile(4, rules)
}

proptest! {
    /// Each change moves to the database without a change of the rules in force. This node may record it later.
    #[test]
    fn nothing_changes_for_devices_while_changes_move(
        stored in proptest::collection::btree_map(0_u128..4, "[a-c]", 0..4),
        changes in proptest::collection::vec((0_u128..6, proptest::option::of("[a-c]")), 0..6),
    ) {
        let stored: Vec<_> = stored.iter().map(|(id, reason)| (*id, reason.as_str())).collect();
        let mut stored = set(&stored);
        let mut writes: Vec<LocalWrite> = Vec::new();
        for (number, (rule, after)) in (100..).zip(&changes) {
            let (seen, _) = overlay(&stored, &writes);
            let before = seen.rules().iter().find(|seen| seen.id == id(*rule)).map(|rule| rule.spec.reason.clone());
            // A deleted rule is not created again: new rules have new ids.
            let was_deleted = writes.iter().any(|write| write.rule == id(*rule) && write.after.is_none());
            if (before.is_some() || after.is_some()) && !was_deleted {
                writes.push(write(number, *rule, before.as_deref(), after.as_deref()));
            }
        }
        let (in_force, _) = overlay(&stored, &writes);

        let chained = chains(&writes);
        for moved in 0..chained.len() {
            stored = settle(&stored, &chained[moved]);

            for noted in 0..=moved + 1 {
                let noted: Vec<_> = chained[..noted].iter().flatten().map(|write| write.id).collect();
                let waiting: Vec<_> = writes.iter().filter(|write| !noted.contains(&write.id)).cloned().collect();
                let (now, _) = overlay(&stored, &waiting);
                prop_assert_eq!(shown(&now), shown(&in_force), "{} moved, {} noted", moved + 1, noted.len());
            }
        }
        prop_assert_eq!(overlay(&stored, &writes).1, []);
    }

    /// Another author changes the rule meanwhile, in any way.
    #[test]
    fn chain_becomes_its_last_form_or_a_conflict_and_never_a_form_in_between(
        first in proptest::option::of("[a-c]"),
        forms in proptest::collection::vec(proptest::option::of("[d-g]"), 1..5),
        theirs in proptest::option::of("[a-c]"),
    ) {
        let mut before = first.clone();
        let mut writes = Vec::new();
        for (number, after) in (100..).zip(&forms) {
            if before.is_none() && after.is_none() {
                continue;
            }
            writes.push(write(number, 1, before.as_deref(), after.as_deref()));
            before.clone_from(after);
        }
        let stored: Vec<_> = theirs.iter().map(|form| (1, form.as_str())).collect();
        let chained = chains(&writes);
        prop_assert!(chained.len() <= 1);

        let settled = chained.iter().fold(set(&stored), |stored, chain| settle(&stored, chain));

        let last = forms.last().unwrap().as_deref();
        for (_, form) in shown(&settled) {
            prop_assert!(Some(form) == theirs.as_deref() || Some(form) == last, "{form}");
        }
        if let Some(theirs) = theirs.as_deref().filter(|_| theirs != first) {
            prop_assert!(shown(&settled).contains(&(1, theirs)));
        }
    }
}
