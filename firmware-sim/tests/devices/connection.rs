use std::time::Duration;

use firmware_sim::connection::{Connection, Credential, DeviceConfig, OpenError, Received};
use futures_util::{SinkExt, StreamExt};
use serde_json::json;
use tokio_tungstenite::tungstenite::{
    Message,
    protocol::{CloseFrame, frame::coding::CloseCode},
};

use crate::{DEADLINE, gateway::Gateway};

fn config() -> DeviceConfig {
    DeviceConfig::new(
        "00000000-0000-4000-8000-000000000001".parse().unwrap(),
        "secret-of-a-device",
    )
}

#[tokio::test]
async fn refusal_is_read_with_its_code_hint_and_slot() {
    let gateway = Gateway::start(|_, attempt| attempt.refuse("overloaded", 23_417, "slot-1")).await;

    let error = Connection::open(&gateway.url(), &config()).await.unwrap_err();

    let refused = error.refused().unwrap();
    assert_eq!((refused.status, refused.code.as_deref()), (503, Some("overloaded")));
    assert_eq!(
        (refused.retry_after_ms, refused.slot.as_deref()),
        (Some(23_417), Some("slot-1"))
    );
    assert_eq!(refused.header("retry-after"), Some("24"));
    assert_eq!(error.to_string(), "refused with 503 overloaded, retry in 23417 ms");
}

#[tokio::test]
async fn everything_a_device_says_of_itself_is_sent_once() {
    let gateway = Gateway::start(|_, attempt| async {
        attempt.welcome().await.next().await;
    })
    .await;
    let mut config = config().firmware("3.8.0-b3");
    config.model = Some("m1".into());
    config.tenant = Some("acme".into());
    config.slot = Some("s".into());
    config.resume = Some("r".into());
    config.headers = vec![("X-Extra".into(), "1".into())];

    let connection = Connection::open(&gateway.url(), &config).await.unwrap();

    assert_eq!(connection.protocol(), Some("seawall.v1"));
    let headers = &gateway.seen()[0].headers;
    for (name, value) in [
        ("seawall-device", "00000000-0000-4000-8000-000000000001"),
        ("authorization", "Bearer secret-of-a-device"),
        ("seawall-firmware", "3.8.0-b3"),
        ("seawall-model", "m1"),
        ("seawall-tenant", "acme"),
        ("seawall-slot", "s"),
        ("seawall-resume", "r"),
        ("x-extra", "1"),
        ("host", &gateway.addr.to_string()),
    ] {
        assert_eq!(headers.get(name).map(String::as_str), Some(value), "{name}");
    }
}

#[tokio::test]
async fn basic_credentials_carry_the_id() {
    let gateway = Gateway::start(|_, attempt| attempt.refuse("unauthorized", 1, "")).await;
    let mut config = config();
    config.credential = Credential::Basic("secret-of-a-device".into());

    let _ = Connection::open(&gateway.url(), &config).await;

    let headers = &gateway.seen()[0].headers;
    assert_eq!(
        headers["authorization"],
        "Basic MDAwMDAwMDAtMDAwMC00MDAwLTgwMDAtMDAwMDAwMDAwMDAxOnNlY3JldC1vZi1hLWRldmljZQ=="
    );
    assert!(!headers.contains_key("seawall-device"));
}

#[tokio::test]
async fn frames_go_both_ways_and_the_close_is_read() {
    let gateway = Gateway::start(|_, attempt| async {
        let mut socket = attempt.welcome().await;
        socket.send(Message::Ping(vec![1].into())).await.unwrap();
        let echo = socket.next().await;
        assert!(matches!(echo, Some(Ok(Message::Pong(_)))), "{echo:?}");
        let Some(Ok(Message::Text(text))) = socket.next().await else {
            panic!("no text came");
        };
        assert_eq!(text.as_str(), r#"{"type":"heartbeat"}"#);
        let frame = CloseFrame {
            code: CloseCode::from(4003),
            reason: "{}".into(),
        };
        socket.close(Some(frame)).await.unwrap();
        while socket.next().await.is_some() {}
    })
    .await;

    let mut connection = Connection::open(&gateway.url(), &config()).await.unwrap();

    assert_eq!(connection.next_json(DEADLINE).await.unwrap()["type"], "welcome");
    assert_eq!(connection.next_frame().await, Received::Ping(vec![1]));
    connection.send_json(&json!({"type": "heartbeat"})).await.unwrap();
    assert_eq!(connection.closed(DEADLINE).await.unwrap(), (4003, "{}".into()));
}

#[tokio::test]
async fn silent_gateway_is_given_up() {
    let gateway = Gateway::start(|_, attempt| async {
        std::future::pending::<()>().await;
        drop(attempt);
    })
    .await;
    let mut config = config();
    config.open_timeout = Duration::from_millis(50);

    let error = Connection::open(&gateway.url(), &config).await.unwrap_err();

    assert!(matches!(error, OpenError::TimedOut(_)), "{error}");
}

#[tokio::test]
async fn abort_is_a_reset() {
    let (tx, rx) = tokio::sync::oneshot::channel();
    let tx = std::sync::Arc::new(std::sync::Mutex::new(Some(tx)));
    let gateway = Gateway::start(move |_, attempt| {
        let tx = tx.lock().unwrap().take();
        async move {
            let mut socket = attempt.welcome().await;
            let end = socket.next().await;
            let _ = tx.unwrap().send(format!("{end:?}"));
        }
    })
    .await;
    let connection = Connection::open(&gateway.url(), &config()).await.unwrap();

    connection.abort();

    let end = rx.await.unwrap();
    assert!(end.contains("ConnectionReset"), "{end}");
}
