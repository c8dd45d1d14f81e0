//! How sessions end: close codes, and what stands in the close frame's reason (contract section 5).
//!
//! A [`Close`] is the fact; [`Close::reason`] is its text, never over the 123 bytes that a close frame has room for
//! (RFC 6455 §5.5). 1013 does not exist here: its registered meaning tells a client not to come back to this address.

use std::time::Duration;

use rand::Rng;
use serde::Serialize;

use crate::refusal::{Hint, draw};

/// Longest reason, in bytes: a control frame carries 125, two of them are the code (RFC 6455 §5.5).
pub const REASON_LEN_MAX: usize = 123;

/// Why and how the gateway ends a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Close {
    /// 1000: the device said goodbye.
    Normal,
    /// 1002: a frame that RFC 6455 forbids.
    Protocol,
    /// 1003: a binary frame in a `seawall.v1` session.
    WrongKind,
    /// 1007: text that is not UTF-8.
    NotUtf8,
    /// 1008: too many bad frames, over the message rate, or a peer that does not read.
    Policy,
    /// 1009: a message over the limit.
    TooBig,
    /// 1012: come back after the hint, here or at another node.
    Restart { why: Restart, hint: Hint },
    /// 4000: a rule does not want this firmware any more.
    Evicted { after: Duration },
    /// 4001: nothing was heard for too long.
    HeartbeatMissed { after: Duration },
    /// 4002: an operator has disabled the device.
    Disabled { after: Duration },
    /// 4003: an operator has disconnected the device.
    Disconnected { after: Duration },
    /// 4500: a newer session of the same device.
    Replaced,
    /// 4501: the device's credential is gone for good.
    Revoked,
}

/// Why a session is asked to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    Draining,
    Ageing,
}

impl Restart {
    /// The word in the reason.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Ageing => "ageing",
        }
    }
}

impl Close {
    /// 4001, with a hint of 1 to 10 s: a path that broke for many is not met by all of them at once.
    pub fn heartbeat_missed(rng: &mut impl Rng) -> Self {
        Self::HeartbeatMissed {
            after: draw(Duration::from_secs(1)..=Duration::from_secs(10), rng),
        }
    }

    /// 4002, with the hint that a disabled device gets at the door: 15 to 30 min.
    pub fn disabled(rng: &mut impl Rng) -> Self {
        Self::Disabled {
            after: draw(Duration::from_secs(900)..=Duration::from_secs(1800), rng),
        }
    }

    /// 4003, with a hint of 1 to 5 s.
    pub fn disconnected(rng: &mut impl Rng) -> Self {
        Self::Disconnected {
            after: draw(Duration::from_secs(1)..=Duration::from_secs(5), rng),
        }
    }

    /// 4000, with a hint between `at_least` and twice that; see [`crate::rules::Rule::evicted_for`].
    pub fn evicted(at_least: Duration, rng: &mut impl Rng) -> Self {
        Self::Evicted {
            after: draw(at_least..=at_least.saturating_mul(2), rng),
        }
    }

    /// The number on the wire.
    #[must_use]
    pub const fn code(&self) -> u16 {
        match self {
            Self::Normal => 1000,
            Self::Protocol => 1002,
            Self::WrongKind => 1003,
            Self::NotUtf8 => 1007,
            Self::Policy => 1008,
            Self::TooBig => 1009,
            Self::Restart { .. } => 1012,
            Self::Evicted { .. } => 4000,
            Self::HeartbeatMissed { .. } => 4001,
            Self::Disabled { .. } => 4002,
            Self::Disconnected { .. } => 4003,
            Self::Replaced => 4500,
            Self::Revoked => 4501,
        }
    }

    /// The word in metrics, in logs and in presence.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Protocol => "protocol",
            Self::WrongKind => "wrong_kind",
            Self::NotUtf8 => "not_utf8",
            Self::Policy => "policy",
            Self::TooBig => "too_big",
            Self::Restart { why, .. } => why.as_str(),
            Self::Evicted { .. } => "evicted",
            Self::HeartbeatMissed { .. } => "heartbeat_missed",
            Self::Disabled { .. } => "disabled",
            Self::Disconnected { .. } => "disconnected",
            Self::Replaced => "replaced",
            Self::Revoked => "revoked",
        }
    }

    /// The text beside the code: JSON where a hint goes with it, else one word. At most [`REASON_LEN_MAX`] bytes: a slot
    /// that does not fit is left out, since the hint alone still works.
    #[must_use]
    pub fn reason(&self) -> String {
        match self {
            Self::Normal => String::new(),
            Self::Protocol
            | Self::WrongKind
            | Self::NotUtf8
            | Self::Policy
            | Self::TooBig
            | Self::Replaced
            | Self::Revoked => self.as_str().to_owned(),
            Self::Restart { hint, .. } => {
                let with_slot = self.reason_json(hint.after, hint.slot.as_deref());
                if with_slot.len() <= REASON_LEN_MAX {
                    with_slot
                } else {
                    self.reason_json(hint.after, None)
                }
            }
            Self::Evicted { after }
            | Self::HeartbeatMissed { after }
            | Self::Disabled { after }
            | Self::Disconnected { after } => self.reason_json(*after, None),
        }
    }

    fn reason_json(&self, after: Duration, slot: Option<&str>) -> String {
        let reason = Reason {
            retry_after_ms: u64::try_from(after.as_millis()).unwrap_or(u64::MAX),
            reason: self.as_str(),
            slot,
        };
        serde_json::to_string(&reason).expect("a struct of texts and numbers always has a JSON form")
    }
}

#[derive(Serialize)]
struct Reason<'a> {
    retry_after_ms: u64,
    reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    slot: Option<&'a str>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restart(slot: &str) -> Close {
        Close::Restart {
            why: Restart::Draining,
            hint: Hint {
                after: Duration::from_millis(600_000),
                slot: Some(slot.into()),
            },
        }
    }

    #[test]
    fn restart_carries_hint_and_slot() {
        let slot = "s".repeat(52);

        let close = restart(&slot);

        assert_eq!(close.code(), 1012);
        assert_eq!(
            close.reason(),
            format!("{{\"retry_after_ms\":600000,\"reason\":\"draining\",\"slot\":\"{slot}\"}}")
        );
        assert!(close.reason().len() <= REASON_LEN_MAX);
    }

    #[test]
    fn slot_that_does_not_fit_is_left_out_and_the_hint_stays() {
        let close = restart(&"s".repeat(100));

        assert_eq!(close.reason(), "{\"retry_after_ms\":600000,\"reason\":\"draining\"}");
    }

    #[test]
    fn no_reason_is_longer_than_a_close_frame_has_room_for() {
        let after = Duration::MAX;
        let hint = Hint { after, slot: None };
        for close in [
            Close::Restart {
                why: Restart::Ageing,
                hint,
            },
            Close::Evicted { after },
            Close::HeartbeatMissed { after },
            Close::Disabled { after },
            Close::Disconnected { after },
        ] {
            assert!(close.reason().len() <= REASON_LEN_MAX, "{}", close.reason());
            assert_ne!(close.code(), 1013);
        }
    }

    #[test]
    fn closes_of_our_own_name_their_reason_and_hint() {
        let close = Close::Disconnected {
            after: Duration::from_millis(1500),
        };

        assert_eq!(close.code(), 4003);
        assert_eq!(close.reason(), "{\"retry_after_ms\":1500,\"reason\":\"disconnected\"}");
        assert_eq!(Close::Policy.reason(), "policy");
        assert_eq!(Close::Replaced.code(), 4500);
        assert_eq!(Close::Revoked.code(), 4501);
    }
}
