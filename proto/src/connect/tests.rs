use std::time::Duration;

use rand::{SeedableRng, rngs::SmallRng};
use uuid::Uuid;

use super::*;
use crate::{
    close::Close,
    id::{RuleId, SecretHash},
    refusal::{Code, Limit},
    resume::{LIFE, ResumeKeys, Revoked},
    rules::{Effect, Match, Mode, Rule, RuleSpec},
    slots::RegistryIndexBuilder,
};

mod proving;

const WALL: WallTime = WallTime::from_unix_ms(1_000);
const RESUME_KEYS: ResumeKeys = ResumeKeys::new(1, [3; 32]);
const TOOK: Duration = Duration::from_millis(3);

fn label(text: &str) -> Label {
    Label::parse(text).unwrap().unwrap()
}

fn id(n: u128) -> DeviceId {
    DeviceId::from_uuid(Uuid::from_u128(n))
}

/// The claims of a device.
#[derive(Clone)]
struct Said {
    device: DeviceId,
    secret: Option<Credential>,
    firmware: Label,
    model: Option<Label>,
    tenant: Option<Label>,
    slot: Option<Box<str>>,
    resume: Option<Box<str>>,
}

/// Device 1 with the right secret.
fn said(firmware: &str) -> Said {
    Said {
        device: id(1),
        secret: Some(SecretHash::of(b"right").into()),
        firmware: label(firmware),
        model: None,
        tenant: None,
        slot: None,
        resume: None,
    }
}

fn wrong() -> Said {
    Said {
        secret: Some(SecretHash::of(b"wrong").into()),
        ..said("1")
    }
}

fn record(state: DeviceState) -> DeviceRecord {
    DeviceRecord {
        id: id(1),
        tenant: label("acme"),
        model: Some(label("cam")),
        secret: SecretHash::of(b"right"),
        previous_secret: None,
        state,
    }
}

fn rules(matches: Match) -> Arc<RuleSet> {
    let rule = Rule {
        id: RuleId(Uuid::from_u128(1)),
        spec: RuleSpec {
            reason: "broken radio".into(),
            retry_after: Duration::from_secs(900),
            ..RuleSpec::new(matches, Effect::Block)
        },
        created_at: WALL,
        revision: 1,
    };
    Arc::new(RuleSet::compile(1, vec![rule]))
}

fn by_firmware(range: &str) -> Arc<RuleSet> {
    rules(Match {
        firmware: Some(range.parse().unwrap()),
        ..Match::default()
    })
}

fn by_tenant(tenant: &str) -> Arc<RuleSet> {
    rules(Match {
        tenant: Some(label(tenant)),
        ..Match::default()
    })
}

fn by_model(model: &str) -> Arc<RuleSet> {
    rules(Match {
        model: Some(label(model)),
        ..Match::default()
    })
}

fn none_revoked() -> Revoked {
    Revoked::of(Generation(7), Generation(0), [])
}

/// A node with its registry.
struct Node {
    connect: Connect<()>,
    rules: Arc<RuleSet>,
    draining: Option<Peers>,
    revoked: Revoked,
    registry: Vec<DeviceRecord>,
    /// Number of keys that were looked up.
    asked: usize,
    sessions: usize,
    rng: SmallRng,
    now: Instant,
}

impl Node {
    fn new(registry: impl IntoIterator<Item = DeviceRecord>) -> Self {
        let keys = SlotKeys::new(1, [7; 32]);
        Self {
            connect: Connect::new(AdmissionConfig::default(), keys, Instant::ZERO),
            rules: Arc::new(RuleSet::empty()),
            draining: None,
            revoked: none_revoked(),
            registry: registry.into_iter().collect(),
            asked: 0,
            sessions: 0,
            rng: SmallRng::seed_from_u64(11),
            now: Instant::ZERO,
        }
    }

    /// With device 1, enabled.
    fn usual() -> Self {
        Self::new([record(DeviceState::Enabled)])
    }

    fn ruled_by(mut self, rules: Arc<RuleSet>) -> Self {
        self.rules = rules;
        self
    }

    /// With device 1 in its index of registered devices.
    fn with_index(mut self) -> Self {
        let mut index = RegistryIndexBuilder::new([1; 16]);
        index.add(id(1), "acme");
        self.connect.set_registry_index(Arc::new(index.finish(WALL)));
        self
    }

    fn with<R>(&mut self, work: impl FnOnce(&mut Connect<()>, &Conditions<'_>, &mut SmallRng) -> R) -> R {
        let conditions = Conditions {
            rules: &self.rules,
            verifier: Verifier {
                keys: &RESUME_KEYS,
                revoked: &self.revoked,
                is_stale: false,
            },
            draining: self.draining,
            sessions: self.sessions,
            now: self.now,
            wall: WALL,
        };
        work(&mut self.connect, &conditions, &mut self.rng)
    }

    fn screen(&mut self, said: &Said) -> (Option<ResumeOutcome>, Result<(), Refusal>) {
        self.with(|connect, conditions, rng| {
            let known = |attempt: &Attempt<'_>| connect.claimed_tenant(attempt, conditions.now);
            let screening = screen(said.attempt(conditions.now), conditions, known, rng);
            (screening.resume, screening.next.map(drop).map_err(refusal))
        })
    }

    fn enter(&mut self, said: &Said) -> Step {
        self.with(|connect, conditions, rng| {
            let known = |attempt: &Attempt<'_>| connect.claimed_tenant(attempt, conditions.now);
            match screen(said.attempt(conditions.now), conditions, known, rng).next {
                Ok(screened) => connect.handle_screened(screened, || (), conditions, rng),
                Err(conclusion) => Step::Concluded(conclusion),
            }
        })
    }

    fn wait_for_look_up(&mut self, said: &Said) -> Ticket {
        match self.enter(said) {
            Step::Waiting(ticket) => ticket,
            Step::Concluded(conclusion) => panic!("{conclusion:?}"),
        }
    }

    fn poll(&mut self) -> Output<()> {
        self.with(|connect, conditions, rng| connect.poll_output(conditions, rng))
    }

    /// The statement to send.
    fn statement(&mut self) -> Statement {
        loop {
            match self.poll() {
                Output::Send(statement) => {
                    self.asked += statement.batch.keys.len();
                    return statement;
                }
                Output::Wait(Some(at)) => self.now = self.now.max(at),
                other @ (Output::Conclusion { .. } | Output::CountRegistry | Output::Wait(None)) => panic!("{other:?}"),
            }
        }
    }

    fn answer(&mut self, statement: &Statement) {
        let row = |device| {
            let record = self.registry.iter().find(|record| record.id == device);
            record.map_or(Row::Missing, |record| Row::Found(record.clone()))
        };
        self.connect
            .handle_answered(statement, row, TOOK, self.now, &mut self.rng);
    }

    fn conclusion(&mut self) -> Conclusion {
        match self.poll() {
            Output::Conclusion { conclusion, .. } => conclusion,
            other @ (Output::Send(_) | Output::CountRegistry | Output::Wait(_)) => panic!("{other:?}"),
        }
    }

    /// Runs the whole order.
    fn connect(&mut self, said: &Said) -> Conclusion {
        match self.enter(said) {
            Step::Concluded(conclusion) => conclusion,
            Step::Waiting(_) => {
                let statement = self.statement();
                self.answer(&statement);
                self.conclusion()
            }
        }
    }

    fn admit(&mut self, said: &Said) -> Admitted {
        match self.connect(said).decision {
            Decision::Admitted(admitted) => admitted,
            other @ (Decision::Restricted(_) | Decision::Refused(_)) => panic!("{other:?}"),
        }
    }

    fn refuse(&mut self, said: &Said) -> Refusal {
        refusal(self.connect(said))
    }
}

fn refusal(conclusion: Conclusion) -> Refusal {
    match conclusion.decision {
        Decision::Refused(refusal) => refusal,
        other @ (Decision::Restricted(_) | Decision::Admitted(_)) => panic!("{other:?}"),
    }
}

impl Said {
    fn attempt(&self, arrived: Instant) -> Attempt<'_> {
        Attempt {
            device: self.device,
            credential: self.secret,
            firmware: Some(&self.firmware),
            model: self.model.as_ref(),
            tenant: self.tenant.as_ref(),
            slot: self.slot.as_deref(),
            resume: self.resume.as_deref(),
            network: Network::V4(1),
            arrived,
        }
    }
}

// === Guesses ===

#[test]
fn right_secret_at_a_due_slot_is_looked_up_after_any_number_of_guesses_with_the_same_slot() {
    let mut node = Node::usual();
    let mut guesses = 0;
    let throttled = loop {
        guesses += 1;
        let refusal = node.refuse(&wrong());
        if refusal.code == Code::Throttled {
            break refusal;
        }
        assert!(guesses < 20 && refusal.code == Code::Unauthorized, "{refusal:?}");
    };
    // The slot is remembered, so that it is every client's that names the device.
    node.now += throttled.hint.unwrap().after;
    let asked = node.asked;
    for _ in 0..1_000 {
        node.refuse(&wrong());
    }
    assert!(node.asked - asked <= 4, "{} lookups", node.asked - asked);
    assert_eq!(node.refuse(&wrong()).code, Code::Throttled);

    node.admit(&said("1"));
}

// === Before the lookup ===

#[test]
fn draining_comes_before_rules_and_rules_before_the_credential() {
    let anonymous = Said {
        secret: None,
        ..said("3.8.0")
    };
    let mut node = Node::usual();

    let unauthorized = node.refuse(&anonymous);
    node.rules = by_firmware(">=3");
    let blocked = node.refuse(&anonymous);
    let other = node.screen(&said("2.0")).1;
    node.draining = Some(Peers::None);
    let draining = node.refuse(&anonymous);

    assert_eq!(unauthorized.code, Code::Unauthorized);
    assert_eq!(blocked.code, Code::FirmwareBlocked);
    assert_eq!(other, Ok(()));
    assert_eq!(draining.code, Code::Draining);
    assert_eq!(node.asked, 0);
}

#[test]
fn blocked_device_is_told_the_rule_and_its_reason() {
    let refusal = Node::usual().ruled_by(by_firmware(">=3")).refuse(&said("3.8.0-b3+x"));

    assert_eq!(refusal.detail, "broken radio");
    assert_eq!(refusal.rule, Some(RuleId(Uuid::from_u128(1))));
    let after_ms = refusal.hint.unwrap().after_ms();
    assert!((900_000..=1_800_000).contains(&after_ms));
}

#[test]
fn restricted_device_is_told_of_its_update_before_or_after_its_look_up_and_never_admitted() {
    let with_update = |matches| {
        let update = serde_json::json!({"url": "https://example.com"});
        let spec = RuleSpec {
            update: update.as_object().cloned().map(Box::new),
            retry_after: Duration::from_secs(100),
            ..RuleSpec::new(matches, Effect::Restrict)
        };
        let rule = Rule {
            id: RuleId(Uuid::from_u128(1)),
            spec,
            created_at: WALL,
            revision: 1,
        };
        Arc::new(RuleSet::compile(1, vec![rule]))
    };
    let by_firmware = with_update(Match {
        firmware: Some(">=3".parse().unwrap()),
        ..Match::default()
    });
    let by_tenant = with_update(Match {
        tenant: Some(label("acme")),
        ..Match::default()
    });
    let anonymous = Said {
        secret: None,
        ..said("3")
    };
    for (rules, said, keys) in [
        (&by_firmware, anonymous, 0),
        (&by_firmware, returning("3"), 0),
        (&by_tenant, said("3"), 1),
        (&by_tenant, returning("3"), 0),
    ] {
        let mut node = Node::usual().ruled_by(Arc::clone(rules));
        let Decision::Restricted(restriction) = node.connect(&said).decision else {
            panic!("it is restricted");
        };
        let rule = Uuid::from_u128(1);
        assert_eq!(
            *restriction.frame,
            format!(r#"{{"type":"update","rule":"{rule}","update":{{"url":"https://example.com"}}}}"#)
        );
        let Close::Evicted { after } = restriction.close else {
            panic!("{restriction:?}");
        };
        assert!((100..=200).contains(&after.as_secs()));
        assert_eq!(restriction.refusal.code, Code::FirmwareBlocked);
        assert_eq!((node.asked, node.connect.waiting().len()), (keys, 0));
    }

    // It waits, and the rule comes.
    let mut node = Node::usual();
    node.wait_for_look_up(&said("3"));
    node.rules = by_firmware;
    assert!(matches!(node.conclusion().decision, Decision::Restricted(_)));
    assert_eq!(node.asked, 0);
}

#[test]
fn throttled_device_waits_for_its_rate_unless_it_resumes_and_attempts_without_a_credential_take_none_of_it() {
    let by = |matches| {
        let rule = Rule {
            id: RuleId(Uuid::from_u128(1)),
            spec: RuleSpec {
                rate_per_second: Some(1),
                ..RuleSpec::new(matches, Effect::Throttle)
            },
            created_at: WALL,
            revision: 1,
        };
        Arc::new(RuleSet::compile(1, vec![rule]))
    };
    let by_firmware = by(Match {
        firmware: Some(">=3".parse().unwrap()),
        ..Match::default()
    });
    let by_tenant = by(Match {
        tenant: Some(label("acme")),
        ..Match::default()
    });
    let anonymous = Said {
        secret: None,
        ..said("3")
    };
    for (rules, returning) in [
        (&by_firmware, said("3")),
        (&by_firmware, returning("3")),
        (&by_tenant, said("3")),
        (&by_tenant, returning("3")),
    ] {
        let mut node = Node::usual().with_index().ruled_by(Arc::clone(rules));
        for _ in 0..9 {
            assert_eq!(node.refuse(&anonymous).code, Code::Unauthorized);
        }
        node.admit(&returning);
        if returning.resume.is_some() {
            node.admit(&returning);
            assert_eq!(
                node.refuse(&said("3")).code,
                Code::Throttled,
                "it has taken of the rate"
            );
            continue;
        }
        let refusal = node.refuse(&returning);
        assert_eq!((refusal.code, refusal.limit), (Code::Throttled, Some(Limit::Rule)));
        assert_eq!(refusal.rule, Some(RuleId(Uuid::from_u128(1))));
        let hint = refusal.hint.unwrap();
        assert!(hint.after <= Duration::from_secs(3) && hint.slot.is_none(), "{hint:?}");
        node.now += hint.after;
        node.admit(&returning);
    }
}

#[test]
fn two_rules_that_throttle_a_device_before_and_after_its_look_up_admit_it_at_its_place() {
    let rule = |id, matches| Rule {
        id: RuleId(Uuid::from_u128(id)),
        spec: RuleSpec {
            rate_per_second: Some(1),
            ..RuleSpec::new(matches, Effect::Throttle)
        },
        created_at: WallTime::from_unix_ms(u64::try_from(id).unwrap()),
        revision: 1,
    };
    let by_firmware = Match {
        firmware: Some(">=3".parse().unwrap()),
        ..Match::default()
    };
    let by_model = Match {
        model: Some(label("cam")),
        ..Match::default()
    };
    // By registry data the older rule applies: the model's.
    let rules = RuleSet::compile(1, vec![rule(1, by_model), rule(2, by_firmware)]);
    let mut node = Node::usual().with_index().ruled_by(Arc::new(rules));
    node.admit(&said("3"));
    for asked in 2..9 {
        let refusal = node.refuse(&said("3"));
        assert_eq!(
            (refusal.code, refusal.rule),
            (Code::Throttled, Some(RuleId(Uuid::from_u128(2))))
        );
        // The place is at most a second ahead. The hint may be later.
        node.now += Duration::from_secs(1);
        node.admit(&said("3"));
        assert_eq!(node.asked, asked, "one lookup for each admission");
    }
}

#[test]
fn a_dry_run_is_reported_once_with_every_conclusion_and_refuses_nobody() {
    let mut node = Node::usual();
    let trial = |id, matches: Match| Rule {
        id: RuleId(Uuid::from_u128(id)),
        spec: RuleSpec {
            mode: Mode::DryRun,
            ..RuleSpec::new(matches, Effect::Block)
        },
        created_at: WALL,
        revision: 1,
    };
    let by_firmware = Match {
        firmware: Some(">=3".parse().unwrap()),
        ..Match::default()
    };
    let by_model = Match {
        model: Some(label("cam")),
        ..Match::default()
    };
    node.rules = Arc::new(RuleSet::compile(1, vec![trial(1, by_firmware), trial(2, by_model)]));
    let rule = |id| Some(RuleId(Uuid::from_u128(id)));
    let (anonymous, wrong) = (
        Said {
            secret: None,
            ..said("3")
        },
        Said {
            secret: Some(SecretHash::of(b"wrong").into()),
            ..said("3")
        },
    );
    // By its claims, by its model in the registry, and by its resume token.
    let reported = [said("3"), said("2"), returning("3"), returning("2"), anonymous, wrong].map(|said| {
        let Conclusion { decision, dry_run, .. } = node.connect(&said);
        (matches!(decision, Decision::Admitted(_)), dry_run)
    });

    assert_eq!(
        reported,
        [
            (true, rule(1)),
            (true, rule(2)),
            (true, rule(1)),
            (true, rule(2)),
            (false, rule(1)),
            (false, rule(1))
        ]
    );
}

#[test]
fn rule_that_comes_into_force_behind_the_screening_refuses_all_the_same() {
    let mut node = Node::usual();
    let (token, newest) = (returning("3").resume, by_firmware(">=3"));

    for resume in [None, token] {
        let said = Said { resume, ..said("3") };
        let step = node.with(|connect, conditions, rng| {
            let known = |attempt: &Attempt<'_>| connect.claimed_tenant(attempt, conditions.now);
            let screened = screen(said.attempt(conditions.now), conditions, known, rng)
                .next
                .unwrap();
            let newer = Conditions {
                rules: &newest,
                ..*conditions
            };
            connect.handle_screened(screened, || (), &newer, rng)
        });

        let Step::Concluded(conclusion) = step else {
            panic!("{step:?}");
        };
        assert_eq!(refusal(conclusion).code, Code::FirmwareBlocked);
    }
}

#[test]
fn tenant_that_rules_see_is_of_the_token_then_of_memory_then_as_named_then_default() {
    let code = |node: &mut Node, said: &Said| node.screen(said).1.err().map(|refusal| refusal.code);
    let blocked = Some(Code::FirmwareBlocked);
    let resuming = returning("1").resume;
    let naming = |tenant: Option<&str>| Said {
        tenant: tenant.map(label),
        ..said("1")
    };
    let with_resume = Said {
        resume: resuming.clone(),
        ..naming(Some("other"))
    };
    let (mut acme, mut other, mut default) = (
        Node::usual().ruled_by(by_tenant("acme")),
        Node::usual().ruled_by(by_tenant("other")),
        Node::usual().ruled_by(by_tenant("default")),
    );

    // As named, else `default`.
    assert_eq!(code(&mut acme, &naming(Some("acme"))), blocked);
    assert_eq!(code(&mut acme, &naming(None)), None);
    assert_eq!(code(&mut default, &naming(None)), blocked);
    assert_eq!(code(&mut default, &naming(Some("acme"))), None);
    // The resume token comes first, if its MAC is right for this credential.
    assert_eq!(code(&mut acme, &with_resume), blocked);
    assert_eq!(code(&mut other, &with_resume), None);
    let stolen = Said {
        secret: Some(SecretHash::of(b"wrong").into()),
        ..with_resume
    };
    assert_eq!(code(&mut other, &stolen), blocked);
    assert_eq!(code(&mut acme, &stolen), None);
    // Then this node's memory.
    let [mut acme, mut other] = [acme, other].map(Node::with_index);
    assert_eq!(code(&mut acme, &naming(Some("other"))), blocked);
    assert_eq!(code(&mut other, &naming(Some("other"))), None);
    assert_eq!((acme.asked, other.asked, default.asked), (0, 0, 0));
}

#[test]
fn slot_token_names_the_tenant_on_a_node_that_does_not_know_the_device() {
    let mut node = Node::usual().with_index();
    let hint = node
        .with(|connect, conditions, rng| connect.give_slot(id(1), None, Duration::ZERO, (conditions.now, WALL), rng));
    let said = Said {
        slot: hint.slot,
        ..said("1")
    };

    let refusal = Node::usual().ruled_by(by_tenant("acme")).refuse(&said);

    assert_eq!(refusal.code, Code::FirmwareBlocked);
    let another = Said { device: id(2), ..said };
    assert_eq!(Node::usual().ruled_by(by_tenant("acme")).screen(&another).1, Ok(()));
}

#[test]
fn rule_on_a_tenant_that_comes_while_a_device_waits_refuses_it_by_its_remembered_tenant() {
    let mut node = Node::usual().with_index();
    node.wait_for_look_up(&said("1"));

    node.rules = by_tenant("acme");

    assert_eq!(refusal(node.conclusion()).code, Code::FirmwareBlocked);
    assert_eq!(node.asked, 0);
}

// === Resume tokens ===

/// A device that was admitted before, with the token from then.
fn returning(firmware: &str) -> Said {
    let admitted = Node::usual().admit(&said(firmware));
    let minted = admitted.grant.mint(&RESUME_KEYS, SessionId(5), LIFE, WALL).unwrap();
    Said {
        resume: Some(minted.text),
        ..said(firmware)
    }
}

/// With another device's token.
fn stolen() -> Said {
    Said {
        secret: wrong().secret,
        ..returning("1")
    }
}

/// A node that knows that device 1 was changed.
fn knowing_of_a_change() -> Node {
    let mut node = Node::usual();
    node.revoked.revoke(id(1), Generation(8));
    node
}

#[test]
fn returning_device_is_admitted_by_its_token_without_a_look_up() {
    let mut node = Node::usual();

    let outcome = node.screen(&returning("1")).0;
    let admitted = node.admit(&returning("1"));

    assert_eq!(outcome, Some(ResumeOutcome::Resumed));
    assert_eq!(admitted.tenant().as_str(), "acme");
    assert_eq!(admitted.model.as_deref(), Some("cam"));
    assert_eq!(admitted.resumed, Some(SessionId(5)));
    assert_eq!(node.asked, 0);
}

#[test]
fn invalid_token_is_ignored_and_none_is_no_outcome() {
    for (mut node, said, outcome) in [
        (Node::usual(), said("1"), None),
        (knowing_of_a_change(), returning("1"), Some(ResumeOutcome::Revoked)),
        (Node::usual(), stolen(), Some(ResumeOutcome::Invalid)),
    ] {
        assert_eq!(node.screen(&said).0, outcome);
        node.wait_for_look_up(&said);
    }
}

#[test]
fn token_that_was_valid_once_hints_at_the_tenant_and_a_stolen_one_does_not() {
    for (said, is_known) in [(returning("1"), true), (stolen(), false), (said("1"), false)] {
        let mut node = knowing_of_a_change();

        node.wait_for_look_up(&said);

        assert_eq!(node.connect.slots().is_known(id(1), None, node.now, WALL), is_known);
    }
}

#[test]
fn rules_by_registry_data_win_over_the_token() {
    // The tenant in the token is used before the token is judged.
    for (rules, judged) in [
        (by_tenant("acme"), None),
        (by_model("cam"), Some(ResumeOutcome::Blocked)),
    ] {
        let mut node = Node::usual().ruled_by(rules);

        let outcome = node.screen(&returning("1")).0;

        assert_eq!(outcome, judged);
        assert_eq!(node.refuse(&returning("1")).code, Code::FirmwareBlocked);
    }
}

// === While it waits ===

#[test]
fn device_that_a_rule_refuses_while_it_waits_is_never_looked_up() {
    let mut node = Node::usual();
    node.wait_for_look_up(&said("3.8.0"));
    node.wait_for_look_up(&Said {
        device: id(2),
        ..said("2.0")
    });

    node.rules = by_firmware(">=3");

    assert_eq!(refusal(node.conclusion()).code, Code::FirmwareBlocked);
    assert_eq!(node.statement().batch.keys, [id(2)]);
    assert_eq!(node.connect.waiting().len(), 1);
}

#[test]
fn device_that_has_gone_is_neither_looked_up_nor_answered() {
    let mut node = Node::usual();
    let ticket = node.wait_for_look_up(&said("1"));

    assert_eq!(node.connect.handle_gone(ticket, node.now), Some(()));

    assert!(matches!(node.poll(), Output::Wait(_)));
    assert_eq!(node.connect.handle_gone(ticket, node.now), None);
    let ticket = node.wait_for_look_up(&said("1"));
    let statement = node.statement();
    node.answer(&statement);
    node.connect.handle_gone(ticket, node.now);
    assert!(
        matches!(node.poll(), Output::Wait(_)),
        "it has left after its answer came"
    );
}

#[test]
fn device_whose_look_up_a_drain_overtakes_is_refused_and_keeps_its_slot() {
    let mut node = Node::usual();
    let hint = node
        .with(|connect, conditions, rng| connect.give_slot(id(1), None, Duration::ZERO, (conditions.now, WALL), rng));
    let said = Said {
        slot: hint.slot,
        ..said("1")
    };
    node.wait_for_look_up(&said);
    let statement = node.statement();

    node.draining = Some(Peers::None);
    node.answer(&statement);

    assert_eq!(refusal(node.conclusion()).code, Code::Draining);
    assert_eq!(node.connect.slots().state().remembered, 1);
    node.draining = None;
    node.admit(&said);
    assert_eq!(node.connect.slots().state().remembered, 0);
}

#[test]
fn grant_is_as_of_the_revocations_that_were_known_when_its_look_up_was_sent() {
    let mut node = Node::usual();
    node.wait_for_look_up(&said("1"));
    let statement = node.statement();

    node.revoked.confirm(Generation(9));
    node.answer(&statement);

    let Decision::Admitted(admitted) = node.conclusion().decision else {
        panic!("it is admitted");
    };
    assert_eq!(admitted.grant.generation, Generation(7));
}

// === After the lookup ===

#[test]
fn unknown_wrong_missing_and_revoked_are_one_answer() {
    let missing = Said {
        secret: None,
        ..said("1")
    };

    let answers = [
        Node::new([]).refuse(&said("1")),
        Node::usual().refuse(&wrong()),
        Node::new([record(DeviceState::Disabled)]).refuse(&wrong()),
        Node::new([record(DeviceState::Revoked)]).refuse(&said("1")),
        Node::usual().refuse(&missing),
    ];

    assert_eq!(answers[0].code, Code::Unauthorized);
    let bytes = answers.map(|mut refusal| {
        let after = refusal.hint.as_ref().unwrap().after;
        assert!(
            (Duration::from_secs(60)..=Duration::from_secs(300)).contains(&after),
            "{after:?}"
        );
        // The time is drawn for each answer. Nothing else may differ.
        refusal.hint.as_mut().unwrap().after = Duration::from_secs(60);
        let mut out = Vec::new();
        refusal.write_response(&mut out);
        out
    });
    assert!(bytes.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn disabled_is_told_only_to_the_right_credential_and_before_rules() {
    let mut node = Node::new([record(DeviceState::Disabled)]).ruled_by(by_tenant("acme"));

    assert_eq!(node.refuse(&said("1")).code, Code::DeviceDisabled);
    assert_eq!(node.refuse(&wrong()).code, Code::Unauthorized);
}

#[test]
fn registry_s_tenant_and_model_are_asked_after_the_look_up() {
    for rules in [by_tenant("acme"), by_model("cam")] {
        let mut node = Node::usual().ruled_by(rules);

        assert_eq!(node.refuse(&said("1")).code, Code::FirmwareBlocked);
        assert_eq!(node.asked, 1);
    }
    let other_model = Said {
        model: Some(label("tv")),
        ..said("1")
    };
    Node::usual().ruled_by(by_model("cam")).admit(&other_model);
}

#[test]
fn registry_s_tenant_is_used_whatever_the_device_claims() {
    let claiming = Said {
        tenant: Some(label("other")),
        ..said("1")
    };

    let admitted = Node::usual().admit(&claiming);

    assert_eq!(admitted.tenant().as_str(), "acme");
    assert_eq!(admitted.model.as_deref(), Some("cam"));
}

#[test]
fn certificate_is_a_credential_and_the_registry_still_decides() {
    let by_certificate = Said {
        secret: Some(Credential::of_certificate(
            b"der",
            crate::id::CertificateTag::of(b"ca", b"1"),
        )),
        ..said("1")
    };

    let admitted = Node::usual().admit(&by_certificate);
    let disabled = Node::new([record(DeviceState::Disabled)]).refuse(&by_certificate);
    let unknown = Node::new([]).refuse(&by_certificate);

    assert_eq!(
        admitted.grant.credential,
        Credential::of_certificate(b"der", crate::id::CertificateTag::of(b"ca", b"1"))
    );
    assert_eq!(disabled.code, Code::DeviceDisabled);
    assert_eq!(unknown.code, Code::Unauthorized);
}

#[test]
fn old_credential_of_a_rotation_is_granted_until_it_ends() {
    let until = WallTime::from_unix_ms(5_000);
    let rotated = DeviceRecord {
        secret: SecretHash::of(b"new"),
        previous_secret: Some((SecretHash::of(b"right"), until)),
        ..record(DeviceState::Enabled)
    };

    let old = Node::new([rotated]).admit(&said("1"));
    let fresh = Node::usual().admit(&said("1"));

    assert_eq!(old.grant.credential_until, Some(until));
    assert_eq!(fresh.grant.credential_until, None);
}

// === Absence ===

#[test]
fn absent_device_is_not_asked_for_again_until_it_is_registered() {
    let mut node = Node::new([]);

    let first = node.connect(&said("1"));
    let second = node.connect(&said("1"));
    node.registry = vec![record(DeviceState::Enabled)];
    node.connect.handle_registered(id(1));
    let third = node.connect(&said("1"));

    assert_eq!(first.look_up, Some(LookUp::Absent));
    assert_eq!(second.look_up, Some(LookUp::RememberedAbsent));
    assert_eq!(refusal(second).code, Code::Unauthorized);
    assert_eq!(third.look_up, Some(LookUp::Found { took: TOOK, keys: 1 }));
    assert_eq!(node.asked, 2);
}

#[test]
fn while_absence_is_not_believed_unknown_and_wrong_are_told_to_come_back_at_a_slot() {
    for (registry, said) in [(vec![], said("1")), (vec![record(DeviceState::Enabled)], wrong())] {
        let mut node = Node::new(registry);
        node.connect.set_believes_absence(false);

        let refusal = node.refuse(&said);

        assert_eq!(refusal.code, Code::RegistryUnavailable);
        let hint = refusal.hint.unwrap();
        assert!(hint.slot.is_some() && hint.after >= Duration::from_secs(5), "{hint:?}");
    }
}

#[test]
fn while_absence_is_not_believed_wrong_credentials_do_not_tell_registered_ids_from_others() {
    for seed in 0..50 {
        let answers = [
            vec![],
            vec![record(DeviceState::Enabled)],
            vec![record(DeviceState::Revoked)],
        ]
        .map(|registry| {
            let mut node = Node::new(registry);
            node.rng = SmallRng::seed_from_u64(seed);
            node.connect.set_believes_absence(false);
            let mut said = wrong();
            let mut answers = Vec::new();
            for _ in 0..20 {
                let refusal = node.refuse(&said);
                let hint = refusal.hint.unwrap();
                answers.push((refusal.code, hint.after, hint.slot.is_some()));
                said.slot = hint.slot;
                node.now += Duration::from_secs(1);
            }
            answers
        });

        assert!(answers.iter().all(|other| *other == answers[0]), "{seed}: {answers:?}");
        assert!(
            answers[0].iter().any(|(code, ..)| *code == Code::Throttled),
            "{answers:?}"
        );
    }
}

#[test]
fn indexed_device_that_is_missing_is_doubted_until_the_registry_is_counted() {
    let mut node = Node::new([]).with_index();

    let refusal = node.refuse(&said("1"));

    assert_eq!(refusal.code, Code::RegistryUnavailable);
    assert!(matches!(node.poll(), Output::CountRegistry));
    assert!(matches!(node.poll(), Output::Wait(_)));
    let counted = node.connect.doubts().last();
    node.connect.settle_doubts(counted);
    node.now += Duration::from_secs(60);
    assert_eq!(node.refuse(&said("1")).code, Code::Unauthorized);
}

#[test]
fn record_that_cannot_be_read_is_no_absence() {
    let mut node = Node::new([]);
    node.wait_for_look_up(&said("1"));
    let statement = node.statement();

    node.connect
        .handle_answered(&statement, |_| Row::Unreadable, TOOK, node.now, &mut node.rng);

    let conclusion = node.conclusion();
    assert_eq!(conclusion.look_up, Some(LookUp::Refused(Cause::LookupUntold)));
    assert_eq!(refusal(conclusion).code, Code::RegistryUnavailable);
}

#[test]
fn absence_is_learnt_from_a_device_that_has_gone_as_well() {
    let mut node = Node::new([]);
    let ticket = node.wait_for_look_up(&said("1"));
    let statement = node.statement();
    node.connect.handle_gone(ticket, node.now);

    node.answer(&statement);
    let again = node.connect(&said("1"));

    assert_eq!(again.look_up, Some(LookUp::RememberedAbsent));
    assert_eq!(node.asked, 1);
}
