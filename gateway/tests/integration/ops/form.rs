//! The form of requests and errors of all calls.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use serde_json::json;

use super::rig::Gateway;

#[test]
fn heads_that_never_reach_a_handler_are_answered_in_the_same_form() {
    let gateway = Gateway::start();
    let lines = "X-Line: 1\r\n".repeat(200);
    let long = format!("X-Long: {}\r\n", "x".repeat(100 * 1024));
    let path = "x".repeat(70_000);

    for (request, expected) in [
        (
            format!("GET /healthz HTTP/1.1\r\n{long}\r\n"),
            (431, "headers_too_large"),
        ),
        (
            format!("GET /healthz HTTP/1.1\r\n{lines}\r\n"),
            (431, "headers_too_large"),
        ),
        (
            format!("GET /{path} HTTP/1.1\r\nHost: x\r\n\r\n"),
            (431, "headers_too_large"),
        ),
        (
            "GET /healthz HTTP/1.1\r\nno colon here\r\n\r\n".to_owned(),
            (400, "bad_request"),
        ),
        ("G\u{1}T / HTTP/1.1\r\n\r\n".to_owned(), (400, "bad_request")),
        ("GET / HTTP/9.9\r\n\r\n".to_owned(), (400, "bad_request")),
    ] {
        let answer = exchange(&gateway, request.as_bytes());

        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let problem: serde_json::Value = serde_json::from_str(body).unwrap();
        assert!(head.contains("application/problem+json"), "{answer}");
        assert_eq!(
            (problem["status"].as_u64(), problem["code"].as_str()),
            (Some(expected.0), Some(expected.1))
        );
        assert!(head.starts_with(&format!("HTTP/1.1 {} ", expected.0)), "{answer}");
    }
}

/// Sends bytes and reads to the end.
fn exchange(gateway: &Gateway, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(gateway.ops()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(request).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn every_error_has_the_same_form() {
    let gateway = Gateway::start();
    let bearer = format!("Bearer {}", gateway.admin);
    let json = [("authorization", bearer.as_str()), ("content-type", "application/json")];
    let untyped = [("authorization", bearer.as_str())];
    let large = format!("{{\"name\":\"{}\"}}", "x".repeat(300 * 1024));

    for (method, path, headers, body, expected) in [
        ("GET", "/nothing", &untyped[..], "", (404, "not_found")),
        ("GET", "/api/v1/nothing", &untyped, "", (404, "not_found")),
        ("PUT", "/api/v1/devices", &json, "{}", (405, "method_not_allowed")),
        ("POST", "/healthz", &json, "{}", (405, "method_not_allowed")),
        (
            "POST",
            "/api/v1/tokens",
            &untyped,
            "{}",
            (415, "unsupported_media_type"),
        ),
        ("POST", "/api/v1/tokens", &json, "{", (400, "bad_request")),
        ("POST", "/api/v1/tokens", &json, "{}", (422, "invalid")),
        ("POST", "/api/v1/tokens", &json, &large, (413, "too_large")),
        (
            "POST",
            "/api/v1/devices/import",
            &json,
            "{}",
            (415, "unsupported_media_type"),
        ),
        ("GET", "/api/v1/devices/nope", &untyped, "", (400, "bad_request")),
        ("GET", "/api/v1/devices/%ff", &untyped, "", (400, "bad_request")),
        ("GET", "/api/v1/devices?colour=red", &untyped, "", (400, "bad_request")),
        (
            "GET",
            "/api/v1/devices?limit=1&limit=2",
            &untyped,
            "",
            (400, "bad_request"),
        ),
        ("GET", "/api/v1/devices?limit=0", &untyped, "", (400, "bad_request")),
        ("GET", "/api/v1/devices?limit=1001", &untyped, "", (400, "bad_request")),
        ("GET", "/api/v1/devices?cursor=x", &untyped, "", (400, "bad_request")),
        ("GET", "/api/v1/devices?state=x", &untyped, "", (400, "bad_request")),
        ("GET", "/api/v1/devices?tenant=%1b", &untyped, "", (400, "bad_request")),
        (
            "GET",
            "/api/v1/devices?firmware=%3E",
            &untyped,
            "",
            (400, "bad_request"),
        ),
        ("GET", "/api/v1/audit?cursor=x", &untyped, "", (400, "bad_request")),
    ] {
        let answer = gateway.raw(method, path, headers, body);

        assert_eq!(answer.problem(), (expected.0, expected.1.to_owned()), "{method} {path}");
        assert_eq!(answer.header("cache-control"), "no-store");
        if expected.0 == 405 {
            assert!(!answer.header("allow").is_empty(), "{answer:?}");
        }
    }
}

#[test]
fn unknown_fields_are_refused_everywhere() {
    let gateway = Gateway::start();
    let (id, _) = gateway.register(json!({}));
    let device = format!("/api/v1/devices/{id}");

    for (method, path) in [
        ("POST", "/api/v1/devices".to_owned()),
        ("PATCH", device.clone()),
        ("POST", format!("{device}/secret")),
        ("POST", "/api/v1/rules".to_owned()),
        ("POST", "/api/v1/rules/preview".to_owned()),
        ("POST", "/api/v1/drain".to_owned()),
        ("POST", "/api/v1/tokens".to_owned()),
    ] {
        let body = json!({"match": {"model": "m"}, "effect": "block", "name": "n", "role": "viewer", "colour": 1});
        let answer = gateway.call_as(&gateway.admin, method, &path, Some(&body));

        assert_eq!(answer.problem(), (422, "invalid".into()), "{method} {path}: {answer:?}");
    }
}

#[test]
fn what_needs_no_token_answers_without_one() {
    let gateway = Gateway::start();
    let get = |path: &str| gateway.raw("GET", path, &[], "");

    assert_eq!(get("/healthz").status, 200);
    assert_eq!(get("/readyz").json(), json!({"ready": true, "reasons": []}));
    assert!(
        get("/metrics")
            .text
            .contains("seawall_handshakes_total{outcome=\"admitted\"} 0")
    );
    assert!(
        get("/metrics")
            .header("content-type")
            .starts_with("text/plain; version=0.0.4")
    );
    let index = get("/").text;
    assert!(
        index.contains("/api/v1/devices/{id}/messages") && index.contains("/metrics"),
        "{index}"
    );
    let document = get("/api/v1/openapi.json");
    assert_eq!(document.header("content-type"), "application/json");
    assert!(document.json()["openapi"].as_str().unwrap().starts_with("3.1"));
}

#[test]
fn a_node_tells_how_it_is() {
    let gateway = Gateway::start_with("[server]\nnode = \"n1\"\n");
    let (_, _device) = gateway.connected(&["Seawall-Firmware: 3.8.0-b2", "Seawall-Model: m1"]);

    let node = gateway.get("/api/v1/node").json();
    let cohorts = gateway.all("/api/v1/firmware?", 1);

    assert_eq!(
        (&node["node"], &node["ready"], &node["sessions"]),
        (&json!("n1"), &json!(true), &json!(1))
    );
    for path in [
        "/version",
        "/admission/limit",
        "/admission/in_flight",
        "/admission/queue",
        "/admission/k_ref",
        "/admission/k_peak",
        "/admission/k_last_known_good",
        "/admission/limit_ceiling",
        "/admission/elasticity",
        "/admission/rate",
        "/admission/took_p90_ms",
        "/database/since",
        "/database/plan",
        "/rules/digest",
        "/rules/age_seconds",
        "/drain/left",
        "/drain/rate",
    ] {
        assert!(node.pointer(path).is_some(), "{path}: {node}");
    }
    assert_eq!(node["admission"]["breaker"], "closed");
    assert_eq!(node["admission"]["limit_reason"], "start");
    assert_eq!(
        (&node["database"]["state"], &node["rules"]["revision"]),
        (&json!("available"), &json!(0))
    );
    assert_eq!(node["drain"]["state"], "idle");
    assert_eq!(gateway.get("/api/v1/nodes").json()["items"][0]["node"], "n1");
    let row = &cohorts[0];
    assert_eq!(
        (&row["cohort"], &row["model"], &row["firmware"]),
        (&json!("m1/3.8.0-b2"), &json!("m1"), &json!("3.8.0-b2"))
    );
    assert_eq!(
        (&row["connected"], &row["attempts"]["admitted"]),
        (&json!(1), &json!(1))
    );
    assert_eq!((&row["repeats"], &row["lookup"]["keys"]), (&json!(0), &json!(1)));
    assert_eq!(row["lookup"]["statements"], json!(1.0));
}

#[test]
fn a_request_that_never_ends_does_not_hold_up_the_end() {
    let gateway = Gateway::start();
    let mut stream = TcpStream::connect(gateway.ops()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n").unwrap();

    let begun = std::time::Instant::now();
    drop(gateway);

    assert!(begun.elapsed() < Duration::from_secs(4));
    let _ = stream.read(&mut [0; 16]);
}

#[test]
fn an_answer_that_comes_before_the_body_is_not_lost() {
    let gateway = Gateway::start();

    for (path, status) in [
        ("/api/v1/tokens", "401"),
        ("/api/v1/devices/import", "401"),
        ("/nothing", "404"),
        ("/healthz", "405"),
    ] {
        let mut stream = TcpStream::connect(gateway.ops()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let body = vec![b'x'; 1 << 20];
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )
        .unwrap();
        // The request is refused before the first byte of the body arrives.
        std::thread::sleep(Duration::from_millis(50));
        stream.write_all(&body).unwrap();

        let mut answer = [0; 12];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, *format!("HTTP/1.1 {status}").as_bytes(), "{path}");
    }
}
