//! The breaker: while the database is away nobody waits for it. Probes, that carry no device, find out when it is back.
//!
//! It opens by what becomes of statements for devices, or on the word of the gateway's other calls: where no device comes, they are
//! the first to know. Their word is weaker, since they have connections and tables of their own: see [`Word`].

use std::{collections::VecDeque, time::Duration};

use rand::Rng;

use crate::time::Instant;

/// Outcomes of statements are judged over this span.
const WINDOW: Duration = Duration::from_secs(1);
/// The last so many count however old they are: one failure after an answer is no outage.
const OUTCOMES_MIN: usize = 2;
/// Outcomes kept; older ones go. Two statements under way at a time can hardly reach it.
const OUTCOMES_MAX: usize = 4_096;
/// Time between two probes that fail. One that succeeds is followed by the next at once.
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// Probes in a row that close the breaker. overload.md section 1.
const PROBE_SUCCESSES: u8 = 3;
/// Hints grow with the age of the outage up to this,
const FLOOR_MAX: Duration = Duration::from_secs(30);
/// by this part of it: so much longer than the outage a small fleet is away, at most.
const FLOOR_PART: u32 = 4;

/// What the breaker says of the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BreakerState {
    /// Look-ups go through.
    Closed,
    /// The registry failed: every device is refused at once, one probe a second is sent.
    Open,
    /// A probe was answered: more follow, devices are still refused.
    HalfOpen,
    /// There was no contact yet: refused at once, and no probes, until the registry is said to be there.
    Absent,
}

impl BreakerState {
    pub const ALL: [Self; 4] = [Self::Closed, Self::Open, Self::HalfOpen, Self::Absent];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
            Self::Absent => "absent",
        }
    }
}

/// What the gateway's other calls to the database say of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    /// Nothing that matters.
    None,
    /// It gives no answer.
    Away,
    /// The same, and probes were answered all the same: from then on statements alone count.
    Refuted,
}

#[derive(Debug)]
pub(super) struct Breaker {
    state: BreakerState,
    /// When it left `Closed`.
    since: Instant,
    outcomes: VecDeque<(Instant, bool)>,
    failures: usize,
    probes_answered: u8,
    next_probe: Instant,
    is_probing: bool,
    word: Word,
    /// When a statement was answered last.
    answered_at: Option<Instant>,
}

impl Breaker {
    pub const fn new(now: Instant) -> Self {
        Self {
            state: BreakerState::Closed,
            since: now,
            outcomes: VecDeque::new(),
            failures: 0,
            probes_answered: 0,
            next_probe: now,
            is_probing: false,
            word: Word::None,
            answered_at: None,
        }
    }

    pub const fn state(&self) -> BreakerState {
        self.state
    }

    pub fn is_closed(&self) -> bool {
        self.state == BreakerState::Closed
    }

    /// A statement for devices ended. True if that opened the breaker: more than half of the last second's failed.
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

    /// There is no contact with the registry yet. True if that stopped look-ups.
    pub fn handle_absent(&mut self, now: Instant) -> bool {
        let was_closed = self.is_closed();
        if was_closed {
            self.leave_closed(BreakerState::Absent, now);
        } else {
            self.state = BreakerState::Absent;
        }
        was_closed
    }

    /// The registry is there for the first time: probes decide.
    pub fn handle_present(&mut self, now: Instant) {
        if self.state == BreakerState::Absent {
            self.state = BreakerState::Open;
            self.next_probe = now;
        }
    }

    /// Another call to the registry had no answer. True if that opened the breaker: a statement that was answered within the last
    /// second counts for more.
    pub fn handle_said_away(&mut self, now: Instant) -> bool {
        if self.word == Word::Refuted {
            return false;
        }
        self.word = Word::Away;
        let is_served = self.answered_at.is_some_and(|at| now < at + WINDOW);
        let opens = self.is_closed() && !is_served;
        if opens {
            self.leave_closed(BreakerState::Open, now);
        }
        opens
    }

    pub fn is_said_away(&self) -> bool {
        self.word == Word::Away
    }

    /// The registry's other callers are answered.
    pub const fn handle_said_there(&mut self) {
        self.word = Word::None;
    }

    /// A probe was answered, or not. True if that closed the breaker.
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
        let is_refuted = self.is_closed() && self.word == Word::Away;
        if is_refuted {
            self.word = Word::Refuted;
        }
        self.is_closed()
    }

    /// Whether a probe is due; it counts as sent.
    pub fn take_probe(&mut self, now: Instant) -> bool {
        let is_due = self.poll_timeout().is_some_and(|due| now >= due);
        if is_due {
            self.is_probing = true;
            self.next_probe = now + PROBE_EVERY;
        }
        is_due
    }

    /// When the next probe is due.
    pub const fn poll_timeout(&self) -> Option<Instant> {
        match self.state {
            BreakerState::Open | BreakerState::HalfOpen if !self.is_probing => Some(self.next_probe),
            BreakerState::Open | BreakerState::HalfOpen | BreakerState::Closed | BreakerState::Absent => None,
        }
    }

    /// The shortest hint now: longer, the longer the outage lasts, so that a short queue doesn't bounce the same few devices.
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
        // A probe at once: a single bad statement must not shut devices out for a second.
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

    /// As many probes as close it.
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

        assert!(breaker.handle_said_away(at(1_000)));
        assert!(!breaker.handle_said_away(at(1_400)), "it is open already");

        answer_probes(&mut breaker, at(5_000));
    }

    #[test]
    fn statement_answered_lately_counts_for_more_than_what_others_say() {
        let mut breaker = Breaker::new(at(0));
        for ms in (0..10_000).step_by(900) {
            breaker.handle_outcome(true, at(ms));
            assert!(!breaker.handle_said_away(at(ms + 899)));
        }

        assert!(breaker.handle_said_away(at(10_900)), "the last one is a second ago");
    }

    #[test]
    fn what_probes_have_refuted_is_not_believed_again_until_it_was_taken_back() {
        let mut breaker = Breaker::new(at(0));
        assert!(breaker.handle_said_away(at(0)));
        answer_probes(&mut breaker, at(3));
        assert!(!(1..60).any(|second| breaker.handle_said_away(at(second * 1_000))));

        breaker.handle_said_there();

        assert!(breaker.handle_said_away(at(60_000)));
    }

    #[test]
    fn what_was_taken_back_before_the_probes_were_answered_is_believed_the_next_time() {
        let mut breaker = Breaker::new(at(0));
        breaker.handle_said_away(at(0));
        breaker.handle_said_there();
        answer_probes(&mut breaker, at(3));

        assert!(breaker.handle_said_away(at(10_000)));
    }

    #[test]
    fn absent_registry_is_not_probed_until_it_is_said_to_be_there() {
        let mut breaker = Breaker::new(at(0));
        assert!(breaker.handle_absent(at(0)));
        assert!(!breaker.take_probe(at(60_000)));

        breaker.handle_present(at(61_000));

        assert!(breaker.take_probe(at(61_000)));
    }
}
