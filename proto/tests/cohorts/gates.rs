//! Limits of what is done without a person: they hold for all nodes, across restarts, and while rules work.

use seawall_proto::{
    cohorts::{Breaker, Mode, ProposalState},
    id::RuleId,
    time::Instant,
};
use uuid::Uuid;

use crate::{
    CALM, WARM_UP, crash_loop,
    model::{DEVICES, Fleet, Loop},
};

/// Two cohorts of an eighth of the fleet each; the second begins to crash when the first has been gated for long.
#[test]
fn rules_that_work_leave_no_room_for_more() {
    let mut fleet = Fleet::new(20, CALM);
    for cohort in [0, 1] {
        fleet.sizes[cohort] = DEVICES / 8.0;
        let bad = crash_loop(&fleet, cohort, 30.0);
        fleet.add_loop(Loop {
            begins: WARM_UP + cohort as u64 * 1_500,
            ..bad
        });
    }

    fleet.run(WARM_UP + 3_600);

    let [(_, 0)] = fleet.outcome.applied[..] else {
        panic!("{:?}", fleet.outcome);
    };
    assert!(
        fleet.is_gated(0),
        "the first one is still bad, and its rule is extended"
    );
    assert_eq!(fleet.outcome.opened.len(), 2, "the second one is left to a person");
}

#[test]
fn a_rule_is_not_extended_once_most_of_the_fleet_has_its_version() {
    let mut fleet = Fleet::new(21, CALM);
    fleet.sizes[0] = DEVICES / 8.0;
    let bad = crash_loop(&fleet, 0, 30.0);
    fleet.add_loop(bad);
    fleet.run(WARM_UP + 300);
    assert!(fleet.is_gated(0));

    // Nine tenths of the other devices take it, and a tenth of those is admitted.
    let others: f64 = fleet.sizes[1..].iter().sum();
    fleet.sizes[0] += others * 0.9;
    fleet.sizes[1..].iter_mut().for_each(|size| *size *= 0.1);
    fleet.run(3_600);

    // Devices that are away count for some minutes.
    assert!(fleet.outcome.renewed <= 1, "{:?}", fleet.outcome);
    assert_eq!(fleet.outcome.opened.len(), 2, "a person is told");
    assert_eq!(fleet.outcome.applied.len(), 1, "{:?}", fleet.outcome);
    assert!(!fleet.is_gated(0));
}

#[test]
fn a_restart_takes_rules_over_and_keeps_their_limits() {
    let mut fleet = Fleet::new(22, CALM);
    for (cohort, later) in [(20, 0), (30, 100)] {
        let bad = crash_loop(&fleet, cohort, 30.0);
        fleet.add_loop(Loop {
            begins: WARM_UP + later,
            ..bad
        });
    }
    fleet.run(WARM_UP + 80);
    let [(first, 20)] = fleet.outcome.applied[..] else {
        panic!("{:?}", fleet.outcome);
    };

    fleet.breaker = Breaker::new(Mode::Apply);
    fleet.run(1_200);

    let [_, (second, 30)] = fleet.outcome.applied[..] else {
        panic!("{:?}", fleet.outcome);
    };
    assert!(second - first >= 600, "{first} {second}");
    assert_eq!(fleet.outcome.taken_over, 1, "{:?}", fleet.outcome);
    assert!(fleet.outcome.renewed >= 1 && fleet.is_gated(20), "{:?}", fleet.outcome);
}

#[test]
fn what_a_person_deletes_is_dismissed_within_seconds_and_not_made_again() {
    let mut fleet = Fleet::new(23, CALM);
    let bad = crash_loop(&fleet, 20, 30.0);
    fleet.add_loop(bad);
    fleet.run(WARM_UP + 300);
    assert!(fleet.is_gated(20));

    fleet.rules.clear();
    fleet.run(2);

    let states: Vec<_> = fleet.breaker.proposals().map(|proposal| proposal.state).collect();
    assert_eq!(states, [ProposalState::Dismissed]);
    fleet.run(1_800);
    assert_eq!((fleet.outcome.dismissed, fleet.outcome.applied.len()), (1, 1));
    assert_eq!(fleet.outcome.opened.len(), 1);
}

#[test]
fn only_one_decides_on_a_proposal() {
    let mut fleet = Fleet::new(24, CALM);
    fleet.breaker = Breaker::new(Mode::Propose);
    let bad = crash_loop(&fleet, 20, 30.0);
    fleet.add_loop(bad);
    fleet.run(WARM_UP + 60);
    let now = Instant::from_micros((WARM_UP + 60) * 1_000_000);
    let (id, rule) = {
        let proposal = fleet.breaker.proposals().next().unwrap();
        (proposal.id, proposal.rule_id())
    };

    assert!(fleet.breaker.begin_apply(id, now));

    assert!(!fleet.breaker.begin_apply(id, now), "a second one");
    assert!(!fleet.breaker.handle_dismissed(id, now));
    fleet.breaker.handle_failed(id, now);
    assert!(fleet.breaker.begin_apply(id, now), "it may be tried again");
    fleet.breaker.handle_applied(id, rule, false, &fleet.detector, now);
    fleet
        .breaker
        .handle_applied(id, RuleId(Uuid::max()), true, &fleet.detector, now);
    let proposal = fleet.breaker.get(id).unwrap();
    assert_eq!((proposal.state, proposal.rule), (ProposalState::Applied, Some(rule)));
    assert!(!fleet.breaker.handle_dismissed(id, now));
}
