//! Registries that fail, and devices with wrong credentials.

use super::{queue::Class, *};

#[test]
fn failed_statement_is_tried_once_more_in_two_halves_and_one_bad_key_stops_only_its_half() {
    let mut node = Node::new();
    let blocking = node.block(at(0));
    let tickets: BTreeMap<Ticket, u128> = (0..20).map(|n| (node.queued(n, at(0)), n)).collect();
    node.done(&blocking[0], Ok(()), at(1));
    node.done(&blocking[1], Ok(()), at(1));
    let whole = node.batches(at(1)).remove(0);
    let poison = device(12);

    assert!(
        node.done(&whole, Err(BatchFailure::Failed), at(2)).is_empty(),
        "nobody is refused yet"
    );
    let halves = node.batches(at(2));

    assert_eq!(halves.iter().map(|half| half.keys.len()).collect::<Vec<_>>(), [10, 10]);
    assert!(keys(&halves[0]).is_disjoint(&keys(&halves[1])));
    let mut answered = 0;
    for half in &halves {
        if half.keys.contains(&poison) {
            let refused = node.done(half, Err(BatchFailure::Failed), at(3));
            assert_eq!(refused.len(), 10);
            assert_eq!(causes(&refused), [Cause::LookupFailed].into());
        } else {
            answered += node.done(half, Ok(()), at(3)).len();
        }
    }
    assert_eq!(answered, 10);
    assert_eq!(tickets.len(), 20);
    assert_eq!(node.admission.state(at(3)).in_flight, 0);
    assert_eq!(node.admission.state(at(3)).queue, 0);
}

#[test]
fn dead_registry_is_known_after_one_time_out_and_probed_without_devices() {
    let mut node = Node::new();
    node.queued(1, at(0));
    let batch = node.batches(at(0)).remove(0);
    let refused = node.done(&batch, Err(BatchFailure::TimedOut), at(1_000));
    assert_eq!(causes(&refused), [Cause::LookupTimedOut].into());

    let at_once = node.refused(2, None, at(1_001));
    assert_eq!(at_once.cause, Cause::Breaker);
    assert_eq!(at_once.cause.code(), Code::RegistryUnavailable);
    for second in 1..5 {
        let probes = node.batches(at(second * 1_000));
        assert_eq!(probes.len(), 1);
        assert!(probes[0].is_probe);
        assert!(
            node.done(&probes[0], Err(BatchFailure::TimedOut), at(second * 1_000 + 999))
                .is_empty()
        );
        assert_eq!(node.poll(at(second * 1_000 + 999)), Some(at(second * 1_000 + 1_000)));
    }

    for _ in 0..3 {
        let probe = node.batches(at(5_000)).remove(0);
        node.done(&probe, Ok(()), at(5_000));
    }

    assert_eq!(node.admission.state(at(5_000)).breaker, BreakerState::Closed);
    node.queued(3, at(5_000));
}

#[test]
fn registry_that_others_find_away_lets_nobody_wait_and_starts_low_only_where_probes_fail_too() {
    for is_away in [true, false] {
        let mut node = Node::new();
        node.queued(1, at(0));
        let limit = node.admission.state(at(0)).limit;

        node.admission.handle_registry(Registry::Suspected, at(0));

        assert_eq!(causes(&node.actions(at(0))), [Cause::Breaker].into());
        assert_eq!(node.refused(2, None, at(1)).cause, Cause::Breaker);
        if is_away {
            let probe = node.batches(at(1)).remove(0);
            node.done(&probe, Err(BatchFailure::TimedOut), at(1_001));
        }
        for _ in 0..3 {
            let probe = node.batches(at(2_000)).remove(0);
            node.done(&probe, Ok(()), at(2_000));
        }
        node.queued(3, at(2_000));
        assert_eq!(node.admission.state(at(2_000)).limit < limit, is_away);
    }
}

#[test]
fn no_measured_window_spans_an_outage() {
    let mut node = Node::new();
    for n in 1..=200 {
        node.slots.handle_admitted(device(n), "default");
    }
    for n in 1..=100 {
        node.queued(n, at(0));
    }
    let mut sent = node.batches(at(0));
    let first = sent.remove(0);
    node.done(&first, Ok(()), at(10));
    sent.extend(node.batches(at(10)));

    node.admission.handle_registry(Registry::Suspected, at(20));
    for batch in sent {
        node.done(&batch, Err(BatchFailure::TimedOut), at(1_010));
    }
    let mut now = 60_000;
    while node.admission.state(at(now)).breaker != BreakerState::Closed {
        for probe in node.batches(at(now)) {
            node.done(&probe, Ok(()), at(now));
        }
        now += 1_000;
    }
    for n in 101..=200 {
        node.queued(n, at(now));
    }
    let batch = node.batches(at(now)).remove(0);
    node.done(&batch, Ok(()), at(now + 10));

    let rate = node.admission.state(at(now + 10)).rate;
    assert!(
        rate < f64::EPSILON,
        "{rate} keys per second in a window that spans the outage"
    );
}

#[test]
fn hints_grow_with_the_age_of_the_outage() {
    let mut node = Node::new();
    node.admission.handle_registry(Registry::Absent, at(0));

    for (n, age_s) in [0, 40, 240].into_iter().enumerate() {
        let hint = node.refused(u128::try_from(n).unwrap(), None, at(age_s * 1_000)).hint;

        let from = ((age_s / 4).min(30) * 500).max(500);
        assert!(
            (from..=from * 2 + 500).contains(&hint.after_ms()),
            "{age_s}: {}",
            hint.after_ms()
        );
    }
}

#[test]
fn registry_that_was_never_there_lets_nobody_wait_until_it_comes() {
    let mut node = Node::new();
    node.queued(1, at(0));
    node.admission.handle_registry(Registry::Absent, at(0));
    assert_eq!(causes(&node.actions(at(0))), [Cause::Breaker].into());
    assert!(node.batches(at(100_000)).is_empty());
    assert_eq!(node.refused(2, None, at(100_000)).cause, Cause::Breaker);

    node.admission.handle_registry(Registry::Present, at(100_000));
    for _ in 0..3 {
        let probe = node.batches(at(100_000)).remove(0);
        node.done(&probe, Ok(()), at(100_000));
    }

    node.queued(2, at(100_000));
}

#[test]
fn guessed_credentials_are_throttled_but_lock_nobody_out() {
    let mut node = Node::new();
    node.slots.handle_admitted(device(1), "default");
    assert_eq!(node.guess(1, 20, at(0)), 10);

    let refused = node.refused(1, None, at(0));
    assert_eq!(refused.cause, Cause::Throttle);
    assert!(refused.hint.slot.is_some());
    assert!((5_000..=15_000).contains(&refused.hint.after_ms()));
    node.queued(2, at(0));

    let back = at(refused.hint.after_ms());
    let arrival = Arrival {
        slot_token: refused.hint.slot.as_deref(),
        network: ELSEWHERE,
        ..arrival(1, back)
    };
    let decision = node.arrive(&arrival, back);
    assert!(matches!(decision, Decision::Queued(_)));
    // The pending key answers it as well.
    let compared = node.guess(1, 20, back);
    assert!(compared <= 3, "its slot is worth two guesses: {compared}");
}

#[test]
fn guesses_that_join_one_look_up_count_each() {
    let mut node = Node::new();
    let tickets: Vec<Ticket> = (0..1_000)
        .filter_map(|_| match node.attempt(1, None, at(0)) {
            Decision::Queued(ticket) => Some(ticket),
            Decision::KnownAbsent | Decision::Refused(_) => None,
        })
        .collect();
    assert!(tickets.len() <= 10, "{}", tickets.len());
    let batch = node.batches(at(0)).remove(0);
    let mut compared = 0;
    for action in node.done(&batch, Ok(()), at(1)) {
        if let Output::Answer { answered, .. } = action {
            node.admission.end(answered, Outcome::Wrong, at(1));
            compared += 1;
        }
    }
    assert_eq!(compared, 8, "more do not wait for one key");

    assert_eq!(compared + node.guess(1, 1_000, at(1)), 10);
}

#[test]
fn devices_that_are_never_judged_are_not_throttled() {
    let mut node = Node::new();
    for round in 0..100 {
        let now = at(round * 10);
        let ticket = node.queued(1, now);
        if round % 2 == 0 {
            let batch = node.batches(now).remove(0);
            let mut told = node.done(&batch, Ok(()), now);
            if let Some(Output::Answer { answered, .. }) = told.pop() {
                node.admission.end(answered, Outcome::Left, now);
            }
        } else {
            assert!(node.admission.abandon(ticket, now).is_some());
        }
    }
    assert!(node.admission.throttle.has_none_open());

    node.queued(1, at(2_000));
}

#[test]
fn list_of_ids_demotes_no_known_device() {
    let from = |network| Arrival {
        network,
        ..arrival(1, at(1))
    };

    let lines = [ELSEWHERE, HERE].map(|network| {
        let mut node = Node::new();
        node.slots.handle_admitted(device(1), "default");
        node.guess(1, 5, at(0));
        let decision = node.arrive(&from(network), at(1));
        assert!(matches!(decision, Decision::Queued(_)));
        [Class::WalkIn, Class::UnknownWalkIn].map(|class| node.admission.queue.classes_len(&[class]))
    });

    assert_eq!(lines, [[1, 0], [0, 1]], "the device itself, and the guessing client");
}

#[test]
fn device_that_its_certificate_proves_is_neither_throttled_nor_disputed_by_guesses() {
    let mut node = Node::new();
    node.slots.handle_admitted(device(1), "default");
    node.guess(1, 20, at(0));
    assert_eq!(node.refused(1, None, at(0)).cause, Cause::Throttle);
    let arrival = Arrival {
        credential: CredentialTag::from(&Credential::Certificate(SecretHash::of(b"a certificate"))),
        ..arrival(1, at(0))
    };

    let decision = node.arrive(&arrival, at(0));

    assert!(matches!(decision, Decision::Queued(_)));
    // It waits with the known devices.
    assert_eq!(node.admission.queue.classes_len(&[Class::WalkIn]), 1);
}

#[test]
fn known_absent_id_costs_nothing_but_is_throttled_like_any_other() {
    let mut node = Node::new();
    let arrival = Arrival {
        is_known_absent: true,
        ..arrival(1, at(0))
    };
    let outcomes: Vec<Decision> = (0..11).map(|_| node.arrive(&arrival, at(0))).collect();

    assert!(outcomes[..10].iter().all(|decision| *decision == Decision::KnownAbsent));
    assert!(matches!(&outcomes[10], Decision::Refused(refused) if refused.cause == Cause::Throttle));
    assert!(node.batches(at(0)).is_empty());
}

#[test]
fn devices_waiting_are_bounded_whatever_they_ask_for() {
    let mut node = Node::with(AdmissionConfig {
        waiting_max: 96,
        ..AdmissionConfig::default()
    });
    for n in 0..96 {
        // More than eight do not wait for one key.
        node.queued(n / 8, at(0));
    }

    assert_eq!(node.refused(100, None, at(0)).cause, Cause::QueueFull);
}

#[test]
fn session_that_is_closed_gets_a_slot_of_its_tenants_queue() {
    let mut node = Node::new();
    node.admission.set_last_known_good(2_000.0);
    for n in 0..2_501 {
        node.slots.handle_admitted(device(n), "default");
    }

    let hints: Vec<u64> = (0..2_501)
        .map(|n| {
            let (at_least, rate) = (Duration::from_millis(500), node.admission.k_ref(at(0)));
            node.slots
                .give(device(n), None, at_least, rate, (at(0), wall(at(0))), &mut node.rng)
                .after_ms()
        })
        .collect();

    assert_eq!(hints.last(), Some(&1_500), "2,500 per second");
}

#[test]
fn full_node_gives_the_slot_of_another_node_again_and_counts_its_bounces() {
    let mut other = Node::new();
    other.slots.handle_admitted(device(1), "default");
    let full_for = Duration::from_secs(30);
    let turn = |node: &mut Node, token: Option<&str>, now: Instant| {
        let rate = node.admission.k_ref(now);
        node.slots
            .give(device(1), token, full_for, rate, (now, wall(now)), &mut node.rng)
    };
    let first = turn(&mut other, None, at(0));

    let early = turn(&mut Node::new(), first.slot.as_deref(), at(10_000));
    assert_eq!(
        early.after_ms(),
        first.after_ms() - 10_000,
        "not a millisecond more or less"
    );
    let due = at(first.after_ms());
    let mut node = Node::new();
    let second = turn(&mut node, first.slot.as_deref(), due);

    assert!(second.after_ms() >= 30_000, "{second:?}");
    let slots = &Node::new().slots;
    let standing = |hint: &Hint| slots.standing(device(1), hint.slot.as_deref(), due, wall(due));
    let (before, after) = (standing(&first), standing(&second));
    assert_eq!(after.slot.unwrap().refusals, before.slot.unwrap().refusals + 1);
    assert!(after.tenant.is_some() && after.tenant == before.tenant);
}

#[test]
fn guesses_just_before_a_slot_do_not_push_the_slot_away() {
    let mut node = Node::new();
    node.slots.handle_admitted(device(1), "default");
    node.guess(1, 20, at(0));
    let refused = node.refused(1, None, at(0));
    let slot_ms = refused.hint.after_ms();
    // The attacker knows the time as well, and is in another network.
    let before = at(slot_ms - 150);
    node.guess(1, 20, before);
    assert_eq!(node.refused(1, None, before).cause, Cause::Throttle);

    let back = at(slot_ms);
    let arrival = Arrival {
        slot_token: refused.hint.slot.as_deref(),
        network: ELSEWHERE,
        ..arrival(1, back)
    };
    let decision = node.arrive(&arrival, back);

    assert!(matches!(decision, Decision::Queued(_)), "{decision:?}");
}

#[test]
fn throttled_guesser_is_not_at_its_slot_for_the_limits_of_its_address() {
    let mut node = Node::new();
    node.guess(1, 20, at(0));
    let refused = node.refused(1, None, at(0));
    let token = refused.hint.slot.unwrap();
    let back = at(refused.hint.after.as_millis().try_into().unwrap());
    let shows = |node: &Node, network| {
        node.admission
            .is_at_its_slot(&node.slots, (device(1), secret()), &token, network, (back, wall(back)))
    };
    assert!(shows(&node, HERE));

    node.guess(1, 20, back);

    assert!(!shows(&node, HERE));
    assert!(shows(&node, ELSEWHERE));
}

#[test]
fn device_whose_row_cannot_be_read_is_not_asked_for_twice_a_second() {
    let mut node = Node::new();
    node.slots.handle_admitted(device(1), "default");
    let (mut now, mut token) = (at(0), None::<Box<str>>);
    for _ in 0..100 {
        let Decision::Queued(_) = node.attempt(1, token.as_deref(), now) else {
            panic!("there is room");
        };
        let batch = node.batches(now).remove(0);
        node.admission.handle_batch_done(batch.id, Ok(|_| Told::Nothing), now);
        let Some(Output::Refuse { refused, .. }) = node.actions(now).pop() else {
            panic!("nothing was told of it");
        };
        now += refused.hint.after;
        token = refused.hint.slot;
    }

    assert!(now > at(100 * 5_000), "{now:?}");
    assert!(now < at(100 * 240_000), "{now:?}");
}

#[test]
fn device_is_not_displaced_by_another_network_that_asks_for_its_key() {
    let mut node = Node::new();
    let blocking = node.block(at(0));
    let own = Arrival {
        network: ELSEWHERE,
        ..arrival(1, at(0))
    };
    let Decision::Queued(own) = node.arrive(&own, at(0)) else {
        panic!("there is room");
    };
    let mut displaced = Vec::new();
    for _ in 0..1_000 {
        node.attempt(1, None, at(0));
        displaced.extend(node.actions(at(0)));
    }
    let is_own = |action: &Output<(), ()>| matches!(action, Output::Refuse { ticket, .. } if *ticket == own);
    assert!(displaced.len() > 900, "{}", displaced.len());
    assert!(!displaced.iter().any(is_own));

    node.done(&blocking[0], Ok(()), at(1));
    let batch = node.batches(at(1)).remove(0);
    let answered = node.done(&batch, Ok(()), at(2));

    assert!(
        answered
            .iter()
            .any(|action| matches!(action, Output::Answer { ticket, .. } if *ticket == own))
    );
}

#[test]
fn statement_whose_end_is_never_reported_does_not_hold_its_keys_for_ever() {
    let mut node = Node::new();
    node.block(at(0));
    assert_eq!(node.admission.state(at(0)).in_flight, 2);

    let due = node.poll(at(0)).unwrap();
    let sent = node.batches(due.max(at(2_800)));

    let probes: u32 = sent.iter().map(|batch| u32::from(batch.is_probe)).sum();
    assert_eq!(node.admission.state(at(2_800)).in_flight, probes);
}
