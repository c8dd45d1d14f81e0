//! Firmware rules, from their creation to their enforcement.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use seawall_gateway::store::{Audit, Consent};
use seawall_proto::id::RuleId;
use serde_json::{Value, json};

use super::rig::{Gateway, V1, text};
use crate::harness::{
    devices::{attempt, device, persist_all, register},
    pg,
    raw::{ask, request},
};

#[test]
fn a_rule_is_made_changed_and_removed() {
    let gateway = Gateway::start();
    let asked =
        json!({"match": {"firmware": ">=3.8.0-b3"}, "effect": "block", "reason": "boot loop", "retry_after": "30m"});

    let created = gateway.post("/api/v1/rules", asked);

    assert_eq!(created.status, 201, "{created:?}");
    let rule = created.json();
    let path = format!("/api/v1/rules/{}", text(&rule["id"]));
    assert_eq!(created.header("location"), path);
    assert_eq!(rule["match"], json!({"firmware": ">=3.8.0-b3"}));
    assert_eq!(
        (&rule["effect"], &rule["mode"], &rule["admit_percent"]),
        (&json!("block"), &json!("enforce"), &json!(0))
    );
    assert_eq!(
        (&rule["retry_after"], &rule["evict"], &rule["revision"]),
        (&json!("30m"), &json!(false), &json!(1))
    );
    assert_eq!(without_hits(gateway.get(&path).json()), without_hits(rule.clone()));

    let changed = gateway
        .patch(
            &path,
            json!({"reason": "fixed in 3.8.1", "expires_at": "2099-01-01T00:00:00Z"}),
        )
        .json();
    assert_eq!(
        (&changed["reason"], &changed["expires_at"]),
        (&json!("fixed in 3.8.1"), &json!("2099-01-01T00:00:00Z"))
    );
    assert_eq!((&changed["match"], &changed["revision"]), (&rule["match"], &json!(2)));
    assert_eq!(without_hits(gateway.get(&path).json()), without_hits(changed));

    assert_eq!(gateway.delete(&path).status, 204);
    assert_eq!(gateway.get(&path).problem(), (404, "not_found".into()));
    assert_eq!(gateway.delete(&path).problem(), (404, "not_found".into()));
    assert_eq!(
        gateway.patch(&path, json!({"evict": true})).problem(),
        (404, "not_found".into())
    );
    assert_eq!(gateway.get("/api/v1/node").json()["rules"]["revision"], 3);
}

#[test]
fn condition_of_a_write_is_checked_with_the_stored_revision_and_not_with_what_this_node_has_read() {
    let gateway = Gateway::start();
    let store = &gateway.state().store;
    let by = |action| Audit {
        id: uuid::Uuid::now_v7(),
        at: gateway.state().clock.wall(),
        actor: "another node".into(),
        action,
    };
    for method in ["PATCH", "DELETE"] {
        let asked = json!({"match": {"firmware": "=9"}, "effect": "block"});
        let path = gateway.post("/api/v1/rules", asked).header("location").to_owned();
        let id = RuleId(path.rsplit('/').next().unwrap().parse().unwrap());
        let write = |revision: &str| {
            let bearer = format!("Bearer {}", gateway.admin);
            let headers = [
                ("authorization", bearer.as_str()),
                ("content-type", "application/json"),
                ("if-match", revision),
            ];
            let body = if method == "PATCH" { "{\"reason\": \"x\"}" } else { "" };
            gateway.raw(method, &path, &headers, body)
        };
        let seen = gateway.get(&path).json()["revision"].as_u64().unwrap();
        let read = gateway.state().rules.current();
        let spec = read.get(id).unwrap().spec.clone();
        // Another node changes it, and this one has not read that yet.
        let by = by("rule.update");
        let changed = store.rule_update(id, seen, spec, Consent::Given, &by);
        let changed = gateway.block_on(changed).unwrap().unwrap().revision;

        let refused = write(&format!("\"{seen}\""));

        assert_eq!(refused.problem(), (412, "precondition_failed".into()), "{method}");
        let detail = text(&refused.json()["detail"]);
        assert!(detail.contains(&format!("\"{changed}\"")), "{detail}");
        gateway.eventually(|| gateway.get(&path).json()["revision"] == json!(changed));
        assert!(write(&format!("\"{seen}\", \"{changed}\"")).status < 300, "{method}");
    }
}

#[test]
fn rules_that_say_something_wrong_are_refused_by_field() {
    let gateway = Gateway::start();

    for (field, value) in [
        ("reason", json!("a\u{1b}[31mb")),
        ("reason", json!("line\nbreak")),
        ("reason", json!("x".repeat(257))),
        ("effect", json!("restrict")),
        ("rate_per_second", json!(5)),
        ("allow", json!(["camera 7"])),
        ("allow", json!([7])),
        ("allow", json!("00000000-0000-0000-0000-000000000001")),
        ("update", json!({"url": "https://example.com"})),
        ("update", json!("https://example.com")),
        ("effect", json!("explode")),
        ("mode", json!("sample")),
        ("admit_percent", json!(101)),
        ("retry_after", json!("soon")),
        ("retry_after", json!("0s")),
        ("expires_at", json!("tomorrow")),
        ("expires_at", json!("2020-01-01T00:00:00Z")),
        ("evict", json!("yes")),
        ("confirm", json!("yes")),
        ("colour", json!("red")),
        ("match", json!({"firmware": ">"})),
        ("match", json!({"firmware": ">=1\u{7}"})),
        ("match", json!({"model": "a\nb"})),
        ("match", json!({"colour": "red"})),
    ] {
        let mut rule = json!({"match": {"model": "m"}, "effect": "block"});
        rule[field] = value;
        for path in ["/api/v1/rules", "/api/v1/rules/preview"] {
            let answer = gateway.post(path, rule.clone());

            assert_eq!(answer.problem(), (422, "invalid".into()), "{rule}");
            let detail = text(&answer.json()["detail"]);
            assert!(
                !detail.contains(char::is_control) && detail.contains(field),
                "{answer:?}"
            );
        }
    }
    assert_eq!(gateway.all("/api/v1/rules?", 10).len(), 0);
}

#[test]
fn a_rule_is_not_changed_to_one_that_is_over() {
    let gateway = Gateway::start();
    let rule = gateway.post(
        "/api/v1/rules",
        json!({"match": {"model": "m"}, "effect": "block", "expires_at": "2099-01-01T00:00:00Z"}),
    );
    let path = format!("/api/v1/rules/{}", text(&rule.json()["id"]));

    let changed = gateway.patch(&path, json!({"expires_at": "2020-01-01T00:00:00Z"}));

    assert_eq!(changed.problem(), (422, "invalid".into()));
    let detail = changed.json()["detail"].clone();
    assert!(text(&detail).starts_with("expires_at: this time is over"), "{detail}");
    assert_eq!(without_hits(gateway.get(&path).json()), without_hits(rule.json()));
}

/// The rule without its hits.
fn without_hits(mut rule: Value) -> Value {
    rule.as_object_mut().unwrap().remove("hits").unwrap();
    rule
}

#[test]
fn a_rule_is_in_force_when_its_answer_is_there() {
    let gateway = Gateway::start();
    let (id, secret) = gateway.register(json!({}));
    let identity = format!("Seawall-Device: {id}\r\nAuthorization: Bearer {secret}");
    let bytes = request(&[&identity, "Seawall-Firmware: 3.8.0-b3"]);

    let rule = gateway.post(
        "/api/v1/rules",
        json!({"match": {"firmware": "3.8.*"}, "effect": "block", "reason": "bad"}),
    );
    let refused = gateway.block_on(ask(gateway.device_address(), bytes.as_bytes()));
    let removed = gateway.delete(&format!("/api/v1/rules/{}", text(&rule.json()["id"])));
    let admitted = gateway.block_on(ask(gateway.device_address(), bytes.as_bytes()));

    assert_eq!((refused.status, refused.code().as_str()), (403, "firmware_blocked"));
    assert_eq!(refused.problem()["rule"], rule.json()["id"]);
    assert_eq!((removed.status, admitted.status), (204, 101));
}

#[test]
fn a_rule_counts_what_it_refuses() {
    let gateway = Gateway::start();
    let (id, secret) = gateway.register(json!({}));
    let _device = gateway.connect(&id, &secret, &["Seawall-Firmware: 3.8.0-b3"]);
    let identity = format!("Seawall-Device: {id}\r\nAuthorization: Bearer {secret}");
    let bytes = request(&[&identity, "Seawall-Firmware: 3.8.0-b3"]);
    let rule = json!({"match": {"firmware": "3.8.*"}, "effect": "block"});
    let rule = text(&gateway.post("/api/v1/rules", rule).json()["id"]);

    for _ in 0..2 {
        assert_eq!(
            gateway.block_on(ask(gateway.device_address(), bytes.as_bytes())).status,
            403
        );
    }

    let path = format!("/api/v1/rules/{rule}");
    let hits = || gateway.get(&path).json()["hits"].clone();
    assert_eq!(
        hits(),
        json!({"refused": 2, "restricted": 0, "throttled": 0, "evicted": 0, "dry_run": 0, "connected": 1})
    );
    let metrics = gateway.raw("GET", "/metrics", &[], "").text;
    let line = format!("seawall_rule_hits_total{{rule=\"{rule}\",outcome=\"refused\"}} 2\n");
    assert!(metrics.contains(&line), "{metrics}");
    // A change keeps the counts.
    assert_eq!(gateway.patch(&path, json!({"reason": "b"})).status, 200);
    assert_eq!(hits()["refused"], 2);
}

#[test]
fn a_dry_run_counts_what_it_would_do_and_does_nothing_until_it_is_enforced() {
    let gateway = Gateway::start();
    let _devices: Vec<_> = (0..20)
        .map(|_| gateway.connected(&["Seawall-Firmware: 3.8"]).1)
        .collect();
    let (id, secret) = gateway.register(json!({}));
    let identity = format!("Seawall-Device: {id}\r\nAuthorization: Bearer {secret}");
    let bytes = request(&[&identity, "Seawall-Firmware: 3.8"]);
    let attempt = || gateway.block_on(ask(gateway.device_address(), bytes.as_bytes())).status;
    let rule = json!({"match": {"firmware": "3.8.*"}, "effect": "block", "mode": "dry_run", "evict": true});

    // It would refuse all of them, but needs no confirmation.
    let preview = gateway.post("/api/v1/rules/preview", rule.clone()).json();
    assert_eq!(
        (&preview["affected"], &preview["needs_confirmation"]),
        (&json!(20), &json!(false))
    );
    let made = gateway.post("/api/v1/rules", rule);
    assert_eq!((made.status, &made.json()["state"]), (201, &json!("dry_run")));
    let path = format!("/api/v1/rules/{}", text(&made.json()["id"]));
    assert_eq!([attempt(), attempt()], [101, 101]);
    let hits = gateway.get(&path).json()["hits"].clone();
    assert_eq!(
        (&hits["refused"], &hits["evicted"], &hits["dry_run"]),
        (&json!(0), &json!(0), &json!(2))
    );
    assert!(hits["connected"].as_u64() >= Some(20), "{hits}");
    let metrics = gateway.raw("GET", "/metrics", &[], "").text;
    let line = format!(
        "seawall_rule_hits_total{{rule={},outcome=\"dry_run\"}} 2\n",
        made.json()["id"]
    );
    assert!(metrics.contains(&line), "{metrics}");

    let enforce = |confirm: bool| gateway.patch(&path, json!({"mode": "enforce", "confirm": confirm}));
    assert_eq!(enforce(false).problem(), (409, "needs_confirmation".into()));
    assert_eq!(enforce(true).json()["state"], "enforced");
    assert_eq!(attempt(), 403);
    gateway.eventually(|| gateway.state().sessions.is_empty());
}

#[test]
fn the_list_of_allowed_devices_is_kept_in_one_form_and_checked() {
    let gateway = Gateway::start();
    let rule = |allow: Value| json!({"match": {"firmware": "=1"}, "effect": "block", "allow": allow});
    let (one, two) = (
        "00000000-0000-0000-0000-0000000000aa",
        "00000000-0000-0000-0000-0000000000bb",
    );

    let made = gateway.post(
        "/api/v1/rules",
        rule(json!([two, "000000000000000000000000000000AA", two])),
    );
    assert_eq!((made.status, &made.json()["allow"]), (201, &json!([one, two])));
    let path = format!("/api/v1/rules/{}", text(&made.json()["id"]));
    let changed = gateway.patch(&path, json!({"allow": []})).json();
    assert_eq!(changed.get("allow"), None);
    let many: Vec<_> = (0..1_001)
        .map(|number| uuid::Uuid::from_u128(number).to_string())
        .collect();
    let refused = gateway.patch(&path, json!({"allow": many}));
    assert_eq!(refused.problem(), (422, "invalid".into()));
    assert!(
        text(&refused.json()["detail"]).starts_with("allow: allow has 1001 devices"),
        "{refused:?}"
    );
}

#[test]
fn a_rule_needs_a_confirmation_by_the_share_that_it_refuses() {
    let gateway = Gateway::start();
    let _devices: Vec<_> = (0..20)
        .map(|number| gateway.connected(&[&format!("Seawall-Firmware: {}", 1 + number / 10)]))
        .collect();
    let rule =
        |admit_percent: u8| json!({"match": {"firmware": "=1"}, "effect": "block", "admit_percent": admit_percent});

    let preview = gateway.post("/api/v1/rules/preview", rule(45)).json();
    assert_eq!((&preview["connected"], &preview["affected"]), (&json!(10), &json!(6)));
    assert_eq!(gateway.post("/api/v1/rules", rule(25)).problem().0, 409);
    let made = gateway.post("/api/v1/rules", rule(45));
    assert_eq!((made.status, &made.json()["admit_percent"]), (201, &json!(45)));
    let path = format!("/api/v1/rules/{}", text(&made.json()["id"]));
    assert_eq!(gateway.patch(&path, json!({"admit_percent": 90})).status, 200);
    assert_eq!(
        gateway.patch(&path, json!({"admit_percent": 0})).problem(),
        (409, "needs_confirmation".into())
    );
    assert_eq!(gateway.get(&path).json()["admit_percent"], 90);
}

#[test]
fn a_stored_rule_that_this_version_can_not_enforce_refuses_nobody_and_raises_an_alarm() {
    let gateway = Gateway::start();
    let (_, mut device) = gateway.connected(&[V1, "Seawall-Firmware: 3.8"]);
    gateway.block_on(device.frame());
    let known = json!({"match": {"firmware": "=9"}, "effect": "block"});
    assert_eq!(gateway.post("/api/v1/rules", known).status, 201);
    let id = uuid::Uuid::from_u128(7);
    let spec = r#"{"match": {"firmware": ">=3"}, "effect": "throttle", "rate": 1.50, "evict": true}"#;

    gateway.block_on(insert_rule(&gateway, id, spec));
    gateway.eventually(|| !gateway.state().rules.current().unsupported().is_empty());

    let (other, secret) = gateway.register(json!({}));
    gateway.connect(&other, &secret, &["Seawall-Firmware: 3.8"]);
    gateway.block_on(device.text(r#"{"type":"message","id":"1","topic":"t","payload":1}"#));
    assert_eq!(gateway.block_on(device.frame()).text(), r#"{"type":"ack","id":"1"}"#);
    let path = format!("/api/v1/rules/{id}");
    let shown = gateway.get(&path).json();
    assert_eq!(
        (&shown["state"], &shown["effect"], &shown["rate"]),
        (&json!("unsupported"), &json!("throttle"), &json!(1.5))
    );
    assert!(shown["problem"].is_string(), "{shown}");
    assert_eq!(gateway.all("/api/v1/rules?", 10).len(), 2);
    assert_eq!(
        gateway.patch(&path, json!({"reason": "b"})).problem(),
        (409, "conflict".into())
    );
    let ready = gateway.raw("GET", "/readyz", &[], "");
    assert_eq!(
        (ready.status, ready.json()["reasons"].clone()),
        (200, json!(["rules_unsupported"]))
    );
    // Other writes continue, and the file keeps the rule as it was written.
    let more = json!({"match": {"firmware": "=8"}, "effect": "block"});
    assert_eq!(gateway.post("/api/v1/rules", more).status, 201);
    let file = gateway.data_dir.join("rules.json");
    gateway.eventually(|| {
        let kept = std::fs::read_to_string(&file).unwrap_or_default();
        kept.contains(spec) && kept.contains("=8")
    });
    assert_eq!(gateway.delete(&path).status, 204);
    gateway.eventually(|| gateway.state().readiness().reasons.is_empty());
}

#[test]
fn rule_whose_check_is_slow_wants_a_confirmation_and_can_be_written() {
    let outside = tokio::runtime::Runtime::new().unwrap();
    let url = outside.block_on(pg::shared().database()).unwrap();
    let gateway = Gateway::start_on(Some(&url), "");
    gateway.eventually(|| gateway.state().readiness().ready);
    let locker = outside.block_on(async {
        let mut locker = <sqlx::PgConnection as sqlx::Connection>::connect(url.expose())
            .await
            .unwrap();
        let lock = sqlx::raw_sql("BEGIN; LOCK TABLE device_counts IN ACCESS EXCLUSIVE MODE");
        lock.execute(&mut locker).await.unwrap();
        locker
    });
    let rule = |confirm: bool| json!({"match": {"firmware": "=8"}, "effect": "block", "confirm": confirm});

    let begun = Instant::now();
    let asked = gateway.post("/api/v1/rules", rule(false));
    let took = begun.elapsed();

    assert_eq!(asked.problem(), (409, "needs_confirmation".into()));
    assert!(asked.text.contains("can't be counted"), "{}", asked.text);
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert_eq!(gateway.post("/api/v1/rules", rule(true)).status, 201);
    drop(locker);
}

#[test]
fn rules_that_the_database_has_lost_stay_in_force_and_raise_an_alarm() {
    let gateway = Gateway::start();
    let rule = |firmware: &str| json!({"match": {"firmware": firmware}, "effect": "block"});
    let kept = text(&gateway.post("/api/v1/rules", rule("=8")).json()["id"]);
    let lost = text(&gateway.post("/api/v1/rules", rule("=9")).json()["id"]);
    let in_force = |id: &str| {
        let rules = gateway.state().rules.current();
        rules.rules().iter().any(|rule| rule.id.to_string() == id)
    };

    // Like a database that was restored from a backup.
    gateway.block_on(async {
        let mut database = database(&gateway).await;
        let restored = "DELETE FROM rules WHERE revision = 2; UPDATE meta SET value = '1' WHERE key = 'rules_revision'";
        sqlx::raw_sql(restored).execute(&mut database).await.unwrap();
    });
    gateway.eventually(|| gateway.state().readiness().reasons == ["rules_lost"]);

    assert!(in_force(&kept) && in_force(&lost));
    assert_eq!(gateway.get(&format!("/api/v1/rules/{lost}")).json()["state"], "lost");
    let again = gateway.post("/api/v1/rules", rule("=9"));
    assert_eq!((again.status, &again.json()["revision"]), (201, &json!(2)));
    assert!(in_force(&lost) && in_force(&text(&again.json()["id"])));
    assert_eq!(gateway.delete(&format!("/api/v1/rules/{lost}")).status, 204);
    gateway.eventually(|| gateway.state().readiness().reasons.is_empty());
    assert!(in_force(&kept) && in_force(&text(&again.json()["id"])) && !in_force(&lost));
}

#[test]
fn a_lost_rule_that_is_removed_is_removed_on_every_node_that_knows_it() {
    let outside = tokio::runtime::Runtime::new().unwrap();
    let database = outside.block_on(pg::shared().database()).unwrap();
    let (here, there) = (
        Gateway::start_on(Some(&database), ""),
        Gateway::start_on(Some(&database), ""),
    );
    here.eventually(|| here.state().readiness().ready && there.state().readiness().ready);
    let rule = json!({"match": {"firmware": "=9"}, "effect": "block"});
    let lost = text(&here.post("/api/v1/rules", rule).json()["id"]);
    let in_force = |gateway: &Gateway| !gateway.state().rules.current().rules().is_empty();
    there.eventually(|| in_force(&there));
    outside.block_on(async {
        let mut connection = <sqlx::PgConnection as sqlx::Connection>::connect(database.expose())
            .await
            .unwrap();
        let restored = "BEGIN; DELETE FROM rules; UPDATE meta SET value = '0' WHERE key = 'rules_revision'; COMMIT";
        sqlx::raw_sql(restored).execute(&mut connection).await.unwrap();
    });
    let reasons = |gateway: &Gateway| gateway.state().readiness().reasons;
    here.eventually(|| reasons(&here) == ["rules_lost"] && reasons(&there) == ["rules_lost"]);

    assert_eq!(here.delete(&format!("/api/v1/rules/{lost}")).status, 204);

    there.eventually(|| !in_force(&there) && reasons(&there).is_empty());
    assert!(!in_force(&here));
    here.eventually(|| reasons(&here).is_empty());
    assert_eq!(here.delete(&format!("/api/v1/rules/{lost}")).status, 404);
    let record = &here.get("/api/v1/audit?limit=1").json()["items"][0];
    assert_eq!(
        (&record["action"], &record["before"]["match"]["firmware"]),
        (&json!("rule.delete"), &json!("=9"))
    );
}

async fn database(gateway: &Gateway) -> sqlx::SqliteConnection {
    let path = gateway.data_dir.join("seawall.db");
    let url = format!("sqlite:{}", path.display());
    <sqlx::SqliteConnection as sqlx::Connection>::connect(&url)
        .await
        .unwrap()
}

/// Stores a rule like a node of another version.
async fn insert_rule(gateway: &Gateway, id: uuid::Uuid, spec: &str) {
    let mut database = database(gateway).await;
    let next = "UPDATE meta SET value = CAST(CAST(value AS BIGINT) + 1 AS TEXT) WHERE key = 'rules_revision'";
    sqlx::query("INSERT INTO rules (id, spec, created_at, revision) SELECT $1, $2, 1, value + 1 FROM meta WHERE key = 'rules_revision'")
        .bind(id)
        .bind(spec)
        .execute(&mut database)
        .await
        .unwrap();
    sqlx::query(next).execute(&mut database).await.unwrap();
}

#[test]
fn a_rule_with_evict_closes_the_sessions_that_it_matches() {
    let gateway = Gateway::start();
    let (_, mut blocked) = gateway.connected(&[V1, "Seawall-Firmware: 3.8.0-b3"]);
    let (_, mut other) = gateway.connected(&[V1, "Seawall-Firmware: 3.7"]);
    gateway.block_on(blocked.frame());
    gateway.block_on(other.frame());

    let rule = json!({"match": {"firmware": ">=3.8.0-b3"}, "effect": "block", "reason": "bad", "evict": true});
    let made = gateway.post("/api/v1/rules", rule);
    let closed = gateway.block_on(blocked.frame());

    assert_eq!(made.status, 201, "{made:?}");
    let (code, reason) = closed.close();
    let reason: serde_json::Value = serde_json::from_str(reason).unwrap();
    assert_eq!((code, &reason["reason"]), (4000, &json!("evicted")));
    // The rule is new: 30 s to twice that, plus the time that the test took.
    assert!(
        (30_000..=120_000).contains(&reason["retry_after_ms"].as_u64().unwrap()),
        "{reason}"
    );
    let path = format!("/api/v1/rules/{}", text(&made.json()["id"]));
    let hits = gateway.get(&path).json()["hits"].clone();
    assert_eq!(
        hits,
        json!({"refused": 0, "restricted": 0, "throttled": 0, "evicted": 1, "dry_run": 0, "connected": 0})
    );
    gateway.block_on(other.text(r#"{"type":"message","id":"1","topic":"t","payload":1}"#));
    assert_eq!(gateway.block_on(other.frame()).text(), r#"{"type":"ack","id":"1"}"#);
}

/// 160 sessions are closed at the least rate.
#[test]
fn an_eviction_shows_its_progress_and_is_cancelled_in_its_middle() {
    const RATE: f64 = 20.0;
    let gateway = Gateway::start();
    gateway.block_on(register(&gateway.state().store, 0..200));
    let bad = (0..160).map(|number| device(number).firmware("3.8.0-b3"));
    let good = (160..200).map(|number| device(number).firmware("3.8.0"));
    let sessions = persist_all(gateway.device_address(), bad.chain(good).collect::<Vec<_>>());
    let _sessions = gateway.block_on(sessions);
    let rule = json!({"match": {"firmware": "=3.8.0-b3"}, "effect": "block", "evict": true, "confirm": true});
    let id = text(&gateway.post("/api/v1/rules", rule).json()["id"]);
    let path = format!("/api/v1/rules/{id}/eviction");
    let read = || (Instant::now(), gateway.get(&path).json());
    let evicted = |view: &Value| view["evicted"].as_u64().unwrap();

    gateway.eventually(|| evicted(&read().1) >= 10);
    let (begun, first) = read();
    gateway.eventually(|| evicted(&read().1) >= 90);
    let (ended, second) = read();

    let rate = (evicted(&second) - evicted(&first)) as f64 / (ended - begun).as_secs_f64();
    assert!((rate / RATE - 1.0).abs() <= 0.1, "{rate} per second");
    assert_eq!((&second["state"], &second["rate"]), (&json!("running"), &json!(RATE)));
    assert_eq!(evicted(&second) + second["left"].as_u64().unwrap(), 160, "{second}");
    assert!(second["eta_seconds"].as_f64() <= Some(70.0 / RATE), "{second}");

    let viewer = gateway.token("viewer");
    assert_eq!(gateway.call_as(&viewer, "DELETE", &path, None).status, 403);
    let cancelled = gateway.call_as(&gateway.token("operator"), "DELETE", &path, None);

    assert_eq!(cancelled.status, 200, "{cancelled:?}");
    let cancelled = cancelled.json();
    assert_eq!((&cancelled["state"], &cancelled["left"]), (&json!("off"), &json!(0)));
    std::thread::sleep(Duration::from_secs(2));
    let left = gateway.state().sessions.len() as u64;
    assert_eq!(left, 200 - evicted(&read().1), "the others stay");
    assert!(left > 40 + 50, "{left}");
    assert_eq!(gateway.delete(&path).problem(), (409, "conflict".into()));
    let audit = gateway.get("/api/v1/audit").json();
    let record = &audit["items"][0];
    assert_eq!(
        (
            &record["action"],
            &record["subject"],
            &record["before"]["evict"],
            &record["after"]["evict"]
        ),
        (&json!("eviction.cancel"), &json!(id), &json!(true), &json!(false))
    );

    // Those that were evicted are refused, and cost no query.
    let statements = || gateway.metric("seawall_lookup_statements_total");
    let before = statements();
    for number in 0..160 {
        let returned = gateway.block_on(attempt(gateway.device_address(), device(number).firmware("3.8.0-b3")));
        returned.refused_with(403, "firmware_blocked");
    }
    assert_eq!(statements(), before);
    let events = gateway.state().events.after(0, usize::MAX, usize::MAX).events;
    let of_eviction = events.iter().filter(|event| event.body.name() == "eviction");
    assert_eq!(of_eviction.count(), 2, "its beginning and its end");
}

#[test]
fn evicting_many_must_be_confirmed_though_refusing_them_was() {
    let gateway = Gateway::start();
    let _devices: Vec<_> = (0..20)
        .map(|_| gateway.connected(&["Seawall-Firmware: 2.0"]).1)
        .collect();
    let mut confirmed = json!({"match": {"firmware": "=2.0"}, "effect": "block"});
    confirmed["confirm"] = Value::Bool(true);
    let id = text(&gateway.post("/api/v1/rules", confirmed).json()["id"]);
    let path = format!("/api/v1/rules/{id}");

    let refused = gateway.patch(&path, json!({"evict": true}));
    let unchanged = gateway.get(&path).json();

    assert_eq!(refused.problem(), (409, "needs_confirmation".into()));
    assert_eq!(
        (&unchanged["evict"], gateway.state().sessions.len()),
        (&Value::Bool(false), 20)
    );
    assert_eq!(
        gateway.patch(&path, json!({"evict": true, "confirm": true})).status,
        200
    );
}

#[test]
fn a_rule_that_refuses_many_must_be_confirmed() {
    let gateway = Gateway::start();
    let rule = |firmware: &str| json!({"match": {"firmware": firmware}, "effect": "block"});
    let mut devices: Vec<_> = (0..13).map(|_| gateway.connected(&["Seawall-Firmware: 1.0"])).collect();
    devices.extend((0..6).map(|_| gateway.connected(&["Seawall-Firmware: 2.0"])));

    // Nineteen are too few for a confirmation.
    let few = gateway.post("/api/v1/rules/preview", rule("=2.0")).json();
    assert_eq!(
        (&few["connected"], &few["connected_total"], &few["needs_confirmation"]),
        (&json!(6), &json!(19), &json!(false))
    );

    devices.push(gateway.connected(&["Seawall-Firmware: 2.0"]));
    let preview = gateway.post("/api/v1/rules/preview", rule("=2.0")).json();
    let refused = gateway.post("/api/v1/rules", rule("=2.0"));
    assert_eq!((&preview["connected"], &preview["known"]), (&json!(7), &json!(7)));
    assert_eq!(
        preview["by_version"],
        json!([{"firmware": "2.0", "connected": 7, "known": 7}])
    );
    assert_eq!(refused.problem(), (409, "needs_confirmation".into()));
    assert_eq!(refused.json()["preview"], preview);
    assert_eq!(preview["dark_tenants"], json!([]));
    let all = gateway.post("/api/v1/rules/preview", rule(">0")).json();
    assert_eq!(
        (&all["dark_tenants"], &all["dark_tenants_total"]),
        (&json!(["default"]), &json!(1))
    );
    assert_eq!(gateway.all("/api/v1/rules?", 10).len(), 0);

    let mut confirmed = rule("=2.0");
    confirmed["confirm"] = Value::Bool(true);
    let created = gateway.post("/api/v1/rules", confirmed);
    assert_eq!(created.status, 201);
    let path = format!("/api/v1/rules/{}", text(&created.json()["id"]));
    assert_eq!(gateway.patch(&path, json!({"reason": "no other devices"})).status, 200);
    let wider = json!({"match": {"firmware": ">=1.0"}});
    assert_eq!(
        gateway.patch(&path, wider).problem(),
        (409, "needs_confirmation".into())
    );
}

#[test]
fn the_check_of_a_rule_counts_the_devices_of_all_nodes() {
    let outside = tokio::runtime::Runtime::new().unwrap();
    let database = outside.block_on(pg::shared().database()).unwrap();
    let (here, there) = (
        Gateway::start_on(Some(&database), ""),
        Gateway::start_on(Some(&database), ""),
    );
    here.eventually(|| here.state().readiness().ready && there.state().readiness().ready);
    let _devices: Vec<_> = (0..20).map(|_| there.connected(&["Seawall-Firmware: 3.8"])).collect();
    let rule = json!({"match": {"firmware": ">=3.8"}, "effect": "block", "evict": true});
    let preview = || here.post("/api/v1/rules/preview", rule.clone()).json();

    here.eventually(|| preview()["connected"] == 20);
    let refused = here.post("/api/v1/rules", rule.clone());

    let preview = preview();
    assert_eq!(
        (&preview["connected_total"], &preview["nodes"]),
        (&json!(20), &json!(2))
    );
    assert_eq!(refused.problem(), (409, "needs_confirmation".into()));
    let detail = refused.json()["detail"].clone();
    assert!(text(&detail).contains("20 of 20 connected devices"), "{detail}");
    assert_eq!(there.state().sessions.len(), 20);
}

#[test]
fn rules_that_nobody_confirmed_are_added_up() {
    let gateway = Gateway::start();
    let _devices: Vec<_> = (0..20)
        .map(|number| gateway.connected(&[&format!("Seawall-Firmware: {}", 1 + number / 5)]))
        .collect();
    let rule = |firmware: &str| json!({"match": {"firmware": firmware}, "effect": "block", "evict": true});

    assert_eq!(gateway.post("/api/v1/rules", rule("=1")).status, 201);
    gateway.eventually(|| gateway.state().sessions.len() == 15);
    let second = gateway.post("/api/v1/rules", rule("=2"));
    assert_eq!(second.problem(), (409, "needs_confirmation".into()));
    let detail = second.json()["detail"].clone();
    assert!(text(&detail).contains("together with 1 rules"), "{detail}");
    let by_model = json!({"match": {"firmware": "=2", "tenant": "default"}, "effect": "block"});
    assert_eq!(gateway.post("/api/v1/rules", by_model).problem().0, 409);

    // A rule that affects no device, and a confirmed one.
    assert_eq!(gateway.post("/api/v1/rules", rule("=9")).status, 201);
    let mut confirmed = rule("=2");
    confirmed["confirm"] = Value::Bool(true);
    assert_eq!(gateway.post("/api/v1/rules", confirmed).status, 201);
}

#[test]
fn a_rule_that_nobody_can_tell_the_effect_of_must_be_confirmed() {
    let gateway = Gateway::start();
    for _ in 0..20 {
        gateway.register(json!({}));
    }
    let rule = json!({"match": {"firmware": ">=3.8"}, "effect": "block"});
    let is_restored = &gateway.state().is_presence_restored;
    gateway.eventually(|| is_restored.load(Ordering::Relaxed));
    let of_new_fleet = json!({"match": {"firmware": ">=9"}, "effect": "block"});
    assert_eq!(
        gateway.post("/api/v1/rules", of_new_fleet).status,
        201,
        "no device was ever seen"
    );

    is_restored.store(false, Ordering::Relaxed);
    let blind = gateway.post("/api/v1/rules", rule.clone());
    assert_eq!(blind.problem(), (409, "needs_confirmation".into()));
    let detail = blind.json()["detail"].clone();
    assert!(
        text(&detail).contains("20 registered devices were seen, and knows 0"),
        "{detail}"
    );

    let counts = |firmware: &str| format!(r#"{{"groups":[{{"firmware":"{firmware}","connected":30,"known":30}}]}}"#);
    let write = |counts: &str| {
        let (run, store) = (uuid::Uuid::from_u128(1), &gateway.state().store);
        gateway.block_on(store.counts_write(run, "other", counts)).unwrap();
    };
    write("of no version at all");
    assert_eq!(gateway.post("/api/v1/rules", rule.clone()).problem().0, 409);
    write(&counts("3.8"));
    let connected = gateway.post("/api/v1/rules", rule.clone());
    assert_eq!(connected.json()["preview"]["connected"], 30, "{connected:?}");
    // The other node is gone: its state of a minute ago is still used.
    gateway.block_on(async {
        let mut database = database(&gateway).await;
        let sql = "UPDATE device_counts SET at = at - 60000";
        sqlx::raw_sql(sql).execute(&mut database).await.unwrap();
    });
    let outage = gateway.post("/api/v1/rules", rule.clone());
    assert_eq!(outage.problem(), (409, "needs_confirmation".into()));
    let detail = outage.json()["detail"].clone();
    assert!(text(&detail).contains("30 of 30 recently seen"), "{detail}");
    write(&counts("3.7"));
    assert_eq!(gateway.post("/api/v1/rules", rule).status, 201);
}

#[test]
fn devices_count_once_however_often_their_node_was_restarted() {
    let gateway = Gateway::start();
    let _devices: Vec<_> = (0..20).map(|_| gateway.connected(&["Seawall-Firmware: 2"])).collect();
    let (store, node) = (&gateway.state().store, &gateway.state().node);
    let write = |run: u128, known: u64| {
        let counts = format!(r#"{{"groups":[{{"firmware":"1","connected":0,"known":{known}}}]}}"#);
        gateway
            .block_on(store.counts_write(uuid::Uuid::from_u128(run), node, &counts))
            .unwrap();
        gateway.block_on(async {
            let mut database = database(&gateway).await;
            let sql = "UPDATE device_counts SET at = at - 60000";
            sqlx::raw_sql(sql).execute(&mut database).await.unwrap();
        });
    };
    let rule = |reason: &str| json!({"match": {"firmware": "=1"}, "effect": "block", "reason": reason, "evict": reason == "b"});

    write(1, 40);
    write(2, 21);
    let preview = gateway.post("/api/v1/rules/preview", rule("a")).json();
    assert_eq!(preview["known_total"], 20, "{preview}");
    assert_eq!(gateway.post("/api/v1/rules", rule("a")).status, 201);

    // After a restart in an outage, the previous run represents the fleet.
    write(3, 41);
    let refused = gateway.post("/api/v1/rules", rule("b"));
    assert_eq!(refused.problem(), (409, "needs_confirmation".into()));
    let detail = refused.json()["detail"].clone();
    assert!(text(&detail).contains("41 of 61 recently seen"), "{detail}");
}

#[test]
fn a_preview_counts_those_who_left_as_known() {
    let gateway = Gateway::start();
    let (_, device) = gateway.connected(&["Seawall-Firmware: 1.0", "Seawall-Model: m1"]);
    drop(device);
    gateway.eventually(|| gateway.state().sessions.is_empty());

    let preview = gateway
        .post(
            "/api/v1/rules/preview",
            json!({"match": {"model": "m1"}, "effect": "block"}),
        )
        .json();

    assert_eq!(
        (&preview["connected"], &preview["known"], &preview["known_total"]),
        (&json!(0), &json!(1), &json!(1))
    );
}

#[test]
fn a_rule_that_says_what_another_says_is_refused_with_its_id() {
    let gateway = Gateway::start();
    let rule = |reason: &str| json!({"match": {"firmware": "=9"}, "effect": "block", "reason": reason});
    let first = text(&gateway.post("/api/v1/rules", rule("a")).json()["id"]);

    let again = gateway.post("/api/v1/rules", rule("a"));

    assert_eq!(again.problem(), (409, "conflict".into()));
    assert!(text(&again.json()["detail"]).contains(&first), "{again:?}");
    // Devices are told the reason.
    assert_eq!(gateway.post("/api/v1/rules", rule("b")).status, 201);
    let mut evicting = rule("b");
    evicting["evict"] = Value::Bool(true);
    assert_eq!(gateway.post("/api/v1/rules", evicting).status, 201);
    for range in ["= 9", "=v9.0.0", ">=9,<=9"] {
        let mut rewritten = rule("a");
        rewritten["match"]["firmware"] = range.into();
        assert_eq!(
            gateway.post("/api/v1/rules", rewritten).problem(),
            (409, "conflict".into()),
            "{range}"
        );
    }
    // A repeated request makes no second staged rule, which would refuse a share of its own.
    let mut staged = rule("c");
    staged["rollout"] = json!({"bake": "1h"});
    assert_eq!(gateway.post("/api/v1/rules", staged.clone()).status, 201);
    assert_eq!(
        gateway.post("/api/v1/rules", staged).problem(),
        (409, "conflict".into())
    );
}

#[test]
fn a_rule_is_not_changed_to_what_another_says() {
    let gateway = Gateway::start();
    let rule = |reason: &str| json!({"match": {"firmware": "=9"}, "effect": "block", "reason": reason});
    let first = text(&gateway.post("/api/v1/rules", rule("a")).json()["id"]);
    let second = gateway.post("/api/v1/rules", rule("b")).json();
    let path = format!("/api/v1/rules/{}", text(&second["id"]));

    let changed = gateway.patch(&path, json!({"reason": "a"}));

    assert_eq!(changed.problem(), (409, "conflict".into()));
    assert!(text(&changed.json()["detail"]).contains(&first), "{changed:?}");
    assert_eq!(
        gateway.patch(&path, json!({"reason": "b", "confirm": true})).status,
        200
    );
    assert_eq!(gateway.patch(&path, json!({"match": {"firmware": "=9.0"}})).status, 200);
}

#[test]
fn a_rule_that_is_over_says_so() {
    let gateway = Gateway::start();
    let expires_at = gateway.state().clock.wall() + std::time::Duration::from_millis(500);
    let rule = json!({"match": {"firmware": "=9"}, "effect": "block", "expires_at": expires_at.to_rfc3339()});
    let rule = gateway.post("/api/v1/rules", rule).json();
    assert_eq!(rule["state"], "enforced");
    let path = format!("/api/v1/rules/{}", text(&rule["id"]));

    gateway.eventually(|| gateway.get(&path).json()["state"] == "expired");
    assert_eq!(gateway.all("/api/v1/rules?", 10)[0]["state"], "expired");
    let renewed = gateway.patch(&path, json!({"expires_at": null}));
    assert_eq!((renewed.status, &renewed.json()["state"]), (200, &json!("enforced")));
}

#[test]
fn rules_are_listed_in_pages() {
    let gateway = Gateway::start();
    for n in 0..7 {
        let rule = json!({"match": {"model": format!("m{n}")}, "effect": "block"});
        assert_eq!(gateway.post("/api/v1/rules", rule).status, 201);
    }

    let rules = gateway.all("/api/v1/rules?", 3);

    let models: Vec<String> = rules.iter().map(|rule| text(&rule["match"]["model"])).collect();
    assert_eq!(models, ["m0", "m1", "m2", "m3", "m4", "m5", "m6"]);
}
