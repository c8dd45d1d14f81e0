use base64::{Engine, engine::general_purpose::STANDARD};
use proptest::prelude::*;

use super::*;
use crate::{id::SecretHash, refusal::Code};

const ID: &str = "9b0c2e4a-11d2-7f00-8000-0000000000aa";
const OTHER_ID: &str = "00000000-0000-4000-8000-000000000001";
const UPGRADE: [(&str, &str); 4] = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

fn parse_with(method: &str, target: &str, http_minor: u8, headers: &[(&str, &str)]) -> Result<Request, Refusal> {
    let headers: Vec<(&str, &[u8])> = headers.iter().map(|(name, value)| (*name, value.as_bytes())).collect();
    let head = Head {
        method,
        target,
        http_minor,
        headers: &headers,
    };
    parse(&head, &Paths::default(), &IdentityNames::default(), None)
}

/// An upgrade with these headers added.
fn hello(target: &str, extra: &[(&str, &str)]) -> Result<Hello, Refusal> {
    let headers: Vec<_> = UPGRADE.into_iter().chain(extra.iter().copied()).collect();
    match parse_with("GET", target, 1, &headers)? {
        Request::Connect(hello) => Ok(hello),
        Request::Ready | Request::Health => panic!("not a device's request"),
    }
}

/// An upgrade of a device with a header replaced, or removed.
fn upgrade_with(name: &str, value: Option<&str>) -> Result<Request, Refusal> {
    let headers: Vec<_> = UPGRADE
        .into_iter()
        .filter(|(header, _)| *header != name)
        .chain(value.map(|value| (name, value)))
        .chain([("Seawall-Device", ID)])
        .collect();
    parse_with("GET", "/v1/connect", 1, &headers)
}

fn code<T: std::fmt::Debug>(result: Result<T, Refusal>) -> Code {
    result.unwrap_err().code
}

fn basic(pair: &str) -> String {
    format!("Basic {}", STANDARD.encode(pair))
}

/// An upgrade with these headers added, over TLS with a client certificate.
fn certified_hello(certified: Certified, extra: &[(&str, &str)]) -> Result<Hello, Refusal> {
    let headers: Vec<(&str, &[u8])> = UPGRADE
        .into_iter()
        .chain(extra.iter().copied())
        .map(|(name, value)| (name, value.as_bytes()))
        .collect();
    let head = Head {
        method: "GET",
        target: "/v1/connect",
        http_minor: 1,
        headers: &headers,
    };
    match parse(&head, &Paths::default(), &IdentityNames::default(), Some(certified))? {
        Request::Connect(hello) => Ok(hello),
        Request::Ready | Request::Health => panic!("not a device's request"),
    }
}

#[test]
fn certificate_is_id_and_credential_and_a_different_id_beside_it_is_refused() {
    let credential = Credential::of_certificate(b"der", crate::id::CertificateTag::of(b"ca", b"1"));
    let certified = Certified::Device {
        device: ID.parse().unwrap(),
        credential,
    };

    for extra in [&[][..], &[("Seawall-Device", ID)], &[("Authorization", "Bearer x")]] {
        let hello = certified_hello(certified, extra).unwrap();

        assert_eq!(
            (hello.device, hello.credential),
            (ID.parse().unwrap(), Some(credential))
        );
    }
    let other_basic = basic(&format!("{OTHER_ID}:x"));
    for extra in [
        ("Seawall-Device", OTHER_ID),
        ("Authorization", &other_basic),
        ("Seawall-Device", "x"),
    ] {
        assert_eq!(code(certified_hello(certified, &[extra])), Code::BadRequest);
    }
    assert_eq!(
        code(certified_hello(Certified::Ambiguous, &[("Seawall-Device", ID)])),
        Code::BadRequest
    );
}

#[test]
fn full_hello_is_read_from_headers() {
    let hello = hello(
        "/v1/connect",
        &[
            ("seawall-device", &ID.to_uppercase()),
            ("AUTHORIZATION", "bearer  s3cret"),
            ("Seawall-Firmware", " 3.8.0 b3 "),
            ("Seawall-Model", "cam"),
            ("Seawall-Tenant", "acme"),
            ("Seawall-Slot", "c2xvdA"),
            ("Seawall-Resume", "cmVzdW1l"),
            ("Sec-WebSocket-Protocol", "mqtt, seawall.v1"),
        ],
    )
    .unwrap();

    assert_eq!(hello.device, ID.parse().unwrap());
    assert_eq!(hello.credential, Some(SecretHash::of(b"s3cret").into()));
    assert_eq!(hello.firmware.as_deref(), Some("3.8.0 b3"));
    assert_eq!(hello.model.as_deref(), Some("cam"));
    assert_eq!(hello.tenant.as_deref(), Some("acme"));
    assert_eq!(hello.slot.as_deref(), Some("c2xvdA"));
    assert_eq!(hello.resume.as_deref(), Some("cmVzdW1l"));
    assert_eq!(hello.session_kind, SessionKind::V1);
    assert_eq!(hello.protocol.as_deref(), Some("seawall.v1"));
    assert_eq!(&hello.websocket_key, b"dGhlIHNhbXBsZSBub25jZQ==");
}

#[test]
fn basic_names_the_device_and_its_credential() {
    let hello = hello("/v1/connect", &[("Authorization", &basic(&format!("{ID}:a:b")))]).unwrap();

    assert_eq!(hello.device, ID.parse().unwrap());
    assert_eq!(hello.credential, Some(SecretHash::of(b"a:b").into()));
}

#[test]
fn white_space_around_an_id_means_nothing_wherever_it_stands() {
    let bearer = ("Authorization", "Bearer x");
    let pair = basic(&format!(" {ID} :x"));
    let ids = [
        hello("/v1/connect", &[("Seawall-Device", &format!(" {ID} ")), bearer]),
        hello(&format!("/v1/connect?device=%20{ID}%20"), &[bearer]),
        hello("/v1/connect", &[("Authorization", &pair)]),
    ];

    for hello in ids {
        assert_eq!(hello.unwrap().device, ID.parse().unwrap());
    }
}

#[test]
fn query_is_percent_decoded_and_a_plus_stays() {
    let hello = hello(
        &format!("/v1/connect?device={ID}&firmware=3.8.0%2Db3+x%20y&m%6Fdel=cam&tenant="),
        &[],
    )
    .unwrap();

    assert_eq!(hello.device, ID.parse().unwrap());
    assert_eq!(hello.firmware.as_deref(), Some("3.8.0-b3+x y"));
    assert_eq!(hello.model.as_deref(), Some("cam"));
    assert_eq!(hello.tenant, None);
    assert_eq!(hello.credential, None);
}

#[test]
fn first_source_that_is_present_decides() {
    let target = format!("/v1/connect?device={OTHER_ID}&firmware=2.0");
    let authorization = basic(&format!("{ID}:x"));

    let by_header = hello(
        &target,
        &[
            ("Seawall-Device", ID),
            ("Authorization", &basic(&format!("{OTHER_ID}:x"))),
        ],
    );
    let by_basic = hello(&target, &[("Authorization", &authorization)]);
    let by_query = hello(&target, &[("Authorization", "Bearer x")]);
    let firmware = hello(&target, &[("Seawall-Firmware", "1.0")]);

    assert_eq!(by_header.unwrap().device, ID.parse().unwrap());
    assert_eq!(by_basic.unwrap().device, ID.parse().unwrap());
    assert_eq!(by_query.unwrap().device, OTHER_ID.parse().unwrap());
    assert_eq!(firmware.unwrap().firmware.as_deref(), Some("1.0"));
}

#[test]
fn malformed_source_decides_too() {
    let target = format!("/v1/connect?device={ID}&firmware=2.0");

    for extra in [
        ("Seawall-Device", "no-uuid"),
        ("Seawall-Device", ""),
        ("Authorization", &basic("no-uuid:x")),
        ("Authorization", &basic("no colon")),
        ("Authorization", "Basic !!!"),
        ("Seawall-Firmware", "3.8\t0"),
        ("Seawall-Firmware", &"x".repeat(65)),
    ] {
        assert_eq!(code(hello(&target, &[extra])), Code::BadRequest, "{extra:?}");
    }
}

#[test]
fn present_but_empty_label_means_none() {
    let hello = hello(
        &format!("/v1/connect?device={ID}&firmware=2.0"),
        &[("Seawall-Firmware", " ")],
    )
    .unwrap();

    assert_eq!(hello.firmware, None);
}

#[test]
fn basic_without_a_user_leaves_the_id_to_the_query() {
    let hello = hello(&format!("/v1/connect?device={ID}"), &[("Authorization", &basic(":s"))]).unwrap();

    assert_eq!(hello.device, ID.parse().unwrap());
    assert_eq!(hello.credential, Some(SecretHash::of(b"s").into()));
}

#[test]
fn missing_or_empty_or_foreign_credential_is_none() {
    for authorization in ["", "Bearer", "Bearer ", "Digest x", "s3cret", &basic(&format!("{ID}:"))] {
        let hello = hello(
            "/v1/connect",
            &[("Seawall-Device", ID), ("Authorization", authorization)],
        )
        .unwrap();

        assert_eq!(hello.credential, None, "{authorization}");
    }
}

#[test]
fn missing_id_is_refused() {
    assert_eq!(code(hello("/v1/connect", &[])), Code::BadRequest);
    assert_eq!(code(hello("/v1/connect?other=1", &[])), Code::BadRequest);
}

#[test]
fn doubled_header_or_deciding_parameter_is_refused() {
    for name in [
        "Seawall-Firmware",
        "Seawall-Model",
        "Seawall-Tenant",
        "Seawall-Slot",
        "Seawall-Resume",
        "Authorization",
    ] {
        let doubled = hello(
            "/v1/connect",
            &[("Seawall-Device", ID), (name, "a"), (&name.to_lowercase(), "a")],
        );

        assert_eq!(code(doubled), Code::BadRequest, "{name}");
    }
    assert_eq!(
        code(hello("/v1/connect", &[("Seawall-Device", ID), ("Seawall-Device", ID)])),
        Code::BadRequest
    );
    assert_eq!(
        code(hello(&format!("/v1/connect?device={ID}&device={ID}"), &[])),
        Code::BadRequest
    );
    for name in ["Sec-WebSocket-Key", "Sec-WebSocket-Version"] {
        let value = UPGRADE.iter().find(|(header, _)| *header == name).unwrap().1;
        assert_eq!(
            code(hello("/v1/connect", &[("Seawall-Device", ID), (name, value)])),
            Code::BadRequest
        );
    }
}

#[test]
fn token_that_cannot_be_ours_is_ignored() {
    for token in ["", "a b", &"x".repeat(257)] {
        let hello = hello("/v1/connect", &[("Seawall-Device", ID), ("Seawall-Slot", token)]).unwrap();

        assert_eq!(hello.slot, None);
    }
}

#[test]
fn renamed_headers_and_parameters_replace_the_defaults() {
    let names = IdentityNames {
        device_header: "X-Device-Id".into(),
        firmware_query: "fw".into(),
        ..IdentityNames::default()
    };
    let device: [(&str, &[u8]); 3] = [
        ("x-device-id", ID.as_bytes()),
        ("Seawall-Device", b"ignored"),
        ("Seawall-Device", b"twice"),
    ];
    let headers: Vec<(&str, &[u8])> = UPGRADE
        .iter()
        .map(|(name, value)| (*name, value.as_bytes()))
        .chain(device)
        .collect();
    let head = Head {
        method: "GET",
        target: "/v1/connect?fw=3.8.0&firmware=9",
        http_minor: 1,
        headers: &headers,
    };

    let Ok(Request::Connect(hello)) = parse(&head, &Paths::default(), &names, None) else {
        panic!("refused");
    };

    assert_eq!(hello.device, ID.parse().unwrap());
    assert_eq!(hello.firmware.as_deref(), Some("3.8.0"));
}

#[test]
fn resources_and_methods() {
    assert_eq!(code(parse_with("GET", "/", 1, &[])), Code::NotFound);
    assert_eq!(code(parse_with("GET", "/v1/connect/", 1, &[])), Code::NotFound);
    assert_eq!(code(parse_with("POST", "/nothing", 1, &[])), Code::NotFound);
    assert_eq!(code(parse_with("POST", "/v1/connect", 1, &[])), Code::MethodNotAllowed);
    assert_eq!(code(parse_with("POST", "/readyz", 1, &[])), Code::MethodNotAllowed);
    assert_eq!(code(parse_with("OPTIONS", "/healthz", 1, &[])), Code::MethodNotAllowed);
    assert_eq!(parse_with("HEAD", "/readyz", 1, &[]), Ok(Request::Ready));
    assert_eq!(parse_with("GET", "/healthz", 0, &[]), Ok(Request::Health));
    assert_eq!(parse_with("HEAD", "/healthz", 0, &[]), Ok(Request::Health));
    assert_eq!(parse_with("GET", "/readyz?full", 0, &[]), Ok(Request::Ready));
}

#[test]
fn absolute_form_is_understood() {
    assert!(hello(&format!("http://gw.example:8080/v1/connect?device={ID}"), &[]).is_ok());
    assert_eq!(code(hello("http://gw.example", &[])), Code::NotFound);
    assert!(hello(&format!("/v1/connect?u=a://b&device={ID}"), &[]).is_ok());
}

#[test]
fn upgrade_must_be_asked_for_in_http_1_1_and_version_13() {
    assert!(upgrade_with("Connection", Some("keep-alive, UPGRADE")).is_ok());
    for (name, value) in [
        ("Connection", None),
        ("Connection", Some("keep-alive")),
        ("Connection", Some("upgraded")),
        ("Upgrade", None),
        ("Upgrade", Some("h2c")),
        ("Sec-WebSocket-Version", None),
        ("Sec-WebSocket-Version", Some("8")),
        ("Sec-WebSocket-Version", Some("13, 8")),
    ] {
        assert_eq!(
            code(upgrade_with(name, value)),
            Code::UpgradeRequired,
            "{name} {value:?}"
        );
    }
    assert_eq!(
        code(parse_with("GET", "/v1/connect", 0, &UPGRADE)),
        Code::UpgradeRequired
    );
    assert_eq!(code(parse_with("GET", "/v1/connect", 1, &[])), Code::UpgradeRequired);
}

#[test]
fn upgrade_tokens_may_stand_on_several_lines() {
    let hello = hello(
        "/v1/connect",
        &[("Seawall-Device", ID), ("Connection", "keep-alive"), ("Upgrade", "h2c")],
    );

    assert!(hello.is_ok());
}

#[test]
fn key_must_be_base64_of_16_bytes() {
    // Unused bits set in the last character: sent by firmware that draws random characters.
    assert!(upgrade_with("Sec-WebSocket-Key", Some("dGhlIHNhbXBsZSBub25jZZ==")).is_ok());
    for key in [
        None,
        Some(""),
        Some("dGhlIHNhbXBsZSBub25jZQ"),
        Some("dGhlIHNhbXBsZSBub25jZQ=a"),
        Some("dGhlIHNhbXBsZSBub25jZTE="),
        Some("dGhlIHNhbXBsZSBub25jZTEy"),
        Some("!!!!!!!!!!!!!!!!!!!!!!=="),
    ] {
        assert_eq!(
            code(upgrade_with("Sec-WebSocket-Key", key)),
            Code::BadRequest,
            "{key:?}"
        );
    }
}

#[test]
fn body_is_refused() {
    assert!(upgrade_with("Content-Length", Some("0")).is_ok());
    for (name, value) in [
        ("Content-Length", "1"),
        ("Content-Length", "x"),
        ("Transfer-Encoding", "chunked"),
    ] {
        assert_eq!(code(upgrade_with(name, Some(value))), Code::BadRequest);
    }
}

#[test]
fn sub_protocol_rules() {
    let negotiated = |offers: &str| {
        let hello = hello(
            "/v1/connect",
            &[("Seawall-Device", ID), ("Sec-WebSocket-Protocol", offers)],
        );
        hello.map(|hello| (hello.session_kind, hello.protocol.map(String::from)))
    };

    assert_eq!(
        negotiated("seawall.v1"),
        Ok((SessionKind::V1, Some("seawall.v1".into())))
    );
    assert_eq!(
        negotiated("a,b , seawall.v1"),
        Ok((SessionKind::V1, Some("seawall.v1".into())))
    );
    assert_eq!(negotiated("arduino"), Ok((SessionKind::Plain, Some("arduino".into()))));
    assert_eq!(negotiated("b, a"), Ok((SessionKind::Plain, Some("b".into()))));
    assert_eq!(
        negotiated("Seawall.V1"),
        Ok((SessionKind::Plain, Some("Seawall.V1".into())))
    );
    assert_eq!(negotiated(""), Ok((SessionKind::Plain, None)));
    assert_eq!(code(negotiated("seawall.v1, a b")), Code::BadRequest);
    assert_eq!(code(negotiated("a/b")), Code::BadRequest);
}

#[test]
fn refusals_never_echo_what_was_sent() {
    let mark = "zqzqzq";
    for extra in [
        ("Seawall-Device", mark.to_owned()),
        ("Authorization", format!("Basic {mark}")),
        ("Seawall-Firmware", format!("{mark}\u{1}")),
        ("Sec-WebSocket-Protocol", format!("{mark} x")),
    ] {
        let refusal = hello(&format!("/v1/connect?device={mark}"), &[(extra.0, &extra.1)]).unwrap_err();

        let mut out = Vec::new();
        refusal.write_response(&mut out);
        assert!(!String::from_utf8(out).unwrap().contains(mark));
    }
}

/// Headers with a meaning, with values from nonsense to nearly valid.
fn any_header() -> impl Strategy<Value = (String, Vec<u8>)> {
    let name = prop_oneof![
        prop::sample::select(vec![
            "Connection",
            "Upgrade",
            "Sec-WebSocket-Version",
            "Sec-WebSocket-Key",
            "Sec-WebSocket-Protocol",
            "Seawall-Device",
            "Seawall-Firmware",
            "Seawall-Slot",
            "Authorization",
            "Content-Length",
            "Transfer-Encoding",
        ])
        .prop_map(String::from),
        "[a-zA-Z-]{1,20}",
    ];
    let value = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..80),
        prop::sample::select(vec![
            "Upgrade",
            "websocket",
            "13",
            "dGhlIHNhbXBsZSBub25jZQ==",
            ID,
            "Basic ",
            "Basic Og==",
            "Bearer x",
            "seawall.v1",
            "0",
        ])
        .prop_map(|text| text.as_bytes().to_vec()),
    ];
    (name, value)
}

proptest! {
    #[test]
    fn any_head_is_parsed_or_refused_without_a_panic(
        method in prop::sample::select(vec!["GET", "POST", "", "get"]),
        target in prop_oneof![".{0,80}", "/v1/connect(\\?[a-z=&%0-9]{0,60})?", "[a-z]{1,4}://.{0,40}"],
        http_minor in 0_u8..3,
        headers in prop::collection::vec(any_header(), 0..14),
        keep_upgrade in any::<bool>(),
    ) {
        let upgrade = UPGRADE.iter().map(|(name, value)| (*name, value.as_bytes())).filter(|_| keep_upgrade);
        let headers: Vec<(&str, &[u8])> =
            upgrade.chain(headers.iter().map(|(name, value)| (name.as_str(), value.as_slice()))).collect();

        let _ = parse(&Head { method, target: &target, http_minor, headers: &headers }, &Paths::default(), &IdentityNames::default(), None);
    }

    #[test]
    fn any_label_header_is_kept_trimmed_or_refused(value in prop::collection::vec(any::<u8>(), 0..80)) {
        let mut headers: Vec<(&str, &[u8])> =
            UPGRADE.iter().map(|(name, value)| (*name, value.as_bytes())).collect();
        headers.push(("Seawall-Device", ID.as_bytes()));
        headers.push(("Seawall-Firmware", &value));

        match parse(&Head { method: "GET", target: "/v1/connect", http_minor: 1, headers: &headers }, &Paths::default(), &IdentityNames::default(), None) {
            Ok(Request::Connect(hello)) => prop_assert!(hello.firmware.is_none_or(|firmware| firmware.len() <= Label::LEN_MAX)),
            Ok(Request::Ready | Request::Health) => prop_assert!(false),
            Err(refusal) => prop_assert_eq!(refusal.code, Code::BadRequest),
        }
    }
}

#[test]
fn id_in_the_path_comes_behind_headers_and_basic_and_before_the_query() {
    let paths = Paths::try_from(vec!["/ocpp/{device}".to_owned(), "/v1/connect".to_owned()]).unwrap();
    let device = |target: &str, extra: &[(&str, &str)]| {
        let headers: Vec<(&str, &[u8])> = UPGRADE
            .into_iter()
            .chain(extra.iter().copied())
            .map(|(name, value)| (name, value.as_bytes()))
            .collect();
        let head = Head {
            method: "GET",
            target,
            http_minor: 1,
            headers: &headers,
        };
        match parse(&head, &paths, &IdentityNames::default(), None) {
            Ok(Request::Connect(hello)) => Ok(hello.device.to_string()),
            Ok(Request::Ready | Request::Health) => panic!("not a device's request"),
            Err(refusal) => Err(refusal.code),
        }
    };
    let in_path = format!("//ocpp//{ID}?device={OTHER_ID}");

    assert_eq!(device(&in_path, &[]), Ok(ID.into()));
    assert_eq!(device(&in_path, &[("Seawall-Device", OTHER_ID)]), Ok(OTHER_ID.into()));
    let basic = basic(&format!("{OTHER_ID}:secret"));
    assert_eq!(device(&in_path, &[("Authorization", &basic)]), Ok(OTHER_ID.into()));
    assert_eq!(device(&format!("/v1/connect?device={ID}"), &[]), Ok(ID.into()));
    assert_eq!(device(&format!("/ocpp/x?device={ID}"), &[]), Err(Code::BadRequest));
    assert_eq!(device("/ocpp", &[]), Err(Code::NotFound));
}

#[test]
fn id_that_is_not_a_uuid_is_taken_from_every_source_where_there_is_a_namespace() {
    let paths = Paths::try_from(vec!["/ocpp/{device}".to_owned()]).unwrap();
    let names = IdentityNames {
        namespace: Some(uuid::Uuid::NAMESPACE_DNS),
        ..IdentityNames::default()
    };
    let basic = basic("CP 01:secret");
    for (target, extra) in [
        ("/ocpp/CP%2001", None),
        ("/ocpp/x", Some(("Seawall-Device", " CP 01 "))),
        ("/ocpp/x", Some(("Authorization", basic.as_str()))),
    ] {
        let headers: Vec<(&str, &[u8])> = UPGRADE
            .into_iter()
            .chain(extra)
            .map(|(name, value)| (name, value.as_bytes()))
            .collect();
        let head = Head {
            method: "GET",
            target,
            http_minor: 1,
            headers: &headers,
        };
        let Ok(Request::Connect(hello)) = parse(&head, &paths, &names, None) else {
            panic!("a device's request")
        };

        assert_eq!(hello.external_id.as_deref(), Some("CP 01"), "{target}");
        assert_eq!(Some(hello.device), names.device("CP 01").map(|named| named.id));
    }
}

#[test]
fn host_is_not_looked_at() {
    for hosts in [&[][..], &[("Host", "a"), ("Host", "b")]] {
        let device = [("Seawall-Device", ID)];
        let headers: Vec<_> = hosts.iter().copied().chain(device).collect();

        assert!(hello("/v1/connect", &headers).is_ok(), "{hosts:?}");
    }
}
