use std::collections::{BTreeMap, BTreeSet};

use rand::{SeedableRng as _, rngs::SmallRng};
use uuid::Uuid;

use super::*;
use crate::{
    id::{Credential, CredentialTag, Network, SecretHash},
    refusal::{Code, Hint},
    slots::SlotKeys,
};

mod any_order;
mod costly;
mod failing;
mod fairness;
mod lingering;
mod shares;

fn device(n: u128) -> DeviceId {
    DeviceId::from_uuid(Uuid::from_u128(n + 1))
}

fn secret() -> CredentialTag {
    CredentialTag::from(&Credential::from(SecretHash::of(b"a secret")))
}

fn at(ms: u64) -> Instant {
    Instant::from_micros(ms * 1_000)
}

fn wall(now: Instant) -> WallTime {
    WallTime::from_unix_ms(1_800_000_000_000 + now.as_micros() / 1_000)
}

const HERE: Network = Network::V4(1);
const ELSEWHERE: Network = Network::V4(2);

fn arrival(n: u128, now: Instant) -> Arrival<'static> {
    Arrival {
        device: device(n),
        cohort: CohortTag::of(None, None),
        slot_token: None,
        arrived: now,
        is_known_absent: false,
        credential: secret(),
        network: HERE,
    }
}

/// Admission of one node, with the caller's data.
struct Node {
    admission: Admission<(), ()>,
    slots: Slots,
    rng: SmallRng,
    /// Statements to send that no test has read.
    unsent: Vec<Batch>,
    /// Answers and refusals that no test has read.
    untold: Vec<Output<(), ()>>,
}

impl Node {
    fn new() -> Self {
        Self::with(AdmissionConfig::default())
    }

    fn with(config: AdmissionConfig) -> Self {
        Self {
            slots: Slots::new(&config.slots(), SlotKeys::new(1, [7; 32])),
            admission: Admission::new(config, at(0)),
            rng: SmallRng::seed_from_u64(1),
            unsent: Vec::new(),
            untold: Vec::new(),
        }
    }

    fn attempt(&mut self, n: u128, token: Option<&str>, now: Instant) -> Decision {
        let arrival = Arrival {
            slot_token: token,
            ..arrival(n, now)
        };
        self.arrive(&arrival, now)
    }

    fn arrive(&mut self, arrival: &Arrival<'_>, now: Instant) -> Decision {
        self.admission
            .attempt(arrival, || (), &mut self.slots, (now, wall(now)), &mut self.rng)
    }

    fn queued(&mut self, n: u128, now: Instant) -> Ticket {
        match self.attempt(n, None, now) {
            Decision::Queued(ticket) => ticket,
            other @ (Decision::KnownAbsent | Decision::Refused(_)) => panic!("{other:?}"),
        }
    }

    fn refused(&mut self, n: u128, token: Option<&str>, now: Instant) -> Refused {
        match self.attempt(n, token, now) {
            Decision::Refused(refused) => refused,
            other @ (Decision::KnownAbsent | Decision::Queued(_)) => panic!("{other:?}"),
        }
    }

    /// Makes `times` attempts with a wrong credential, each looked up and compared before the next. Returns how many
    /// were compared.
    fn guess(&mut self, n: u128, times: usize, now: Instant) -> usize {
        let mut compared = 0;
        for _ in 0..times {
            let Decision::Queued(_) = self.attempt(n, None, now) else {
                continue;
            };
            for batch in self.batches(now) {
                for action in self.done(&batch, Ok(()), now) {
                    if let Output::Answer { answered, .. } = action {
                        self.admission.end(answered, Outcome::Wrong, now);
                        compared += 1;
                    }
                }
            }
        }
        compared
    }

    /// Polls until there is nothing to do. Returns the time of the next call.
    fn poll(&mut self, now: Instant) -> Option<Instant> {
        loop {
            match self
                .admission
                .poll_output(&mut self.slots, (now, wall(now)), &mut self.rng)
            {
                Output::Send(batch) => self.unsent.push(batch),
                told @ (Output::Answer { .. } | Output::Refuse { .. }) => self.untold.push(told),
                Output::Wait(until) => return until,
            }
        }
    }

    fn batches(&mut self, now: Instant) -> Vec<Batch> {
        self.poll(now);
        std::mem::take(&mut self.unsent)
    }

    fn actions(&mut self, now: Instant) -> Vec<Output<(), ()>> {
        self.poll(now);
        std::mem::take(&mut self.untold)
    }

    fn done(&mut self, batch: &Batch, outcome: Result<(), BatchFailure>, now: Instant) -> Vec<Output<(), ()>> {
        self.admission
            .handle_batch_done(batch.id, outcome.map(|()| |_| Told::Found(())), now);
        self.actions(now)
    }

    /// Two statements in flight that block all others.
    fn block(&mut self, now: Instant) -> Vec<Batch> {
        let blocking: Vec<Batch> = (0..2)
            .flat_map(|n| {
                self.queued(1_000_000 + n, now);
                self.batches(now)
            })
            .collect();
        assert_eq!(blocking.len(), 2);
        blocking
    }
}

fn causes(actions: &[Output<(), ()>]) -> BTreeSet<Cause> {
    actions
        .iter()
        .map(|action| match action {
            Output::Refuse { refused, .. } => refused.cause,
            other @ (Output::Answer { .. } | Output::Send(_) | Output::Wait(_)) => panic!("{other:?}"),
        })
        .collect()
}

fn keys(batch: &Batch) -> BTreeSet<DeviceId> {
    batch.keys.iter().copied().collect()
}

#[test]
fn idle_registry_is_asked_at_once() {
    let mut node = Node::new();
    let ticket = node.queued(1, at(0));

    let batches = node.batches(at(0));

    assert_eq!(batches.len(), 1);
    assert_eq!(batches[0].keys, [device(1)]);
    let answered = node.done(&batches[0], Ok(()), at(5));
    let [
        Output::Answer {
            ticket: told,
            record: Some(()),
            answered,
            ..
        },
    ] = &answered[..]
    else {
        panic!("{answered:?}");
    };
    assert_eq!((*told, answered.device()), (ticket, device(1)));
}

#[test]
fn answer_that_says_nothing_of_a_device_refuses_it_with_a_slot_and_no_other() {
    let mut node = Node::new();
    let told = node.queued(1, at(0));
    let untold = node.queued(2, at(0));
    let absent = node.queued(3, at(0));
    let mut actions = Vec::new();
    let told_of = |key| match key {
        key if key == device(1) => Told::Found(()),
        key if key == device(2) => Told::Nothing,
        _ => Told::Absent,
    };

    for batch in node.batches(at(0)) {
        node.admission.handle_batch_done(batch.id, Ok(told_of), at(5));
        actions.extend(node.actions(at(5)));
    }
    for batch in node.batches(at(5)) {
        node.admission.handle_batch_done(batch.id, Ok(told_of), at(5));
        actions.extend(node.actions(at(5)));
    }

    assert_eq!(actions.len(), 3);
    for action in actions {
        match action {
            Output::Answer {
                ticket,
                record: Some(()),
                ..
            } => assert_eq!(ticket, told),
            Output::Answer {
                ticket, record: None, ..
            } => assert_eq!(ticket, absent),
            Output::Refuse { ticket, refused, .. } => {
                assert_eq!((ticket, refused.cause), (untold, Cause::LookupUntold));
                assert!(refused.hint.slot.is_some());
                assert!(refused.hint.after_ms() >= 5_000, "an immediate retry is useless");
            }
            Output::Send(_) | Output::Wait(_) => panic!("no action: {action:?}"),
        }
    }
    let breaker = node.admission.state(at(5)).breaker;
    assert_eq!(breaker, BreakerState::Closed, "the database did answer");
}

#[test]
fn ten_thousand_that_ask_for_one_key_cost_one_key() {
    let mut node = Node::new();
    let tickets: BTreeSet<Ticket> = (0..10_000)
        .filter_map(|_| match node.attempt(1, None, at(0)) {
            Decision::Queued(ticket) => Some(ticket),
            Decision::KnownAbsent | Decision::Refused(_) => None,
        })
        .collect();
    assert!(tickets.len() > 8);
    let displaced = node.actions(at(0));

    let batches = node.batches(at(0));

    assert_eq!(batches.len(), 1);
    assert_eq!(batches[0].keys, [device(1)]);
    let answered = node.done(&batches[0], Ok(()), at(5));
    assert_eq!(answered.len(), 8, "more do not wait for one key");
    assert_eq!(displaced.len(), tickets.len() - 8);
    assert_eq!(causes(&displaced), [Cause::QueueFull].into());
    let told = |action: &Output<(), ()>| match action {
        Output::Answer { ticket, .. } | Output::Refuse { ticket, .. } => *ticket,
        other @ (Output::Send(_) | Output::Wait(_)) => panic!("{other:?}"),
    };
    let all: BTreeSet<Ticket> = answered.iter().chain(&displaced).map(told).collect();
    assert_eq!(all, tickets);
}

#[test]
fn what_gathers_while_two_statements_run_goes_as_one() {
    let mut node = Node::new();
    let blocking = node.block(at(0));
    for n in 0..20 {
        node.queued(n, at(1));
    }
    assert!(node.batches(at(1)).is_empty());

    node.done(&blocking[0], Ok(()), at(5));
    let batches = node.batches(at(5));

    assert_eq!(batches.len(), 1);
    assert_eq!(batches[0].keys.len(), 20);
}

#[test]
fn two_statements_hold_half_of_the_limit_each() {
    for ceiling in [512, 64, 5, 2, 10_000] {
        let mut node = Node::with(AdmissionConfig {
            keys_in_flight_max: ceiling,
            lookups_per_second_max: 1_000_000,
            ..AdmissionConfig::default()
        });
        for n in 0..1_000 {
            node.queued(n, at(0));
        }

        let batches = node.batches(at(0));

        let limit = node.admission.state(at(0)).limit as usize;
        assert_eq!(
            batches.iter().map(|batch| batch.keys.len()).collect::<Vec<_>>(),
            [limit.div_ceil(2), limit / 2]
        );
        assert!(limit <= ceiling as usize);
    }
}

#[test]
fn plan_alarm_cuts_the_limit_and_nothing_more_is_sent_above_it() {
    let mut node = Node::new();
    node.admission.set_limit_cut(true, at(0));
    for n in 0..100 {
        node.queued(n, at(0));
    }

    let batches = node.batches(at(0));

    assert_eq!(batches.iter().map(|batch| batch.keys.len()).sum::<usize>(), 2);
    assert_eq!(node.admission.state(at(0)).limit, 2);
}

#[test]
fn keys_a_second_never_exceed_the_ceiling() {
    let mut node = Node::with(AdmissionConfig {
        lookups_per_second_max: 100,
        ..AdmissionConfig::default()
    });
    let (mut now, mut sent, mut next) = (at(0), 0, 0);

    while now < at(10_000) {
        next += 1;
        node.attempt(next, None, now);
        for batch in node.batches(now) {
            sent += batch.keys.len();
            node.done(&batch, Ok(()), now);
        }
        now += Duration::from_millis(1);
    }

    assert!((990..=1_010).contains(&sent), "{sent}");
}

#[test]
fn abandoned_devices_never_reach_the_database() {
    let mut node = Node::new();
    let blocking = node.block(at(0));
    let tickets: Vec<Ticket> = (0..100).map(|n| node.queued(n, at(0))).collect();
    let twice = node.queued(7, at(0));
    for ticket in tickets {
        node.admission.abandon(ticket, at(0));
    }

    node.done(&blocking[0], Ok(()), at(5));
    let batches = node.batches(at(5));

    assert_eq!(batches.len(), 1);
    assert_eq!(
        batches[0].keys,
        [device(7)],
        "another connection waits for it: {twice:?}"
    );
}

#[test]
fn device_whose_deadline_passed_is_refused_with_a_slot_and_never_sent() {
    let mut node = Node::new();
    let blocking = node.block(at(0));
    let ticket = node.queued(1, at(0));
    assert_eq!(node.poll(at(0)), Some(at(1_800)));

    let batches = node.batches(at(1_800));
    let actions = node.actions(at(1_800));

    assert!(batches.is_empty());
    assert!(matches!(&actions[..], [Output::Refuse { ticket: refused, .. }] if *refused == ticket));
    assert_eq!(causes(&actions), [Cause::Deadline].into());
    node.done(&blocking[0], Ok(()), at(1_900));
    assert!(node.batches(at(1_900)).is_empty());
}

#[test]
fn look_up_without_an_answer_ends_for_the_device_before_three_seconds() {
    let mut node = Node::new();
    node.queued(1, at(0));
    assert_eq!(node.batches(at(0)).len(), 1);

    assert!(node.actions(at(2_799)).is_empty());

    assert_eq!(causes(&node.actions(at(2_800))), [Cause::LookupTimedOut].into());
}

#[test]
fn walk_ins_are_bounded_to_a_tenth_of_a_second_and_holders_to_what_is_sent_before_they_give_up() {
    let mut node = Node::new();
    node.admission.set_last_known_good(2_000.0);
    let reference = 2_500;
    let blocking = node.block(at(0));
    for n in 0..20_000 {
        node.slots.handle_admitted(device(n), "default");
    }

    let walked_in = (0..20_000)
        .filter(|n| matches!(node.attempt(*n, None, at(0)), Decision::Queued(_)))
        .count();
    assert_eq!(walked_in, reference / 10);

    // All slots are due by then, and the walk-ins have been refused.
    let now = at(20_000);
    for batch in &blocking {
        node.admission
            .handle_batch_done(batch.id, Ok(|_| Told::Found(())), at(2_000));
    }
    node.actions(now);
    node.block(now);
    let held = (250..20_000)
        .filter(|n| matches!(node.attempt(*n, None, now), Decision::Queued(_)))
        .count();
    assert_eq!(held, reference * 18 / 10);
}

#[test]
fn holder_goes_before_those_who_walked_in_earlier() {
    let mut node = Node::new();
    node.admission.set_last_known_good(2_000.0);
    let blocking = node.block(at(0));
    for n in 0..1_000 {
        node.slots.handle_admitted(device(n), "default");
        node.attempt(n, None, at(0));
    }
    // 999 was refused, and returns at its slot; the queue of walk-ins is full again.
    let now = at(1_700);
    node.queued(999, now);

    node.admission.set_limit_cut(true, at(0));
    node.done(&blocking[0], Ok(()), now);
    let batches = node.batches(now);

    assert_eq!(batches[0].keys, [device(999)]);
}

#[test]
fn key_that_walked_in_moves_ahead_when_its_holder_comes() {
    let mut node = Node::new();
    node.slots.handle_admitted(device(1), "default");
    node.admission.handle_registry(Registry::Absent, at(0));
    let token = node.refused(1, None, at(0)).hint.slot;
    let slot = at(500);
    let mut later = Node::new();
    let blocking = later.block(slot);
    for n in 100..200 {
        later.queued(n, slot);
    }
    // Another client uses the id, without the token.
    later.queued(1, slot);

    assert!(matches!(later.attempt(1, token.as_deref(), slot), Decision::Queued(_)));
    later.admission.set_limit_cut(true, at(0));
    later.done(&blocking[0], Ok(()), slot);

    assert_eq!(later.batches(slot)[0].keys, [device(1)]);
}

#[test]
fn due_unknown_devices_get_a_twentieth_while_known_devices_wait() {
    let mut node = Node::with(AdmissionConfig {
        keys_in_flight_max: 512,
        lookups_per_second_max: 1_000_000,
        ..AdmissionConfig::default()
    });
    node.admission.handle_registry(Registry::Absent, at(0));
    for n in 0..2_000 {
        if n < 1_000 {
            node.slots.handle_admitted(device(n), "default");
        }
        node.refused(n, None, at(0));
    }
    let mut later = node;
    later.admission.handle_registry(Registry::Present, at(30_000));
    for _ in 0..3 {
        let probe = later.batches(at(30_000)).remove(0);
        assert!(probe.is_probe);
        later.done(&probe, Ok(()), at(30_000));
    }
    // The queue of slots was short: all are due.
    for n in 0..2_000 {
        later.queued(n, at(30_000));
    }

    let mut sent = Vec::new();
    while sent.len() < 512 {
        for batch in later.batches(at(30_000)) {
            later.done(&batch, Ok(()), at(30_000));
            sent.extend(batch.keys);
        }
    }

    let unknown = sent.iter().take(500).filter(|key| **key > device(999)).count();
    assert_eq!(unknown, 25);
}

#[test]
fn time_to_spare_ends_where_more_than_a_quarter_of_the_limit_waits_or_the_registry_is_away() {
    let mut node = Node::new();
    let quarter = u128::from(node.admission.state(at(0)).limit / 4);
    let mut spare = |n| {
        node.queued(n, at(0));
        node.admission.state(at(0)).has_time_to_spare()
    };

    let within = (0..quarter).all(&mut spare);
    let beyond = spare(quarter);

    assert!(within && !beyond);
    let mut node = Node::new();
    assert!(node.admission.state(at(0)).has_time_to_spare());
    node.admission.handle_registry(Registry::Absent, at(0));
    assert!(!node.admission.state(at(0)).has_time_to_spare());
}
