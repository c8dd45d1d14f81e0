use proptest::prelude::*;

use super::*;

fn bad(text: &str) -> BadFrame {
    DeviceFrame::parse(text).unwrap_err()
}

#[test]
fn known_frames_are_read_whatever_else_is_in_them() {
    assert!(matches!(
        DeviceFrame::parse(" {\"x\":[1],\"type\":\"heartbeat\",\"payload\":null} "),
        Ok(DeviceFrame::Heartbeat)
    ));
    let DeviceFrame::Message { id, topic, payload } =
        DeviceFrame::parse(r#"{"type":"message","id":"1","topic":"t\u0041","payload":{"a": 1.0}}"#).unwrap()
    else {
        panic!("not a message");
    };
    assert_eq!((id.as_ref(), topic.as_deref()), ("1", Some("tA")));
    assert_eq!(payload.unwrap().get(), r#"{"a": 1.0}"#);
    assert!(matches!(
        DeviceFrame::parse(r#"{"type":"ack","id":"7"}"#),
        Ok(DeviceFrame::Ack { id: Cow::Borrowed("7") })
    ));
}

#[test]
fn bad_frames_say_what_is_wrong() {
    for text in ["", "[]", "\"heartbeat\"", "{\"type\":\"heartbeat\"", "{} x", "nonsense"] {
        assert_eq!(bad(text), BadFrame::NoObject, "{text}");
    }
    for text in ["{}", "{\"type\":1}", "{\"type\":\"ack\",\"id\":7}"] {
        assert_eq!(bad(text), BadFrame::BadFields, "{text}");
    }
    assert_eq!(bad("{\"type\":\"welcome\"}"), BadFrame::UnknownType);
    assert_eq!(bad("{\"type\":\"ack\"}"), BadFrame::MissingId);
    assert_eq!(bad("{\"type\":\"message\",\"id\":\"\"}"), BadFrame::BadId);
    let long = "x".repeat(257);
    assert_eq!(
        bad(&format!("{{\"type\":\"message\",\"id\":\"{long}\"}}")),
        BadFrame::BadId
    );
    assert_eq!(
        bad(&format!("{{\"type\":\"message\",\"id\":\"1\",\"topic\":\"{long}\"}}")),
        BadFrame::BadTopic
    );
}

#[test]
fn deep_nesting_is_bad_or_passed_but_never_a_crash() {
    let deep = format!(
        "{{\"type\":\"message\",\"id\":\"1\",\"payload\":{}1{}}}",
        "[".repeat(20_000),
        "]".repeat(20_000)
    );

    let _ = DeviceFrame::parse(&deep);
    let _ = DeviceFrame::parse(&deep[..20_000]);
}

#[test]
fn frames_of_the_gateway_have_the_contract_s_form() {
    let payload = RawValue::from_string("{\"on\":true}".into()).unwrap();
    let welcome = ServerFrame::Welcome {
        session: "1f".into(),
        heartbeat_ms: 30_000,
        backoff_cap_ms: 60_000,
        resume: None,
        server_time: "2026-01-01T00:00:00Z".into(),
    };

    assert_eq!(
        welcome.to_json(),
        r#"{"type":"welcome","session":"1f","heartbeat_ms":30000,"backoff_cap_ms":60000,"server_time":"2026-01-01T00:00:00Z"}"#
    );
    assert_eq!(
        ServerFrame::Message {
            id: "a".into(),
            payload: &payload
        }
        .to_json(),
        r#"{"type":"message","id":"a","payload":{"on":true}}"#
    );
    assert_eq!(
        ServerFrame::Reconnect {
            after_ms: 7,
            slot: Some("s".into()),
            reason: "draining".into()
        }
        .to_json(),
        r#"{"type":"reconnect","after_ms":7,"slot":"s","reason":"draining"}"#
    );
    assert_eq!(
        ServerFrame::Error {
            code: ErrorCode::BadFrame,
            detail: "d".into()
        }
        .to_json(),
        r#"{"type":"error","code":"bad_frame","detail":"d"}"#
    );
}

#[test]
fn what_a_device_writes_is_what_the_gateway_reads() {
    let payload = RawValue::from_string("[1]".into()).unwrap();
    let frame = DeviceFrame::Message {
        id: "\"1\"".into(),
        topic: Some("t".into()),
        payload: Some(&payload),
    };

    let text = frame.to_json();

    assert_eq!(text, r#"{"type":"message","id":"\"1\"","topic":"t","payload":[1]}"#);
    assert_eq!(DeviceFrame::parse(&text).unwrap().to_json(), text);
}

#[test]
fn what_the_gateway_writes_is_what_a_device_reads() {
    let raw = RawValue::from_string("{\"url\":\"x\"}".into()).unwrap();
    for frame in [
        ServerFrame::Welcome {
            session: "1f".into(),
            heartbeat_ms: 1,
            backoff_cap_ms: 2,
            resume: Some("r".into()),
            server_time: "t".into(),
        },
        ServerFrame::Resume { token: "r".into() },
        ServerFrame::Message {
            id: "a".into(),
            payload: &raw,
        },
        ServerFrame::Ack { id: "a".into() },
        ServerFrame::Reconnect {
            after_ms: 7,
            slot: None,
            reason: "draining".into(),
        },
        ServerFrame::Update {
            rule: RuleId(uuid::Uuid::from_u128(1)),
            update: &raw,
        },
        ServerFrame::Error {
            code: ErrorCode::RateLimited,
            detail: "d".into(),
        },
    ] {
        let text = frame.to_json();

        assert_eq!(ServerFrame::parse(&text).unwrap().to_json(), text);
    }
    assert!(ServerFrame::parse("{\"type\":\"new\"}").is_none());
}

proptest! {
    #[test]
    fn any_text_is_read_or_bad(text in ".{0,200}") {
        let _ = DeviceFrame::parse(&text);
    }

    #[test]
    fn any_nearly_right_frame_is_read_or_bad(
        kind in "(heartbeat|message|ack|[a-z]{0,9})",
        id in "[\\PC]{0,140}",
        rest in "[\\{\\}\\[\\]\",:a-z0-9]{0,40}",
    ) {
        let id = serde_json::to_string(&id).unwrap();
        let _ = DeviceFrame::parse(&format!("{{\"type\":\"{kind}\",\"id\":{id},\"payload\":{rest}}}"));
        let _ = DeviceFrame::parse(&format!("{{\"id\":{id},{rest}}}"));
    }
}
