//! Invariants of the limit on keys in flight: production admission before a database with a knee, in virtual time.
//! `admission/limit/tests` measures how close the limit comes to the optimum.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::SmallRng};
use seawall_proto::{
    admission::{
        Admission, AdmissionConfig, AdmissionState, Arrival, BatchFailure, BatchId, BreakerState, CohortTag, Decision,
        LOOKUP_MAX, LimitReason, Output, Ticket, Told,
    },
    id::{Credential, DeviceId, Network, SecretHash},
    slots::{SlotKeys, Slots},
    time::{Instant, WallTime},
};
use uuid::Uuid;

/// Keys that the database processes in parallel at full speed.
const KNEE: f64 = 32.0;
/// Time of a key below the knee.
const KEY: Duration = Duration::from_millis(16);
/// Slowdown of all keys by each key beyond the knee.
const CONTENTION: f64 = 0.004;
/// Number of waiting devices under full load.
const WAITING: usize = 500;
/// Maximum number of arrivals per tick.
const ARRIVING_MAX: usize = 20;
const TICK: Duration = Duration::from_millis(1);
const CEILING: u32 = 512;

struct World {
    admission: Admission<(), ()>,
    slots: Slots,
    rng: SmallRng,
    now: Instant,
    running: BTreeMap<BatchId, (Instant, Result<(), BatchFailure>, usize)>,
    devices: u128,
    is_dead: bool,
    slowness: f64,
    answered: usize,
}

fn wall(now: Instant) -> WallTime {
    WallTime::from_unix_ms(1_800_000_000_000 + now.as_micros() / 1_000)
}

fn arrival(number: u128, arrived: Instant) -> Arrival<'static> {
    Arrival {
        device: DeviceId::from_uuid(Uuid::from_u128(number)),
        cohort: CohortTag::of(None, None),
        slot_token: None,
        arrived,
        is_known_absent: false,
        credential: (&Credential::from(SecretHash::of(b"a secret"))).into(),
        network: Network::V4(1),
    }
}

fn admission(keys_in_flight_max: u32) -> (Admission<(), ()>, Slots) {
    let config = AdmissionConfig {
        lookups_per_second_max: 100_000,
        keys_in_flight_max,
        ..AdmissionConfig::default()
    };
    let slots = Slots::new(&config.slots(), SlotKeys::new(1, [7; 32]));
    (Admission::new(config, Instant::ZERO), slots)
}

impl World {
    fn new(seed: u64) -> Self {
        let (admission, slots) = admission(CEILING);
        Self {
            admission,
            slots,
            rng: SmallRng::seed_from_u64(seed),
            now: Instant::ZERO,
            running: BTreeMap::new(),
            devices: 0,
            is_dead: false,
            slowness: 1.0,
            answered: 0,
        }
    }

    fn state(&self) -> AdmissionState {
        self.admission.state(self.now)
    }

    /// Keys answered per second under full load.
    fn goodput(&mut self, span: Duration) -> f64 {
        self.run(span, |world| {
            WAITING.saturating_sub(world.state().queue).min(ARRIVING_MAX)
        })
    }

    /// Keys answered per second while `per_second` devices arrive.
    fn goodput_of(&mut self, per_second: usize, span: Duration) -> f64 {
        let every = 1_000 / per_second as u64;
        self.run(span, |world| {
            usize::from((world.now.as_micros() / 1_000).is_multiple_of(every))
        })
    }

    fn run(&mut self, span: Duration, arriving: impl Fn(&Self) -> usize) -> f64 {
        let (end, before) = (self.now + span, self.answered);
        while self.now < end {
            for _ in 0..arriving(self) {
                self.devices += 1;
                let arrival = arrival(self.devices, self.now);
                let times = (self.now, wall(self.now));
                self.admission
                    .attempt(&arrival, || (), &mut self.slots, times, &mut self.rng);
            }
            self.settle();
            self.now += TICK;
        }
        (self.answered - before) as f64 / span.as_secs_f64()
    }

    fn settle(&mut self) {
        let now = self.now;
        let due: Vec<BatchId> = self
            .running
            .iter()
            .filter(|(_, (ends, ..))| *ends <= now)
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            let (_, outcome, keys) = self.running.remove(&id).expect("it was found there");
            self.answered += if outcome.is_ok() { keys } else { 0 };
            self.admission
                .handle_batch_done(id, outcome.map(|()| |_| Told::Found(())), now);
        }
        loop {
            let times = (now, wall(now));
            let batch = match self.admission.poll_output(&mut self.slots, times, &mut self.rng) {
                Output::Send(batch) => batch,
                Output::Answer { .. } | Output::Refuse { .. } => continue,
                Output::Wait(_) => return,
            };
            let state = self.state();
            assert!(state.in_flight <= state.limit && state.limit <= CEILING, "{state:?}");
            let busy = f64::from(state.in_flight);
            let contention = 1.0 + CONTENTION * (busy - KNEE).max(0.0);
            let noise = self.rng.random_range(0.8..1.2);
            let took = KEY.mul_f64((busy / KNEE).max(1.0) * contention * self.slowness * noise);
            let (took, outcome) = if self.is_dead || took > LOOKUP_MAX {
                (LOOKUP_MAX, Err(BatchFailure::TimedOut))
            } else {
                (took, Ok(()))
            };
            self.running.insert(batch.id, (now + took, outcome, batch.keys.len()));
        }
    }
}

#[test]
fn in_flight_stays_within_the_limit_and_goodput_returns_after_whatever_befell_the_database() {
    for seed in 1..=3 {
        let mut world = World::new(seed);
        world.goodput(Duration::from_secs(10));
        let healthy = world.goodput(Duration::from_secs(10));

        world.slowness = 4.0;
        let slow = world.goodput(Duration::from_secs(20));
        world.is_dead = true;
        world.goodput(Duration::from_secs(15));
        assert_ne!(world.state().breaker, BreakerState::Closed);
        assert_eq!(world.state().limit_reason, LimitReason::Outage);
        (world.is_dead, world.slowness) = (false, 1.0);
        world.goodput(Duration::from_secs(3));
        let recovered = world.goodput(Duration::from_secs(5));

        let best = KNEE / KEY.as_secs_f64();
        assert!(healthy > 0.9 * best, "{healthy} of {best}");
        assert!(slow > 0.85 * best / 4.0, "{slow} of {best} / 4");
        assert!(recovered > 0.8 * best, "{recovered} of {best}");
    }
}

#[test]
fn database_that_is_dead_before_anything_was_measured_is_found_when_it_comes() {
    let mut world = World::new(1);
    world.is_dead = true;
    world.goodput(Duration::from_secs(60));
    assert!(world.state().limit >= 4);

    world.is_dead = false;
    world.goodput(Duration::from_secs(3));
    let goodput = world.goodput(Duration::from_secs(10));

    assert!(goodput > 0.8 * KNEE / KEY.as_secs_f64(), "{goodput}");
}

#[test]
fn calm_hour_neither_moves_the_limit_nor_freezes_it() {
    let mut world = World::new(1);
    world.goodput(Duration::from_secs(10));
    let before = world.state();

    world.goodput_of(50, Duration::from_secs(60));
    let calm = world.state();
    world.slowness = 0.1;
    world.goodput(Duration::from_secs(15));
    let after = world.state();

    assert_eq!(calm.limit_reason, LimitReason::AppLimited);
    assert!(
        calm.limit.abs_diff(before.limit) * 3 < before.limit,
        "{before:?}, then {calm:?}"
    );
    assert_ne!(after.limit_reason, LimitReason::AppLimited);
    assert!(after.rate > 5.0 * before.rate, "{before:?}, then {after:?}");
}

#[test]
fn million_abandoned_devices_leak_no_permit() {
    let mut rng = SmallRng::seed_from_u64(1);
    let (mut admission, mut slots) = admission(16);
    let mut now = Instant::ZERO;
    let mut running: BTreeMap<BatchId, usize> = BTreeMap::new();
    let mut answered: BTreeSet<Ticket> = BTreeSet::new();
    for number in 0..1_000_000_u128 {
        now += Duration::from_micros(20);
        let ticket = match admission.attempt(
            &arrival(number % 5_000, now),
            || (),
            &mut slots,
            (now, wall(now)),
            &mut rng,
        ) {
            Decision::Queued(ticket) => ticket,
            Decision::Refused(_) | Decision::KnownAbsent => panic!("there is room"),
        };
        if let Output::Send(batch) = admission.poll_output(&mut slots, (now, wall(now)), &mut rng) {
            running.insert(batch.id, batch.keys.len());
        }
        admission.abandon(ticket, now);
        if number.is_multiple_of(3)
            && let Some((id, _)) = running.pop_first()
        {
            admission.handle_batch_done(id, Ok(|_| Told::Found(())), now);
        }
        loop {
            match admission.poll_output(&mut slots, (now, wall(now)), &mut rng) {
                Output::Send(batch) => drop(running.insert(batch.id, batch.keys.len())),
                Output::Answer { ticket, .. } | Output::Refuse { ticket, .. } => {
                    assert!(answered.insert(ticket), "answered once");
                }
                Output::Wait(_) => break,
            }
        }
        assert_eq!(admission.state(now).in_flight as usize, running.values().sum::<usize>());
    }

    for id in running.into_keys() {
        admission.handle_batch_done(id, Ok(|_| Told::Found(())), now);
    }
    let state = admission.state(now);

    assert_eq!((state.in_flight, state.queue), (0, 0));
    assert!(answered.is_empty(), "nobody was there to be answered");
}
