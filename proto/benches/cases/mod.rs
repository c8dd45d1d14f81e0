//! What the benches have done: a device's way in, rules, slots, tokens, look-ups and frames, with figures as a busy gateway sees them.
//! The same work is timed by `decisions` and counted by `instructions`.

use std::{hint::black_box, time::Duration};

use rand::{SeedableRng, rngs::SmallRng};
use seawall_proto::{
    admission::{Action, Admission, AdmissionConfig, Arrival, Batch, CohortTag, Decision, Ticket, Told},
    firmware::Range,
    frame::{DeviceFrame, ServerFrame},
    handshake::{self, Admitted, Next, Policy},
    hello::{self, Head, Hello, IdentityNames, Paths, Request},
    id::{DeviceId, Label, Network, Proof, RuleId, SecretHash, SessionId},
    record::{DeviceRecord, DeviceState},
    refusal::Refusal,
    resume::{Counted, Generation, Grant, Judge, LIFE, Minted, ResumeKeys, Revoked},
    rules::{Effect, Match, Rule, RuleSet, RuleSpec, Subject},
    slots::SlotKeys,
    time::{Instant, WallTime},
};
use uuid::Uuid;

/// Rules of a node that has many.
pub const RULES: u32 = 1_000;
/// Devices of one look-up.
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

/// So many rules, of which none is for firmware 3.8.0-b2, and one for 3.500.0-b10.
pub fn rules(count: u32) -> RuleSet {
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
    RuleSet::compile(1, (0..count).map(|number| rule(number + 10)).collect())
}

/// What a device of this version says of itself, against the rules.
pub fn evaluate<'a>(rules: &'a RuleSet, firmware: &str) -> Option<&'a Rule> {
    let subject = Subject {
        firmware: Some(firmware),
        model: Some("camera"),
        tenant: Some("acme"),
    };
    rules.evaluate(black_box(&subject), WALL)
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

/// A gateway's knowledge, and a device at its door.
pub struct Door {
    rules: RuleSet,
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

impl Door {
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
        Self {
            rules: rules(RULES),
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

    /// The head, read.
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

    /// The whole way in by a look-up, but for the look-up.
    pub fn admit(&mut self) -> Admitted {
        let hello = self.parse();
        match self.next_step(hello) {
            Ok(Next::LookUp(unproven)) => {
                let record = Some(black_box(&self.record));
                let as_of = Generation(60_000);
                handshake::conclude(unproven, record, as_of, &self.rules, WALL, &mut self.rng).expect("it is welcome")
            }
            Ok(Next::Session(_) | Next::Refused(_)) | Err(_) => {
                unreachable!("it shows no token, and no rule is for it")
            }
        }
    }

    /// The whole way in by a resume token.
    pub fn resume(&mut self) -> Box<Admitted> {
        let mut hello = self.parse();
        hello.resume = Some(self.token.clone());
        match self.next_step(hello) {
            Ok(Next::Session(admitted)) => admitted,
            Ok(Next::LookUp(_) | Next::Refused(_)) | Err(_) => unreachable!("its token counts"),
        }
    }

    /// The whole way out by a rule: the answer.
    pub fn refuse(&mut self) -> Vec<u8> {
        let mut headers = HEADERS;
        headers[8].1 = b"3.500.0-b10";
        let hello = self.parse_with(&headers);
        let mut answer = Vec::new();
        match self.next_step(hello) {
            Err(refusal) => refusal.write_response(&mut answer),
            Ok(_) => unreachable!("a rule is for it"),
        }
        answer
    }

    fn next_step(&mut self, hello: Hello) -> Result<Next, Refusal> {
        let policy = Policy {
            rules: &self.rules,
            draining: None,
            wall: WALL,
        };
        let judge = Judge {
            keys: &self.keys,
            revoked: &self.revoked,
            is_stale: false,
        };
        let screened = handshake::screen(hello, &policy, &mut self.rng)?;
        Ok(handshake::resume(screened, &judge, &self.rules, WALL, &mut self.rng).next)
    }

    pub fn mint(&self) -> Minted {
        self.grant.mint(&self.keys, SessionId(1), LIFE, WALL).expect("a token")
    }

    pub fn weigh(&self) -> Counted {
        let judge = Judge {
            keys: &self.keys,
            revoked: &self.revoked,
            is_stale: false,
        };
        let token = black_box(&*self.token);
        judge
            .weigh(self.grant.device, &self.grant.credential, token, WALL)
            .expect("it counts")
    }
}

/// A node's admission, and devices that come to it.
pub struct Node {
    admission: Admission<()>,
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
            admission: Admission::new(config, SlotKeys::new(1, [7; 32]), Instant::ZERO),
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
            proof: Proof::Secret,
            network: Network::V4(1),
            slot_token,
            arrived: self.now,
            is_known_absent: false,
        };
        self.admission
            .attempt(&arrival, self.now, wall(self.now), &mut self.rng)
    }

    /// [`KEYS`] devices come, wait, are looked up and let in.
    pub fn look_up(&mut self) {
        self.now += Duration::from_millis(10);
        for _ in 0..KEYS {
            self.devices += 1;
            let decision = self.attempt(self.devices, None);
            assert!(matches!(decision, Decision::Queued(_)), "{decision:?}");
        }
        let mut admitted = 0;
        while admitted < KEYS {
            while let Some(Batch { id, .. }) = self.admission.poll_batch(self.now) {
                self.admission.handle_batch_done(id, Ok(|_| Told::Found(())), self.now);
            }
            while let Some(action) = self.admission.poll_action(self.now, wall(self.now), &mut self.rng) {
                let Action::Answer { ticket, device, .. } = action else {
                    unreachable!("nobody waits for long: {action:?}");
                };
                self.admission.handle_right_credential(ticket, self.now);
                self.admission.handle_admitted(device, "acme");
                admitted += 1;
            }
            self.now = self.admission.poll_timeout(self.now).unwrap_or(self.now).max(self.now);
        }
    }

    /// A slot for a device that was connected here, with its token.
    pub fn give_slot(&mut self) -> Box<str> {
        let known = device(1);
        let hint = self
            .admission
            .slot_for_close(known, Duration::ZERO, self.now, wall(self.now), &mut self.rng);
        hint.slot.expect("it has one")
    }

    /// A device comes at its slot, which another node gave it, and leaves while it waits.
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

/// A device's message, read.
pub fn read_frame() -> DeviceFrame<'static> {
    DeviceFrame::parse(black_box(MESSAGE)).expect("a frame")
}

/// The first frame of a session, written.
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
