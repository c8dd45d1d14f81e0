//! Presence as operators read it: on devices, counted, as history and as events, even while the database is away.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection as _, SqliteConnection};

use super::{
    events::Stream,
    rig::{Gateway, V1, text},
};
use crate::harness::pg::Cluster;

/// A change is seen within this time.
const SEEN_WITHIN: Duration = Duration::from_secs(1);

pub fn presence(gateway: &Gateway, id: &str) -> Value {
    gateway.get(&format!("/api/v1/devices/{id}")).json()["presence"].clone()
}

pub fn history(gateway: &Gateway, id: &str) -> Value {
    gateway.get(&format!("/api/v1/devices/{id}/history")).json()
}

/// States of a history, newest first.
pub fn states(history: &Value) -> Vec<String> {
    history["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| text(&item["state"]))
        .collect()
}

pub fn counts(gateway: &Gateway, by: &str, key: &str) -> Value {
    let answer = gateway.get(&format!("/api/v1/presence?by={by}")).json();
    assert!(
        answer["as_of"].is_string() && answer["observer_lag_ms"].is_u64(),
        "{answer}"
    );
    let items = answer["items"].as_array().unwrap();
    let found = items.iter().find(|item| item["key"] == key);
    found.map_or(Value::Null, |item| {
        json!([item["online"], item["offline"], item["unknown"]])
    })
}

#[test]
fn close_is_seen_within_a_second_with_its_evidence() {
    let gateway = Gateway::start();
    let mut stream = Stream::open(&gateway, None);
    let (id, mut device) = gateway.connected(&[V1]);
    let online = stream.of("presence").data;
    assert_eq!(presence(&gateway, &id)["state"], "online");

    let closed = Instant::now();
    // A close frame with 1000.
    gateway.block_on(device.send(0x88, &1000_u16.to_be_bytes()));
    let offline = stream.of("presence").data;
    assert!(closed.elapsed() < SEEN_WITHIN, "{:?}", closed.elapsed());

    let evidence = json!({"kind": "closed", "code": 1000, "by_device": true});
    assert_eq!(
        (&online["state"], &online["reason"]),
        (&json!("online"), &json!("connected"))
    );
    assert_eq!(
        (&offline["state"], &offline["evidence"]),
        (&json!("offline"), &evidence)
    );
    assert_eq!(
        (&offline["device"], &offline["tenant"]),
        (&json!(id), &json!("default"))
    );
    assert_eq!(
        (&online["epoch"], &online["node"]),
        (&offline["epoch"], &offline["node"])
    );
    let shown = presence(&gateway, &id);
    assert_eq!((&shown["state"], &shown["evidence"]), (&json!("offline"), &evidence));
    assert_eq!(shown["since"], offline["since"]);
    assert_eq!(states(&history(&gateway, &id)), ["offline", "online"]);
    gateway.eventually(|| gateway.state().history.queue().is_empty());
    assert_eq!(
        states(&history(&gateway, &id)),
        ["offline", "online"],
        "from the database"
    );
}

#[test]
fn device_that_no_node_has_seen_is_unknown_and_says_why() {
    let gateway = Gateway::start();
    let (id, _) = gateway.register(json!({}));
    gateway.eventually(|| presence(&gateway, &id)["cause"] == "never_seen");

    let shown = presence(&gateway, &id);

    assert_eq!(
        (&shown["state"], &shown["since"], &shown["reason"]),
        (&json!("unknown"), &Value::Null, &Value::Null)
    );
    let history = history(&gateway, &id);
    assert_eq!(
        (&history["items"], &history["source"]),
        (&json!([]), &json!("database"))
    );
}

#[test]
fn takeover_and_the_late_close_of_the_older_session_leave_the_device_online() {
    let gateway = Gateway::start();
    let (id, secret) = gateway.register(json!({}));
    let mut stream = Stream::open(&gateway, None);
    let older = gateway.connect(&id, &secret, &[V1]);
    let since = presence(&gateway, &id)["since"].clone();
    let epoch = stream.of("presence").data["epoch"].clone();
    let newer = gateway.block_on(crate::harness::raw::Device::connect(
        gateway.device_address(),
        &[&format!("Seawall-Device: {id}\r\nAuthorization: Bearer {secret}"), V1],
    ));
    gateway.eventually(|| gateway.metric("seawall_closes_total{reason=\"replaced\"}") == 1);
    drop(older);

    let shown = presence(&gateway, &id);
    assert_eq!((&shown["state"], &shown["since"]), (&json!("online"), &since));
    assert_eq!(shown["reason"], "replaced");
    let history = history(&gateway, &id);
    assert_eq!(states(&history), ["online", "online"]);
    assert!(text(&history["items"][0]["epoch"]) > text(&epoch));
    drop(newer);
    let next = stream.of("presence").data;
    assert_eq!(next["state"], "offline", "the next event is the end of the newer one");
    assert_eq!(next["epoch"], history["items"][0]["epoch"]);
}

#[test]
fn devices_are_counted_by_tenant_model_and_firmware() {
    let gateway = Gateway::start();
    let mut kept = Vec::new();
    for (tenant, firmware) in [("a", "1.0"), ("a", "2.0"), ("b", "2.0")] {
        let (id, secret) = gateway.register(json!({"tenant": tenant, "model": "m"}));
        let line = format!("Seawall-Firmware: {firmware}");
        kept.push((id.clone(), gateway.connect(&id, &secret, &[V1, &line])));
    }

    assert_eq!(counts(&gateway, "tenant", "a"), json!([2, 0, 0]));
    assert_eq!(counts(&gateway, "firmware", "2.0"), json!([2, 0, 0]));
    assert_eq!(counts(&gateway, "model", "m"), json!([3, 0, 0]));
    kept.remove(0);
    gateway.eventually(|| counts(&gateway, "tenant", "a") == json!([1, 1, 0]));
    assert_eq!(counts(&gateway, "firmware", "1.0"), json!([0, 1, 0]));
    let listed = |query: &str| gateway.all(&format!("/api/v1/devices?{query}&"), 1).len();
    assert_eq!(listed("state=offline"), 1);
    assert_eq!(listed("state=online&tenant=a"), 1);
    assert_eq!(listed("state=online&firmware=2.0"), 2);
    assert_eq!(listed("state=online&model=m&tenant=b&firmware=2.0"), 1);
    assert_eq!(gateway.get("/api/v1/presence?by=colour").status, 400);
}

#[test]
fn history_is_paged_and_an_unknown_device_has_none() {
    let gateway = Gateway::start();
    let (id, secret) = gateway.register(json!({}));
    for _ in 0..4 {
        drop(gateway.connect(&id, &secret, &[V1]));
        gateway.eventually(|| gateway.state().sessions.is_empty());
    }
    let path = format!("/api/v1/devices/{id}/history");
    let all = history(&gateway, &id);
    assert_eq!(states(&all), ["offline", "online"].repeat(4));
    assert_eq!(all["next_cursor"], Value::Null);

    // From memory and the database, and then from the database alone.
    for _ in 0..2 {
        for limit in [1, 3, 8] {
            assert_eq!(json!(gateway.all(&format!("{path}?"), limit)), all["items"], "{limit}");
        }
        gateway.eventually(|| gateway.state().history.queue().is_empty());
    }

    for cursor in ["x", "18ec1a7d80c1a340", "-1", "1-x"] {
        assert_eq!(
            gateway.get(&format!("{path}?cursor={cursor}")).problem().0,
            400,
            "{cursor}"
        );
    }
    let unknown = gateway.get("/api/v1/devices/7a0e7a3c-5f62-4e3c-8f0e-8d9a1f8b7c11/history");
    assert_eq!(unknown.problem(), (404, "not_found".into()));
}

#[test]
fn filters_counts_and_lists_mean_the_registry_s_tenant_and_model_and_count_devices_that_were_never_seen() {
    let gateway = Gateway::start();
    let (id, secret) = gateway.register(json!({"tenant": "a", "model": "cam"}));
    for _ in 0..2 {
        gateway.register(json!({"tenant": "a", "model": "cam"}));
    }
    gateway.register(json!({"tenant": "b"}));
    let claims = [V1, "Seawall-Model: claimed", "Seawall-Firmware: 1.0"];
    let device = gateway.connect(&id, &secret, &claims);
    // Whatever a filter lists, the same key counts.
    let agrees = |by: &str, key: &str, expected: [u64; 3]| {
        gateway.eventually(|| counts(&gateway, by, key) == json!(expected));
        for (state, count) in ["online", "offline", "unknown"].into_iter().zip(expected) {
            let listed = gateway.all(&format!("/api/v1/devices?{by}={key}&state={state}&"), 1);
            assert_eq!(listed.len() as u64, count, "{by} {key} {state}");
        }
    };

    agrees("tenant", "a", [1, 0, 2]);
    agrees("tenant", "b", [0, 0, 1]);
    agrees("model", "cam", [1, 0, 2]);
    agrees("firmware", "1.0", [1, 0, 0]);
    assert_eq!(counts(&gateway, "model", "claimed"), Value::Null);
    let of_no_version = gateway.get("/api/v1/presence?by=firmware").json()["items"][0].clone();
    assert_eq!(
        of_no_version,
        json!({"key": null, "online": 0, "offline": 0, "unknown": 3})
    );

    // A change of the registry counts at once, while the session continues.
    let change = json!({"tenant": "c", "model": "lamp"});
    assert_eq!(gateway.patch(&format!("/api/v1/devices/{id}"), change).status, 200);
    agrees("tenant", "c", [1, 0, 0]);
    agrees("model", "lamp", [1, 0, 0]);
    agrees("model", "cam", [0, 0, 2]);
    drop(device);
    agrees("model", "lamp", [0, 1, 0]);
    let gateway = gateway.restart_on(None, || {});
    gateway.eventually(|| counts(&gateway, "model", "lamp") == json!([0, 1, 0]));
    gateway.eventually(|| counts(&gateway, "tenant", "a") == json!([0, 0, 2]));
}

#[test]
fn events_are_filtered_by_name_device_tenant_and_firmware() {
    let gateway = Gateway::start();
    let (id, secret) = gateway.register(json!({"tenant": "acme"}));
    let (other, other_secret) = gateway.register(json!({}));
    let mut of_device = Stream::open_with(&gateway, &format!("?device={id}"));
    let mut of_tenant = Stream::open_with(&gateway, "?tenant=acme&type=presence,message");
    let mut of_version = Stream::open_with(&gateway, "?firmware=%3E%3D2.0");
    let mut of_drain = Stream::open_with(&gateway, "?type=drain");

    let _other = gateway.connect(&other, &other_secret, &[V1, "Seawall-Firmware: 1.0"]);
    let mut device = gateway.connect(&id, &secret, &[V1, "Seawall-Firmware: 2.1"]);
    gateway.block_on(device.text("{\"type\":\"message\",\"id\":\"m1\",\"payload\":1}"));
    gateway.post("/api/v1/drain", json!({}));

    for stream in [&mut of_device, &mut of_tenant, &mut of_version] {
        let presence = stream.event();
        assert_eq!(
            (presence.name.as_str(), &presence.data["device"]),
            ("presence", &json!(id))
        );
        let message = stream.event();
        assert_eq!(
            (message.name.as_str(), &message.data["device"]),
            ("message", &json!(id))
        );
    }
    assert_eq!(of_drain.event().name, "drain");
    for query in ["?type=presents", "?device=x", "?firmware=%3E%3D", "?colour=red"] {
        assert_eq!(gateway.get(&format!("/api/v1/events{query}")).status, 400, "{query}");
    }
}

#[test]
fn deleted_device_leaves_nothing_behind() {
    let gateway = Gateway::start();
    let (id, device) = gateway.connected(&[V1]);
    gateway.eventually(|| gateway.state().history.queue().is_empty());
    assert_eq!(gateway.delete(&format!("/api/v1/devices/{id}")).status, 204);
    drop(device);

    gateway.eventually(|| gateway.state().sessions.is_empty() && gateway.state().history.queue().is_empty());
    let history = gateway.get(&format!("/api/v1/devices/{id}/history"));
    assert_eq!(history.problem(), (404, "not_found".into()));
    assert_eq!(gateway.state().history.groups().total().total(), 0);
}

#[test]
fn change_that_the_database_refuses_is_skipped_and_counted_and_others_are_stored() {
    let gateway = Gateway::start();
    let (bad, bad_secret) = gateway.register(json!({}));
    let file = gateway.state().config.database_url().sqlite_path().unwrap().to_owned();
    let hex = bad.replace('-', "").to_uppercase();
    let trigger = format!(
        "CREATE TRIGGER refuse BEFORE INSERT ON presence_history WHEN hex(new.device) = '{hex}' \
         BEGIN SELECT RAISE(ABORT, 'not this one'); END"
    );
    gateway.block_on(async {
        let mut connection = SqliteConnection::connect(&format!("sqlite:{}", file.display()))
            .await
            .unwrap();
        sqlx::raw_sql(AssertSqlSafe(trigger))
            .execute(&mut connection)
            .await
            .unwrap();
    });

    let _bad = gateway.connect(&bad, &bad_secret, &[V1]);
    let others: Vec<_> = (0..3).map(|_| gateway.connected(&[V1])).collect();

    gateway.eventually(|| gateway.state().history.queue().is_empty());
    gateway.eventually(|| gateway.metric("seawall_dropped_total{buffer=\"presence\"}") == 1);
    for (id, _) in &others {
        assert_eq!(states(&history(&gateway, id)), ["online"]);
    }
    assert_eq!(history(&gateway, &bad)["items"], json!([]));
    assert_eq!(presence(&gateway, &bad)["state"], "online");
}

#[test]
fn frozen_database_delays_the_history_and_loses_nothing_of_it() {
    away(|cluster| cluster.freeze().unwrap(), |cluster| cluster.thaw().unwrap());
}

#[test]
fn dead_database_delays_the_history_and_loses_nothing_of_it() {
    away(|cluster| cluster.kill().unwrap(), |cluster| cluster.restart().unwrap());
}

fn away(hurt: impl Fn(&Cluster), heal: impl Fn(&Cluster)) {
    let cluster = Cluster::start().unwrap();
    let url = tokio::runtime::Runtime::new()
        .unwrap()
        .block_on(cluster.database())
        .unwrap();
    let gateway = Gateway::start_on(Some(&url), "");
    gateway.eventually(|| gateway.raw("GET", "/readyz", &[], "").status == 200);
    let (id, secret) = gateway.register(json!({"tenant": "acme"}));
    let mut connection = gateway.connect(&id, &secret, &[V1, "Seawall-Firmware: 2.0"]);
    let welcome: Value = serde_json::from_str(gateway.block_on(connection.frame()).text()).unwrap();
    let token = text(&welcome["resume"]);
    gateway.eventually(|| gateway.state().history.queue().is_empty());

    hurt(&cluster);
    // Devices return by their tokens.
    for _ in 0..4 {
        drop(connection);
        gateway.eventually(|| gateway.state().sessions.is_empty());
        let resume = format!("Seawall-Resume: {token}");
        connection = gateway.connect(&id, &secret, &[V1, "Seawall-Firmware: 2.0", &resume]);
    }
    drop(connection);
    gateway.eventually(|| presence(&gateway, &id)["state"] == "offline");
    gateway.eventually(|| history(&gateway, &id)["source"] == "memory");
    assert_eq!(states(&history(&gateway, &id))[..2], ["offline", "online"]);
    assert_eq!(counts(&gateway, "tenant", "acme"), json!([0, 1, 0]));
    let listed = gateway
        .get("/api/v1/devices?state=offline&tenant=acme&firmware=2.0")
        .json();
    assert_eq!(
        (&listed["source"], &listed["items"][0]["id"]),
        (&json!("memory"), &json!(id))
    );
    assert!(listed["as_of"].is_string());
    assert_eq!(gateway.get("/api/v1/devices?state=unknown").json()["items"], json!([]));

    heal(&cluster);
    gateway.eventually(|| gateway.state().history.queue().is_empty());
    gateway.eventually(|| history(&gateway, &id)["source"] == "database");
    let history = history(&gateway, &id);
    let expected = ["offline", "online"].repeat(5);
    assert_eq!(states(&history), expected, "{history}");
    let epochs: Vec<String> = history["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| text(&item["epoch"]))
        .collect();
    assert!(epochs.is_sorted_by(|newer, older| newer >= older));
    assert_eq!(gateway.metric("seawall_dropped_total{buffer=\"presence\"}"), 0);
}

#[test]
fn stop_writes_what_is_left_and_the_next_start_reads_it() {
    let gateway = Gateway::start();
    let (id, device) = gateway.connected(&[V1, "Seawall-Firmware: 2.0"]);
    drop(device);
    gateway.eventually(|| gateway.state().sessions.is_empty());

    let gateway = gateway.restart_on(None, || {});

    gateway.eventually(|| presence(&gateway, &id)["state"] == "offline");
    let shown = gateway.get(&format!("/api/v1/devices/{id}")).json();
    assert_eq!(
        (&shown["presence"]["reason"], &shown["firmware"]),
        (&json!("client_gone"), &json!("2.0"))
    );
    assert_eq!(shown["presence"]["evidence"], json!({"kind": "reset"}));
    assert_eq!(states(&history(&gateway, &id)), ["offline", "online"]);
}
