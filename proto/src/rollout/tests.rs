use proptest::prelude::*;
use rand::{Rng as _, SeedableRng, rngs::SmallRng};

use super::*;

const NODE: Uuid = Uuid::from_u128(1);
const OTHER_NODE: Uuid = Uuid::from_u128(2);
const NOON: WallTime = WallTime::from_unix_ms(1_000_000_000);

fn plan(stages: &[u8], bake_s: u64, connects_min: u32) -> Plan {
    Plan {
        stages: stages.to_vec(),
        bake: Duration::from_secs(bake_s),
        connects_min,
    }
}

fn release(plan: Plan) -> Rollout {
    Rollout::begin(Direction::Release, plan, 0, 0, NOON).unwrap()
}

fn at(seconds: u64) -> WallTime {
    NOON + Duration::from_secs(seconds)
}

fn counts(connects: u64, failed: u64) -> Counts {
    Counts { connects, failed }
}

fn totals(treated: (u64, u64), others: (u64, u64)) -> Totals {
    Totals {
        treated: counts(treated.0, treated.1),
        near: Counts::default(),
        others: counts(others.0, others.1),
        ..Totals::default()
    }
}

/// Verdict after the minutes of a table: failures among `connects` treated and `control_connects` others each minute.
fn judged(connects: u64, treated: &[f64], control_connects: u64, control: &[f64]) -> (State, f64) {
    let mut rollout = release(plan(&[1, 100], 60 * (treated.len() as u64 - 1), 50));
    let mut sum = Totals::default();
    for (minute, (failed, control_failed)) in (0..).zip(treated.iter().zip(control)) {
        sum = sum.plus(&totals(
            (connects, failed.round() as u64),
            (control_connects, control_failed.round() as u64),
        ));
        for second in (0..60).step_by(10) {
            let handled = rollout.handle_evidence(NODE, sum, 0, at(60 * minute + second));
            if matches!(handled, Handled::Stepped(_)) {
                return (rollout.state(), rollout.log_likelihood_ratio());
            }
        }
    }
    (rollout.state(), rollout.log_likelihood_ratio())
}

// === Arrays that rank tests fail on ===

/// kayenta#799: the control has no error at all, the canary has some all the time.
#[test]
fn control_without_a_failure_is_no_obstacle() {
    let zeros = [0.0; 25];
    let sparse: Vec<f64> = [1.0, 2.0, 1.0, 2.0, 1.0]
        .into_iter()
        .flat_map(|failed| [failed, 0.0, 0.0, 0.0, 0.0])
        .collect();

    let (state, ratio) = judged(100, &[1.0, 4.0, 2.0, 3.0, 1.0], 500, &zeros[..5]);
    assert_eq!(state, State::Halted, "{ratio}");
    let (state, ratio) = judged(20, &sparse, 200, &zeros);
    assert_eq!(state, State::Halted, "{ratio}");
    // With the arrays swapped it is not halted: the canary has none.
    let (state, ratio) = judged(100, &zeros[..5], 100, &[1.0, 4.0, 2.0, 3.0, 1.0]);
    assert_eq!(state, State::Running, "{ratio}");
}

/// kayenta#426: sparse data.
#[test]
fn few_failures_among_zeros_are_found() {
    let (state, ratio) = judged(20, &[0.0, 1.0, 2.0, 1.0, 0.0, 0.0], 2_000, &[0.0; 6]);

    assert_eq!(state, State::Halted, "{ratio}");
}

/// kayenta#780: a great part of the samples is far worse, the others are the same.
#[test]
fn a_few_equal_samples_do_not_hide_what_is_worse() {
    let worse = [100.0, 100.0, 100.0, 100.0, 100.0, 100.0, 100.0, 1.0, 1.0, 1.0];

    let (state, ratio) = judged(1_000, &worse, 1_000, &[1.0; 10]);
    assert_eq!(state, State::Halted, "{ratio}");
    // Whatever their order.
    let late: Vec<f64> = worse.iter().rev().copied().collect();
    let (state, ratio) = judged(1_000, &late, 1_000, &[1.0; 10]);
    assert_eq!(state, State::Halted, "{ratio}");
}

/// kayenta#780, case 1: the two differ in spread, and their ranks overlap.
#[test]
fn rates_are_compared_and_not_ranks() {
    let even = [
        10.0, 10.1, 10.2, 10.3, 10.4, 10.5, 10.6, 17.0, 17.1, 17.2, 17.3, 17.4, 17.5, 17.6, 17.7,
    ];
    let spread = [
        1.0, 100.0, 4.0, 101.0, 5.0, 102.0, 6.0, 103.0, 7.0, 104.0, 8.0, 105.0, 9.0, 106.0, 17.0,
    ];

    let (state, ratio) = judged(1_000, &spread, 1_000, &even);
    assert_eq!(state, State::Halted, "{ratio}");
    let (state, ratio) = judged(1_000, &even, 1_000, &spread);
    assert_eq!(state, State::Running, "{ratio}");
}

/// Constant and tied arrays have no ranks.
#[test]
fn constant_rates_are_decided() {
    let (state, ratio) = judged(100, &[5.0; 10], 100, &[5.0; 10]);
    assert_eq!(state, State::Running, "{ratio}");
    let (state, ratio) = judged(100, &[30.0; 10], 100, &[5.0; 10]);
    assert_eq!(state, State::Halted, "{ratio}");
    let (state, ratio) = judged(100, &[0.0; 10], 100, &[0.0; 10]);
    assert_eq!(state, State::Running, "{ratio}");
}

// === Evidence ===

#[test]
fn the_control_of_the_same_minutes_counts() {
    let mut rollout = release(plan(&[1, 100], 3_600, 200));
    let mut sum = Totals::default();
    // Nobody fails for half an hour. Then the network fails everybody, treated or not, for two minutes.
    for second in (0..1_920).step_by(5) {
        let rate = u64::from(second >= 1_800);
        sum = sum.plus(&totals((5, 3 * rate), (50, 30 * rate)));
        let handled = rollout.handle_evidence(NODE, sum, 0, at(second));
        assert_eq!(handled, Handled::Noted, "{second}: {}", rollout.log_likelihood_ratio());
    }
}

#[test]
fn a_crash_loop_is_halted_whatever_the_control() {
    for others in [(0, 0), (5, 0), (5, 5), (1_000, 0), (1_000, 10)] {
        let mut rollout = release(plan(&[1, 100], 600, 200));

        let handled = rollout.handle_evidence(NODE, totals((40, 40), others), 0, at(10));

        if others == (5, 5) {
            // Everybody fails.
            assert_eq!(handled, Handled::Noted);
        } else {
            assert_eq!(rollout.state(), State::Halted, "{others:?}");
            assert_eq!((rollout.stage(), rollout.admit_percent()), (0, 0));
        }
    }
}

#[test]
fn the_nearer_control_is_used_where_it_is_large_enough() {
    let with_near = |near: u64| Totals {
        treated: counts(300, 30),
        near: counts(near, near / 10),
        others: counts(10_000, 0),
        ..Totals::default()
    };
    let state = |near| {
        let mut rollout = release(plan(&[1, 100], 600, 200));
        rollout.handle_evidence(NODE, with_near(near), 0, at(10));
        rollout.state()
    };

    assert_eq!(state(500), State::Running);
    assert_eq!(state(20), State::Halted);
}

#[test]
fn few_devices_need_few_connects() {
    let begin = |devices| Rollout::begin(Direction::Release, Plan::default(), 0, devices, NOON).unwrap();

    let (unknown, few, more, many) = (begin(0), begin(10), begin(500), begin(100_000));

    assert_eq!(
        (&*unknown.plan().stages, unknown.connects_needed()),
        (&[1, 5, 25, 50, 100][..], 200)
    );
    assert_eq!((&*few.plan().stages, few.connects_needed()), (&[50, 100][..], 2));
    assert_eq!(
        (&*more.plan().stages, more.connects_needed()),
        (&[4, 5, 25, 50, 100][..], 10)
    );
    assert_eq!(
        (&*many.plan().stages, many.connects_needed()),
        (&[1, 5, 25, 50, 100][..], 200)
    );
    let mut small = begin(500);
    let handled = small.handle_evidence(NODE, totals((20, 0), (0, 0)), 0, at(10));
    assert_eq!(handled, Handled::Noted, "it has not baked");
    for second in (20..600).step_by(10) {
        small.handle_evidence(NODE, totals((20, 0), (0, 0)), 0, at(second));
    }
    small.handle_evidence(NODE, totals((20, 0), (0, 0)), 0, at(600));
    assert_eq!(small.percent(), 5);
}

// === Steps ===

/// Calls it each five seconds with connects that do not fail, from `from` on.
fn run_well(rollout: &mut Rollout, from: u64, seconds: u64) {
    for second in (from..from + seconds).step_by(5) {
        let connects = 1_000;
        rollout.handle_evidence(NODE, totals((connects, 0), (10_000, 0)), 0, at(second));
    }
}

#[test]
fn advances_on_time_connects_and_evidence_together() {
    let mut rollout = release(plan(&[1, 5, 100], 60, 200));

    // Enough evidence, before the bake is over.
    run_well(&mut rollout, 5, 55);
    assert_eq!(rollout.percent(), 1);
    run_well(&mut rollout, 60, 5);
    assert_eq!((rollout.stage(), rollout.admit_percent()), (2, 5));
    // Time, and too few connects.
    for second in (65..200).step_by(5) {
        rollout.handle_evidence(NODE, totals((199, 0), (10_000, 0)), 0, at(second));
    }
    assert_eq!(rollout.percent(), 5);
    // Connects enough, and evidence that does not decide.
    for second in (200..400).step_by(5) {
        rollout.handle_evidence(NODE, totals((250, 1), (10_000, 0)), 0, at(second));
    }
    assert_eq!((rollout.percent(), rollout.state()), (5, State::Running));
    run_well(&mut rollout, 400, 5);
    assert_eq!(rollout.percent(), 100);
    run_well(&mut rollout, 405, 65);
    assert_eq!((rollout.state(), rollout.admit_percent()), (State::Done, 100));
    let verdicts: Vec<(u8, &str)> = rollout
        .steps()
        .iter()
        .map(|step| (step.percent, step.verdict.as_str()))
        .collect();
    assert_eq!(verdicts, [(1, "started"), (5, "fine"), (100, "fine"), (100, "fine")]);
}

#[test]
fn a_rollout_enforces_a_growing_share_and_is_done_where_no_control_is_left() {
    let mut rollout = Rollout::begin(Direction::Rollout, plan(&[10, 100], 10, 5), 0, 0, NOON).unwrap();
    assert_eq!(rollout.admit_percent(), 90);

    run_well(&mut rollout, 5, 10);

    assert_eq!((rollout.state(), rollout.admit_percent()), (State::Done, 0));
    rollout.revert(at(20)).unwrap();
    assert_eq!(rollout.admit_percent(), 100);
}

#[test]
fn worse_goes_back_one_stage_and_waits_for_a_person() {
    let mut rollout = release(plan(&[1, 5, 100], 10, 5));
    run_well(&mut rollout, 5, 10);
    assert_eq!(rollout.percent(), 5);

    rollout.handle_evidence(NODE, totals((100, 50), (1_000, 0)), 0, at(20));

    assert_eq!(
        (rollout.state(), rollout.stage(), rollout.percent()),
        (State::Halted, 1, 1)
    );
    assert!(rollout.log_likelihood_ratio() >= 9.16 && rollout.totals().treated.failed == 50);
    run_well(&mut rollout, 25, 600);
    assert_eq!((rollout.state(), rollout.percent()), (State::Halted, 1));
    rollout.resume(at(700)).unwrap();
    assert_eq!((rollout.percent(), rollout.totals().treated), (1, Counts::default()));
    run_well(&mut rollout, 705, 10);
    assert_eq!(rollout.percent(), 5);
}

#[test]
fn release_goes_back_to_what_the_rule_admitted_before() {
    let mut rollout = Rollout::begin(Direction::Release, plan(&[1, 10, 50], 10, 5), 10, 0, NOON).unwrap();
    assert_eq!((rollout.plan().stages.clone(), rollout.admit_percent()), (vec![50], 50));

    rollout.handle_evidence(NODE, totals((100, 50), (1_000, 0)), 0, at(5));

    assert_eq!((rollout.state(), rollout.admit_percent()), (State::Halted, 10));
    let nothing_left = Rollout::begin(Direction::Release, plan(&[1, 10, 50], 10, 5), 50, 0, NOON);
    assert_eq!(nothing_left.unwrap_err(), PlanError::NothingLeft(50));
}

#[test]
fn a_gap_starts_the_evidence_anew_and_leaves_the_stage() {
    let mut rollout = release(plan(&[1, 5, 100], 60, 5));
    run_well(&mut rollout, 5, 55);
    let window = rollout.window();

    // The database was away, or no node ran. Time and evidence would be enough.
    let step = rollout.handle_evidence(NODE, totals((5_000, 0), (10_000, 0)), 0, at(90));

    assert!(
        matches!(step, Handled::Stepped(step) if step.verdict == Verdict::EvidenceLost),
        "{step:?}"
    );
    assert_eq!((rollout.state(), rollout.percent()), (State::Running, 1));
    assert_eq!((rollout.window(), rollout.totals()), (window + 1, &Totals::default()));
    run_well(&mut rollout, 95, 50);
    assert_eq!(rollout.percent(), 1, "it bakes again");
    run_well(&mut rollout, 145, 10);
    assert_eq!(rollout.percent(), 5);
    // A clock that was set back is also a gap.
    let step = rollout.handle_evidence(NODE, totals((5_000, 0), (10_000, 0)), 0, at(3));
    assert!(matches!(step, Handled::Stepped(_)) && rollout.percent() == 5);
}

#[test]
fn one_node_drives_and_another_takes_over_when_it_is_silent() {
    let mut rollout = release(plan(&[1, 100], 60, 5));
    let good = totals((1_000, 0), (10_000, 0));
    assert_eq!(rollout.handle_evidence(NODE, good, 0, at(1)), Handled::Noted);

    for second in 2..=16 {
        assert_eq!(
            rollout.handle_evidence(OTHER_NODE, good, 0, at(second)),
            Handled::Ignored
        );
    }
    let step = rollout.handle_evidence(OTHER_NODE, good, 0, at(17));

    assert!(matches!(step, Handled::Stepped(step) if step.verdict == Verdict::EvidenceLost));
    assert_eq!(rollout.handle_evidence(NODE, good, 0, at(18)), Handled::Ignored);
    assert_eq!(rollout.handle_evidence(OTHER_NODE, good, 0, at(19)), Handled::Noted);
}

#[test]
fn a_rule_that_somebody_changed_pauses_it() {
    let mut rollout = release(plan(&[1, 100], 10, 5));
    rollout.set_rule_revision(7);

    let step = rollout.handle_evidence(NODE, totals((1_000, 0), (10_000, 0)), 8, at(10));

    assert!(matches!(step, Handled::Stepped(step) if step.verdict == Verdict::RuleChanged));
    assert_eq!((rollout.state(), rollout.percent()), (State::Paused, 1));
}

#[test]
fn states_that_a_person_can_reach() {
    let mut rollout = release(Plan::default());

    assert!(rollout.resume(NOON).is_err());
    rollout.pause(NOON).unwrap();
    let error = rollout.pause(NOON).unwrap_err();
    assert_eq!(error.to_string(), "a rollout that is paused can't become paused");
    rollout.resume(NOON).unwrap();
    rollout.revert(NOON).unwrap();
    assert!(rollout.revert(NOON).is_err() && rollout.resume(NOON).is_err() && rollout.pause(NOON).is_err());
    assert!(rollout.is_over() && rollout.admit_percent() == 0);
}

#[test]
fn plans_that_make_no_sense_are_refused() {
    let error = |plan: Plan| plan.validate().unwrap_err();

    let rising: Vec<u8> = (1..=21).collect();
    for stages in [&[0, 50][..], &[50, 50], &[50, 20], &[50, 101], &rising] {
        assert_eq!(error(plan(stages, 600, 200)), PlanError::Stages, "{stages:?}");
    }
    assert_eq!(error(plan(&[1], 0, 200)), PlanError::Bake);
    assert_eq!(error(plan(&[1], 8 * 86_400, 200)), PlanError::Bake);
    assert_eq!(error(plan(&[1], 600, 0)), PlanError::ConnectsMin);
    assert_eq!(error(plan(&[1], 600, 1_000_001)), PlanError::ConnectsMin);
    assert_eq!(Plan::default().validate(), Ok(()));
    let read: Plan = serde_json::from_str(r#"{"stages":[5,100],"bake":"90s"}"#).unwrap();
    assert_eq!(read, plan(&[5, 100], 90, 200));
    assert!(serde_json::from_str::<Plan>(r#"{"stages":[]}"#).is_err());
    assert_eq!(serde_json::from_str::<Plan>("{}").unwrap(), Plan::default());
    assert!(serde_json::from_str::<Plan>(r#"{"stages":[5],"bakes":"90s"}"#).is_err());
}

// === Time and returns ===

#[test]
fn a_stage_without_a_decision_is_paused_after_a_day_or_24_bakes() {
    for (bake, hours) in [(600, 24), (7_200, 48)] {
        let mut rollout = release(plan(&[1, 100], bake, 200));
        let mut paused = None;
        for second in (0..hours * 3_600 + 60).step_by(10) {
            // Far too few devices come.
            let handled = rollout.handle_evidence(NODE, totals((5, 0), (50, 0)), 0, at(second));
            if let Handled::Stepped(step) = handled {
                assert_eq!((step.verdict, step.stage, step.percent), (Verdict::NoEvidence, 1, 1));
                paused = Some(second);
                break;
            }
        }
        assert_eq!(paused, Some(hours * 3_600));
        assert_eq!(rollout.state(), State::Paused);
        // A person resumes it, and its time begins again.
        rollout.resume(at(180_000)).unwrap();
        let handled = rollout.handle_evidence(NODE, totals((5, 0), (50, 0)), 0, at(180_010));
        assert_eq!((handled, rollout.state()), (Handled::Noted, State::Running));
    }
}

#[test]
fn a_stage_whose_evidence_is_lost_again_and_again_is_paused() {
    let mut rollout = release(plan(&[1, 100], 600, 200));
    let mut verdicts = Vec::new();

    for gap in 1..=20 {
        let at = at(gap * 60);
        if let Handled::Stepped(step) = rollout.handle_evidence(NODE, Totals::default(), 0, at) {
            verdicts.push(step.verdict);
        }
    }

    assert_eq!(verdicts.pop(), Some(Verdict::NoEvidence));
    assert_eq!(verdicts, [Verdict::EvidenceLost; GAPS_MAX]);
    assert_eq!((rollout.state(), rollout.stage()), (State::Paused, 1));
}

#[test]
fn devices_that_are_sent_away_and_do_not_return_halt_it() {
    let with_returns = |expected, missing| Totals {
        returns: counts(expected, missing),
        ..totals((300, 0), (300, 0))
    };
    // (expected, missing, whether it is halted)
    for (expected, missing, is_halted) in [
        (5, 5, false),
        (6, 6, true),
        (20, 9, false),
        (20, 10, true),
        (1_000, 100, false),
        (1_000, 200, false),
        (1_000, 400, true),
    ] {
        let mut rollout = Rollout::begin(Direction::Rollout, plan(&[5, 50, 100], 600, 200), 0, 10_000, NOON).unwrap();
        let handled = rollout.handle_evidence(NODE, with_returns(expected, missing), 0, at(10));

        if is_halted {
            let Handled::Stepped(step) = handled else {
                panic!("{expected} {missing}: {handled:?}")
            };
            assert_eq!(
                (step.verdict, step.percent),
                (Verdict::Missing, 0),
                "{expected} {missing}"
            );
            assert_eq!((rollout.state(), rollout.admit_percent()), (State::Halted, 100));
        } else {
            assert_eq!(handled, Handled::Noted, "{expected} {missing}");
        }
    }
}

fn device(number: u128) -> crate::id::DeviceId {
    crate::id::DeviceId::from_uuid(Uuid::from_u128(number))
}

fn instant(seconds: u64) -> crate::time::Instant {
    crate::time::Instant::from_micros(seconds * 1_000_000)
}

#[test]
fn a_device_that_was_sent_away_is_back_in_time_or_missing() {
    let mut counting = Counting::new(instant(0), SHORT_SESSION);
    (1..=4).for_each(|number| counting.handle_sent(device(number), instant(100)));
    counting.handle_arrived(device(1));
    counting.handle_arrived(device(9));
    assert_eq!(counting.totals(instant(99)).returns, counts(1, 0));
    // It is refused again.
    counting.handle_sent(device(1), instant(200));

    // The next stage expects them as well.
    let mut counting = counting.next(instant(99), SHORT_SESSION);
    counting.handle_arrived(device(2));

    assert_eq!(counting.totals(instant(100)).returns, counts(3, 2));
    assert_eq!(counting.totals(instant(199)).returns, counts(3, 2));
    assert_eq!(counting.totals(instant(200)).returns, counts(4, 3));
}

#[test]
fn a_device_that_comes_and_then_is_gone_for_good_has_failed() {
    let mut counting = Counting::new(instant(1_000), SHORT_SESSION);
    for number in 1..=3 {
        counting.handle_opened(Side::Treated, instant(1_000));
        let of = (device(number), Side::Treated);
        counting.handle_ended(of, instant(1_000), number < 3, instant(1_300));
    }
    counting.handle_ended((device(4), Side::Treated), instant(999), true, instant(1_300));
    counting.handle_arrived(device(2));

    assert_eq!(counting.totals(instant(1_899)).treated, counts(3, 0));
    // Of the others one was closed by the gateway, and one began before.
    assert_eq!(counting.totals(instant(1_900)).treated, counts(4, 1));
    assert_eq!(counting.totals(instant(9_900)).treated, counts(4, 1));
}

// === Virtual time ===

/// A cohort of 100,000 blocked devices is released beside 300,000 others. A blocked device returns each 15 to 30 min, a
/// connected one reconnects each four hours.
struct World {
    rollout: Rollout,
    rng: SmallRng,
    now: u64,
    sum: Totals,
    window: u64,
    /// Devices that failed, and reconnect in the next step.
    again: u64,
    exposed_max: u8,
}

const COHORT: u64 = 100_000;
const OTHERS: u64 = 300_000;
const RECONNECTS_S: f64 = 4.0 * 3_600.0;

impl World {
    fn new(seed: u64) -> Self {
        let rollout = Rollout::begin(Direction::Release, Plan::default(), 0, COHORT, NOON).unwrap();
        Self {
            window: rollout.window(),
            rollout,
            rng: SmallRng::seed_from_u64(seed),
            now: 0,
            sum: Totals::default(),
            again: 0,
            exposed_max: 1,
        }
    }

    /// Which of `connects` fail, of which each does with `chance`.
    fn failing(&mut self, connects: u64, chance: f64) -> u64 {
        (0..connects).filter(|_| self.rng.random_bool(chance)).count() as u64
    }

    /// So many of `devices` come in these five seconds, which come once in `period` seconds each.
    fn coming(&mut self, devices: f64, period: f64) -> u64 {
        let mean = devices * 5.0 / period;
        let whole = mean.floor();
        whole as u64 + u64::from(self.rng.random_bool(mean - whole))
    }

    /// Until it is over. `bad` is the chance of a failure of the released version, `good` that of all others.
    fn run(mut self, bad: f64, good: f64) -> Self {
        // Devices of the share that have not come yet.
        let mut waiting = 0.0;
        let mut admitted = 0;
        while !self.rollout.is_over() && self.now < 48 * 3_600 {
            self.now += 5;
            let percent = self.rollout.percent();
            self.exposed_max = self.exposed_max.max(percent);
            if percent > admitted {
                waiting += f64::from(percent - admitted) / 100.0 * COHORT as f64;
                admitted = percent;
            }
            let first = self.coming(waiting, 1_350.0);
            waiting = (waiting - first as f64).max(0.0);
            let here = f64::from(admitted) / 100.0 * COHORT as f64 - waiting;
            let connects = first + self.again + self.coming(here, RECONNECTS_S);
            let failed = self.failing(connects, bad);
            self.again = failed;
            let control = self.coming(OTHERS as f64, RECONNECTS_S);
            let control_failed = self.failing(control, good);
            if self.rollout.window() != self.window {
                (self.window, self.sum) = (self.rollout.window(), Totals::default());
            }
            self.sum = self.sum.plus(&totals((connects, failed), (control, control_failed)));
            let (sum, now) = (self.sum, at(self.now));
            self.rollout.handle_evidence(NODE, sum, 0, now);
        }
        self
    }
}

#[test]
fn a_release_that_is_one_percent_worse_is_halted_at_the_first_stage() {
    let (mut at_first, mut later, runs) = (0, 0, 200);
    let mut slowest = 0;
    for seed in 0..runs {
        let world = World::new(seed).run(0.011, 0.001);
        assert_eq!(world.rollout.state(), State::Halted, "seed {seed}");
        slowest = slowest.max(world.now);
        if world.exposed_max == 1 {
            at_first += 1;
        } else {
            assert!(world.exposed_max <= 5, "seed {seed}: {} %", world.exposed_max);
            later += 1;
        }
    }
    println!("1 % worse: {at_first} of {runs} halted with 1 % exposed, {later} with 5 %, in {slowest} s at most");
    // β is 5 %.
    assert!(later * 20 <= runs, "{later} of {runs}");
}

#[test]
fn a_crash_loop_is_halted_within_seconds_of_its_first_failures() {
    for seed in 0..50 {
        let world = World::new(seed).run(0.9, 0.001);

        assert_eq!(world.rollout.state(), State::Halted);
        assert!(world.now <= 60 && world.exposed_max == 1, "{} s", world.now);
    }
}

#[test]
fn a_good_release_is_done_in_the_least_time() {
    let least = 5 * 600;
    for (good, seeds) in [(0.001, 0..100), (0.0, 100..110), (0.03, 110..210)] {
        let mut times: Vec<u64> = Vec::new();
        for seed in seeds {
            let world = World::new(seed).run(good, good);
            assert_eq!(world.rollout.state(), State::Done, "seed {seed}: {:?}", world.rollout);
            times.push(world.now);
        }
        times.sort_unstable();
        let (median, slowest) = (times[times.len() / 2], times[times.len() - 1]);
        println!("failure rate {good}: done in {median} s, at most {slowest} s; least {least} s");
        assert!(median <= least + 60, "{good}: {median} s");
        assert!(slowest <= 4 * least, "{good}: {slowest} s");
    }
}

#[test]
fn a_small_cohort_is_released_too() {
    let mut rollout = Rollout::begin(Direction::Release, Plan::default(), 0, 40, NOON).unwrap();
    let mut sum = Totals::default();
    let mut second = 0;

    while !rollout.is_over() && second < 86_400 {
        second += 5;
        // Every admitted device comes once, and stays. Nobody else connects at all.
        sum.treated.connects = u64::from(rollout.percent()) * 40 / 100;
        rollout.handle_evidence(NODE, sum, 0, at(second));
    }

    assert_eq!((rollout.state(), second), (State::Done, 2 * 600));
}

#[test]
fn stages_that_are_ordered_are_kept_however_few_devices_there_are() {
    for (devices, stages) in [(24, vec![1, 5, 25, 50, 100]), (3, vec![1, 2, 100]), (100_000, vec![7])] {
        let rollout = Rollout::begin(Direction::Release, plan(&stages, 600, 200), 0, devices, NOON).unwrap();
        assert_eq!((&rollout.plan().stages, rollout.percent()), (&stages, stages[0]));
    }
}

#[test]
fn stage_without_devices_takes_its_time_and_does_not_wait_for_ever() {
    // The number of devices that each stage really has.
    for have in [[0, 0, 6, 12, 24], [0, 3, 4, 12, 24], [1, 1, 1, 1, 24], [0, 0, 0, 0, 24]] {
        let stages = [1, 5, 25, 50, 100];
        let mut rollout = Rollout::begin(Direction::Release, plan(&stages, 600, 200), 0, 24, NOON).unwrap();
        let mut second = 0;
        while !rollout.is_over() && second < 5 * 3 * 700 {
            second += 5;
            let came = (have[usize::from(rollout.stage()) - 1], 0);
            rollout.handle_evidence(NODE, totals(came, (1_000, 0)), 0, at(second));
            let shortest = 600 * (u64::from(rollout.stage()) - 1);
            assert!(second >= shortest, "{have:?}: a stage took less than its bake");
        }
        assert_eq!(rollout.state(), State::Done, "{have:?}");
    }
}

#[test]
fn stage_of_few_devices_whose_connects_fail_holds_or_halts_and_a_large_one_waits_for_connects() {
    let after = |devices, came| {
        let mut rollout = Rollout::begin(Direction::Release, plan(&[10, 100], 60, 200), 0, devices, NOON).unwrap();
        for second in (5..3_600).step_by(5) {
            rollout.handle_evidence(NODE, totals(came, (1_000, 0)), 0, at(second));
        }
        (rollout.state(), rollout.percent())
    };

    assert_eq!(after(24, (1, 1)), (State::Running, 10), "it holds");
    assert_eq!(after(24, (6, 6)), (State::Halted, 0));
    assert_eq!(after(10_000, (0, 0)), (State::Running, 10));
    assert_eq!(after(0, (0, 0)), (State::Running, 10), "the number is unknown");
}

// === Any order ===

#[derive(Clone, Debug)]
enum Event {
    Evidence { by: bool, totals: [u64; 6] },
    Wait(u64),
    RuleChanged,
    Pause,
    Resume,
    Revert,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => (any::<bool>(), prop::array::uniform6(0_u64..2_000)).prop_map(|(by, totals)| Event::Evidence { by, totals }),
        4 => (0_u64..40).prop_map(Event::Wait),
        1 => Just(Event::RuleChanged),
        1 => Just(Event::Pause),
        1 => Just(Event::Resume),
        1 => Just(Event::Revert),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_it_moves_by_one_stage_and_only_forward_on_evidence(
        events in prop::collection::vec(event(), 0..200),
        is_release in any::<bool>(),
        devices in prop::sample::select(vec![0_u64, 3, 300, 100_000]),
    ) {
        let direction = if is_release { Direction::Release } else { Direction::Rollout };
        let mut rollout = Rollout::begin(direction, plan(&[1, 10, 60, 100], 10, 50), 0, devices, NOON).unwrap();
        let (mut now, mut revision) = (NOON, 0);
        for event in events {
            let before = rollout.clone();
            match event {
                Event::Evidence { by, totals: [t, tf, n, nf, o, of] } => {
                    let by = if by { NODE } else { OTHER_NODE };
                    let totals = Totals { treated: counts(t, tf), near: counts(n, nf), others: counts(o, of), ..Totals::default() };
                    let handled = rollout.handle_evidence(by, totals, revision, now);
                    if handled == Handled::Ignored {
                        prop_assert_eq!(&rollout, &before);
                    }
                    if rollout.percent() > before.percent() {
                        prop_assert!(now.saturating_since(before.since) >= before.plan.bake);
                        let has_enough = totals.treated.connects >= before.connects_needed();
                        prop_assert!(has_enough || (before.is_done_waiting(now) && (devices == 3 || devices == 300)));
                        prop_assert!(now.saturating_since(before.seen_at) <= SILENCE_MAX);
                        prop_assert_eq!(revision, before.rule_revision);
                        prop_assert_eq!(before.state, State::Running);
                    }
                }
                Event::Wait(seconds) => now = now + Duration::from_secs(seconds),
                Event::RuleChanged => revision += 1,
                Event::Pause => drop(rollout.pause(now)),
                Event::Resume => {
                    if rollout.resume(now).is_ok() {
                        rollout.set_rule_revision(revision);
                    }
                }
                Event::Revert => drop(rollout.revert(now)),
            }
            prop_assert!(rollout.stage.abs_diff(before.stage) <= 1 || rollout.state == State::Reverted);
            prop_assert!(usize::from(rollout.stage) <= rollout.plan.stages.len() && rollout.percent() <= 100);
            prop_assert!(rollout.steps.len() <= STEPS_MAX);
            prop_assert!(rollout.log_likelihood_ratio().is_finite());
            prop_assert!(rollout.state != State::Reverted || rollout.percent() == 0);
            let stored = serde_json::to_string(&rollout).unwrap();
            let read: Rollout = serde_json::from_str(&stored).unwrap();
            prop_assert_eq!((read.state, read.stage, &read.steps), (rollout.state, rollout.stage, &rollout.steps));
        }
    }
}
