//! Connects of an evidence window. A connect counts once its outcome is known.

use std::{collections::VecDeque, time::Duration};

use super::{Counts, Totals};
use crate::time::Instant;

/// Which side of the comparison a device is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Treated,
    /// Not treated, and most like the treated ones.
    Near,
    /// Not treated.
    Other,
}

const SIDES: usize = 3;

/// Counts of one window: connects whose outcome is known, and open sessions that may still fail. Memory is bounded by
/// the seconds of a short session.
#[derive(Debug)]
pub struct Counting {
    /// Sessions that began before are left out.
    since: Instant,
    /// A session that ends within this time may have failed.
    short: Duration,
    totals: Totals,
    /// Open sessions by the second of the window in which they began; oldest first.
    young: VecDeque<(u64, [u64; SIDES])>,
}

impl Counting {
    /// `short`: a session that lives this long has proved itself.
    #[must_use]
    pub const fn new(since: Instant, short: Duration) -> Self {
        Self {
            since,
            short,
            totals: Totals {
                treated: Counts { connects: 0, failed: 0 },
                near: Counts { connects: 0, failed: 0 },
                others: Counts { connects: 0, failed: 0 },
            },
            young: VecDeque::new(),
        }
    }

    /// A device has a session.
    pub fn handle_opened(&mut self, side: Side, now: Instant) {
        let second = self.second(now);
        if self.young.back().is_none_or(|(last, _)| *last < second) {
            self.young.push_back((second, [0; SIDES]));
        }
        // Connects come out of order by less than a second: the last one's takes them.
        if let Some((_, counts)) = self.young.back_mut() {
            counts[side as usize] += 1;
        }
        self.settle(now);
    }

    /// A connect whose outcome is known at once.
    pub const fn handle_known(&mut self, side: Side, has_failed: bool) {
        let counts = match side {
            Side::Treated => &mut self.totals.treated,
            Side::Near => &mut self.totals.near,
            Side::Other => &mut self.totals.others,
        };
        counts.connects += 1;
        if has_failed {
            counts.failed += 1;
        }
    }

    /// The session that began at `opened_at` has ended. If it was short and did not fail, it says nothing and is left
    /// out.
    pub fn handle_ended(&mut self, side: Side, opened_at: Instant, has_failed: bool, now: Instant) {
        if opened_at < self.since || now.saturating_since(opened_at) >= self.short {
            return;
        }
        let second = self.second(opened_at);
        // A session that began at the end of a second may be counted in the next.
        let at = self.young.partition_point(|(other, _)| *other < second);
        let taken = self.young.range_mut(at..).take(2).find_map(|(_, counts)| {
            let count = &mut counts[side as usize];
            *count = count.checked_sub(1)?;
            Some(())
        });
        if taken.is_some() && has_failed {
            self.handle_known(side, true);
        }
    }

    /// Connects whose outcome is known by now.
    pub fn totals(&mut self, now: Instant) -> Totals {
        self.settle(now);
        self.totals
    }

    fn settle(&mut self, now: Instant) {
        while let Some((second, counts)) = self.young.front().copied() {
            // Even the last one of its second has lived long enough.
            let is_proven = self.since + Duration::from_secs(second + 1) + self.short <= now;
            if !is_proven {
                break;
            }
            self.young.pop_front();
            let [treated, near, others] = counts;
            self.totals.treated.connects += treated;
            self.totals.near.connects += near;
            self.totals.others.connects += others;
        }
    }

    fn second(&self, at: Instant) -> u64 {
        at.saturating_since(self.since).as_secs()
    }
}
