//! Drains by an operator's order.

use serde_json::json;

use super::rig::{Gateway, V1};
use crate::harness::raw::{ask, request};

#[test]
fn a_drain_is_started_looked_at_and_cancelled() {
    let gateway = Gateway::start();
    let (_, mut device) = gateway.connected(&[V1]);

    let started = gateway.post("/api/v1/drain", json!({"rate_per_second": 50, "deadline": "30s"}));
    let closed = gateway.block_on(async {
        device.frame().await;
        // It gets a resume token, then a hint, then the close.
        device.frame().await;
        device.frame().await;
        device.frame().await
    });
    drop(device);
    let ready = gateway.raw("GET", "/readyz", &[], "");
    let again = gateway.post("/api/v1/drain", json!({}));
    gateway.eventually(|| gateway.get("/api/v1/drain").json()["state"] == "drained");
    let cancelled = gateway.delete("/api/v1/drain");

    assert_eq!((started.status, &started.json()["state"]), (201, &json!("draining")));
    assert_eq!(closed.close().0, 1012);
    assert_eq!((ready.status, &ready.json()["reasons"]), (503, &json!(["draining"])));
    assert_eq!(again.problem(), (409, "conflict".into()));
    assert_eq!((cancelled.status, &cancelled.json()["state"]), (200, &json!("idle")));
    assert_eq!(gateway.delete("/api/v1/drain").problem(), (409, "conflict".into()));
    gateway.connected(&[]);
}

#[test]
fn a_drain_tells_live_sessions_their_slots_and_newcomers_to_wait() {
    let gateway = Gateway::start();
    let (id, secret) = gateway.register(json!({}));
    let mut device = gateway.connect(&id, &secret, &[V1]);
    gateway.block_on(device.frame());

    gateway.post("/api/v1/drain", json!({"rate_per_second": 50, "deadline": "30s"}));
    let fresh = gateway.block_on(device.frame());
    assert!(fresh.text().contains(r#""type":"resume""#), "{fresh:?}");
    let reconnect = gateway.block_on(device.frame());
    let closed = gateway.block_on(device.frame());
    let identity = format!("Seawall-Device: {id}\r\nAuthorization: Bearer {secret}");
    let refused = gateway.block_on(ask(gateway.device_address(), request(&[&identity]).as_bytes()));

    let told: serde_json::Value = serde_json::from_str(reconnect.text()).unwrap();
    let reason: serde_json::Value = serde_json::from_str(closed.close().1).unwrap();
    assert_eq!(
        (&told["type"], &told["reason"]),
        (&json!("reconnect"), &json!("draining"))
    );
    assert_eq!(
        (&told["slot"], &told["after_ms"]),
        (&reason["slot"], &reason["retry_after_ms"])
    );
    assert!(reason["slot"].is_string(), "{reason}");
    assert_eq!((refused.status, refused.code().as_str()), (503, "draining"));
    assert_eq!(gateway.delete("/api/v1/drain").status, 200);
    gateway.connect(&id, &secret, &[V1]);
}

#[test]
fn figures_out_of_bounds_start_nothing() {
    let gateway = Gateway::start();

    for body in [
        json!({"rate_per_second": 0}),
        json!({"rate_per_second": -1}),
        json!({"rate_per_second": 1e9}),
        json!({"deadline": "0s"}),
        json!({"deadline": "2days"}),
        json!({"deadline": "soon"}),
    ] {
        assert_eq!(
            gateway.post("/api/v1/drain", body.clone()).problem(),
            (422, "invalid".into()),
            "{body}"
        );
    }
    assert_eq!(gateway.get("/api/v1/drain").json()["state"], "idle");
}
