//! Order of service, and displacement if there is no room.

use super::*;

/// With this capacity the holders' queue has room for 1.8 s, plus a quarter.
const RATE: f64 = 2_000.0;
const HOLDERS_MAX: usize = 4_500;

/// Devices from `first`, known of `tenant`, and refused once at time 0.
fn refused_once(node: &mut Node, tenant: &str, devices: std::ops::Range<u128>) {
    for n in devices {
        node.slots.handle_admitted(device(n), tenant);
        node.refused(n, None, at(0));
    }
}

fn node() -> Node {
    let mut node = Node::new();
    node.admission.set_last_known_good(RATE);
    node.admission.handle_registry(Registry::Absent, at(0));
    node
}

/// The registry answers: after three probes devices may wait.
fn recovered(mut node: Node, now: Instant) -> Node {
    node.admission.handle_registry(Registry::Present, now);
    for _ in 0..3 {
        let probe = node.batches(now).remove(0);
        node.done(&probe, Ok(()), now);
    }
    node
}

#[test]
fn full_line_refuses_the_newest_of_the_longest_tenant() {
    let mut node = node();
    refused_once(&mut node, "great", 0..6_000);
    refused_once(&mut node, "small", 10_000..10_010);
    let now = at(10_000);
    let mut node = recovered(node, now);
    for n in 0..6_000 {
        node.attempt(n, None, now);
    }
    assert_eq!(node.admission.state(now).queue, HOLDERS_MAX);

    let small: Vec<Ticket> = (10_000..10_010).map(|n| node.queued(n, now)).collect();

    let gone = node.actions(now);
    assert_eq!((gone.len(), causes(&gone)), (10, [Cause::QueueFull].into()));
    assert_eq!(node.admission.state(now).queue, HOLDERS_MAX);
    let first = node.batches(now).remove(0);
    let answered = node.done(&first, Ok(()), now);
    let answered: BTreeSet<Ticket> = answered
        .iter()
        .filter_map(|action| match action {
            Output::Answer { ticket, .. } => Some(*ticket),
            Output::Refuse { .. } | Output::Send(_) | Output::Wait(_) => None,
        })
        .collect();
    assert!(small.iter().all(|ticket| answered.contains(ticket)), "they take turns");
}

#[test]
fn device_sent_away_four_times_is_served_before_those_that_came_earlier() {
    let mut node = node();
    refused_once(&mut node, "great", 0..1_000);
    node.slots.handle_admitted(device(5_000), "great");
    // Each time at its slot, while the registry is away.
    let mut now = at(0);
    for _ in 0..4 {
        now += Duration::from_millis(node.refused(5_000, None, now).hint.after_ms());
    }
    let mut node = recovered(node, now);
    for n in 0..1_000 {
        node.queued(n, now);
    }

    node.queued(5_000, now);

    let first = node.batches(now).remove(0);
    assert!(
        first.keys.contains(&device(5_000)),
        "behind a thousand, but by seniority"
    );
}

#[test]
fn unknown_devices_keep_their_share_where_holders_fill_their_queue() {
    let mut node = node();
    refused_once(&mut node, "great", 0..6_000);
    for n in 20_000..21_000 {
        node.refused(n, None, at(0));
    }
    let now = at(10_000);
    let mut node = recovered(node, now);
    for n in 0..6_000 {
        node.attempt(n, None, now);
    }
    assert_eq!(node.admission.state(now).queue, HOLDERS_MAX);

    let unknown = (20_000..21_000)
        .filter(|n| matches!(node.attempt(*n, None, now), Decision::Queued(_)))
        .count();

    assert_eq!(unknown, HOLDERS_MAX / 20, "a twentieth");
}
