//! Devices whose ids are not UUIDs, on custom paths: how they connect, and how operators see them.

use serde_json::json;

use super::rig::{Gateway, text};
use crate::harness::raw::{ask, request};

const SETTINGS: &str = "[server]\npaths = [\"/v1/connect\", \"/ocpp/{device}\"]\n\
                        [identity]\nnamespace = \"6ba7b810-9dad-11d1-80b4-00c04fd430c8\"\n";
/// The UUIDv5 of `www.example.com` in that namespace (RFC 9562, appendix A.4).
const ID: &str = "2ed6657d-e927-568b-95e1-2665a8aea6a2";
const NAME: &str = "www.example.com";

#[test]
fn device_without_a_uuid_is_registered_connected_and_shown_with_both_ids() {
    let gateway = Gateway::start_with(SETTINGS);
    let (id, secret) = gateway.register(json!({ "id": NAME }));
    assert_eq!(id, ID);
    let basic = format!("Authorization: Bearer {secret}");

    let lines = [basic.as_str(), "Sec-WebSocket-Protocol: ocpp1.6"];
    let ask_at = |path: &str| {
        let head = request(&lines).replace("GET /v1/connect", &format!("GET {path}"));
        gateway.block_on(ask(gateway.device_address(), head.as_bytes())).status
    };
    assert_eq!(ask_at(&format!("//ocpp/{NAME}")), 101);
    assert_eq!(ask_at(&format!("/ocpp/{NAME}/")), 404);
    assert_eq!(ask_at(&format!("/v1/connect?device={NAME}")), 101);
    assert_eq!(ask_at("/ocpp/somebody-else"), 401);

    for path in [format!("/api/v1/devices/{ID}"), format!("/api/v1/devices/{NAME}")] {
        let shown = gateway.get(&path).json();
        assert_eq!(
            (text(&shown["id"]), text(&shown["external_id"])),
            (ID.into(), NAME.into())
        );
    }
    let listed = gateway.get("/api/v1/devices").json();
    assert_eq!(listed["items"][0]["external_id"], NAME);
    assert_eq!(gateway.get("/api/v1/devices/nobody").status, 404);
    assert_eq!(gateway.post("/api/v1/devices", json!({ "id": NAME })).status, 409);
    assert_eq!(gateway.post("/api/v1/devices", json!({ "id": "a\u{e9}" })).status, 422);
    let created = gateway.get("/api/v1/audit?limit=1").json();
    assert_eq!(created["items"][0]["after"]["external_id"], NAME);

    let events = gateway.state().events.after(0, 100, 1 << 20).events;
    let online = events
        .iter()
        .map(|event| serde_json::to_value(&**event).unwrap())
        .find(|event| event["type"] == "presence")
        .unwrap();
    assert_eq!((&online["device"], &online["external_id"]), (&json!(ID), &json!(NAME)));
}

#[test]
fn file_of_names_is_imported_and_updated() {
    let gateway = Gateway::start_with(SETTINGS);
    let bearer = format!("Bearer {}", gateway.admin);
    let headers = [("authorization", bearer.as_str()), ("content-type", "text/csv")];
    let import = |query: &str, file: &str| {
        gateway
            .raw("POST", &format!("/api/v1/devices/import{query}"), &headers, file)
            .json()
    };

    let added = import(
        "",
        &format!("Id;Secret\n{NAME};0123456789abcdef\nCP 02;0123456789abcdef\n"),
    );
    let updated = import("?update=true", &format!("id,secret\n{NAME},fedcba9876543210\n"));

    assert_eq!(added, json!({"added": 2, "updated": 0, "skipped": 0}));
    assert_eq!(updated, json!({"added": 0, "updated": 1, "skipped": 0}));
    assert_eq!(
        gateway.get(&format!("/api/v1/devices/{ID}")).json()["external_id"],
        NAME
    );
    assert_eq!(gateway.get("/api/v1/devices/CP%2002").json()["external_id"], "CP 02");
}

#[test]
fn file_of_names_names_the_devices_that_were_registered_by_their_ids() {
    let gateway = Gateway::start_with(SETTINGS);
    let bearer = format!("Bearer {}", gateway.admin);
    let headers = [("authorization", bearer.as_str()), ("content-type", "text/csv")];
    let import = |file: &str| {
        gateway
            .raw("POST", "/api/v1/devices/import?update=true", &headers, file)
            .json()
    };
    let named = || gateway.get(&format!("/api/v1/devices/{ID}")).json()["external_id"].clone();
    import(&format!("id,secret\n{ID},0123456789abcdef\n"));
    assert!(named().is_null());
    let revoked = gateway.state().resume.revision();

    let first = import(&format!("id,secret\n{NAME},0123456789abcdef\n"));
    let again = import(&format!("id,secret\n{NAME},0123456789abcdef\n"));

    assert_eq!(first, json!({"added": 0, "updated": 1, "skipped": 0}));
    assert_eq!(again, json!({"added": 0, "updated": 0, "skipped": 1}));
    assert_eq!(named(), NAME);
    assert_eq!(
        gateway.state().resume.revision(),
        revoked,
        "its resume tokens stay valid"
    );
}

#[test]
fn name_is_no_id_where_there_is_no_namespace() {
    let gateway = Gateway::start();

    assert_eq!(gateway.post("/api/v1/devices", json!({ "id": NAME })).status, 422);
    assert_eq!(gateway.get(&format!("/api/v1/devices/{NAME}")).status, 400);
    let (id, _) = gateway.register(json!({}));
    assert!(gateway.get(&format!("/api/v1/devices/{id}")).json()["external_id"].is_null());
}
