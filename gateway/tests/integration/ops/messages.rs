//! Messages to devices.

use serde_json::{Value, json};

use super::rig::{Gateway, V1};

#[test]
fn an_acknowledged_message_is_200() {
    let gateway = Gateway::start();
    let (id, mut device) = gateway.connected(&[V1]);
    let path = format!("/api/v1/devices/{id}/messages");

    let answer = std::thread::scope(|scope| {
        let sending = scope.spawn(|| gateway.post(&path, json!({"payload": {"do": ["it", null]}})));
        let message: Value = gateway.block_on(async {
            device.frame().await;
            let message: Value = serde_json::from_str(device.frame().await.text()).unwrap();
            device
                .text(&json!({"type": "ack", "id": message["id"]}).to_string())
                .await;
            message
        });
        assert_eq!(
            (&message["type"], &message["payload"]),
            (&json!("message"), &json!({"do": ["it", null]}))
        );
        sending.join().unwrap()
    });

    assert_eq!((answer.status, &answer.json()["state"]), (200, &json!("acked")));
    assert!(answer.json()["id"].is_string());
}

#[test]
fn a_message_without_acknowledgement_is_202() {
    let gateway = Gateway::start_with("[session]\nack_timeout_ms = 100\n");
    let (id, _silent) = gateway.connected(&[V1]);

    let answer = gateway.post(&format!("/api/v1/devices/{id}/messages"), json!({"payload": null}));

    assert_eq!((answer.status, &answer.json()["state"]), (202, &json!("sent")));
}

#[test]
fn a_plain_session_gets_text_and_bytes_as_they_are() {
    let gateway = Gateway::start();
    let (id, mut device) = gateway.connected(&[]);
    let path = format!("/api/v1/devices/{id}/messages");
    let mut sent = |body: Value| {
        let answer = gateway.post(&path, body);
        assert_eq!(
            (answer.status, &answer.json()["state"]),
            (202, &json!("sent")),
            "{answer:?}"
        );
        gateway.block_on(device.frame())
    };

    assert_eq!(sent(json!({"payload": "reboot \"now\""})).text(), "reboot \"now\"");
    assert_eq!(sent(json!({"payload": {"a": 1}})).text(), "{\"a\":1}");
    let binary = sent(json!({"payload_base64": "AAH/"}));
    assert_eq!((binary.opcode, binary.payload.as_slice()), (2, &[0, 1, 255][..]));
}

#[test]
fn messages_that_cannot_be_sent_say_why() {
    let gateway = Gateway::start_with("[session]\nack_timeout_ms = 100\n");
    let (offline, _) = gateway.register(json!({}));
    let (id, _device) = gateway.connected(&[V1]);
    let send = |id: &str, body: Value| gateway.post(&format!("/api/v1/devices/{id}/messages"), body).problem();

    assert_eq!(send(&offline, json!({"payload": 1})), (409, "device_offline".into()));
    assert_eq!(
        send(&uuid::Uuid::from_u128(7).to_string(), json!({"payload": 1})),
        (404, "not_found".into())
    );
    assert_eq!(send(&id, json!({"payload_base64": "AA=="})), (422, "invalid".into()));
    assert_eq!(send(&id, json!({})), (422, "invalid".into()));
    assert_eq!(
        send(&id, json!({"payload": 1, "payload_base64": "AA=="})),
        (422, "invalid".into())
    );
    assert_eq!(
        send(&id, json!({"payload": "x".repeat(64 * 1024)})),
        (413, "too_large".into())
    );
    assert_eq!(send(&id, json!({"payload": 1, "colour": 1})), (422, "invalid".into()));
}

#[test]
fn a_full_mailbox_is_429_and_a_session_that_ends_is_409() {
    let gateway = Gateway::start();
    let (id, mut device) = gateway.connected(&[V1]);
    let path = format!("/api/v1/devices/{id}/messages");

    let statuses = std::thread::scope(|scope| {
        // More than both socket buffers hold, so that a write waits and further messages fill the mailbox.
        let waiting: Vec<_> = (0..60)
            .map(|_| scope.spawn(|| gateway.post(&path, json!({"payload": "x".repeat(60_000)})).status))
            .collect();
        gateway.block_on(async {
            device.frame().await;
            device.frame().await;
        });
        gateway.eventually(|| counted(&gateway, "mailbox_full") > 0);
        drop(device);
        waiting
            .into_iter()
            .map(|waiting| waiting.join().unwrap())
            .collect::<Vec<_>>()
    });

    assert!(statuses.contains(&409) && statuses.contains(&429), "{statuses:?}");
    assert!(
        statuses.iter().all(|status| [202, 409, 429].contains(status)),
        "{statuses:?}"
    );
    let counted = counted(&gateway, "mailbox_full");
    assert_eq!(counted, statuses.iter().filter(|status| **status == 429).count());
}

/// Number of messages to devices with this outcome.
fn counted(gateway: &Gateway, outcome: &str) -> usize {
    let series = format!("seawall_messages_total{{direction=\"out\",outcome=\"{outcome}\"}}");
    gateway.metric(&series) as usize
}

#[test]
fn every_call_has_one_outcome_in_the_metrics() {
    let gateway = Gateway::start_with("[session]\nack_timeout_ms = 100\n");
    let (offline, _) = gateway.register(json!({}));
    let (id, _silent) = gateway.connected(&[V1]);
    let send = |id: &str, body: Value| gateway.post(&format!("/api/v1/devices/{id}/messages"), body).status;

    assert_eq!(send(&id, json!({"payload": 1})), 202);
    assert_eq!(send(&id, json!({})), 422);
    assert_eq!(send(&offline, json!({"payload": 1})), 409);

    let outcomes =
        ["sent", "refused", "device_offline", "acked", "mailbox_full"].map(|outcome| counted(&gateway, outcome));
    assert_eq!(outcomes, [1, 1, 1, 0, 0]);
}

#[test]
fn messages_beyond_those_waited_for_count_as_sent_while_the_device_is_online() {
    let gateway = Gateway::start_with("[session]\nack_timeout_ms = 5000\n");
    let (id, mut device) = gateway.connected(&[V1]);
    let path = format!("/api/v1/devices/{id}/messages");

    let statuses = std::thread::scope(|scope| {
        let sending: Vec<_> = (0..70)
            .map(|_| scope.spawn(|| gateway.post(&path, json!({"payload": 1})).status))
            .collect();
        gateway.block_on(async {
            // The welcome, and the messages that the mailbox accepted: none of them is acknowledged.
            for _ in 0..67 {
                if tokio::time::timeout(std::time::Duration::from_secs(3), device.frame())
                    .await
                    .is_err()
                {
                    break;
                }
            }
        });
        sending
            .into_iter()
            .map(|sending| sending.join().unwrap())
            .collect::<Vec<_>>()
    });

    assert!(!statuses.contains(&409), "{statuses:?}");
    assert!(statuses.contains(&202), "{statuses:?}");
}

#[test]
fn a_message_is_in_the_audit_log_without_its_payload() {
    let gateway = Gateway::start_with("[session]\nack_timeout_ms = 100\n");
    let operator = gateway.token("operator");
    let (v1, _first) = gateway.connected(&[V1]);
    let (plain, _second) = gateway.connected(&[]);
    let (offline, _) = gateway.register(json!({}));
    let send = |id: &str, body: Value| {
        let path = format!("/api/v1/devices/{id}/messages");
        gateway.call_as(&operator, "POST", &path, Some(&body))
    };

    let sent = send(&v1, json!({"payload": {"open": "sesame"}})).json();
    send(&plain, json!({"payload_base64": "AAH/"}));
    send(&offline, json!({"payload": "lost"}));

    let messages = || {
        let log = gateway.all("/api/v1/audit?", 100);
        log.into_iter()
            .filter(|line| line["action"] == "device.message")
            .collect::<Vec<_>>()
    };
    gateway.eventually(|| messages().len() == 2);
    for (id, kind, bytes) in [(&v1, "json", 17), (&plain, "binary", 3)] {
        let log = messages();
        let line = log.iter().find(|line| line["subject"] == **id).unwrap();
        assert_eq!(line["actor"], "test operator");
        assert_eq!(
            (&line["after"]["kind"], &line["after"]["bytes"]),
            (&json!(kind), &json!(bytes))
        );
        assert!(!line.to_string().contains("sesame"), "{line}");
        if kind == "json" {
            assert_eq!(line["after"]["message"], sent["id"]);
        }
    }
}
