//! Memory of an idle device and of an unfinished handshake, counted to the byte. A separate binary, because its
//! allocator counts for the whole process.

#![expect(clippy::unwrap_used, reason = "a test that cannot continue has failed")]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use seawall_gateway::{
    runtime::config::Config,
    serve::{self, Running},
    store::{Audit, NewDevice},
};
use seawall_proto::id::{DeviceId, Label, SecretHash};

#[global_allocator]
static COUNTED: dhat::Alloc = dhat::Alloc;

/// Devices that connect before the count: one-time allocations are not the cost of a device.
const BEFORE: u128 = 1_000;
const COUNTED_DEVICES: u128 = 1_000;
/// Maximum bytes requested from the allocator per device, with debug assertions (slightly less without). The
/// allocator's own overhead, and what `loadtest bench` measures, are somewhat more.
const BYTES_MAX: usize = 1_450;
/// A message that is larger than those of a usual session, and the number of devices that send it.
const LARGE_LEN: u16 = 40_000;
const LOUD_DEVICES: usize = 100;
/// Maximum memory that may be left of it per device.
const LEFT_MAX: usize = 100;

/// Handshakes that are begun and left. Fewer than the limit.
const HANDSHAKES: usize = 200;
/// Maximum memory of one: twice what it has sent, the state of TLS, and a task. Measured: 22,200. Without the gateway's
/// bound rustls would keep 64 KB of it.
const HANDSHAKE_BYTES_MAX: usize = 23_500;
/// Maximum memory of a connection that has sent nothing, over plain TCP: a task, and a buffer for most heads.
const SILENT_BYTES_MAX: usize = 4_800;
/// Maximum that the gateway's HANDSHAKE_LEN_MAX accepts.
const HELLO_SENT: usize = 8_000;

/// One at a time, because they count the memory of the process.
static COUNTING: Mutex<()> = Mutex::new(());

#[test]
fn an_unfinished_tls_handshake_holds_no_more_than_its_bound() {
    let _alone = COUNTING.lock().unwrap_or_else(PoisonError::into_inner);
    let _profiler = dhat::Profiler::builder().testing().build();
    let home = tempfile::tempdir().unwrap();
    let path = |name| home.path().join(name);
    let issued = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    std::fs::write(path("cert.pem"), issued.cert.pem()).unwrap();
    std::fs::write(path("key.pem"), issued.signing_key.serialize_pem()).unwrap();
    let mut config = Config::default();
    config.server.data_dir = path("data");
    config.server.listen.set_port(0);
    config.ops.listen.set_port(0);
    config.tls.certificate = Some(path("cert.pem"));
    config.tls.key = Some(path("key.pem"));
    config.tls.handshake_timeout_ms = 60_000;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let running = runtime.block_on(serve::start(config)).unwrap();
    let address = running.addresses.devices;
    let mut begun: Vec<TcpStream> = Vec::with_capacity(2 * HANDSHAKES);
    begun.push(begin_handshake(address));
    let before = settled();

    begun.extend((0..HANDSHAKES).map(|_| begin_handshake(address)));
    let bytes = settled().saturating_sub(before) / HANDSHAKES;

    println!("{bytes} bytes for an unfinished handshake");
    assert!(
        (HELLO_SENT..=HANDSHAKE_BYTES_MAX).contains(&bytes),
        "{bytes} bytes for an unfinished handshake"
    );
    drop(begun);
    runtime.block_on(running.stop()).unwrap();
}

/// Sends the beginning of a hello that would be 60,000 bytes long.
fn begin_handshake(address: SocketAddr) -> TcpStream {
    let mut message = vec![1, 0, 0xea, 0x60];
    message.resize(HELLO_SENT - 2 * 5, 0);
    let mut stream = TcpStream::connect(address).unwrap();
    for fragment in message.chunks(HELLO_SENT / 2) {
        let len = u16::try_from(fragment.len()).unwrap().to_be_bytes();
        stream.write_all(&[&[0x16, 3, 1], &len[..], fragment].concat()).unwrap();
    }
    stream
}

#[test]
fn a_connection_that_shows_no_head_holds_no_more_than_its_bound() {
    let _alone = COUNTING.lock().unwrap_or_else(PoisonError::into_inner);
    let _profiler = dhat::Profiler::builder().testing().build();
    let home = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.server.data_dir = home.path().to_owned();
    config.server.listen.set_port(0);
    config.ops.listen.set_port(0);
    config.limits.head_timeout_ms = 60_000;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let running = runtime.block_on(serve::start(config)).unwrap();
    let connect = || TcpStream::connect(running.addresses.devices).unwrap();
    let mut silent: Vec<TcpStream> = Vec::with_capacity(2 * HANDSHAKES);
    silent.push(connect());
    let before = settled();

    silent.extend((0..HANDSHAKES).map(|_| connect()));
    let bytes = settled().saturating_sub(before) / HANDSHAKES;

    println!("{bytes} bytes for a connection that shows no head");
    assert!(
        (1..=SILENT_BYTES_MAX).contains(&bytes),
        "{bytes} bytes for a connection that shows no head"
    );
    drop(silent);
    runtime.block_on(running.stop()).unwrap();
}

#[test]
fn an_idle_device_holds_no_more_than_its_bound_also_after_a_large_message() {
    let _alone = COUNTING.lock().unwrap_or_else(PoisonError::into_inner);
    let _profiler = dhat::Profiler::builder().testing().build();
    let home = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.server.data_dir = home.path().to_owned();
    config.server.listen.set_port(0);
    config.ops.listen.set_port(0);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let running = runtime.block_on(serve::start(config)).unwrap();
    runtime.block_on(register(&running, BEFORE + COUNTED_DEVICES));
    let address = running.addresses.devices;

    let mut devices: Vec<TcpStream> = Vec::with_capacity(2_000);
    devices.extend((0..BEFORE).map(|n| connect(address, n)));
    let before = settled();
    devices.extend((BEFORE..BEFORE + COUNTED_DEVICES).map(|n| connect(address, n)));
    let bytes = settled().saturating_sub(before) / usize::try_from(COUNTED_DEVICES).unwrap();

    println!("{bytes} bytes for an idle device");
    assert!(bytes <= BYTES_MAX, "{bytes} bytes for an idle device");
    let before = settled();
    devices.iter_mut().take(LOUD_DEVICES).for_each(say_something_large);
    let left = settled().saturating_sub(before) / LOUD_DEVICES;
    assert!(left <= LEFT_MAX, "{left} bytes of a large message");

    drop(devices);
    runtime.block_on(running.stop()).unwrap();
}

/// Bytes in use, once they have not fallen for a second. A start uses much more for a moment.
fn settled() -> usize {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut least = usize::MAX;
    let mut steady = 0;
    loop {
        std::thread::sleep(Duration::from_millis(200));
        let now = dhat::HeapStats::get().curr_bytes;
        steady = if now < least { 0 } else { steady + 1 };
        least = least.min(now);
        if steady == 5 || Instant::now() >= deadline {
            return now;
        }
    }
}

/// Sends a large message. The device is told that it is not a frame.
fn say_something_large(stream: &mut TcpStream) {
    let mut frame = vec![0x81, 0x80 | 126];
    frame.extend_from_slice(&LARGE_LEN.to_be_bytes());
    frame.extend_from_slice(&[0; 4]);
    frame.resize(frame.len() + usize::from(LARGE_LEN), b'x');
    stream.write_all(&frame).unwrap();
    let mut heard = Vec::new();
    // Pings may arrive before.
    while !String::from_utf8_lossy(&heard).contains("bad_frame") {
        let mut answer = [0; 1024];
        let len = stream.read(&mut answer).unwrap();
        assert_ne!(len, 0, "{}", String::from_utf8_lossy(&heard));
        heard.extend_from_slice(&answer[..len]);
    }
}

async fn register(running: &Running, count: u128) {
    let audit = Audit {
        id: uuid::Uuid::now_v7(),
        at: running.state.clock.wall(),
        actor: "test".into(),
        action: "device.create",
    };
    for n in 0..count {
        let new = NewDevice {
            external_id: None,
            id: DeviceId::from_uuid(id(n)),
            tenant: None,
            model: Label::parse("display").unwrap(),
            secret: SecretHash::of(b"secret"),
        };
        running.state.store.device_insert(&new, &audit).await.unwrap();
    }
}

fn id(n: u128) -> uuid::Uuid {
    uuid::Uuid::from_u128((n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835))
}

/// A device that has read its welcome. It holds no counted memory itself.
fn connect(address: SocketAddr, n: u128) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let request = format!(
        "GET /v1/connect HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: seawall.v1\r\nSeawall-Device: {}\r\n\
         Authorization: Bearer secret\r\nSeawall-Firmware: 3.8.0-b2\r\n\r\n",
        id(n)
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = [0; 2048];
    let mut len = 0;
    while !answer[..len].ends_with(b"\"}") {
        let read = stream.read(&mut answer[len..]).unwrap();
        assert_ne!(read, 0, "{}", String::from_utf8_lossy(&answer[..len]));
        len += read;
    }
    assert!(answer.starts_with(b"HTTP/1.1 101 "));
    stream
}
