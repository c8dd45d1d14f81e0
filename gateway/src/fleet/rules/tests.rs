use seawall_proto::{
    rules::{Effect, Match, RuleSpec, StoredRules},
    time::WallTime,
};
use uuid::Uuid;

use super::*;
use crate::{runtime::config::DatabaseUrl, store::Audit};

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

/// Puts a set in force as if it came from the database.
fn put(rules: &Rules, set: RuleSet) {
    let set = Arc::new(set);
    rules.stored.store(Arc::clone(&set));
    rules.current.store(set);
}

#[test]
fn rules_that_can_not_be_kept_leave_nothing_beside_their_file() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join(FILE);
    std::fs::create_dir(&file).unwrap();
    let set = RuleSet::compile(1, vec![rule(1, 1, "one")]);

    assert!(save(&file, &set, &[], &[]).is_err());

    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
}

#[test]
fn what_this_version_can_not_enforce_survives_the_file_byte_by_byte() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join(FILE);
    let specs = [
        r#"{ "effect":"throttle", "rate": 1.50, "match":{"firmware":">=3"} }"#,
        "not \"JSON\"",
    ];
    let unsupported = (7..)
        .zip(specs)
        .map(|(id, spec)| Rule::read(RuleId(Uuid::from_u128(id)), spec, WallTime::from_unix_ms(1), 2).unwrap_err());
    let set = RuleSet::compile_stored(3, vec![rule(1, 1, "one")], unsupported.collect());

    save(&file, &set, &[], &[]).unwrap();
    let InForce {
        set: again,
        lost,
        returned,
    } = read(&file).unwrap().unwrap().into_in_force();
    let first = std::fs::read(&file).unwrap();
    save(&file, &again, &lost, &returned).unwrap();

    let kept: Vec<&str> = again.unsupported().iter().map(|rule| &*rule.spec).collect();
    assert_eq!(kept, specs);
    assert_eq!((again.revision(), again.digest()), (3, set.digest()));
    assert_eq!(reasons(&again), ["one"]);
    assert_eq!(std::fs::read(&file).unwrap(), first);
}

#[test]
fn file_of_a_later_version_is_read() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join(FILE);
    let id = Uuid::from_u128(1);
    let text = format!(
        r#"{{"revision":3,"cluster":"a","rules":[{{"id":"{id}","spec":{{"match":{{}},"effect":"block"}},"created_at":1,"revision":3,"stage":2}}]}}"#
    );
    std::fs::write(&file, text).unwrap();

    let rules = Rules::open(home.path());

    assert_eq!((rules.current().revision(), rules.current().rules().len()), (3, 1));
}

#[test]
fn rule_whose_deletion_the_database_has_lost_closes_no_session_until_somebody_changes_it() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join(FILE);
    let evicting = |id, revision| {
        let mut rule = rule(id, revision, "evicting");
        rule.spec.evict = true;
        rule
    };
    // Rule 2 was deleted in revision 8.
    let in_force = RuleSet::compile(8, vec![evicting(1, 3)]);
    let wall = WallTime::from_unix_ms(5);
    let stored = |revision, rules| StoredRules {
        revision,
        rules,
        unsupported: Vec::new(),
        released: Vec::new(),
    };
    let evicts = |set: &RuleSet| -> Vec<bool> { set.rules().iter().map(|rule| rule.spec.evict).collect() };

    let restored = stored(6, vec![evicting(1, 3), evicting(2, 5)]);
    let back = merge(restored, &in_force, &[], &[], wall);
    save(&file, &back.set, &back.lost, &back.returned).unwrap();
    let kept = read(&file).unwrap().unwrap().into_in_force();
    let next = stored(7, vec![evicting(1, 3), evicting(2, 5), rule(3, 7, "new")]);
    let next = merge(next, &kept.set, &kept.lost, &kept.returned, wall);
    let changed = stored(8, vec![evicting(1, 3), evicting(2, 8), rule(3, 7, "new")]);
    let changed = merge(changed, &next.set, &next.lost, &next.returned, wall);

    let id = RuleId(Uuid::from_u128(2));
    assert_eq!((evicts(&back.set), back.lost.len()), (vec![true, false], 0));
    assert_eq!(back.returned, [Returned { id, since: 6 }]);
    assert_eq!(
        (evicts(&next.set), &next.returned),
        (vec![true, false, false], &back.returned)
    );
    assert_eq!(
        (evicts(&changed.set), changed.returned.len()),
        (vec![true, true, false], 0)
    );
}

#[test]
fn the_next_change_makes_the_next_revision() {
    let base = RuleSet::compile(4, vec![rule(1, 4, "one")]);

    let made = Written::Rule(rule(2, 5, "two")).onto(&base).unwrap();
    let changed = Written::Rule(rule(1, 6, "uno")).onto(&made).unwrap();
    let deleted = Written::Deleted {
        rule: RuleId(Uuid::from_u128(2)),
        revision: 7,
    };
    let deleted = deleted.onto(&changed).unwrap();

    assert_eq!((made.revision(), reasons(&made)), (5, vec!["one", "two"]));
    assert_eq!((changed.revision(), reasons(&changed)), (6, vec!["two", "uno"]));
    assert_eq!((deleted.revision(), reasons(&deleted)), (7, vec!["uno"]));
}

#[test]
fn change_after_one_of_another_node_is_in_force_and_the_poll_still_has_work() {
    let base = RuleSet::compile(4, vec![rule(1, 4, "one")]);

    let set = Written::Rule(rule(3, 6, "three")).onto(&base).unwrap();

    assert_eq!((set.revision(), reasons(&set)), (4, vec!["one", "three"]));
}

#[test]
fn change_that_is_in_force_already_is_not_made_again() {
    let base = RuleSet::compile(4, vec![rule(1, 3, "newer")]);

    assert!(Written::Rule(rule(1, 2, "older")).onto(&base).is_none());
    assert!(Written::Rule(rule(2, 4, "two")).onto(&base).is_none());
}

#[tokio::test]
async fn released_rule_stays_out_of_force_whatever_reloads_come_meanwhile() {
    let home = tempfile::tempdir().unwrap();
    let database = DatabaseUrl::sqlite(&home.path().join("seawall.db"));
    let store = Store::open(&database).await.unwrap();
    let (rules, clock, events) = (Rules::open(home.path()), Clock::start(), Events::default());

    let audit = Audit {
        id: Uuid::from_u128(1),
        at: WallTime::from_unix_ms(1),
        actor: "admin".to_owned(),
        action: "rule.delete",
    };

    for round in 1..=50 {
        let lost = rule(round.into(), round, "lost");
        put(&rules, RuleSet::compile(round, vec![lost.clone()]));
        rules.reload(&store, &clock, &events).await.unwrap();
        assert_eq!(rules.lost().len(), 1);

        let reloads = async {
            for _ in 0..20 {
                rules.reload(&store, &clock, &events).await.unwrap();
            }
        };
        let release = async {
            // At a different moment of the reloads each time.
            for _ in 0..round {
                tokio::task::yield_now().await;
            }
            let revision = store.rule_release(&lost, None, &audit).await.unwrap();
            let deleted = Written::Deleted {
                rule: lost.id,
                revision,
            };
            rules.apply(&deleted, &clock, &events).await;
        };
        tokio::join!(reloads, release);
        rules.reload(&store, &clock, &events).await.unwrap();

        assert_eq!((rules.current().rules().len(), rules.lost().len()), (0, 0), "{round}");
    }
}

#[tokio::test]
async fn returned_rule_that_is_deleted_again_is_forgotten() {
    let home = tempfile::tempdir().unwrap();
    let (rules, clock, events) = (Rules::open(home.path()), Clock::start(), Events::default());
    let back = rule(1, 1, "back");
    put(&rules, RuleSet::compile(1, vec![back.clone()]));
    rules.returned.store(Arc::new(vec![Returned { id: back.id, since: 1 }]));

    let deleted = Written::Deleted {
        rule: back.id,
        revision: 2,
    };
    rules.apply(&deleted, &clock, &events).await;

    assert!(rules.current().rules().is_empty() && rules.returned().is_empty());
}

#[tokio::test]
async fn writes_at_the_same_time_are_both_in_force() {
    let home = tempfile::tempdir().unwrap();
    let (rules, clock, events) = (Rules::open(home.path()), Clock::start(), Events::default());
    let (one, two) = (Written::Rule(rule(1, 1, "one")), Written::Rule(rule(2, 2, "two")));

    tokio::join!(rules.apply(&one, &clock, &events), rules.apply(&two, &clock, &events),);

    assert_eq!(reasons(&rules.current()), ["one", "two"]);
    assert_eq!(*rules.writes(), 2);
}
