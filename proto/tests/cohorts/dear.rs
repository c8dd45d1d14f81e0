//! Versions that do not fail: their lookups are dear, or they send too many messages.

use rand::{Rng, SeedableRng, rngs::SmallRng};
use seawall_proto::{
    cohorts::{Detector, Finding, Level, Signal},
    time::Instant,
};

use crate::model::tag;

const COHORTS: usize = 100;

/// A fleet whose cohorts have 100 sessions each, and what happens to them each second.
struct Fleet {
    detector: Detector,
    rng: SmallRng,
    second: u64,
}

impl Fleet {
    fn new(seed: u64) -> Self {
        Self {
            detector: Detector::default(),
            rng: SmallRng::seed_from_u64(seed),
            second: 0,
        }
    }

    /// `work` returns the time of a lookup in milliseconds, and the number of messages, of a cohort.
    fn step(&mut self, work: impl Fn(usize, &mut SmallRng) -> (f64, u64)) -> Vec<Finding> {
        for cohort in 0..COHORTS {
            let keys = self.rng.random_range(0..12);
            let (mut micros, mut messages) = (0, 0);
            for _ in 0..keys {
                let (millis, _) = work(cohort, &mut self.rng);
                micros += (millis * 1e3) as u64;
            }
            messages += work(cohort, &mut self.rng).1;
            let model = cohort as u64 % 3;
            self.detector
                .handle_cohort(tag(cohort), model, 100, (keys, micros, messages));
        }
        self.second += 1;
        self.detector
            .handle_second(Instant::from_micros(self.second * 1_000_000))
    }
}

/// Times of lookups spread widely: a tenth of them takes ten times as long.
fn millis(rng: &mut SmallRng) -> f64 {
    let usual = rng.random_range(1.0..4.0);
    if rng.random_bool(0.1) { usual * 10.0 } else { usual }
}

#[test]
fn a_version_that_is_only_dear_is_named_within_ten_seconds_and_never_gated() {
    let mut fleet = Fleet::new(1);
    for _ in 0..300 {
        let findings = fleet.step(|_, rng| (millis(rng), 0));

        assert_eq!(findings, []);
    }

    for second in 1.. {
        let dear = |cohort, rng: &mut SmallRng| (millis(rng) * if cohort == 7 { 100.0 } else { 1.0 }, 0);
        let findings = fleet.step(dear);

        if let [found] = findings[..] {
            assert_eq!(
                (found.cohort, found.signal, found.level),
                (tag(7), Signal::Cost, Level::Propose)
            );
            assert!(found.evidence.observed > 20.0 * found.evidence.expected, "{found:?}");
            println!("named after {second} s");
            break;
        }
        assert!(findings.is_empty() && second < 10, "{second} s: {findings:?}");
    }
    assert!(fleet.detector.is_bad(tag(7), Signal::Cost));

    // Its devices have gone, so that it has no lookups any more.
    for second in 0..600 {
        let now = Instant::from_micros((fleet.second + second) * 1_000_000);
        assert_eq!(fleet.detector.handle_second(now), []);
    }

    assert!(!fleet.detector.is_bad(tag(7), Signal::Cost));
}

/// Its lookups take twice as long every half an hour, and it never fails.
#[test]
fn a_version_that_becomes_dear_slowly_is_named() {
    let mut fleet = Fleet::new(4);

    for second in 0..8 * 3_600 {
        let dear = (f64::from(second) / 1_800.0).exp2();
        let findings = fleet.step(|cohort, rng| (millis(rng) * if cohort == 7 { dear } else { 1.0 }, 0));

        if let [found] = findings[..] {
            assert_eq!((found.cohort, found.signal), (tag(7), Signal::Cost));
            println!("named at {dear:.1} times the time of the others");
            assert!(dear < 12.0, "{dear}");
            return;
        }
        assert_eq!(findings, [], "{second} s");
    }
    panic!("it was never named");
}

/// The lookups of one tenant's devices, a tenth of the version's, are 100 times as dear.
#[test]
fn a_version_that_is_dear_for_one_tenant_only_is_named() {
    let mut fleet = Fleet::new(5);
    for _ in 0..300 {
        assert_eq!(fleet.step(|_, rng| (millis(rng), 0)), []);
    }

    for second in 0.. {
        let dear = |cohort, rng: &mut SmallRng| {
            let is_of_tenant = cohort == 7 && rng.random_bool(0.1);
            (millis(rng) * if is_of_tenant { 100.0 } else { 1.0 }, 0)
        };
        let findings = fleet.step(dear);

        if let [found] = findings[..] {
            assert_eq!((found.cohort, found.signal), (tag(7), Signal::Cost));
            println!("named after {second} s");
            return;
        }
        assert!(findings.is_empty() && second < 600, "{second} s: {findings:?}");
    }
}

/// The messages of a version's devices double every two hours.
#[test]
fn a_version_that_sends_more_and_more_is_named() {
    let mut fleet = Fleet::new(6);
    let begins = 3 * 3_600;

    for second in 0..begins + 24 * 3_600 {
        let grown = (f64::from(second.max(begins) - begins) / 7_200.0).exp2();
        let findings = fleet.step(|cohort, rng| {
            let usual = f64::from(rng.random_range(0..10_u32));
            (2.0, (usual * if cohort == 5 { grown } else { 1.0 }) as u64)
        });

        if let [found] = findings[..] {
            assert_eq!((found.cohort, found.signal), (tag(5), Signal::Messages));
            println!("named at {grown:.0} times the usual messages");
            assert!(grown < 25.0, "{grown}");
            return;
        }
        assert_eq!(findings, [], "{second} s");
    }
    panic!("it was never named");
}

#[test]
fn a_slow_database_accuses_nobody() {
    let mut fleet = Fleet::new(2);

    for second in 0..7_200 {
        let slow = if second % 900 < 120 { 50.0 } else { 1.0 };
        let findings = fleet.step(|_, rng| (millis(rng) * slow, 0));

        assert_eq!(findings, [], "{second} s");
    }
}

#[test]
fn a_version_that_sends_too_much_is_named_and_one_with_a_schedule_is_not() {
    let mut fleet = Fleet::new(3);
    let begins = 3 * 3_600;
    let mut named = None;

    for second in 0..begins + 1_200 {
        let findings = fleet.step(|cohort, rng| {
            // A third of the cohorts reports every hour, all devices at once.
            let scheduled = if cohort % 3 == 1 && second % 3_600 < 5 { 20 } else { 0 };
            let loud = if cohort == 5 && second >= begins { 600 } else { 0 };
            (millis(rng), u64::from(rng.random_range(0..10_u32)) + scheduled + loud)
        });

        for found in findings {
            assert_eq!((found.cohort, found.signal), (tag(5), Signal::Messages), "{second} s");
            named.get_or_insert(second - begins);
        }
    }

    let named = named.unwrap();
    println!("named after {named} s");
    assert!(named <= 300, "{named} s");
    assert!(fleet.detector.is_bad(tag(5), Signal::Messages));

    for _ in 0..300 {
        fleet.step(|_, rng| (millis(rng), u64::from(rng.random_range(0..10_u32))));
    }

    assert!(
        !fleet.detector.is_bad(tag(5), Signal::Messages),
        "five minutes after its end"
    );
}
