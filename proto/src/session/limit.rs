//! How much of a device's bad manners a session takes: frames a second, and bad frames a minute.

use std::{collections::VecDeque, time::Duration};

use crate::{
    rate::{Gcra, Rate},
    session::SessionLimits,
    time::Instant,
};

/// What a session has used up of its message rate.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MessageRate(Gcra);

impl MessageRate {
    /// Takes one frame from the budget. Returns whether there was one left; a frame too many costs nothing.
    pub(super) fn take(&mut self, limits: &SessionLimits, now: Instant) -> bool {
        let rate = Rate::per_second(limits.messages_per_second, limits.messages_burst);
        self.0.take(1, rate, now).is_ok()
    }
}

/// The tenth bad frame within a minute ends a session (docs/PROTOCOL.md).
const BAD_FRAMES_MAX: usize = 9;
const BAD_FRAMES_WINDOW: Duration = Duration::from_secs(60);

/// When the last bad frames came: never more than nine.
#[derive(Debug, Default)]
pub(super) struct BadFrames {
    at: VecDeque<Instant>,
}

impl BadFrames {
    /// Notes one more. True where it is the tenth within a minute.
    pub(super) fn is_too_many(&mut self, now: Instant) -> bool {
        while self
            .at
            .front()
            .is_some_and(|&at| now.saturating_since(at) >= BAD_FRAMES_WINDOW)
        {
            self.at.pop_front();
        }
        if self.at.len() >= BAD_FRAMES_MAX {
            return true;
        }
        self.at.push_back(now);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Instant {
        Instant::ZERO + Duration::from_millis(ms)
    }

    #[test]
    fn burst_passes_at_once_and_the_rate_for_ever() {
        let limits = SessionLimits {
            messages_per_second: 10,
            messages_burst: 5,
            ..SessionLimits::default()
        };
        let mut rate = MessageRate::default();

        let passed = (0..20).filter(|_| rate.take(&limits, at(0))).count();
        let later = (1..=100).filter(|n| rate.take(&limits, at(n * 100))).count();

        assert_eq!(passed, 5);
        assert_eq!(later, 100);
    }

    #[test]
    fn tenth_bad_frame_within_a_minute_is_too_many() {
        let mut bad_frames = BadFrames::default();

        assert!((0..9).all(|n| !bad_frames.is_too_many(at(n * 1000))));
        assert!(bad_frames.is_too_many(at(59_999)));
    }

    #[test]
    fn bad_frames_spread_over_more_than_a_minute_are_not() {
        let mut bad_frames = BadFrames::default();

        assert!((0..100).all(|n| !bad_frames.is_too_many(at(n * 6_667))));
    }
}
