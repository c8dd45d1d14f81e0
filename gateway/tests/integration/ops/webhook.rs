//! Alarms that are posted to a webhook.

use std::{fs, net::TcpListener};

use serde_json::json;
use tempfile::TempDir;

use super::rig::{Gateway, text};
use crate::harness::{
    process::{GatewayProcess, run},
    receiver::{Receiver, SECRET},
};

/// A kind of alarm that only the task which raised it ends.
const ALARM: &str = "duplicate_id";

/// Settings for a webhook at this address, and the directory with its secret.
fn settings(address: std::net::SocketAddr) -> (TempDir, String) {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("secret");
    fs::write(&file, format!("{SECRET}\n")).unwrap();
    let settings = format!(
        "[webhook]\nurl = \"http://{address}/hooks/very-private\"\nsecret_file = {:?}\n",
        file.to_str().unwrap()
    );
    (home, settings)
}

#[test]
fn alarm_is_posted_when_it_begins_and_when_it_ends_signed_and_once() {
    let receiver = Receiver::start(&[]);
    let (_home, settings) = settings(receiver.address);
    let gateway = Gateway::start_with(&settings);

    gateway.state().alarms.set(ALARM, true, "two rules");
    gateway.state().alarms.set(ALARM, true, "three rules");
    gateway.state().alarms.set(ALARM, false, "all is well");
    // It was no longer active.
    gateway.state().alarms.set(ALARM, false, "all is well");
    gateway.eventually(|| receiver.requests().len() >= 2);
    gateway.eventually(|| gateway.metric("seawall_webhook_deliveries_total{outcome=\"delivered\"}") == 2);

    let requests = receiver.requests();
    assert_eq!(requests.len(), 2);
    let [raised, cleared] = [requests[0].verified(), requests[1].verified()];
    assert_eq!(raised["type"], "alarm.raised");
    assert_eq!(raised["node"], &*gateway.state().node);
    let expected = json!({
        "kind": ALARM,
        "subject": "node",
        "severity": "warning",
        "state": "raised",
        "since": raised["timestamp"],
        "detail": "two rules",
    });
    assert_eq!(raised["data"], expected);
    assert_eq!(
        (&cleared["type"], &cleared["data"]["state"]),
        (&json!("alarm.cleared"), &json!("cleared"))
    );
    assert_eq!(cleared["data"]["since"], raised["data"]["since"]);
    assert_ne!(requests[0].header("webhook-id"), requests[1].header("webhook-id"));
    assert_eq!(gateway.metric("seawall_webhook_waiting"), 0);
}

#[test]
fn message_that_was_not_taken_is_sent_again_with_the_same_id_and_redirects_are_not_followed() {
    let elsewhere = Receiver::start(&[]);
    let redirect = format!("302 Found\r\nLocation: http://{}/", elsewhere.address);
    let receiver = Receiver::start(&[redirect.leak(), "500 Internal Server Error"]);
    let (_home, settings) = settings(receiver.address);
    let gateway = Gateway::start_with(&settings);

    gateway.state().alarms.set(ALARM, true, "lost");
    gateway.eventually(|| gateway.metric("seawall_webhook_deliveries_total{outcome=\"delivered\"}") == 1);

    let requests = receiver.requests();
    assert_eq!(requests.len(), 3);
    for request in &requests {
        assert_eq!(request.verified(), requests[0].verified());
        assert_eq!(request.header("webhook-id"), requests[0].header("webhook-id"));
        assert_eq!(request.path, "/hooks/very-private");
    }
    assert_eq!(
        gateway.metric("seawall_webhook_deliveries_total{outcome=\"retried\"}"),
        2
    );
    assert!(elsewhere.requests().is_empty());
}

#[test]
fn messages_wait_for_a_receiver_that_is_not_there_and_their_number_is_bounded() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (_home, settings) = settings(address);
    let gateway = Gateway::start_with(&settings);
    let state = gateway.state();
    for number in 0..1_005 {
        let data = json!({ "number": number });
        state
            .webhook
            .notify("test", state.clock.wall(), state.clock.now(), data);
    }

    gateway.eventually(|| gateway.metric("seawall_webhook_waiting") == 1_000);
    gateway.eventually(|| gateway.metric("seawall_webhook_deliveries_total{outcome=\"dropped\"}") == 5);
    // No other message waits for it.
    assert_eq!(
        gateway
            .post("/api/v1/rules", json!({"match": {"firmware": "=1"}, "effect": "block"}))
            .status,
        201
    );
    let receiver = Receiver::start_on(address, &[]);
    gateway.eventually(|| receiver.requests().len() >= 10);

    assert!(
        receiver
            .requests()
            .iter()
            .all(|request| request.verified()["type"] == "test")
    );
}

#[test]
fn test_message_says_what_came_back_and_no_log_line_has_the_secret_or_the_path() {
    let receiver = Receiver::start(&["204 No Content", "418 I'm a teapot"]);
    let (home, settings) = settings(receiver.address);
    let config = home.path().join("seawall.toml");
    fs::write(&config, settings).unwrap();
    let gateway = GatewayProcess::start(&["--config", config.to_str().unwrap()]).unwrap();

    let first = run(&mut gateway.operator(&["webhook", "test", "--json"])).unwrap();
    let second = run(&mut gateway.operator(&["webhook", "test"])).unwrap();

    assert!(first.status.success(), "{first:?}");
    let answer: serde_json::Value = serde_json::from_slice(&first.stdout).unwrap();
    assert_eq!((&answer["delivered"], &answer["status"]), (&json!(true), &json!(204)));
    assert_eq!(answer["receiver"], format!("http://{}", receiver.address));
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stdout).contains("418"), "{second:?}");
    let requests = receiver.requests();
    assert_eq!(requests.len(), 2, "a test is not repeated");
    assert_eq!(requests[0].verified()["type"], "webhook.test");
    assert_eq!(text(&answer["id"]), requests[0].header("webhook-id"));
    let told = [gateway.log().unwrap(), String::from_utf8(second.stdout).unwrap()].concat();
    for secret in [&SECRET[6..], "very-private"] {
        assert!(!told.contains(secret), "{told}");
    }
}

#[test]
fn test_without_a_webhook_says_so() {
    let gateway = Gateway::start();

    let refused = gateway.post("/api/v1/webhook/test", json!({}));

    assert_eq!(refused.problem(), (409, "conflict".into()));
    assert!(refused.text.contains("webhook.url"));
}

#[test]
fn secret_that_can_not_be_used_stops_the_start_without_being_shown() {
    let (home, settings) = settings("127.0.0.1:9".parse().unwrap());
    let config = home.path().join("seawall.toml");
    fs::write(&config, settings).unwrap();
    fs::write(home.path().join("secret"), "whsec_c2hvcnQgc2VjcmV0").unwrap();

    let Err(refused) = GatewayProcess::start(&["--config", config.to_str().unwrap()]) else {
        panic!("it starts");
    };

    let refused = format!("{refused:#}");
    assert!(
        refused.contains("webhook.secret_file") && refused.contains("whsec_ and 24 to 64 bytes"),
        "{refused}"
    );
    assert!(!refused.contains("c2hvcnQgc2VjcmV0"));
}
