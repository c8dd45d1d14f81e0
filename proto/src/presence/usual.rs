//! Usual figures of a fleet: the share of devices of which something is true, and whether more of them are chance.
//! Start with [`UsualShare`]. [`Outlook`] says when an operator should look at the presence of a fleet.

use std::{collections::VecDeque, time::Duration};

use crate::time::Instant;

/// Fewer devices than this may well be chance.
pub const COUNT_MIN: u32 = 20;

/// Natural logarithm of the probability below which a count is not chance: 1e-9.
const CHANCE_MAX_LN: f64 = -20.72;

/// The least share that is taken for usual.
const SHARE_LEAST: f64 = 0.001;
/// Time constant of the usual share.
const WINDOW: Duration = Duration::from_hours(24);

/// The share of devices of which something was true in the last 24 hours.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UsualShare(f64);

impl Default for UsualShare {
    fn default() -> Self {
        Self(SHARE_LEAST)
    }
}

impl UsualShare {
    /// For the time `elapsed` it was true of `count` devices of `total`.
    pub fn handle(&mut self, count: u32, total: u32, elapsed: Duration) {
        if total == 0 {
            return;
        }
        let share = f64::from(count) / f64::from(total);
        let weight = (elapsed.as_secs_f64() / WINDOW.as_secs_f64()).min(1.0);
        self.0 = (self.0 + (share - self.0) * weight).max(SHARE_LEAST);
    }

    /// Whether so many are more than chance (Chernoff's bound of the binomial tail), and at least [`COUNT_MIN`].
    #[must_use]
    pub fn is_exceeded(&self, count: u32, total: u32) -> bool {
        let (usual, share) = (self.0, f64::from(count) / f64::from(total.max(1)));
        if count < COUNT_MIN || share <= usual {
            return false;
        }
        let share = share.min(1.0);
        let gone = share * (share / usual).ln();
        let there = if share < 1.0 {
            (1.0 - share) * ((1.0 - share) / (1.0 - usual)).ln()
        } else {
            0.0
        };
        -f64::from(total) * (gone + there) < CHANCE_MAX_LN
    }
}

/// Share of unknown devices that is worth a look, if it is not usual.
const UNKNOWN_SHARE_MIN: f64 = 0.05;
/// Share of devices lost within [`LOST_WITHIN`] that is worth a look, if it is not usual.
const LOST_SHARE_MIN: f64 = 0.1;
/// Time over which lost devices are counted.
pub const LOST_WITHIN: Duration = Duration::from_secs(60);

/// Presence of a fleet at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    pub online: u32,
    pub unknown: u32,
    /// Devices so far that went offline by themselves, or became unknown.
    pub lost: u64,
}

/// What an operator should look at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unusual {
    /// Many devices are unknown.
    pub has_unknown: bool,
    /// Many devices went offline or became unknown within [`LOST_WITHIN`].
    pub has_lost: bool,
    /// Devices lost within that time.
    pub lost: u32,
}

/// Watches the presence of a fleet, and what is usual for it.
#[derive(Clone, Debug, Default)]
pub struct Outlook {
    unknown: UsualShare,
    lost: UsualShare,
    /// Devices lost so far, oldest first, over [`LOST_WITHIN`]: one for each call.
    samples: VecDeque<(Instant, u64)>,
}

impl Outlook {
    /// To be called about once a second.
    pub fn handle(&mut self, figures: Figures, now: Instant) -> Unusual {
        let before = self.samples.back().map_or(now, |(at, _)| *at);
        let elapsed = now.saturating_since(before);
        self.samples.push_back((now, figures.lost));
        // The last one that is old enough stays: a gap between two calls counts in full.
        while self
            .samples
            .get(1)
            .is_some_and(|(at, _)| now.saturating_since(*at) >= LOST_WITHIN)
        {
            self.samples.pop_front();
        }
        let oldest = self.samples.front().map_or(figures.lost, |(_, lost)| *lost);
        let lost = u32::try_from(figures.lost.saturating_sub(oldest)).unwrap_or(u32::MAX);
        let connected = figures.online.saturating_add(figures.unknown);
        Unusual {
            has_unknown: watch(
                &mut self.unknown,
                (figures.unknown, connected),
                UNKNOWN_SHARE_MIN,
                elapsed,
            ),
            has_lost: watch(
                &mut self.lost,
                (lost, connected.saturating_add(lost)),
                LOST_SHARE_MIN,
                elapsed,
            ),
            lost,
        }
    }
}

/// Whether `count` of `total` devices are unusual. Unusual ones change nothing about the usual share.
fn watch(usual: &mut UsualShare, (count, total): (u32, u32), share_min: f64, elapsed: Duration) -> bool {
    let is_unusual = f64::from(count) >= share_min * f64::from(total) && usual.is_exceeded(count, total);
    if !is_unusual {
        usual.handle(count, total, elapsed);
    }
    is_unusual
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Instant {
        Instant::ZERO + Duration::from_secs(seconds)
    }

    fn figures(online: u32, unknown: u32, lost: u64) -> Figures {
        Figures { online, unknown, lost }
    }

    #[test]
    fn many_unknown_devices_show_at_once_and_until_they_are_known() {
        let mut outlook = Outlook::default();
        let mut seen = |figures| outlook.handle(figures, at(1)).has_unknown;

        assert!(!seen(figures(1_000, 0, 0)));
        assert!(!seen(figures(81, 19, 0)), "too few");
        assert!(!seen(figures(9_600, 400, 0)), "4 %");
        assert!(seen(figures(9_400, 600, 0)));
        assert!(seen(figures(0, 20, 0)));
        assert!(!seen(figures(10_000, 0, 0)));
    }

    #[test]
    fn devices_lost_within_a_minute_show_wherever_the_minute_begins() {
        for first in 0..60 {
            let mut outlook = Outlook::default();
            let mut shown = Vec::new();
            for second in 0..240 {
                // A tenth of them within 50 s.
                let lost = 20 * u32::clamp(second.max(first) - first, 0, 50);
                let seen = outlook.handle(figures(9_000 - lost, 0, lost.into()), at(second.into()));
                if seen.has_lost {
                    shown.push(second - first);
                }
            }
            let (begin, end) = (shown[0], shown[shown.len() - 1]);
            assert!(
                (40..60).contains(&begin) && (60..120).contains(&end),
                "{first}: {begin} to {end}"
            );
        }
    }

    #[test]
    fn gap_between_two_looks_hides_nobody() {
        let mut outlook = Outlook::default();
        outlook.handle(figures(1_000, 0, 0), at(0));

        // The node stood still.
        let seen = outlook.handle(figures(500, 0, 500), at(300));

        assert_eq!((seen.has_lost, seen.lost), (true, 500));
        assert!(!outlook.handle(figures(500, 0, 500), at(361)).has_lost);
    }

    #[test]
    fn share_that_is_usual_for_a_fleet_shows_no_more() {
        let mut outlook = Outlook::default();
        // For days it grows a little each hour, to a tenth.
        for hour in 0..1_000_u32 {
            let unknown = hour.min(100);
            let seen = outlook.handle(figures(1_000 - unknown, unknown, 0), at(u64::from(hour) * 3_600));
            assert!(!seen.has_unknown, "{hour}");
        }
        assert!(outlook.handle(figures(700, 300, 0), at(1_000 * 3_600)).has_unknown);
    }
}
