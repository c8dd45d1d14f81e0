//! Staged changes: each step is stored together with its rule and its audit record, and is taken once.

use std::time::Duration;

use seawall_gateway::store::{Consent, ROLLOUTS_OPEN_MAX, RolloutWrite, StoreError, StoredRollout};
use seawall_proto::{
    id::RuleId,
    rollout::{Counts, Direction, Plan, Rollout, State, Totals, Verdict},
    rules::{Effect, Match, RuleSpec},
    time::WallTime,
};
use uuid::Uuid;

use super::{Fixture, audit, on_both};

on_both!(
    a_step_is_written_with_the_rule_and_the_audit_record,
    of_two_steps_that_saw_the_same_one_is_taken,
    a_step_on_a_rule_that_was_changed_is_a_conflict,
    counts_of_the_present_window_are_added_up,
    a_rule_is_made_together_with_its_rollout_and_deleted_with_it,
    only_so_many_rollouts_are_open,
    rollouts_that_are_over_are_listed_no_more,
);

fn id(number: u128) -> RuleId {
    RuleId(Uuid::from_u128(number))
}

fn rollout(direction: Direction, now: WallTime) -> Rollout {
    let plan = Plan {
        stages: vec![10, 100],
        bake: Duration::from_secs(5),
        connects_min: 1,
    };
    Rollout::begin(direction, plan, 0, 0, now).unwrap()
}

/// Creates a rule, and begins its release.
async fn released(fixture: &Fixture, number: u128) -> StoredRollout {
    let store = &fixture.store;
    let spec = RuleSpec::new(Match::default(), Effect::Block);
    let made = store
        .rule_insert(id(number), spec, Consent::Given, &audit("rule.create", 1))
        .await
        .unwrap();
    let write = RolloutWrite {
        rule: made.id,
        seen: None,
        rule_revision: made.revision,
        rollout: rollout(Direction::Release, store.now().await.unwrap()),
    };
    store.rollout_step(write, &audit("rollout.start", 2)).await.unwrap();
    store.rollout(made.id).await.unwrap().unwrap()
}

fn paused(stored: &StoredRollout) -> RolloutWrite {
    let mut rollout = stored.rollout.clone();
    rollout.pause(stored.now).unwrap();
    RolloutWrite {
        rule: stored.rule,
        seen: Some(stored.revision),
        rule_revision: stored.rule_revision,
        rollout,
    }
}

async fn a_step_is_written_with_the_rule_and_the_audit_record(fixture: &Fixture) {
    let store = &fixture.store;

    let stored = released(fixture, 1).await;

    let rules = store.rules().await.unwrap();
    assert_eq!((rules.revision, rules.rules[0].revision), (2, 2));
    assert_eq!(rules.rules[0].spec.admit_percent, 10);
    assert_eq!((stored.rule_revision, stored.rollout.rule_revision()), (2, 2));
    // A pause changes no rule, and every node learns it by the revision.
    let after = store
        .rollout_step(paused(&stored), &audit("rollout.pause", 3))
        .await
        .unwrap();
    assert_eq!(after.unwrap().revision, 2);
    assert_eq!(store.rules_revision().await.unwrap(), 3);
    let records = store.audit_page(None, 10).await.unwrap().items;
    let told: Vec<_> = records
        .iter()
        .map(|record| {
            let after = record.after.clone().unwrap();
            (
                record.action.as_str(),
                after["admit_percent"].as_u64(),
                after["state"].as_str().map(str::to_owned),
            )
        })
        .collect();
    assert_eq!(
        told,
        [
            ("rollout.pause", Some(10), Some("paused".to_owned())),
            ("rollout.start", Some(10), Some("running".to_owned())),
            ("rule.create", Some(0), None),
        ]
    );
    assert!(records.iter().all(|record| record.subject == id(1).to_string()));
}

async fn of_two_steps_that_saw_the_same_one_is_taken(fixture: &Fixture) {
    let store = &fixture.store;
    let stored = released(fixture, 1).await;

    let (first, second) = (audit("rollout.pause", 3), audit("rollout.pause", 4));
    let (first, second) = tokio::join!(
        store.rollout_step(paused(&stored), &first),
        store.rollout_step(paused(&stored), &second),
    );

    let conflicts = [&first, &second].map(|outcome| matches!(outcome, Err(StoreError::Conflict(_))));
    assert_eq!(conflicts.iter().filter(|is| **is).count(), 1, "{first:?} {second:?}");
    assert_eq!(store.rules_revision().await.unwrap(), 3);
    assert_eq!(store.audit_page(None, 10).await.unwrap().items.len(), 3);
    // Evidence that was read before is not stored either.
    assert!(!store.rollout_note(&stored).await.unwrap());
    let now = store.rollout(id(1)).await.unwrap().unwrap();
    assert!(store.rollout_note(&now).await.unwrap() && !store.rollout_note(&now).await.unwrap());
}

async fn a_step_on_a_rule_that_was_changed_is_a_conflict(fixture: &Fixture) {
    let store = &fixture.store;
    let stored = released(fixture, 1).await;
    let spec = RuleSpec::new(Match::default(), Effect::Block);
    store
        .rule_update(id(1), 2, spec, Consent::Given, &audit("rule.update", 3))
        .await
        .unwrap();

    let late = store.rollout_step(paused(&stored), &audit("rollout.pause", 4)).await;

    assert!(matches!(late, Err(StoreError::Conflict(_))), "{late:?}");
    let now = store.rollout(id(1)).await.unwrap().unwrap();
    assert_eq!((now.rule_revision, now.rollout.rule_revision()), (3, 2));
}

async fn counts_of_the_present_window_are_added_up(fixture: &Fixture) {
    let store = &fixture.store;
    let stored = released(fixture, 1).await;
    let counted = |connects| Totals {
        treated: Counts { connects, failed: 1 },
        ..Totals::default()
    };
    let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));

    for (run, window, connects) in [(one, 1, 10), (other, 1, 5), (one, 1, 20), (other, 2, 500)] {
        store
            .rollout_count(id(1), run, window, &counted(connects))
            .await
            .unwrap();
    }

    let totals = |stored: StoredRollout| stored.totals.treated;
    let now = store.rollout(id(1)).await.unwrap().unwrap();
    assert_eq!(
        totals(now),
        Counts {
            connects: 25,
            failed: 2
        }
    );
    let mut write = paused(&stored);
    write.rollout.resume(stored.now).unwrap();
    store.rollout_step(write, &audit("rollout.resume", 5)).await.unwrap();
    // A node that does not know the new window yet.
    store.rollout_count(id(1), one, 1, &counted(30)).await.unwrap();
    let now = store.rollout(id(1)).await.unwrap().unwrap();
    assert_eq!(totals(now), Counts::default());
}

async fn a_rule_is_made_together_with_its_rollout_and_deleted_with_it(fixture: &Fixture) {
    let store = &fixture.store;
    let spec = RuleSpec::new(Match::default(), Effect::Block);
    let begun = rollout(Direction::Rollout, store.now().await.unwrap());

    let made = store
        .rule_insert_staged(id(1), spec, begun, Consent::Given, &audit("rule.create", 1))
        .await
        .unwrap();

    assert_eq!((made.revision, made.spec.admit_percent), (1, 90));
    assert_eq!(store.rules().await.unwrap().rules, [made]);
    let stored = store.rollout(id(1)).await.unwrap().unwrap();
    assert_eq!((stored.rule_revision, stored.rollout.rule_revision()), (1, 1));
    assert_eq!(stored.rollout.steps()[0].verdict, Verdict::Started);
    store
        .rollout_count(id(1), Uuid::from_u128(1), 1, &Totals::default())
        .await
        .unwrap();
    store
        .rule_delete(id(1), &audit("rule.delete", 2))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(store.rollout(id(1)).await.unwrap(), None);
    let gone = store.rollout_step(paused(&stored), &audit("rollout.pause", 3)).await;
    assert_eq!(gone.unwrap(), None);
}

async fn only_so_many_rollouts_are_open(fixture: &Fixture) {
    let store = &fixture.store;
    let most = u128::try_from(ROLLOUTS_OPEN_MAX).unwrap();
    for number in 1..=most {
        released(fixture, number).await;
    }
    let spec = RuleSpec::new(Match::default(), Effect::Block);
    let begun = rollout(Direction::Rollout, store.now().await.unwrap());

    let one_more = store
        .rule_insert_staged(id(500), spec, begun, Consent::Given, &audit("rule.create", 1))
        .await;

    assert!(matches!(one_more, Err(StoreError::Conflict(_))), "{one_more:?}");
    assert_eq!(store.rules().await.unwrap().rules.len(), 20, "neither is the rule made");
    assert_eq!(store.rollouts().await.unwrap().len(), 20);
}

async fn rollouts_that_are_over_are_listed_no_more(fixture: &Fixture) {
    let store = &fixture.store;
    let stored = released(fixture, 1).await;
    let mut write = paused(&stored);
    write.rollout.revert(stored.now).unwrap();
    store.rollout_step(write, &audit("rollout.revert", 3)).await.unwrap();

    let listed = store.rollouts().await.unwrap();
    assert_eq!(listed[0].rollout.state(), State::Reverted, "for a while");
    fixture
        .db_run("UPDATE rollouts SET stepped_at = stepped_at - 61000")
        .await;
    assert_eq!(store.rollouts().await.unwrap(), []);
    assert!(store.rollout(id(1)).await.unwrap().is_some());
    // A rollout that a later version has written does not hide others.
    released(fixture, 2).await;
    fixture
        .db_run("UPDATE rollouts SET phase = 1, rollout = '{\"later\":1}' WHERE phase = 0")
        .await;
    assert_eq!(store.rollouts().await.unwrap().len(), 1);
    assert!(store.rollout(id(1)).await.is_err());
}
