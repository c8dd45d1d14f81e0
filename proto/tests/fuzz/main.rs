//! Input from peers and operators: nothing panics, accepted input survives a round trip, and nothing takes long.
//!
//! A long run: `PROPTEST_CASES=1000000 cargo test --release -p seawall-proto --test fuzz`. See [`mutate`] for the
//! corpus.

#![expect(clippy::unwrap_used, reason = "a test that cannot continue has failed")]

#[expect(clippy::disallowed_methods, reason = "not a decision: it reads what the parsers get")]
mod mutate;

use std::{
    cmp::Ordering,
    path::{Path, PathBuf},
    sync::LazyLock,
    time::{Duration, Instant},
};

use proptest::{prelude::*, test_runner::TestRunner};
use rand::{SeedableRng, rngs::SmallRng};
use seawall_proto::{
    admission::{Admission, AdmissionConfig, Arrival, CohortTag, Decision, Registry},
    firmware::{Range, Version, compare},
    frame::{DeviceFrame, ServerFrame},
    hello::{self, Head, Hello, IdentityNames, Paths, Request},
    id::{Credential, DeviceId, Label, Network, SecretHash, SessionId},
    resume::{Generation, Grant, ResumeKeys, Revoked, Verifier},
    rules::{Rule, RuleSet, RuleSpec, Subject},
    slots::{SlotKeys, Slots},
    time::{Instant as Moment, WallTime},
};

use crate::mutate::{inputs, settings};

/// Maximum time of a single input, on a machine with other load. The work takes microseconds.
const TIME_MAX: Duration = Duration::from_secs(1);

fn folder(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fuzz/corpus")
        .join(kind)
}

/// Runs `check` on inputs made from the corpus of `kind`.
#[expect(
    clippy::disallowed_methods,
    reason = "not a decision: it measures the time of decisions"
)]
fn try_all(kind: &str, check: impl Fn(&[u8]) -> Result<(), TestCaseError>) {
    let settings = settings(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/failures.txt"));
    let mut runner = TestRunner::new(settings);
    let tried = runner.run(&inputs(&folder(kind)), |input| {
        let begun = Instant::now();
        check(&input)?;
        prop_assert!(begun.elapsed() < TIME_MAX, "{:?}", begun.elapsed());
        Ok(())
    });
    if let Err(failure) = tried {
        panic!("{failure}");
    }
}

/// The input as text, lossily.
fn text(input: &[u8]) -> String {
    String::from_utf8_lossy(input).into_owned()
}

#[test]
fn heads() {
    try_all("head", |input| {
        let head = text(input);
        let mut lines = head.split("\r\n");
        let mut first = lines.next().unwrap_or_default().splitn(3, ' ');
        let (method, target) = (first.next().unwrap_or_default(), first.next().unwrap_or_default());
        let headers: Vec<(&str, &[u8])> = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name, value.trim_matches([' ', '\t']).as_bytes()))
            .collect();
        let names = IdentityNames::default();
        let trusted = |address: std::net::IpAddr| address.is_loopback();
        let _ = hello::forwarded_for(&headers, trusted);
        let head = |method, target, headers| Head {
            method,
            target,
            http_minor: 1,
            headers,
        };
        let Ok(Request::Connect(hello)) =
            hello::parse(&head(method, target, &headers), &Paths::default(), &names, None)
        else {
            return Ok(());
        };
        let lines = said_again(&hello);
        let headers: Vec<_> = lines.iter().map(|(name, value)| (*name, value.as_bytes())).collect();
        let again = hello::parse(&head("GET", "/v1/connect", &headers), &Paths::default(), &names, None);
        let expected = Hello {
            // Only its hash is kept, so it cannot be sent again.
            credential: None,
            ..hello
        };
        prop_assert_eq!(again.ok(), Some(Request::Connect(expected)));
        Ok(())
    });
}

/// The headers of a device with exactly these claims.
fn said_again(hello: &Hello) -> Vec<(&'static str, String)> {
    let key = String::from_utf8(hello.websocket_key.to_vec()).unwrap();
    let mut lines = vec![
        ("Connection", "Upgrade".to_owned()),
        ("Upgrade", "websocket".to_owned()),
        ("Sec-WebSocket-Version", "13".to_owned()),
        ("Sec-WebSocket-Key", key),
        ("Seawall-Device", hello.device.to_string()),
    ];
    let labels = [
        ("Seawall-Firmware", &hello.firmware),
        ("Seawall-Model", &hello.model),
        ("Seawall-Tenant", &hello.tenant),
    ];
    for (name, label) in labels {
        lines.extend(label.as_deref().map(|label| (name, label.to_owned())));
    }
    let texts = [
        ("Seawall-Slot", &hello.slot),
        ("Seawall-Resume", &hello.resume),
        ("Sec-WebSocket-Protocol", &hello.protocol),
    ];
    for (name, text) in texts {
        lines.extend(text.as_deref().map(|text| (name, text.to_owned())));
    }
    lines
}

#[test]
fn frames() {
    try_all("frame", |input| {
        let text = text(input);
        if let Ok(frame) = DeviceFrame::parse(&text) {
            let said = frame.to_json();
            let again = DeviceFrame::parse(&said).map(|frame| frame.to_json());
            prop_assert_eq!(again, Ok(said));
        }
        if let Some(frame) = ServerFrame::parse(&text) {
            let said = frame.to_json();
            let again = ServerFrame::parse(&said).map(|frame| frame.to_json());
            prop_assert_eq!(again, Some(said));
        }
        Ok(())
    });
}

#[test]
fn versions_have_one_order() {
    try_all("version", |input| {
        let text = text(input);
        let mut versions: Vec<&str> = text.lines().take(6).collect();
        versions.push("1.0");
        for left in &versions {
            prop_assert_eq!(compare(left, left), Ordering::Equal, "{:?}", left);
            let _ = Version::of(left).is_numbered();
            for right in &versions {
                prop_assert_eq!(
                    compare(left, right),
                    compare(right, left).reverse(),
                    "{:?} {:?}",
                    left,
                    right
                );
                for third in &versions {
                    let is_chain = compare(left, right).is_le() && compare(right, third).is_le();
                    prop_assert!(
                        !is_chain || compare(left, third).is_le(),
                        "{:?} {:?} {:?}",
                        left,
                        right,
                        third
                    );
                }
            }
        }
        Ok(())
    });
}

#[test]
fn ranges_say_the_same_again() {
    try_all("range", |input| {
        let text = text(input);
        let Ok(range) = text.parse::<Range>() else {
            return Ok(());
        };
        let again: Range = range.as_str().parse().unwrap();
        prop_assert_eq!(again.as_str(), range.as_str());
        for firmware in [None, Some("3.8.0-b3"), Some("1"), Some("none"), Some(text.as_str())] {
            prop_assert_eq!(range.matches(firmware), again.matches(firmware), "{:?}", firmware);
        }
        Ok(())
    });
}

#[test]
fn rules_say_the_same_again() {
    try_all("rule", |input| {
        let Ok(spec) = serde_json::from_slice::<RuleSpec>(input) else {
            return Ok(());
        };
        if spec.validate().is_err() {
            return Ok(());
        }
        let again: RuleSpec = serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
        prop_assert_eq!(&again, &spec);
        let rule = Rule {
            id: seawall_proto::id::RuleId(uuid::Uuid::from_u128(1)),
            created_at: WallTime::from_unix_ms(1),
            revision: 1,
            spec,
        };
        let set = RuleSet::compile(1, vec![rule]);
        let subject = Subject {
            device: None,
            firmware: Some("3.8.0-b3"),
            model: Some("display"),
            tenant: Some("default"),
        };
        let _ = set.verdict(&subject, WallTime::from_unix_ms(1_800_000_000_000));
        Ok(())
    });
}

static KEYS: LazyLock<ResumeKeys> = LazyLock::new(|| ResumeKeys::new(1, [7; 32]));
const WALL: WallTime = WallTime::from_unix_ms(1_800_000_000_000);

#[test]
fn no_resume_token_but_the_one_that_was_given_counts() {
    let device = DeviceId::from_uuid(uuid::Uuid::from_u128(7));
    let credential = Credential::from(SecretHash::of(b"secret"));
    let grant = Grant {
        device,
        credential,
        tenant: Label::parse("default").unwrap().unwrap(),
        model: None,
        generation: Generation(0),
        credential_until: None,
    };
    let session = SessionId(9);
    let token = grant
        .mint(&KEYS, session, Duration::from_secs(86_400), WALL)
        .unwrap()
        .text;
    let revoked = Revoked::of(Generation(0), Generation(0), []);
    let verifier = Verifier {
        keys: &KEYS,
        revoked: &revoked,
        is_stale: false,
    };
    try_token(&token, |text| verifier.verify(device, &credential, text, WALL).is_ok());
}

#[test]
fn slot_tokens_of_nobody_change_nothing() {
    // Here only admission's handling of the token matters. The signature has its own test.
    let device = DeviceId::from_uuid(uuid::Uuid::from_u128(7));
    let now = Moment::from_micros(0);
    let config = AdmissionConfig::default();
    let mut slots = Slots::new(&config.slots(), SlotKeys::new(1, [7; 32]));
    let mut admission = Admission::<(), ()>::new(config, now);
    admission.handle_registry(Registry::Absent, now);
    let mut rng = SmallRng::seed_from_u64(1);
    let (at_least, rate) = (Duration::from_secs(30), admission.k_ref(now));
    let hint = slots.give(device, None, at_least, rate, (now, WALL), &mut rng);
    let token = hint.slot.unwrap();
    let state = std::cell::RefCell::new((admission, slots, rng));
    try_token(&token, |text| {
        let (admission, slots, rng) = &mut *state.borrow_mut();
        // A new unknown device each time: only its own slot would be remembered.
        let arrival = Arrival {
            device: DeviceId::from_uuid(uuid::Uuid::from_u128(rand::Rng::random(rng))),
            cohort: CohortTag::of(None, None),
            slot_token: Some(text),
            arrived: now,
            is_known_absent: false,
            credential: (&Credential::from(SecretHash::of(b"a secret"))).into(),
            network: Network::V4(1),
        };
        let decision = admission.attempt(&arrival, || (), slots, (now, WALL), rng);
        assert!(matches!(decision, Decision::Refused(refused) if refused.hint.slot.is_some()));
        text == &*token
    });
}

/// `counts` must reject everything except the token itself.
#[expect(
    clippy::disallowed_methods,
    reason = "not a decision: it writes what the parsers get"
)]
fn try_token(token: &str, counts: impl Fn(&str) -> bool) {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("token"), token).unwrap();
    let settings = settings(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/failures.txt"));
    let tried = TestRunner::new(settings).run(&inputs(home.path()), |input| {
        let text = text(&input);
        prop_assert_eq!(counts(&text), text == token, "{:?}", text);
        Ok(())
    });
    if let Err(failure) = tried {
        panic!("{failure}");
    }
}
