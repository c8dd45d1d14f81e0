use std::{path::Path, time::Duration};

use seawall_proto::{
    admission::{Admission, AdmissionConfig, AdmissionState, Arrival, Batch, BreakerState, CohortTag, Output},
    id::{Credential, DeviceId, Network, SecretHash},
    slots::{SlotKeys, Slots},
    time::{Instant, WallTime},
};
use uuid::Uuid;

use super::{
    checks::{self, Ledger},
    world::{SWEEP_MAX, World},
    *,
};
use crate::scenario::Changes;

/// A storm of a fleet that is back in 10 s at best.
const STORM: &str = r#"
    name = "storm"
    about = "Everything drops."
    devices = 5000
    capacity_per_second = 500
    thresholds = ["missing == 0", "lost_sessions == 0", "in_flight_max <= limit"]

    [gateway.config.admission]
    keys_in_flight_max = 64
    lookups_per_second_max = 1000

    [simulate.database]
    overload = 0

    [[fleet]]
    name = "displays"
    firmware = { "3.8.0-b2" = 1.0 }

    [[phase]]
    name = "connect"
    seconds = 60
    until = "connected"
    action = { connect = { per_second = 400 } }

    [[phase]]
    name = "storm"
    seconds = 200
    until = "connected"
    action = "drop-all"
"#;

fn scenario(text: &str) -> Scenario {
    toml::from_str(text).unwrap()
}

fn report_of(text: &str) -> Report {
    simulate(&scenario(text)).unwrap()
}

#[test]
fn same_seed_gives_the_same_run_and_another_seed_another() {
    let trace = |seed: u64| {
        let report = report_of(&STORM.replacen("devices = 5000", &format!("devices = 1000\nseed = {seed}"), 1));
        let figures = serde_json::to_string(&report.runs).unwrap();
        (report.simulation.unwrap().trace, figures)
    };

    let (first, second, other) = (trace(1), trace(1), trace(2));

    assert_eq!(first, second);
    assert_ne!(first.0, other.0);
}

#[test]
fn fleet_returns_at_the_databases_pace() {
    let report = report_of(STORM);

    assert!(report.passed, "{}", report.to_text());
    let ratio = report.figures()["t100_over_optimum"].unwrap();
    assert!((1.0..1.15).contains(&ratio), "{}", report.to_text());
    assert!(report.summary.attempts_per_device.unwrap() < 3.0);
    let samples = &report.runs[0].samples;
    assert_eq!(samples.iter().map(|second| second.returned).sum::<u64>(), 10_000);
    assert!(
        samples
            .iter()
            .any(|second| second.hints > 0 && second.hint_seconds > 0.0)
    );
}

#[test]
fn every_delivered_scenario_can_be_simulated() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let scenario = Scenario::from_file(&path, &Changes::default(), Executor::Simulate).unwrap();
        // The longest would take minutes in a debug build.
        let is_short = Changes {
            is_short: scenario.short.is_some(),
            ..Changes::default()
        };
        let scenario = Scenario::from_file(&path, &is_short, Executor::Simulate).unwrap();
        let devices = scenario.devices.min(3_000);
        let scenario = Scenario { devices, ..scenario };

        let report = simulate(&scenario).unwrap_or_else(|error| panic!("{}: {error}", path.display()));

        // The naive server has a presence in virtual time, and nothing else.
        let has_naive = scenario.presence.is_some() && scenario.naive.is_some();
        assert_eq!(report.runs.len(), 1 + usize::from(has_naive));
        for run in &report.runs {
            assert_eq!(run.phases.len(), scenario.phases.len());
        }
        let real_only = ["naive.", "rss_", "_per_hour", ".acked"];
        let is_real_only = |threshold: &String| real_only.iter().any(|part| threshold.contains(part));
        assert!(report.not_judged.iter().all(is_real_only), "{:?}", report.not_judged);
    }
}

#[test]
fn blocked_version_is_evicted_and_refused_and_costs_no_look_up() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios/smoke.toml");
    let scenario = Scenario::from_file(&path, &Changes::default(), Executor::Simulate).unwrap();

    let report = simulate(&scenario).unwrap();

    assert!(report.passed, "{}", report.to_text());
    let left = report.figures()["seawall.blocked.marked.connected"].unwrap();
    assert!((1.0..200.0).contains(&left), "evicted at a pace: {}", report.to_text());
}

#[test]
fn device_that_waits_when_its_version_is_blocked_is_looked_up_no_more() {
    let block =
        "\n[[phase]]\nname = \"block\"\nseconds = 60\naction = { block = { range = \">=3.8.0-b3\", evict = true } }\n";
    let text = STORM
        .replacen(
            "{ \"3.8.0-b2\" = 1.0 }",
            "{ \"3.8.0-b2\" = 0.5, \"3.8.0-b3\" = 0.5 }",
            1,
        )
        .replacen("seconds = 200\n    until = \"connected\"", "seconds = 3", 1)
        .replacen("\"missing == 0\", ", "", 1);

    // The run ends at the first blocked device behind a statement.
    let report = report_of(&format!("{text}{block}"));

    assert!(report.passed, "{}", report.to_text());
    assert!(report.figures()["seawall.storm.statements"].unwrap() > 0.0);
}

#[test]
fn database_that_dies_in_mid_storm_is_survived() {
    for trouble in ["\"killed\"", "\"frozen\"", "{ slow = { factor = 4 } }"] {
        let text = format!(
            "{}\n[[phase]]\nname = \"trouble\"\nseconds = 10\naction = {{ database = {trouble} }}\n\
             [[phase]]\nname = \"after\"\nseconds = 300\nuntil = \"connected\"\n",
            STORM
                .replacen("seconds = 200\n    until = \"connected\"", "seconds = 3", 1)
                .replacen("[gateway", "[database]\nkind = \"postgres\"\n[gateway", 1)
        );

        let report = report_of(&text);

        assert!(report.passed, "{trouble}: {}", report.to_text());
        let back = report.figures()["t100_seconds"].unwrap();
        assert!(back > 10.0, "the trouble cost time: {back}");
    }
}

#[test]
fn devices_that_give_up_early_are_taken_out_of_the_queue() {
    let report = report_of(
        &STORM
            .replacen(
                "name = \"displays\"",
                "name = \"displays\"\nanswer_timeout_seconds = 0.3\nprofile = { fixed-5s = 0.5, well-behaved = 0.5 }",
                1,
            )
            .replacen(
                "[simulate.database]",
                "[simulate]\nround_trip_extra_ms = 10\n[simulate.database]",
                1,
            ),
    );

    assert!(report.passed, "{}", report.to_text());
    assert!(report.figures()["seawall.storm.all.failed"].unwrap() > 0.0);
}

#[test]
fn nodes_share_the_database_and_strangers_get_nothing() {
    let assumed = "[simulate]\nnodes = 4\nstrangers_per_second = 200\n[simulate.edge]\nhandshakes_per_second = 500\n";
    let text = STORM
        .replacen("[simulate.database]", &format!("{assumed}\n[simulate.database]"), 1)
        .replacen("lookups_per_second_max = 1000", "lookups_per_second_max = 250", 1)
        .replacen("keys_in_flight_max = 64", "keys_in_flight_max = 16", 1);

    let report = report_of(&text);

    assert!(report.passed, "{}", report.to_text());
    assert!(report.summary.in_flight_max <= 64.0);
}

#[test]
fn what_cant_be_simulated_is_said_in_one_line() {
    for (from, to, expected) in [
        (
            "keys_in_flight_max = 64",
            "keys_in_flight_max = 1",
            "`gateway.config.admission`: admission.keys_in_flight_max: 1 is out of range",
        ),
        (
            "keys_in_flight_max = 64",
            "keys = 64",
            "`gateway.config.admission`: unknown field `keys`",
        ),
        (
            "action = \"drop-all\"",
            "action = { block = { range = \">>1\" } }",
            "`phase.storm.action.block`",
        ),
    ] {
        let error = simulate(&scenario(&STORM.replacen(from, to, 1)))
            .unwrap_err()
            .to_string();

        assert!(error.contains(expected), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn violated_invariant_ends_the_run_with_seed_time_and_event() {
    let scenario = scenario(STORM);
    let mut world = World::new(&scenario).unwrap();
    world.nodes[0].ledger.admitted += 1;

    let error = world.run(|_| {}).unwrap_err().to_string();

    assert!(
        error.contains("every request is answered, abandoned or waiting"),
        "{error}"
    );
    assert!(
        error.contains("seed 1") && error.contains("(Request { device: "),
        "{error}"
    );
}

#[test]
fn sweep_finds_a_device_that_nobody_wakes_and_one_that_the_recorder_lost() {
    let scenario = scenario(STORM);
    let sweep = |break_it: fn(&mut World<'_>)| {
        let mut world = World::new(&scenario).unwrap();
        world.sweep(SWEEP_MAX).unwrap();
        break_it(&mut world);
        world.sweep(SWEEP_MAX).unwrap_err().claim
    };
    fn connect(world: &mut World<'_>) {
        let machine = &mut world.devices.machines[7];
        *machine = firmware_sim::device::Device::new(machine.profile(), Instant::ZERO);
        machine.handle_timeout(Instant::ZERO, &mut world.rng);
        machine.handle_connected(Instant::ZERO, &mut world.rng);
    }

    let forgotten = sweep(|world| {
        world.devices.machines[7] = world.devices.machine_from(7, Instant::ZERO);
        world.devices.note_presence(7);
        world.now = Instant::from_micros(2_000_000);
    });
    let lost = sweep(|world| {
        connect(world);
        world.devices.note_presence(7);
    });
    let changed = sweep(connect);

    assert_eq!(forgotten, "no device is forgotten");
    assert_eq!(lost, "recorder and devices agree on who is connected");
    assert_eq!(changed, "only events change a device");
}

fn state() -> AdmissionState {
    Admission::<(), ()>::new(AdmissionConfig::default(), Instant::ZERO).state(Instant::ZERO)
}

#[test]
fn each_claim_on_a_node_can_fail() {
    let config = AdmissionConfig::default();
    let good = Ledger::default();
    assert_eq!(good.check(&state(), &config), Ok(()));
    let claim = |ledger: Ledger, state: AdmissionState| ledger.check(&state, &config).unwrap_err().claim;
    let arrived = |arrived: u64, waiting: usize| Ledger {
        arrived,
        waiting,
        ..good
    };

    let claims = [
        claim(arrived(1, 0), state()),
        claim(arrived(1, 1), state()),
        claim(
            arrived(70_000, 70_000),
            AdmissionState {
                queue: 70_000,
                ..state()
            },
        ),
        claim(Ledger { in_flight: 1, ..good }, state()),
        claim(
            Ledger { in_flight: 513, ..good },
            AdmissionState {
                in_flight: 513,
                limit: 513,
                ..state()
            },
        ),
        claim(
            arrived(1, 1),
            AdmissionState {
                queue: 1,
                breaker: BreakerState::Open,
                ..state()
            },
        ),
    ];

    assert_eq!(
        claims,
        [
            "every request is answered, abandoned or waiting",
            "the node knows who waits",
            "no more wait than waiting_max",
            "the node knows what is in flight",
            "keys in flight never exceed the limit",
            "nobody waits for a database that is away",
        ]
    );
    let mut busy = Ledger {
        keys_this_second: 11_002,
        ..good
    };
    assert!(busy.check_second(&config).is_err());
    assert_eq!(busy.check_second(&config), Ok(()), "the next second starts again");
}

#[test]
fn each_claim_on_a_statement_can_fail() {
    let config = AdmissionConfig::default();
    let mut slots = Slots::new(&config.slots(), SlotKeys::new(1, [0; 32]));
    let mut admission = Admission::<(), ()>::new(config.clone(), Instant::ZERO);
    let mut rng = <rand::rngs::SmallRng as rand::SeedableRng>::seed_from_u64(1);
    let arrival = Arrival {
        device: DeviceId::from_uuid(Uuid::from_u128(1)),
        cohort: CohortTag::of(None, None),
        slot_token: None,
        arrived: Instant::ZERO,
        is_known_absent: false,
        credential: (&Credential::from(SecretHash::of(b"a secret"))).into(),
        network: Network::V4(1),
    };
    let times = (Instant::ZERO, WallTime::from_unix_ms(0));
    admission.attempt(&arrival, || (), &mut slots, times, &mut rng);
    let before = admission.state(Instant::ZERO);
    let Output::Send(batch) = admission.poll_output(&mut slots, times, &mut rng) else {
        panic!("nothing is in the way");
    };
    assert_eq!(checks::statement(&batch, &before, 0, &config), Ok(()));
    let with = |keys: Vec<DeviceId>| Batch { keys, ..batch.clone() };
    let key = arrival.device;

    let claims = [
        checks::statement(&with(Vec::new()), &before, 0, &config),
        checks::statement(&with(vec![key, key]), &before, 0, &config),
        checks::statement(&batch, &before, 3, &config),
        checks::statement(
            &batch,
            &AdmissionState {
                in_flight: before.limit,
                ..before
            },
            0,
            &config,
        ),
        checks::statement(
            &batch,
            &AdmissionState {
                breaker: BreakerState::Open,
                ..before
            },
            0,
            &config,
        ),
    ]
    .map(|result| result.unwrap_err().claim);

    assert_eq!(
        claims,
        [
            "a statement has 1 to batch_keys_max keys",
            "a statement names no key twice",
            "no more statements than three are under way",
            "what is sent stays within the limit",
            "only probes are sent while the breaker is open",
        ]
    );
}

#[test]
fn each_claim_on_a_device_can_fail() {
    let at = |seconds: u64| Instant::from_micros(seconds * 1_000_000);
    let second = Duration::from_secs(1);

    assert!(checks::time(at(2), at(2)).is_ok() && checks::time(at(2), at(1)).is_err());
    assert!(checks::answer(at(0), at(2)).is_ok() && checks::answer(at(0), at(3)).is_err());
    assert!(checks::slot_hint(second).is_ok());
    assert!(checks::slot_hint(Duration::from_millis(499)).is_err() && checks::slot_hint(second * 601).is_err());
    assert!(checks::slot_kept(None, at(1)).is_ok() && checks::slot_kept(Some(at(2)), at(2)).is_ok());
    assert!(checks::slot_kept(Some(at(2)), at(1)).is_err());
    assert_eq!(checks::promise(second, at(1)), Some(at(2)));
    assert_eq!(checks::promise(second * 500, at(1)), None, "drawn, and no promise");
    assert!(checks::answered_once(Some(()), &1).is_ok() && checks::answered_once(None::<()>, &1).is_err());
    assert!(checks::admitted_once(false, 1).is_ok() && checks::admitted_once(true, 1).is_err());
    assert!(checks::none_forgotten(0).is_ok() && checks::none_forgotten(1).is_err());
    assert!(checks::unchanged(1, true).is_ok() && checks::unchanged(1, false).is_err());
    assert!(checks::recorder_agrees(1, true, true).is_ok() && checks::recorder_agrees(1, true, false).is_err());
    assert!(checks::counts_add_up(1, 1).is_ok() && checks::counts_add_up(1, 2).is_err());
}

#[test]
fn devices_with_resume_tokens_return_without_a_statement_also_while_the_database_is_dead() {
    let text = STORM
        .replacen("name = \"displays\"", "name = \"displays\"\nresume = true", 1)
        .replacen("[gateway", "[database]\nkind = \"postgres\"\n[gateway", 1)
        .replacen(
            "action = \"drop-all\"",
            "action = \"drop-all\"\n[[phase]]\nname = \"dead\"\nseconds = 10\naction = { database = \"killed\" }",
            1,
        )
        .replacen("seconds = 200\n    until = \"connected\"", "seconds = 0.001", 1);

    let report = report_of(&text);

    assert!(report.passed, "{}", report.to_text());
    let figures = report.figures();
    assert_eq!(figures["seawall.dead.statements"], Some(0.0), "{}", report.to_text());
    assert!(figures["t100_seconds"].unwrap() <= 6.0, "{}", report.to_text());
}

#[test]
fn strangers_delay_a_fleet_that_two_nodes_have_not_seen_only_where_they_have_no_registry_index() {
    let ratio = |without: u8| {
        let more = format!(
            "[simulate]\nnodes = 2\nnodes_without_registry_index = {without}\nstrangers_per_second = 2500\nstrangers_from = \"storm\"\n"
        );
        let text = STORM
            .replacen("[simulate.database]", &format!("{more}[simulate.database]"), 1)
            .replacen("lookups_per_second_max = 1000", "lookups_per_second_max = 500", 1);
        report_of(&text).figures()["t100_over_optimum"].unwrap()
    };

    let (with, without) = (ratio(0), ratio(2));

    assert!(with < 1.2, "{with}");
    assert!(without > 1.5, "{without}");
}
