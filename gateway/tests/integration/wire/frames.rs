//! Sessions, frame by frame: docs/PROTOCOL.md, and violations of RFC 6455 by a device.

use tokio::io::AsyncWriteExt;

use crate::harness::{
    gateway::Gateway,
    raw::{Device, masked},
    wait::soon,
};

const V1: &str = "Sec-WebSocket-Protocol: seawall.v1";

/// A `seawall.v1` device that has read its welcome.
async fn v1(gateway: &Gateway) -> Device {
    let mut device = Device::connect(gateway.devices, &[&gateway.device_lines().await, V1]).await;
    assert!(device.frame().await.text().contains("welcome"));
    device
}

async fn plain(gateway: &Gateway) -> Device {
    Device::connect(gateway.devices, &[&gateway.device_lines().await]).await
}

#[tokio::test]
async fn message_is_acknowledged() {
    let gateway = Gateway::start("").await;
    let mut device = v1(&gateway).await;

    device.text(r#"{"type":"heartbeat"}"#).await;
    device
        .text(r#"{"type":"message","id":"7","topic":"t","payload":{"a":1},"later":true}"#)
        .await;

    let ack = r#"{"type":"ack","id":"7"}"#;
    assert_eq!(device.frame().await.text(), ack);
    let sent = ack.len() as u64;
    soon(|| gateway.metric("seawall_session_bytes_total{direction=\"out\"}") == sent).await;
}

#[tokio::test]
async fn fragments_make_one_message() {
    let gateway = Gateway::start("").await;
    let mut device = v1(&gateway).await;

    device.send(0x01, br#"{"type":"message","#).await;
    device.send(0x89, b"between").await;
    device.send(0x80, br#""id":"8","payload":1}"#).await;

    assert_eq!(device.frame().await.payload, b"between");
    assert_eq!(device.frame().await.text(), r#"{"type":"ack","id":"8"}"#);
}

#[tokio::test]
async fn tenth_bad_frame_closes_with_1008() {
    let gateway = Gateway::start("").await;
    let mut device = v1(&gateway).await;

    for _ in 0..10 {
        device.text("{\"type\":\"secret-text\"}").await;
    }

    for _ in 0..9 {
        let frame = device.frame().await;
        assert!(frame.text().contains("\"code\":\"bad_frame\""));
        assert!(!frame.text().contains("secret-text"));
    }
    assert_eq!(device.frame().await.close(), (1008, "policy"));
}

#[tokio::test]
async fn device_over_its_rate_is_told_and_closed() {
    let gateway = Gateway::start("[limits]\nmessages_per_second = 1\nmessages_burst = 5\n").await;
    let mut device = v1(&gateway).await;

    for _ in 0..8 {
        device.text(r#"{"type":"heartbeat"}"#).await;
    }

    assert!(device.frame().await.text().contains("rate_limited"));
    assert_eq!(device.frame().await.close().0, 1008);
}

#[tokio::test]
async fn broken_frames_have_their_close_codes() {
    let gateway = Gateway::start("").await;
    let unmasked = [0x81, 0x01, b'x'].to_vec();

    for (bytes, code) in [
        (masked(0x82, b"binary"), 1003),
        (masked(0x81, &[0xff, 0xff]), 1007),
        (masked(0xc1, b"reserved bit"), 1002),
        (masked(0x83, b"reserved opcode"), 1002),
        (masked(0x80, b"continues nothing"), 1002),
        (masked(0x89, &[0; 126]), 1002),
        (masked(0x81, &vec![b'x'; 65_537]), 1009),
        (unmasked, 1002),
    ] {
        let mut device = v1(&gateway).await;
        let _ = device.stream.write_all(&bytes).await;

        assert_eq!(device.frame().await.close().0, code);
        assert_eq!(device.until_end().await, b"");
    }
}

#[tokio::test]
async fn plain_session_takes_anything_and_says_nothing() {
    let gateway = Gateway::start("").await;
    let mut device = plain(&gateway).await;

    device.text("no json at all").await;
    device.send(0x82, &[0, 1, 2]).await;
    device.send(0x89, b"ping").await;

    let frame = device.frame().await;
    assert_eq!((frame.opcode, frame.payload.as_slice()), (10, b"ping".as_slice()));
    assert_eq!(
        gateway.metric("seawall_messages_total{direction=\"in\",outcome=\"accepted\"}"),
        2
    );
    assert_eq!(gateway.metric("seawall_session_bytes_total{direction=\"in\"}"), 17);
}

#[tokio::test]
async fn both_kinds_are_pinged() {
    let gateway = Gateway::start("[session]\nheartbeat_ms = 1000\n").await;

    for mut device in [v1(&gateway).await, plain(&gateway).await] {
        assert_eq!(device.any_frame().await.opcode, 9);
        device.send(0x8a, b"").await;
        assert_eq!(device.any_frame().await.opcode, 9);
    }
}

#[tokio::test]
async fn goodbye_is_answered_and_the_device_offline() {
    let gateway = Gateway::start("").await;
    let mut device = plain(&gateway).await;

    device.send(0x88, &1000_u16.to_be_bytes()).await;

    assert_eq!(device.frame().await.close().0, 1000);
    assert_eq!(device.until_end().await, b"");
    soon(|| gateway.metric("seawall_sessions") == 0).await;
    assert_eq!(gateway.metric("seawall_closes_total{reason=\"normal\"}"), 1);
    assert_eq!(gateway.metric("seawall_session_duration_seconds_count"), 1);
}

#[tokio::test]
async fn reset_of_the_connection_ends_the_session() {
    let gateway = Gateway::start("").await;
    let device = plain(&gateway).await;
    socket2::SockRef::from(&device.stream)
        .set_linger(Some(std::time::Duration::ZERO))
        .unwrap();

    drop(device);

    soon(|| gateway.metric("seawall_closes_total{reason=\"client_gone\"}") == 1).await;
    assert_eq!(gateway.metric("seawall_sessions"), 0);
}

#[tokio::test]
async fn frames_and_messages_count_up_to_their_limits_and_no_further() {
    const FRAME_MAX: usize = 1_000;
    const MESSAGE_MAX: usize = 3_000;
    let gateway = Gateway::start("[limits]\nframe_bytes_max = 1000\nmessage_bytes_max = 3000\n").await;
    let fragments = |lens: &[usize]| -> Vec<u8> {
        let last = lens.len() - 1;
        let frames = lens.iter().enumerate().map(|(at, len)| {
            let first = if at == 0 { 0x01 } else { 0x00 } | if at == last { 0x80 } else { 0x00 };
            masked(first, &vec![b'x'; *len])
        });
        frames.flatten().collect()
    };
    for lens in [
        &[0][..],
        &[1],
        &[FRAME_MAX - 1],
        &[FRAME_MAX],
        &[FRAME_MAX, FRAME_MAX, FRAME_MAX - 1],
        &[FRAME_MAX, FRAME_MAX, FRAME_MAX],
        &[FRAME_MAX, 0, FRAME_MAX, 0, FRAME_MAX, 0],
    ] {
        let mut device = plain(&gateway).await;
        device.stream.write_all(&fragments(lens)).await.unwrap();
        device.send(0x89, &[b'y'; 125]).await;

        assert_eq!(device.frame().await.payload, [b'y'; 125], "{lens:?}");
    }
    for lens in [
        &[FRAME_MAX + 1][..],
        &[1, FRAME_MAX + 1],
        &[FRAME_MAX, FRAME_MAX, FRAME_MAX, 1],
        &[MESSAGE_MAX],
    ] {
        let mut device = plain(&gateway).await;
        let _ = device.stream.write_all(&fragments(lens)).await;

        assert_eq!(device.frame().await.close().0, 1009, "{lens:?}");
    }
    // A length is checked before its bytes arrive, and 2^63 is not valid (RFC 6455 §5.2).
    for (len, code) in [(1_u64 << 40, 1009), (u64::MAX, 1009)] {
        let mut device = plain(&gateway).await;
        let head = [&[0x82, 0xff][..], &len.to_be_bytes(), &[0; 4]].concat();
        device.stream.write_all(&head).await.unwrap();

        assert_eq!(device.frame().await.close().0, code);
    }
}

#[tokio::test]
async fn message_in_fifty_thousand_fragments_arrives_and_holds_nobody_up() {
    let gateway = Gateway::start("").await;
    let (mut device, mut other) = (plain(&gateway).await, plain(&gateway).await);
    let flood = tokio::spawn(async move {
        device.send(0x01, b"a").await;
        for _ in 0..50 {
            device
                .stream
                .write_all(&masked(0x00, b"x").repeat(1_000))
                .await
                .unwrap();
        }
        device.send(0x80, b"b").await;
        device
    });

    other.send(0x89, b"still there?").await;
    assert_eq!(other.frame().await.payload, b"still there?");
    let mut device = flood.await.unwrap();
    device.send(0x89, b"done?").await;

    assert_eq!(device.frame().await.payload, b"done?");
    let taken = "seawall_messages_total{direction=\"in\",outcome=\"accepted\"}";
    assert_eq!(gateway.metric(taken), 1);
}
