//! One cohort's lookups cost a hundred times the others': a small database in virtual time, production admission
//! in front.

use std::{cmp::Reverse, collections::BinaryHeap};

use super::*;
use crate::admission::cost::Transition;

const HEALTHY: &str = "3.8.0-b2";
const MARKED: &str = "3.8.0-b3";
const MARKED_TOO: &str = "3.8.0-b4";
/// Cost of a statement in addition to its keys.
const BASE: Duration = Duration::from_millis(1);

/// A fleet whose devices arrive one after the other, and a database with a time for each key.
struct World {
    node: Node,
    healthy_cost: Duration,
    marked_cost: Duration,
    events: BinaryHeap<Reverse<(Instant, u64)>>,
    in_flight: BTreeMap<u64, Batch>,
    arrived: BTreeMap<Ticket, (u128, Instant)>,
    counter: u64,
    devices: u64,
    /// Whether every other marked device is of a second version.
    has_second: bool,
    now: Instant,
    /// Waiting times of admitted devices, healthy and marked.
    waits: [Vec<Duration>; 2],
    refused: [usize; 2],
    moves: Vec<(Instant, usize)>,
}

fn is_marked(n: u128) -> bool {
    n % 1_000_000 >= 500_000
}

fn firmware(n: u128) -> &'static str {
    match n % 1_000_000 {
        750_000.. => MARKED_TOO,
        500_000.. => MARKED,
        _ => HEALTHY,
    }
}

impl World {
    fn new() -> Self {
        Self {
            node: Node::new(),
            healthy_cost: Duration::from_micros(200),
            marked_cost: Duration::from_millis(90),
            events: BinaryHeap::new(),
            in_flight: BTreeMap::new(),
            arrived: BTreeMap::new(),
            counter: 0,
            devices: 0,
            has_second: false,
            now: at(0),
            waits: [Vec::new(), Vec::new()],
            refused: [0, 0],
            moves: Vec::new(),
        }
    }

    /// `per_second` devices arrive for `span`; each `marked_of`-th is marked (0: none).
    fn arrivals(&mut self, per_second: u64, marked_of: u64, span: Duration) {
        self.arrivals_every(Duration::from_micros(1_000_000 / per_second), marked_of, span);
    }

    /// The same with one device in each `gap`.
    fn arrivals_every(&mut self, gap: Duration, marked_of: u64, span: Duration) {
        let end = self.now + span;
        let mut next = self.now;
        while next < end {
            self.run_until(next);
            self.devices += 1;
            let n = u128::from(self.devices);
            let marked = marked_of > 0 && self.devices.is_multiple_of(marked_of);
            let second = self.has_second && self.devices.is_multiple_of(2 * marked_of);
            let probe = match (marked, second) {
                (true, true) => 750_000,
                (true, false) => 500_000,
                (false, _) => 0,
            };
            self.arrive(n * 1_000_000 + probe);
            next += gap;
        }
        self.run_until(end);
    }

    fn arrive(&mut self, n: u128) {
        self.node.slots.handle_admitted(device(n), "default");
        let arrival = Arrival {
            device: device(n),
            cohort: CohortTag::of(None, Some(firmware(n))),
            slot_token: None,
            arrived: self.now,
            is_known_absent: false,
            credential: secret(),
            network: Network::V4(1),
        };
        let now = self.now;
        match self.node.arrive(&arrival, now) {
            Decision::Queued(ticket) => drop(self.arrived.insert(ticket, (n, now))),
            Decision::Refused(_) => self.refused[usize::from(is_marked(n))] += 1,
            Decision::KnownAbsent => unreachable!("nobody said so"),
        }
        self.settle();
    }

    /// A statement's time, at most the maximum.
    fn took(&self, batch: &Batch) -> Duration {
        let cost = |key: &DeviceId| {
            if is_marked(key.as_uuid().as_u128() - 1) {
                self.marked_cost
            } else {
                self.healthy_cost
            }
        };
        (BASE + batch.keys.iter().map(cost).sum::<Duration>()).min(LOOKUP_MAX)
    }

    fn settle(&mut self) {
        for batch in self.node.batches(self.now) {
            let took = self.took(&batch);
            self.counter += 1;
            self.events.push(Reverse((self.now + took, self.counter)));
            self.in_flight.insert(self.counter, batch);
        }
        let state = self.node.admission.state(self.now);
        assert!(state.in_flight <= state.limit);
        if self.moves.last().is_none_or(|(_, apart)| *apart != state.cohorts_apart) {
            self.moves.push((self.now, state.cohorts_apart));
        }
        for action in self.node.actions(self.now) {
            match action {
                Output::Answer { ticket, .. } => {
                    let (n, arrived) = self.arrived.remove(&ticket).unwrap();
                    self.waits[usize::from(is_marked(n))].push(self.now.saturating_since(arrived));
                }
                Output::Refuse { ticket, .. } => {
                    let (n, _) = self.arrived.remove(&ticket).unwrap();
                    self.refused[usize::from(is_marked(n))] += 1;
                }
                Output::Send(_) | Output::Wait(_) => unreachable!("no action: {action:?}"),
            }
        }
    }

    fn run_until(&mut self, end: Instant) {
        while let Some(Reverse((at, id))) = self.events.peek().copied().filter(|Reverse((at, _))| *at <= end) {
            self.events.pop();
            self.now = at;
            let batch = self.in_flight.remove(&id).unwrap();
            let took = self.took(&batch);
            let outcome = if took == LOOKUP_MAX {
                Err(BatchFailure::TimedOut)
            } else {
                Ok(())
            };
            self.node
                .admission
                .handle_batch_done(batch.id, outcome.map(|()| |_| Told::Found(())), at);
            self.settle();
        }
        self.now = end;
        self.settle();
    }

    fn forget(&mut self) {
        self.waits = [Vec::new(), Vec::new()];
        self.refused = [0, 0];
    }

    fn healthy_p99(&mut self) -> Duration {
        let waits = &mut self.waits[0];
        waits.sort_unstable();
        waits[(waits.len() * 99).div_ceil(100) - 1]
    }

    fn apart(&self) -> usize {
        self.node.admission.state(self.now).cohorts_apart
    }
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[test]
fn healthy_devices_do_not_wait_for_a_costly_cohort_that_grows() {
    let mut world = World::new();
    world.arrivals(100, 0, secs(20));
    let calm = world.healthy_p99();

    world.forget();
    for marked_of in [50, 20, 10, 5, 4] {
        world.arrivals(100, marked_of, secs(10));
    }

    assert_eq!(world.apart(), 1, "{:?}", world.moves);
    assert!(
        world.healthy_p99() <= calm * 2,
        "{:?}, calm {calm:?}",
        world.healthy_p99()
    );
    assert_eq!(world.refused[0], 0, "healthy ones");
    let costly = world.waits[1].len();
    assert!(
        (100..=139).contains(&costly),
        "{costly} costly ones are served in a quarter of 50 s at 90 ms each"
    );
}

#[test]
fn database_has_no_time_to_spare_while_a_cohort_is_costly() {
    let mut world = World::new();
    world.arrivals(20, 0, secs(10));
    let calm = world.node.admission.state(world.now);

    world.arrivals(20, 2, secs(20));
    let costly = world.node.admission.state(world.now);

    assert_eq!((calm.cohorts_apart, calm.has_time_to_spare()), (0, true), "{calm:?}");
    assert_eq!(
        (costly.cohorts_apart, costly.has_time_to_spare()),
        (1, false),
        "{costly:?}"
    );
    let idle = AdmissionState { queue: 0, ..costly };
    assert!(!idle.has_time_to_spare(), "however short the queue is");
}

/// Time until a cohort that a fifth of all devices are of is isolated, in a storm of ten seconds.
fn found_in_a_storm(world: &mut World) -> Duration {
    let begun = world.now;
    world.arrivals(400, 5, secs(10));
    let found = world.moves.iter().find(|(at, apart)| *at >= begun && *apart == 1);
    let (found, _) = found.unwrap_or_else(|| panic!("not isolated: {:?}", world.moves));
    found.saturating_since(begun)
}

#[test]
fn node_that_was_calm_for_a_week_isolates_a_costly_cohort_as_fast_as_a_fresh_one() {
    let mut fresh = World::new();
    fresh.arrivals(100, 0, secs(2));
    let mut calm = World::new();
    // A storm, so that statements of all sizes are known, then a lookup a minute.
    calm.arrivals(2_000, 0, secs(5));
    calm.arrivals_every(secs(60), 0, secs(7 * 24 * 3_600));

    let (fresh, calm) = (found_in_a_storm(&mut fresh), found_in_a_storm(&mut calm));

    assert!(calm <= fresh + secs(1), "{calm:?}, on a fresh node {fresh:?}");
}

#[test]
fn second_costly_cohort_is_found_while_the_first_is_apart() {
    let mut world = World::new();
    world.arrivals(100, 5, secs(10));
    assert_eq!(world.apart(), 1, "{:?}", world.moves);

    world.has_second = true;
    world.arrivals(400, 2, secs(5));
    world.forget();
    world.arrivals(400, 2, secs(5));

    assert_eq!(world.apart(), 2, "{:?}", world.moves);
    let (found, _) = *world.moves.last().unwrap();
    assert!(
        found < at(12_000),
        "it waits for no idle span of the first one: {:?}",
        world.moves
    );
    assert!(
        world.healthy_p99() < Duration::from_millis(100),
        "{:?}",
        world.healthy_p99()
    );
}

#[test]
fn costly_cohort_is_found_in_the_middle_of_a_storm() {
    let mut world = World::new();
    world.arrivals(100, 0, secs(2));

    world.arrivals(1_000, 4, secs(5));
    world.forget();
    world.arrivals(1_000, 4, secs(5));

    assert_eq!(world.apart(), 1, "{:?}", world.moves);
    assert_eq!(world.refused[0], 0, "healthy ones");
    assert!(
        world.healthy_p99() < Duration::from_millis(100),
        "{:?}",
        world.healthy_p99()
    );
}

#[test]
fn costly_cohort_that_most_devices_are_of_is_set_apart_too() {
    let mut world = World::new();
    world.arrivals(100, 0, secs(2));

    // Of two arrivals one is marked; they come too fast for the database by far.
    world.arrivals(500, 2, secs(10));
    world.forget();
    world.arrivals(500, 2, secs(5));

    assert_eq!(world.refused[0], 0, "healthy ones");
    assert!(
        world.healthy_p99() < Duration::from_millis(100),
        "{:?}",
        world.healthy_p99()
    );
}

#[test]
fn database_slow_for_all_isolates_no_cohort() {
    let mut world = World::new();
    world.marked_cost = world.healthy_cost;
    world.arrivals(200, 4, secs(5));
    world.healthy_cost *= 60;
    world.marked_cost *= 60;
    world.forget();

    world.arrivals(120, 4, secs(60));

    assert!(world.moves.iter().all(|(_, apart)| *apart == 0), "{:?}", world.moves);
    let answered = world.waits[0].len() + world.waits[1].len();
    assert!(answered > 120 * 60 * 9 / 10, "{answered} of {}", 120 * 60);
}

#[test]
fn cohort_that_is_no_longer_costly_goes_back() {
    let mut world = World::new();
    world.arrivals(100, 10, secs(10));
    assert_eq!(world.apart(), 1, "{:?}", world.moves);

    world.marked_cost = world.healthy_cost;
    world.arrivals(100, 10, secs(5));

    assert_eq!(world.apart(), 0);
}

#[test]
fn fleet_of_one_cohort_is_never_set_apart() {
    let mut world = World::new();
    world.arrivals(100, 0, secs(5));
    world.healthy_cost *= 100;

    world.arrivals(100, 0, secs(20));

    assert!(world.moves.iter().all(|(_, apart)| *apart == 0));
}

#[test]
fn invented_cohorts_are_bounded_and_do_not_hide_a_costly_one() {
    let mut costs = Costs::default();
    let marked = CohortTag::of(None, Some(MARKED));
    let mut apart = None;
    for n in 0..5_000_u64 {
        let invented = CohortTag::of(None, Some(&n.to_string()));
        let (cohort, took) = match n % 100 {
            0 => (marked, Duration::from_millis(90)),
            _ => (invented, BASE),
        };
        apart = apart.or(costs.handle_shared(&[(cohort, 1)], took, at(n)));
        assert!(costs.watched() <= 1_024);
    }

    assert_eq!(apart, Some(Transition::Isolated(marked)));
}

#[test]
fn slots_of_a_cohort_apart_are_as_far_apart_as_its_look_ups() {
    let mut world = World::new();
    world.arrivals(100, 10, secs(10));
    let now = world.now;
    let mut hint = |firmware, n| {
        let arrival = Arrival {
            device: device(n),
            cohort: CohortTag::of(None, Some(firmware)),
            slot_token: None,
            arrived: now,
            is_known_absent: false,
            credential: secret(),
            network: Network::V4(1),
        };
        match world.node.arrive(&arrival, now) {
            Decision::Refused(refused) => Some(refused.hint.after),
            Decision::Queued(_) | Decision::KnownAbsent => None,
        }
    };

    let marked: Vec<Duration> = (0..100).filter_map(|n| hint(MARKED, n * 1_000_000 + 500_000)).collect();
    let healthy: Vec<Duration> = (0..5_000).filter_map(|n| hint(HEALTHY, n * 1_000_000)).collect();

    let (nearest, farthest) = (marked.first().unwrap(), marked.last().unwrap());
    assert!(*farthest - *nearest > secs(5), "{nearest:?} to {farthest:?}");
    assert!(*healthy.last().unwrap() < secs(2), "{:?}", healthy.last());
}

#[test]
fn database_whose_times_differ_by_chance_puts_hardly_a_cohort_on_probation() {
    let mut costs = Costs::default();
    let mut rng = SmallRng::seed_from_u64(1);
    let cohorts = [
        (CohortTag::of(None, Some(HEALTHY)), 48),
        (CohortTag::of(None, Some(MARKED)), 12),
    ];
    let mut now = at(0);
    let mut probations = 0;

    for _ in 0..50_000 {
        // Exponential, 20 ms on average: the fastest takes microseconds.
        let took = Duration::from_secs_f64(0.02 * -(1.0 - rng.random::<f64>()).ln());
        now += took;
        costs.handle_timeout(now);
        probations += usize::from(costs.handle_shared(&cohorts, took, now).is_some());
    }

    // A statement is slow with a chance of 1 in 50, and three in a row bring suspicion.
    assert!(probations <= 10, "{probations} probations in 50,000 statements");
}
