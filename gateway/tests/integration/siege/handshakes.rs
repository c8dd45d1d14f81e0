//! Attacks before a session: data that is sent, or withheld.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{Siege, dial_from, one_of};
use crate::harness::raw::request;

/// Number of connections that each attack holds at a time.
const ATTACKERS: usize = 650;
/// Room for fewer than that: 60 permits, and 480 parked handshakes. If no handshake were given up early, devices would
/// wait for 1.5 s and more.
const FEW_PERMITS: &str = "[limits]\nhandshakes_max = 60\n";
/// Number of handshakes that run at any time once the attack is on. Those that were given up reconnect.
const FEW_PERMITS_HELD: u64 = 450;
/// Interval at which a slow client sends a byte.
const DRIP: Duration = Duration::from_millis(300);
/// Time after which an attacker reconnects whose connection has ended, or was refused by the kernel.
const AGAIN: Duration = Duration::from_millis(5);

#[tokio::test(flavor = "multi_thread")]
async fn silence_from_one_address_keeps_nobody_out() {
    let mut siege = Siege::of_tcp("").await;
    let address = siege.address;
    siege.attack(ATTACKERS, |_| drip(address, one_of(1, 0), ""));
    siege.survives().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_heads_from_many_addresses_keep_nobody_out() {
    let mut siege = Siege::of_tcp(FEW_PERMITS).await;
    let address = siege.address;
    siege.attack(ATTACKERS, |number| {
        drip(address, one_of(400, number), "GET /v1/connect HTTP/1.1\r\nX-Slow: ")
    });
    siege.is_on(FEW_PERMITS_HELD).await;
    siege.survives().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_tls_handshakes_keep_nobody_out() {
    let mut siege = Siege::of_tls(FEW_PERMITS).await;
    let address = siege.address;
    siege.attack(ATTACKERS, |number| {
        // The type and the length (512 bytes) of a record, or nothing at all. Those that send something exceed the room
        // for parked handshakes: 585 for 540.
        let beginning = if number % 10 == 0 {
            ""
        } else {
            "\u{16}\u{3}\u{1}\u{2}\u{0}"
        };
        drip(address, one_of(400, number), beginning)
    });
    siege.is_on(FEW_PERMITS_HELD).await;
    siege.survives().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn flood_of_connects_from_one_address_keeps_nobody_out() {
    let mut siege = Siege::of_tcp("").await;
    let address = siege.address;
    siege.attack(60, |number| flood(address, one_of(1, 0), number));
    siege.survives().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn flood_of_connects_from_a_thousand_addresses_keeps_nobody_out() {
    let mut siege = Siege::of_tcp("").await;
    let address = siege.address;
    siege.attack(60, |number| async move {
        let mut turn = number;
        loop {
            // A thousand addresses, in any order of the connections.
            turn += 61;
            let connected = dial_from(one_of(1_000, turn), address).await;
            if let Ok(stream) = connected {
                one_of_a_flood(stream, turn).await;
            }
            sleep(AGAIN).await;
        }
    });
    siege.survives().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_outsiders_keep_no_device_out() {
    let mut siege = Siege::of_tcp("").await;
    let address = siege.address;
    siege.attack(30, |number| async move {
        let mut turn = number;
        loop {
            turn += 31;
            let id = uuid::Uuid::from_u128(turn as u128);
            let lines = format!("Seawall-Device: {id}\r\nAuthorization: Bearer nobodys-secret-at-all");
            if let Ok(mut stream) = dial_from(one_of(200, turn), address).await {
                let _ = stream.write_all(request(&[&lines]).as_bytes()).await;
                let _ = timeout(Duration::from_secs(5), stream.read_to_end(&mut Vec::new())).await;
            }
            sleep(AGAIN).await;
        }
    });
    siege.survives().await;
}

/// Sends this, then a byte at intervals, and starts again, without an end.
async fn drip(address: SocketAddr, source: Ipv4Addr, beginning: &'static str) {
    let mut space = [0; 1024];
    loop {
        if let Ok(mut stream) = dial_from(source, address).await
            && stream.write_all(beginning.as_bytes()).await.is_ok()
        {
            loop {
                // Answered, or closed.
                if timeout(DRIP, stream.read(&mut space)).await.is_ok() {
                    break;
                }
                if !beginning.is_empty() && stream.write_all(b"x").await.is_err() {
                    break;
                }
            }
        }
        sleep(AGAIN).await;
    }
}

async fn flood(address: SocketAddr, source: Ipv4Addr, number: usize) {
    let mut turn = number;
    loop {
        turn += 1;
        if let Ok(stream) = dial_from(source, address).await {
            one_of_a_flood(stream, turn).await;
        }
        sleep(AGAIN).await;
    }
}

/// Leaves at once, or sends something that is not a request, or half of one.
async fn one_of_a_flood(mut stream: TcpStream, turn: usize) {
    let said: &[u8] = match turn % 4 {
        0 => b"",
        1 => b"GET /v1/connect HT",
        2 => &[0xff; 300],
        _ => b"GET /v1/connect HTTP/1.1\r\n\r\n",
    };
    let _ = stream.write_all(said).await;
}
