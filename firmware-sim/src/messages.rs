//! Messages that a device sends of its own accord while it is connected, one after each equal span, and the acks for them.
//!
//! Pure: `now` in, frames out. Kept apart from the machine of [`device`](crate::device), which millions of silent devices share.

use std::{borrow::Cow, time::Duration};

use rand::Rng;
use seawall_proto::{
    frame::{DeviceFrame, ServerFrame},
    time::Instant,
};

use crate::backoff::up_to;

/// Maximum messages per minute: a hundred per second, the default limit of a gateway.
pub const PER_MINUTE_MAX: f64 = 6_000.0;

/// What gateways are told that the messages are about.
const TOPIC: &str = "firmware-sim";

/// The messages of one session.
#[derive(Debug)]
pub(crate) struct Messages {
    every: Duration,
    due: Instant,
    /// Numbers are the ids, from 1 in each session.
    sent: u32,
    /// The latest that was acked: acks come in the order of the messages.
    acked: u32,
}

/// Between two messages. `None`: none are sent, or the rate is out of bounds (0 to [`PER_MINUTE_MAX`]).
#[must_use]
pub fn every(per_minute: f64) -> Option<Duration> {
    (per_minute > 0.0 && per_minute <= PER_MINUTE_MAX).then(|| Duration::from_secs_f64(60.0 / per_minute))
}

impl Messages {
    /// The first message comes somewhere within the first span, so that devices that connected together do not speak together.
    pub(crate) fn new(every: Duration, now: Instant, rng: &mut impl Rng) -> Self {
        Self {
            every,
            due: now + up_to(every, rng),
            sent: 0,
            acked: 0,
        }
    }

    pub(crate) const fn due(&self) -> Instant {
        self.due
    }

    /// The frame to send now. `None`: it is not time yet. A frame that is sent late leaves the times of the others as they were; those that
    /// were missed altogether are left out.
    pub(crate) fn handle_timeout(&mut self, now: Instant) -> Option<String> {
        if self.due > now {
            return None;
        }
        self.due += self.every;
        if self.due <= now {
            self.due = now + self.every;
        }
        self.sent += 1;
        let frame = DeviceFrame::Message {
            id: Cow::Owned(self.sent.to_string()),
            topic: Some(Cow::Borrowed(TOPIC)),
            payload: None,
        };
        Some(frame.to_json())
    }

    /// Whether a text frame is the ack of a message that waited for one.
    pub(crate) fn handle_text(&mut self, text: &str) -> bool {
        let Some(ServerFrame::Ack { id }) = ServerFrame::parse(text) else {
            return false;
        };
        let is_awaited = id
            .parse()
            .is_ok_and(|number: u32| number > self.acked && number <= self.sent);
        if is_awaited {
            self.acked = id.parse().unwrap_or(self.acked);
        }
        is_awaited
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn messages_keep_their_distance_and_each_is_acked_once() {
        let mut messages = Messages::new(10 * SECOND, Instant::ZERO, &mut SmallRng::seed_from_u64(1));
        let first = messages.due();
        assert!(first <= Instant::ZERO + 10 * SECOND);

        assert_eq!(messages.handle_timeout(Instant::ZERO), None, "it is not time yet");
        let frame = messages.handle_timeout(first + SECOND).unwrap();

        assert!(matches!(
            DeviceFrame::parse(&frame),
            Ok(DeviceFrame::Message { id, topic: Some(_), .. }) if id == "1"
        ));
        assert_eq!(messages.due(), first + 10 * SECOND);
        assert!(messages.handle_text(r#"{"type":"ack","id":"1"}"#));
        for text in [
            r#"{"type":"ack","id":"1"}"#,
            r#"{"type":"ack","id":"2"}"#,
            r#"{"type":"ack","id":"x"}"#,
            r#"{"type":"message","id":"2","payload":1}"#,
        ] {
            assert!(!messages.handle_text(text), "{text}");
        }
    }

    #[test]
    fn a_device_that_was_stopped_for_long_does_not_catch_up() {
        let mut messages = Messages::new(SECOND, Instant::ZERO, &mut SmallRng::seed_from_u64(1));
        let late = messages.due() + 100 * SECOND;

        assert!(messages.handle_timeout(late).is_some());

        assert_eq!(messages.due(), late + SECOND);
    }

    #[test]
    fn rates_out_of_bounds_send_nothing() {
        assert_eq!(every(6.0), Some(10 * SECOND));
        for rate in [0.0, -1.0, f64::NAN, 6_001.0] {
            assert_eq!(every(rate), None);
        }
    }
}
