//! All refusals that need no load: status, code, headers.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::harness::{
    gateway::Gateway,
    raw::{KEY, ask, request, response},
    wait::SHORT_PATIENCE,
};

const ID: &str = "9b0c2e4a-11d2-7f00-8000-0000000000aa";

#[tokio::test]
async fn malformed_requests_are_bad_requests() {
    let gateway = Gateway::start("").await;
    let device = format!("Seawall-Device: {ID}");
    let key = |key: &str| request(&[&device]).replace(KEY, key);

    let no_key = request(&[&device]).replace(&format!("Sec-WebSocket-Key: {}\r\n", KEY), "");
    for bytes in [
        request(&[]),
        request(&["Seawall-Device: not-a-uuid"]),
        request(&[&device, &device]),
        request(&[&device, "Seawall-Firmware: 1", "seawall-firmware: 1"]),
        request(&[&device, &format!("Seawall-Firmware: {}", "x".repeat(65))]),
        request(&[&device, "Content-Length: 3"]) + "abc",
        request(&[&device, "Transfer-Encoding: chunked"]),
        request(&[&device, "Sec-WebSocket-Protocol: a b"]),
        key("c2hvcnQ="),
        no_key,
        "NONSENSE\r\n\r\n".to_owned(),
    ] {
        let response = ask(gateway.devices, bytes.as_bytes()).await;

        assert_eq!(
            (response.status, response.code().as_str()),
            (400, "bad_request"),
            "{bytes}"
        );
        assert_eq!(response.header("Content-Type"), Some("application/problem+json"));
        assert_eq!(response.header("Connection"), Some("close"));
        assert_eq!(response.header("Retry-After"), None);
    }
}

#[tokio::test]
async fn what_is_no_upgrade_of_version_13_is_told_so() {
    let gateway = Gateway::start("").await;
    let device = format!("Seawall-Device: {ID}");

    for bytes in [
        request(&[&device]).replace("Version: 13", "Version: 8"),
        request(&[&device]).replace("Upgrade: websocket\r\n", ""),
        "GET /v1/connect HTTP/1.0\r\n\r\n".to_owned(),
    ] {
        let response = ask(gateway.devices, bytes.as_bytes()).await;

        assert_eq!((response.status, response.code().as_str()), (426, "upgrade_required"));
        assert_eq!(response.header("Upgrade"), Some("websocket"));
        assert_eq!(response.header("Sec-WebSocket-Version"), Some("13"));
    }
}

#[tokio::test]
async fn other_resources_and_methods_are_told_apart() {
    let gateway = Gateway::start("").await;

    let missing = ask(gateway.devices, b"GET /v2/connect HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let post = ask(
        gateway.devices,
        b"POST /v1/connect HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
    )
    .await;
    let ready = ask(gateway.devices, b"GET /readyz HTTP/1.0\r\n\r\n").await;

    assert_eq!((missing.status, missing.code().as_str()), (404, "not_found"));
    assert_eq!((post.status, post.code().as_str()), (405, "method_not_allowed"));
    assert_eq!(post.header("Allow"), Some("GET"));
    assert_eq!((ready.status, ready.body.as_str()), (200, ""));
}

#[tokio::test]
async fn probes_are_answered_on_the_device_listener_and_head_has_no_body() {
    let gateway = Gateway::start("").await;
    for request in [
        "GET /readyz HTTP/1.1\r\n\r\n",
        "HEAD /readyz HTTP/1.0\r\n\r\n",
        "GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        "HEAD /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
    ] {
        let answer = ask(gateway.devices, request.as_bytes()).await;

        assert_eq!((answer.status, answer.body.as_str()), (200, ""), "{request}");
    }
    assert_eq!(gateway.metric("seawall_connections_total{outcome=\"probe\"}"), 4);

    for (request, status) in [
        ("HEAD /v1/connect HTTP/1.1\r\nHost: a\r\n\r\n", "405"),
        ("HEAD /elsewhere HTTP/1.1\r\nHost: a\r\n\r\n", "404"),
    ] {
        let mut stream = TcpStream::connect(gateway.devices).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(SHORT_PATIENCE, stream.read_to_string(&mut answer))
            .await
            .unwrap()
            .unwrap();

        assert_eq!(answer.split(' ').nth(1), Some(status), "{answer}");
        assert!(
            answer.contains("Content-Length: ") && answer.ends_with("\r\n\r\n"),
            "{answer}"
        );
    }
}

#[tokio::test]
async fn oversized_heads_are_answered_although_more_is_on_its_way() {
    let gateway = Gateway::start("").await;
    let target = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(100_000));
    let header = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(14_000));

    let uri = ask(gateway.devices, &target.as_bytes()[..14_000]).await;
    let head = ask(gateway.devices, header.as_bytes()).await;

    assert_eq!((uri.status, uri.code().as_str()), (414, "uri_too_long"));
    assert_eq!((head.status, head.code().as_str()), (431, "headers_too_large"));
}

#[tokio::test]
async fn late_heads_are_answered_408() {
    let gateway = Gateway::start("[limits]\nhead_timeout_ms = 300\n").await;
    let mut half = TcpStream::connect(gateway.devices).await.unwrap();
    let mut silent = TcpStream::connect(gateway.devices).await.unwrap();
    half.write_all(b"GET /v1/connect HTTP/1.1\r\nHost:").await.unwrap();

    let (half, silent) = (response(&mut half).await, response(&mut silent).await);

    assert_eq!((half.status, half.code().as_str()), (408, "request_timeout"));
    assert_eq!(silent.status, 408);
    assert_eq!(
        gateway.metric("seawall_handshakes_total{outcome=\"request_timeout\"}"),
        1
    );
    assert_eq!(gateway.metric("seawall_connections_total{outcome=\"silent\"}"), 1);
}

#[tokio::test]
async fn unknown_wrong_and_missing_credentials_get_one_answer() {
    let gateway = Gateway::start("").await;
    let (known, _) = gateway.device().await;
    let known = format!("Seawall-Device: {known}");
    let unknown = format!("Seawall-Device: {ID}");
    let wrong = "Authorization: Bearer wrong-wrong-wrong-wrong";

    let mut answers = Vec::new();
    for lines in [
        vec![known.as_str(), wrong],
        vec![&unknown, wrong],
        vec![&known],
        vec![&unknown],
    ] {
        let response = ask(gateway.devices, request(&lines).as_bytes()).await;

        assert_eq!((response.status, response.code().as_str()), (401, "unauthorized"));
        assert!(response.header("WWW-Authenticate").is_some());
        let after_ms: u64 = response.header("Seawall-Retry-After-Ms").unwrap().parse().unwrap();
        let seconds: u64 = response.header("Retry-After").unwrap().parse().unwrap();
        assert!((60_000..=300_000).contains(&after_ms));
        assert_eq!(seconds, after_ms.div_ceil(1000));
        assert_eq!(response.problem()["retry_after_ms"], after_ms);
        answers.push(response.without_hints());
    }

    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "{answers:?}");
}
