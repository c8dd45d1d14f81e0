//! Changes of rules while the database is away.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use seawall_gateway::{
    runtime::config::DatabaseUrl,
    store::{Consent, NewDevice, Store},
};
use seawall_proto::{
    id::{DeviceId, RuleId, SecretHash},
    rules::RuleSpec,
};
use serde_json::{Value, json};
use sqlx::Connection as _;
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::rig::{Answer, Gateway, text};
use crate::harness::{
    devices::{attempt, audit, device},
    pg::Cluster,
};

/// Name of the admin token in the audit log.
const ADMIN: &str = "admin.token";
/// Maximum time of the answer to another change.
const RECORD_MAX: Duration = Duration::from_millis(1_200);
/// Maximum time of the answer to a change of a rule.
const ANSWER_MAX: Duration = Duration::from_secs(2);

fn rule(firmware: &str) -> Value {
    json!({"match": {"firmware": firmware}, "effect": "block", "reason": firmware})
}

fn cluster() -> (Runtime, Cluster, DatabaseUrl) {
    let outside = Runtime::new().unwrap();
    let cluster = Cluster::start().unwrap();
    let url = outside.block_on(cluster.database()).unwrap();
    (outside, cluster, url)
}

fn started_on(url: &DatabaseUrl) -> Gateway {
    let gateway = Gateway::start_on(Some(url), "");
    gateway.eventually(|| gateway.state().readiness().ready);
    gateway
}

/// A change, answered in time.
fn timed(change: impl FnOnce() -> Answer) -> Answer {
    let begun = Instant::now();
    let answer = change();
    assert!(begun.elapsed() < ANSWER_MAX, "{:?}: {answer:?}", begun.elapsed());
    answer
}

#[track_caller]
fn assert_local(answer: &Answer) {
    assert_eq!(
        (answer.status, &answer.json()["state"]),
        (202, &json!("local")),
        "{answer:?}"
    );
}

/// Firmware and state of each rule, sorted.
fn listed(gateway: &Gateway) -> Vec<(String, String)> {
    let mut rules: Vec<_> = gateway
        .all("/api/v1/rules?", 100)
        .iter()
        .map(|rule| (text(&rule["match"]["firmware"]), text(&rule["state"])))
        .collect();
    rules.sort();
    rules
}

fn said(rules: &[(&str, &str)]) -> Vec<(String, String)> {
    rules.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
}

/// Actions of the audit log about rules, oldest first, each with whether it arrived late.
fn audited(gateway: &Gateway) -> Vec<(String, bool)> {
    let mut records: Vec<_> = gateway
        .all("/api/v1/audit?", 100)
        .iter()
        .filter(|record| text(&record["action"]).starts_with("rule."))
        .inspect(|record| assert_eq!(record["actor"], ADMIN, "{record}"))
        .map(|record| (text(&record["action"]), record["arrived_at"].is_string()))
        .collect();
    records.reverse();
    records
}

/// Asserts that a rule refuses a device with this firmware.
#[track_caller]
fn assert_refused(gateway: &Gateway, firmware: &str) {
    let attempt = gateway.block_on(attempt(gateway.device_address(), device(0).firmware(firmware)));
    attempt.refused_with(403, "firmware_blocked");
}

fn await_moved(gateway: &Gateway) {
    gateway.eventually(|| gateway.state().rules.local().writes.is_empty());
}

fn journal(gateway: &Gateway) -> PathBuf {
    gateway.data_dir.join("rules-journal.jsonl")
}

#[test]
fn changes_while_postgresql_is_frozen_are_in_force_here_and_move_when_it_is_back() {
    let (outside, cluster, url) = cluster();
    let gateway = started_on(&url);
    let changed = text(&gateway.post("/api/v1/rules", rule("=1")).json()["id"]);
    let removed = text(&gateway.post("/api/v1/rules", rule("=2")).json()["id"]);

    cluster.freeze().unwrap();
    // The gateway does not know yet that it is frozen.
    let made = timed(|| gateway.post("/api/v1/rules", rule("=3")));
    assert_local(&made);
    let made = text(&made.json()["id"]);
    let changed = format!("/api/v1/rules/{changed}");
    assert_local(&timed(|| gateway.patch(&changed, json!({"match": {"firmware": "=4"}}))));
    assert_local(&timed(|| gateway.delete(&format!("/api/v1/rules/{removed}"))));
    assert_local(&timed(|| {
        gateway.patch(&format!("/api/v1/rules/{made}"), json!({"evict": true}))
    }));

    assert_eq!(listed(&gateway), said(&[("=3", "local"), ("=4", "local")]));
    assert_eq!(gateway.get(&changed).json()["state"], "local");
    assert_refused(&gateway, "3");
    assert_refused(&gateway, "4");
    for firmware in ["1", "2"] {
        let attempt = gateway.block_on(attempt(gateway.device_address(), device(0).firmware(firmware)));
        attempt.refused_with(503, "registry_unavailable");
    }
    assert_eq!(gateway.get("/api/v1/node").json()["rules"]["local"], 4);
    gateway.eventually(|| gateway.metric("seawall_rules_local") == 4);
    let mut same = rule("=3");
    same["evict"] = json!(true);
    assert_eq!(gateway.post("/api/v1/rules", same).problem(), (409, "conflict".into()));
    // Other changes need the database.
    assert_eq!(gateway.post("/api/v1/devices", json!({})).status, 503);
    gateway.eventually(|| {
        let alarms = gateway.get("/api/v1/alarms").json();
        let alarms = alarms["items"].as_array().unwrap();
        let local = alarms.iter().find(|alarm| alarm["kind"] == "rules_local");
        local.is_some_and(|alarm| text(&alarm["detail"]).starts_with("4 changes of rules wait"))
    });
    assert!(gateway.state().readiness().reasons.contains(&"rules_local"));
    cluster.thaw().unwrap();

    await_moved(&gateway);
    assert!(!journal(&gateway).exists());
    assert_eq!(listed(&gateway), said(&[("=3", "enforced"), ("=4", "enforced")]));
    let expected = [
        ("rule.create", false),
        ("rule.create", false),
        ("rule.create", true),
        ("rule.update", true),
        ("rule.update", true),
        ("rule.delete", true),
    ];
    let expected = expected.map(|(action, is_late)| (action.to_owned(), is_late));
    assert_eq!(audited(&gateway), expected);
    let stored = outside.block_on(async {
        let other_node = Store::open(&url).await.unwrap();
        other_node.ready().await;
        other_node.rules().await.unwrap()
    });
    assert_eq!((stored.rules.len(), stored.revision), (2, 5));
    gateway.eventually(|| gateway.state().readiness().reasons.is_empty());
    assert_eq!(gateway.post("/api/v1/rules", rule("=5")).status, 201);
}

#[test]
fn changes_survive_a_restart_without_the_database_and_a_journal_that_comes_again_changes_nothing() {
    let (_outside, cluster, url) = cluster();
    let gateway = started_on(&url);
    let changed = text(&gateway.post("/api/v1/rules", rule("=1")).json()["id"]);
    gateway
        .eventually(|| fs::read_to_string(gateway.data_dir.join("rules.json")).is_ok_and(|kept| kept.contains("=1")));
    cluster.kill().unwrap();
    assert_local(&gateway.post("/api/v1/rules", rule("=2")));
    assert_local(&gateway.patch(
        &format!("/api/v1/rules/{changed}"),
        json!({"match": {"firmware": "=3"}}),
    ));

    let gateway = gateway.restart_on(Some(&url), || ());

    assert_refused(&gateway, "2");
    assert_refused(&gateway, "3");
    assert_eq!(listed(&gateway), said(&[("=2", "local"), ("=3", "local")]));
    let file = journal(&gateway);
    let kept = fs::read(&file).unwrap();
    // The power fails while one more change is written.
    let gateway = gateway.restart_on(Some(&url), || {
        fs::write(&file, [&kept[..], b"0123456789abcdef {"].concat()).unwrap()
    });
    assert_eq!(listed(&gateway), said(&[("=2", "local"), ("=3", "local")]));
    assert_local(&gateway.post("/api/v1/rules", rule("=4")));
    let kept = fs::read(&file).unwrap();
    cluster.restart().unwrap();
    await_moved(&gateway);

    let in_database = said(&[("=2", "enforced"), ("=3", "enforced"), ("=4", "enforced")]);
    assert_eq!(listed(&gateway), in_database);
    let records = audited(&gateway);
    assert_eq!(records.len(), 4, "{records:?}");
    // As after a crash between the commit and the update of the journal.
    let gateway = gateway.restart_on(Some(&url), || fs::write(&file, kept).unwrap());
    await_moved(&gateway);

    assert_eq!(listed(&gateway), in_database);
    assert_eq!(audited(&gateway), records);
    assert!(!file.exists());
}

#[test]
fn rule_that_others_changed_or_deleted_meanwhile_stays_strict_and_somebody_is_told() {
    let (outside, cluster, url) = cluster();
    let gateway = started_on(&url);
    let id = |answer: Answer| text(&answer.json()["id"]);
    let [changed, deleted, kept] = ["=1", "=2", "=3"].map(|firmware| id(gateway.post("/api/v1/rules", rule(firmware))));
    cluster.kill().unwrap();
    let path = |id: &str| format!("/api/v1/rules/{id}");
    assert_local(&gateway.patch(&path(&changed), json!({"match": {"firmware": "=11"}})));
    assert_local(&gateway.patch(&path(&deleted), json!({"match": {"firmware": "=12"}})));
    assert_local(&gateway.delete(&path(&kept)));

    let gateway = gateway.restart_on(Some(&url), || {
        cluster.restart().unwrap();
        outside.block_on(change_elsewhere(&url, [&changed, &deleted, &kept]));
    });
    await_moved(&gateway);

    let expected = [
        ("=11", "enforced"),
        ("=12", "enforced"),
        ("=21", "enforced"),
        ("=23", "enforced"),
    ];
    assert_eq!(listed(&gateway), said(&expected));
    assert_eq!(text(&gateway.get(&path(&changed)).json()["match"]["firmware"]), "=21");
    let records = gateway.all("/api/v1/audit?", 100);
    let mut outcomes: Vec<String> = records
        .iter()
        .filter(|record| record["action"] == "rule.conflict")
        .inspect(|record| assert!(record["actor"] == ADMIN && record["arrived_at"].is_string(), "{record}"))
        .map(|record| text(&record["after"]["outcome"]))
        .collect();
    outcomes.sort();
    assert_eq!(outcomes, ["kept", "restored", "split"]);
    let alarms = gateway.get("/api/v1/alarms").json();
    let kinds: Vec<_> = alarms["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|alarm| text(&alarm["kind"]))
        .collect();
    assert!(kinds.contains(&"rules_conflict".to_owned()), "{alarms}");
}

/// Changes the first and the third rule to other versions, and deletes the second, as another node would.
async fn change_elsewhere(url: &DatabaseUrl, rules: [&str; 3]) {
    let store = Store::open(url).await.unwrap();
    store.ready().await;
    let stored = store.rules().await.unwrap().rules;
    let [changed, deleted, kept] = rules.map(|rule| RuleId(rule.parse().unwrap()));
    for (id, firmware) in [(changed, "=21"), (kept, "=23")] {
        let rule = stored.iter().find(|rule| rule.id == id).unwrap();
        let mut spec: RuleSpec = rule.spec.clone();
        spec.matches.firmware = Some(firmware.parse().unwrap());
        let by = audit("rule.update");
        let written = store.rule_update(id, rule.revision, spec, Consent::Given, &by).await;
        assert!(written.unwrap().is_some());
    }
    assert!(
        store
            .rule_delete(deleted, &audit("rule.delete"))
            .await
            .unwrap()
            .is_some()
    );
}

#[test]
fn staged_change_without_the_database_is_refused_at_once() {
    let (_outside, cluster, url) = cluster();
    let gateway = started_on(&url);
    let made = gateway.post("/api/v1/rules", rule("2.*"));
    let id = text(&made.json()["id"]);
    cluster.kill().unwrap();
    gateway.eventually(|| gateway.state().store.is_away());

    let mut staged = rule("3.*");
    staged["rollout"] = json!({});
    for answer in [
        timed(|| gateway.post(&format!("/api/v1/rules/{id}/release"), json!({}))),
        timed(|| gateway.patch(&format!("/api/v1/rules/{id}/rollout"), json!({"state": "paused"}))),
        timed(|| gateway.post("/api/v1/rules", staged)),
    ] {
        let (status, detail) = answer.problem();
        assert_eq!(status, 503, "{detail}");
        assert!(
            answer.json()["detail"].as_str().unwrap().contains("staged change"),
            "{detail}"
        );
    }
    assert_eq!(listed(&gateway), said(&[("2.*", "enforced")]));
}

#[test]
fn drain_and_disconnect_without_the_database_are_answered_at_once_and_recorded_later() {
    let (_outside, cluster, url) = cluster();
    let gateway = started_on(&url);
    cluster.freeze().unwrap();
    for action in ["start", "cancel", "start", "cancel"] {
        let begun = Instant::now();
        let answer = match action {
            "start" => gateway.post("/api/v1/drain", json!({"deadline": "1h", "rate_per_second": 0.001})),
            _ => gateway.delete("/api/v1/drain"),
        };
        assert!(matches!(answer.status, 200 | 201), "{answer:?}");
        assert!(begun.elapsed() < RECORD_MAX, "{:?}", begun.elapsed());
    }
    let outcomes = ["stored", "kept", "lost"];
    let counted = outcomes.map(|of| gateway.metric(&format!("seawall_audit_records_total{{outcome=\"{of}\"")));
    assert_eq!(counted, [0, 4, 0], "{outcomes:?}");
    let file = journal(&gateway).with_file_name("audit-journal.jsonl");
    assert!(file.exists());

    cluster.thaw().unwrap();

    gateway.eventually(|| !file.exists());
    let records = gateway.all("/api/v1/audit?", 100);
    let drains = records
        .iter()
        .filter(|record| text(&record["action"]).starts_with("drain."));
    let drains: Vec<_> = drains
        .map(|record| (text(&record["action"]), record["arrived_at"].is_string()))
        .collect();
    let expected = ["cancel", "start", "cancel", "start"].map(|action| (format!("drain.{action}"), true));
    assert_eq!(drains, expected);
}

#[test]
fn change_while_another_process_holds_the_lock_of_sqlite_waits_in_the_journal() {
    let gateway = Gateway::start();
    let outside = Runtime::new().unwrap();
    let path = format!("sqlite:{}", gateway.data_dir.join("seawall.db").display());
    let mut locker = outside.block_on(sqlx::SqliteConnection::connect(&path)).unwrap();
    let mut run = |sql: &'static str| {
        outside.block_on(async { sqlx::raw_sql(sql).execute(&mut locker).await.unwrap() });
    };
    run("BEGIN IMMEDIATE");

    assert_local(&timed(|| gateway.post("/api/v1/rules", rule("=1"))));
    assert_eq!(listed(&gateway), said(&[("=1", "local")]));
    run("ROLLBACK");
    await_moved(&gateway);

    assert_eq!(listed(&gateway), said(&[("=1", "enforced")]));
    assert_eq!(audited(&gateway), [("rule.create".to_owned(), true)]);
}

#[test]
fn change_that_neither_the_database_nor_the_journal_can_take_changes_nothing() {
    let (_outside, cluster, url) = cluster();
    let gateway = started_on(&url);
    cluster.kill().unwrap();
    // Blocks the name of the file.
    fs::create_dir(journal(&gateway)).unwrap();

    let refused = timed(|| gateway.post("/api/v1/rules", rule("=1")));

    assert_eq!(refused.problem(), (503, "database_unavailable".into()));
    assert!(
        refused.text.contains("nothing was changed") && refused.text.contains("rules-journal"),
        "{refused:?}"
    );
    assert_eq!(listed(&gateway), said(&[]));
    fs::remove_dir(journal(&gateway)).unwrap();
    assert_local(&gateway.post("/api/v1/rules", rule("=1")));
}

#[test]
fn rule_that_refuses_many_devices_of_this_node_must_be_confirmed_without_the_database_too() {
    let (_outside, cluster, url) = cluster();
    let gateway = started_on(&url);
    let firmware = ["Seawall-Firmware: 7.1"];
    let devices: Vec<_> = (0..20).map(|_| gateway.connected(&firmware)).collect();
    cluster.kill().unwrap();

    let asked = timed(|| gateway.post("/api/v1/rules", rule("7.*")));
    assert_eq!(asked.problem(), (409, "needs_confirmation".into()));
    assert_eq!(asked.json()["preview"]["connected"], 20);
    let mut confirmed = rule("7.*");
    confirmed["confirm"] = json!(true);
    assert_local(&gateway.post("/api/v1/rules", confirmed));
    drop(devices);
}

#[test]
fn unconfirmed_rule_whose_effect_on_the_cluster_is_not_known_stays_local_until_it_is_confirmed() {
    let (outside, cluster, url) = cluster();
    let gateway = started_on(&url);
    cluster.kill().unwrap();
    let held = gateway.post("/api/v1/rules", rule("7.*"));
    assert_local(&held);
    let held = format!("/api/v1/rules/{}", text(&held.json()["id"]));
    let mut confirmed = rule("=1");
    confirmed["confirm"] = json!(true);
    assert_local(&gateway.post("/api/v1/rules", confirmed));

    // No node has seen any of these devices.
    let gateway = gateway.restart_on(Some(&url), || {
        cluster.restart().unwrap();
        outside.block_on(register_elsewhere(&url, 30));
    });
    let detail = || {
        let alarms = gateway.get("/api/v1/alarms").json();
        let alarms = alarms["items"].as_array().unwrap();
        let local = alarms.iter().find(|alarm| alarm["kind"] == "rules_local");
        local.map(|alarm| text(&alarm["detail"])).unwrap_or_default()
    };
    gateway.eventually(|| detail().contains("1 rules need a confirmation first"));
    gateway.eventually(|| listed(&gateway) == said(&[("7.*", "local"), ("=1", "enforced")]));
    assert_refused(&gateway, "7.2");
    assert_eq!(audited(&gateway), [("rule.create".to_owned(), true)]);

    assert_local(&gateway.patch(&held, json!({"reason": "sure", "confirm": true})));
    await_moved(&gateway);

    assert_eq!(listed(&gateway), said(&[("7.*", "enforced"), ("=1", "enforced")]));
}

async fn register_elsewhere(url: &DatabaseUrl, count: u128) {
    let store = Store::open(url).await.unwrap();
    store.ready().await;
    for number in 1..=count {
        let new = NewDevice {
            id: DeviceId::from_uuid(Uuid::from_u128(number)),
            external_id: None,
            tenant: None,
            model: None,
            secret: SecretHash::from_bytes([7; 32]),
        };
        store.device_insert(&new, &audit("device.create")).await.unwrap();
    }
}

#[test]
fn rule_that_its_author_withdrew_reaches_no_other_node() {
    let (outside, cluster, url) = cluster();
    let gateway = started_on(&url);
    let changed = text(&gateway.post("/api/v1/rules", rule("=1")).json()["id"]);
    let path = format!("/api/v1/rules/{changed}");
    cluster.kill().unwrap();
    assert_local(&gateway.patch(&path, json!({"match": {"firmware": "=2"}})));
    assert_local(&gateway.patch(&path, json!({"match": {"firmware": "=1"}})));
    let made = gateway.post("/api/v1/rules", rule("=3"));
    assert_local(&made);
    assert_local(&gateway.delete(&format!("/api/v1/rules/{}", text(&made.json()["id"]))));

    let gateway = gateway.restart_on(Some(&url), || {
        cluster.restart().unwrap();
        outside.block_on(async {
            let store = Store::open(&url).await.unwrap();
            store.ready().await;
            let stored = store.rules().await.unwrap().rules.remove(0);
            let mut spec = stored.spec;
            spec.matches.firmware = Some("=9".parse().unwrap());
            let by = audit("rule.update");
            let written = store
                .rule_update(stored.id, stored.revision, spec, Consent::Given, &by)
                .await;
            assert!(written.unwrap().is_some());
        });
    });
    await_moved(&gateway);

    assert_eq!(listed(&gateway), said(&[("=9", "enforced")]));
    let records = gateway.all("/api/v1/audit?", 100);
    let late = records.iter().filter(|record| record["arrived_at"].is_string());
    let mut late: Vec<String> = late.map(|record| text(&record["action"])).collect();
    late.sort();
    assert_eq!(late, ["rule.create", "rule.delete", "rule.update", "rule.update"]);
}
