//! Peers that leave: by a reset, by an end, by half an end, after every step of the way.

use std::time::Duration;

use firmware_sim::connection::Credential;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{sleep, timeout},
};

use super::{STOLEN, Siege, dial_from, one_of};
use crate::{
    fleet::rig::device,
    wire::raw::{masked, request},
};

/// How a peer leaves.
#[derive(Clone, Copy, Debug)]
enum Leave {
    Reset,
    End,
    /// It will send no more, and waits for what comes.
    HalfEnd,
}

/// Where it leaves.
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
/// How often each.
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
    let config = device(STOLEN + time);
    let Credential::Bearer(secret) = &config.credential else {
        panic!("no bearer");
    };
    let lines = format!("Seawall-Device: {}\r\nAuthorization: Bearer {secret}", config.id);
    let head = request(&[&lines]);
    let head = head.as_bytes();
    let mut stream = dial_from(one_of(1, 0), siege.address).await.unwrap();
    match step {
        Step::Connected => {}
        Step::InTheHead => stream.write_all(&head[..head.len() / 2]).await.unwrap(),
        Step::WaitingForItsLookUp => stream.write_all(head).await.unwrap(),
        Step::Upgraded | Step::InAFrame | Step::InAFragmentedMessage | Step::AfterItsGoodbye => {
            stream.write_all(head).await.unwrap();
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
    match way {
        Leave::Reset => {}
        Leave::End => socket2::SockRef::from(&stream).set_linger(None).unwrap(),
        Leave::HalfEnd => {
            // After its goodbye the gateway may have ended the connection.
            let _ = stream.shutdown().await;
            // The gateway gives it up by itself.
            let ended = timeout(Duration::from_secs(5), async {
                while let Ok(1..) = stream.read(&mut [0; 512]).await {}
            });
            ended.await.unwrap();
        }
    }
    drop(stream);
    sleep(Duration::from_millis(1)).await;
}
