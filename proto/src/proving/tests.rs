use std::{cmp::Reverse, collections::BinaryHeap};

use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use uuid::Uuid;

use super::*;

const K_REF: f64 = 2_000.0;

fn label(text: &str) -> Label {
    Label::parse(text).unwrap().unwrap()
}

fn at(seconds: f64) -> Instant {
    Instant::ZERO + Duration::from_secs_f64(seconds)
}

/// A node whose devices are authenticated at once.
struct Node {
    proving: Proving,
    now: Instant,
    sessions: BTreeMap<u64, (Kind, Instant)>,
    changes: Vec<(VersionState, Instant)>,
}

impl Node {
    /// Knows version 1 of model `cam`, and has some sessions of it.
    fn usual(sessions: u64) -> Self {
        let mut node = Self::empty();
        node.proving.handle_known(Some("cam"), Some("1"));
        node.proving.handle_loaded(false);
        for device in 0..sessions {
            node.open(1_000_000 + device, "cam", "1");
        }
        node
    }

    fn empty() -> Self {
        Self {
            proving: Proving::default(),
            now: at(1_000.0),
            sessions: BTreeMap::new(),
            changes: Vec::new(),
        }
    }

    fn connect(&mut self, device: u64, model: &str, firmware: &str) -> Result<(), Instant> {
        let asking = Asking {
            cohort: CohortTag::of(Some(model), Some(firmware)),
            sessions: self.sessions.len(),
            k_ref: K_REF,
        };
        if self.proving.is_limited(asking.cohort) {
            self.proving.ask(asking, self.now)?;
            self.proving.handle_entered(asking, self.now);
        }
        self.open(device, model, firmware);
        Ok(())
    }

    /// It is admitted.
    fn open(&mut self, device: u64, model: &str, firmware: &str) {
        self.proving
            .handle_admitted(Some(&label(model)), Some(&label(firmware)), self.now);
        let kind = Kind::of(Some(model), Some(firmware));
        self.proving.handle_opened(member(device, kind), self.now);
        self.sessions.insert(device, (kind, self.now));
    }

    fn end(&mut self, device: u64, reason: EndReason) {
        let (kind, opened_at) = self.sessions.remove(&device).unwrap();
        self.proving
            .handle_ended(member(device, kind), opened_at, Some(reason), self.now);
    }

    fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            self.proving.handle_second(self.sessions.len(), |_| false, self.now);
            while let Some(change) = self.proving.poll_change() {
                self.changes.push((change.after, self.now));
            }
        }
    }

    fn tested(&self) -> Tested {
        let mut tested = self.proving.tested(self.now);
        tested.next().expect("a version is tested")
    }

    fn states(&self) -> Vec<VersionState> {
        self.changes.iter().map(|(state, _)| *state).collect()
    }
}

fn member(device: u64, kind: Kind) -> Member {
    Member {
        device: DeviceId::from_uuid(Uuid::from_u128(device.into())),
        kind,
    }
}

use VersionState::{Proven, Unproven, Worse};

// === Which versions are known ===

#[test]
fn nobody_is_limited_before_the_stored_versions_are_known() {
    let mut node = Node::empty();
    node.open(1, "cam", "1");

    assert!((0..1_000).all(|device| node.connect(device, "cam", "2").is_ok()));
    assert!(!node.proving.is_testing());
    assert_eq!(node.proving.poll_change(), None);
}

#[test]
fn versions_of_a_young_fleet_are_proven_at_once_and_recorded() {
    let mut node = Node::empty();
    node.proving.handle_loaded(true);

    assert!((0..1_000).all(|device| node.connect(device, "cam", "2").is_ok()));
    node.pass(1);
    assert_eq!(node.states(), [Proven]);
    node.proving.handle_loaded(false);
    assert!(
        (0..1_000).all(|device| node.connect(device, "cam", "2.0").is_ok()),
        "2 and 2.0 are one"
    );
    assert!(!node.proving.is_testing());
}

#[test]
fn known_version_is_known_without_its_model_as_well() {
    let mut node = Node::usual(1_000);

    for model in [None, Some("cam")] {
        assert!(!node.proving.is_limited(CohortTag::of(model, Some("v1"))));
        assert!(node.proving.is_limited(CohortTag::of(model, Some("2"))));
    }
    node.connect(1, "other", "1").unwrap();
    node.pass(1);
    assert_eq!(node.states(), [Unproven], "another model is another version");
}

#[test]
fn claims_alone_make_no_entry_and_share_a_part_of_the_capacity() {
    let mut node = Node::usual(1_000);

    let mut ask = |version: u32| {
        let asking = Asking {
            cohort: CohortTag::of(None, Some(&format!("9.{version}"))),
            sessions: 1_000,
            k_ref: K_REF,
        };
        let asked = node.proving.ask(asking, node.now);
        if asked.is_ok() {
            node.proving.handle_entered(asking, node.now);
        }
        asked
    };
    let passed = (0..5_000).filter(|version| ask(*version).is_ok()).count();
    let hint = ask(1).unwrap_err();

    assert_eq!(passed, 100, "a twentieth of a second's lookups");
    assert!(hint > node.now && !node.proving.is_testing());
}

#[test]
fn tested_versions_are_bounded_and_idle_ones_make_room() {
    let mut node = Node::usual(1_000);
    for version in 0..100_u64 {
        node.open(version, "cam", &format!("2.{version}"));
    }
    assert_eq!(node.proving.tested(node.now).count(), TESTED_MAX);

    node.end(0, EndReason::ClientGone);
    node.open(200, "cam", "3");

    let tested: Vec<_> = node.proving.tested(node.now).collect();
    assert_eq!(tested.len(), TESTED_MAX);
    assert!(tested.iter().any(|tested| tested.firmware.as_deref() == Some("3")));
}

#[test]
fn versions_that_nobody_has_make_room_first_and_those_found_worse_last() {
    let mut node = Node::usual(1_000);
    node.proving
        .handle_stored(Some(&label("cam")), Some(&label("9")), Worse, node.now);
    for version in 1..TESTED_MAX as u64 {
        node.open(version, "cam", &format!("2.{version}"));
    }
    node.pass(125);
    node.end(5, EndReason::ClientGone);
    let has = |node: &Node, firmware: &str| {
        let mut tested = node.proving.tested(node.now);
        tested.any(|tested| tested.firmware.as_deref() == Some(firmware))
    };

    node.open(100, "cam", "3.0");
    assert!(!has(&node, "2.5"));
    for version in 1..TESTED_MAX as u64 - 1 {
        node.open(100 + version, "cam", &format!("3.{version}"));
    }
    assert!(!has(&node, "2.1") && has(&node, "9"));
    node.open(200, "cam", "4");
    assert!(has(&node, "4") && !has(&node, "9"));
    node.open(201, "cam", "5");
    assert!(!has(&node, "5"), "all others have devices that just connected");
}

#[test]
fn device_that_names_thousands_of_versions_takes_bounded_memory_and_limits_nobody_else() {
    let mut node = Node::usual(5_000);
    for version in 0..10_000_u64 {
        node.open(7, "cam", &format!("9.{version}"));
        node.end(7, EndReason::ClientGone);
        node.now += Duration::from_millis(10);
    }

    assert_eq!(node.proving.tested(node.now).count(), TESTED_MAX);
    assert_eq!(node.proving.changes.len(), CHANGES_MAX);
    assert!(node.proving.failures.len() <= 1);
    assert!((0..5_000).all(|device| node.connect(10_000 + device, "cam", "1").is_ok()));
    assert!((0..20).all(|device| node.connect(50_000 + device, "cam", "2").is_ok()));
    node.pass(125);
    assert!(
        !node.proving.is_limited(CohortTag::of(Some("cam"), Some("2"))),
        "it is proven"
    );
}

#[test]
fn version_of_few_devices_is_proven_after_a_day_unless_its_sessions_are_short() {
    let mut node = Node::usual(5_000);
    for device in 0..3 {
        node.connect(device, "cam", "2").unwrap();
    }

    node.pass(86_300);
    assert_eq!(node.states(), [Unproven]);
    node.end(0, EndReason::ClientGone);
    node.connect(0, "cam", "2").unwrap();
    node.pass(105);
    assert_eq!(node.states(), [Unproven], "one of its sessions is new");
    node.pass(120);
    assert_eq!(node.states(), [Unproven, Proven]);
}

// === Room ===

#[test]
fn room_is_a_hundredth_and_is_given_back_when_sessions_end_or_prove_themselves() {
    let mut node = Node::usual(5_000);
    let mut next = 0;
    let mut fill = |node: &mut Node| {
        let before = next;
        while node.connect(next, "cam", "2").is_ok() {
            next += 1;
        }
        next - before
    };

    assert_eq!(fill(&mut node), 50);
    for device in 0..10 {
        node.end(device, EndReason::Draining);
    }
    assert_eq!(node.tested().young, 40);
    node.pass(24);
    assert_eq!(fill(&mut node), 10, "the rate has given 10 back after 24 s");
    // Failures of most leave the test open.
    for device in 10..40 {
        node.end(device, EndReason::ClientGone);
    }
    node.pass(110);
    assert_eq!((node.tested().young, node.tested().online), (10, 20));
}

#[test]
fn refused_devices_are_told_when_the_verdict_is_due_and_one_after_the_other() {
    let mut node = Node::usual(5_000);
    while node
        .connect(node.now.as_micros() + node.sessions.len() as u64, "cam", "2")
        .is_ok()
    {}

    let first = node.connect(1, "cam", "2").unwrap_err();
    let second = node.connect(2, "cam", "2").unwrap_err();

    let wait = first.saturating_since(node.now);
    assert!(
        (PROVEN_AFTER..PROVEN_AFTER + Duration::from_secs(5)).contains(&wait),
        "{wait:?}"
    );
    assert_eq!(second.saturating_since(first), Duration::from_micros(500));
}

#[test]
fn without_others_to_protect_there_is_no_limit() {
    let mut node = Node::usual(15);
    assert!(
        (0..1_000).all(|device| node.connect(device, "cam", "2").is_ok()),
        "15 others"
    );

    let mut node = Node::usual(0);
    assert!((0..10_000).all(|device| node.connect(device, "cam", "2").is_ok()));
    for device in 0..990 {
        node.open(1_000_000 + device, "cam", "1");
    }
    assert!(node.connect(20_000, "cam", "2").is_ok(), "less than a tenth are others");
    for device in 0..100 {
        node.open(2_000_000 + device, "cam", "1");
    }
    assert!(node.connect(30_000, "cam", "2").is_err());
}

// === Evidence ===

/// Opens sessions of the new version, up to the room, and as many of the control.
fn both_sides(node: &mut Node, count: u64) {
    for device in 0..count {
        node.connect(device, "cam", "2").unwrap();
        node.open(100_000 + device, "cam", "1");
    }
}

#[test]
fn good_version_is_proven_when_its_sessions_are_two_minutes_old() {
    let mut node = Node::usual(5_000);
    both_sides(&mut node, 50);

    node.pass(120);
    assert_eq!(node.states(), [Unproven]);
    node.pass(2);
    assert_eq!(node.states(), [Unproven, Proven]);
    assert!((0..10_000).all(|device| node.connect(500_000 + device, "cam", "2").is_ok()));
}

#[test]
fn failures_count_at_the_same_age_as_successes() {
    let mut node = Node::usual(5_000);
    both_sides(&mut node, 50);
    for device in 0..50 {
        node.end(device, EndReason::ClientGone);
    }

    node.pass(119);
    assert_eq!(node.tested().evidence.0.connects, 0);
    assert_eq!(node.states(), [Unproven]);
    node.pass(3);
    assert_eq!(node.states(), [Unproven, Worse]);
}

#[test]
fn ends_by_the_gateway_an_operator_or_a_newer_session_say_nothing() {
    for reason in EndReason::ALL {
        let mut node = Node::usual(5_000);
        both_sides(&mut node, 50);
        for device in 0..50 {
            node.end(device, reason);
        }

        node.pass(125);

        let is_own = matches!(
            reason,
            EndReason::Normal
                | EndReason::Protocol
                | EndReason::WrongKind
                | EndReason::NotUtf8
                | EndReason::Policy
                | EndReason::TooBig
                | EndReason::HeartbeatMissed
                | EndReason::ClientGone
                | EndReason::SlowReader
        );
        let expected = if is_own { vec![Unproven, Worse] } else { vec![Unproven] };
        assert_eq!(node.states(), expected, "{reason:?}");
    }
}

#[test]
fn first_failure_waits_for_the_next_session_of_the_device() {
    let mut node = Node::usual(5_000);
    both_sides(&mut node, 40);
    node.pass(10);
    // An update that restarts once more.
    for device in 0..40 {
        node.end(device, EndReason::ClientGone);
        node.open(device, "cam", "2");
    }

    node.pass(118);
    assert_eq!(node.tested().evidence.0, Counts::default());
    node.pass(4);
    assert_eq!(node.states(), [Unproven, Proven]);
}

#[test]
fn second_failure_counts_and_so_does_a_device_that_returns_with_its_old_version() {
    for returns_with in ["2", "1"] {
        let mut node = Node::usual(5_000);
        both_sides(&mut node, 40);
        node.pass(10);
        for device in 0..40 {
            node.end(device, EndReason::ClientGone);
            node.open(device, "cam", returns_with);
        }
        node.pass(10);
        for device in 0..40 {
            node.end(device, EndReason::ClientGone);
        }

        node.pass(125);
        assert_eq!(node.states().get(1), Some(&Worse), "{returns_with}");
    }
}

#[test]
fn device_that_restarts_over_and_over_counts_once() {
    let mut node = Node::usual(5_000);
    both_sides(&mut node, 40);
    for _ in 0..40 {
        node.end(0, EndReason::ClientGone);
        node.pass(3);
        node.open(0, "cam", "2");
    }

    node.pass(125);
    assert_eq!(node.states(), [Unproven, Proven]);
}

#[test]
fn devices_that_fail_again_count_again_in_the_next_test() {
    let mut node = Node::usual(5_000);
    let fail = |node: &mut Node| {
        for device in 0..20 {
            node.open(device, "cam", "2");
            node.open(100_000 + device, "cam", "1");
        }
        for device in 0..20 {
            node.end(device, EndReason::ClientGone);
        }
        node.pass(125);
    };
    fail(&mut node);
    assert_eq!(node.states(), [Unproven, Worse]);

    // Others are well: without its failing devices the version would be released.
    for device in 50..70 {
        node.open(device, "cam", "2");
    }
    fail(&mut node);
    assert_eq!(node.states(), [Unproven, Worse]);
}

#[test]
fn control_is_the_same_model_and_the_rest_only_where_it_has_no_other_version() {
    let failing = |node: &mut Node, model: &str| {
        for device in 0..40 {
            node.connect(device, model, "2").unwrap();
            // The other model fails as well, and so does the network of all.
            node.open(100_000 + device, "hub", "7");
        }
        node.pass(5);
        for device in 0..40 {
            node.end(device, EndReason::ClientGone);
            node.end(100_000 + device, EndReason::ClientGone);
        }
    };
    let mut node = Node::usual(5_000);
    node.proving.handle_known(Some("hub"), Some("7"));

    failing(&mut node, "cam");
    node.pass(125);
    assert_eq!(node.states(), [Unproven], "no other camera of the same minutes");
    assert_eq!(node.tested().evidence.1, Counts::default());

    let mut node = Node::usual(5_000);
    node.proving.handle_known(Some("hub"), Some("7"));
    failing(&mut node, "new-model");
    node.pass(125);
    assert_eq!(node.tested().evidence.1.connects, 40);
    assert_eq!(node.states(), [Unproven], "all fail");
}

#[test]
fn costly_lookups_keep_a_version_from_being_proven() {
    let mut node = Node::usual(5_000);
    both_sides(&mut node, 50);
    let cohort = CohortTag::of(Some("cam"), Some("2"));
    for _ in 0..125 {
        node.now += Duration::from_secs(1);
        node.proving
            .handle_second(node.sessions.len(), |costly| costly == cohort, node.now);
    }

    assert_eq!(node.tested().state, Worse);
    for device in 200..220 {
        node.open(device, "cam", "2");
    }
    node.pass(122);
    assert_eq!(node.states(), [Unproven, Worse, Proven], "they cost no more, and live");
}

#[test]
fn end_of_an_old_session_takes_nothing_from_younger_ones() {
    let mut node = Node::usual(5_000);
    node.connect(0, "cam", "2").unwrap();
    for device in 0..200 {
        node.open(100_000 + device, "cam", "1");
    }
    node.pass(130);
    for device in 200..240 {
        node.open(100_000 + device, "cam", "1");
    }
    for device in 0..200 {
        node.end(100_000 + device, EndReason::ClientGone);
    }

    node.pass(122);
    assert_eq!(
        node.tested().evidence.1,
        Counts {
            connects: 240,
            failed: 0
        }
    );
}

// === A version that was found worse ===

#[test]
fn stored_verdict_holds_after_a_restart_at_any_age_until_evidence_or_a_person_clears_it() {
    let restarted = || {
        let mut node = Node::usual(5_000);
        node.proving
            .handle_stored(Some(&label("cam")), Some(&label("2")), Worse, node.now);
        node
    };
    let admitted = |node: &mut Node| {
        (0..100)
            .filter(|device| node.connect(*device, "cam", "2").is_ok())
            .count()
    };

    let mut node = restarted();
    node.pass(48 * 3_600);
    assert_eq!((node.tested().state, node.states()), (Worse, vec![]));
    assert_eq!(admitted(&mut node), 20);
    let hint = node.connect(100, "cam", "2").unwrap_err();
    assert!(hint >= node.now + WORSE_RETURNS);

    // Its devices are well now.
    node.pass(122);
    assert_eq!(node.states(), [Proven]);
    assert_eq!(admitted(&mut node), 100);

    let mut node = restarted();
    node.proving
        .handle_stored(Some(&label("cam")), Some(&label("2")), Proven, node.now);
    assert_eq!(admitted(&mut node), 100);
}

#[test]
fn verdict_needs_new_evidence_each_time() {
    let mut node = Node::usual(5_000);
    both_sides(&mut node, 50);
    for device in 0..50 {
        node.end(device, EndReason::ClientGone);
    }
    node.pass(122);
    assert_eq!(node.states(), [Unproven, Worse]);

    node.pass(3_600);
    assert_eq!(node.tested().evidence, (Counts::default(), Counts::default()));
    assert_eq!(node.states(), [Unproven, Worse]);
}

#[test]
fn devices_that_wait_without_a_verdict_are_told_to_people() {
    let mut node = Node::usual(5_000);
    let mut first = None;
    for device in 0..1_200 {
        match node.connect(device, "cam", "2") {
            // Every session is ended by the gateway.
            Ok(()) => node.end(device, EndReason::Draining),
            Err(_) => first = first.or(Some(node.now)),
        }
        let waits = first.map_or(Duration::ZERO, |first| node.now.saturating_since(first));
        assert_eq!(node.tested().is_waiting, waits >= Duration::from_mins(15), "{waits:?}");
        node.pass(1);
    }
    assert!(node.tested().is_waiting);
    node.pass(600);
    assert!(!node.tested().is_waiting, "nobody waits any more");
}

// === A fleet ===

/// Result of an upgrade.
struct Upgraded {
    /// When each device first had a session with the new version, in seconds after the beginning.
    connected: Vec<f64>,
    /// Time between its first attempt and that session.
    delays: Vec<f64>,
    proven: Option<f64>,
    worse: Option<f64>,
}

impl Upgraded {
    fn by(&self, seconds: f64) -> usize {
        self.connected.iter().filter(|at| **at <= seconds).count()
    }

    fn t99(&self) -> f64 {
        percentile(&self.connected, 0.99)
    }
}

fn percentile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() as f64 * part) as usize).min(sorted.len() - 1)]
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    End(Instant),
    Arrive { is_new: bool },
    Upgrade,
    Second,
}

/// All devices are upgraded within an hour, and return 20 s later. They reconnect each four hours, and a few sessions
/// fail. Devices with the new version restart after `crashes` and 20 s, if given.
fn upgrade(devices: u64, limits: bool, crashes: Option<Duration>, seed: u64) -> Upgraded {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut node = Node::usual(0);
    if !limits {
        node.proving = Proving::default();
    }
    let begin = node.now;
    let mut events = BinaryHeap::new();
    for device in 0..devices {
        node.open(device, "cam", "1");
        let upgrade = begin + Duration::from_secs_f64(rng.random_range(0.0..3_600.0));
        events.push(Reverse((upgrade, device, Event::Upgrade)));
        let end = begin + Duration::from_secs_f64(rng.random_range(0.0..14_400.0));
        events.push(Reverse((end, device, Event::End(begin))));
    }
    events.push(Reverse((begin + Duration::from_secs(1), 0, Event::Second)));
    let mut upgraded = Upgraded {
        connected: Vec::new(),
        delays: Vec::new(),
        proven: None,
        worse: None,
    };
    let (mut first, mut has_been) = (BTreeMap::new(), BTreeSet::new());
    let mut is_new = BTreeSet::new();
    while let Some(Reverse((now, device, event))) = events.pop() {
        if now > begin + Duration::from_secs(5_400) {
            break;
        }
        let since = now.saturating_since(begin).as_secs_f64();
        node.now = now;
        let restart = now + Duration::from_secs_f64(rng.random_range(19.0..21.0));
        match event {
            Event::Second => {
                node.proving.handle_second(node.sessions.len(), |_| false, now);
                while let Some(change) = node.proving.poll_change() {
                    match change.after {
                        Proven => upgraded.proven = upgraded.proven.or(Some(since)),
                        Worse => upgraded.worse = upgraded.worse.or(Some(since)),
                        Unproven => {}
                    }
                }
                events.push(Reverse((now + Duration::from_secs(1), 0, Event::Second)));
            }
            Event::Upgrade => {
                is_new.insert(device);
                if node.sessions.contains_key(&device) {
                    node.end(device, EndReason::ClientGone);
                    events.push(Reverse((restart, device, Event::Arrive { is_new: true })));
                }
            }
            Event::End(opened_at) => {
                if node.sessions.get(&device).is_some_and(|(_, at)| *at == opened_at) {
                    node.end(device, EndReason::ClientGone);
                    let is_new = is_new.contains(&device);
                    events.push(Reverse((restart, device, Event::Arrive { is_new })));
                }
            }
            Event::Arrive { is_new: arrives_new } => {
                let is_new = arrives_new || is_new.contains(&device);
                if is_new {
                    first.entry(device).or_insert(since);
                }
                match node.connect(device, "cam", if is_new { "2" } else { "1" }) {
                    Ok(()) => {
                        if is_new && has_been.insert(device) {
                            upgraded.connected.push(since);
                            upgraded.delays.push(since - first[&device]);
                        }
                        let life = match crashes.filter(|_| is_new) {
                            Some(crashes) => crashes,
                            None if rng.random_bool(0.005) => Duration::from_secs(60),
                            None => Duration::from_secs_f64(rng.random_range(1_000.0..14_400.0)),
                        };
                        events.push(Reverse((now + life, device, Event::End(now))));
                    }
                    Err(at) => events.push(Reverse((at, device, event))),
                }
            }
        }
    }
    upgraded
}

#[test]
fn fleet_upgrade_of_a_good_version_is_not_slowed_noticeably() {
    for seed in 0..5 {
        let (limited, free) = (upgrade(15_000, true, None, seed), upgrade(15_000, false, None, seed));

        assert_eq!((limited.connected.len(), limited.worse), (15_000, None), "{seed}");
        let slower = limited.t99() / free.t99();
        let (p95, max) = (percentile(&limited.delays, 0.95), percentile(&limited.delays, 1.0));
        println!(
            "seed {seed}: t99 {slower:.4}x, p95 {p95:.1} s, max {max:.1} s, proven {:?}",
            limited.proven
        );
        assert!(slower <= 1.01, "{slower}");
        assert!(p95 < 0.1 && max <= 180.0, "{p95} {max}");
        assert!(limited.proven.unwrap() <= 240.0, "{:?}", limited.proven);
    }
}

#[test]
fn crash_loop_of_a_new_version_reaches_a_small_part_of_the_fleet() {
    for seed in 0..5 {
        let limited = upgrade(15_000, true, Some(Duration::from_secs(30)), seed);

        let worse = limited.worse.expect("it is found");
        let (at_verdict, in_all) = (limited.by(worse), limited.by(3_600.0));
        println!("seed {seed}: worse after {worse:.0} s, {at_verdict} devices until then, {in_all} within the hour");
        assert!(worse <= 240.0, "{worse}");
        assert!(at_verdict <= 450, "3 %: {at_verdict}");
        assert!(in_all <= 900, "6 %: {in_all}");
        assert_eq!(limited.proven, None);
    }
}
