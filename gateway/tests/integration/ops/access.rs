//! Permissions of tokens, by call.

use serde_json::{Value, json};

use super::rig::{Gateway, text};

/// Calls with the minimum role of each. The bodies change nothing.
const CALLS: [(&str, &str, &str); 37] = [
    ("GET", "/api/v1/devices", "viewer"),
    ("GET", "/api/v1/devices/{id}", "viewer"),
    ("GET", "/api/v1/devices/{id}/history", "viewer"),
    ("GET", "/api/v1/presence", "viewer"),
    ("POST", "/api/v1/devices", "admin"),
    ("PATCH", "/api/v1/devices/{id}", "admin"),
    ("DELETE", "/api/v1/devices/{id}", "admin"),
    ("POST", "/api/v1/devices/import", "admin"),
    ("POST", "/api/v1/devices/{id}/secret", "admin"),
    ("POST", "/api/v1/devices/{id}/disconnect", "operator"),
    ("POST", "/api/v1/devices/{id}/messages", "operator"),
    ("GET", "/api/v1/rules", "viewer"),
    ("POST", "/api/v1/rules", "operator"),
    ("POST", "/api/v1/rules/preview", "viewer"),
    ("GET", "/api/v1/rules/{id}", "viewer"),
    ("PATCH", "/api/v1/rules/{id}", "operator"),
    ("DELETE", "/api/v1/rules/{id}", "operator"),
    ("POST", "/api/v1/rules/{id}/release", "operator"),
    ("GET", "/api/v1/rules/{id}/eviction", "viewer"),
    ("DELETE", "/api/v1/rules/{id}/eviction", "operator"),
    ("GET", "/api/v1/rules/{id}/rollout", "viewer"),
    ("PATCH", "/api/v1/rules/{id}/rollout", "operator"),
    ("GET", "/api/v1/firmware", "viewer"),
    ("POST", "/api/v1/firmware/clear", "operator"),
    ("GET", "/api/v1/node", "viewer"),
    ("PUT", "/api/v1/node/log-level", "operator"),
    ("GET", "/api/v1/nodes", "viewer"),
    ("GET", "/api/v1/alarms", "viewer"),
    ("POST", "/api/v1/webhook/test", "operator"),
    ("GET", "/api/v1/proposals", "viewer"),
    ("POST", "/api/v1/proposals/{id}/apply", "operator"),
    ("POST", "/api/v1/proposals/{id}/dismiss", "operator"),
    ("GET", "/api/v1/drain", "viewer"),
    ("GET", "/api/v1/audit", "viewer"),
    ("POST", "/api/v1/audit/prune", "admin"),
    ("GET", "/api/v1/tokens", "viewer"),
    ("POST", "/api/v1/tokens", "admin"),
];

/// Calls that are not in [`CALLS`], because they would change something or do not end.
const OTHER_CALLS: [(&str, &str, &str); 4] = [
    ("POST", "/api/v1/drain", "operator"),
    ("DELETE", "/api/v1/drain", "operator"),
    ("DELETE", "/api/v1/tokens/{id}", "admin"),
    ("GET", "/api/v1/events", "viewer"),
];

#[test]
fn each_call_wants_a_token_of_its_role() {
    let gateway = Gateway::start();
    let tokens = ["viewer", "operator", "admin"].map(|role| gateway.token(role));
    let nobody = uuid::Uuid::from_u128(7).to_string();

    for (method, path, role) in CALLS.iter().chain(&OTHER_CALLS[..3]) {
        let path = path.replace("{id}", &nobody);
        let body = (*method != "GET" && *method != "DELETE").then(|| json!({"no such field": 1}));
        let least = ["viewer", "operator", "admin"]
            .iter()
            .position(|known| known == role)
            .unwrap();

        let anonymous = gateway.raw(method, &path, &[], "");
        assert_eq!(anonymous.problem(), (401, "unauthorized".into()), "{method} {path}");
        assert_eq!(anonymous.header("www-authenticate"), "Bearer");
        for (rank, token) in tokens.iter().enumerate() {
            let answer = gateway.call_as(token, method, &path, body.as_ref());

            let is_allowed = answer.status != 403 && answer.status != 401;
            assert_eq!(
                is_allowed,
                rank >= least,
                "{method} {path} with rank {rank}: {answer:?}"
            );
            assert_ne!(answer.status, 201, "{method} {path}: {answer:?}");
        }
    }
}

#[test]
fn the_document_lists_the_calls_that_are_tested_here_and_no_other() {
    let document: Value = serde_json::from_str(&seawall_gateway::ops::openapi_json()).unwrap();
    let mut documented = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            documented.push(format!("{} {path}", method.to_uppercase()));
        }
    }
    let mut tested: Vec<String> = CALLS
        .iter()
        .chain(&OTHER_CALLS)
        .map(|(method, path, _)| format!("{method} {path}"))
        .collect();
    documented.sort();
    tested.sort();

    assert_eq!(documented, tested);
}

#[test]
fn a_token_works_from_its_creation_to_its_end() {
    let gateway = Gateway::start();
    let created = gateway
        .post("/api/v1/tokens", json!({"name": "ci", "role": "viewer"}))
        .json();
    let (id, token) = (text(&created["id"]), text(&created["token"]));

    let listed = gateway.all("/api/v1/tokens?", 1);
    let copy = std::fs::read_to_string(gateway.data_dir.join("tokens.json")).unwrap();

    assert_eq!(gateway.call_as(&token, "GET", "/api/v1/node", None).status, 200);
    assert_eq!(listed.len(), 1);
    assert_eq!(
        (text(&listed[0]["name"]), text(&listed[0]["role"])),
        ("ci".into(), "viewer".into())
    );
    assert!(copy.contains(&id) && !copy.contains(&token));

    assert_eq!(gateway.delete(&format!("/api/v1/tokens/{id}")).status, 204);
    assert_eq!(gateway.call_as(&token, "GET", "/api/v1/node", None).status, 401);
    assert_eq!(gateway.delete(&format!("/api/v1/tokens/{id}")).problem().0, 404);
    assert!(gateway.all("/api/v1/tokens?", 1)[0]["revoked_at"].is_string());
}

#[test]
fn names_that_would_mislead_the_audit_log_are_refused() {
    let gateway = Gateway::start();

    for name in [
        "",
        "a\u{1b}[2Jb",
        "a\nb",
        "admin.token",
        "gateway",
        "\u{e9}",
        &"x".repeat(65),
    ] {
        let answer = gateway.post("/api/v1/tokens", json!({"name": name, "role": "viewer"}));

        assert_eq!(answer.problem(), (422, "invalid".into()), "{name:?}");
    }
}

#[test]
fn every_change_is_in_the_audit_log_with_its_author_and_without_secrets() {
    let gateway = Gateway::start();
    let operator = gateway.token("operator");
    let (id, secret) = gateway.register(json!({"model": "m1"}));
    gateway.patch(&format!("/api/v1/devices/{id}"), json!({"state": "disabled"}));
    let rotated = gateway
        .post(&format!("/api/v1/devices/{id}/secret"), json!({"overlap": "1h"}))
        .json();
    let rule = json!({"match": {"model": "m2"}, "effect": "block"});
    let rule = gateway.call_as(&operator, "POST", "/api/v1/rules", Some(&rule)).json();
    gateway.call_as(
        &operator,
        "DELETE",
        &format!("/api/v1/rules/{}", text(&rule["id"])),
        None,
    );
    gateway.delete(&format!("/api/v1/devices/{id}"));

    let log = gateway.all("/api/v1/audit?", 2);

    let lines: Vec<(String, String)> = log
        .iter()
        .map(|line| (text(&line["action"]), text(&line["actor"])))
        .collect();
    let expected = [
        ("device.delete", "admin.token"),
        ("rule.delete", "test operator"),
        ("rule.create", "test operator"),
        ("device.rotate", "admin.token"),
        ("device.update", "admin.token"),
        ("device.create", "admin.token"),
        ("token.create", "admin.token"),
    ];
    let expected: Vec<_> = expected
        .iter()
        .map(|(action, actor)| ((*action).to_owned(), (*actor).to_owned()))
        .collect();
    assert_eq!(lines, expected);
    assert_eq!(log[4]["before"]["state"], "enabled");
    assert_eq!(log[4]["after"]["state"], "disabled");
    let log = json!(log).to_string();
    for hidden in [&secret, &text(&rotated["secret"]), &operator] {
        assert!(!log.contains(hidden.as_str()));
    }
    assert!(!log.contains("sha256"));
}

#[test]
fn young_records_of_the_audit_log_stay() {
    let gateway = Gateway::start();
    gateway.register(json!({}));
    let prune = |age: &str| gateway.post("/api/v1/audit/prune", json!({ "older_than": age }));

    assert_eq!(prune("23h").problem(), (422, "invalid".into()));
    assert_eq!(prune("1d").json(), json!({"deleted": 0, "more": false}));
    assert_eq!(
        gateway.all("/api/v1/audit?", 10).len(),
        1,
        "no record without a deletion"
    );
}
