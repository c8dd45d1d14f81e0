//! Clients that leave at each step, by a reset, by closing, or by closing one side.

use std::time::Duration;

use firmware_sim::connection::Credential;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{STOLEN, Siege, dial_from, one_of};
use crate::harness::{
    authority::HOST,
    devices::device,
    raw::{masked, request},
};

/// The way in which a client leaves.
#[derive(Clone, Copy, Debug)]
enum Leave {
    Reset,
    End,
    /// It sends no more, and waits for data.
    HalfEnd,
}

/// The step at which it leaves.
#[derive(Clone, Copy, Debug)]
enum Step {
    Connected,
    InTheHead,
    WaitingForItsLookUp,
    Upgraded,
    InAFrame,
    InAFragmentedMessage,
    AfterItsGoodbye,
}

const STEPS: [Step; 7] = [
    Step::Connected,
    Step::InTheHead,
    Step::WaitingForItsLookUp,
    Step::Upgraded,
    Step::InAFrame,
    Step::InAFragmentedMessage,
    Step::AfterItsGoodbye,
];
const WAYS: [Leave; 3] = [Leave::Reset, Leave::End, Leave::HalfEnd];
/// Number of repetitions of each.
const TIMES: u32 = 8;

#[tokio::test(flavor = "multi_thread")]
async fn peers_that_leave_at_any_step_leave_nothing_behind() {
    let siege = Siege::of_tcp("[limits]\nhead_timeout_ms = 1000\n").await;
    for step in STEPS {
        for way in WAYS {
            for time in 0..TIMES {
                leave(&siege, step, way, time).await;
            }
        }
    }
    siege.leaves_nothing().await;
}

async fn leave(siege: &Siege, step: Step, way: Leave, time: u32) {
    let head = head_of(STOLEN + time);
    let mut stream = dial_from(one_of(1, 0), siege.address).await.unwrap();
    match step {
        Step::Connected => {}
        Step::InTheHead => stream.write_all(&head[..head.len() / 2]).await.unwrap(),
        Step::WaitingForItsLookUp => stream.write_all(&head).await.unwrap(),
        Step::Upgraded | Step::InAFrame | Step::InAFragmentedMessage | Step::AfterItsGoodbye => {
            stream.write_all(&head).await.unwrap();
            let mut answer = [0; 512];
            let len = timeout(Duration::from_secs(10), stream.read(&mut answer))
                .await
                .unwrap()
                .unwrap();
            assert!(answer[..len].starts_with(b"HTTP/1.1 101 "), "{step:?} {way:?}");
        }
    }
    let frame = masked(0x81, b"a message");
    match step {
        Step::Connected | Step::InTheHead | Step::WaitingForItsLookUp | Step::Upgraded => {}
        Step::InAFrame => stream.write_all(&frame[..5]).await.unwrap(),
        Step::InAFragmentedMessage => stream.write_all(&masked(0x01, b"a mes")).await.unwrap(),
        Step::AfterItsGoodbye => stream.write_all(&masked(0x88, &1000_u16.to_be_bytes())).await.unwrap(),
    }
    go(stream, way).await;
}

/// The step at which a TLS client leaves.
#[derive(Clone, Copy, Debug)]
enum TlsStep {
    InTheHello,
    BehindTheHello,
    Secured,
    InTheHead,
    /// Without a close message of TLS.
    Upgraded,
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_that_leave_at_any_step_of_tls_leave_nothing_behind() {
    let siege = Siege::of_tls("handshake_timeout_ms = 2000\n[limits]\nhead_timeout_ms = 1000\n").await;
    for step in [
        TlsStep::InTheHello,
        TlsStep::BehindTheHello,
        TlsStep::Secured,
        TlsStep::InTheHead,
        TlsStep::Upgraded,
    ] {
        for way in WAYS {
            for time in 0..TIMES {
                leave_tls(&siege, step, way, time).await;
            }
        }
    }
    siege.leaves_nothing().await;
}

async fn leave_tls(siege: &Siege, step: TlsStep, way: Leave, time: u32) {
    let head = head_of(STOLEN + time);
    let mut tcp = dial_from(one_of(1, 0), siege.address).await.unwrap();
    match step {
        TlsStep::InTheHello => {
            tcp.write_all(&[0x16, 3, 1, 2, 0, 1, 0]).await.unwrap();
            return go(tcp, way).await;
        }
        TlsStep::BehindTheHello => {
            // The first data of a client; the gateway's answer is never read.
            let config = siege.authority().client_config(rustls::ALL_VERSIONS, None);
            let name = HOST.try_into().unwrap();
            let mut client = rustls::ClientConnection::new(config, name).unwrap();
            let mut hello = Vec::new();
            client.write_tls(&mut hello).unwrap();
            tcp.write_all(&hello).await.unwrap();
            return go(tcp, way).await;
        }
        TlsStep::Secured | TlsStep::InTheHead | TlsStep::Upgraded => {}
    }
    let mut tls = siege.authority().secure(tcp).await.unwrap();
    match step {
        TlsStep::InTheHello | TlsStep::BehindTheHello | TlsStep::Secured => {}
        TlsStep::InTheHead => tls.write_all(&head[..head.len() / 2]).await.unwrap(),
        TlsStep::Upgraded => {
            tls.write_all(&head).await.unwrap();
            let mut answer = [0; 12];
            tls.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"HTTP/1.1 101", "{step:?} {way:?}");
        }
    }
    tls.flush().await.unwrap();
    let (tcp, _) = tls.into_inner();
    go(tcp, way).await;
}

/// The request of a stolen device.
fn head_of(number: u32) -> Vec<u8> {
    let config = device(number);
    let Credential::Bearer(secret) = &config.credential else {
        panic!("no bearer");
    };
    let lines = format!("Seawall-Device: {}\r\nAuthorization: Bearer {secret}", config.id);
    request(&[&lines]).into_bytes()
}

async fn go(mut stream: TcpStream, way: Leave) {
    match way {
        Leave::Reset => {}
        Leave::End => socket2::SockRef::from(&stream).set_linger(None).unwrap(),
        Leave::HalfEnd => {
            // After the close message the gateway may have closed the connection.
            let _ = stream.shutdown().await;
            // The gateway gives it up on its own.
            let ended = timeout(Duration::from_secs(5), async {
                while let Ok(1..) = stream.read(&mut [0; 512]).await {}
            });
            ended.await.unwrap();
        }
    }
    drop(stream);
    sleep(Duration::from_millis(1)).await;
}
