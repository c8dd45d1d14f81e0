//! Firmware rules, from being written to being in force.

use serde_json::{Value, json};

use super::rig::{Gateway, V1, text};
use crate::wire::raw::{ask, request};

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
    assert_eq!(gateway.get(&path).json(), rule);

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
    assert_eq!(gateway.get(&path).json(), changed);

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
fn rules_that_say_something_wrong_are_refused_by_field() {
    let gateway = Gateway::start();

    for (field, value) in [
        ("reason", json!("a\u{1b}[31mb")),
        ("reason", json!("line\nbreak")),
        ("reason", json!("x".repeat(257))),
        ("effect", json!("restrict")),
        ("effect", json!("explode")),
        ("mode", json!("dry_run")),
        ("admit_percent", json!(10)),
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
            assert!(
                !answer.json()["detail"].as_str().unwrap().contains(char::is_control),
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
    assert_eq!(gateway.get(&path).json(), rule.json());
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
    // 15 min, the default, to twice that.
    assert!(
        (900_000..=1_800_000).contains(&reason["retry_after_ms"].as_u64().unwrap()),
        "{reason}"
    );
    gateway.block_on(other.text(r#"{"type":"message","id":"1","topic":"t","payload":1}"#));
    assert_eq!(gateway.block_on(other.frame()).text(), r#"{"type":"ack","id":"1"}"#);
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

    // Nineteen are too few to ask about.
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
