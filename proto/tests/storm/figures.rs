//! The figures that a fleet of 100,000 and a database of 2,000 a second must come to: medians of five seeds.

use std::time::Duration;

use super::world::{Curve, Habit, Report, Scenario, World};

const FLEET: usize = 100_000;
const OPTIMUM: Duration = Duration::from_secs(50);

/// Medians of five runs that differ in the seed.
struct Medians {
    all_back: f64,
    obedient_back: f64,
    attempts: f64,
    /// Of the small tenants: what half of them wait, and what one of a hundred exceeds, in seconds.
    small_p50: f64,
    small_p99: f64,
}

fn medians(scenario: &Scenario) -> Medians {
    let reports: Vec<Report> = (1..=5)
        .map(|seed| {
            World::new(Scenario {
                fleet: FLEET,
                seed,
                ..scenario.clone()
            })
            .run()
        })
        .collect();
    let median = |of: &dyn Fn(&Report) -> f64| {
        let mut values: Vec<f64> = reports.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let small = |report: &Report, part: f64| {
        let mut waits: Vec<Duration> = report.waits.iter().skip(1).flatten().copied().collect();
        waits.sort();
        let index = (waits.len() as f64 * part) as usize;
        waits.get(index).map_or(0.0, Duration::as_secs_f64)
    };
    let medians = Medians {
        all_back: median(&|report| report.all_back.as_secs_f64()),
        obedient_back: median(&|report| report.obedient_back.as_secs_f64()),
        attempts: median(&|report| report.attempts),
        small_p50: median(&|report| small(report, 0.5)),
        small_p99: median(&|report| small(report, 0.99)),
    };
    println!(
        "back {:.2} s (obedient {:.2}), {:.2} attempts, small tenants {:.2} / {:.2}",
        medians.all_back, medians.obedient_back, medians.attempts, medians.small_p50, medians.small_p99
    );
    medians
}

fn assert_ratio(seconds: f64, optimum: Duration, most: f64) {
    let ratio = seconds / optimum.as_secs_f64();
    assert!(ratio <= most, "{seconds:.2} s is {ratio:.3} of {optimum:?}");
}

#[test]
fn obedient_fleet_is_back_within_two_percent_of_the_optimum() {
    for curve in [Curve::Flat, Curve::Knee] {
        let medians = medians(&Scenario {
            curve,
            ..Scenario::default()
        });

        assert_ratio(medians.all_back, OPTIMUM, 1.02);
        assert!(medians.attempts <= 2.5);
    }
}

#[test]
fn disobedient_fifth_costs_the_obedient_two_percent_and_all_eight() {
    let medians = medians(&Scenario {
        disobedient_percent: 20,
        habit: Habit::Fixed(Duration::from_secs(5)),
        ..Scenario::default()
    });

    assert_ratio(medians.all_back, OPTIMUM, 1.08);
    assert_ratio(medians.obedient_back, OPTIMUM, 1.02);
}

#[test]
fn slow_database_costs_five_percent_beside_its_slowness() {
    let medians = medians(&Scenario {
        slow: Some((Duration::from_secs(20), Duration::from_secs(40))),
        ..Scenario::default()
    });

    assert_ratio(medians.all_back, OPTIMUM + Duration::from_secs(15), 1.05);
}

#[test]
fn dead_database_costs_twelve_percent_beside_the_outage_also_when_it_is_the_first_thing_seen() {
    for (from, is_known) in [(10, true), (0, true), (0, false)] {
        let from = Duration::from_secs(from);
        let medians = medians(&Scenario {
            dead: Some((from, from + Duration::from_secs(30))),
            is_known,
            ..Scenario::default()
        });

        assert_ratio(medians.all_back, OPTIMUM + Duration::from_secs(30), 1.12);
    }
}

#[test]
fn small_tenants_behind_one_of_ninety_thousand_wait_a_second_or_two() {
    let medians = medians(&Scenario {
        tenants: 21,
        small_from: Some(Duration::from_secs(10)),
        ..Scenario::default()
    });

    assert_ratio(medians.all_back, OPTIMUM, 1.02);
    assert!(medians.small_p50 <= 1.5, "{}", medians.small_p50);
    assert!(medians.small_p99 <= 5.0, "{}", medians.small_p99);
}

#[test]
fn tenant_whose_devices_crash_again_and_again_takes_nobody_elses_share() {
    let medians = medians(&Scenario {
        tenants: 21,
        crashing: Some(Duration::from_millis(200)),
        ..Scenario::default()
    });

    // A tenth of the devices, that may have 20 of 21 parts of the rate: they need 5.25 s.
    assert_ratio(medians.all_back, Duration::from_millis(5_250), 1.3);
    assert!(medians.small_p99 <= 7.0, "{}", medians.small_p99);
}
