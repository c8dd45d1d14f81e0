//! Firmware rules: stored with a revision and their audit records.

use std::time::{Duration, Instant};

use seawall_gateway::store::{Consent, NewDevice, NewToken, Role, Seen, Settled, StoreError, StoredRules};
use seawall_proto::{
    id::{DeviceId, RuleId, SecretHash},
    rules::{LocalWrite, RuleSpec, Settlement},
    time::WallTime,
};
use serde_json::json;
use sqlx::{Connection as _, PgConnection};
use tokio::sync::Mutex;
use uuid::Uuid;

use super::{Fixture, audit, on_both};
use crate::harness::wait::eventually_async;

on_both!(
    first_revision_is_zero_without_rules,
    rule_is_read_back_as_it_was_written,
    every_change_moves_the_revision_by_one,
    change_of_a_rule_seen_at_another_revision_is_a_conflict,
    rule_of_another_revision_is_not_deleted_and_changes_nothing,
    failed_change_leaves_the_revision,
    rule_that_cannot_be_enforced_stops_no_other_and_can_be_deleted,
    older_version_works_beside_rows_and_columns_of_a_newer_one,
    unconfirmed_rules_are_known_until_somebody_confirms_them,
    rule_that_was_checked_beside_older_ones_is_not_written,
    automatic_rules_of_all_nodes_are_ten_minutes_apart_even_if_the_last_one_is_gone,
    counts_of_other_runs_are_read_with_their_age,
    changes_and_audit_stand_together,
    writes_side_by_side_each_have_a_revision,
    change_that_arrives_late_is_made_once_with_its_author_and_time,
    change_whose_outcome_was_not_known_is_made_once,
    late_deletion_of_a_missing_rule_is_told_to_every_node,
    chain_that_arrives_late_is_one_change_with_a_record_for_each,
);

fn id(number: u128) -> RuleId {
    RuleId(Uuid::from_u128(number))
}

fn spec(firmware: &str) -> RuleSpec {
    let json = json!({
        "match": {"firmware": firmware, "model": "m"},
        "effect": "block",
        "reason": "crash loop",
        "retry_after": "20m",
        "expires_at": "2030-01-02T03:04:05Z",
        "evict": true,
    });
    serde_json::from_value(json).expect("a good rule")
}

async fn first_revision_is_zero_without_rules(fixture: &Fixture) {
    assert_eq!(fixture.store.rules_revision().await.unwrap(), 0);
    let empty = StoredRules {
        revision: 0,
        rules: Vec::new(),
        unsupported: Vec::new(),
        released: Vec::new(),
    };
    assert_eq!(fixture.store.rules().await.unwrap(), empty);
}

async fn rule_is_read_back_as_it_was_written(fixture: &Fixture) {
    let made = fixture
        .store
        .rule_insert(id(1), spec(">=3.8.0-b3"), Consent::Given, &audit("rule.create", 7))
        .await
        .unwrap();

    assert_eq!((made.id, made.revision, made.created_at.as_unix_ms()), (id(1), 1, 7));
    assert_eq!(made.spec, spec(">=3.8.0-b3"));
    let stored = fixture.store.rules().await.unwrap();
    assert_eq!((stored.revision, stored.rules), (1, vec![made]));
}

async fn automatic_rules_of_all_nodes_are_ten_minutes_apart_even_if_the_last_one_is_gone(fixture: &Fixture) {
    let store = &fixture.store;
    let interval = Duration::from_secs(600);
    let insert = async |number, revision, interval| {
        let audit = audit("proposal.apply", 1);
        store
            .rule_insert_automatic(id(number), spec("1.*"), revision, interval, &audit)
            .await
    };
    let outdated = insert(1, 7, interval).await;
    assert!(matches!(outdated, Err(StoreError::Outdated)), "{outdated:?}");
    insert(1, 0, interval).await.unwrap();
    store.rule_delete(id(1), &audit("rule.delete", 2)).await.unwrap();

    let second = insert(2, 2, interval).await;

    assert!(matches!(second, Err(StoreError::Conflict(_))), "{second:?}");
    assert_eq!(store.rules_revision().await.unwrap(), 2, "nothing was written");
    insert(2, 2, Duration::ZERO).await.unwrap();
    assert_eq!(store.rules().await.unwrap().rules.len(), 1);
}

async fn every_change_moves_the_revision_by_one(fixture: &Fixture) {
    let store = &fixture.store;
    store
        .rule_insert(id(1), spec("1.*"), Consent::Given, &audit("rule.create", 1))
        .await
        .unwrap();
    store
        .rule_insert(id(2), spec("2.*"), Consent::Given, &audit("rule.create", 2))
        .await
        .unwrap();

    let updated = store
        .rule_update(id(1), 1, spec("3.*"), Consent::Given, &audit("rule.update", 3))
        .await
        .unwrap()
        .unwrap();
    assert_eq!((updated.revision, updated.created_at.as_unix_ms()), (3, 1));
    assert_eq!(store.rules().await.unwrap().rules[0], updated);

    assert_eq!(
        store.rule_delete(id(2), &audit("rule.delete", 4)).await.unwrap(),
        Some(4)
    );
    assert_eq!(store.rules_revision().await.unwrap(), 4);
    assert_eq!(store.rules().await.unwrap().rules, [updated]);
}

async fn change_of_a_rule_seen_at_another_revision_is_a_conflict(fixture: &Fixture) {
    let store = &fixture.store;
    store
        .rule_insert(id(1), spec("1.*"), Consent::Given, &audit("rule.create", 1))
        .await
        .unwrap();
    store
        .rule_update(id(1), 1, spec("2.*"), Consent::Given, &audit("rule.update", 2))
        .await
        .unwrap();

    let late = store
        .rule_update(id(1), 1, spec("3.*"), Consent::Given, &audit("rule.update", 3))
        .await;

    assert!(matches!(late, Err(StoreError::OtherRevision(2))), "{late:?}");
    assert_eq!(store.rules().await.unwrap().rules[0].spec, spec("2.*"));
}

async fn rule_of_another_revision_is_not_deleted_and_changes_nothing(fixture: &Fixture) {
    let store = &fixture.store;
    store
        .rule_insert(id(1), spec("1.*"), Consent::Given, &audit("rule.create", 1))
        .await
        .unwrap();
    store
        .rule_update(id(1), 1, spec("2.*"), Consent::Given, &audit("rule.update", 2))
        .await
        .unwrap();
    let seen = store.rules().await.unwrap();
    let by = audit("rule.delete", 3);

    let late = store.rule_delete_at(id(1), Some(&[1]), &by).await;
    assert!(matches!(late, Err(StoreError::OtherRevision(2))), "{late:?}");
    let late = store.rule_release(&seen.rules[0], Some(&[1]), &by).await;
    assert!(matches!(late, Err(StoreError::OtherRevision(2))), "{late:?}");
    assert_eq!(store.rules().await.unwrap(), seen);
    assert_eq!(store.audit_page(None, 10).await.unwrap().items.len(), 2);

    assert_eq!(store.rule_delete_at(id(1), Some(&[1, 2]), &by).await.unwrap(), Some(3));
    assert!(store.rules().await.unwrap().rules.is_empty());
}

async fn failed_change_leaves_the_revision(fixture: &Fixture) {
    let store = &fixture.store;
    store
        .rule_insert(id(1), spec("1.*"), Consent::Given, &audit("rule.create", 1))
        .await
        .unwrap();

    let twice = store
        .rule_insert(id(1), spec("2.*"), Consent::Given, &audit("rule.create", 2))
        .await;
    assert!(matches!(twice, Err(StoreError::Conflict(_))), "{twice:?}");
    assert_eq!(
        store
            .rule_update(id(9), 1, spec("2.*"), Consent::Given, &audit("rule.update", 2))
            .await
            .unwrap(),
        None
    );
    assert_eq!(store.rule_delete(id(9), &audit("rule.delete", 2)).await.unwrap(), None);

    assert_eq!(store.rules_revision().await.unwrap(), 1);
    assert_eq!(store.audit_page(None, 10).await.unwrap().items.len(), 1);
}

async fn rule_that_cannot_be_enforced_stops_no_other_and_can_be_deleted(fixture: &Fixture) {
    let store = &fixture.store;
    store
        .rule_insert(id(1), spec("1.*"), Consent::Given, &audit("rule.create", 1))
        .await
        .unwrap();
    store
        .rule_insert(id(2), spec("2.*"), Consent::Given, &audit("rule.create", 2))
        .await
        .unwrap();
    fixture
        .db_run("UPDATE rules SET spec = '{\"effect\":\"of a later release\"}' WHERE revision = 2")
        .await;

    let stored = store.rules().await.unwrap();
    assert_eq!((stored.revision, stored.rules.len()), (2, 1));
    assert_eq!(stored.unsupported.len(), 1);
    assert_eq!(&*stored.unsupported[0].spec, "{\"effect\":\"of a later release\"}");
    let changed = store
        .rule_update(id(2), 2, spec("3.*"), Consent::Given, &audit("rule.update", 3))
        .await;
    assert!(matches!(changed, Err(StoreError::Conflict(_))), "{changed:?}");
    let made = store
        .rule_insert(id(3), spec("3.*"), Consent::Given, &audit("rule.create", 3))
        .await;
    assert_eq!(made.unwrap().revision, 3);
    assert_eq!(
        store.rule_delete(id(2), &audit("rule.delete", 4)).await.unwrap(),
        Some(4)
    );

    let stored = store.rules().await.unwrap();
    assert_eq!((stored.rules.len(), stored.unsupported.len()), (2, 0));
    let deleted = store.audit_page(None, 1).await.unwrap().items.remove(0);
    assert_eq!(deleted.before, Some(json!({"effect": "of a later release"})));
}

async fn older_version_works_beside_rows_and_columns_of_a_newer_one(fixture: &Fixture) {
    let store = &fixture.store;
    for text in [
        "ALTER TABLE rules ADD COLUMN plan TEXT",
        "ALTER TABLE tokens ADD COLUMN until BIGINT",
        "ALTER TABLE devices ADD COLUMN site TEXT",
        "CREATE TABLE sites (id TEXT NOT NULL PRIMARY KEY)",
        "INSERT INTO meta (key, value) VALUES ('sites_revision', '7')",
    ] {
        fixture.db_run(text).await;
    }
    let made = [
        r#"{"match":{"firmware":"1.*"},"effect":"throttle","evict":true}"#,
        r#"{"match":{"firmware":"1.*"},"effect":"restrict","update":7}"#,
        r#"{"match":{"firmware":"1.*"},"effect":"block","admit_percent":101,"evict":true}"#,
        r#"{"match":{"firmware":"1.*"},"effect":"block","mode":"sample"}"#,
        r#"{"match":{"firmware":"1.*"},"effect":"block","update":{"url":"https://example.com"}}"#,
        r#"{"match":{"firmware":"1.*","site":"a"},"effect":"block"}"#,
    ];
    for (number, json) in (1..).zip(made) {
        store
            .rule_insert(id(number), spec("1.*"), Consent::Given, &audit("rule.create", 1))
            .await
            .unwrap();
        fixture
            .db_run(&format!(
                "UPDATE rules SET spec = '{json}', plan = 'b' WHERE revision = {number}"
            ))
            .await;
    }
    for (number, name) in [(1, "ours"), (2, "theirs")] {
        let token = NewToken {
            id: Uuid::from_u128(number),
            name: name.to_owned(),
            role: Role::Viewer,
            sha256: SecretHash::of(name.as_bytes()),
        };
        store.token_insert(&token, &audit("token.create", 1)).await.unwrap();
    }
    fixture
        .db_run("UPDATE tokens SET role = 'auditor', until = 9 WHERE name = 'theirs'")
        .await;

    let stored = store.rules().await.unwrap();
    let kept: Vec<&str> = stored.unsupported.iter().map(|rule| &*rule.spec).collect();
    assert_eq!((kept, stored.rules), (made.to_vec(), Vec::new()));
    let ours = store
        .rule_insert(id(9), spec("2.*"), Consent::Given, &audit("rule.create", 2))
        .await
        .unwrap();
    let ours = store
        .rule_update(
            ours.id,
            ours.revision,
            spec("3.*"),
            Consent::Given,
            &audit("rule.update", 3),
        )
        .await
        .unwrap()
        .unwrap();
    assert_eq!(store.rules().await.unwrap().rules, [ours]);
    store
        .rule_delete(id(1), &audit("rule.delete", 4))
        .await
        .unwrap()
        .unwrap();

    let mut tokens = store.tokens().await.unwrap();
    tokens.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!((tokens[0].role, tokens[1].role), (Some(Role::Viewer), None));
    assert!(
        store
            .token_revoke(tokens[1].id, &audit("token.revoke", 5))
            .await
            .unwrap()
            .is_some()
    );
    let device = NewDevice {
        external_id: None,
        id: DeviceId::from_uuid(Uuid::from_u128(1)),
        tenant: None,
        model: None,
        secret: SecretHash::of(b"a secret of a device"),
    };
    store.device_insert(&device, &audit("device.create", 6)).await.unwrap();
    assert_eq!(
        store
            .devices_page(&Default::default(), None, 9)
            .await
            .unwrap()
            .items
            .len(),
        1
    );
}

async fn unconfirmed_rules_are_known_until_somebody_confirms_them(fixture: &Fixture) {
    let store = &fixture.store;
    let unconfirmed = async || {
        let check = store.rule_check(Uuid::nil()).await.unwrap();
        check.unconfirmed.iter().map(|rule| rule.id).collect::<Vec<_>>()
    };
    let audit = audit("rule.create", 1);
    let checked = |revision| Consent::Checked { revision };
    store.rule_insert(id(1), spec("1.*"), checked(0), &audit).await.unwrap();
    store
        .rule_insert(id(2), spec("2.*"), Consent::Given, &audit)
        .await
        .unwrap();
    assert_eq!(unconfirmed().await, [id(1)]);

    store
        .rule_update(id(1), 1, spec("1.1.*"), Consent::NotNeeded, &audit)
        .await
        .unwrap();
    assert_eq!(unconfirmed().await, [id(1)]);
    store
        .rule_update(id(1), 3, spec("1.2.*"), Consent::Given, &audit)
        .await
        .unwrap();
    assert_eq!(unconfirmed().await, []);
    store
        .rule_update(id(2), 2, spec("2.2.*"), checked(4), &audit)
        .await
        .unwrap();
    assert_eq!(unconfirmed().await, [id(2)]);

    fixture
        .db_run("UPDATE rules SET unconfirmed_at = unconfirmed_at - 3600000")
        .await;
    assert_eq!(unconfirmed().await, []);
}

async fn rule_that_was_checked_beside_older_ones_is_not_written(fixture: &Fixture) {
    let store = &fixture.store;
    let audit = audit("rule.create", 1);
    let seen = store.rule_check(Uuid::nil()).await.unwrap().revision;
    let checked = Consent::Checked { revision: seen };
    store.rule_insert(id(1), spec("1.*"), checked, &audit).await.unwrap();

    let late = store.rule_insert(id(2), spec("2.*"), checked, &audit).await;
    let change = store.rule_update(id(1), 1, spec("2.*"), checked, &audit).await;

    assert!(matches!(late, Err(StoreError::Outdated)), "{late:?}");
    assert!(matches!(change, Err(StoreError::Outdated)), "{change:?}");
    assert_eq!(store.rules_revision().await.unwrap(), 1);
}

async fn counts_of_other_runs_are_read_with_their_age(fixture: &Fixture) {
    let store = &fixture.store;
    let run = Uuid::from_u128;
    for (number, counts) in [(1, "a"), (2, "b"), (3, "c"), (1, "d")] {
        store.counts_write(run(number), "node", counts).await.unwrap();
    }
    let read = async || {
        let mut nodes = store.rule_check(run(3)).await.unwrap().nodes;
        nodes.sort_by(|a, b| a.counts.cmp(&b.counts));
        nodes
            .into_iter()
            .map(|node| (node.counts, node.is_live))
            .collect::<Vec<_>>()
    };

    assert_eq!(read().await, [("b".to_owned(), true), ("d".to_owned(), true)]);
    fixture
        .db_run("UPDATE device_counts SET at = at - 60000 WHERE counts = 'b'")
        .await;
    assert_eq!(read().await, [("b".to_owned(), false), ("d".to_owned(), true)]);
    fixture
        .db_run("UPDATE device_counts SET at = at - 86400000 WHERE counts = 'b'")
        .await;
    assert_eq!(read().await, [("d".to_owned(), true)]);
    store.counts_prune().await.unwrap();
    fixture
        .db_run("UPDATE device_counts SET at = at + 86400000 WHERE counts = 'b'")
        .await;
    assert_eq!(read().await, [("d".to_owned(), true)]);
}

async fn changes_and_audit_stand_together(fixture: &Fixture) {
    let store = &fixture.store;
    store
        .rule_insert(id(1), spec("1.*"), Consent::Given, &audit("rule.create", 1))
        .await
        .unwrap();
    store
        .rule_update(id(1), 1, spec("2.*"), Consent::Given, &audit("rule.update", 2))
        .await
        .unwrap();
    store.rule_delete(id(1), &audit("rule.delete", 3)).await.unwrap();

    let records = store.audit_page(None, 10).await.unwrap().items;

    let firmware = |side: &Option<serde_json::Value>| side.as_ref().map(|spec| spec["match"]["firmware"].clone());
    let [deleted, updated, created] = &records[..] else {
        panic!("{records:?}");
    };
    assert_eq!(
        (firmware(&created.before), firmware(&created.after)),
        (None, Some(json!("1.*")))
    );
    assert_eq!(
        (firmware(&updated.before), firmware(&updated.after)),
        (Some(json!("1.*")), Some(json!("2.*")))
    );
    assert_eq!(
        (firmware(&deleted.before), firmware(&deleted.after)),
        (Some(json!("2.*")), None)
    );
    assert!(records.iter().all(|record| record.subject == id(1).to_string()));

    // If the record cannot be written, the change is not made either.
    fixture.db_run("ALTER TABLE audit RENAME TO elsewhere").await;
    store
        .rule_insert(id(2), spec("2.*"), Consent::Given, &audit("rule.create", 4))
        .await
        .unwrap_err();
    assert_eq!(store.rules().await.unwrap().rules, []);
}

async fn writes_side_by_side_each_have_a_revision(fixture: &Fixture) {
    let writes = (1..=20).map(|number| {
        let store = fixture.store.clone();
        tokio::spawn(async move {
            store
                .rule_insert(id(number), spec("1.*"), Consent::Given, &audit("rule.create", 1))
                .await
                .unwrap()
                .revision
        })
    });

    let mut revisions = Vec::new();
    for write in writes.collect::<Vec<_>>() {
        revisions.push(write.await.unwrap());
    }

    revisions.sort_unstable();
    assert_eq!(revisions, (1..=20).collect::<Vec<_>>());
}

fn late(number: u128, rule: u128, before: Option<&str>, after: Option<&str>) -> LocalWrite {
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

const ARRIVED: WallTime = WallTime::from_unix_ms(9);

async fn change_that_arrives_late_is_made_once_with_its_author_and_time(fixture: &Fixture) {
    let store = &fixture.store;
    let writes = [
        (late(11, 1, None, Some("1.*")), Settlement::Inserted),
        (late(12, 1, Some("1.*"), Some("2.*")), Settlement::Updated),
        (late(13, 1, Some("1.*"), Some("3.*")), Settlement::Split),
        (late(14, 1, Some("2.*"), None), Settlement::Deleted),
        (late(15, 13, Some("1.*"), None), Settlement::Kept),
    ];

    for (at, (write, settlement)) in (1..).zip(&writes) {
        let settled = store.rule_settle(&[write], Seen::default(), ARRIVED).await.unwrap();
        let expected = Settled {
            settlement: *settlement,
            revision: at,
        };
        assert_eq!(settled, expected);
    }
    for (write, _) in &writes {
        let settled = store.rule_settle(&[write], Seen::default(), ARRIVED).await.unwrap();
        let expected = Settled {
            settlement: Settlement::Unchanged,
            revision: 5,
        };
        assert_eq!(settled, expected);
    }

    let stored = store.rules().await.unwrap();
    assert_eq!((stored.revision, stored.rules.len()), (5, 1));
    let rule = &stored.rules[0];
    assert_eq!(
        (rule.id, &rule.spec, rule.created_at),
        (id(13), &spec("3.*"), WallTime::from_unix_ms(7))
    );
    let mut records = store.audit_page(None, 10).await.unwrap().items;
    records.reverse();
    let actions: Vec<_> = records.iter().map(|record| record.action.as_str()).collect();
    assert_eq!(
        actions,
        [
            "rule.create",
            "rule.update",
            "rule.conflict",
            "rule.delete",
            "rule.conflict"
        ]
    );
    for record in &records {
        let when = (record.at, record.arrived_at);
        assert_eq!(
            (record.actor.as_str(), when),
            ("ada", (WallTime::from_unix_ms(7), Some(ARRIVED)))
        );
    }
    let conflict = records[2].after.as_ref().unwrap();
    assert_eq!(conflict["outcome"], "split");
    assert_eq!(conflict["rule"], id(13).to_string());
    assert_eq!(records[3].before.as_ref().unwrap()["match"]["firmware"], "2.*");
    let check = store.rule_check(Uuid::nil()).await.unwrap();
    assert_eq!(check.unconfirmed.len(), 1, "no author confirmed it");
}

async fn change_whose_outcome_was_not_known_is_made_once(fixture: &Fixture) {
    let store = &fixture.store;
    let made = audit("rule.create", 1);
    store
        .rule_insert(id(1), spec("1.*"), Consent::Given, &made)
        .await
        .unwrap();
    let other = audit("rule.delete", 2);
    store.rule_delete(id(1), &other).await.unwrap();

    // This node had no answer, and kept the change.
    let mut again = late(0, 1, None, Some("1.*"));
    again.id = made.id;
    let settled = store.rule_settle(&[&again], Seen::default(), ARRIVED).await.unwrap();

    assert_eq!(settled.settlement, Settlement::Unchanged);
    assert_eq!(store.rules().await.unwrap().rules, []);
    let records = store.audit_page(None, 10).await.unwrap().items;
    assert_eq!(records.len(), 2);
    assert!(records.iter().all(|record| record.arrived_at.is_none()));
}

async fn late_deletion_of_a_missing_rule_is_told_to_every_node(fixture: &Fixture) {
    let settled = fixture
        .store
        .rule_settle(&[&late(11, 1, Some("1.*"), None)], Seen::default(), ARRIVED)
        .await
        .unwrap();

    assert_eq!(settled.settlement, Settlement::Deleted);
    assert_eq!(fixture.store.rules().await.unwrap().released, [id(1)]);
}

async fn chain_that_arrives_late_is_one_change_with_a_record_for_each(fixture: &Fixture) {
    let store = &fixture.store;
    let withdrawn = [late(11, 1, None, Some("1.*")), late(12, 1, Some("1.*"), None)];
    let made = [
        late(13, 2, None, Some("1.*")),
        late(14, 2, Some("1.*"), Some("2.*")),
        late(15, 2, Some("2.*"), Some("3.*")),
    ];

    // The database has the first change: this node had no answer.
    let first = store.rule_settle(&[&made[0]], Seen::default(), ARRIVED).await.unwrap();
    let chain: Vec<&LocalWrite> = withdrawn.iter().collect();
    let nothing = store.rule_settle(&chain, Seen::default(), ARRIVED).await.unwrap();
    let chain: Vec<&LocalWrite> = made.iter().collect();
    let outdated = Seen {
        checked: Some(1),
        ..Seen::default()
    };
    assert!(matches!(
        store.rule_settle(&chain, outdated, ARRIVED).await,
        Err(StoreError::Outdated)
    ));
    let checked = Seen {
        checked: Some(2),
        ..Seen::default()
    };
    let last = store.rule_settle(&chain, checked, ARRIVED).await.unwrap();
    let again = store.rule_settle(&chain, Seen::default(), ARRIVED).await.unwrap();

    let settlements = [first, nothing, last, again].map(|settled| (settled.settlement, settled.revision));
    let expected = [
        (Settlement::Inserted, 1),
        (Settlement::Unchanged, 2),
        (Settlement::Updated, 3),
        (Settlement::Unchanged, 3),
    ];
    assert_eq!(settlements, expected);
    let stored = store.rules().await.unwrap();
    let rules: Vec<_> = stored.rules.iter().map(|rule| (rule.id, &rule.spec)).collect();
    assert_eq!(rules, [(id(2), &spec("3.*"))]);
    let mut records = store.audit_page(None, 10).await.unwrap().items;
    records.reverse();
    let firmware = |form: &Option<serde_json::Value>| Some(form.as_ref()?["match"]["firmware"].as_str()?.to_owned());
    let told: Vec<_> = records
        .iter()
        .inspect(|record| assert_eq!((record.actor.as_str(), record.arrived_at), ("ada", Some(ARRIVED))))
        .map(|record| {
            (
                record.action.as_str(),
                firmware(&record.before),
                firmware(&record.after),
            )
        })
        .collect();
    let form = |text: &str| Some(text.to_owned());
    let expected = [
        ("rule.create", None, form("1.*")),
        ("rule.create", None, form("1.*")),
        ("rule.delete", form("1.*"), None),
        ("rule.update", form("1.*"), form("2.*")),
        ("rule.update", form("2.*"), form("3.*")),
    ];
    assert_eq!(told, expected);
}

/// On PostgreSQL only: SQLite has one writer, and reads do not delay it.
#[tokio::test]
async fn rule_is_written_while_every_ops_connection_is_busy() {
    const OPS_CONNECTIONS: i64 = 4;
    let fixture = Fixture::postgres().await;
    fixture.db_fill(1).await;
    fixture
        .db_run(
            "ALTER TABLE devices RENAME TO stored; CREATE VIEW devices AS SELECT stored.* FROM stored, pg_sleep(30)",
        )
        .await;
    let busy = (0..8).map(|_| {
        let store = fixture.store.clone();
        tokio::spawn(async move { store.devices_page(&Default::default(), None, 1).await })
    });
    let busy: Vec<_> = busy.collect();
    let outside = Mutex::new(PgConnection::connect(fixture.url.expose()).await.unwrap());
    eventually_async(async || sleeping(&mut *outside.lock().await).await == OPS_CONNECTIONS).await;

    let started = Instant::now();
    fixture
        .store
        .rule_insert(id(1), spec("1.*"), Consent::Given, &audit("rule.create", 1))
        .await
        .unwrap();

    assert!(started.elapsed() < Duration::from_secs(1));
    for call in busy {
        assert!(call.await.unwrap().is_err());
    }
}

/// Connections to the database whose statement sleeps.
async fn sleeping(connection: &mut PgConnection) -> i64 {
    let statement =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'";
    sqlx::query_scalar(statement).fetch_one(connection).await.unwrap()
}
