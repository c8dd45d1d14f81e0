//! CPU time in a storm of connects: those who are connected get theirs.

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

use super::{
    super::{
        fleet::rig::{attempt, device, id},
        harness::process::GatewayProcess,
        wire::raw::{masked, request},
    },
    disk::import,
};

/// Sessions whose pings are timed, one after the other.
const LIVE: u32 = 20;
/// Devices that connect and leave again, all the time.
const STORMING: std::ops::Range<u32> = 100..300;
/// How long pings are timed, calm and in the storm.
const TIMED_FOR: Duration = Duration::from_secs(3);
/// In the storm a ping may take so many times as long as in the calm, or as a newcomer waits for its answer, whichever is longer,
/// and this on top. The storm comes from this very machine, which may be busy with other things, too: newcomers tell how busy.
const TIMES_MAX: u32 = 5;
const MORE_MAX: Duration = Duration::from_millis(250);
/// Below this number of attempts it was no storm.
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
                // Whatever comes of it: the next one follows.
                drop(attempt(address, device(number)).await);
            }
        });
    }
    let stormy = spawn_blocking(move || round_trips(&mut live)).await.unwrap();
    let attempts = gateway.metric("seawall_handshakes_total{").unwrap();
    is_over.store(true, Ordering::Relaxed);
    storm.join_all().await;

    // Each newcomer comes as soon as it has left (Little's law).
    let newcomer = TIMED_FOR * u32::try_from(STORMING.len()).unwrap() / u32::try_from(attempts).unwrap();
    println!("{attempts} attempts of {newcomer:?}; p99 of a ping {calm:?} in the calm, {stormy:?} in the storm");
    assert!(attempts >= ATTEMPTS_MIN, "{attempts} attempts are no storm");
    assert!(
        stormy <= calm.max(newcomer) * TIMES_MAX + MORE_MAX,
        "{calm:?} in the calm, {stormy:?} in the storm"
    );
}

/// A plain session, on a thread of its own, so that no runtime of this process is in what is measured.
fn session(address: SocketAddr, number: u32) -> TcpStream {
    let Credential::Bearer(secret) = device(number).credential else {
        panic!("a device of the rig's has a secret");
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

/// First byte and payload of the next frame; all are short here.
fn frame(stream: &mut TcpStream) -> (u8, Vec<u8>) {
    let mut head = [0; 2];
    stream.read_exact(&mut head).unwrap();
    let mut payload = vec![0; usize::from(head[1])];
    stream.read_exact(&mut payload).unwrap();
    (head[0], payload)
}

/// The 99th percentile of the time from a ping to its pong.
fn round_trips(live: &mut [TcpStream]) -> Duration {
    let deadline = Instant::now() + TIMED_FOR;
    let mut took = Vec::new();
    while Instant::now() < deadline {
        for stream in &mut *live {
            let begun = Instant::now();
            stream.write_all(&masked(0x89, b"alive?")).unwrap();
            // The gateway pings, too.
            while frame(stream) != (0x8a, b"alive?".to_vec()) {}
            took.push(begun.elapsed());
            thread::sleep(Duration::from_millis(1));
        }
    }
    took.sort_unstable();
    took[took.len() * 99 / 100]
}
