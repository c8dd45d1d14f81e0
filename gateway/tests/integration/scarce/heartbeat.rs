//! CPU time in a storm of connects: live sessions get theirs.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use firmware_sim::connection::Credential;
use tokio::task::{JoinSet, spawn_blocking};

use super::disk::import;
use crate::harness::{
    devices::{attempt, device, id},
    process::GatewayProcess,
    raw::{masked, request},
};

/// Sessions whose pings are timed, one after the other.
const LIVE: u32 = 20;
/// Devices that connect and leave repeatedly.
const STORMING: std::ops::Range<u32> = 100..300;
/// Time for which pings are timed, without and with the storm.
const TIMED_FOR: Duration = Duration::from_secs(3);
/// Maximum time of a ping in the storm, as a multiple, with [`MORE_MAX`] on top. It is a multiple of its time without a
/// storm, or of the wait of a new device if that is longer. The storm comes from this machine, which may have other
/// load: new devices show how much.
const TIMES_MAX: u32 = 5;
const MORE_MAX: Duration = Duration::from_millis(250);
/// Minimum number of attempts of a storm.
const ATTEMPTS_MIN: u64 = 600;

#[tokio::test(flavor = "multi_thread")]
async fn storm_of_connects_does_not_starve_live_sessions() {
    let gateway = spawn_blocking(|| GatewayProcess::start(&[])).await.unwrap().unwrap();
    import(&gateway, 0..STORMING.end);
    let address = gateway.addresses.devices;
    let (mut live, calm) = spawn_blocking(move || {
        let mut live: Vec<TcpStream> = (0..LIVE).map(|number| session(address, number)).collect();
        let calm = round_trips(&mut live);
        (live, calm)
    })
    .await
    .unwrap();

    let is_over = Arc::new(AtomicBool::new(false));
    let mut storm = JoinSet::new();
    for number in STORMING {
        let is_over = Arc::clone(&is_over);
        storm.spawn(async move {
            while !is_over.load(Ordering::Relaxed) {
                // Whatever the result, the next attempt follows.
                drop(attempt(address, device(number)).await);
            }
        });
    }
    let stormy = spawn_blocking(move || round_trips(&mut live)).await.unwrap();
    let attempts = gateway.metric("seawall_handshakes_total{").unwrap();
    is_over.store(true, Ordering::Relaxed);
    storm.join_all().await;

    // Each device connects again as soon as it has left (Little's law).
    let newcomer = TIMED_FOR * u32::try_from(STORMING.len()).unwrap() / u32::try_from(attempts).unwrap();
    println!("{attempts} attempts of {newcomer:?}; p99 of a ping {calm:?} in the calm, {stormy:?} in the storm");
    assert!(attempts >= ATTEMPTS_MIN, "{attempts} attempts are not a storm");
    assert!(
        stormy <= calm.max(newcomer) * TIMES_MAX + MORE_MAX,
        "{calm:?} in the calm, {stormy:?} in the storm"
    );
}

/// A plain session, on a blocking socket, so that no runtime of this process is part of the measurement.
fn session(address: SocketAddr, number: u32) -> TcpStream {
    let Credential::Bearer(secret) = device(number).credential else {
        panic!("a device of the rig has a secret");
    };
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let identity = format!("Seawall-Device: {}\r\nAuthorization: Bearer {secret}", id(number));
    stream.write_all(request(&[&identity]).as_bytes()).unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.extend(byte);
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
    stream
}

/// First byte and payload of the next frame. All are short here.
fn frame(stream: &mut TcpStream) -> (u8, Vec<u8>) {
    let mut head = [0; 2];
    stream.read_exact(&mut head).unwrap();
    let mut payload = vec![0; usize::from(head[1])];
    stream.read_exact(&mut payload).unwrap();
    (head[0], payload)
}

/// 99th percentile of the time from a ping to its pong.
fn round_trips(live: &mut [TcpStream]) -> Duration {
    let deadline = Instant::now() + TIMED_FOR;
    let mut took = Vec::new();
    while Instant::now() < deadline {
        for stream in &mut *live {
            let begun = Instant::now();
            stream.write_all(&masked(0x89, b"alive?")).unwrap();
            // The gateway also sends pings.
            while frame(stream) != (0x8a, b"alive?".to_vec()) {}
            took.push(begun.elapsed());
            thread::sleep(Duration::from_millis(1));
        }
    }
    took.sort_unstable();
    took[took.len() * 99 / 100]
}
