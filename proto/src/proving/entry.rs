//! One version under test: its room, its rate, and its evidence.

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

use super::{
    PROVEN_AFTER, SMALL_PROVEN_AFTER, Tested, VersionState, WORSE_RETURNS,
    ledger::{Ledger, Outcome},
};
use crate::{
    cohort::ModelTag,
    id::Label,
    rate::{Gcra, Rate},
    rollout::{Counts, Finding, Sequential, Side, Totals},
    slots::QueueEnd,
    time::{Instant, WallTime},
};

/// Bounds of the room: open sessions that have not proved themselves.
const ROOM_MIN: u32 = 20;
const ROOM_MAX: u32 = 400;
/// Part of this node's sessions that the room is: a hundredth.
const ROOM_PART: usize = 100;
/// Factor by which the rate of a version that was found worse is lower.
const WORSE_SLOWER: u32 = 4;
/// Proven sessions below which there is nobody to protect.
const PROTECTED_MIN: usize = 20;
/// The same as a part of the version's own sessions: a tenth.
const PROTECTED_PART: usize = 10;
/// Control sessions without which no version is found worse.
const CONTROL_MIN: u64 = 20;
/// Maximum number of models whose other versions are the control.
const MODELS_MAX: usize = 16;
/// Age of a test without a finding at which it starts again.
pub(super) const TEST_MAX: Duration = Duration::from_hours(1);
/// Minutes in which both sides are compared.
const INTERVAL: Duration = Duration::from_secs(12);
/// Time between an admission and its session, at most: that of an answer.
const ON_THE_WAY: Duration = Duration::from_secs(3);
/// Bounds of the time after which a refused device returns while the verdict is overdue.
const LATE_MIN: Duration = Duration::from_secs(10);
const LATE_MAX: Duration = Duration::from_mins(5);
/// Time for which devices are refused without a verdict before a person is told.
const WAITING: Duration = Duration::from_mins(15);
/// Time without a refusal after which nobody waits.
const WAITING_ENDS: Duration = Duration::from_mins(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Fine,
    Worse,
    Open,
    /// The test is to start again.
    Expired,
}

#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub model: Option<Label>,
    pub firmware: Option<Label>,
    pub state: VersionState,
    /// Of its devices, as far as they are seen.
    pub models: BTreeSet<ModelTag>,
    pub ledger: Ledger,
    /// Open sessions.
    pub online: u32,
    room: u32,
    rate: Gcra,
    /// Admissions of the last seconds, oldest first, and sessions that began meanwhile.
    on_the_way: VecDeque<Instant>,
    /// Slots of its refused devices.
    end: QueueEnd,
    /// The same while the verdict is overdue.
    end_of_late: QueueEnd,
    refused: u64,
    /// First and last refusal of devices that wait.
    waits: Option<(Instant, Instant)>,
    created: Instant,
    test: Sequential,
    test_began: Instant,
    seen: Totals,
}

impl Entry {
    pub fn new(model: Option<Label>, firmware: Option<Label>, now: Instant) -> Self {
        Self {
            model,
            firmware,
            state: VersionState::Unproven,
            models: BTreeSet::new(),
            ledger: Ledger::new(now),
            online: 0,
            room: ROOM_MIN,
            rate: Gcra::default(),
            on_the_way: VecDeque::new(),
            end: QueueEnd::empty(1.0),
            end_of_late: QueueEnd::empty(1.0),
            refused: 0,
            waits: None,
            created: now,
            test: Sequential::new(wall(now)),
            test_began: now,
            seen: Totals::default(),
        }
    }

    /// `proven`: sessions of proven versions here.
    pub fn ask(&mut self, proven: usize, sessions: usize, k_ref: f64, now: Instant) -> Result<(), Instant> {
        self.settle(now);
        self.room = self.room_of(sessions);
        let is_alone = proven < PROTECTED_MIN || proven < self.online as usize / PROTECTED_PART;
        if is_alone && self.state == VersionState::Unproven {
            return Ok(());
        }
        let taken = self.ledger.young().saturating_add(count(self.on_the_way.len()));
        let mut after = self.rate;
        let next = if taken >= self.room {
            now
        } else {
            match after.take(1, self.rate_now(), now) {
                Ok(()) => return Ok(()),
                Err(next) => next,
            }
        };
        self.refused += 1;
        let first = self.waits.map_or(now, |(first, _)| first);
        self.waits = Some((first, now));
        let verdict = self.verdict_due(now);
        Err(match self.state {
            VersionState::Worse => self.end.take(now + WORSE_RETURNS, k_ref),
            VersionState::Unproven | VersionState::Proven if verdict > now => {
                self.end.take(verdict.max(next) + Duration::from_secs(1), k_ref)
            }
            // The verdict is overdue: the rate makes room.
            VersionState::Unproven | VersionState::Proven => {
                let per_second = f64::from(self.room) / PROVEN_AFTER.as_secs_f64();
                let at = self.end_of_late.take(next.max(now + LATE_MIN), per_second);
                at.min(now + LATE_MAX)
            }
        })
    }

    fn rate_now(&self) -> Rate {
        let slower = if self.state == VersionState::Worse {
            WORSE_SLOWER
        } else {
            1
        };
        Rate::every(PROVEN_AFTER * slower / self.room, self.room)
    }

    /// A device that may connect is on its way to a session.
    pub fn handle_entered(&mut self, now: Instant) {
        self.on_the_way.push_back(now);
        self.rate.charge(self.rate_now(), now);
    }

    pub fn handle_opened(&mut self, side: Side, model: ModelTag, now: Instant) {
        if side == Side::Treated {
            self.online += 1;
            self.on_the_way.pop_front();
            if self.models.len() < MODELS_MAX {
                self.models.insert(model);
            }
        }
        self.ledger.handle_opened(side, now);
    }

    pub fn handle_ended(&mut self, side: Side, opened_at: Instant, outcome: Outcome) {
        if side == Side::Treated {
            self.online = self.online.saturating_sub(1);
        }
        self.ledger.handle_ended(side, opened_at, outcome);
    }

    pub fn handle_second(&mut self, sessions: usize, has_proven_model: bool, is_costly: bool, now: Instant) -> Verdict {
        self.settle(now);
        self.room = self.room_of(sessions);
        let Totals {
            treated, near, others, ..
        } = *self.ledger.totals();
        let near = if has_proven_model { near } else { plus(near, others) };
        self.seen = Totals {
            treated,
            near,
            ..Totals::default()
        };
        // Sessions that began lately must not put off the verdict.
        let needed = self.needed(now - PROVEN_AFTER / 2);
        let finding = self.test.handle_totals(&self.seen, needed, INTERVAL, wall(now));
        let is_small = self.state == VersionState::Unproven
            && now.saturating_since(self.created) >= SMALL_PROVEN_AFTER
            && self.online > 0
            && self.ledger.young() == 0;
        match finding {
            _ if is_costly => Verdict::Worse,
            Finding::Worse if near.connects >= CONTROL_MIN => Verdict::Worse,
            Finding::Fine if treated.connects >= needed => Verdict::Fine,
            Finding::Worse => self.open(now),
            Finding::Fine | Finding::Open if is_small => Verdict::Fine,
            Finding::Fine | Finding::Open => self.open(now),
        }
    }

    fn open(&self, now: Instant) -> Verdict {
        if now.saturating_since(self.test_began) >= TEST_MAX {
            Verdict::Expired
        } else {
            Verdict::Open
        }
    }

    /// It was found worse. A finding needs new evidence from now on.
    pub fn set_worse(&mut self, now: Instant) {
        if self.state != VersionState::Worse {
            self.end = QueueEnd::empty(1.0);
            self.waits = None;
        }
        self.state = VersionState::Worse;
        self.restart(now);
    }

    pub fn restart(&mut self, now: Instant) {
        self.ledger.restart(now);
        self.test = Sequential::new(wall(now));
        self.test_began = now;
    }

    fn settle(&mut self, now: Instant) {
        self.ledger.settle(now);
        while self.on_the_way.front().is_some_and(|at| *at + ON_THE_WAY <= now) {
            self.on_the_way.pop_front();
        }
        if self.waits.is_some_and(|(_, last)| last + WAITING_ENDS <= now) {
            self.waits = None;
        }
    }

    fn room_of(&self, sessions: usize) -> u32 {
        match self.state {
            VersionState::Worse => ROOM_MIN,
            VersionState::Unproven | VersionState::Proven => count(sessions / ROOM_PART).clamp(ROOM_MIN, ROOM_MAX),
        }
    }

    /// Sessions that a verdict "fine" needs: half of those that began before a time, up to half of the room. Few
    /// sessions are tested for a coarser difference.
    fn needed(&self, before: Instant) -> u64 {
        let began = self.ledger.began_before(before);
        (began / 2).clamp(u64::from(ROOM_MIN / 2), u64::from(self.room / 2))
    }

    /// When the verdict is due if no session fails: the test's margin is 2 in [`needed`](Self::needed) sessions.
    fn verdict_due(&self, now: Instant) -> Instant {
        let needed = self.needed(now + Duration::from_secs(1)) * 8 / 5;
        self.ledger.counted_at(needed, now)
    }

    /// How little is lost if the test is forgotten, least first: whether it was found worse, whether it has sessions,
    /// and its age. `None` while devices with the version connect or wait.
    pub fn idleness(&self, now: Instant) -> Option<(bool, bool, Instant)> {
        let is_idle = self.ledger.young_at(now) == 0
            && self.on_the_way.iter().all(|at| *at + ON_THE_WAY <= now)
            && self.waits.is_none_or(|(_, last)| last + WAITING_ENDS <= now);
        is_idle.then_some((self.state == VersionState::Worse, self.online > 0, self.created))
    }

    /// Sessions that the last verdict was about: of the version, and of the control.
    pub const fn evidence(&self) -> (Counts, Counts) {
        (self.seen.treated, self.seen.near)
    }

    pub fn tested(&self, now: Instant) -> Tested {
        let is_waiting = |(first, _): (Instant, Instant)| now.saturating_since(first) >= WAITING;
        Tested {
            model: self.model.clone(),
            firmware: self.firmware.clone(),
            state: self.state,
            online: self.online,
            young: self.ledger.young(),
            room: self.room,
            refused: self.refused,
            pending: self.ledger.pending(),
            is_waiting: self.state == VersionState::Unproven && self.waits.is_some_and(is_waiting),
            evidence: self.evidence(),
            log_likelihood_ratio: self.test.log_likelihood_ratio(),
        }
    }
}

const fn plus(one: Counts, other: Counts) -> Counts {
    Counts {
        connects: one.connects + other.connects,
        failed: one.failed + other.failed,
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// The test takes times of the database; here only their differences matter.
const fn wall(now: Instant) -> WallTime {
    WallTime::from_unix_ms(now.as_micros() / 1_000)
}
