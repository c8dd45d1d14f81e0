//! Firmware versions that are new to a fleet, with real devices.

use std::time::{Duration, Instant};

use firmware_sim::connection::Connection;
use seawall_gateway::runtime::config::DatabaseUrl;
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};

use super::rig::Gateway;
use crate::harness::{
    devices::{attempt, device, id, persist_all, register},
    pg,
};

/// Devices with the known version.
const KNOWN: u32 = 25;
/// Room of a version under test, on a small node.
const ROOM: u32 = 20;

/// Writes a version of long ago.
async fn db_write(database: &DatabaseUrl, firmware: &str, state: i16) {
    let mut connection = PgConnection::connect(database.expose()).await.unwrap();
    sqlx::query(
        "INSERT INTO firmware_versions (model, firmware, state, first_seen_at, changed_at) VALUES ('', $1, $2, 0, 0) \
         ON CONFLICT (model, firmware) DO UPDATE SET state = excluded.state",
    )
    .bind(firmware)
    .bind(state)
    .execute(&mut connection)
    .await
    .unwrap();
}

/// A gateway that knows version 1 for long, in `state` for version 2 if given, with devices that have version 1.
fn fleet(state: Option<i16>) -> (Gateway, Vec<Connection>) {
    let database = tokio::runtime::Runtime::new()
        .unwrap()
        .block_on(pg::shared().database())
        .unwrap();
    let gateway = Gateway::start_on(Some(&database), "");
    gateway.block_on(async {
        register(&gateway.state().store, 0..100).await;
        db_write(&database, "1", 0).await;
        if let Some(state) = state {
            db_write(&database, "2", state).await;
        }
    });
    let gateway = gateway.restart_on(Some(&database), || ());
    gateway.eventually(|| gateway.state().lookups.registry_index().len() >= 100);
    let known = (0..KNOWN).map(|number| device(number).firmware("1"));
    let known = gateway.block_on(persist_all(gateway.device_address(), known.collect::<Vec<_>>()));
    (gateway, known.into_iter().map(|known| known.connection).collect())
}

fn version(gateway: &Gateway) -> Value {
    let rows = gateway.all("/api/v1/firmware?", 10);
    let row = rows.into_iter().find(|row| row["firmware"] == "2");
    row.map_or(Value::Null, |mut row| row["version"].take())
}

fn is_refused(gateway: &Gateway, number: u32) -> bool {
    let attempt = gateway.block_on(attempt(gateway.device_address(), device(number).firmware("2")));
    attempt.outcome.is_err() && attempt.refused_with(503, "overloaded").slot.is_some()
}

/// Waits until `holds`, for 30 s at most.
fn until(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn new_version_is_limited_and_only_its_own_failures_are_evidence() {
    let (gateway, known) = fleet(None);
    let open = |number| {
        let attempt = gateway.block_on(attempt(gateway.device_address(), device(number).firmware("2")));
        attempt.admitted()
    };
    let mut sessions = vec![];
    // The stored versions are read shortly after the start.
    until(|| {
        sessions = vec![open(30)];
        !version(&gateway).is_null()
    });
    sessions.extend((31..30 + ROOM).map(open));
    assert!(is_refused(&gateway, 60));
    assert!(gateway.metric("seawall_version_refusals_total") <= 1);

    // By an operator, by a newer session, and by the devices.
    for number in 31..34 {
        let path = format!("/api/v1/devices/{}/disconnect", id(number));
        assert!(gateway.post(&path, json!({})).status < 300);
    }
    let before = version(&gateway)["pending"]["failed"].as_u64().unwrap();
    sessions.drain(10..);
    gateway.eventually(|| version(&gateway)["pending"]["failed"] == before + 10);
    gateway.eventually(|| version(&gateway)["pending"]["began"] == 17 + before);

    let shown = version(&gateway);
    assert_eq!((&shown["state"], &shown["room"]), (&json!("unproven"), &json!(ROOM)));
    assert_eq!(shown["young"], 7, "{shown}");
    // Room was given back, and the rate allows one each 6 s.
    until(|| !is_refused(&gateway, 61));
    drop((sessions, known));
}

#[test]
fn stored_verdict_limits_after_a_restart_until_a_person_clears_it() {
    let (gateway, known) = fleet(Some(2));
    let alarms = || gateway.get("/api/v1/alarms").json()["items"].clone();
    gateway.eventually(|| alarms()[0]["kind"] == "version_worse");
    assert_eq!(alarms()[0]["action"], "seawall firmware clear -- 2");
    let admitted: Vec<_> = (30..50)
        .map(|number| {
            let attempt = gateway.block_on(attempt(gateway.device_address(), device(number).firmware("2")));
            attempt.admitted()
        })
        .collect();
    assert!(is_refused(&gateway, 60));
    assert_eq!(version(&gateway)["state"], "worse");

    let clear = |token: &str| {
        let body = json!({ "firmware": "2" });
        gateway.call_as(token, "POST", "/api/v1/firmware/clear", Some(&body))
    };
    let operator = gateway.token("operator");
    assert_eq!(clear(&gateway.token("viewer")).status, 403);
    assert_eq!(clear(&operator).json()["before"], "worse");

    assert_eq!(clear(&operator).status, 404);
    assert!(!is_refused(&gateway, 60));
    gateway.eventually(|| alarms() == json!([]));
    let audit = gateway.get("/api/v1/audit").json();
    let record = &audit["items"][0];
    assert_eq!(record["action"], "firmware.clear", "{audit}");
    assert_eq!(record["before"], json!({ "state": "worse" }), "{audit}");
    drop((admitted, known));
}

#[test]
fn first_versions_of_a_fleet_are_known_at_once() {
    let gateway = Gateway::start_on(None, "");
    gateway.block_on(register(&gateway.state().store, 0..60));
    let devices = (0..60).map(|number| device(number).firmware(if number < 30 { "1" } else { "2" }));

    let all = gateway.block_on(persist_all(gateway.device_address(), devices.collect::<Vec<_>>()));

    assert!(all.iter().all(|persisted| persisted.refusals == 0));
    let store = &gateway.state().store;
    until(|| {
        let stored = gateway.block_on(store.versions_changed(gateway.state().clock.wall()));
        stored.is_ok_and(|stored| stored.versions.len() == 2 && stored.is_young)
    });
    assert_eq!(version(&gateway), Value::Null);
    assert_eq!(gateway.metric("seawall_version_refusals_total"), 0);
}
