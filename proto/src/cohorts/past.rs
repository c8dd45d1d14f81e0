//! What the last sessions of one device tell, in six bits.

use std::time::Duration;

use crate::close::EndedBy;

/// A session shorter than this is short: 2 minutes.
pub const SHORT_SESSION: Duration = Duration::from_secs(120);
/// A session of at least this length shows that its device can stay connected: 15 minutes.
pub const STEADY_SESSION: Duration = Duration::from_secs(900);

/// Bits for the short repeats in a row.
const REPEATS_BITS: u8 = 3;
const COUNT_MAX: u8 = (1 << REPEATS_BITS) - 1;
/// The device was not seen in a long session. Devices that reconnect every few minutes by design stay like this.
const UNKNOWN: u8 = 0;
/// Its last session was long.
const STEADY: u8 = 1;
/// Sessions in a row that were not long, after a long one, from which a device is in a loop.
const LOOP_MIN: u8 = 2;

/// What the last sessions of a device tell, each of which began a short time after the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Past(u8);

impl Past {
    /// Greatest value of [`bits`](Self::bits).
    pub const BITS_MAX: u8 = 63;

    /// At most [`BITS_MAX`](Self::BITS_MAX).
    #[must_use]
    pub const fn bits(self) -> u8 {
        self.0
    }

    #[must_use]
    pub const fn of_bits(bits: u8) -> Self {
        Self(bits & Self::BITS_MAX)
    }

    const fn new(repeats: u8, course: u8) -> Self {
        Self(course << REPEATS_BITS | repeats)
    }

    /// The past of a device whose session has ended. `returned`: its past before that session, if the session began a
    /// short time after another one.
    #[must_use]
    pub fn after(returned: Option<Self>, by: EndedBy, lived: Duration) -> Self {
        let before = returned.unwrap_or_default();
        if lived >= STEADY_SESSION {
            return Self::new(0, STEADY);
        }
        if !by.may_be_crash() {
            return Self::new(0, before.course());
        }
        let is_repeat = returned.is_some() && lived < SHORT_SESSION;
        let repeats = if is_repeat { before.repeats() + 1 } else { 0 };
        let course = match before.course() {
            UNKNOWN => UNKNOWN,
            since_steady => since_steady + 1,
        };
        Self::new(repeats.min(COUNT_MAX), course.min(COUNT_MAX))
    }

    /// Repeats in a row, the last session included: short sessions that the device ended; up to 7.
    #[must_use]
    pub const fn repeats(self) -> u8 {
        self.0 & COUNT_MAX
    }

    /// Whether a device that stayed connected before ends its sessions within minutes now, more than once.
    #[must_use]
    pub const fn is_in_loop(self) -> bool {
        self.course() >= STEADY + LOOP_MIN
    }

    const fn course(self) -> u8 {
        self.0 >> REPEATS_BITS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    /// The past after sessions of these lengths, that the device ended and that followed each other.
    fn after(minutes: &[u32]) -> Past {
        let begin = Past::after(None, EndedBy::Device, MINUTE * minutes[0]);
        let sessions = minutes[1..].iter();
        sessions.fold(begin, |past, minutes| {
            Past::after(Some(past), EndedBy::Device, MINUTE * *minutes)
        })
    }

    #[test]
    fn short_sessions_after_another_one_are_repeats() {
        assert_eq!(after(&[1]).repeats(), 0, "the first one follows none");
        assert_eq!(after(&[1, 1]).repeats(), 1);
        assert_eq!(after(&[30, 1, 1, 1]).repeats(), 3);
        assert_eq!(after(&[1, 1, 2]).repeats(), 0, "it was not short");
        assert_eq!(after(&[1; 100]).repeats(), 7);
        let by_gateway = Past::after(Some(after(&[1, 1])), EndedBy::Gateway, MINUTE / 2);
        assert_eq!(by_gateway.repeats(), 0);
    }

    #[test]
    fn a_device_that_was_steady_and_ends_two_sessions_within_minutes_is_in_a_loop() {
        assert!(!after(&[40, 5]).is_in_loop(), "one restart is none");
        assert!(after(&[40, 5, 5]).is_in_loop());
        assert!(after(&[40, 5, 5, 5, 14]).is_in_loop());
        assert!(!after(&[40, 5, 5, 15]).is_in_loop(), "it is well again");
        // Restarts by the gateway say nothing about the device.
        let drained = Past::after(Some(after(&[40, 5])), EndedBy::Gateway, MINUTE);
        assert!(!drained.is_in_loop());
        assert!(Past::after(Some(drained), EndedBy::Device, MINUTE * 5).is_in_loop());
        // It was away for long: nothing is known of it.
        assert!(!Past::after(None, EndedBy::Device, MINUTE * 5).is_in_loop());
    }

    #[test]
    fn a_device_that_reconnects_every_five_minutes_by_design_is_never_in_a_loop() {
        assert!(!after(&[5; 1_000]).is_in_loop());
    }

    #[test]
    fn all_of_it_fits_into_its_bits() {
        for bits in 0..=Past::BITS_MAX {
            assert_eq!(Past::of_bits(bits).bits(), bits);
            let next = Past::after(Some(Past::of_bits(bits)), EndedBy::Device, MINUTE);
            assert!(next.bits() <= Past::BITS_MAX && next.repeats() <= 7);
        }
    }
}
