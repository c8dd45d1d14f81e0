use rand::{SeedableRng, rngs::SmallRng};

use super::*;

fn rng() -> SmallRng {
    SmallRng::seed_from_u64(7)
}

fn text(refusal: &Refusal) -> String {
    let mut out = Vec::new();
    refusal.write_response(&mut out);
    String::from_utf8(out).unwrap()
}

fn header<'a>(response: &'a str, name: &str) -> Option<&'a str> {
    let (head, _) = response.split_once("\r\n\r\n").unwrap();
    head.lines()
        .find_map(|line| line.strip_prefix(name).and_then(|rest| rest.strip_prefix(": ")))
}

fn body(response: &str) -> serde_json::Value {
    let (_, body) = response.split_once("\r\n\r\n").unwrap();
    assert_eq!(
        header(response, "Content-Length"),
        Some(body.len().to_string().as_str())
    );
    serde_json::from_str(body).unwrap()
}

#[test]
fn every_code_has_a_well_formed_answer_that_closes_the_connection() {
    for code in Code::ALL {
        let response = text(&Refusal::plain(code, "detail"));

        let body = body(&response);
        assert!(response.starts_with(&format!("HTTP/1.1 {} ", code.status())));
        assert_eq!(header(&response, "Content-Type"), Some("application/problem+json"));
        assert!(header(&response, "Connection").unwrap().ends_with("close"));
        assert_eq!(header(&response, "Retry-After"), None);
        assert_eq!(body["code"], code.as_str());
        assert_eq!(body["status"], code.status());
        assert_eq!(body.get("retry_after_ms"), None);
        assert_eq!(body.get("rule"), None);
        assert_ne!(code.status(), 429);
    }
}

#[test]
fn codes_have_distinct_words() {
    let words: std::collections::BTreeSet<_> = Code::ALL.into_iter().map(Code::as_str).collect();

    assert_eq!(words.len(), Code::ALL.len());
}

#[test]
fn codes_bring_their_own_headers() {
    let upgrade = text(&Refusal::upgrade_required("no upgrade"));
    assert_eq!(header(&upgrade, "Upgrade"), Some("websocket"));
    assert_eq!(header(&upgrade, "Sec-WebSocket-Version"), Some("13"));

    assert_eq!(header(&text(&Refusal::method_not_allowed()), "Allow"), Some("GET"));
    assert!(header(&text(&Refusal::unauthorized(&mut rng())), "WWW-Authenticate").is_some());
}

#[test]
fn hint_stands_in_both_headers_and_the_body_rounded_up_to_seconds_in_one() {
    let hint = Hint {
        after: Duration::from_millis(23_417),
        slot: Some("c2xvdA".into()),
    };

    let response = text(&Refusal::overloaded(hint));

    assert_eq!(header(&response, "Retry-After"), Some("24"));
    assert_eq!(header(&response, "Seawall-Retry-After-Ms"), Some("23417"));
    assert_eq!(header(&response, "Seawall-Slot"), Some("c2xvdA"));
    assert_eq!(body(&response)["retry_after_ms"], 23_417);
}

#[test]
fn reason_of_an_operator_is_escaped_and_named_with_its_rule() {
    let rule = RuleId(uuid::Uuid::from_u128(5));

    let response = text(&Refusal::firmware_blocked(
        rule,
        "a \"b\"\r\nX-Evil: 1",
        Duration::from_secs(900),
        &mut rng(),
    ));

    assert_eq!(header(&response, "X-Evil"), None);
    let body = body(&response);
    assert_eq!(body["detail"], "a \"b\"\r\nX-Evil: 1");
    assert_eq!(body["rule"], rule.to_string());
    let after_ms = body["retry_after_ms"].as_u64().unwrap();
    assert!((900_000..=1_800_000).contains(&after_ms));
}

#[test]
fn drawn_hints_cover_their_whole_range_and_stay_in_it() {
    let mut rng = rng();
    let mut spread = |draw: &dyn Fn(&mut SmallRng) -> Refusal, from_ms: u64, to_ms: u64| {
        let drawn: Vec<u64> = (0..2000).map(|_| draw(&mut rng).hint.unwrap().after_ms()).collect();
        let tenth = (to_ms - from_ms) / 10;
        assert!(drawn.iter().all(|ms| (from_ms..=to_ms).contains(ms)));
        assert!(drawn.iter().any(|&ms| ms < from_ms + tenth));
        assert!(drawn.iter().any(|&ms| ms > to_ms - tenth));
    };

    spread(&|rng| Refusal::unauthorized(rng), 60_000, 300_000);
    spread(&|rng| Refusal::device_disabled(rng), 900_000, 1_800_000);
    spread(&|rng| Refusal::draining(Peers::Some, rng), 1_000, 5_000);
    spread(&|rng| Refusal::draining(Peers::None, rng), 10_000, 30_000);
}
