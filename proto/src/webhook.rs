//! Messages to one HTTP receiver, signed as the [Standard Webhooks] specification says: which of them waits, when it is
//! retried, and when it is given up. This module does not send. Start with [`Outbox`].
//!
//! [Standard Webhooks]: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md

use std::{collections::VecDeque, fmt, sync::Arc, time::Duration};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use hmac::{Hmac, KeyInit as _, Mac as _};
use rand::Rng;
use sha2::Sha256;

use crate::time::Instant;

/// Maximum number of messages that wait. A further one displaces the oldest.
pub const WAITING_MAX: usize = 1_000;
/// Time from a message to its last attempt.
pub const RETRIED_FOR: Duration = Duration::from_secs(60 * 60);
/// Upper bound of the first pause. It doubles with each failed attempt.
const PAUSE_MIN: Duration = Duration::from_secs(2);
/// Upper bound of all pauses, and of the additional pause that a receiver may request.
const PAUSE_MAX: Duration = Duration::from_secs(5 * 60);
/// Prefix of a secret in text.
const PREFIX: &str = "whsec_";
/// Lengths of a secret, in bytes.
const SECRET_LEN: std::ops::RangeInclusive<usize> = 24..=64;

/// The key that messages are signed with.
#[derive(Clone)]
pub struct Secret(Box<[u8]>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// The text is not a secret. The error does not repeat it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected whsec_ and 24 to 64 bytes as base64")]
pub struct InvalidSecret;

impl Secret {
    /// Parses `whsec_` and base64.
    ///
    /// # Errors
    /// It has another form, or is not 24 to 64 bytes long.
    pub fn parse(text: &str) -> Result<Self, InvalidSecret> {
        let digits = text.trim().strip_prefix(PREFIX).ok_or(InvalidSecret)?;
        let bytes = BASE64_STANDARD.decode(digits).map_err(|_| InvalidSecret)?;
        if SECRET_LEN.contains(&bytes.len()) {
            Ok(Self(bytes.into()))
        } else {
            Err(InvalidSecret)
        }
    }

    /// Value of the header `webhook-signature` for a message that is sent at this time.
    ///
    /// # Panics
    /// Never: a key may have any length.
    #[must_use]
    pub fn sign(&self, id: &str, unix_seconds: u64, body: &str) -> String {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("a key may have any length");
        mac.update(format!("{id}.{unix_seconds}.{body}").as_bytes());
        format!("v1,{}", BASE64_STANDARD.encode(mac.finalize().into_bytes()))
    }
}

/// A message. Every attempt has the same id, so that a receiver can drop repeats.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The header `webhook-id`.
    pub id: Arc<str>,
    pub body: Arc<str>,
}

/// Result of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// 2xx.
    Accepted,
    /// 410: the receiver unsubscribes.
    Gone,
    /// Any other status, or no answer. The receiver may request a pause of at most five minutes.
    Failed { retry_after: Option<Duration> },
}

impl Answer {
    /// Every status except 2xx is a failure, and only 410 is final. A redirect is not followed.
    #[must_use]
    pub const fn of_status(status: u16, retry_after: Option<Duration>) -> Self {
        match status {
            200..=299 => Self::Accepted,
            410 => Self::Gone,
            _ => Self::Failed { retry_after },
        }
    }
}

crate::labels! {
    /// Result of a message, or of an attempt.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Delivery {
        Delivered = "delivered",
        /// An attempt failed, and another follows.
        Retried = "retried",
        /// The receiver answered 410, or the hour has passed.
        GivenUp = "given_up",
        /// Too many messages waited.
        Dropped = "dropped",
    }
}

/// Messages that wait.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Oldest first.
    waiting: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    message: Message,
    since: Instant,
    due: Instant,
    failures: u32,
}

impl Outbox {
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Adds a message, due at once. Returns [`Delivery::Dropped`] if it displaced the oldest.
    pub fn push(&mut self, message: Message, now: Instant) -> Option<Delivery> {
        let is_full = self.waiting.len() >= WAITING_MAX;
        if is_full {
            self.waiting.pop_front();
        }
        self.waiting.push_back(Waiting {
            message,
            since: now,
            due: now,
            failures: 0,
        });
        is_full.then_some(Delivery::Dropped)
    }

    /// The message to send now: the one that has been due longest. It stays until
    /// [`handle_answer`](Self::handle_answer).
    #[must_use]
    pub fn poll_message(&self, now: Instant) -> Option<Message> {
        let next = self.waiting.iter().min_by_key(|waiting| waiting.due)?;
        (next.due <= now).then(|| next.message.clone())
    }

    /// Time at which the next message is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.waiting.iter().map(|waiting| waiting.due).min()
    }

    /// Records the answer to an attempt. `None`: the message was displaced meanwhile.
    pub fn handle_answer(&mut self, id: &str, answer: Answer, now: Instant, rng: &mut impl Rng) -> Option<Delivery> {
        let at = self.waiting.iter().position(|waiting| &*waiting.message.id == id)?;
        let waiting = &mut self.waiting[at];
        let retry_after = match answer {
            Answer::Accepted => {
                self.waiting.remove(at);
                return Some(Delivery::Delivered);
            }
            Answer::Gone => {
                self.waiting.remove(at);
                return Some(Delivery::GivenUp);
            }
            Answer::Failed { retry_after } => retry_after.unwrap_or_default(),
        };
        let bound = PAUSE_MIN.saturating_mul(1 << waiting.failures.min(16)).min(PAUSE_MAX);
        waiting.failures += 1;
        // Full jitter, so that messages that failed together are not sent together.
        let pause = retry_after.min(PAUSE_MAX) + bound.mul_f64(rng.random_range(0.0..=1.0));
        waiting.due = now + pause;
        if waiting.due.saturating_since(waiting.since) > RETRIED_FOR {
            self.waiting.remove(at);
            return Some(Delivery::GivenUp);
        }
        Some(Delivery::Retried)
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::SmallRng};

    use super::*;

    const FAILED: Answer = Answer::Failed { retry_after: None };

    fn message(number: usize) -> Message {
        Message {
            id: format!("msg_{number}").into(),
            body: "{}".into(),
        }
    }

    fn at(seconds: u64) -> Instant {
        Instant::ZERO + Duration::from_secs(seconds)
    }

    #[test]
    fn signature_is_that_of_the_specification() {
        let secret = Secret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();

        let signature = secret.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, r#"{"test": 2432232314}"#);

        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn secrets_have_a_form_and_are_never_shown() {
        let secret = Secret::parse(" whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n").unwrap();
        assert_eq!(format!("{secret:?}"), "Secret(…)");
        for wrong in [
            "",
            "whsec_",
            "whsec_AAAA",
            "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "whsec_%%%",
        ] {
            assert!(Secret::parse(wrong).is_err(), "{wrong}");
        }
        let long = format!("whsec_{}", BASE64_STANDARD.encode([0; 65]));
        assert!(Secret::parse(&long).is_err());
    }

    #[test]
    fn message_is_retried_with_growing_pauses_for_an_hour() {
        let mut rng = SmallRng::seed_from_u64(1);
        for seed in 0..50 {
            let mut outbox = Outbox::default();
            let start = at(seed);
            assert_eq!(outbox.push(message(1), start), None);
            let (mut now, mut attempts, mut outcome) = (start, 0, Delivery::Retried);

            while let Some(due) = outbox.poll_timeout() {
                let pause = due.saturating_since(now);
                assert!(pause <= PAUSE_MAX && due.saturating_since(start) <= RETRIED_FOR);
                assert!(attempts == 0 || pause <= PAUSE_MIN * (1 << (attempts - 1).min(16)));
                now = due;
                let sent = outbox.poll_message(now).unwrap();
                assert_eq!(sent, message(1));
                attempts += 1;
                outcome = outbox.handle_answer(&sent.id, FAILED, now, &mut rng).unwrap();
            }

            assert_eq!(outcome, Delivery::GivenUp);
            assert!((15..80).contains(&attempts), "{attempts}");
            assert!(now.saturating_since(start) >= RETRIED_FOR - PAUSE_MAX);
        }
    }

    #[test]
    fn status_decides_and_the_receiver_may_ask_for_time() {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut outbox = Outbox::default();
        for number in 1..=3 {
            outbox.push(message(number), at(0));
        }
        let wait = Duration::from_secs(100);

        for status in [301, 400, 404, 429, 500, 503] {
            assert!(matches!(Answer::of_status(status, None), Answer::Failed { .. }));
        }
        let answer = Answer::of_status(503, Some(wait));
        assert_eq!(
            outbox.handle_answer("msg_1", answer, at(1), &mut rng),
            Some(Delivery::Retried)
        );
        let answer = Answer::of_status(204, None);
        assert_eq!(
            outbox.handle_answer("msg_2", answer, at(1), &mut rng),
            Some(Delivery::Delivered)
        );
        let answer = Answer::of_status(410, None);
        assert_eq!(
            outbox.handle_answer("msg_3", answer, at(1), &mut rng),
            Some(Delivery::GivenUp)
        );

        assert_eq!((outbox.len(), outbox.poll_message(at(100))), (1, None));
        let due = outbox.poll_timeout().unwrap();
        assert!((at(101)..=at(103)).contains(&due), "{due:?}");
        // It requests more time than remains.
        let answer = Answer::of_status(503, Some(RETRIED_FOR));
        assert_eq!(
            outbox.handle_answer("msg_1", answer, due, &mut rng),
            Some(Delivery::Retried)
        );
        let next = outbox.poll_timeout().unwrap().saturating_since(due);
        assert!((PAUSE_MAX..=PAUSE_MAX + 2 * PAUSE_MIN).contains(&next), "{next:?}");
    }

    #[test]
    fn message_that_fails_holds_up_no_other() {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut outbox = Outbox::default();
        outbox.push(message(1), at(0));
        outbox.push(message(2), at(0));

        let first = outbox.poll_message(at(0)).unwrap();
        let later = Answer::of_status(500, Some(Duration::from_secs(9)));
        outbox.handle_answer(&first.id, later, at(0), &mut rng);

        assert_eq!(outbox.poll_message(at(0)), Some(message(2)));
    }

    #[test]
    fn oldest_is_dropped_where_too_many_wait() {
        let mut outbox = Outbox::default();
        for number in 0..WAITING_MAX {
            assert_eq!(outbox.push(message(number), at(0)), None);
        }

        assert_eq!(outbox.push(message(WAITING_MAX), at(1)), Some(Delivery::Dropped));

        assert_eq!(
            (outbox.len(), outbox.poll_message(at(1))),
            (WAITING_MAX, Some(message(1)))
        );
        let mut rng = SmallRng::seed_from_u64(1);
        assert_eq!(outbox.handle_answer("msg_0", FAILED, at(1), &mut rng), None);
    }
}
