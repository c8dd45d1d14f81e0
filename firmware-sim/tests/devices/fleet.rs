use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use firmware_sim::{
    fleet::{Fleet, FleetConfig, FleetError},
    mix::Mix,
};
use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpListener;
use tokio_tungstenite::tungstenite::{
    Message,
    protocol::{CloseFrame, frame::coding::CloseCode},
};

use crate::{
    devices, eventually,
    gateway::{Attempt, Gateway},
};

/// Welcomes, and reads until the device has gone.
async fn host(attempt: Attempt) {
    let mut socket = attempt.welcome().await;
    while let Some(Ok(_)) = socket.next().await {}
}

fn config(gateway: &Gateway, count: usize, firmware: &str, profile: &str) -> FleetConfig {
    let mut config = FleetConfig::new(&gateway.url(), devices(count), firmware.parse().unwrap());
    config.profiles = Mix::all(profile);
    config
}

#[tokio::test]
async fn refused_device_returns_at_its_time_with_its_slot() {
    let gateway = Gateway::start(|number, attempt| async move {
        match number {
            0 => attempt.refuse("overloaded", 400, "slot-1").await,
            _ => host(attempt).await,
        }
    })
    .await;

    let fleet = Fleet::start(config(&gateway, 1, "3.8.0", "well-behaved"))
        .await
        .unwrap();

    eventually("the device is back", || fleet.stats().total().connected == 1).await;
    let seen = gateway.seen();
    let waited = seen[1].at.duration_since(seen[0].at);
    assert!((400..1400).contains(&waited.as_millis()), "{waited:?}");
    assert_eq!(seen[0].headers.get("seawall-slot"), None);
    assert_eq!(seen[1].headers["seawall-slot"], "slot-1");
    assert_eq!(
        (&*seen[1].headers["seawall-tenant"], &*seen[1].headers["seawall-model"]),
        ("acme", "m1")
    );
    let total = fleet.stats().total();
    assert_eq!(
        (total.attempts, total.refused["overloaded"], total.reconnects),
        (2, 1, 0)
    );
    fleet.stop().await;
}

#[tokio::test]
async fn messages_are_acked() {
    let gateway = Gateway::start(|_, attempt| async {
        let mut socket = attempt.welcome().await;
        let message = r#"{"type":"message","id":"m1","payload":1}"#;
        socket.send(Message::text(message)).await.unwrap();
        let ack = socket.next().await.unwrap().unwrap();
        assert_eq!(ack.into_text().unwrap().as_str(), r#"{"type":"ack","id":"m1"}"#);
        let code = CloseCode::from(4501);
        let frame = CloseFrame {
            code,
            reason: "revoked".into(),
        };
        socket.close(Some(frame)).await.unwrap();
        while socket.next().await.is_some() {}
    })
    .await;

    let fleet = Fleet::start(config(&gateway, 1, "3.8.0", "well-behaved"))
        .await
        .unwrap();

    eventually("the device was acking, and is revoked", || {
        fleet.stats().total().stopped == 1
    })
    .await;
    let total = fleet.stats().total();
    assert_eq!((total.messages, total.closed["4501"], total.waiting), (1, 1, 0));
    fleet.stop().await;
}

#[tokio::test]
async fn messages_of_their_own_are_sent_and_the_acks_counted() {
    let gateway = Gateway::start(|_, attempt| async {
        let mut socket = attempt.welcome().await;
        while let Some(Ok(Message::Text(text))) = socket.next().await {
            let frame: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(frame["type"], "message", "{text}");
            // Every third goes without: a full buffer means no ack.
            let number: u32 = frame["id"].as_str().unwrap().parse().unwrap();
            if !number.is_multiple_of(3) {
                let ack = serde_json::json!({"type": "ack", "id": frame["id"]});
                socket.send(Message::text(ack.to_string())).await.unwrap();
            }
        }
    })
    .await;
    let mut config = config(&gateway, 2, "3.8.0", "well-behaved");
    config.messages_every = Some(Duration::from_millis(20));

    let fleet = Fleet::start(config).await.unwrap();

    eventually("many are acked", || fleet.stats().total().acked >= 20).await;
    let total = fleet.stats().total();
    assert!(total.sent >= total.acked + total.acked / 2 - 4, "{total:?}");
    assert_eq!(total.messages, 0);
    fleet.stop().await;
}

#[tokio::test]
async fn dropped_fleet_resets_every_connection_and_returns() {
    let resets = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&resets);
    let gateway = Gateway::start(move |_, attempt| {
        let resets = Arc::clone(&counter);
        async move {
            let mut socket = attempt.welcome().await;
            let end = loop {
                match socket.next().await {
                    Some(Ok(_)) => {}
                    end => break format!("{end:?}"),
                }
            };
            resets.fetch_add(usize::from(end.contains("ConnectionReset")), Ordering::Relaxed);
        }
    })
    .await;
    let fleet = Fleet::start(config(&gateway, 20, "a=50%,b=50%", "immediate"))
        .await
        .unwrap();
    eventually("all are connected", || fleet.stats().total().connected == 20).await;

    fleet.drop_all();

    eventually("all are back", || fleet.stats().total().reconnects == 20).await;
    let stats = fleet.stats();
    assert_eq!((stats.total().connected, stats.versions["a"].connected), (20, 10));
    assert_eq!(stats.total().closed["lost"], 20);
    assert_eq!((stats.connect_latency.count(), stats.return_latency.count()), (40, 40));
    eventually("all were reset", || resets.load(Ordering::Relaxed) == 20).await;
    fleet.stop().await;
}

#[tokio::test]
async fn gateway_that_is_not_there_is_tried_again() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    drop(listener);
    let mut config = FleetConfig::new(&addr.to_string(), devices(3), Mix::all("1"));
    config.profiles = Mix::all("immediate");

    let fleet = Fleet::start(config).await.unwrap();
    eventually("attempts fail", || fleet.stats().total().failed > 6).await;
    let listener = TcpListener::bind(addr).await.unwrap();
    Gateway::on(listener, |_, attempt| host(attempt));

    eventually("all are connected", || fleet.stats().total().connected == 3).await;
    fleet.stop().await;
}

#[tokio::test]
async fn updated_devices_start_anew_with_their_version() {
    let gateway = Gateway::start(|_, attempt| host(attempt)).await;
    let fleet = Fleet::start(config(&gateway, 8, "3.8.0-b2", "well-behaved"))
        .await
        .unwrap();
    eventually("all are connected", || fleet.stats().total().connected == 8).await;

    let updated = fleet.set_share("3.8.0-b3", "25%".parse().unwrap()).unwrap();

    assert_eq!(updated, 2);
    eventually("the updated are back", || {
        fleet
            .stats()
            .versions
            .get("3.8.0-b3")
            .is_some_and(|version| version.connected == 2)
    })
    .await;
    let stats = fleet.stats();
    assert_eq!(
        (stats.versions["3.8.0-b2"].connected, stats.versions["3.8.0-b2"].devices),
        (6, 6)
    );
    let last: Vec<_> = gateway.seen().split_off(8);
    assert_eq!(last.len(), 2);
    assert!(last.iter().all(|seen| seen.headers["seawall-firmware"] == "3.8.0-b3"));
    fleet.stop().await;
}

#[tokio::test]
async fn device_without_a_version_names_none() {
    let gateway = Gateway::start(|_, attempt| host(attempt)).await;

    let fleet = Fleet::start(config(&gateway, 1, "(none)", "well-behaved"))
        .await
        .unwrap();

    eventually("it is connected", || fleet.stats().total().connected == 1).await;
    assert_eq!(gateway.seen()[0].headers.get("seawall-firmware"), None);
    fleet.stop().await;
}

#[tokio::test]
async fn duplicate_id_is_two_devices() {
    let gateway = Gateway::start(|_, attempt| host(attempt)).await;

    let fleet = Fleet::start(config(&gateway, 2, "1", "duplicate-id")).await.unwrap();

    eventually("four are connected", || fleet.stats().total().connected == 4).await;
    let mut ids: Vec<_> = gateway
        .seen()
        .iter()
        .map(|seen| seen.headers["seawall-device"].clone())
        .collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 2);
    fleet.stop().await;
}

#[tokio::test]
async fn stopped_fleet_says_goodbye() {
    let (tx, mut rx) = tokio::sync::mpsc::unbounded_channel();
    let gateway = Gateway::start(move |_, attempt| {
        let tx = tx.clone();
        async move {
            let mut socket = attempt.welcome().await;
            if let Some(Ok(Message::Close(Some(frame)))) = socket.next().await {
                tx.send(u16::from(frame.code)).unwrap();
                while socket.next().await.is_some() {}
            }
        }
    })
    .await;
    let fleet = Fleet::start(config(&gateway, 5, "1", "well-behaved")).await.unwrap();
    eventually("all are connected", || fleet.stats().total().connected == 5).await;

    let last = fleet.stop().await;

    assert_eq!(last.total().connected, 5);
    for _ in 0..5 {
        assert_eq!(rx.recv().await, Some(1000));
    }
}

#[tokio::test]
async fn fleet_begins_at_its_rate() {
    let gateway = Gateway::start(|_, attempt| host(attempt)).await;
    let mut config = config(&gateway, 11, "1", "well-behaved");
    config.per_second = std::num::NonZeroU32::new(20);

    let fleet = Fleet::start(config).await.unwrap();

    eventually("all are connected", || fleet.stats().total().connected == 11).await;
    let seen = gateway.seen();
    let took = seen[10].at.duration_since(seen[0].at);
    assert!(took > Duration::from_millis(400), "{took:?}");
    fleet.stop().await;
}

#[tokio::test]
async fn fleets_that_make_no_sense_are_refused() {
    let gateway = Gateway::start(|_, attempt| host(attempt)).await;

    let long = "x".repeat(65);
    for (config, words) in [
        (config(&gateway, 2, "1", "nice"), "no profile"),
        (config(&gateway, 2, &long, "well-behaved"), "not a version"),
        (config(&gateway, 2, "a=1,b=2", "well-behaved"), "add up to 3"),
    ] {
        let error: FleetError = Fleet::start(config).await.unwrap_err();

        assert!(error.to_string().contains(words), "{error}");
    }
}
