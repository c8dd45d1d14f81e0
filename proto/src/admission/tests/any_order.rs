//! Random orders of events: the invariants hold.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// An event.
#[derive(Clone, Debug)]
enum Step {
    Attempt {
        device: u8,
        arrived_ms_ago: u16,
        with_token: bool,
    },
    Abandon {
        nth: usize,
    },
    Done {
        nth: usize,
        outcome: Result<(), BatchFailure>,
    },
    Wait {
        ms: u16,
    },
    Admit {
        device: u8,
    },
    Wrong {
        nth: usize,
    },
    Cut(bool),
    Registry {
        is_there: bool,
    },
    Said {
        is_there: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let outcome = prop_oneof![
        6 => Just(Ok(())),
        2 => Just(Err(BatchFailure::Failed)),
        1 => Just(Err(BatchFailure::TimedOut)),
    ];
    prop_oneof![
        12 => (any::<u8>(), 0..500_u16, any::<bool>())
            .prop_map(|(device, arrived_ms_ago, with_token)| Step::Attempt { device, arrived_ms_ago, with_token }),
        3 => any::<usize>().prop_map(|nth| Step::Abandon { nth }),
        5 => (any::<usize>(), outcome).prop_map(|(nth, outcome)| Step::Done { nth, outcome }),
        4 => (0..1_500_u16).prop_map(|ms| Step::Wait { ms }),
        1 => any::<u8>().prop_map(|device| Step::Admit { device }),
        1 => any::<usize>().prop_map(|nth| Step::Wrong { nth }),
        1 => any::<bool>().prop_map(Step::Cut),
        1 => prop::bool::weighted(0.8).prop_map(|is_there| Step::Registry { is_there }),
        1 => any::<bool>().prop_map(|is_there| Step::Said { is_there }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Keys in flight never exceed the limit that applied when they were sent, and no key is in flight twice. Every
    /// ticket is answered exactly once and in time, or abandoned. A key for which no device waits is not sent. Nothing
    /// is left at the end.
    #[test]
    fn any_order_of_events_keeps_the_promises(steps in prop::collection::vec(step(), 1..300), limit in 2..40_u32) {
        let mut node = Node::with(AdmissionConfig { keys_in_flight_max: limit, lookups_per_second_max: 200, ..AdmissionConfig::default() });
        let mut now = at(1_000);
        let mut waiting: BTreeMap<Ticket, (DeviceId, Instant)> = BTreeMap::new();
        let mut flying: Vec<Batch> = Vec::new();
        let mut sent_at: BTreeMap<BatchId, Instant> = BTreeMap::new();
        let mut answered: Vec<Answered> = Vec::new();
        let mut tokens: BTreeMap<u8, Box<str>> = BTreeMap::new();
        // Keys of failed statements, which are retried once.
        let mut failed: BTreeSet<DeviceId> = BTreeSet::new();
        let mut in_order = steps.into_iter();
        // At the end time passes until no device waits and nothing is in flight.
        let mut closing = 0;

        loop {
            let step = match in_order.next() {
                Some(step) => step,
                None if waiting.is_empty() && flying.is_empty() => break,
                None => {
                    closing += 1;
                    prop_assert!(closing < 1_000, "{} wait", waiting.len());
                    if flying.is_empty() { Step::Wait { ms: 900 } } else { Step::Done { nth: 0, outcome: Ok(()) } }
                }
            };
            match step {
                Step::Attempt { device: n, arrived_ms_ago, with_token } => {
                    let arrived = now - Duration::from_millis(arrived_ms_ago.into());
                    let token = tokens.get(&n).filter(|_| with_token).cloned();
                    let arrival = Arrival { device: device(n.into()), cohort: CohortTag::of(None, None), slot_token: token.as_deref(), arrived, is_known_absent: false, credential: secret(), network: Network::V4(1) };
                    match node.arrive(&arrival, now) {
                        Decision::Queued(ticket) => prop_assert!(waiting.insert(ticket, (arrival.device, arrived)).is_none()),
                        Decision::Refused(refused) => {
                            prop_assert!((500..=600_000).contains(&refused.hint.after_ms()));
                            tokens.insert(n, refused.hint.slot.expect("a slot, always"));
                        }
                        Decision::KnownAbsent => prop_assert!(false, "nobody said so"),
                    }
                }
                Step::Abandon { nth } => {
                    if let Some(ticket) = waiting.keys().nth(nth % waiting.len().max(1)).copied() {
                        waiting.remove(&ticket);
                        prop_assert!(node.admission.abandon(ticket, now).is_some());
                    }
                }
                Step::Done { nth, outcome } => {
                    if !flying.is_empty() {
                        let batch = flying.remove(nth % flying.len());
                        if outcome == Err(BatchFailure::Failed) {
                            failed.extend(&batch.keys);
                        }
                        node.admission.handle_batch_done(batch.id, outcome.map(|()| |_| Told::Found(())), now);
                        node.admission.handle_batch_done(batch.id, outcome.map(|()| |_| Told::Found(())), now);
                    }
                }
                Step::Wait { ms } => now += Duration::from_millis(ms.into()),
                Step::Admit { device: n } => node.slots.handle_admitted(device(n.into()), "default"),
                Step::Wrong { nth } => {
                    if !answered.is_empty() {
                        node.admission.end(answered.remove(nth % answered.len()), Outcome::Wrong, now);
                    }
                }
                Step::Cut(is_cut) => node.admission.set_limit_cut(is_cut, now),
                Step::Registry { is_there: true } => node.admission.handle_registry(Registry::Present, now),
                Step::Registry { is_there: false } => node.admission.handle_registry(Registry::Absent, now),
                Step::Said { is_there: true } => node.admission.handle_registry(Registry::Confirmed, now),
                Step::Said { is_there: false } => node.admission.handle_registry(Registry::Suspected, now),
            }
            flying.retain(|batch| now < sent_at[&batch.id] + STATEMENT_LOST_AFTER);
            for batch in node.batches(now) {
                sent_at.insert(batch.id, now);
                let mut under_way: BTreeSet<DeviceId> = flying.iter().flat_map(|other| other.keys.clone()).collect();
                prop_assert!(!batch.keys.is_empty() && flying.len() < BATCHES_IN_FLIGHT_MAX);
                for key in &batch.keys {
                    prop_assert!(under_way.insert(*key), "a key is under way once");
                    // A key is retried for any device that waits for it: one with more time may have left.
                    let within = if failed.contains(key) { ANSWER_WITHIN } else { SEND_WITHIN };
                    let send_by = |arrived: Instant| arrived + within;
                    let is_wanted = waiting.values().any(|(device, arrived)| device == key && now < send_by(*arrived));
                    prop_assert!(batch.is_probe || is_wanted, "nobody waits for it");
                }
                flying.push(batch);
                let in_flight = to_usize(node.admission.state(now).in_flight);
                prop_assert!(in_flight <= to_usize(node.admission.limit.keys()), "sent above the limit");
            }
            let state = node.admission.state(now);
            prop_assert_eq!(to_usize(state.in_flight), flying.iter().map(|batch| batch.keys.len()).sum::<usize>());
            for action in node.actions(now) {
                let ticket = match action {
                    Output::Answer { ticket, answered: attempt, .. } => {
                        prop_assert_eq!(waiting.get(&ticket).map(|(of, _)| *of), Some(attempt.device()));
                        answered.push(attempt);
                        ticket
                    }
                    Output::Refuse { ticket, .. } => ticket,
                    Output::Send(_) | Output::Wait(_) => unreachable!("no action"),
                };
                prop_assert!(waiting.remove(&ticket).is_some(), "answered twice, or after it left");
            }
            prop_assert_eq!(node.admission.state(now).queue, waiting.len());
            let is_late = |arrived: &Instant| now >= *arrived + ANSWER_WITHIN;
            prop_assert!(!waiting.values().any(|(_, arrived)| is_late(arrived)));
            if let Some(due) = node.poll(now) {
                prop_assert!(due > now || !flying.is_empty() || !waiting.is_empty());
            }
        }
        for attempt in answered {
            node.admission.end(attempt, Outcome::Left, now);
        }
        prop_assert!(node.admission.throttle.has_none_open());
    }
}
