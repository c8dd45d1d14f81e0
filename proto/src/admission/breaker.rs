//! The breaker: while the database does not answer, no device waits for it. Probes that carry no device find out
//! when it does.
//!
//! It opens when statements for devices fail, or on a report of the gateway's other calls: while no device connects,
//! they notice an outage first. A report has less weight, because those calls have connections and tables of their own:
//! see [`Registry::Suspected`].

use std::{collections::VecDeque, time::Duration};

use rand::Rng;

use crate::time::Instant;

/// Span over which failures are counted.
const WINDOW: Duration = Duration::from_secs(1);
/// Minimum number of outcomes in the window, whatever their age: one failure after an answer is not an outage.
const OUTCOMES_MIN: usize = 2;
/// Maximum number of outcomes that are kept. With two statements at a time it is hardly ever reached.
const OUTCOMES_MAX: usize = 4_096;
/// Time between two probes that fail. An answered probe is followed by the next one at once.
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// Probes in a row that close the breaker. See docs/design/admission.md.
const PROBE_SUCCESSES: u8 = 3;
/// Maximum of the shortest hint, which grows with the age of the outage.
const FLOOR_MAX: Duration = Duration::from_secs(30);
/// Part of the outage's age that the shortest hint is: a small fleet is away for at most this much longer than the
/// outage.
const FLOOR_PART: u32 = 4;

crate::labels! {
    /// State of the breaker.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub enum BreakerState {
        /// Lookups go through.
        Closed = "closed",
        /// The registry failed: every device is refused at once, and one probe a second is sent.
        Open = "open",
        /// A probe was answered: more follow, devices are still refused.
        HalfOpen = "half_open",
        /// There was no contact yet: every device is refused at once, and no probe is sent.
        Absent = "absent",
    }
}

/// State of the registry as reported by calls other than lookups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registry {
    /// There was no contact yet: every device is refused at once.
    Absent,
    /// There was a first contact: lookups go through once a few probes are answered.
    Present,
    /// Calls other than lookups had no answer. If no lookup was answered within the last second either, every device is
    /// refused at once, until probes are answered.
    Suspected,
    /// Calls other than lookups are answered.
    Confirmed,
}

/// Result of the [`Registry::Suspected`] and [`Registry::Confirmed`] reports so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Suspicion {
    None,
    Held,
    /// Probes were answered nevertheless: only statements are considered until the next [`Registry::Confirmed`].
    Refuted,
}

#[derive(Debug)]
pub(super) struct Breaker {
    state: BreakerState,
    /// Whether it was closed since the last [`Registry::Absent`].
    had_contact: bool,
    /// Time at which it left `Closed`.
    since: Instant,
    outcomes: VecDeque<(Instant, bool)>,
    failures: usize,
    probes_answered: u8,
    next_probe: Instant,
    is_probing: bool,
    suspicion: Suspicion,
    /// Time of the last answer to a statement.
    answered_at: Option<Instant>,
}

impl Breaker {
    pub const fn new(now: Instant) -> Self {
        Self {
            state: BreakerState::Closed,
            had_contact: true,
            since: now,
            outcomes: VecDeque::new(),
            failures: 0,
            probes_answered: 0,
            next_probe: now,
            is_probing: false,
            suspicion: Suspicion::None,
            answered_at: None,
        }
    }

    pub const fn state(&self) -> BreakerState {
        self.state
    }

    pub const fn had_contact(&self) -> bool {
        self.had_contact
    }

    pub fn is_closed(&self) -> bool {
        self.state == BreakerState::Closed
    }

    /// A statement for devices ended. Returns whether that opened the breaker: more than half of the last second's
    /// failed.
    pub fn handle_outcome(&mut self, is_answered: bool, now: Instant) -> bool {
        self.note_answer(is_answered, now);
        if self.state != BreakerState::Closed {
            return false;
        }
        self.outcomes.push_back((now, is_answered));
        self.failures += usize::from(!is_answered);
        while self.outcomes.front().is_some_and(|(at, _)| {
            let is_old = *at + WINDOW < now && self.outcomes.len() > OUTCOMES_MIN;
            is_old || self.outcomes.len() > OUTCOMES_MAX
        }) {
            let oldest = self.outcomes.pop_front();
            self.failures -= usize::from(oldest.is_some_and(|(_, was_answered)| !was_answered));
        }
        if is_answered || self.failures * 2 <= self.outcomes.len() {
            return false;
        }
        self.leave_closed(BreakerState::Open, now);
        true
    }

    /// Returns whether the report opened the breaker.
    pub fn handle_registry(&mut self, registry: Registry, now: Instant) -> bool {
        match registry {
            Registry::Absent => {
                self.had_contact = false;
                let was_closed = self.is_closed();
                if was_closed {
                    self.leave_closed(BreakerState::Absent, now);
                } else {
                    self.state = BreakerState::Absent;
                }
                was_closed
            }
            Registry::Present => {
                if self.state == BreakerState::Absent {
                    self.state = BreakerState::Open;
                    self.next_probe = now;
                }
                false
            }
            Registry::Suspected if self.suspicion == Suspicion::Refuted => false,
            Registry::Suspected => {
                self.suspicion = Suspicion::Held;
                // A statement that was answered within the last second has more weight.
                let is_served = self.answered_at.is_some_and(|at| now < at + WINDOW);
                let opens = self.is_closed() && !is_served;
                if opens {
                    self.leave_closed(BreakerState::Open, now);
                }
                opens
            }
            Registry::Confirmed => {
                self.suspicion = Suspicion::None;
                false
            }
        }
    }

    pub fn is_suspected(&self) -> bool {
        self.suspicion == Suspicion::Held
    }

    /// A probe ended. Returns whether that closed the breaker.
    pub fn handle_probed(&mut self, is_answered: bool, now: Instant) -> bool {
        self.is_probing = false;
        self.note_answer(is_answered, now);
        match self.state {
            BreakerState::Closed | BreakerState::Absent => return false,
            BreakerState::Open | BreakerState::HalfOpen if is_answered => {
                self.probes_answered += 1;
                self.next_probe = now;
                self.state = if self.probes_answered >= PROBE_SUCCESSES {
                    BreakerState::Closed
                } else {
                    BreakerState::HalfOpen
                };
            }
            BreakerState::Open | BreakerState::HalfOpen => {
                self.probes_answered = 0;
                self.state = BreakerState::Open;
            }
        }
        self.had_contact |= self.is_closed();
        let is_refuted = self.is_closed() && self.suspicion == Suspicion::Held;
        if is_refuted {
            self.suspicion = Suspicion::Refuted;
        }
        self.is_closed()
    }

    /// Marks a due probe as sent. Returns whether there was one.
    pub fn take_probe(&mut self, now: Instant) -> bool {
        let is_due = self.poll_timeout().is_some_and(|due| now >= due);
        if is_due {
            self.is_probing = true;
            self.next_probe = now + PROBE_EVERY;
        }
        is_due
    }

    /// Time of the next probe.
    pub const fn poll_timeout(&self) -> Option<Instant> {
        match self.state {
            BreakerState::Open | BreakerState::HalfOpen if !self.is_probing => Some(self.next_probe),
            BreakerState::Open | BreakerState::HalfOpen | BreakerState::Closed | BreakerState::Absent => None,
        }
    }

    /// Shortest hint now. It grows with the outage, so that a short virtual queue does not send the same few
    /// devices away again and again.
    pub fn floor(&self, now: Instant, rng: &mut impl Rng) -> Duration {
        if self.is_closed() {
            return Duration::ZERO;
        }
        let floor = (now.saturating_since(self.since) / FLOOR_PART).min(FLOOR_MAX);
        floor.mul_f64(rng.random_range(0.5..=1.0))
    }

    fn note_answer(&mut self, is_answered: bool, now: Instant) {
        if is_answered {
            self.answered_at = Some(now);
        }
    }

    fn leave_closed(&mut self, state: BreakerState, now: Instant) {
        self.state = state;
        self.since = now;
        self.outcomes.clear();
        self.failures = 0;
        self.probes_answered = 0;
        // A probe at once: a single failed statement must not keep devices out for a second.
        self.next_probe = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Instant {
        Instant::from_micros(ms * 1_000)
    }

    #[test]
    fn a_few_failures_among_many_answers_change_nothing() {
        let mut breaker = Breaker::new(at(0));

        let opened = (0..100).any(|n| breaker.handle_outcome(n % 3 != 1, at(n * 5)));

        assert!(!opened);
    }

    #[test]
    fn opens_as_soon_as_most_statements_of_a_second_fail() {
        let mut breaker = Breaker::new(at(0));
        for n in 0..100 {
            breaker.handle_outcome(true, at(n));
        }

        let opened_after = (0..200).position(|n| breaker.handle_outcome(false, at(2_000 + n)));

        assert_eq!(
            opened_after,
            Some(1),
            "but for the last, the answers are older than a second"
        );
    }

    #[test]
    fn single_failure_after_an_answer_is_no_outage_however_rare_statements_are() {
        let mut breaker = Breaker::new(at(0));

        for minute in 0..10 {
            let now = at(minute * 60_000);
            assert!(!breaker.handle_outcome(true, now));
            assert!(!breaker.handle_outcome(false, now + Duration::from_secs(30)));
        }

        assert!(breaker.handle_outcome(false, at(600_000)), "the second in a row");
    }

    #[test]
    fn probes_come_once_a_second_until_three_are_answered() {
        let mut breaker = Breaker::new(at(0));
        breaker.handle_outcome(false, at(0));
        for second in 0..5 {
            assert!(breaker.take_probe(at(second * 1_000)));
            assert!(!breaker.take_probe(at(second * 1_000)), "one at a time");
            breaker.handle_probed(false, at(second * 1_000 + 10));
            assert!(!breaker.take_probe(at(second * 1_000 + 999)));
        }

        for answered in 1..=3 {
            assert!(breaker.take_probe(at(5_000 + answered)));
            assert!(!breaker.is_closed());
            breaker.handle_probed(true, at(5_000 + answered));
        }

        assert!(breaker.is_closed());
        assert_eq!(breaker.poll_timeout(), None);
    }

    /// Answers as many probes as close it.
    fn answer_probes(breaker: &mut Breaker, now: Instant) {
        for _ in 0..PROBE_SUCCESSES {
            assert!(breaker.take_probe(now));
            breaker.handle_probed(true, now);
        }
        assert!(breaker.is_closed());
    }

    #[test]
    fn opens_where_others_had_no_answer_and_nobody_asked_for_a_device() {
        let mut breaker = Breaker::new(at(0));
        breaker.handle_outcome(true, at(0));

        assert!(breaker.handle_registry(Registry::Suspected, at(1_000)));
        assert!(
            !breaker.handle_registry(Registry::Suspected, at(1_400)),
            "it is open already"
        );

        answer_probes(&mut breaker, at(5_000));
    }

    #[test]
    fn statement_answered_lately_counts_for_more_than_what_others_say() {
        let mut breaker = Breaker::new(at(0));
        for ms in (0..10_000).step_by(900) {
            breaker.handle_outcome(true, at(ms));
            assert!(!breaker.handle_registry(Registry::Suspected, at(ms + 899)));
        }

        assert!(
            breaker.handle_registry(Registry::Suspected, at(10_900)),
            "the last one is a second ago"
        );
    }

    #[test]
    fn what_probes_have_refuted_is_not_believed_again_until_it_was_taken_back() {
        let mut breaker = Breaker::new(at(0));
        assert!(breaker.handle_registry(Registry::Suspected, at(0)));
        answer_probes(&mut breaker, at(3));
        assert!(!(1..60).any(|second| breaker.handle_registry(Registry::Suspected, at(second * 1_000))));

        breaker.handle_registry(Registry::Confirmed, at(0));

        assert!(breaker.handle_registry(Registry::Suspected, at(60_000)));
    }

    #[test]
    fn what_was_taken_back_before_the_probes_were_answered_is_believed_the_next_time() {
        let mut breaker = Breaker::new(at(0));
        breaker.handle_registry(Registry::Suspected, at(0));
        breaker.handle_registry(Registry::Confirmed, at(0));
        answer_probes(&mut breaker, at(3));

        assert!(breaker.handle_registry(Registry::Suspected, at(10_000)));
    }

    #[test]
    fn absent_registry_is_not_probed_until_it_is_said_to_be_there() {
        let mut breaker = Breaker::new(at(0));
        assert!(breaker.handle_registry(Registry::Absent, at(0)));
        assert!(!breaker.take_probe(at(60_000)));

        breaker.handle_registry(Registry::Present, at(61_000));

        assert!(breaker.take_probe(at(61_000)));
        breaker.handle_probed(true, at(61_001));
        assert!(!breaker.had_contact(), "one answer is not enough");
        for _ in 1..PROBE_SUCCESSES {
            assert!(breaker.take_probe(at(61_001)));
            breaker.handle_probed(true, at(61_001));
        }
        assert!(breaker.had_contact() && breaker.is_closed());
        for n in 0..2 {
            breaker.handle_outcome(false, at(62_000 + n));
        }
        assert!(breaker.had_contact() && !breaker.is_closed());
    }
}
