//! The bounds at the door: what happens when they are reached, and that they open again.

use tokio::net::TcpStream;

use super::raw::{Device, ask, request, response};
use super::rig::{Gateway, eventually};

#[tokio::test]
async fn connection_over_the_figure_of_its_address_is_throttled() {
    let gateway = Gateway::start("[limits]\nconnections_per_address_max = 1\n").await;
    let lines = gateway.device_lines().await;
    let first = Device::connect(gateway.devices, &[&lines]).await;

    let second = ask(gateway.devices, request(&[&lines]).as_bytes()).await;

    assert_eq!((second.status, second.code().as_str()), (503, "throttled"));
    assert!(second.header("Seawall-Retry-After-Ms").is_some());
    drop(first);
    eventually(|| gateway.metric("seawall_sessions") == 0.0).await;
    Device::connect(gateway.devices, &[&lines]).await;
}

#[tokio::test]
async fn node_that_is_full_gives_slots() {
    let gateway = Gateway::start("[limits]\nconnections_max = 1\n").await;
    let lines = gateway.device_lines().await;
    let _first = Device::connect(gateway.devices, &[&lines]).await;

    let second = ask(gateway.devices, request(&[&lines]).as_bytes()).await;

    assert_eq!((second.status, second.code().as_str()), (503, "overloaded"));
    assert!(second.header("Seawall-Slot").is_some(), "{second:?}");
    let after_ms: u64 = second.header("Seawall-Retry-After-Ms").unwrap().parse().unwrap();
    assert!((30_000..=600_000).contains(&after_ms));
}

#[tokio::test]
async fn handshakes_a_second_by_address_are_counted_where_configured() {
    let gateway = Gateway::start("[limits]\nhandshakes_per_second_per_address_max = 2\n").await;

    let mut codes = Vec::new();
    for _ in 0..4 {
        codes.push(ask(gateway.devices, request(&[]).as_bytes()).await.code());
    }

    assert_eq!(codes[0], "bad_request");
    assert!(codes.contains(&"throttled".to_owned()), "{codes:?}");
}

#[tokio::test]
async fn silent_connections_do_not_keep_a_device_out() {
    let gateway = Gateway::start("[limits]\nhandshakes_max = 8\nhead_timeout_ms = 4000\n").await;
    let lines = gateway.device_lines().await;
    let mut silent = Vec::new();
    for _ in 0..12 {
        silent.push(TcpStream::connect(gateway.devices).await.unwrap());
    }

    let answer = ask(gateway.devices, request(&[&lines]).as_bytes()).await;

    assert!([101, 503].contains(&answer.status), "{answer:?}");
}

#[tokio::test]
async fn crowd_behind_one_address_is_not_turned_away() {
    let gateway = Gateway::start("[limits]\nhandshakes_max = 8\n").await;
    let mut asking = Vec::new();
    for _ in 0..200 {
        let mut stream = TcpStream::connect(gateway.devices).await.unwrap();
        asking.push(tokio::spawn(async move {
            tokio::io::AsyncWriteExt::write_all(&mut stream, request(&[]).as_bytes())
                .await
                .unwrap();
            response(&mut stream).await.code()
        }));
    }

    for answer in asking {
        assert_eq!(answer.await.unwrap(), "bad_request");
    }
}
