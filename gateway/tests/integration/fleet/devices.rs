//! Single devices: identity, the one session, and messages in both directions.

use std::time::{Duration, Instant};

use bytes::Bytes;
use firmware_sim::connection::{Connection, Credential, Received, Refused};
use seawall_gateway::{
    fleet::events::{Body, MESSAGE_BYTES_MAX, MESSAGE_KEPT_AT_LEAST},
    session::sessions::{Delivery, MAILBOX_LEN_MAX, Outgoing, OutgoingBody, PostError},
    store::DeviceChange,
};
use seawall_proto::{presence::Presence, record::DeviceState};
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, net::TcpStream, sync::oneshot, time::timeout};

use crate::harness::{
    devices::{Attempt, assert_alive, audit, block, device, end_of, id, new_device, plain, raw, with_wrong_secret},
    gateway::Gateway,
    wait::{PATIENCE, eventually},
};

#[tokio::test(flavor = "multi_thread")]
async fn second_session_replaces_the_first_and_stays() {
    let gateway = Gateway::start("").await;
    gateway.register(0..1).await;
    let mut first = gateway.session(&device(0)).await;

    let mut second = gateway.session(&device(0)).await;

    let (frames, code, _) = end_of(&mut first, PATIENCE).await;
    assert_eq!((frames.len(), code), (0, 4500));
    first.abort();
    eventually(|| gateway.metric("seawall_closes_total{reason=\"replaced\"}") == 1).await;
    assert_alive(&mut second).await;
    assert!(gateway.shared.sessions.get(id(0)).is_some());
    assert_eq!(gateway.metric("seawall_session_replacements_total "), 1);
    assert_eq!(gateway.metric("seawall_sessions "), 1);
    let went_offline = |body: &Body| matches!(body, Body::Presence { known, .. } if known.presence != Presence::Online);
    let events = gateway.shared.events.after(0, usize::MAX, usize::MAX).events;
    assert!(!events.iter().any(|event| went_offline(&event.body)));
    second.close(1000, "").await.unwrap();
    eventually(|| gateway.shared.sessions.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn session_that_does_not_read_is_replaced_all_the_same() {
    let gateway = Gateway::start("").await;
    gateway.register(0..1).await;
    let _never_read = gateway.connect(&device(0)).await.admitted();

    let mut kept = Vec::new();
    for _ in 0..5 {
        let mut newer = gateway.session(&device(0)).await;
        assert_alive(&mut newer).await;
        kept.push(newer);
    }

    assert_eq!(gateway.metric("seawall_session_replacements_total "), 5);
    assert_eq!(gateway.metric("seawall_sessions "), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_wrong_and_missing_credential_look_the_same() {
    let gateway = Gateway::start("").await;
    gateway.register(0..1).await;

    let unknown = gateway.connect(&device(7)).await;
    let wrong = gateway.connect(&with_wrong_secret(&device(0))).await;
    let asked = gateway.metric("seawall_lookup_statements_total ");
    let mut anonymous = device(0);
    anonymous.credential = Credential::Missing;
    let missing = gateway.connect(&anonymous).await;

    assert_eq!(gateway.metric("seawall_lookup_statements_total "), asked);
    for attempt in [&unknown, &wrong, &missing] {
        let refused = attempt.refused_with(401, "unauthorized");
        assert!((60_000..=300_000).contains(&refused.retry_after_ms.unwrap()));
        assert!(refused.header("www-authenticate").is_some());
        assert_eq!(without_hint(refused), without_hint(unknown.refused()));
    }
}

/// Headers and body without the drawn hint, and without the length that it changes.
fn without_hint(refused: &Refused) -> (Vec<(String, String)>, Value) {
    let drawn = ["retry-after", "seawall-retry-after-ms", "content-length"];
    let mut headers = refused.headers.clone();
    for (name, value) in &mut headers {
        if drawn.contains(&name.as_str()) {
            value.clear();
        }
    }
    let mut body: Value = serde_json::from_str(&refused.body).unwrap();
    assert!(body.as_object_mut().unwrap().remove("retry_after_ms").is_some());
    (headers, body)
}

#[tokio::test(flavor = "multi_thread")]
async fn disabled_is_told_to_the_right_credential_only() {
    let gateway = Gateway::start("").await;
    gateway.register(0..2).await;
    for (number, state) in [(0, DeviceState::Disabled), (1, DeviceState::Revoked)] {
        let change = DeviceChange {
            state: Some(state),
            ..DeviceChange::default()
        };
        let audit = audit("device.update");
        let changed = gateway.shared.store.device_update(id(number), &change, &audit);
        changed.await.unwrap().unwrap();
    }

    let disabled = gateway.connect(&device(0)).await;

    let hint = disabled.refused_with(403, "device_disabled").retry_after_ms.unwrap();
    assert!((900_000..=1_800_000).contains(&hint), "{hint}");
    for device in [with_wrong_secret(&device(0)), device(1), with_wrong_secret(&device(1))] {
        gateway.connect(&device).await.refused_with(401, "unauthorized");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_id_is_looked_up_once_and_gets_in_as_soon_as_it_is_registered() {
    let gateway = Gateway::start("").await;
    let asked = || gateway.metric("seawall_lookup_statements_total ");

    // A device that is switched on before it is registered, and retries before its hint.
    gateway.connect(&device(0)).await.refused_with(401, "unauthorized");
    let asked_before = asked();
    for _ in 0..9 {
        gateway.connect(&device(0)).await.refused_with(401, "unauthorized");
    }
    assert_eq!(asked(), asked_before);
    assert_eq!(gateway.metric("seawall_lookups_total{outcome=\"cached\"}"), 9);
    gateway.connect(&device(0)).await.refused_with(503, "throttled");
    let registered = Instant::now();
    gateway.register_as(&new_device(0)).await;
    gateway.shared.lookups.forget(id(0));

    gateway.session(&device(0)).await;
    assert!(registered.elapsed() < Duration::from_secs(1));
    assert_eq!(asked(), asked_before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn handshake_outcomes_sum_up_to_the_attempts() {
    let gateway = Gateway::start("[limits]\nhead_timeout_ms = 300\n").await;
    gateway.register(0..3).await;
    gateway.add_rule(block("6.*")).await;
    let mut attempts = 0;
    let mut counted = |status: u16, expected: u16| {
        assert_eq!(status, expected);
        attempts += 1;
    };

    for number in 0..3 {
        let kept = gateway.session(&device(number)).await;
        counted(101, 101);
        drop(kept);
    }
    let status = |attempt: &Attempt| attempt.refused().status;
    counted(status(&gateway.connect(&device(8)).await), 401);
    counted(status(&gateway.connect(&with_wrong_secret(&device(1))).await), 401);
    counted(status(&gateway.connect(&device(1).firmware("6.1")).await), 403);
    for (request, expected) in [
        ("GET /v1/connect HTTP/1.1\r\nHost: x\r\n\r\n", 426),
        ("POST /v1/connect HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 405),
        (
            "GET /v1/connect HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSeawall-Device: not-a-uuid\r\n\r\n",
            400,
        ),
        ("\u{1}\u{2}garbage\r\n\r\n", 400),
        // Without its end: it is too slow.
        ("GET /v1/connect HTTP/1.1\r\nHost: x\r\n", 408),
    ] {
        counted(raw(gateway.devices, request.as_bytes()).await, expected);
    }
    let long = format!("GET /v1/connect HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(20_000));
    counted(raw(gateway.devices, long.as_bytes()).await, 431);
    let mut gone = TcpStream::connect(gateway.devices).await.unwrap();
    gone.write_all(b"GET /v1/conn").await.unwrap();
    drop(gone);
    counted(0, 0);
    // These are not attempts.
    drop(TcpStream::connect(gateway.devices).await.unwrap());
    assert_eq!(gateway.readyz().await, 200);

    eventually(|| gateway.metric("seawall_connections_total{outcome=\"silent\"}") == 1).await;
    eventually(|| gateway.metric("seawall_handshakes_total{outcome=\"abandoned\"}") == 1).await;
    assert_eq!(gateway.metric("seawall_handshakes_total{"), attempts);
    assert_eq!(gateway.metric("seawall_handshakes_total{outcome=\"admitted\"}"), 3);
    assert_eq!(
        gateway.metric("seawall_connections_total{outcome=\"request\"}"),
        attempts
    );
    assert_eq!(gateway.metric("seawall_connections_total{outcome=\"probe\"}"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn message_from_a_device_is_acknowledged_once_it_is_in_the_event_buffer() {
    let gateway = Gateway::start("").await;
    gateway.register(0..2).await;
    let mut speaking = gateway.session(&device(0)).await;
    let mut silent = gateway.session(&plain(device(1))).await;

    let message = json!({"type": "message", "id": "m1", "topic": "temperature", "payload": {"celsius": 21.5}});
    speaking.send_json(&message).await.unwrap();
    assert_eq!(
        speaking.next_json(PATIENCE).await.unwrap(),
        json!({"type": "ack", "id": "m1"})
    );
    silent.send_json(&json!({"any": "thing"})).await.unwrap();

    let messages = || -> Vec<Value> {
        let events = gateway.shared.events.after(0, usize::MAX, usize::MAX).events;
        let all = events.iter().map(|event| serde_json::to_value(&**event).unwrap());
        all.filter(|event| event["type"] == "message").collect()
    };
    assert_eq!(messages()[0]["device"], id(0).to_string());
    assert_eq!(messages()[0]["message"], "m1");
    assert_eq!(messages()[0]["topic"], "temperature");
    assert_eq!(messages()[0]["payload"], json!({"celsius": 21.5}));
    eventually(|| messages().len() == 2).await;
    assert_eq!(messages()[1]["payload"], json!("{\"any\":\"thing\"}"));
    assert_eq!(
        gateway.metric("seawall_messages_total{direction=\"in\",outcome=\"accepted\"}"),
        2
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn full_event_buffer_acknowledges_nothing_until_there_is_room() {
    let gateway = Gateway::start("").await;
    gateway.register(0..1).await;
    let mut session = gateway.session(&device(0)).await;
    let payload = "x".repeat(60 * 1024);
    let fitting = MESSAGE_BYTES_MAX / (payload.len() + 2);
    let message = |id: usize| json!({"type": "message", "id": id.to_string(), "topic": "t", "payload": payload});

    for id in 0..fitting + 5 {
        session.send_json(&message(id)).await.unwrap();
        if id < fitting {
            let ack = session.next_json(PATIENCE).await.unwrap();
            assert_eq!(ack, json!({"type": "ack", "id": id.to_string()}));
        }
    }
    // Answers are in order: a message that was not acknowledged before this error never is.
    session.send_json(&json!({"type": "nonsense"})).await.unwrap();
    let next = session.next_json(PATIENCE).await.unwrap();

    assert_eq!((&next["type"], &next["code"]), (&json!("error"), &json!("bad_frame")));
    assert_eq!(
        gateway.metric("seawall_messages_total{direction=\"in\",outcome=\"buffer_full\"}"),
        5
    );
    // Messages leave the buffer by age. The device, which kept its message, sends it again.
    let deadline = std::time::Instant::now() + MESSAGE_KEPT_AT_LEAST + PATIENCE;
    loop {
        session.send_json(&message(fitting)).await.unwrap();
        session.send_json(&json!({"type": "nonsense"})).await.unwrap();
        if session.next_json(PATIENCE).await.unwrap()["type"] == "ack" {
            break;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "no room after {MESSAGE_KEPT_AT_LEAST:?}"
        );
        // Ten bad frames per minute are too many.
        tokio::time::sleep(MESSAGE_KEPT_AT_LEAST / 3).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn message_to_a_device_is_acked_by_it_or_sent_to_a_plain_one() {
    let gateway = Gateway::start("").await;
    gateway.register(0..2).await;
    let mut speaking = gateway.session(&device(0)).await;
    let mut silent = gateway.session(&plain(device(1))).await;

    let acked = post(&gateway, 0, OutgoingBody::Json("{\"reboot\":true}".into())).unwrap();
    let frame = speaking.next_json(PATIENCE).await.unwrap();
    assert_eq!(
        frame,
        json!({"type": "message", "id": "m", "payload": {"reboot": true}})
    );
    speaking.send_json(&json!({"type": "ack", "id": "m"})).await.unwrap();
    let sent = post(&gateway, 1, OutgoingBody::Json("hello".into())).unwrap();
    let sent_too = post(&gateway, 1, OutgoingBody::Binary(Bytes::from_static(&[0, 255]))).unwrap();

    assert_eq!(outcome(acked).await, Some(Delivery::Acked));
    assert_eq!(
        (outcome(sent).await, outcome(sent_too).await),
        (Some(Delivery::Sent), Some(Delivery::Sent))
    );
    assert_eq!(next(&mut silent).await, Received::Text("hello".to_owned()));
    assert_eq!(next(&mut silent).await, Received::Binary(vec![0, 255]));
}

#[tokio::test(flavor = "multi_thread")]
async fn message_without_an_end_is_told_to_whoever_waits() {
    let gateway = Gateway::start("").await;
    gateway.register(0..1).await;
    let session = gateway.session(&device(0)).await;

    let unanswered = post(&gateway, 0, OutgoingBody::Json("1".into())).unwrap();
    session.abort();

    assert_eq!(outcome(unanswered).await, None);
    eventually(|| gateway.shared.sessions.is_empty()).await;
    assert!(matches!(
        post(&gateway, 0, OutgoingBody::Json("1".into())),
        Err(PostError::Offline)
    ));
    assert_eq!(MAILBOX_LEN_MAX, 16);
}

fn post(gateway: &Gateway, number: u32, body: OutgoingBody) -> Result<oneshot::Receiver<Delivery>, PostError> {
    let (done, outcome) = oneshot::channel();
    let session = gateway.shared.sessions.get(id(number)).ok_or(PostError::Offline)?;
    session.post(Outgoing {
        id: "m".into(),
        body,
        done,
    })?;
    Ok(outcome)
}

/// `None` if the session ended first.
async fn outcome(waiting: oneshot::Receiver<Delivery>) -> Option<Delivery> {
    timeout(PATIENCE, waiting).await.expect("an outcome in time").ok()
}

/// The next frame that is not a ping.
async fn next(connection: &mut Connection) -> Received {
    loop {
        let frame = timeout(PATIENCE, connection.next_frame())
            .await
            .expect("a frame in time");
        if !matches!(frame, Received::Ping(_) | Received::Pong(_)) {
            return frame;
        }
    }
}
