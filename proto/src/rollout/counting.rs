//! Connects of an evidence window. A connect counts once its outcome is known.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use super::{Counts, Totals};
use crate::{id::DeviceId, time::Instant};

/// Maximum number of devices of either kind that are expected back. Further ones are not missed.
const AWAY_MAX: usize = 10_000;
/// A device whose session has ended is gone if it does not return within this time: 10 minutes.
const GONE_AFTER: Duration = Duration::from_secs(600);

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

/// Devices that are expected back, with the time by which they are.
type Away = BTreeMap<DeviceId, (Side, Instant)>;

/// Counts of one window: connects whose outcome is known, and open sessions that may still fail. Memory is bounded by
/// the seconds of a short session, and by [`AWAY_MAX`].
#[derive(Debug)]
pub struct Counting {
    /// Sessions that began before are left out.
    since: Instant,
    /// A session that ends within this time may have failed.
    short: Duration,
    totals: Totals,
    /// Open sessions by the second of the window in which they began; oldest first.
    young: VecDeque<(u64, [u64; SIDES])>,
    /// Devices that the rule has sent away.
    sent: Away,
    /// Devices that have left, after sessions that began in this window and were not short.
    left: Away,
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
                returns: Counts { connects: 0, failed: 0 },
            },
            young: VecDeque::new(),
            sent: Away::new(),
            left: Away::new(),
        }
    }

    /// The next window, which expects the same devices back.
    #[must_use]
    pub fn next(&self, since: Instant, short: Duration) -> Self {
        Self {
            sent: self.sent.clone(),
            ..Self::new(since, short)
        }
    }

    /// The rule has refused a device, restricted it or closed its session. It is expected back by this time.
    pub fn handle_sent(&mut self, device: DeviceId, back_by: Instant) {
        if self.sent.len() < AWAY_MAX || self.sent.contains_key(&device) {
            self.sent.insert(device, (Side::Treated, back_by));
        }
    }

    /// A device connects, whatever becomes of it and whichever version it has.
    pub fn handle_arrived(&mut self, device: DeviceId) {
        self.left.remove(&device);
        if self.sent.remove(&device).is_some() {
            self.totals.returns.connects += 1;
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

    /// The session of `device` that began at `opened_at` has ended. If it was short and did not fail, it says nothing
    /// and is left out. If it was not short, its device is expected back: otherwise that is one more failed connect.
    pub fn handle_ended(
        &mut self,
        (device, side): (DeviceId, Side),
        opened_at: Instant,
        has_failed: bool,
        now: Instant,
    ) {
        if opened_at < self.since {
            return;
        }
        if now.saturating_since(opened_at) >= self.short {
            if has_failed && self.left.len() < AWAY_MAX {
                self.left.insert(device, (side, now + GONE_AFTER));
            }
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
        let missing = overdue(&mut self.sent, now).len() as u64;
        self.totals.returns.connects += missing;
        self.totals.returns.failed += missing;
        for side in overdue(&mut self.left, now) {
            self.handle_known(side, true);
        }
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

/// Removes the devices that are not back in time. Returns their sides.
fn overdue(away: &mut Away, now: Instant) -> Vec<Side> {
    let mut sides = Vec::new();
    away.retain(|_, (side, back_by)| {
        let is_overdue = *back_by <= now;
        if is_overdue {
            sides.push(*side);
        }
        !is_overdue
    });
    sides
}
