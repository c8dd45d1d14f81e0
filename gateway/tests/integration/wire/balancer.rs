//! Behind a load balancer: limits by address see devices, and only trusted addresses may name them.

use std::net::SocketAddr;

use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::harness::{
    authority::Authority,
    gateway::Gateway,
    raw::{Response, request, response},
    wait::soon,
};

/// At most two connections per address, and load balancers on 127.0.0.1 only.
const SETTINGS: &str = "[limits]\nconnections_per_address_max = 2\n[proxy]\ntrusted = [\"127.0.0.1\"]\n";

fn v1(source: &str) -> String {
    let family = if source.contains(':') { "TCP6" } else { "TCP4" };
    let local = if source.contains(':') { "::1" } else { "127.0.0.1" };
    format!("PROXY {family} {source} {local} 5000 80\r\n")
}

fn v2(source: [u8; 4]) -> Vec<u8> {
    let mut bytes = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c".to_vec();
    bytes.extend_from_slice(&source);
    bytes.extend_from_slice(&[127, 0, 0, 1, 0, 1, 0, 80]);
    bytes
}

/// Sends a header and a request, and keeps the connection.
async fn send(address: SocketAddr, header: &[u8], request: &str) -> (TcpStream, Response) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&[header, request.as_bytes()].concat()).await.unwrap();
    let answer = response(&mut stream).await;
    (stream, answer)
}

#[tokio::test]
async fn limits_by_address_see_whom_the_proxy_header_names() {
    let gateway = Gateway::start(&format!("{SETTINGS}protocol = true\n")).await;
    let mut kept = Vec::new();
    for (header, status) in [
        (v1("192.0.2.1").into_bytes(), 101),
        (v2([192, 0, 2, 1]), 101),
        (v1("192.0.2.1").into_bytes(), 503),
        (v1("192.0.2.2").into_bytes(), 101),
        // One /64 is one address.
        (v1("2001:db8::1").into_bytes(), 101),
        (v1("2001:db8::2").into_bytes(), 101),
        (v1("2001:db8::3").into_bytes(), 503),
        (v1("2001:db8:0:1::3").into_bytes(), 101),
    ] {
        let lines = gateway.device_lines().await;

        let (stream, answer) = send(gateway.devices, &header, &request(&[&lines])).await;

        assert_eq!(answer.status, status, "{}", String::from_utf8_lossy(&header));
        kept.push(stream);
    }
    kept.remove(0);
    let lines = gateway.device_lines().await;
    soon(|| gateway.metric("seawall_sessions") == 5).await;
    let (_stream, again) = send(gateway.devices, v1("192.0.2.1").as_bytes(), &request(&[&lines])).await;
    assert_eq!(again.status, 101);
}

#[tokio::test]
async fn balancer_that_speaks_for_itself_is_answered_and_one_without_header_is_not() {
    let gateway = Gateway::start(&format!("{SETTINGS}protocol = true\n")).await;
    let probe = "GET /readyz HTTP/1.1\r\n\r\n";
    let local = b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00";

    for header in [b"PROXY UNKNOWN\r\n".as_slice(), local] {
        assert_eq!(send(gateway.devices, header, probe).await.1.status, 200);
    }
    let mut bare = TcpStream::connect(gateway.devices).await.unwrap();
    bare.write_all(probe.as_bytes()).await.unwrap();
    let mut rest = Vec::new();
    // Unread data makes the close a reset.
    let _ = tokio::io::AsyncReadExt::read_to_end(&mut bare, &mut rest).await;

    assert_eq!(rest, b"");
    soon(|| gateway.metric("seawall_connections_total{outcome=\"proxy_failed\"}") == 1).await;
}

#[tokio::test]
async fn proxy_header_comes_before_tls() {
    let mut authority = Authority::new();
    let gateway = Gateway::start(&format!("{SETTINGS}protocol = true\n{}", authority.settings())).await;
    let lines = gateway.device_lines().await;
    let mut tcp = TcpStream::connect(gateway.devices).await.unwrap();
    tcp.write_all(&v2([192, 0, 2, 1])).await.unwrap();

    let mut stream = authority.secure(tcp).await.unwrap();
    stream.write_all(request(&[&lines]).as_bytes()).await.unwrap();

    assert_eq!(response(&mut stream).await.status, 101);
}

#[tokio::test]
async fn nobody_else_is_believed() {
    let elsewhere = SETTINGS.replace("127.0.0.1", "192.0.2.9");
    let gateway = Gateway::start(&format!("{elsewhere}protocol = true\nforwarded_for = true\n")).await;
    let lines = gateway.device_lines().await;

    let (_, answer) = send(gateway.devices, v1("192.0.2.1").as_bytes(), &request(&[&lines])).await;
    assert_eq!(answer.status, 400);
    let mut kept = Vec::new();
    for (number, status) in [(1, 101), (2, 101), (3, 503)] {
        let (lines, forwarded) = (
            gateway.device_lines().await,
            format!("X-Forwarded-For: 192.0.2.{number}"),
        );
        let (stream, answer) = send(gateway.devices, b"", &request(&[&lines, &forwarded])).await;
        assert_eq!(answer.status, status);
        kept.push(stream);
    }
}

#[tokio::test]
async fn limits_by_address_see_whom_the_forwarded_header_names() {
    let gateway = Gateway::start(&format!("{SETTINGS}forwarded_for = true\n")).await;
    let mut kept = Vec::new();
    for (forwarded, status) in [
        ("203.0.113.7, 192.0.2.1", 101),
        ("203.0.113.8, 192.0.2.1, 127.0.0.1", 101),
        ("203.0.113.9, 192.0.2.1", 503),
        ("192.0.2.2", 101),
    ] {
        let (lines, forwarded) = (gateway.device_lines().await, format!("X-Forwarded-For: {forwarded}"));

        let (stream, answer) = send(gateway.devices, b"", &request(&[&lines, &forwarded])).await;

        assert_eq!(answer.status, status, "{forwarded}");
        kept.push(stream);
    }
    assert_eq!(
        gateway.metric("seawall_throttled_total{limit=\"address_connections\"}"),
        1
    );
}

#[tokio::test]
async fn devices_of_a_balancer_behind_a_balancer_are_told_apart() {
    let settings = SETTINGS.replace("\"127.0.0.1\"", "\"127.0.0.1\", \"198.51.100.7\"");
    let gateway = Gateway::start(&format!("{settings}protocol = true\nforwarded_for = true\n")).await;
    let mut kept = Vec::new();
    for (forwarded, status) in [
        ("192.0.2.1", 101),
        ("192.0.2.2", 101),
        ("192.0.2.3", 101),
        ("192.0.2.1", 101),
        ("192.0.2.1", 503),
    ] {
        let (lines, forwarded) = (gateway.device_lines().await, format!("X-Forwarded-For: {forwarded}"));

        let header = v1("198.51.100.7");
        let (stream, answer) = send(gateway.devices, header.as_bytes(), &request(&[&lines, &forwarded])).await;

        assert_eq!(answer.status, status, "{forwarded}");
        kept.push(stream);
    }
}

#[tokio::test]
async fn balancer_that_names_nobody_is_counted_itself() {
    let gateway = Gateway::start(&format!("{SETTINGS}forwarded_for = true\n")).await;
    let mut kept = Vec::new();
    for (forwarded, status) in [
        ("X-Other: 1", 101),
        ("X-Forwarded-For: unknown", 101),
        ("X-Other: 1", 503),
    ] {
        let lines = gateway.device_lines().await;

        let (stream, answer) = send(gateway.devices, b"", &request(&[&lines, forwarded])).await;

        assert_eq!(answer.status, status, "{forwarded}");
        kept.push(stream);
    }
}
