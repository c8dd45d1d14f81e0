//! The work of the benches: connecting, rules, slots, tokens, lookups and frames, with the figures of a busy gateway.
//! `decisions` measures it in time, `instructions` in instructions.

use std::{hint::black_box, sync::Arc, time::Duration};

use rand::{SeedableRng, rngs::SmallRng};
use seawall_proto::{
    admission::{self, Admission, AdmissionConfig, Arrival, Batch, CohortTag, Decision, Outcome, Ticket, Told},
    connect::{self, Admitted, Conclusion, Conditions, Connect, Output, Row, Step},
    firmware::Range,
    frame::{DeviceFrame, ServerFrame},
    hello::{self, Head, Hello, IdentityNames, Paths, Request},
    id::{Credential, DeviceId, Label, Network, RuleId, SecretHash, SessionId},
    record::{DeviceRecord, DeviceState},
    resume::{Accepted, Generation, Grant, LIFE, Minted, ResumeKeys, Revoked, Verifier},
    rules::{Effect, Match, Rule, RuleSet, RuleSpec, Subject, Verdict},
    slots::{SlotKeys, Slots},
    time::{Instant, WallTime},
};
use uuid::Uuid;

/// Number of rules of a node with many.
pub const RULES: u32 = 1_000;
/// Number of devices of one lookup.
pub const KEYS: usize = 64;

const WALL: WallTime = WallTime::from_unix_ms(1_800_000_000_000);
const SECRET: &str = "c2Vhd2FsbC1kZXZpY2Utc2VjcmV0";
const ID: &str = "9b0c2e4a-11d2-7f00-8000-0000000000aa";
const MESSAGE: &str =
    r#"{"type":"message","id":"m-4711","topic":"telemetry","payload":{"celsius":21.5,"free_kb":4711,"up":true}}"#;

/// A head as a device's library sends it, with the identity in headers.
const HEADERS: [(&str, &[u8]); 10] = [
    ("Host", b"gateway.example:8080"),
    ("Connection", b"Upgrade"),
    ("Upgrade", b"websocket"),
    ("Sec-WebSocket-Version", b"13"),
    ("Sec-WebSocket-Key", b"dGhlIHNhbXBsZSBub25jZQ=="),
    ("Sec-WebSocket-Protocol", b"seawall.v1"),
    ("Seawall-Device", ID.as_bytes()),
    ("Authorization", b"Bearer c2Vhd2FsbC1kZXZpY2Utc2VjcmV0"),
    ("Seawall-Firmware", b"3.8.0-b2"),
    ("Seawall-Model", b"camera"),
];

fn device(number: u128) -> DeviceId {
    DeviceId::from_uuid(Uuid::from_u128(number << 64 | number))
}

fn label(text: &str) -> Label {
    Label::parse(text).ok().flatten().expect("a label")
}

/// `count` rules, none of which matches firmware 3.8.0-b2, and one 3.500.0-b10.
pub fn rules(count: u32) -> RuleSet {
    RuleSet::compile(1, numbered_rules(count).collect())
}

/// `count` rules, half of which begin with the same versions as the others, and admit half of the devices and ten more.
pub fn rules_with_shares(count: u32) -> RuleSet {
    let with_share = |mut rule: Rule| {
        rule.id = RuleId(Uuid::from_u128(rule.id.0.as_u128() << 64));
        rule.spec.admit_percent = 50;
        rule.spec.allow = (1_000..1_010).map(device).collect();
        rule
    };
    let half = || numbered_rules(count / 2);
    RuleSet::compile(1, half().chain(half().map(with_share)).collect())
}

fn numbered_rules(count: u32) -> impl Iterator<Item = Rule> {
    let rule = |number: u32| {
        let firmware = format!(">=3.{number}.0-b3,<3.{number}.9").parse().expect("a range");
        let matches = Match {
            firmware: Some(firmware),
            ..Match::default()
        };
        Rule {
            id: RuleId(Uuid::from_u128(u128::from(number))),
            spec: RuleSpec::new(matches, Effect::Block),
            created_at: WallTime::from_unix_ms(u64::from(number)),
            revision: 1,
        }
    };
    (0..count).map(move |number| rule(number + 10))
}

/// The verdict of the rules on a device that claims this version.
pub fn verdict<'a>(rules: &'a RuleSet, firmware: &str) -> Verdict<'a> {
    let subject = Subject {
        device: Some(device(1)),
        firmware: Some(firmware),
        model: Some("camera"),
        tenant: Some("acme"),
    };
    rules.verdict(black_box(&subject), WALL)
}

/// A range with three conditions, against a version.
pub fn range() -> Range {
    ">=3.8.0-b3,<4,!=3.8.1".parse().expect("a range")
}

/// Pairs of versions of several kinds.
pub const VERSIONS: [(&str, &str); 4] = [
    ("3.8.0-b3", "3.8.0-b10"),
    ("FW_1.2.9", "FW_1.2.10"),
    ("v5.1.2-25-g0123abc-dirty", "v5.1.2-105-gfedcba9-dirty"),
    ("2025-11-02", "2025-11-10"),
];

/// The connect path of a node, and a device that connects.
pub struct ConnectPath {
    connect: Connect<()>,
    now: Instant,
    rules: Arc<RuleSet>,
    paths: Paths,
    names: IdentityNames,
    record: DeviceRecord,
    keys: ResumeKeys,
    revoked: Revoked,
    grant: Grant,
    /// A resume token of the device.
    token: Box<str>,
    rng: SmallRng,
}

impl ConnectPath {
    pub fn new() -> Self {
        let id = DeviceId::from_uuid(ID.parse().expect("a UUID"));
        let secret = SecretHash::of(SECRET.as_bytes());
        let (tenant, model) = (label("acme"), label("camera"));
        let grant = Grant {
            device: id,
            credential: secret.into(),
            tenant: tenant.clone(),
            model: Some(model.clone()),
            generation: Generation(0),
            credential_until: None,
        };
        let keys = ResumeKeys::new(1, [1; 32]);
        let revoked = (1..=60_000).map(|number| (device(number.into()), Generation(number)));
        let token = grant.mint(&keys, SessionId(1), LIFE, WALL).expect("a token").text;
        let slot_keys = SlotKeys::new(1, [7; 32]);
        Self {
            connect: Connect::new(AdmissionConfig::default(), slot_keys, Instant::ZERO),
            now: Instant::ZERO,
            rules: Arc::new(rules(RULES)),
            paths: Paths::default(),
            names: IdentityNames::default(),
            record: DeviceRecord {
                id,
                tenant,
                model: Some(model),
                secret,
                previous_secret: None,
                state: DeviceState::Enabled,
            },
            revoked: Revoked::of(Generation(60_000), Generation(0), revoked),
            keys,
            grant,
            token,
            rng: SmallRng::seed_from_u64(1),
        }
    }

    /// Parses the head.
    pub fn parse(&self) -> Hello {
        self.parse_with(&HEADERS)
    }

    fn parse_with(&self, headers: &[(&str, &[u8])]) -> Hello {
        let head = Head {
            method: "GET",
            target: "/v1/connect",
            http_minor: 1,
            headers,
        };
        match hello::parse(black_box(&head), &self.paths, &self.names, None) {
            Ok(Request::Connect(hello)) => hello,
            Ok(Request::Ready | Request::Health) | Err(_) => unreachable!("a device's request"),
        }
    }

    /// Runs the whole order with a lookup, without the time of the query.
    pub fn admit(&mut self) -> Admitted {
        let hello = self.parse();
        admitted(self.decide(&hello))
    }

    /// Runs the whole order with a resume token.
    pub fn resume(&mut self) -> Admitted {
        let mut hello = self.parse();
        hello.resume = Some(self.token.clone());
        admitted(self.decide(&hello))
    }

    /// Refuses the device by a rule. Returns the answer.
    pub fn refuse(&mut self) -> Vec<u8> {
        let mut headers = HEADERS;
        headers[8].1 = b"3.500.0-b10";
        let hello = self.parse_with(&headers);
        let mut answer = Vec::new();
        match self.decide(&hello).decision {
            connect::Decision::Refused(refusal) => refusal.write_response(&mut answer),
            connect::Decision::Admitted(_) | connect::Decision::Restricted(_) => unreachable!("a rule blocks it"),
        }
        answer
    }

    fn decide(&mut self, hello: &Hello) -> Conclusion {
        self.now += Duration::from_millis(10);
        let attempt = hello.attempt(Network::V4(1), self.now);
        let mut conditions = Conditions {
            rules: &self.rules,
            verifier: Verifier {
                keys: &self.keys,
                revoked: &self.revoked,
                is_stale: false,
            },
            draining: None,
            sessions: 0,
            now: self.now,
            wall: WALL,
        };
        let connect = &self.connect;
        let known_tenant = |attempt: &connect::Attempt<'_>| connect.claimed_tenant(attempt, conditions.now);
        let screened = match connect::screen(attempt, &conditions, known_tenant, &mut self.rng).next {
            Ok(screened) => screened,
            Err(conclusion) => return conclusion,
        };
        let (connect, rng) = (&mut self.connect, &mut self.rng);
        if let Step::Concluded(conclusion) = connect.handle_screened(screened, || (), &conditions, rng) {
            return conclusion;
        }
        loop {
            match connect.poll_output(&conditions, rng) {
                Output::Send(statement) => {
                    let row = |_| Row::Found(black_box(&self.record).clone());
                    connect.handle_answered(&statement, row, Duration::ZERO, conditions.now, rng);
                }
                Output::Conclusion { conclusion, .. } => return conclusion,
                Output::CountRegistry => unreachable!("the bench has no registry index"),
                Output::Wait(until) => {
                    conditions.now = until.expect("it waits for its lookup");
                    self.now = conditions.now;
                }
            }
        }
    }

    pub fn mint(&self) -> Minted {
        self.grant.mint(&self.keys, SessionId(1), LIFE, WALL).expect("a token")
    }

    pub fn verify(&self) -> Accepted {
        let verifier = Verifier {
            keys: &self.keys,
            revoked: &self.revoked,
            is_stale: false,
        };
        let token = black_box(&*self.token);
        verifier
            .verify(self.grant.device, &self.grant.credential, token, WALL)
            .expect("it counts")
    }
}

fn admitted(conclusion: Conclusion) -> Admitted {
    match conclusion.decision {
        connect::Decision::Admitted(admitted) => admitted,
        other @ (connect::Decision::Refused(_) | connect::Decision::Restricted(_)) => {
            unreachable!("it should be admitted: {other:?}")
        }
    }
}

/// A node's admission, and devices that connect to it.
pub struct Node {
    admission: Admission<(), ()>,
    slots: Slots,
    credential: Credential,
    devices: u128,
    now: Instant,
    rng: SmallRng,
}

impl Node {
    pub fn new() -> Self {
        let config = AdmissionConfig {
            lookups_per_second_max: 1_000_000,
            ..AdmissionConfig::default()
        };
        let mut node = Self {
            slots: Slots::new(&config.slots(), SlotKeys::new(1, [7; 32])),
            admission: Admission::new(config, Instant::ZERO),
            // The hash of a secret is made where the request is parsed, and counted there.
            credential: SecretHash::of(b"a secret").into(),
            devices: 0,
            now: Instant::ZERO,
            rng: SmallRng::seed_from_u64(1),
        };
        for _ in 0..100 {
            node.look_up();
        }
        node
    }

    fn attempt(&mut self, number: u128, slot_token: Option<&str>) -> Decision {
        let arrival = Arrival {
            device: device(number),
            cohort: CohortTag::of(Some("camera"), Some("3.8.0-b2")),
            credential: (&self.credential).into(),
            network: Network::V4(1),
            slot_token,
            arrived: self.now,
            is_known_absent: false,
        };
        let times = (self.now, wall(self.now));
        self.admission
            .attempt(&arrival, || (), &mut self.slots, times, &mut self.rng)
    }

    /// [`KEYS`] devices arrive, wait, are looked up and admitted.
    pub fn look_up(&mut self) {
        self.now += Duration::from_millis(10);
        for _ in 0..KEYS {
            self.devices += 1;
            let decision = self.attempt(self.devices, None);
            assert!(matches!(decision, Decision::Queued(_)), "{decision:?}");
        }
        let mut admitted = 0;
        while admitted < KEYS {
            let times = (self.now, wall(self.now));
            match self.admission.poll_output(&mut self.slots, times, &mut self.rng) {
                admission::Output::Send(Batch { id, .. }) => {
                    self.admission.handle_batch_done(id, Ok(|_| Told::Found(())), self.now);
                }
                admission::Output::Answer { answered, .. } => {
                    let device = answered.device();
                    self.admission.end(answered, Outcome::Right, self.now);
                    self.slots.handle_admitted(device, "acme");
                    admitted += 1;
                }
                admission::Output::Wait(until) => self.now = until.unwrap_or(self.now).max(self.now),
                refused @ admission::Output::Refuse { .. } => unreachable!("no device waits for long: {refused:?}"),
            }
        }
    }

    /// Gives a slot to a device that was connected here. Returns its token.
    pub fn give_slot(&mut self) -> Box<str> {
        let known = device(1);
        let (rate, times) = (self.admission.k_ref(self.now), (self.now, wall(self.now)));
        let hint = self.slots.give(known, None, Duration::ZERO, rate, times, &mut self.rng);
        hint.slot.expect("it has one")
    }

    /// A device returns at its slot, which another node issued, and leaves while it waits.
    pub fn show_slot(&mut self, token: &str) {
        match self.attempt(1, Some(token)) {
            Decision::Queued(ticket) => self.leave(ticket),
            decision @ (Decision::KnownAbsent | Decision::Refused(_)) => unreachable!("there is room: {decision:?}"),
        }
    }

    fn leave(&mut self, ticket: Ticket) {
        self.admission.abandon(ticket, self.now);
    }
}

fn wall(now: Instant) -> WallTime {
    WALL + Duration::from_micros(now.as_micros())
}

/// Parses a device's message.
pub fn read_frame() -> DeviceFrame<'static> {
    DeviceFrame::parse(black_box(MESSAGE)).expect("a frame")
}

/// Encodes the first frame of a session.
pub fn write_frame() -> String {
    let welcome = ServerFrame::Welcome {
        session: "01f3a2b4c5d6e7f8".into(),
        heartbeat_ms: 30_000,
        backoff_cap_ms: 60_000,
        resume: Some(black_box(TOKEN).into()),
        server_time: "2027-01-15T08:00:00Z".into(),
    };
    welcome.to_json()
}

const TOKEN: &str =
    "EQcAAAGjFTZAAAAAAaMaXEAAAAAAAAAAAQAAAAAAAAAAnAwuShHSfwCAAAAAAAAAqgRhY21lBmNhbWVyYQrk3vKpD3q1x2ZVb7nq8Q";
