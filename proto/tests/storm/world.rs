//! The simulated world: devices, production admission, a database.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::SmallRng};
use seawall_proto::{
    admission::{
        Action, Admission, AdmissionConfig, Arrival, BatchFailure, BatchId, CohortTag, Decision, Ticket, Told,
    },
    id::{DeviceId, Network, Proof},
    refusal::Hint,
    slots::SlotKeys,
    time::{Instant, WallTime},
};
use uuid::Uuid;

pub const CAPACITY: f64 = 2_000.0;
/// Keys in flight that [`Curve::Knee`] needs.
const KNEE: f64 = 32.0;
/// Time between two small tenants, where they come one after the other.
const SMALL_EVERY: Duration = Duration::from_millis(500);
/// No device may wait longer for an answer, whatever happens.
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// No simulation runs longer.
const HORIZON: Duration = Duration::from_secs(900);

/// How the database gets slower.
#[derive(Clone, Copy, PartialEq)]
pub enum Curve {
    /// It answers [`CAPACITY`], however many keys are in flight.
    Flat,
    /// It needs 32 keys in flight for that; a key takes 16 ms then.
    Knee,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Habit {
    ObeysHints,
    /// Comes back after this time, without its token.
    Fixed(Duration),
}

#[derive(Clone)]
pub struct Scenario {
    pub fleet: usize,
    pub curve: Curve,
    pub tenants: usize,
    /// The small tenants come one after the other, from this time on.
    pub small_from: Option<Duration>,
    /// Devices of the great tenant crash when they are back, and come again after this time, until the others are back.
    pub crashing: Option<Duration>,
    /// Whether the capacity is known from an earlier life.
    pub is_known: bool,
    /// The first so many of a hundred devices don't obey.
    pub disobedient_percent: usize,
    pub habit: Habit,
    /// The database doesn't answer in this time.
    pub dead: Option<(Duration, Duration)>,
    /// The database is four times slower in this time.
    pub slow: Option<(Duration, Duration)>,
    /// Random ids a second, for as long as the fleet is not back.
    pub strangers_per_second: usize,
    pub ceiling: u32,
    pub seed: u64,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            fleet: 20_000,
            curve: Curve::Flat,
            tenants: 1,
            small_from: None,
            crashing: None,
            is_known: true,
            disobedient_percent: 0,
            habit: Habit::ObeysHints,
            dead: None,
            slow: None,
            strangers_per_second: 0,
            ceiling: 4_000,
            seed: 1,
        }
    }
}

#[derive(Debug)]
pub struct Report {
    pub all_back: Duration,
    pub obedient_back: Duration,
    pub attempts: f64,
    pub attempts_max: u32,
    pub in_flight_max: u32,
    pub wait_max: Duration,
    /// Times from the first attempt to being back, by tenant.
    pub waits: Vec<Vec<Duration>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrive(usize),
    Stranger,
    Done(BatchId, bool),
    Wake,
}

struct Device {
    token: Option<Box<str>>,
    began: Instant,
    arrived: Instant,
    attempts: u32,
    round_trip: Duration,
    back: Option<Duration>,
    obeys: bool,
}

pub struct World {
    scenario: Scenario,
    admission: Admission<()>,
    devices: Vec<Device>,
    waiting: BTreeMap<Ticket, usize>,
    strangers: BTreeMap<Ticket, Instant>,
    events: BinaryHeap<Reverse<(Instant, u64, Event)>>,
    counter: u64,
    rng: SmallRng,
    left: usize,
    report: Report,
}

const STRANGERS_FROM: usize = 1 << 40;

pub fn id(index: usize) -> DeviceId {
    DeviceId::from_uuid(Uuid::from_u128(index as u128 + 0x1_0000_0000_0000_0000))
}

fn tenant(index: usize, tenants: usize) -> usize {
    // One in ten devices belongs to the small tenants, if there are any.
    if tenants > 1 && index.is_multiple_of(10) {
        1 + index / 10 % (tenants - 1)
    } else {
        0
    }
}

pub fn wall(now: Instant) -> WallTime {
    WallTime::from_unix_ms(1_800_000_000_000 + now.as_micros() / 1_000)
}

impl World {
    pub fn new(scenario: Scenario) -> Self {
        let mut rng = SmallRng::seed_from_u64(scenario.seed);
        let config = AdmissionConfig {
            lookups_per_second_max: scenario.ceiling,
            keys_in_flight_max: 64,
            ..AdmissionConfig::default()
        };
        let mut admission = Admission::new(config, SlotKeys::new(1, [7; 32]), Instant::ZERO);
        if scenario.is_known {
            admission.set_last_known_good(CAPACITY);
        }
        let devices = (0..scenario.fleet)
            .map(|index| {
                admission.handle_admitted(id(index), &format!("t{}", tenant(index, scenario.tenants)));
                Device {
                    token: None,
                    began: Instant::ZERO,
                    arrived: Instant::ZERO,
                    attempts: 0,
                    round_trip: Duration::from_millis(rng.random_range(20..200)),
                    back: None,
                    obeys: index % 100 >= scenario.disobedient_percent,
                }
            })
            .collect();
        let waits = vec![Vec::new(); scenario.tenants];
        let is_awaited = |index: &usize| scenario.crashing.is_none() || tenant(*index, scenario.tenants) > 0;
        let left = (0..scenario.fleet).filter(is_awaited).count();
        let mut world = Self {
            scenario,
            admission,
            devices,
            waiting: BTreeMap::new(),
            strangers: BTreeMap::new(),
            events: BinaryHeap::new(),
            counter: 0,
            rng,
            left,
            report: Report {
                all_back: Duration::ZERO,
                obedient_back: Duration::ZERO,
                attempts: 0.0,
                attempts_max: 0,
                in_flight_max: 0,
                wait_max: Duration::ZERO,
                waits,
            },
        };
        let (scenario_tenants, small_from) = (world.scenario.tenants, world.scenario.small_from);
        for index in 0..world.scenario.fleet {
            let mut start = Instant::from_micros(world.rng.random_range(0..1_000_000));
            let tenant = tenant(index, scenario_tenants);
            if let Some(from) = small_from
                && tenant > 0
            {
                start += from + SMALL_EVERY * u32::try_from(tenant).unwrap_or(0);
            }
            world.devices[index].began = start;
            world.at(start, Event::Arrive(index));
        }
        if world.scenario.strangers_per_second > 0 {
            world.at(Instant::ZERO, Event::Stranger);
        }
        world
    }

    fn at(&mut self, at: Instant, event: Event) {
        self.counter += 1;
        self.events.push(Reverse((at, self.counter, event)));
    }

    pub fn run(mut self) -> Report {
        while let Some(Reverse((now, _, event))) = self.events.pop() {
            if self.left == 0 || now > Instant::ZERO + HORIZON {
                break;
            }
            match event {
                Event::Arrive(index) => self.arrive(index, now),
                Event::Stranger => self.stranger(now),
                Event::Done(batch, is_answered) => {
                    let outcome = if is_answered {
                        Ok(())
                    } else {
                        Err(BatchFailure::TimedOut)
                    };
                    self.admission
                        .handle_batch_done(batch, outcome.map(|()| |_| Told::Found(())), now);
                }
                Event::Wake => self.admission.handle_timeout(now),
            }
            self.settle(now);
        }
        assert_eq!(
            self.left,
            0,
            "not back after {HORIZON:?}: {:?}",
            self.admission.state(Instant::ZERO + HORIZON)
        );
        let attempts: u32 = self.devices.iter().map(|device| device.attempts).sum();
        self.report.attempts = f64::from(attempts) / self.devices.len() as f64;
        self.report.attempts_max = self.devices.iter().map(|device| device.attempts).max().unwrap_or(0);
        self.report
    }

    fn arrive(&mut self, index: usize, now: Instant) {
        let device = &mut self.devices[index];
        device.attempts += 1;
        device.arrived = now;
        let arrival = Arrival {
            device: id(index),
            cohort: CohortTag::of(None, None),
            slot_token: device.token.as_deref().filter(|_| device.obeys),
            arrived: now,
            is_known_absent: false,
            proof: Proof::Secret,
            network: Network::V4(1),
        };
        match self.admission.attempt(&arrival, now, wall(now), &mut self.rng) {
            Decision::Queued(ticket) => drop(self.waiting.insert(ticket, index)),
            Decision::Refused(refused) => self.come_back(index, refused.hint, now),
            Decision::KnownAbsent => unreachable!("nobody said so"),
        }
    }

    fn come_back(&mut self, index: usize, hint: Hint, now: Instant) {
        let device = &mut self.devices[index];
        let noise = Duration::from_millis(self.rng.random_range(0..50));
        // It knows its round trip, as a device does that asks for the time; the request arrives at the slot.
        let wait = if device.obeys {
            hint.after.max(device.round_trip)
        } else {
            match self.scenario.habit {
                Habit::ObeysHints => hint.after,
                Habit::Fixed(wait) => wait + device.round_trip,
            }
        };
        device.token = hint.slot;
        self.at(now + wait + noise, Event::Arrive(index));
    }

    fn stranger(&mut self, now: Instant) {
        self.counter += 1;
        let arrival = Arrival {
            device: id(STRANGERS_FROM + self.counter as usize),
            cohort: CohortTag::of(None, None),
            slot_token: None,
            arrived: now,
            is_known_absent: false,
            proof: Proof::Secret,
            network: Network::V4(1),
        };
        if let Decision::Queued(ticket) = self.admission.attempt(&arrival, now, wall(now), &mut self.rng) {
            self.strangers.insert(ticket, now);
        }
        let gap = 1_000_000 / self.scenario.strangers_per_second as u64;
        self.at(now + Duration::from_micros(gap), Event::Stranger);
    }

    /// Sends what may be sent, and answers what is owed.
    fn settle(&mut self, now: Instant) {
        while let Some(batch) = self.admission.poll_batch(now) {
            let since_start = now.saturating_since(Instant::ZERO);
            let within =
                |span: Option<(Duration, Duration)>| span.is_some_and(|(from, to)| (from..to).contains(&since_start));
            let slower = if within(self.scenario.slow) { 4.0 } else { 1.0 };
            let noise = self.rng.random_range(0.8..1.2);
            let seconds = match self.scenario.curve {
                Curve::Flat => batch.keys.len() as f64 / (CAPACITY / 2.0),
                Curve::Knee => f64::from(self.admission.state(now).in_flight).max(KNEE) / CAPACITY,
            };
            let took = Duration::from_secs_f64(seconds * slower * noise);
            let timeout = Duration::from_secs(1);
            let is_dead = within(self.scenario.dead);
            let is_answered = !is_dead && took <= timeout;
            self.at(
                now + if is_answered { took } else { timeout },
                Event::Done(batch.id, is_answered),
            );
            let state = self.admission.state(now);
            assert!(state.in_flight <= state.limit);
            self.report.in_flight_max = self.report.in_flight_max.max(state.in_flight);
        }
        while let Some(action) = self.admission.poll_action(now, wall(now), &mut self.rng) {
            match action {
                Action::Answer { ticket, .. } => {
                    if let Some(index) = self.waiting.remove(&ticket) {
                        self.admission.handle_right_credential(ticket, now);
                        self.admit(index, now);
                    } else {
                        self.admission.handle_wrong_credential(ticket, now);
                        self.strangers.remove(&ticket).expect("answered once");
                    }
                }
                Action::Refuse { ticket, refused } => {
                    if let Some(index) = self.waiting.remove(&ticket) {
                        self.saw_answer(index, now);
                        self.come_back(index, refused.hint, now);
                    } else {
                        self.strangers.remove(&ticket).expect("answered once");
                    }
                }
            }
        }
        if let Some(due) = self.admission.poll_timeout(now) {
            // One wake-up at a time is enough: every event ends here.
            let is_earliest = self.events.peek().is_none_or(|Reverse((next, _, _))| due < *next);
            if is_earliest {
                self.at(due.max(now), Event::Wake);
            }
        }
    }

    fn saw_answer(&mut self, index: usize, now: Instant) {
        let wait = now.saturating_since(self.devices[index].arrived);
        assert!(wait < ANSWER_MAX, "answered after {wait:?}");
        self.report.wait_max = self.report.wait_max.max(wait);
    }

    fn admit(&mut self, index: usize, now: Instant) {
        self.saw_answer(index, now);
        let since_start = now.saturating_since(Instant::ZERO);
        let tenant = tenant(index, self.scenario.tenants);
        self.admission.handle_admitted(id(index), &format!("t{tenant}"));
        if tenant == 0
            && let Some(pause) = self.scenario.crashing
        {
            self.devices[index].token = None;
            return self.at(now + pause, Event::Arrive(index));
        }
        let device = &mut self.devices[index];
        device.back = Some(since_start);
        self.left -= 1;
        self.report.all_back = since_start;
        if device.obeys {
            self.report.obedient_back = since_start;
        }
        let began = device.began;
        self.report.waits[tenant].push(now.saturating_since(began));
    }
}

pub fn run(scenario: Scenario) -> Report {
    let report = World::new(scenario).run();
    println!(
        "back {:.2?} (obedient {:.2?}), {:.2} attempts (max {}), in flight {}, longest wait {:.2?}",
        report.all_back,
        report.obedient_back,
        report.attempts,
        report.attempts_max,
        report.in_flight_max,
        report.wait_max
    );
    report
}

pub fn assert_within(back: Duration, optimum: Duration, factor: f64) {
    let ratio = back.as_secs_f64() / optimum.as_secs_f64();
    assert!(ratio <= factor, "{back:?} is {ratio:.3} of the optimum {optimum:?}");
}
