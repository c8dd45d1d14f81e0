//! Strangers: what is sent before a session, or not sent.

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
use crate::wire::raw::request;

/// Connections that each attack holds at a time.
const ATTACKERS: usize = 650;
/// With room for fewer than that: 60, and 480 aside. Where nobody is given up before the time is over, devices wait for 1.5 s and more.
const SMALL_DOOR: &str = "[limits]\nhandshakes_max = 60\n";
/// Of which so many are taken at any time, once the attack is on: those given up come again.
const SMALL_DOOR_HELD: u64 = 450;
/// A slow one sends a byte so often.
const DRIP: Duration = Duration::from_millis(300);
/// Time until an attacker comes again whose connection has ended, or was refused by the kernel.
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
    let mut siege = Siege::of_tcp(SMALL_DOOR).await;
    let address = siege.address;
    siege.attack(ATTACKERS, |number| {
        drip(address, one_of(400, number), "GET /v1/connect HTTP/1.1\r\nX-Slow: ")
    });
    siege.is_on(SMALL_DOOR_HELD).await;
    siege.survives().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_tls_handshakes_keep_nobody_out() {
    let mut siege = Siege::of_tls(SMALL_DOOR).await;
    let address = siege.address;
    siege.attack(ATTACKERS, |number| {
        // The type of a record, and that it has 512 bytes; or nothing at all. Those that send something have no room aside: 585 for 540.
        let beginning = if number % 10 == 0 {
            ""
        } else {
            "\u{16}\u{3}\u{1}\u{2}\u{0}"
        };
        drip(address, one_of(400, number), beginning)
    });
    siege.is_on(SMALL_DOOR_HELD).await;
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
            // A thousand addresses, whoever of the sixty connects.
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
async fn requests_of_strangers_keep_nobody_out() {
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

/// Sends this, then a byte now and then, for ever and again.
async fn drip(address: SocketAddr, source: Ipv4Addr, beginning: &'static str) {
    let mut space = [0; 1024];
    loop {
        if let Ok(mut stream) = dial_from(source, address).await
            && stream.write_all(beginning.as_bytes()).await.is_ok()
        {
            loop {
                // Answered, or ended.
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

/// Leaves at once, or says something that is no request, or half of one.
async fn one_of_a_flood(mut stream: TcpStream, turn: usize) {
    let said: &[u8] = match turn % 4 {
        0 => b"",
        1 => b"GET /v1/connect HT",
        2 => &[0xff; 300],
        _ => b"GET /v1/connect HTTP/1.1\r\n\r\n",
    };
    let _ = stream.write_all(said).await;
}
