//! Import of devices from CSV.

use std::fmt::Write as _;

use serde_json::json;

use super::rig::{Answer, Gateway};

pub fn import(gateway: &Gateway, query: &str, file: &str) -> Answer {
    let bearer = format!("Bearer {}", gateway.admin);
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "text/csv; charset=utf-8"),
    ];
    gateway.raw("POST", &format!("/api/v1/devices/import{query}"), &headers, file)
}

fn id(n: u128) -> uuid::Uuid {
    uuid::Uuid::from_u128(n)
}

#[test]
fn a_good_file_is_taken_once_and_skipped_the_second_time() {
    let gateway = Gateway::start();
    let mut file = String::from("id,secret,tenant\n");
    for n in 0..2_500 {
        writeln!(file, "{},0123456789abcdef,t{}", id(n), n % 2).unwrap();
    }

    let first = import(&gateway, "", &file);
    let second = import(&gateway, "", &file);

    assert_eq!(
        (first.status, first.json()),
        (201, json!({"added": 2500, "updated": 0, "skipped": 0}))
    );
    assert_eq!(
        (second.status, second.json()),
        (200, json!({"added": 0, "updated": 0, "skipped": 2500}))
    );
    assert_eq!(gateway.all("/api/v1/devices?tenant=t1&", 1000).len(), 1_250);
    gateway.connect(&id(3).to_string(), "0123456789abcdef", &[]);
    let audit = gateway.get("/api/v1/audit?limit=1").json();
    assert_eq!(audit["items"][0]["action"], "device.import");
}

#[test]
fn bad_lines_are_reported_by_number_and_nothing_is_taken() {
    let gateway = Gateway::start();
    let file = format!(
        "id,secret\n{},0123456789abcdef\nnope,0123456789abcdef\n{},short\n",
        id(1),
        id(2)
    );

    let refused = import(&gateway, "", &file);

    assert_eq!(refused.problem(), (422, "invalid".into()));
    let lines = refused.json()["bad_lines"].clone();
    assert_eq!((&lines[0]["number"], &lines[1]["number"]), (&json!(3), &json!(4)));
    assert_eq!(refused.json()["bad"], 2);
    assert!(!refused.text.contains("short") && !refused.text.contains("0123456789abcdef"));
    assert_eq!(gateway.all("/api/v1/devices?", 10).len(), 0);
}

#[test]
fn another_credential_is_a_bad_line_unless_update_is_asked_for() {
    let gateway = Gateway::start();
    let file = |secret: &str| format!("id,secret\n{},{secret}\n", id(1));
    import(&gateway, "", &file("0123456789abcdef"));

    let refused = import(&gateway, "", &file("fedcba9876543210"));
    let updated = import(&gateway, "?update=true", &file("fedcba9876543210"));

    assert_eq!(refused.problem().0, 422);
    assert_eq!(refused.json()["bad_lines"][0]["number"], 2);
    assert_eq!((updated.status, &updated.json()["updated"]), (200, &json!(1)));
    gateway.connect(&id(1).to_string(), "fedcba9876543210", &[]);
}

#[test]
fn another_credential_ends_the_session_of_the_one_before() {
    let gateway = Gateway::start();
    let file = |secret: &str| format!("id,secret\n{},0123456789abcdef\n{},{secret}\n", id(1), id(2));
    import(&gateway, "", &file("0123456789abcdef"));
    let _same = gateway.connect(&id(1).to_string(), "0123456789abcdef", &[]);
    let mut other = gateway.connect(&id(2).to_string(), "0123456789abcdef", &[]);

    import(&gateway, "?update=true", &file("fedcba9876543210"));

    assert_eq!(gateway.block_on(other.frame()).close().0, 4003);
    gateway.eventually(|| gateway.state().sessions.len() == 1);
}

#[test]
fn a_wrong_header_is_answered_even_when_a_large_file_follows() {
    let gateway = Gateway::start();
    let mut file = String::from("name,colour\n");
    file.push_str(&"x,y\n".repeat(1_000_000));

    let refused = import(&gateway, "", &file);

    assert_eq!(refused.problem(), (422, "invalid".into()));
    assert!(refused.json()["detail"].as_str().unwrap().contains("header"));
    assert_eq!(import(&gateway, "?colour=1", "id,secret\n").problem().0, 400);
    assert_eq!(import(&gateway, "", "").problem().0, 422);
}

#[test]
fn imported_devices_are_known_before_they_connect() {
    let gateway = Gateway::start();
    let file = format!("id,secret\n{},0123456789abcdef\n{},0123456789abcdef\n", id(1), id(2));

    assert_eq!(import(&gateway, "", &file).status, 201);

    gateway.eventually(|| gateway.state().lookups.registry_index().len() == 2);
    assert_eq!(gateway.get("/api/v1/node").json()["roster"]["devices"], 2);
}
