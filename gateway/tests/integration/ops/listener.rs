//! The listener of the API: connections, heads, bodies, and what all requests have in common.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{import::import, rig::Gateway};

/// Far more than an answer takes, and far less than the time that a silent connection has.
const SOON: Duration = Duration::from_secs(10);

#[test]
fn silent_slow_and_unread_connections_keep_nobody_out() {
    let gateway = Gateway::start_with("[ops]\nconnections_max = 8\n");
    let begin = [
        "",
        "GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        "POST /api/v1/devices HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n{",
    ];

    let mut flood = Vec::new();
    for number in 0..120 {
        let mut stream = connect(&gateway);
        // A connection that was evicted is closed.
        let _ = stream.write_all(begin[number % begin.len()].as_bytes());
        flood.push(stream);
    }
    let asked = Instant::now();

    assert_eq!(gateway.raw("GET", "/healthz", &[], "").status, 200);
    assert_eq!(gateway.raw("GET", "/metrics", &[], "").status, 200);
    assert_eq!(gateway.get("/api/v1/node").status, 200);
    assert!(asked.elapsed() < SOON, "{:?}", asked.elapsed());
}

#[test]
fn calls_that_take_every_place_leave_health_and_metrics_theirs() {
    let gateway = Gateway::start_with("[ops]\nconnections_max = 8\n");
    let half_a_body = |_| {
        let mut stream = connect(&gateway);
        write!(
            stream,
            "POST /api/v1/devices HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\n\
             Content-Length: 1000\r\n\r\n{{",
            gateway.admin
        )
        .unwrap();
        stream
    };
    let mut calls: Vec<TcpStream> = (0..8).map(half_a_body).collect();

    gateway.eventually(|| {
        let is_full = gateway.get("/api/v1/node").status == 503;
        if !is_full {
            // On a busy machine a connection whose head was not read yet may have been evicted for this call.
            calls.push(half_a_body(0));
        }
        is_full
    });

    let refused = gateway.get("/api/v1/node");
    assert_eq!(refused.problem(), (503, "busy".into()));
    assert_eq!(refused.header("retry-after"), "1");
    assert_eq!(gateway.raw("GET", "/healthz", &[], "").status, 200);
    assert_eq!(gateway.raw("GET", "/metrics", &[], "").status, 200);
    drop(calls);
    gateway.eventually(|| gateway.get("/api/v1/node").status == 200);
}

#[test]
fn bodies_of_all_calls_together_are_bounded() {
    let gateway = Gateway::start();
    let begun = || {
        let mut stream = connect(&gateway);
        write!(
            stream,
            "POST /api/v1/rules/preview HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\n\
             Content-Length: 262144\r\n\r\n{{",
            gateway.admin
        )
        .unwrap();
        stream
    };
    let rule = json!({"match": {"model": "m"}, "effect": "block"});
    let mut calls = Vec::new();

    // Another one each time: a small body may have taken the last memory while a large one arrived.
    gateway.eventually(|| {
        calls.push(begun());
        gateway.post("/api/v1/rules/preview", rule.clone()).status == 503
    });

    assert_eq!(
        gateway.get("/api/v1/node").status,
        200,
        "a call without a body continues"
    );
    drop(calls);
    gateway.eventually(|| gateway.post("/api/v1/rules/preview", rule.clone()).status == 200);
}

#[test]
fn answers_that_are_not_read_are_bounded_together() {
    const DEVICES: u128 = 1_000;
    let gateway = Gateway::start();
    let label = "m".repeat(64);
    let line = |n: u128| format!("{},0123456789abcdef,{label},{label}\n", uuid::Uuid::from_u128(n));
    let file = format!("id,secret,tenant,model\n{}", (0..DEVICES).map(line).collect::<String>());
    assert_eq!(import(&gateway, "", &file).status, 201);
    let list = "/api/v1/devices?limit=1000";
    let unread = || {
        let mut stream = connect(&gateway);
        write!(
            stream,
            "GET {list} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\n\r\n",
            gateway.admin
        )
        .unwrap();
        stream
    };
    let mut calls = Vec::new();

    gateway.eventually(|| {
        calls.push(unread());
        gateway.get(list).status == 503
    });

    assert_eq!(gateway.get(list).problem(), (503, "busy".into()));
    assert_eq!(
        gateway.get("/api/v1/devices?limit=10").status,
        200,
        "a short answer has room"
    );
    assert!(calls.len() < 200, "{}", calls.len());
    drop(calls);
    gateway.eventually(|| gateway.get(list).status == 200);
}

#[test]
fn a_refusal_comes_before_the_body_where_the_client_waits_for_continue() {
    let gateway = Gateway::start();
    let viewer = gateway.token("viewer");

    for (token, status) in [(viewer.as_str(), "403"), ("wrong", "401")] {
        let answer = exchange(
            &gateway,
            &format!(
                "POST /api/v1/devices/import HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: text/csv\r\n\
                 Content-Length: 400000000\r\nExpect: 100-continue\r\n\r\n"
            ),
        );

        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
}

#[test]
fn a_caller_without_a_token_sends_no_body_for_long_whatever_the_answer_is() {
    let gateway = Gateway::start();
    let requests = [
        ("404", "POST /nothing HTTP/1.1\r\nHost: x\r\n"),
        ("405", "DELETE /healthz HTTP/1.1\r\nHost: x\r\n"),
        ("400", "POST /healthz HTTP/1.1\r\nHost: a b\r\n"),
    ];

    for (status, head) in requests {
        let mut stream = connect(&gateway);
        let sent = Instant::now();
        write!(stream, "{head}Content-Length: 100000\r\n\r\n{{").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();

        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        assert!(sent.elapsed() < Duration::from_secs(3), "{status} {:?}", sent.elapsed());
    }
}

#[test]
fn a_request_names_one_host_and_on_loopback_metrics_are_for_this_machine() {
    let gateway = Gateway::start_with("[server]\nnode = \"gw-1\"\n");
    let status = |path: &str, hosts: &str| {
        let answer = exchange(
            &gateway,
            &format!("GET {path} HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n"),
        );
        answer[9..12].to_owned()
    };

    for hosts in ["", "Host: a\r\nHost: b\r\n", "Host: a b\r\n"] {
        assert_eq!(status("/healthz", hosts), "400", "{hosts:?}");
    }
    for host in ["127.0.0.1:8081", "[::1]", "localhost:8081", "gw-1"] {
        assert_eq!(status("/metrics", &format!("Host: {host}\r\n")), "200", "{host}");
    }
    // A browser cannot suppress its languages.
    let browser = "Host: evil.example\r\nAccept-Language: en\r\n";
    assert_eq!(status("/metrics", browser), "400");
    assert_eq!(status("/metrics", "Host: metrics.example\r\n"), "200");
    // These answers contain nothing that a web page must not know.
    assert_eq!(status("/healthz", "Host: evil.example\r\n"), "200");
    assert_eq!(status("/readyz", "Host: gateway.example\r\n"), "200");
    let old = exchange(&gateway, "GET /healthz HTTP/1.0\r\n\r\n");
    assert!(
        old.starts_with("HTTP/1.0 200") || old.starts_with("HTTP/1.1 200"),
        "{old}"
    );
}

#[test]
fn a_body_with_two_lengths_ends_its_connection() {
    let gateway = Gateway::start();
    let smuggled = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";

    for lengths in [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
    ] {
        let answer = exchange(
            &gateway,
            &format!("POST /healthz HTTP/1.1\r\nHost: x\r\n{lengths}\r\n0\r\n\r\n{smuggled}"),
        );

        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
    }
}

#[test]
fn every_answer_has_the_id_of_its_request() {
    let gateway = Gateway::start();

    let given = gateway.raw("GET", "/api/v1/node", &[("x-request-id", "trace-17")], "");
    let made = gateway.raw("GET", "/nothing", &[("x-request-id", "not an id")], "");

    assert_eq!(given.header("x-request-id"), "trace-17");
    assert_eq!(given.json()["instance"], "urn:seawall:request:trace-17");
    let id = made.header("x-request-id");
    assert_eq!(id.len(), 16);
    assert_eq!(made.json()["instance"], format!("urn:seawall:request:{id}"));
    assert!(
        !gateway
            .raw("GET", "/healthz", &[], "")
            .header("x-request-id")
            .is_empty()
    );
}

#[test]
fn an_array_is_no_object() {
    let gateway = Gateway::start();
    let id = uuid::Uuid::from_u128(7);

    for (path, body) in [
        ("/api/v1/drain".to_owned(), json!([null, null])),
        ("/api/v1/tokens".to_owned(), json!(["x", "admin"])),
        ("/api/v1/devices".to_owned(), json!([null, null, null])),
        (format!("/api/v1/devices/{id}/secret"), json!([5])),
        (
            "/api/v1/rules".to_owned(),
            json!({"match": [null, null, null], "effect": "block"}),
        ),
        ("/api/v1/rules".to_owned(), json!([])),
    ] {
        let answer = gateway.post(&path, body);

        assert_eq!(answer.problem(), (422, "invalid".into()), "{path}");
    }
}

#[test]
fn a_span_is_documented_as_text_and_as_seconds() {
    let document: Value = serde_json::from_str(&seawall_gateway::ops::openapi_json()).unwrap();

    let span = &document["components"]["schemas"]["Span"]["oneOf"];

    assert_eq!(
        (&span[0]["type"], &span[1]["type"]),
        (&json!("string"), &json!("integer"))
    );
}

fn connect(gateway: &Gateway) -> TcpStream {
    let stream = TcpStream::connect(gateway.ops()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// Sends bytes and reads to the end.
fn exchange(gateway: &Gateway, request: &str) -> String {
    let mut stream = connect(gateway);
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn requests_are_timed_by_kind_of_call_and_status() {
    let gateway = Gateway::start();
    let metrics = || gateway.raw("GET", "/metrics", &[], "").text;

    gateway.get("/api/v1/rules");
    gateway.get("/api/v1/rules");
    gateway.post("/api/v1/rules", json!({}));
    gateway.register(json!({}));

    let text = metrics();
    for (call, status, count) in [
        ("read", "success", 2),
        ("change", "client_error", 1),
        ("change", "success", 1),
    ] {
        let line =
            format!("seawall_api_request_duration_seconds_count{{call=\"{call}\",status=\"{status}\"}} {count}\n");
        assert!(text.contains(&line), "{line}{text}");
    }
    assert!(metrics().contains("_count{call=\"public\",status=\"success\"} 1\n"));
}
