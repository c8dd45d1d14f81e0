//! The gate between devices and the database: single flight, what is remembered, and databases that are hurt.

use std::{
    future::Future,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use seawall_gateway::{
    clock::Clock,
    config::DatabaseUrl,
    events::Events,
    lifecycle::Lifecycle,
    lookup::{Dependencies, Gate, LookUp},
    metrics::Metrics,
    resume::Resume,
    rules::{Rules, Written},
    store::{Audit, NewDevice, Store},
};
use seawall_proto::{
    admission::{AdmissionConfig, Arrival, BreakerState, Cause, CohortTag, Refused},
    id::{DeviceId, Label, Network, Proof, RuleId, SecretHash},
    refusal::Code,
    resume::{self, ResumeKeys},
    rules::{Effect, Match, OwnedSubject, Rule, RuleSpec},
    slots::SlotKeys,
    time::WallTime,
};
use tempfile::TempDir;

use crate::harness::pg::Cluster;

/// Longest that a condition is waited for.
const WAIT_MAX: Duration = Duration::from_secs(15);
/// The contract: every device is answered sooner.
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// The contract: while the database is known to be away.
const ANSWER_AWAY_MAX: Duration = Duration::from_millis(500);

/// A gate on a store, with its own life.
struct Fixture {
    gate: Gate,
    store: Store,
    clock: Clock,
    metrics: Arc<Metrics>,
    rules: Arc<Rules>,
    life: Lifecycle,
    _directory: Option<TempDir>,
}

impl Fixture {
    async fn sqlite() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let url = DatabaseUrl::sqlite(&directory.path().join("seawall.db"));
        let mut fixture = Self::on(&url).await;
        fixture._directory = Some(directory);
        fixture
    }

    async fn on(url: &DatabaseUrl) -> Self {
        let store = Store::open(url).await.unwrap();
        let clock = Clock::start();
        let metrics = Arc::new(Metrics::new());
        let life = Lifecycle::new();
        let keys = SlotKeys::new(1, [7; 32]);
        let rules = Arc::new(Rules::open(Path::new("/nonexistent")));
        let gate = Gate::start(
            AdmissionConfig::default(),
            keys,
            &store,
            clock,
            Dependencies {
                metrics: Arc::clone(&metrics),
                resume: Arc::new(Resume::open(
                    Path::new("/nonexistent"),
                    ResumeKeys::new(1, [7; 32]),
                    resume::LIFE,
                )),
                rules: Arc::clone(&rules),
            },
            &life,
        );
        Self {
            gate,
            store,
            clock,
            metrics,
            rules,
            life,
            _directory: None,
        }
    }

    /// On a PostgreSQL of its own, with device 1, and contact made.
    async fn postgres() -> (Cluster, Self) {
        let cluster = Cluster::start().unwrap();
        let fixture = Self::on(&cluster.database().await.unwrap()).await;
        fixture.until_found(1).await;
        (cluster, fixture)
    }

    async fn register(&self, number: u128) {
        let device = NewDevice {
            external_id: None,
            id: device(number),
            tenant: None,
            model: None,
            secret: SecretHash::of(b"secret"),
        };
        let audit = Audit {
            at: WallTime::from_unix_ms(1),
            actor: "alice".into(),
            action: "device.create",
        };
        self.store.device_insert(&device, &audit).await.unwrap();
        self.gate.forget(device.id);
    }

    async fn look_up(&self, number: u128) -> LookUp {
        self.look_up_as(number, OwnedSubject::default()).await
    }

    async fn look_up_as(&self, number: u128, claims: OwnedSubject) -> LookUp {
        let arrival = Arrival {
            device: device(number),
            cohort: CohortTag::of(None, None),
            slot_token: None,
            arrived: self.clock.now(),
            is_known_absent: false,
            proof: Proof::Secret,
            network: Network::V4(1),
        };
        self.gate.look_up(arrival, claims).await
    }

    async fn look_up_timed(&self, number: u128) -> (LookUp, Duration) {
        let begun = Instant::now();
        let answer = self.look_up(number).await;
        (answer, begun.elapsed())
    }

    /// Registers the device where it is missing, and looks it up until the answer is its record.
    async fn until_found(&self, number: u128) {
        until(|| async {
            match self.look_up(number).await {
                LookUp::Found(_) => true,
                LookUp::Absent => {
                    self.register(number).await;
                    false
                }
                LookUp::Refused(_) | LookUp::Blocked(_) => false,
            }
        })
        .await;
    }

    fn counted(&self, series: &str) -> f64 {
        self.metrics
            .render()
            .lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
            .unwrap_or_else(|| panic!("no {series}"))
    }

    async fn stop(self) {
        assert!(self.life.stop().await, "tasks end with the gateway");
        assert_eq!(self.life.failure(), None);
    }
}

fn device(number: u128) -> DeviceId {
    DeviceId::from_uuid(uuid::Uuid::from_u128(number))
}

fn refused(answer: LookUp) -> Refused {
    match answer {
        LookUp::Refused(refused) => refused,
        LookUp::Found(_) | LookUp::Absent | LookUp::Blocked(_) => panic!("{answer:?}"),
    }
}

async fn until<F: Future<Output = bool>>(condition: impl Fn() -> F) {
    let begun = Instant::now();
    while !condition().await {
        assert!(begun.elapsed() < WAIT_MAX, "not in {WAIT_MAX:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn ten_thousand_that_ask_for_one_id_cost_a_handful_of_statements() {
    let fixture = Fixture::sqlite().await;
    fixture.register(1).await;

    let answers = join_all((0..10_000).map(|_| fixture.look_up(1))).await;

    // A device has one connection or two. The throttle of credentials lets no more than ten at a time compare theirs.
    let found = answers
        .iter()
        .filter(|answer| matches!(answer, LookUp::Found(_)))
        .count();
    assert!((2..=10).contains(&found), "{found}");
    // The others are too many for one id, and for no other reason refused.
    let is_surplus = |answer: &LookUp| {
        matches!(answer, LookUp::Refused(refused)
            if matches!(refused.cause, Cause::Throttle | Cause::QueueFull) && refused.hint.slot.is_some())
    };
    let surplus = answers.iter().filter(|answer| is_surplus(answer)).count();
    assert_eq!(found + surplus, 10_000);
    let statements = fixture.counted("seawall_lookup_statements_total");
    assert!(statements <= 5.0, "{statements}");
    fixture.stop().await;
}

#[tokio::test]
async fn many_devices_share_statements_and_all_are_answered() {
    let fixture = Fixture::sqlite().await;
    for number in 0..20 {
        fixture.register(number).await;
    }

    let answers = join_all((0..200).map(|number| fixture.look_up(number))).await;

    let found = answers
        .iter()
        .filter(|answer| matches!(answer, LookUp::Found(_)))
        .count();
    let absent = answers.iter().filter(|answer| matches!(answer, LookUp::Absent)).count();
    assert_eq!((found, absent), (20, 180));
    let statements = fixture.counted("seawall_lookup_statements_total");
    assert!(statements <= 10.0, "{statements}");
    assert_eq!(fixture.counted("seawall_lookups_in_flight"), 0.0);
    assert_eq!(fixture.counted("seawall_admission_queue"), 0.0);
    fixture.stop().await;
}

#[tokio::test]
async fn absent_id_is_remembered_and_registering_it_counts_at_once() {
    let fixture = Fixture::sqlite().await;
    for _ in 0..3 {
        assert!(matches!(fixture.look_up(1).await, LookUp::Absent));
    }
    assert_eq!(fixture.counted("seawall_lookup_statements_total"), 1.0);
    assert_eq!(fixture.counted("seawall_lookups_total{outcome=\"cached\"}"), 2.0);

    fixture.register(1).await;

    assert!(matches!(fixture.look_up(1).await, LookUp::Found(_)));
    fixture.stop().await;
}

#[tokio::test]
async fn frozen_database_is_answered_in_time_and_recovered_from() {
    let (cluster, fixture) = Fixture::postgres().await;

    cluster.freeze().unwrap();
    let answers = join_all((1..100).map(|number| fixture.look_up_timed(number))).await;
    for (answer, took) in answers {
        assert!(took < ANSWER_MAX, "{took:?}");
        let refused = refused(answer);
        assert_eq!(refused.cause.code(), Code::RegistryUnavailable);
        assert!(refused.hint.slot.is_some());
    }
    for _ in 0..20 {
        let (answer, took) = fixture.look_up_timed(1).await;
        assert!(took < ANSWER_AWAY_MAX, "{took:?}");
        assert_eq!(refused(answer).cause, Cause::Breaker);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let state = fixture.gate.state();
    assert!(
        state.in_flight <= 3,
        "probes, and what the first second left: {state:?}"
    );
    assert_eq!(state.queue, 0);

    cluster.thaw().unwrap();
    until(|| async { fixture.gate.state().breaker == BreakerState::Closed }).await;
    fixture.until_found(1).await;
    fixture.stop().await;
}

#[tokio::test]
async fn killed_database_is_answered_in_time_and_recovered_from() {
    let (cluster, fixture) = Fixture::postgres().await;

    cluster.kill().unwrap();
    for round in 0..20 {
        let (answer, took) = fixture.look_up_timed(1).await;
        assert!(took < if round == 0 { ANSWER_MAX } else { ANSWER_AWAY_MAX }, "{took:?}");
        assert_eq!(refused(answer).cause.code(), Code::RegistryUnavailable);
    }

    cluster.restart().unwrap();
    until(|| async { fixture.gate.state().breaker == BreakerState::Closed }).await;
    fixture.until_found(1).await;
    fixture.stop().await;
}

#[tokio::test]
async fn database_away_at_the_start_is_waited_for() {
    let cluster = Cluster::start().unwrap();
    let url = cluster.database().await.unwrap();
    cluster.kill().unwrap();
    let fixture = Fixture::on(&url).await;

    let (answer, took) = fixture.look_up_timed(1).await;
    assert!(took < ANSWER_AWAY_MAX, "{took:?}");
    assert_eq!(refused(answer).cause.code(), Code::RegistryUnavailable);
    assert_eq!(fixture.gate.state().breaker, BreakerState::Absent);

    cluster.restart().unwrap();
    fixture.until_found(1).await;
    fixture.stop().await;
}

#[tokio::test]
async fn device_that_a_rule_refuses_while_it_waits_never_reaches_the_database() {
    const ABSENT: &str = "seawall_lookups_total{outcome=\"not_found\"}";
    let (cluster, fixture) = Fixture::postgres().await;
    let before = fixture.counted(ABSENT);
    let runs = |version: &str| OwnedSubject {
        firmware: Label::parse(version).unwrap(),
        ..OwnedSubject::default()
    };
    cluster.freeze().unwrap();
    let block = async {
        until(|| async { fixture.gate.state().queue >= 200 }).await;
        let range = "=3.8.0-b3".parse().unwrap();
        let matches = Match {
            firmware: Some(range),
            ..Match::default()
        };
        let rule = Rule {
            id: RuleId(uuid::Uuid::from_u128(1)),
            spec: RuleSpec::new(matches, Effect::Block),
            created_at: fixture.clock.wall(),
            revision: fixture.rules.current().revision() + 1,
        };
        let written = Written::Rule(rule);
        fixture.rules.apply(&written, &fixture.clock, &Events::default()).await;
        until(|| async { fixture.gate.state().queue <= 100 }).await;
        cluster.thaw().unwrap();
    };
    // Those of one version first, so that the statements under way hold none of the other.
    let healthy = join_all((1_000..1_100).map(|number| fixture.look_up_as(number, runs("3.8.0-b2"))));
    let marked = async {
        until(|| async { fixture.gate.state().in_flight > 0 }).await;
        join_all((2_000..2_100).map(|number| fixture.look_up_as(number, runs("3.8.0-b3")))).await
    };

    let (healthy, marked, ()) = tokio::join!(healthy, marked, block);

    assert!(
        marked
            .iter()
            .all(|answer| matches!(answer, LookUp::Blocked(refusal) if refusal.code == Code::FirmwareBlocked)),
        "{marked:?}"
    );
    assert!(
        !healthy.iter().any(|answer| matches!(answer, LookUp::Blocked(_))),
        "{healthy:?}"
    );
    let answered = fixture.counted(ABSENT) - before;
    assert!(answered <= 100.0, "no key of a blocked device was sent: {answered}");
    fixture.stop().await;
}

#[tokio::test]
async fn devices_that_hang_up_leave_the_queue() {
    let (cluster, fixture) = Fixture::postgres().await;
    cluster.freeze().unwrap();

    {
        let waiting = join_all((1..200).map(|number| fixture.look_up(number)));
        let hung_up = tokio::time::timeout(Duration::from_millis(200), waiting).await;
        assert!(hung_up.is_err());
        assert_eq!(fixture.gate.state().breaker, BreakerState::Closed);
    }

    assert_eq!(fixture.gate.state().queue, 0);
    cluster.thaw().unwrap();
    fixture.until_found(1).await;
    assert!(fixture.counted("seawall_lookup_statements_total") < 10.0);
    fixture.stop().await;
}
