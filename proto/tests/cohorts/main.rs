//! The detector and the breaker against a simulated fleet: what they find, how soon, and which good cohorts they
//! accuse.

mod dear;
mod gates;
mod model;

use model::{COHORTS, DEVICES, Fleet, Leak, Loop, Noise, USUAL};
use seawall_proto::cohorts::Signal;

/// The fleet is calm, but for the usual repeats.
const CALM: Noise = Noise {
    storms_a_day: 0.0,
    power_cuts_a_day: 0.0,
};
const WARM_UP: u64 = 3_000;

fn crash_loop(fleet: &Fleet, cohort: usize, period: f64) -> Loop {
    Loop {
        cohort,
        begins: WARM_UP,
        period,
        devices: fleet.sizes[cohort] as usize,
        ramp: 0.0,
        tenant: 7,
        crashes: u32::MAX,
        is_new: false,
    }
}

/// Greatest time to a proposal of five runs, in seconds. Nobody else is accused.
fn named_within(cohort: usize, change: impl Fn(&mut Loop), horizon: u64) -> Option<u64> {
    let runs = (0..5).map(|seed| {
        let mut fleet = Fleet::new(100 + seed * 31, CALM);
        let mut bad = crash_loop(&fleet, cohort, 30.0);
        change(&mut bad);
        fleet.add_loop(bad);
        fleet.run(WARM_UP + horizon);
        assert_eq!(fleet.outcome.accused(&[cohort]), 0, "{:?}", fleet.outcome);
        fleet.outcome.named_after(cohort, WARM_UP)
    });
    let runs: Vec<_> = runs.collect();
    println!("cohort {cohort}: named after {runs:?} s");
    runs.into_iter().collect::<Option<Vec<_>>>()?.into_iter().max()
}

#[test]
fn a_crash_loop_of_30_s_is_named_before_its_second_crash() {
    // 11,134, 1,452, 165 and 55 devices.
    for (cohort, seconds_max) in [(0, 35), (20, 35), (200, 40), (600, 45)] {
        let after = named_within(cohort, |_| {}, 120).unwrap();

        assert!(after <= seconds_max, "cohort {cohort}: {after} s");
    }
}

#[test]
fn other_crash_loops_are_named() {
    for (cohort, period, seconds_max) in [(0, 60.0, 70), (20, 110.0, 120), (200, 110.0, 140)] {
        let after = named_within(cohort, |bad| bad.period = period, 300).unwrap();

        assert!(after <= seconds_max, "cohort {cohort}, {period} s: {after} s");
    }
}

/// A device that stayed connected before counts from its second such session on.
#[test]
fn loops_of_minutes_are_named_and_left_to_a_person() {
    for (cohort, period, seconds_max) in [(0, 180.0, 400), (20, 300.0, 650), (200, 300.0, 700), (0, 600.0, 1_250)] {
        let after = named_within(cohort, |bad| bad.period = period, 1_800).unwrap();

        assert!(after <= seconds_max, "cohort {cohort}, {period} s: {after} s");
    }
    let mut fleet = Fleet::new(31, CALM);
    let bad = Loop {
        period: 300.0,
        ..crash_loop(&fleet, 20, 300.0)
    };
    fleet.add_loop(bad);
    fleet.run(WARM_UP + 3_600);
    assert_eq!((fleet.outcome.opened.len(), &fleet.outcome.applied[..]), (1, &[][..]));
}

/// 18,000 devices that reconnect every 5 minutes by design, and have just taken a new version.
#[test]
fn devices_that_reconnect_every_few_minutes_by_design_are_not_accused_after_an_upgrade() {
    let mut fleet = Fleet::new(32, CALM);
    let upgrade = Loop {
        devices: 18_000,
        ramp: 1_800.0,
        is_new: true,
        ..crash_loop(&fleet, 900, 300.0)
    };
    fleet.sizes[900] = 18_000.0;
    fleet.add_loop(upgrade);

    fleet.run(WARM_UP + 7_200);

    assert_eq!(fleet.outcome.opened, []);
}

#[test]
fn a_version_that_is_rolled_out_slowly_is_named_while_few_have_it() {
    let minutes_10 = named_within(20, |bad| bad.ramp = 600.0, 300).unwrap();
    assert!(minutes_10 <= 110, "{minutes_10} s");

    // A leak: within six hours each of the 11,134 devices begins to crash.
    let hours_6 = named_within(0, |bad| bad.ramp = 21_600.0, 900).unwrap();
    assert!(hours_6 <= 360, "1.7 % of them: {hours_6} s");
}

/// Repeats that grow so slowly that each hour looks like the one before.
#[test]
fn repeats_that_double_within_two_hours_are_named() {
    const HOUR: u64 = 3_600;
    let mut fleet = Fleet::new(40, CALM);
    let begins = 26 * HOUR;
    // 1,452 devices.
    fleet.leak = Some(Leak {
        cohort: 20,
        begins,
        doubles_in: 7_200.0,
    });

    fleet.run(begins + 15 * HOUR);

    let after = fleet.outcome.named_after(20, begins).map(|seconds| seconds / 60);
    println!("named after {after:?} min");
    assert!(after.is_some(), "{:?}", fleet.outcome);
    assert_eq!(fleet.outcome.accused(&[20]), 0, "{:?}", fleet.outcome);
}

/// 11,134 devices have sixty times their repeats every morning, by design.
#[test]
fn what_returns_every_day_becomes_usual() {
    let mut fleet = Fleet::new(41, CALM);
    fleet.mornings = Some((0, 60.0));

    fleet.run(3 * 86_400);

    assert_eq!(fleet.outcome.named_after(0, 86_400), None, "{:?}", fleet.outcome);
}

#[test]
fn a_loop_of_one_tenants_devices_is_named_with_its_tenant() {
    let mut fleet = Fleet::new(5, CALM);
    let mut bad = crash_loop(&fleet, 0, 30.0);
    (bad.devices, bad.tenant) = (600, 99);
    fleet.add_loop(bad);

    fleet.run(WARM_UP + 120);

    let after = fleet.outcome.named_after(0, WARM_UP).unwrap();
    assert!(after <= 60, "{after} s");
    let proposal = fleet.breaker.proposals().next().unwrap();
    assert_eq!(proposal.evidence.tenant, Some(99));
    assert_eq!(fleet.outcome.opened.len(), 1);
}

/// The same bad version on two models of a tenth of the fleet each.
#[test]
fn two_large_bad_cohorts_do_not_hide_each_other() {
    let mut fleet = Fleet::new(6, CALM);
    for cohort in [0, 1] {
        let bad = crash_loop(&fleet, cohort, 30.0);
        fleet.add_loop(bad);
    }

    fleet.run(WARM_UP + 60);

    for cohort in [0, 1] {
        let after = fleet.outcome.named_after(cohort, WARM_UP).unwrap();
        assert!(after <= 45, "cohort {cohort}: {after} s");
    }
    assert_eq!(fleet.outcome.accused(&[0, 1]), 0);
}

#[test]
fn a_looping_cohort_is_gated_once_it_loops_and_for_as_long_as_it_does() {
    let mut fleet = Fleet::new(7, CALM);
    let bad = crash_loop(&fleet, 20, 30.0);
    fleet.add_loop(Loop {
        // 40 minutes.
        crashes: 80,
        ..bad
    });

    fleet.run(WARM_UP + 7_200);

    let [(gated, cohort)] = fleet.outcome.applied[..] else {
        panic!("{:?}", fleet.outcome);
    };
    assert_eq!(cohort, 20);
    assert!(gated - WARM_UP <= 90, "{} s", gated - WARM_UP);
    assert!((2..=4).contains(&fleet.outcome.renewed), "{:?}", fleet.outcome);
    assert_eq!(fleet.outcome.expired, 1);
}

#[test]
fn four_cohorts_that_begin_together_have_a_common_cause_and_none_is_gated() {
    let mut fleet = Fleet::new(8, CALM);
    for cohort in [20, 30, 40, 50] {
        let bad = crash_loop(&fleet, cohort, 30.0);
        fleet.add_loop(bad);
    }

    fleet.run(WARM_UP + 1_800);

    assert!(fleet.outcome.opened.len() >= 4, "{:?}", fleet.outcome);
    assert_eq!(fleet.outcome.applied, [], "{:?}", fleet.outcome);
}

#[test]
fn one_cohort_is_gated_in_ten_minutes() {
    let mut fleet = Fleet::new(9, CALM);
    for (cohort, later) in [(20, 0), (30, 100)] {
        let bad = crash_loop(&fleet, cohort, 30.0);
        fleet.add_loop(Loop {
            begins: WARM_UP + later,
            ..bad
        });
    }

    fleet.run(WARM_UP + 1_200);

    let [(first, 20), (second, 30)] = fleet.outcome.applied[..] else {
        panic!("{:?}", fleet.outcome);
    };
    assert!(second - first >= 600, "{first} {second}");
}

#[test]
fn nothing_over_a_fifth_of_the_fleet_is_gated() {
    let mut fleet = Fleet::new(10, CALM);
    fleet.sizes[0] = DEVICES / 3.0;
    let bad = crash_loop(&fleet, 0, 30.0);
    fleet.add_loop(bad);

    fleet.run(WARM_UP + 300);

    assert_eq!(fleet.outcome.opened.len(), 1);
    assert_eq!(fleet.outcome.applied, []);
}

#[test]
fn storms_and_power_cuts_accuse_nobody() {
    for seed in 0..5 {
        let mut fleet = Fleet::new(seed, CALM);
        fleet.run(WARM_UP);
        fleet.begin_storm(90.0, 100.0);
        fleet.run(600);
        for cohort in [0, 5, 20] {
            fleet.cut_power(cohort, 500.0);
        }
        fleet.run(600);

        assert_eq!(fleet.outcome.opened, [], "seed {seed}");
    }
}

/// Every device of the fleet crashes three times within five minutes.
#[test]
fn a_crash_of_the_whole_fleet_gates_nobody() {
    let mut fleet = Fleet::new(11, CALM);
    for cohort in 0..COHORTS {
        let bad = crash_loop(&fleet, cohort, 60.0);
        fleet.add_loop(Loop { crashes: 3, ..bad });
    }

    fleet.run(WARM_UP + 600);

    assert_eq!(fleet.outcome.applied, []);
    assert!(fleet.outcome.opened.len() <= 3, "{:?}", fleet.outcome);
}

/// 20,000 devices take a good version within half an hour; nine tenths restart once more, two minutes later at most.
#[test]
fn a_mass_upgrade_of_a_good_version_gates_nobody() {
    for seed in 0..5 {
        let mut fleet = Fleet::new(seed, USUAL);
        fleet.sizes[900] = 0.0;
        fleet.run(WARM_UP);
        let upgrade = Loop {
            period: 40.0,
            devices: 18_000,
            ramp: 1_800.0,
            crashes: 1,
            ..crash_loop(&fleet, 900, 40.0)
        };
        fleet.add_loop(upgrade);
        for minute in 1..=30 {
            fleet.sizes[900] = 20_000.0 * f64::from(minute) / 30.0;
            fleet.run(60);
        }
        fleet.run(600);

        assert_eq!(fleet.outcome.applied, [], "seed {seed}");
    }
}

#[test]
fn thirty_days_of_ordinary_trouble_accuse_nobody() {
    const DAYS: u64 = 30;
    let mut fleet = Fleet::new(1, USUAL);

    fleet.run(DAYS * 86_400);

    println!("{DAYS} days: {:?}", fleet.outcome);
    assert_eq!(fleet.outcome.applied, []);
    assert!(fleet.outcome.opened.len() as u64 <= DAYS / 10, "{:?}", fleet.outcome);
    assert!(
        fleet
            .outcome
            .opened
            .iter()
            .all(|(.., signal)| *signal == Signal::Repeats)
    );
}
