//! Sessions of one comparison, by the second in which they began. An outcome counts when its second is old enough, so
//! that good and bad sessions of both sides have the same age.

use std::{collections::VecDeque, time::Duration};

use super::PROVEN_AFTER;
use crate::{
    rollout::{Counts, Side, Totals},
    time::Instant,
};

const SIDES: usize = 3;

/// Memory is bounded by the seconds of [`PROVEN_AFTER`].
#[derive(Clone, Debug)]
pub(super) struct Ledger {
    /// Sessions that began before are left out.
    since: u64,
    totals: Totals,
    /// Oldest first.
    seconds: VecDeque<Second>,
    /// Open sessions of the treated side whose second is not old enough yet.
    young: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Second {
    at: u64,
    sides: [Tally; SIDES],
}

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    /// Sessions that began, without those that say nothing.
    began: u32,
    failed: u32,
    open: u32,
}

/// What the end of a session says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Failed,
    Nothing,
}

impl Ledger {
    pub fn new(now: Instant) -> Self {
        Self {
            since: second(now),
            totals: Totals::default(),
            seconds: VecDeque::new(),
            young: 0,
        }
    }

    /// Starts again: sessions that began before are left out, and still take room.
    pub fn restart(&mut self, now: Instant) {
        self.since = second(now);
        self.totals = Totals::default();
    }

    pub fn handle_opened(&mut self, side: Side, now: Instant) {
        self.settle(now);
        let at = second(now);
        if self.seconds.back().is_none_or(|last| last.at < at) {
            self.seconds.push_back(Second {
                at,
                ..Second::default()
            });
        }
        // Sessions are reported out of order by less than a second: the newest second takes them.
        if let Some(last) = self.seconds.back_mut() {
            let tally = &mut last.sides[side as usize];
            tally.began += 1;
            tally.open += 1;
            self.young += u32::from(side == Side::Treated);
        }
    }

    /// A session ended. Without effect if it has proved itself before.
    pub fn handle_ended(&mut self, side: Side, opened_at: Instant, outcome: Outcome) {
        let Some(tally) = self.find(side, opened_at, |tally| tally.open > 0) else {
            return;
        };
        tally.open -= 1;
        match outcome {
            Outcome::Failed => tally.failed += 1,
            Outcome::Nothing => tally.began = tally.began.saturating_sub(1),
        }
        if side == Side::Treated {
            self.young = self.young.saturating_sub(1);
        }
    }

    /// The failure of a session says nothing after all. Without effect if it has been counted.
    pub fn forgive(&mut self, side: Side, opened_at: Instant) {
        if let Some(tally) = self.find(side, opened_at, |tally| tally.failed > 0) {
            tally.failed -= 1;
            tally.began = tally.began.saturating_sub(1);
        }
    }

    /// A session that began at the end of a second may be counted in the next.
    fn find(&mut self, side: Side, opened_at: Instant, is_it: impl Fn(&Tally) -> bool) -> Option<&mut Tally> {
        let at = second(opened_at);
        let first = self.seconds.partition_point(|second| second.at < at);
        // A second that is counted is gone, and a later one must not take its place.
        let mut near = self.seconds.range_mut(first..).take_while(|second| second.at <= at + 1);
        near.find_map(|second| Some(&mut second.sides[side as usize]).filter(|tally| is_it(tally)))
    }

    /// Counts the sessions that are old enough.
    pub fn settle(&mut self, now: Instant) {
        while let Some(oldest) = self.seconds.front().copied().filter(|oldest| due(oldest.at) <= now) {
            self.seconds.pop_front();
            self.young = self.young.saturating_sub(oldest.sides[Side::Treated as usize].open);
            if oldest.at < self.since {
                continue;
            }
            let counts = |side: Side| {
                let tally = oldest.sides[side as usize];
                Counts {
                    connects: tally.began.into(),
                    failed: tally.failed.into(),
                }
            };
            self.totals = self.totals.plus(&Totals {
                treated: counts(Side::Treated),
                near: counts(Side::Near),
                others: counts(Side::Other),
                ..Totals::default()
            });
        }
    }

    /// Sessions that were old enough at the last [`settle`](Self::settle).
    pub const fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Treated sessions that are too young to count.
    pub fn pending(&self) -> Counts {
        let treated = |second: &Second| second.sides[Side::Treated as usize];
        self.seconds
            .iter()
            .map(treated)
            .fold(Counts::default(), |sum, tally| Counts {
                connects: sum.connects + u64::from(tally.began),
                failed: sum.failed + u64::from(tally.failed),
            })
    }

    /// Treated sessions that began before this time, whether they count yet or not.
    pub fn began_before(&self, at: Instant) -> u64 {
        let old = self.seconds.iter().filter(|second| second.at < self::second(at));
        let treated = old.map(|second| u64::from(second.sides[Side::Treated as usize].began));
        self.totals.treated.connects + treated.sum::<u64>()
    }

    pub const fn young(&self) -> u32 {
        self.young
    }

    /// The same for a time after the last [`settle`](Self::settle).
    pub fn young_at(&self, now: Instant) -> u32 {
        let young = self.seconds.iter().filter(|second| due(second.at) > now);
        young.map(|second| second.sides[Side::Treated as usize].open).sum()
    }

    /// When this number of treated sessions will have been counted, if no more fail or say nothing. At the latest the
    /// time at which a session that begins now is old enough.
    pub fn counted_at(&self, needed: u64, now: Instant) -> Instant {
        let mut counted = self.totals.treated.connects;
        for second in self.seconds.iter().filter(|second| second.at >= self.since) {
            counted += u64::from(second.sides[Side::Treated as usize].began);
            if counted >= needed {
                return due(second.at).max(now);
            }
        }
        now + PROVEN_AFTER + Duration::from_secs(1)
    }
}

fn second(at: Instant) -> u64 {
    at.as_micros() / 1_000_000
}

/// When even the last session of a second has lived long enough.
fn due(second: u64) -> Instant {
    Instant::from_micros((second + 1) * 1_000_000) + PROVEN_AFTER
}
