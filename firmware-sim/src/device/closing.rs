//! The end of a session: what each close code asks of the device (docs/PROTOCOL.md, "Close codes").

use std::time::Duration;

use rand::Rng;
use seawall_proto::time::Instant;
use serde::Deserialize;

use super::{CODE_REPLACED, CODE_RESTART, CloseFrame, Device, Online, Phase, REPLACED_WAIT, STABLE};
use crate::{
    backoff::{Backoff, Exponential, FirstReturn, Fixed, Hinted, between, up_to},
    profile::{FLAPPING_RETURN_MAX, IMMEDIATE, Profile},
};

impl Device {
    /// The session has ended, with a close frame or (`None`) without one.
    pub fn handle_closed(&mut self, frame: Option<CloseFrame<'_>>, now: Instant, rng: &mut impl Rng) {
        let Phase::Online(online) = self.phase else {
            return;
        };
        self.count_session(&online, now);
        if !self.profile.obeys_hints() {
            return self.return_by_itself(now, rng);
        }
        match frame.map_or(0, |frame| frame.code) {
            CODE_REPLACED if self.profile.yields_to_newer_session() => {
                self.slot = None;
                let (least, most) = REPLACED_WAIT;
                self.wait(Some(between(least, most, rng)), now);
            }
            code @ 4501..=4999 => {
                (self.slot, self.resume) = (None, None);
                self.phase = Phase::Stopped { code };
            }
            code => {
                let reason = frame
                    .filter(|_| code == CODE_RESTART || (4000..=4499).contains(&code))
                    .and_then(|frame| serde_json::from_str::<CloseReason>(frame.reason).ok());
                self.return_as_told(reason, online.return_at, now, rng);
            }
        }
    }

    /// A close's own hint goes before the `reconnect` frame's, which goes before the device's own backoff.
    fn return_as_told(
        &mut self,
        reason: Option<CloseReason>,
        return_at: Option<Instant>,
        now: Instant,
        rng: &mut impl Rng,
    ) {
        let (hint_ms, slot) = reason.map_or((None, None), |reason| (reason.retry_after_ms, reason.slot));
        self.slot = slot.or(self.slot.take());
        let hint = hint_ms
            .map(Duration::from_millis)
            .or_else(|| return_at.map(|at| at.saturating_since(now)));
        let Some(hint) = hint else {
            return self.return_by_itself(now, rng);
        };
        // The session has been counted: this wait counts in a copy.
        let mut attempts = self.attempts;
        let mut policy = Hinted {
            attempts: &mut attempts,
            hint,
        };
        let wait = policy.next_backoff();
        self.wait(wait, now);
    }

    /// Back from a session that ended without a hint, or from one whose hint this profile does not know.
    fn return_by_itself(&mut self, now: Instant, rng: &mut impl Rng) {
        let (attempts, cap) = (self.attempts, Duration::from_millis(self.backoff_cap_ms.into()));
        let wait = match self.profile {
            Profile::Fixed { seconds } => Fixed(Duration::from_secs(seconds.into())).next_backoff(),
            Profile::Immediate => Fixed(IMMEDIATE).next_backoff(),
            Profile::ExponentialNoJitter => {
                let mut attempts = attempts;
                Exponential {
                    attempts: &mut attempts,
                    cap,
                }
                .next_backoff()
            }
            Profile::Flapping => Some(up_to(FLAPPING_RETURN_MAX, rng)),
            Profile::WellBehaved
            | Profile::IgnoresHints
            | Profile::Patient
            | Profile::SlowReader
            | Profile::HalfOpen
            | Profile::DuplicateId => FirstReturn { attempts, cap, rng }.next_backoff(),
        };
        self.wait(wait, now);
    }

    /// Only a session of a minute proves that the way is free; a shorter one counts as one more attempt.
    fn count_session(&mut self, online: &Online, now: Instant) {
        if now.saturating_since(online.since) >= STABLE {
            self.attempts.reset();
        } else {
            self.attempts.count();
        }
    }
}

/// The reason of 1012 and of 4000 to 4499. A text that is none of these is not a hint.
#[derive(Deserialize)]
struct CloseReason {
    #[serde(default)]
    retry_after_ms: Option<u64>,
    #[serde(default)]
    slot: Option<Box<str>>,
}
