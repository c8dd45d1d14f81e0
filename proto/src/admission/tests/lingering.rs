//! A storm costs the database few statements; in calm times no device waits.

use super::*;

/// Time of a small statement.
const TOOK: Duration = Duration::from_micros(800);

/// Devices arrive at `per_second` for three seconds; the database answers every statement quickly. Returns the
/// statements, and the longest time from an arrival to its statement.
fn statements(config: AdmissionConfig, per_second: u64) -> (u64, Duration) {
    let mut node = Node::with(config);
    let end = at(3_000);
    let gap = Duration::from_micros(1_000_000 / per_second);
    let (mut arrival, mut count, mut longest) = (at(0), 0, Duration::ZERO);
    let mut arrived = BTreeMap::new();
    let mut running: Vec<(Instant, Batch)> = Vec::new();
    let mut n = 0;
    loop {
        let ended = running.iter().map(|(done, _)| *done).min();
        let mut now = ended.map_or(arrival, |ended| ended.min(arrival));
        if let Some(due) = node.poll(now).filter(|due| *due < now) {
            now = due;
        }
        if now >= end {
            return (count, longest);
        }
        if arrival <= now {
            n += 1;
            node.slots.handle_admitted(device(n), "default");
            if let Decision::Queued(_) = node.attempt(n, None, now) {
                arrived.insert(device(n), now);
            }
            arrival += gap;
        }
        while let Some(index) = running.iter().position(|(done, _)| *done <= now) {
            let (_, batch) = running.swap_remove(index);
            node.done(&batch, Ok(()), now);
        }
        for batch in node.batches(now) {
            count += 1;
            for key in &batch.keys {
                longest = longest.max(now.saturating_since(arrived[key]));
            }
            running.push((now + TOOK, batch));
        }
    }
}

#[test]
fn storm_costs_one_statement_for_fifty_devices_and_more() {
    for per_second in [1_000, 2_000, 5_000, 9_000] {
        let (statements, longest) = statements(AdmissionConfig::default(), per_second);

        // Some are small, until the storm is detected.
        assert!(statements <= 3 * per_second / 50 + 30, "{statements} for {per_second}");
        assert!(longest <= Duration::from_millis(85), "{longest:?} at {per_second}");
    }
}

#[test]
fn storm_at_the_ceiling_is_answered_at_the_ceiling_in_few_statements() {
    let config = AdmissionConfig {
        lookups_per_second_max: 2_000,
        ..AdmissionConfig::default()
    };
    let mut node = Node::with(config.clone());
    let (mut now, mut keys, mut count) = (at(0), 0, 0);
    let mut running: Vec<(Instant, Batch)> = Vec::new();
    let mut n = 0;
    while now < at(2_000) {
        for _ in 0..10 {
            n += 1;
            node.slots.handle_admitted(device(n), "default");
            node.attempt(n, None, now);
        }
        while let Some(index) = running.iter().position(|(done, _)| *done <= now) {
            let (_, batch) = running.swap_remove(index);
            node.done(&batch, Ok(()), now);
        }
        for batch in node.batches(now) {
            count += 1;
            keys += batch.keys.len();
            running.push((now + TOOK, batch));
        }
        now += Duration::from_millis(1);
    }

    assert!((4_000..=4_210).contains(&keys), "{keys} in two seconds");
    assert!(count <= keys / 50, "{count} statements for {keys} keys");
}

#[test]
fn ceiling_takes_few_statements_where_the_limit_is_low() {
    // Half of the limit would be at least 100 statements of 30 keys.
    let config = AdmissionConfig {
        lookups_per_second_max: 1_000,
        keys_in_flight_max: 60,
        ..AdmissionConfig::default()
    };

    let (statements, _) = statements(config, 2_000);

    assert!(statements <= 85, "{statements} for 3,000 keys");
}

#[test]
fn nobody_waits_on_a_calm_day() {
    let (statements, longest) = statements(AdmissionConfig::default(), 200);

    assert!(statements >= 590, "{statements}");
    assert!(longest <= TOOK, "{longest:?}");
}
