//! The lookup service between devices and the database: one lookup per key, remembered absences, and failing databases.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use seawall_gateway::{
    fleet::{
        events::Events,
        resume::Resume,
        rules::{Rules, Written},
    },
    lookup::{Dependencies, Lookups},
    metrics::Metrics,
    runtime::{clock::Clock, config::DatabaseUrl, lifecycle::Lifecycle},
    session::departures::Departures,
    store::{Audit, NewDevice, Store},
};
use seawall_proto::{
    admission::{AdmissionConfig, BreakerState, Cause},
    connect::{Attempt, Conclusion, Decision, LookUp},
    id::{DeviceId, Label, Network, RuleId, SecretHash},
    refusal::{Code, Refusal},
    resume::{self, ResumeKeys},
    rules::{Effect, Match, Rule, RuleSpec},
    slots::SlotKeys,
    time::WallTime,
};
use tempfile::TempDir;

use crate::harness::{
    pg::Cluster,
    wait::{PATIENCE, eventually_async},
};

/// Maximum time until a device is answered (docs/PROTOCOL.md, "Being refused").
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// Maximum time until a device is answered while the database is known to be unavailable (docs/PROTOCOL.md, "Being
/// refused").
const ANSWER_AWAY_MAX: Duration = Duration::from_millis(500);

/// A lookup service on a store, with its own lifecycle.
struct Fixture {
    lookups: Lookups,
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
        let lookups = Lookups::start(
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
                departures: Arc::new(Departures::new(None, clock)),
                sessions: Arc::default(),
            },
            &life,
        );
        Self {
            lookups,
            store,
            clock,
            metrics,
            rules,
            life,
            _directory: None,
        }
    }

    /// On a new PostgreSQL, with device 1, after the first contact.
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
            id: uuid::Uuid::now_v7(),
            at: WallTime::from_unix_ms(1),
            actor: "alice".into(),
            action: "device.create",
        };
        self.store.device_insert(&device, &audit).await.unwrap();
        self.lookups.forget(device.id);
    }

    async fn look_up(&self, number: u128) -> Conclusion {
        self.look_up_as(number, None).await
    }

    async fn look_up_as(&self, number: u128, firmware: Option<&Label>) -> Conclusion {
        let attempt = Attempt {
            device: device(number),
            credential: Some(SecretHash::of(b"secret").into()),
            firmware,
            model: None,
            tenant: None,
            slot: None,
            resume: None,
            network: Network::V4(1),
            arrived: self.clock.now(),
        };
        self.lookups.connect(attempt).await
    }

    async fn look_up_timed(&self, number: u128) -> (Conclusion, Duration) {
        let begun = Instant::now();
        let answer = self.look_up(number).await;
        (answer, begun.elapsed())
    }

    /// Registers the device if it is missing, and looks it up until the answer is its record.
    async fn until_found(&self, number: u128) {
        eventually_async(async || {
            let answer = self.look_up(number).await;
            if is_absent(&answer) {
                self.register(number).await;
            }
            is_found(&answer)
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

/// Cause and refusal of a device without an answered lookup.
fn refused(answer: Conclusion) -> (Cause, Refusal) {
    match (answer.look_up, answer.decision) {
        (Some(LookUp::Refused(cause)), Decision::Refused(refusal)) => (cause, refusal),
        other => panic!("{other:?}"),
    }
}

fn is_found(answer: &Conclusion) -> bool {
    matches!(answer.look_up, Some(LookUp::Found { .. })) && matches!(answer.decision, Decision::Admitted(_))
}

fn is_absent(answer: &Conclusion) -> bool {
    matches!(answer.look_up, Some(LookUp::Absent | LookUp::RememberedAbsent))
}

fn is_blocked(answer: &Conclusion) -> bool {
    let code = |code| matches!(&answer.decision, Decision::Refused(refusal) if refusal.code == code);
    answer.look_up.is_none() && code(Code::FirmwareBlocked)
}

#[tokio::test]
async fn ten_thousand_that_ask_for_one_id_cost_a_handful_of_statements() {
    let fixture = Fixture::sqlite().await;
    fixture.register(1).await;

    let answers = join_all((0..10_000).map(|_| fixture.look_up(1))).await;

    // A device has one connection or two. The throttle of credentials compares at most ten at a time.
    let found = answers.iter().filter(|answer| is_found(answer)).count();
    assert!((2..=10).contains(&found), "{found}");
    // The others are too many for one id. No other reason refuses them.
    let is_surplus = |answer: &Conclusion| {
        let (cause, refusal) = refused(answer.clone());
        matches!(cause, Cause::Throttle | Cause::QueueFull) && refusal.hint.is_some_and(|hint| hint.slot.is_some())
    };
    let surplus = answers
        .iter()
        .filter(|answer| !is_found(answer) && is_surplus(answer))
        .count();
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

    let found = answers.iter().filter(|answer| is_found(answer)).count();
    let absent = answers.iter().filter(|answer| is_absent(answer)).count();
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
        assert!(is_absent(&fixture.look_up(1).await));
    }
    assert_eq!(fixture.counted("seawall_lookup_statements_total"), 1.0);
    assert_eq!(fixture.counted("seawall_lookups_total{outcome=\"cached\"}"), 2.0);

    fixture.register(1).await;

    assert!(is_found(&fixture.look_up(1).await));
    fixture.stop().await;
}

#[tokio::test]
async fn frozen_database_is_answered_in_time_and_recovered_from() {
    let (cluster, fixture) = Fixture::postgres().await;

    cluster.freeze().unwrap();
    let answers = join_all((1..100).map(|number| fixture.look_up_timed(number))).await;
    for (answer, took) in answers {
        assert!(took < ANSWER_MAX, "{took:?}");
        let (_, refusal) = refused(answer);
        assert_eq!(refusal.code, Code::RegistryUnavailable);
        assert!(refusal.hint.is_some_and(|hint| hint.slot.is_some()));
    }
    for _ in 0..20 {
        let (answer, took) = fixture.look_up_timed(1).await;
        assert!(took < ANSWER_AWAY_MAX, "{took:?}");
        assert_eq!(refused(answer).0, Cause::Breaker);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let state = fixture.lookups.state();
    assert!(
        state.in_flight <= 3,
        "probes, and what the first second left: {state:?}"
    );
    assert_eq!(state.queue, 0);

    cluster.thaw().unwrap();
    eventually_async(async || fixture.lookups.state().breaker == BreakerState::Closed).await;
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
        assert_eq!(refused(answer).1.code, Code::RegistryUnavailable);
    }

    cluster.restart().unwrap();
    eventually_async(async || fixture.lookups.state().breaker == BreakerState::Closed).await;
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
    assert_eq!(refused(answer).1.code, Code::RegistryUnavailable);
    assert_eq!(fixture.lookups.state().breaker, BreakerState::Absent);
    assert!(!fixture.lookups.had_contact());

    cluster.restart().unwrap();
    let contact = async {
        while !fixture.lookups.had_contact() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, contact).await.unwrap();
    // Contact means that no device is refused for lack of it: the store connects before the first probes are answered.
    assert_eq!(fixture.lookups.state().breaker, BreakerState::Closed);
    assert!(fixture.store.is_ready());
    fixture.until_found(1).await;
    fixture.stop().await;
}

#[tokio::test]
async fn device_that_a_rule_refuses_while_it_waits_never_reaches_the_database() {
    const ABSENT: &str = "seawall_lookups_total{outcome=\"not_found\"}";
    let (cluster, fixture) = Fixture::postgres().await;
    let before = fixture.counted(ABSENT);
    let [good, bad] = ["3.8.0-b2", "3.8.0-b3"].map(|version| Label::parse(version).unwrap());
    cluster.freeze().unwrap();
    let block = async {
        eventually_async(async || fixture.lookups.state().queue >= 200).await;
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
        eventually_async(async || fixture.lookups.state().queue <= 100).await;
        cluster.thaw().unwrap();
    };
    // Devices of one version first, so that the statements in flight have none of the other.
    let healthy = join_all((1_000..1_100).map(|number| fixture.look_up_as(number, good.as_ref())));
    let marked = async {
        eventually_async(async || fixture.lookups.state().in_flight > 0).await;
        join_all((2_000..2_100).map(|number| fixture.look_up_as(number, bad.as_ref()))).await
    };

    let (healthy, marked, ()) = tokio::join!(healthy, marked, block);

    assert!(marked.iter().all(is_blocked), "{marked:?}");
    assert!(!healthy.iter().any(is_blocked), "{healthy:?}");
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
        assert_eq!(fixture.lookups.state().breaker, BreakerState::Closed);
    }

    assert_eq!(fixture.lookups.state().queue, 0);
    cluster.thaw().unwrap();
    fixture.until_found(1).await;
    assert!(fixture.counted("seawall_lookup_statements_total") < 10.0);
    fixture.stop().await;
}
