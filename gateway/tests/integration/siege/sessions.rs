//! Devices that attackers control: data that is sent in a session, or not read.

use std::{io, net::SocketAddr, time::Duration};

use base64::Engine;
use firmware_sim::connection::Credential;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::spawn_blocking,
    time::{sleep, timeout},
};

use super::{STOLEN, Siege, dial_from, one_of};
use crate::harness::{
    devices::{device, id},
    raw::{masked, request, response},
    wait::{SHORT_PATIENCE, eventually},
};

const ATTACKERS: usize = 8;

/// A session of a stolen device.
async fn session(address: SocketAddr, number: usize) -> io::Result<TcpStream> {
    let config = device(STOLEN + u32::try_from(number).unwrap());
    let Credential::Bearer(secret) = &config.credential else {
        return Err(io::Error::other("no bearer"));
    };
    let lines = format!("Seawall-Device: {}\r\nAuthorization: Bearer {secret}", config.id);
    let mut stream = dial_from(one_of(1_000, number), address).await?;
    stream.write_all(request(&[&lines]).as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    if head.starts_with(b"HTTP/1.1 101 ") {
        Ok(stream)
    } else {
        sleep(Duration::from_millis(100)).await;
        Err(io::Error::other("refused"))
    }
}

/// Writes as long as data is accepted, and reads nothing; then again in a new session.
async fn flood(address: SocketAddr, number: usize, first: Vec<u8>, then: Vec<u8>) {
    loop {
        if let Ok(mut stream) = session(address, number).await
            && stream.write_all(&first).await.is_ok()
        {
            while let Ok(Ok(())) = timeout(Duration::from_secs(5), stream.write_all(&then)).await {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ping_floods_keep_nobody_out() {
    let mut siege = Siege::of_tcp("").await;
    let address = siege.address;
    let pings = masked(0x89, &[b'x'; 125]).repeat(100);
    siege.attack(ATTACKERS, |number| flood(address, number, Vec::new(), pings.clone()));
    siege.survives().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fragments_without_end_keep_nobody_out() {
    let mut siege = Siege::of_tcp("").await;
    let address = siege.address;
    let nothing = masked(0x00, b"").repeat(1_000);
    // Each keeps a core busy, on this side as well.
    siege.attack(ATTACKERS / 2, |number| {
        flood(address, number, masked(0x01, b"{"), nothing.clone())
    });
    siege.survives().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_that_come_a_byte_at_a_time_keep_nobody_out() {
    let mut siege = Siege::of_tcp("").await;
    let address = siege.address;
    siege.attack(STOLEN_FRAMES, |number| async move {
        loop {
            let Ok(mut stream) = session(address, number).await else {
                continue;
            };
            // The head of a frame of the maximum size, and then almost nothing.
            let frame = masked(0x81, &[b' '; 60_000]);
            let _ = stream.write_all(&frame[..20_000]).await;
            for byte in &frame[20_000..] {
                if stream.write_all(&[*byte]).await.is_err() {
                    break;
                }
                sleep(Duration::from_millis(50)).await;
            }
        }
    });
    siege.survives().await;
}

/// As many as there are stolen devices.
const STOLEN_FRAMES: usize = super::STOLEN_MAX as usize;

#[tokio::test(flavor = "multi_thread")]
async fn peers_that_never_read_what_operators_send_are_given_up() {
    const MESSAGES: usize = 40;
    let mut siege = Siege::of_tcp("[limits]\nwrite_timeout_ms = 1000\n[session]\nack_timeout_ms = 100\n").await;
    let address = siege.address;
    siege.attack(ATTACKERS, |number| async move {
        let Ok(stream) = session(address, number).await else {
            return;
        };
        std::future::pending::<()>().await;
        drop(stream);
    });
    let sessions = 1 + ATTACKERS as u64;
    eventually(|| siege.gateway.metric("seawall_sessions ").unwrap() == sessions).await;
    let (api, token) = (
        siege.gateway.addresses.ops,
        siege.gateway.data_dir().join("admin.token"),
    );
    let token = std::fs::read_to_string(token).unwrap();
    let senders: Vec<_> = (0..ATTACKERS)
        .map(|number| {
            let url = format!("http://{api}/api/v1/devices/{}/messages", id(STOLEN + number as u32));
            let token = token.trim().to_owned();
            spawn_blocking(move || send_large(&url, &token, MESSAGES))
        })
        .collect();

    for sender in senders {
        sender.await.unwrap();
    }

    let slow = "seawall_closes_total{reason=\"slow_reader\"}";
    eventually(|| siege.gateway.metric(slow).unwrap() == ATTACKERS as u64).await;
    siege.survives().await;
}

/// Sends messages of 45 KiB each, far more than the kernel buffers for a client that does not read.
fn send_large(url: &str, token: &str, count: usize) {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .proxy(None)
        .http_status_as_error(false)
        .timeout_global(Some(SHORT_PATIENCE))
        .build()
        .into();
    let payload = base64::engine::general_purpose::STANDARD.encode(vec![7; 45 * 1024]);
    let body = serde_json::json!({ "payload_base64": payload }).to_string();
    for _ in 0..count * 10 {
        let answer = agent
            .post(url)
            .header("Authorization", format!("Bearer {token}"))
            .header("Content-Type", "application/json")
            .send(&body)
            .unwrap();
        // The gateway has given it up.
        if answer.status() == 409 {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn session_that_says_more_than_it_may_is_closed_and_its_device_gets_in_again() {
    let siege = Siege::of_tcp("[limits]\nmessages_per_second = 10\nmessages_burst = 20\n").await;
    let mut stream = session(siege.address, 0).await.unwrap();
    stream.write_all(&masked(0x89, b"").repeat(200)).await.unwrap();

    let mut heard = Vec::new();
    let _ = timeout(SHORT_PATIENCE, stream.read_to_end(&mut heard)).await.unwrap();

    let policy = 1008_u16.to_be_bytes();
    assert!(heard.windows(2).any(|two| two == policy), "{heard:?}");
    drop(session(siege.address, 0).await.unwrap());
    siege.leaves_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn eager_peer_is_answered_before_its_frames() {
    let siege = Siege::of_tcp("").await;
    let mut stream = dial_from(one_of(1, 0), siege.address).await.unwrap();
    let eager = [request(&[]).into_bytes(), masked(0x89, b"x").repeat(1_000)].concat();
    stream.write_all(&eager).await.unwrap();

    assert_eq!(response(&mut stream).await.code(), "bad_request");
    drop(stream);
    siege.leaves_nothing().await;
}
