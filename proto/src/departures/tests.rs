use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::id::SessionId;

/// A node in virtual time. Devices leave as soon as their session is closed.
struct Node {
    departures: Departures<u64>,
    now: Instant,
    capacity_per_second: f64,
    sessions: BTreeSet<u64>,
    evicted: BTreeSet<u64>,
    /// Opened at the start, and older than any life.
    is_aged: bool,
    /// Closes, in their order.
    closed: Vec<(Instant, u64, Departure)>,
    states: Vec<DrainState>,
    scans: usize,
}

impl Node {
    fn new(sessions: u64, capacity_per_second: f64) -> Self {
        Self {
            departures: Departures::new(None, Instant::ZERO),
            now: Instant::ZERO,
            capacity_per_second,
            sessions: (0..sessions).collect(),
            evicted: BTreeSet::new(),
            is_aged: false,
            closed: Vec::new(),
            states: Vec::new(),
            scans: 0,
        }
    }

    fn drain(&mut self, order: DrainOrder) {
        self.departures.handle_drain_started(order, self.now).unwrap();
    }

    fn evict(&mut self, sessions: impl IntoIterator<Item = u64>) {
        self.evicted = sessions.into_iter().collect();
        self.departures.handle_rules(self.now);
    }

    fn run_for(&mut self, span: Duration) {
        let end = self.now + span;
        for _ in 0..10_000_000 {
            match self.departures.poll_output(self.now) {
                Output::Drain(state) => self.states.push(state),
                Output::Scan(scan) => self.answer(scan),
                Output::Close(session, departure) => {
                    self.sessions.remove(&session);
                    self.closed.push((self.now, session, departure));
                }
                Output::Wait(at) => {
                    let at = at.unwrap_or(Instant::FAR_FUTURE);
                    if at > end {
                        self.now = end;
                        return;
                    }
                    self.now = at;
                }
            }
        }
        panic!("no end of outputs at {:?}", self.now);
    }

    fn answer(&mut self, scan: Scan) {
        self.scans += 1;
        let found = match scan {
            Scan::Left => self.sessions.iter().copied().collect(),
            Scan::Evicted => self.sessions.intersection(&self.evicted).copied().collect(),
            Scan::Aged(_) if self.is_aged => self.sessions.iter().copied().collect(),
            Scan::Aged(_) => Vec::new(),
        };
        self.departures.handle_found(scan, found, &self.load(), self.now);
    }

    fn load(&self) -> NodeLoad {
        NodeLoad {
            sessions: self.sessions.len(),
            capacity_per_second: self.capacity_per_second,
            is_calm: true,
        }
    }

    /// Seconds until the last close.
    fn last_close(&self) -> f64 {
        seconds(self.closed.last().unwrap().0)
    }

    /// Greatest number of closes at one time.
    fn burst_max(&self) -> usize {
        let mut at_once = BTreeMap::<_, usize>::new();
        for (at, ..) in &self.closed {
            *at_once.entry(at.as_micros()).or_default() += 1;
        }
        at_once.into_values().max().unwrap_or(0)
    }

    /// Seconds after which the first and the last device may have returned.
    fn back(&self) -> (f64, f64) {
        let back = |(at, _, departure): &(Instant, u64, Departure)| {
            let range = restart_range(departure);
            (seconds(*at + *range.start()), seconds(*at + *range.end()))
        };
        (back(&self.closed[0]).0, back(self.closed.last().unwrap()).1)
    }
}

fn seconds(at: Instant) -> f64 {
    at.saturating_since(Instant::ZERO).as_secs_f64()
}

fn restart_range(departure: &Departure) -> RangeInclusive<Duration> {
    match departure {
        Departure::Restart { back_within, .. } => back_within.clone(),
        Departure::Eviction => panic!("not a restart"),
    }
}

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

fn within(seconds: u64) -> DrainOrder {
    DrainOrder {
        rate_per_second: None,
        announce: Duration::ZERO,
        deadline: Duration::from_secs(seconds),
    }
}

fn at_rate(per_second: f64, order: DrainOrder) -> DrainOrder {
    DrainOrder {
        rate_per_second: Some(per_second),
        ..order
    }
}

fn drained(sessions: u64, capacity: f64, order: DrainOrder) -> Node {
    let mut node = Node::new(sessions, capacity);
    node.drain(order);
    node.run_for(order.deadline);
    assert_eq!(node.closed.len() as u64, sessions);
    node
}

#[test]
fn a_small_fleet_is_back_within_four_seconds_of_a_restart() {
    let (first, last) = drained(200, 2_000.0, within(25)).back();

    assert!(first >= 2.5 && last <= 3.8, "{first} to {last}");
}

#[test]
fn the_return_of_a_large_fleet_is_spread_by_its_size_and_the_capacity() {
    for sessions in [10_000_u32, 50_000] {
        let node = drained(sessions.into(), 1_000.0, within(25));
        let (first, last) = node.back();

        let spread = last - first - 1.0;
        assert!((spread - f64::from(sessions) / 1_000.0).abs() < 0.01, "{spread}");
    }
}

#[test]
fn no_device_comes_back_before_the_drain_has_ended() {
    let node = drained(10_000, 1_000.0, within(25));

    for (at, _, departure) in &node.closed {
        assert!(seconds(*at + *restart_range(departure).start()) > node.last_close());
    }
}

#[test]
fn nobody_waits_for_the_end_of_a_long_drain() {
    let mut node = Node::new(100_000, 10.0);

    node.drain(within(3_600));
    node.run_for(SECOND);

    for (.., departure) in &node.closed {
        assert_eq!(restart_range(departure), Peers::None.hint_range());
    }
}

#[test]
fn drain_closes_at_its_rate_and_never_in_a_burst() {
    let node = drained(1_000, 100.0, within(60));

    assert!((9.9..10.1).contains(&node.last_close()), "{}", node.last_close());
    assert!(node.burst_max() <= 25, "{} at once", node.burst_max());
}

#[test]
fn late_caller_closes_no_more_than_a_quarter_of_a_second_allows() {
    let mut node = Node::new(1_000, 100.0);
    node.drain(within(3_600));
    node.run_for(SECOND);
    let before = node.closed.len();

    node.now += Duration::from_secs(60);
    node.run_for(Duration::ZERO);

    assert!((1..=25).contains(&(node.closed.len() - before)));
}

#[test]
fn drain_is_done_two_seconds_before_its_deadline() {
    let node = drained(50_000, 10.0, within(25));

    assert!((22.0..=23.0).contains(&node.last_close()), "{}", node.last_close());
}

#[test]
fn expedited_drain_closes_what_is_left_at_once() {
    let mut node = Node::new(20, 100.0);
    node.drain(at_rate(1.0, within(25)));
    node.run_for(SECOND);
    assert_eq!(node.closed.len(), 2);

    let expedited_at = node.now;
    node.departures.handle_drain_expedited(expedited_at);
    let returns = node.departures.handle_registered(expedited_at).unwrap();
    node.run_for(Duration::from_millis(500));

    assert_eq!(node.closed.len(), 20);
    assert!(node.closed[2..].iter().all(|(at, ..)| *at == expedited_at));
    // Two devices have a time already, and return at the capacity.
    assert_eq!(*restart_range(&returns).start(), Duration::from_millis(2_520));
    assert_eq!(node.states, [DrainState::Draining, DrainState::Drained]);
}

#[test]
fn first_device_of_an_expedited_drain_is_told_the_time_of_a_restart() {
    let mut node = Node::new(20, 100.0);
    node.drain(at_rate(1.0, within(25)));
    assert_eq!(node.departures.poll_output(node.now), Output::Scan(Scan::Left));
    node.answer(Scan::Left);
    assert!(node.closed.is_empty());

    node.departures.handle_drain_expedited(node.now);
    node.run_for(Duration::ZERO);

    assert_eq!(node.closed.len(), 20);
    assert!(node.closed.iter().all(|(at, ..)| *at == Instant::ZERO));
    assert_eq!(*restart_range(&node.closed[0].2).start(), Duration::from_millis(2_500));
}

#[test]
fn announced_drain_closes_nobody_before_its_time_and_is_done_at_its_deadline_all_the_same() {
    let mut node = Node::new(1_000, 10.0);
    node.drain(DrainOrder {
        announce: 10 * SECOND,
        ..within(25)
    });

    node.run_for(Duration::from_millis(9_990));
    assert!(node.closed.is_empty() && node.departures.handle_registered(node.now).is_none());
    assert_eq!(node.departures.drain_status().state, DrainState::Announced);
    node.run_for(MINUTE);

    assert!((22.0..=23.0).contains(&node.last_close()), "{}", node.last_close());
    assert_eq!(
        node.states,
        [DrainState::Announced, DrainState::Draining, DrainState::Drained]
    );
}

#[test]
fn expedited_drain_skips_its_announcement() {
    let mut node = Node::new(20, 100.0);
    node.drain(DrainOrder {
        announce: MINUTE,
        ..within(120)
    });

    node.departures.handle_drain_expedited(node.now);
    node.run_for(SECOND);

    assert_eq!(node.closed.len(), 20);
}

#[test]
fn cancelled_drain_closes_nobody_any_more() {
    let mut node = Node::new(100, 100.0);
    node.drain(at_rate(1.0, within(3_600)));
    node.run_for(5 * SECOND);

    assert!(node.departures.handle_drain_cancelled());
    assert!(!node.departures.handle_drain_cancelled());
    node.run_for(MINUTE);

    assert_eq!(node.closed.len(), 6);
    assert_eq!(node.states, [DrainState::Draining, DrainState::Idle]);
    assert_eq!(node.departures.drain_status().state, DrainState::Idle);
    node.drain(within(25));
    node.run_for(MINUTE);
    assert!(node.sessions.is_empty());
}

#[test]
fn second_drain_is_refused() {
    let mut node = Node::new(1, 100.0);
    node.drain(within(25));

    let refused = node.departures.handle_drain_started(within(25), node.now);

    assert_eq!(refused, Err(AlreadyDraining));
}

#[test]
fn scan_of_a_cancelled_drain_does_not_begin_the_next_one() {
    let mut node = Node::new(100, 100.0);
    node.drain(within(25));
    node.departures.handle_drain_cancelled();
    node.drain(DrainOrder {
        announce: MINUTE,
        ..within(120)
    });

    node.answer(Scan::Left);
    node.run_for(SECOND);

    assert!(node.closed.is_empty());
    assert_eq!(node.departures.drain_status().sessions, None);
}

#[test]
fn session_that_registers_during_a_drain_is_closed_and_one_that_is_missed_is_found() {
    let mut node = Node::new(10, 100.0);
    assert!(node.departures.handle_registered(node.now).is_none());
    node.drain(within(25));
    node.run_for(Duration::ZERO);

    assert!(node.departures.handle_registered(node.now).is_some());
    node.sessions.insert(10);
    node.run_for(SECOND);

    assert_eq!(node.closed.len(), 11);
    assert_eq!(node.departures.drain_status().state, DrainState::Drained);
    assert!(node.departures.handle_registered(node.now).is_some());
}

#[test]
fn drain_has_not_ended_while_sessions_are_closing() {
    let mut node = Node::new(1, 100.0);
    node.drain(within(25));
    assert_eq!(node.departures.poll_output(node.now), Output::Scan(Scan::Left));

    for at in [0, 100] {
        let now = Instant::ZERO + Duration::from_millis(at);
        node.departures.handle_found(Scan::Left, Vec::new(), &node.load(), now);
        assert_eq!(node.departures.drain_status().state, DrainState::Draining);
    }
    node.sessions.clear();
    node.run_for(SECOND);

    assert_eq!(node.departures.drain_status().state, DrainState::Drained);
}

#[test]
fn scan_without_a_result_is_repeated() {
    let mut node = Node::new(10, 100.0);
    node.drain(within(60));
    assert_eq!(node.departures.poll_output(node.now), Output::Scan(Scan::Left));

    node.run_for(MINUTE);

    assert!(node.sessions.is_empty());
}

#[test]
fn evictions_stay_below_a_tenth_of_the_admission_rate() {
    for (sessions, capacity, expected) in [(1_000_000, 1_000.0, 100.0), (10, 1_000.0, 20.0), (10, 50.0, 5.0)] {
        let rate = eviction_rate_per_second(sessions, capacity);
        assert!((rate - expected).abs() < 1e-9, "{rate}");
    }
    let mut node = Node::new(1_000, 1_000.0);

    node.evict(0..1_000);
    node.run_for(MINUTE);

    assert!((49.0..51.0).contains(&node.last_close()), "{}", node.last_close());
    assert!(node.burst_max() <= 5, "{} at once", node.burst_max());
}

/// Within a minute, since that is less than a tenth of the admission rate.
#[test]
fn ten_thousand_are_evicted_at_the_planned_rate_in_every_second() {
    let mut node = Node::new(12_000, 2_000.0);
    node.evict(0..10_000);
    node.run_for(Duration::from_secs(1));
    let status = node.departures.eviction_status();
    let planned = eviction_rate_per_second(10_000, 2_000.0);
    assert_eq!((status.sessions, status.rate_per_second), (10_000, planned));

    node.run_for(Duration::from_secs(65));

    let closed: Vec<f64> = node.closed.iter().map(|(at, ..)| seconds(*at)).collect();
    assert_eq!(closed.len(), 10_000);
    let whole = closed.last().unwrap() - closed[0];
    assert!((54.0..=66.0).contains(&whole), "{whole} s");
    for second in 1..59 {
        let (begins, ends) = (closed[0] + f64::from(second), closed[0] + f64::from(second + 1));
        let rate = closed.iter().filter(|at| (begins..ends).contains(*at)).count() as f64;
        assert!(
            (rate / planned - 1.0).abs() <= 0.1,
            "second {second}: {rate} of {planned}"
        );
    }
    assert_eq!(node.departures.eviction_status(), EvictionStatus::default());
}

#[test]
fn cancelled_eviction_closes_nobody_any_more() {
    let mut node = Node::new(1_000, 2_000.0);
    node.evict(0..400);
    node.run_for(Duration::from_secs(5));
    let status = node.departures.eviction_status();
    assert_eq!(status.sessions, 400);
    assert_eq!(status.left + node.closed.len(), 400);

    // Its rule does not evict any more.
    node.evict([]);
    let closed = node.closed.len();
    node.run_for(Duration::from_secs(60));

    assert_eq!(node.closed.len(), closed);
    assert_eq!(node.departures.eviction_status(), EvictionStatus::default());
}

#[test]
fn changed_rules_evict_others_from_then_on_and_give_nobody_away_in_a_burst() {
    let mut node = Node::new(1_000, 1_000.0);
    node.evict(0..500);
    node.run_for(SECOND);
    let before = node.closed.len();

    for _ in 0..100 {
        node.evict(500..1_000);
        node.run_for(Duration::from_millis(1));
    }
    node.run_for(MINUTE);

    let later: Vec<_> = node.closed.split_off(before);
    assert!(later.iter().all(|(_, session, _)| *session >= 500));
    assert_eq!(later.len(), 500);
    let during = later.iter().filter(|(at, ..)| seconds(*at) <= 1.1).count();
    assert!(during <= 4, "{during}");
}

#[test]
fn eviction_looks_for_whom_it_missed_and_then_no_more() {
    let mut node = Node::new(100, 1_000.0);
    node.evict([0, 1, 2]);
    node.run_for(Duration::from_millis(50));
    node.evicted.insert(50);

    node.run_for(MINUTE);

    let closed: Vec<_> = node.closed.iter().map(|(_, session, _)| *session).collect();
    assert_eq!(closed, [0, 1, 2, 50]);
    assert_eq!(node.scans, 3);
}

#[test]
fn eviction_goes_on_during_a_drain() {
    let mut node = Node::new(100, 1_000.0);
    node.drain(at_rate(1.0, within(3_600)));
    node.evict(50..60);

    node.run_for(SECOND);

    let evicted = node.closed.iter().filter(|(.., how)| *how == Departure::Eviction);
    assert_eq!(evicted.count(), 10);
}

#[test]
fn old_sessions_end_at_a_thousandth_a_minute_and_none_during_a_drain() {
    let mut node = Node::new(10_000, 1_000.0);
    node.departures = Departures::new(Some(24 * 60 * MINUTE), node.now);
    node.is_aged = true;

    node.run_for(10 * MINUTE);
    let aged = node.closed.len();
    node.drain(DrainOrder {
        announce: 10 * MINUTE,
        ..within(3_600)
    });
    node.run_for(9 * MINUTE);
    assert_eq!(node.closed.len(), aged);
    node.departures.handle_drain_cancelled();
    node.run_for(MINUTE);

    assert!((85..=100).contains(&aged), "{aged}");
    assert!((7..=10).contains(&(node.closed.len() - aged)));
    let is_ageing =
        |departure: &Departure| matches!(departure, Departure::Restart { why, .. } if *why == Restart::Ageing);
    assert!(node.closed.iter().all(|(.., departure)| is_ageing(departure)));
}

#[test]
fn life_is_over_at_its_end_and_not_before() {
    let lives = Lives::new(MINUTE);
    let opened_at = Instant::ZERO + MINUTE;

    for session in (0..100).map(SessionId) {
        assert!(!lives.is_over(session, opened_at, opened_at + 44 * SECOND));
        assert!(lives.is_over(session, opened_at, opened_at + 76 * SECOND));
    }
}

#[test]
fn transitions_that_nobody_takes_are_bounded() {
    let mut node = Node::new(1, 100.0);

    for _ in 0..100 {
        node.drain(within(25));
        node.departures.handle_drain_cancelled();
    }
    node.run_for(SECOND);

    assert_eq!(node.states.len(), TRANSITIONS_MAX);
}

#[test]
fn scan_whose_result_was_lost_is_made_again_by_a_caller_that_was_restarted() {
    let mut node = Node::new(3, 100.0);
    node.drain(within(25));
    while !matches!(node.departures.poll_output(node.now), Output::Scan(Scan::Left)) {}

    node.departures.handle_restarted(node.now);
    node.run_for(Duration::from_secs(3));

    assert!(node.sessions.is_empty(), "{:?}", node.sessions);
}
