//! Devices that a drain sends away come back no faster than they can be taken back.

use std::{collections::BTreeMap, time::Duration};

use rand::{SeedableRng as _, rngs::SmallRng};
use seawall_proto::{
    admission::{Admission, AdmissionConfig},
    drain::Pacing,
    id::DeviceId,
    refusal::Hint,
    slots::SlotKeys,
    time::{Instant, WallTime},
};

const WALL: WallTime = WallTime::from_unix_ms(1_800_000_000_000);

/// Devices that come back in the fullest second, as times of the capacity.
fn fullest_second(sessions: u32, seed: u64) -> f64 {
    let config = AdmissionConfig {
        lookups_per_second_max: 1_000,
        ..AdmissionConfig::default()
    };
    let mut admission = Admission::<()>::new(config, SlotKeys::new(1, [7; 32]), Instant::ZERO);
    let mut rng = SmallRng::seed_from_u64(seed);
    let capacity = admission.state(Instant::ZERO).k_ref;
    let mut pacing = Pacing::drain(capacity, sessions as usize, Duration::from_secs(25), Instant::ZERO);
    let mut homecoming = pacing.homecoming(sessions as usize, capacity, Instant::ZERO);
    let (mut now, mut closed, mut seconds) = (Instant::ZERO, 0, BTreeMap::<u64, u32>::new());
    while closed < sessions {
        now = pacing.poll_timeout().max(now + Duration::from_millis(10));
        for _ in 0..pacing.take_due((sessions - closed) as usize, now) {
            let device = DeviceId::from_uuid(uuid::Uuid::from_u128(u128::from(closed)));
            let back = Hint::draw(homecoming.next_range(now), &mut rng).after;
            let wall = WALL + now.saturating_since(Instant::ZERO);
            let hint = admission.slot_for_close(device, back, now, wall, &mut rng);
            let second = (now + hint.after).saturating_since(Instant::ZERO).as_secs();
            *seconds.entry(second).or_default() += 1;
            closed += 1;
        }
    }
    f64::from(seconds.into_values().max().unwrap_or(0)) / capacity
}

#[test]
fn drained_devices_come_back_at_the_capacity_however_many_there_are() {
    for sessions in [20, 2_000, 20_000, 100_000] {
        let fullest = fullest_second(sessions, 1);

        assert!(fullest < 1.1, "{sessions} sessions: {fullest:.2} of the capacity");
    }
}
