//! The registry, and the state of its devices.

use seawall_gateway::store::DatabaseStatus;
use serde_json::{Value, json};

use super::rig::{Gateway, V1, text};
use crate::harness::{
    pg::Cluster,
    raw::{Device, ask, request},
};

#[test]
fn a_device_is_registered_shown_changed_and_removed() {
    let gateway = Gateway::start();
    let id = "9B0C2E4A11D27F0080000000000000AA";

    let created = gateway.post("/api/v1/devices", json!({"id": id, "tenant": "acme", "model": "m1"}));

    let canonical = "9b0c2e4a-11d2-7f00-8000-0000000000aa";
    let path = format!("/api/v1/devices/{canonical}");
    assert_eq!(created.status, 201);
    assert_eq!(created.header("location"), path);
    let secret = text(&created.json()["secret"]);
    assert_eq!(secret.len(), 43);
    assert_eq!(
        gateway.post("/api/v1/devices", json!({"id": id})).problem(),
        (409, "conflict".into())
    );

    let shown = gateway.get(&path);
    let device = shown.json();
    assert!(!shown.text.contains(&secret) && !shown.text.contains("sha256"));
    assert_eq!(
        (&device["id"], &device["tenant"], &device["model"]),
        (&json!(canonical), &json!("acme"), &json!("m1"))
    );
    assert_eq!(
        (&device["state"], &device["presence"]["state"]),
        (&json!("enabled"), &json!("unknown"))
    );
    assert_eq!(device["attempts"], json!([]));

    let changed = gateway.patch(&path, json!({"tenant": "other", "model": null})).json();
    assert_eq!((&changed["tenant"], &changed["model"]), (&json!("other"), &Value::Null));
    assert_eq!(gateway.patch(&path, json!({})).problem().0, 422);
    assert_eq!(gateway.patch(&path, json!({"state": "gone"})).problem().0, 422);
    assert_eq!(gateway.patch(&path, json!({"tenant": "a\u{7}b"})).problem().0, 422);

    assert_eq!(gateway.delete(&path).status, 204);
    assert_eq!(gateway.get(&path).problem(), (404, "not_found".into()));
    assert_eq!(gateway.delete(&path).problem(), (404, "not_found".into()));
    assert_eq!(gateway.patch(&path, json!({"state": "enabled"})).problem().0, 404);
    assert_eq!(gateway.post(&format!("{path}/secret"), json!({})).problem().0, 404);
}

#[test]
fn a_list_has_every_device_once_and_only_those_asked_for() {
    let gateway = Gateway::start();
    for n in 0..23 {
        gateway.register(json!({"tenant": format!("t{}", n % 2), "model": format!("m{}", n % 3)}));
    }

    let all = gateway.all("/api/v1/devices?", 5);

    let mut ids: Vec<String> = all.iter().map(|device| text(&device["id"])).collect();
    assert!(ids.is_sorted());
    ids.dedup();
    assert_eq!(ids.len(), 23);
    gateway.patch(&format!("/api/v1/devices/{}", ids[0]), json!({"state": "revoked"}));
    assert_eq!(gateway.all("/api/v1/devices?tenant=t1&", 4).len(), 11);
    assert_eq!(gateway.all("/api/v1/devices?model=m2&", 4).len(), 7);
    assert_eq!(gateway.all("/api/v1/devices?tenant=t1&model=m1&", 1).len(), 4);
    assert_eq!(gateway.all("/api/v1/devices?state=revoked&", 5).len(), 1);
    assert_eq!(gateway.all("/api/v1/devices?state=enabled&", 5).len(), 22);
    assert_eq!(gateway.all("/api/v1/devices?state=unknown&", 5).len(), 23);
    assert_eq!(gateway.all("/api/v1/devices?state=online&", 5).len(), 0);
}

#[test]
fn presence_and_version_follow_the_session() {
    let gateway = Gateway::start();
    let (id, device) = gateway.connected(&["Seawall-Firmware: 3.8.0-b2"]);
    let (other, _still_here) = gateway.connected(&["Seawall-Firmware: 3.9"]);
    gateway.register(json!({}));
    let path = format!("/api/v1/devices/{id}");

    let online = gateway.get(&path).json();
    drop(device);
    gateway.eventually(|| gateway.state().sessions.len() == 1);
    let offline = gateway.get(&path).json();

    assert_eq!(
        (&online["presence"]["state"], &online["firmware"]),
        (&json!("online"), &json!("3.8.0-b2"))
    );
    assert!(online["presence"]["since"].is_string() && online["presence"]["as_of"].is_string());
    assert_eq!(online["attempts"][0]["outcome"], "admitted");
    assert_eq!(
        (&offline["presence"]["state"], &offline["firmware"]),
        (&json!("offline"), &json!("3.8.0-b2"))
    );
    assert!(offline["presence"]["reason"].is_string());
    let ids = |query: &str| -> Vec<String> {
        gateway
            .all(&format!("/api/v1/devices?{query}&"), 1)
            .iter()
            .map(|device| text(&device["id"]))
            .collect()
    };
    assert_eq!(ids("state=online"), vec![other.clone()]);
    assert_eq!(ids("state=offline"), vec![id.clone()]);
    assert_eq!(ids("firmware=%3C3.8.0"), vec![id.clone()]);
    assert_eq!(ids("firmware=3.9"), [other]);
    assert_eq!(ids("firmware=3.8.0-b2&tenant=default"), [id]);
    assert_eq!(ids("state=unknown").len(), 1);
}

#[test]
fn devices_come_from_memory_while_the_database_does_not_answer() {
    let cluster = Cluster::start().unwrap();
    let database = tokio::runtime::Runtime::new().unwrap().block_on(cluster.database());
    let gateway = Gateway::start_on(Some(&database.unwrap()), "");
    gateway.eventually(|| gateway.state().readiness().ready);
    let (online, secret) = gateway.register(json!({"model": "box"}));
    let _device = gateway.connect(&online, &secret, &["Seawall-Firmware: 3.8.0-b2"]);
    let (offline, leaving) = gateway.connected(&["Seawall-Firmware: 3.9", "Seawall-Model: box"]);
    drop(leaving);
    gateway.eventually(|| gateway.state().sessions.len() == 1);
    let (never_seen, _) = gateway.register(json!({}));
    let list = |query: &str| gateway.get(&format!("/api/v1/devices{query}")).json();
    let ids = |query: &str| -> Vec<String> {
        let list = list(query);
        assert_eq!(list["source"], "memory", "{list}");
        list["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|device| text(&device["id"]))
            .collect()
    };
    let mut remembered = vec![online.clone(), offline.clone()];
    remembered.sort();
    assert_eq!(list("")["source"], "database");

    cluster.kill().unwrap();
    let at_once = ids("");
    gateway.eventually(|| gateway.state().store.state().status == DatabaseStatus::Away);

    assert_eq!((at_once, ids("")), (remembered.clone(), remembered));
    assert_eq!(ids("?state=online"), vec![online.clone()]);
    assert_eq!(ids("?state=offline"), vec![offline.clone()]);
    assert_eq!(ids("?firmware=3.9"), vec![offline]);
    assert_eq!(ids("?model=box&tenant=default"), vec![online.clone()]);
    assert_eq!(ids("?tenant=acme"), Vec::<String>::new());
    let first = list("?limit=1");
    let cursor = text(&first["next_cursor"]);
    assert_eq!(ids(&format!("?limit=1&cursor={cursor}")), vec![cursor]);
    let shown = gateway.get(&format!("/api/v1/devices/{online}")).json();
    assert_eq!(
        (
            &shown["source"],
            &shown["presence"]["state"],
            &shown["firmware"],
            &shown["state"]
        ),
        (&json!("memory"), &json!("online"), &json!("3.8.0-b2"), &Value::Null)
    );
    assert_eq!(shown["attempts"][0]["outcome"], "admitted");
    for registry_only in ["?state=enabled", &format!("/{never_seen}")] {
        let answer = gateway.get(&format!("/api/v1/devices{registry_only}"));
        assert_eq!(
            answer.problem(),
            (503, "database_unavailable".into()),
            "{registry_only}"
        );
    }

    cluster.restart().unwrap();
    gateway.eventually(|| list("")["source"] == "database");
    assert_eq!(list("")["items"].as_array().unwrap().len(), 3);
}

#[test]
fn a_session_ends_when_its_device_is_disabled_revoked_removed_or_disconnected() {
    let gateway = Gateway::start();
    let end = |change: &dyn Fn(&str) -> u16| {
        let (id, mut device) = gateway.connected(&[V1]);
        gateway.block_on(device.frame());
        let status = change(&format!("/api/v1/devices/{id}"));
        let frame = gateway.block_on(device.frame());
        let (code, reason) = frame.close();
        (status, code, reason.to_owned())
    };

    let disabled = end(&|path| gateway.patch(path, json!({"state": "disabled"})).status);
    let revoked = end(&|path| gateway.patch(path, json!({"state": "revoked"})).status);
    let removed = end(&|path| gateway.delete(path).status);
    let disconnected = end(&|path| gateway.post(&format!("{path}/disconnect"), json!({})).status);

    assert_eq!((disabled.0, disabled.1), (200, 4002));
    assert!(disabled.2.contains("retry_after_ms"));
    assert_eq!((revoked.0, revoked.1), (200, 4501));
    assert_eq!((removed.0, removed.1), (204, 4501));
    assert_eq!((disconnected.0, disconnected.1), (200, 4003));
}

#[test]
fn secret_that_ends_at_once_ends_the_session_that_it_opened() {
    let gateway = Gateway::start();
    let (id, mut device) = gateway.connected(&[V1]);
    gateway.block_on(device.frame());
    let path = format!("/api/v1/devices/{id}/secret");

    let later = gateway.post(&path, json!({"overlap": "1h"}));
    assert_eq!(later.status, 201);
    assert_eq!(gateway.state().sessions.len(), 1, "the old secret is still valid");
    assert_eq!(gateway.post(&path, json!({})).status, 201);

    let frame = gateway.block_on(device.frame());
    assert_eq!(frame.close().0, 4003);
}

#[test]
fn deleted_device_is_remembered_no_longer_when_its_session_has_ended() {
    let gateway = Gateway::start();
    let (id, mut device) = gateway.connected(&[V1]);
    gateway.block_on(device.frame());

    assert_eq!(gateway.delete(&format!("/api/v1/devices/{id}")).status, 204);
    assert_eq!(gateway.block_on(device.frame()).close().0, 4501);
    gateway.eventually(|| gateway.state().sessions.is_empty());

    assert_eq!(gateway.state().history.known_len(), 0);
}

#[test]
fn disconnecting_somebody_who_is_not_here_says_so() {
    let gateway = Gateway::start();
    let (id, _) = gateway.register(json!({}));
    let nobody = uuid::Uuid::from_u128(7);

    let offline = gateway.post(&format!("/api/v1/devices/{id}/disconnect"), json!({}));
    let unknown = gateway.post(&format!("/api/v1/devices/{nobody}/disconnect"), json!({}));

    assert_eq!(offline.problem(), (409, "device_offline".into()));
    assert_eq!(unknown.problem(), (404, "not_found".into()));
}

#[test]
fn the_old_secret_is_valid_for_the_overlap_only() {
    let gateway = Gateway::start();
    let (id, old) = gateway.register(json!({}));
    let path = format!("/api/v1/devices/{id}/secret");

    let overlapping = gateway.post(&path, json!({"overlap": "1h"}));
    let kept = gateway.connect(&id, &old, &[]);
    drop(kept);
    gateway.eventually(|| gateway.state().sessions.is_empty());
    let at_once = gateway.call_as(&gateway.admin, "POST", &path, None);

    assert_eq!((overlapping.status, at_once.status), (201, 201));
    assert!(overlapping.json()["previous_secret_until"].is_string());
    assert_eq!(at_once.json()["previous_secret_until"], Value::Null);
    let shown = gateway.get(&format!("/api/v1/devices/{id}")).json();
    assert_eq!(shown["previous_secret_until"], Value::Null);
    drop(gateway.connect(&id, &text(&at_once.json()["secret"]), &[]));
    assert_eq!(gateway.post(&path, json!({"overlap": "31d"})).problem().0, 422);
    assert_eq!(gateway.post(&path, json!({"overlap": "soon"})).problem().0, 422);
}

#[test]
fn a_device_that_was_refused_connects_as_soon_as_it_is_registered() {
    let gateway = Gateway::start();
    let id = uuid::Uuid::new_v4().to_string();
    let address = gateway.device_address();
    let request = request(&[&format!(
        "Seawall-Device: {id}\r\nAuthorization: Bearer {}",
        "x".repeat(43)
    )]);
    let refused = gateway.block_on(ask(address, request.as_bytes()));

    let (_, secret) = gateway.register(json!({"id": id}));

    assert_eq!(refused.status, 401);
    gateway.connect(&id, &secret, &[]);
    let device = gateway.get(&format!("/api/v1/devices/{id}")).json();
    let outcomes: Vec<_> = device["attempts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|attempt| text(&attempt["outcome"]))
        .collect();
    assert_eq!(outcomes, ["admitted", "unauthorized"]);
}

#[test]
fn a_change_counts_against_resume_tokens_before_it_is_answered() {
    let gateway = Gateway::start();
    let changes = [
        ("PATCH", "", Some(json!({"state": "disabled"})), 403),
        ("PATCH", "", Some(json!({"state": "revoked"})), 401),
        ("POST", "/secret", Some(json!({})), 401),
        ("DELETE", "", None, 401),
    ];

    for (method, path, body, status) in changes {
        let (id, secret) = gateway.register(json!({}));
        let mut device = gateway.connect(&id, &secret, &[V1]);
        let welcome: Value = serde_json::from_str(gateway.block_on(device.frame()).text()).unwrap();
        let identity = format!("Seawall-Device: {id}\r\nAuthorization: Bearer {secret}");
        let token = format!("Seawall-Resume: {}", text(&welcome["resume"]));
        let back = request(&[&identity, &token]);
        drop(gateway.block_on(Device::connect(gateway.device_address(), &[&identity, &token])));

        let path = format!("/api/v1/devices/{id}{path}");
        let changed = gateway.call_as(&gateway.admin, method, &path, body.as_ref());
        assert!((200..300).contains(&changed.status), "{changed:?}");

        let answer = gateway.block_on(ask(gateway.device_address(), back.as_bytes()));
        assert_eq!(answer.status, status);
    }
    let metrics = gateway.state().metrics.render();
    assert!(
        metrics.contains("seawall_resumes_total{outcome=\"resumed\"} 4\n"),
        "{metrics}"
    );
    assert!(
        metrics.contains("seawall_resumes_total{outcome=\"revoked\"} 4\n"),
        "{metrics}"
    );
}

#[test]
fn a_short_session_soon_after_another_one_is_a_repeat_of_its_cohort() {
    let gateway = Gateway::start();
    let (id, secret) = gateway.register(json!({}));
    let repeats = || gateway.get("/api/v1/firmware").json()["items"][0]["repeats"].clone();
    let mut seen = Vec::new();

    for _ in 0..3 {
        let session = gateway.connect(&id, &secret, &["Seawall-Firmware: 3.1"]);
        drop(session);
        gateway.eventually(|| gateway.state().sessions.is_empty());
        seen.push(repeats());
    }
    let session = gateway.connect(&id, &secret, &["Seawall-Firmware: 3.1"]);
    gateway.post(&format!("/api/v1/devices/{id}/disconnect"), json!({}));
    gateway.eventually(|| gateway.state().sessions.is_empty());
    seen.push(repeats());
    drop(session);

    let expected = json!([0, 1, 2, 2]);
    assert_eq!(
        json!(seen),
        expected,
        "the first is not one, and neither is one that an operator ends"
    );
}

#[test]
fn a_refused_device_that_leaves_its_model_to_the_registry_counts_in_its_cohort() {
    let gateway = Gateway::start();
    let (steady, updated) = (
        gateway.register(json!({"model": "box"})),
        gateway.register(json!({"model": "box"})),
    );
    let bad = "Seawall-Firmware: 3.8.0-b3";
    let _steady = gateway.connect(&steady.0, &steady.1, &[bad]);
    let _updated = gateway.connect(&updated.0, &updated.1, &["Seawall-Firmware: 3.7"]);
    let rule = json!({"match": {"firmware": "=3.8.0-b3"}, "effect": "block", "confirm": true});
    assert_eq!(gateway.post("/api/v1/rules", rule).status, 201);

    let unknown = "9b0c2e4a-11d2-7f00-8000-0000000000aa";
    for (id, times) in [(&steady.0, 5), (&updated.0, 2), (&unknown.to_owned(), 1)] {
        let bytes = request(&[&format!("Seawall-Device: {id}"), "Authorization: Bearer x", bad]);
        for _ in 0..times {
            let refused = gateway.block_on(ask(gateway.device_address(), bytes.as_bytes()));
            assert_eq!(refused.code(), "firmware_blocked");
        }
    }

    let cohorts = gateway.all("/api/v1/firmware?", 10);
    let attempts = |name: &str| {
        let row = cohorts.iter().find(|row| row["cohort"] == name);
        row.map(|row| row["attempts"].clone()).unwrap_or_default()
    };
    let blocked = json!({"admitted": 1, "firmware_blocked": 7});
    assert_eq!(attempts("box/3.8.0-b3"), blocked, "{cohorts:?}");
    assert_eq!(attempts("box/3.7"), json!({"admitted": 1}));
    assert_eq!(attempts("other"), json!({"firmware_blocked": 1}));
}

#[test]
fn a_device_that_does_not_read_is_revoked_all_the_same() {
    let gateway = Gateway::start();
    let (id, deaf) = gateway.connected(&[V1]);
    let path = format!("/api/v1/devices/{id}/messages");
    std::thread::scope(|scope| {
        // More than both socket buffers hold, so that a write waits.
        let sending: Vec<_> = (0..60)
            .map(|_| scope.spawn(|| gateway.post(&path, json!({"payload": "x".repeat(60_000)})).status))
            .collect();
        // A full mailbox: the messages in it wait for the socket.
        gateway.eventually(|| gateway.metric("seawall_messages_total{direction=\"out\",outcome=\"mailbox_full\"}") > 0);
        let began = std::time::Instant::now();

        assert_eq!(
            gateway
                .patch(&format!("/api/v1/devices/{id}"), json!({"state": "revoked"}))
                .status,
            200
        );
        gateway.eventually(|| gateway.state().sessions.is_empty());

        assert!(
            began.elapsed() < std::time::Duration::from_secs(5),
            "{:?}",
            began.elapsed()
        );
        for sending in sending {
            assert!(
                [409, 429].contains(&sending.join().unwrap()),
                "nothing was acknowledged, and the session ended"
            );
        }
    });
    let metrics = gateway.raw("GET", "/metrics", &[], "").text;
    assert!(
        metrics.contains("seawall_closes_total{reason=\"revoked\"} 1"),
        "{metrics}"
    );
    drop(deaf);
}

#[test]
fn device_registered_or_moved_here_is_known_from_then_on() {
    let gateway = Gateway::start();

    let (id, _) = gateway.register(json!({"tenant": "acme"}));
    let moved = gateway.patch(&format!("/api/v1/devices/{id}"), json!({"tenant": "zeta"}));

    assert_eq!(moved.status, 200);
    assert_eq!(gateway.state().lookups.slots().known, 1);
}
