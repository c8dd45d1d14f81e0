//! Devices that a drain closes return no faster than the node can readmit them.

use std::{collections::BTreeMap, time::Duration};

use rand::{SeedableRng as _, rngs::SmallRng};
use seawall_proto::{
    admission::{Admission, AdmissionConfig},
    departures::{Departure, Departures, DrainOrder, NodeLoad, Output},
    id::DeviceId,
    refusal::Hint,
    slots::{SlotKeys, Slots},
    time::{Instant, WallTime},
};

const WALL: WallTime = WallTime::from_unix_ms(1_800_000_000_000);

/// Devices that return in the fullest second, as a multiple of the capacity.
fn fullest_second(sessions: u32, seed: u64) -> f64 {
    let config = AdmissionConfig {
        lookups_per_second_max: 1_000,
        ..AdmissionConfig::default()
    };
    let mut slots = Slots::new(&config.slots(), SlotKeys::new(1, [7; 32]));
    let mut rng = SmallRng::seed_from_u64(seed);
    let capacity = Admission::<(), ()>::new(config, Instant::ZERO).k_ref(Instant::ZERO);
    let order = DrainOrder {
        rate_per_second: None,
        announce: Duration::ZERO,
        deadline: Duration::from_secs(25),
    };
    let mut departures = Departures::new(None, Instant::ZERO);
    let started = departures.handle_drain_started(order, Instant::ZERO);
    assert_eq!(started, Ok(()));
    let mut left: Vec<u32> = (0..sessions).collect();
    let (mut now, mut seconds) = (Instant::ZERO, BTreeMap::<u64, u32>::new());
    loop {
        match departures.poll_output(now) {
            Output::Drain(_) => {}
            Output::Scan(scan) => {
                let load = NodeLoad {
                    sessions: left.len(),
                    capacity_per_second: capacity,
                    is_calm: true,
                };
                departures.handle_found(scan, std::mem::take(&mut left), &load, now);
            }
            Output::Close(session, Departure::Restart { back_within, .. }) => {
                let device = DeviceId::from_uuid(uuid::Uuid::from_u128(u128::from(session)));
                let back = Hint::draw(back_within, &mut rng).after;
                let wall = WALL + now.saturating_since(Instant::ZERO);
                let hint = slots.give(device, None, back, capacity, (now, wall), &mut rng);
                let second = (now + hint.after).saturating_since(Instant::ZERO).as_secs();
                *seconds.entry(second).or_default() += 1;
            }
            Output::Close(_, Departure::Eviction) => unreachable!("no rule evicts"),
            Output::Wait(Some(at)) => now = at,
            Output::Wait(None) => break,
        }
    }
    assert_eq!(seconds.values().sum::<u32>(), sessions);
    f64::from(seconds.into_values().max().unwrap_or(0)) / capacity
}

#[test]
fn drained_devices_come_back_at_the_capacity_however_many_there_are() {
    for sessions in [20, 2_000, 20_000, 100_000] {
        let fullest = fullest_second(sessions, 1);

        assert!(fullest < 1.1, "{sessions} sessions: {fullest:.2} of the capacity");
    }
}
