use self::database::{Curve, Database, Who};
use super::*;

mod database;

const CEILING: u32 = 512;
const BATCH_KEYS_MAX: u32 = 256;
/// Fixed limits that the adaptive one is compared with.
const FIXED: [usize; 14] = [4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512];

fn found(ceiling: u32) -> Who {
    Who::Found(Box::new(Limiter::new(ceiling, BATCH_KEYS_MAX, Instant::ZERO)))
}

/// The best rate of any fixed limit up to `ceiling`, and that limit.
fn best_fixed(curve: Curve, slowness: f64, ceiling: u32) -> (f64, usize) {
    FIXED
        .into_iter()
        .filter(|keys| *keys <= to_usize(ceiling))
        .map(|keys| {
            let mut database = Database::new(curve, Who::Fixed(keys), 1);
            database.slowness = slowness;
            database.goodput(1.0);
            (database.goodput(4.0), keys)
        })
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .unwrap()
}

/// Goodput of the adaptive limit, as a part of that of the best fixed limit. The database is healthy, then four times
/// slower, then healthy again. The median of three seeds.
fn parts_of_the_best(curve: Curve, ceiling: u32) -> [f64; 3] {
    let healthy = best_fixed(curve, 1.0, ceiling);
    let slow = best_fixed(curve, 4.0, ceiling);
    let mut parts = [const { Vec::new() }; 3];
    for seed in 1..=9 {
        let mut database = Database::new(curve, found(ceiling), seed);
        for (phase, (slowness, best)) in [(1.0, healthy), (4.0, slow), (1.0, healthy)].into_iter().enumerate() {
            database.slowness = slowness;
            parts[phase].push(database.goodput(30.0) / best.0);
        }
        assert!(database.in_flight_max <= to_usize(ceiling));
    }
    parts.map(|mut seeds| {
        seeds.sort_by(f64::total_cmp);
        seeds[seeds.len() / 2]
    })
}

fn assert_ninety_percent(curve: Curve, ceiling: u32) {
    let parts = parts_of_the_best(curve, ceiling);
    println!("{curve:?}, at most {ceiling}: {parts:.3?} of the best fixed limit");
    assert!(parts.iter().all(|part| *part >= 0.9), "{curve:?}: {parts:.3?}");
}

#[test]
fn nine_tenths_of_the_best_fixed_limit_at_any_knee_whether_healthy_slow_or_recovered() {
    for keys in [8.0, 32.0, 128.0] {
        assert_ninety_percent(Curve::Knee { keys }, CEILING);
        assert_ninety_percent(Curve::Together { keys, key: 0.008 }, CEILING);
        // 2,000 keys per second, at any concurrency.
        assert_ninety_percent(
            Curve::Together {
                keys,
                key: keys / 2_000.0,
            },
            CEILING,
        );
    }
}

#[test]
fn same_for_databases_that_work_by_statements() {
    // About what PostgreSQL and SQLite take on the same machine, and PostgreSQL far away.
    for curve in [
        Curve::Statements {
            each: 200e-6,
            key: 5e-6,
        },
        Curve::OneReader { each: 30e-6, key: 3e-6 },
        Curve::Statements {
            each: 20e-3,
            key: 10e-6,
        },
    ] {
        assert_ninety_percent(curve, CEILING);
    }
}

#[test]
fn ceiling_ten_times_too_high_costs_nothing() {
    assert_ninety_percent(Curve::Knee { keys: 32.0 }, 5_120);
}

#[test]
fn ceiling_far_below_the_knee_is_reached_used_and_told() {
    let curve = Curve::Knee { keys: 128.0 };
    let mut database = Database::new(curve, found(32), 1);

    database.goodput(10.0);
    let goodput = database.goodput(20.0);

    assert!(goodput >= 0.9 * best_fixed(curve, 1.0, 32).0, "{goodput}");
    assert!(database.limit().is_ceiling_too_low(database.now()));
    assert_eq!(database.limit().reason(), LimitReason::Ceiling);
    assert_eq!(database.in_flight_max, 32);
}

#[test]
fn ceiling_that_is_not_what_holds_throughput_back_is_not_told() {
    for curve in [
        Curve::Knee { keys: 8.0 },
        Curve::OneReader {
            each: 30e-6,
            key: 30e-6,
        },
    ] {
        let mut database = Database::new(curve, found(256), 1);

        database.goodput(30.0);

        assert!(!database.limit().is_ceiling_too_low(database.now()));
    }
}

#[test]
fn others_who_come_and_go_on_the_same_database_do_not_drive_the_limit_away() {
    let curve = Curve::Knee { keys: 64.0 };
    let mut database = Database::new(curve, found(CEILING), 1);
    let mut fixed = Database::new(curve, Who::Fixed(64), 1);
    let (mut goodput, mut best) = (0.0, 0.0);
    for second in 0..60 {
        let others = if second % 7 < 3 { 64.0 } else { 0.0 };
        (database.others, fixed.others) = (others, others);
        goodput += database.goodput(1.0);
        best += fixed.goodput(1.0);
    }

    assert!(goodput >= 0.9 * best, "{goodput} of {best}");
}

#[test]
fn load_below_the_limit_holds_it_and_the_next_storm_moves_it_again() {
    let mut database = Database::new(Curve::Knee { keys: 256.0 }, found(CEILING), 1);
    database.demand = Some(500.0);
    database.goodput(60.0);
    assert_eq!(database.limit().reason(), LimitReason::AppLimited);
    let held = database.limit().keys();
    assert!((100..=150).contains(&held), "{held}");

    database.demand = None;
    database.goodput(10.0);

    assert!(database.limit().keys() > 200, "{}", database.limit().keys());
}

#[test]
fn load_that_seldom_fills_the_limit_does_not_move_it() {
    let curve = Curve::Together {
        keys: 128.0,
        key: 0.064,
    };
    for seed in 1..=9 {
        for demand in [1_400.0, 1_500.0] {
            let mut database = Database::new(curve, found(CEILING), seed);
            database.demand = Some(demand);

            database.goodput(60.0);

            assert_eq!(database.limit().reason(), LimitReason::AppLimited);
            let held = database.limit().keys();
            assert!((100..=150).contains(&held), "seed {seed}, {demand} a second: {held}");
        }
    }
}

#[test]
fn statements_that_take_too_long_shrink_the_limit_though_throughput_would_grow() {
    // Each takes 600 ms, however many keys it has.
    let mut database = Database::new(Curve::Statements { each: 0.6, key: 1e-6 }, found(CEILING), 1);

    database.goodput(60.0);

    assert_eq!(database.limit().reason(), LimitReason::Latency);
    assert!(database.limit().keys() <= 8, "{}", database.limit().keys());
}

#[test]
fn after_an_outage_the_limit_starts_from_a_quarter_and_finds_its_way_back() {
    let mut database = Database::new(Curve::Knee { keys: 128.0 }, found(CEILING), 1);
    database.goodput(30.0);
    let before = database.limit().keys();
    let now = database.now();
    let Who::Found(limit) = &mut database.who else {
        unreachable!("it was made so");
    };

    limit.handle_outage(now);
    limit.handle_outage(now);
    let after = limit.keys();
    limit.handle_recovered(now);
    database.goodput(5.0);

    assert!((before / 6..=before / 3).contains(&after), "{before}, then {after}");
    assert!(database.limit().keys() > 200, "{}", database.limit().keys());
}

#[test]
fn limits_that_start_together_are_not_tried_in_step() {
    let mut rng = SmallRng::seed_from_u64(1);
    let [first, second] = [0, 1].map(|_| {
        let mut limit = Limiter::new(CEILING, BATCH_KEYS_MAX, Instant::ZERO);
        limit.seed(&mut rng);
        limit.seed(&mut rng);
        std::array::from_fn::<bool, 64, _>(|_| limit.rng.random())
    });

    assert_ne!(first, second);
}

#[test]
fn failures_among_the_answers_shrink_the_limit() {
    let mut limit = Limiter::new(CEILING, BATCH_KEYS_MAX, Instant::ZERO);
    let before = limit.keys();
    let mut now = Instant::ZERO;
    for number in 1..=200_u32 {
        let limit_keys = to_usize(limit.keys());
        let (keys, took) = (limit_keys.div_ceil(2), Duration::from_millis(20));
        let probe = limit.handle_sent(keys, limit_keys);
        now += took;
        limit.handle_ended(probe, keys, !number.is_multiple_of(10), took, now);
    }

    assert_eq!(limit.reason(), LimitReason::Errors);
    assert!(limit.keys() < before / 2, "{before}, then {}", limit.keys());
}

#[test]
fn plan_alarm_cuts_the_limit_to_two_and_gives_it_back() {
    let mut limit = Limiter::new(CEILING, BATCH_KEYS_MAX, Instant::ZERO);
    let before = limit.keys();

    limit.set_cut(true, Instant::ZERO);

    assert_eq!((limit.keys(), limit.reason()), (2, LimitReason::PlanCut));
    limit.set_cut(false, Instant::ZERO);
    assert!(limit.keys() >= before * 3 / 4);
}

#[test]
fn limit_that_could_not_move_at_all_finds_its_way_up_when_it_may() {
    let mut limit = Limiter::new(1, BATCH_KEYS_MAX, Instant::ZERO);
    let (took, mut now) = (Duration::from_millis(20), Instant::ZERO);
    let mut run = |limit: &mut Limiter| {
        for _ in 0..2_000 {
            let keys = to_usize(limit.keys());
            let probe = limit.handle_sent(keys.div_ceil(2), keys);
            now += took;
            limit.handle_ended(probe, keys.div_ceil(2), true, took, now);
        }
        now
    };

    let now = run(&mut limit);
    limit.set_ceiling(CEILING, BATCH_KEYS_MAX, now);
    run(&mut limit);

    assert!(limit.dither.is_finite(), "{limit:?}");
    assert!(limit.keys() > 100, "{}", limit.keys());
}

#[test]
fn limit_that_can_hardly_move_stays_within_its_ceiling() {
    for ceiling in 1..=6 {
        let mut database = Database::new(Curve::Knee { keys: 32.0 }, found(ceiling), 1);

        database.goodput(20.0);

        assert!(database.in_flight_max <= to_usize(ceiling), "{ceiling}");
        assert!(database.limit().keys() >= 1);
    }
}
