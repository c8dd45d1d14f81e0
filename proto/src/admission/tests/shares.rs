//! Bounds that change while a node runs.

use super::*;

fn config() -> AdmissionConfig {
    AdmissionConfig {
        lookups_per_second_max: 1_000,
        keys_in_flight_max: 400,
        ..AdmissionConfig::default()
    }
}

/// Keys sent within a second in which devices always wait, and the maximum in flight.
fn sent_in_a_second(node: &mut Node, begin: Instant) -> (usize, u32) {
    let (mut keys, mut in_flight_max) = (0, 0);
    for ms in 0..1_000_u64 {
        let now = begin + Duration::from_millis(ms);
        for n in 0..4 {
            node.attempt(u128::from(now.as_micros()) * 4 + n, None, now);
        }
        let batches = node.batches(now);
        in_flight_max = in_flight_max.max(node.admission.state(now).in_flight);
        for batch in batches {
            keys += batch.keys.len();
            node.done(&batch, Ok(()), now);
        }
    }
    (keys, in_flight_max)
}

fn nodes(number: u32) -> NonZeroU32 {
    NonZeroU32::new(number).unwrap()
}

#[test]
fn node_has_its_part_of_the_bounds_that_it_shares() {
    let mut node = Node::with(config());
    sent_in_a_second(&mut node, at(0));

    node.admission.handle_peers(nodes(4), at(1_000));
    let (shared, _) = sent_in_a_second(&mut node, at(1_000));
    assert!((225..=276).contains(&shared), "{shared}");
    assert_eq!(node.admission.state(at(2_000)).limit_ceiling, 100);

    node.admission.handle_peers(nodes(1), at(2_000));
    let (alone, _) = sent_in_a_second(&mut node, at(2_000));
    assert!((900..=1_101).contains(&alone), "{alone}");
    assert_eq!(node.admission.state(at(3_000)).limit_ceiling, 400);
}

#[test]
fn slots_are_given_out_at_the_nodes_part_of_what_was_measured() {
    let mut node = Node::with(AdmissionConfig {
        lookups_per_second_max: 10_000,
        ..config()
    });
    node.admission.set_last_known_good(4_000.0);
    assert!((node.admission.k_ref(at(0)) - 5_000.0).abs() < 1e-6);

    node.admission.handle_peers(nodes(2), at(0));
    assert!((node.admission.k_ref(at(0)) - 2_500.0).abs() < 1e-6);

    node.admission.handle_peers(nodes(1), at(0));
    assert!((node.admission.k_ref(at(0)) - 5_000.0).abs() < 1e-6);
}

#[test]
fn lower_bounds_hold_at_once_whatever_is_in_flight() {
    let mut node = Node::with(config());
    for n in 0..1_000 {
        node.attempt(n, None, at(0));
    }
    let before = node.batches(at(0));
    assert!(before.iter().map(|batch| batch.keys.len()).sum::<usize>() > 10);

    node.admission.set_bounds(1_000, 10, at(1));
    for batch in &before {
        node.done(batch, Ok(()), at(2));
    }
    let (_, in_flight_max) = sent_in_a_second(&mut node, at(1_000));

    assert!(in_flight_max <= 10, "{in_flight_max}");
}

#[test]
fn change_of_the_bounds_gives_no_second_burst() {
    let mut node = Node::with(config());
    let (mut sent, begin) = (0, at(0));
    for ms in 0..200 {
        let now = begin + Duration::from_millis(ms);
        node.attempt(u128::from(ms), None, now);
        node.admission.set_bounds(100, 400, now);
        for batch in node.batches(now) {
            sent += batch.keys.len();
            node.done(&batch, Ok(()), now);
        }
    }

    assert!(sent <= 31, "{sent}: a tenth of a second saved up, and 20 of 200 ms");
}
