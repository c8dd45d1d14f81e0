//! How sessions end: close codes, and the reason in the close frame (docs/PROTOCOL.md, "Close codes").
//!
//! [`Close::reason`] is the text of a [`Close`], at most the 123 bytes that a close frame has room for (RFC 6455 §5.5).
//! 1013 is not used: by its registered meaning a client may give up this address.

use std::time::Duration;

use rand::Rng;
use serde::Serialize;

use crate::hint::{self, Hint, draw};

/// Maximum length of a reason, in bytes: a control frame carries 125, two of which are the code (RFC 6455 §5.5).
pub const REASON_LEN_MAX: usize = 123;

/// The end of a session by the gateway, with its cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Close {
    /// 1000: the device closed the session.
    Normal,
    /// 1002: a frame that RFC 6455 forbids.
    Protocol,
    /// 1003: a binary frame in a `seawall.v1` session.
    WrongKind,
    /// 1007: text that is not UTF-8.
    NotUtf8,
    /// 1008: too many bad frames, a message rate above the limit, or a peer that does not read.
    Policy,
    /// 1009: a message above the size limit.
    TooBig,
    /// 1012: the device returns after the hint, to this node or another.
    Restart { why: Restart, hint: Hint },
    /// 4000: a rule refuses this firmware.
    Evicted { after: Duration },
    /// 4001: no frame for too long.
    HeartbeatMissed { after: Duration },
    /// 4002: an operator has disabled the device.
    Disabled { after: Duration },
    /// 4003: an operator has disconnected the device, its secret was replaced, or its certificate was revoked.
    Disconnected { after: Duration },
    /// 4500: a newer session of the same device.
    Replaced,
    /// 4501: the device's credential was revoked permanently.
    Revoked,
}

/// The party that ended a session. It decides whether the end is a failure of the device or its firmware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndedBy {
    /// The device, by a close frame or the end of its connection.
    Device,
    /// A newer session of the device.
    Replacement,
    /// The gateway, because the device violated the protocol or a limit.
    Fault,
    /// The device or its network: it sent nothing, or read nothing, for too long.
    Silence,
    /// The gateway or an operator.
    Gateway,
}

crate::labels! {
    /// Why a session ended: label `reason` of `seawall_closes_total`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum EndReason {
        Normal = "normal",
        Protocol = "protocol",
        WrongKind = "wrong_kind",
        NotUtf8 = "not_utf8",
        Policy = "policy",
        TooBig = "too_big",
        Draining = "draining",
        Ageing = "ageing",
        Evicted = "evicted",
        HeartbeatMissed = "heartbeat_missed",
        Disabled = "disabled",
        Disconnected = "disconnected",
        Replaced = "replaced",
        Revoked = "revoked",
        /// The device ended its connection, without a close frame.
        ClientGone = "client_gone",
        /// The device read nothing for too long.
        SlowReader = "slow_reader",
        /// The process ended first.
        Shutdown = "shutdown",
        /// The session's task panicked.
        Failed = "failed",
    }
}

impl EndReason {
    #[must_use]
    pub const fn ended_by(self) -> EndedBy {
        match self {
            Self::ClientGone | Self::Normal => EndedBy::Device,
            Self::Replaced => EndedBy::Replacement,
            Self::Protocol | Self::WrongKind | Self::NotUtf8 | Self::Policy | Self::TooBig => EndedBy::Fault,
            Self::HeartbeatMissed | Self::SlowReader => EndedBy::Silence,
            Self::Draining
            | Self::Ageing
            | Self::Evicted
            | Self::Disabled
            | Self::Disconnected
            | Self::Revoked
            | Self::Shutdown
            | Self::Failed => EndedBy::Gateway,
        }
    }
}

impl EndedBy {
    /// Whether a short session with this end may be part of a crash loop. Silence is left out: a broken network looks
    /// the same.
    #[must_use]
    pub const fn may_be_crash(self) -> bool {
        matches!(self, Self::Device | Self::Replacement | Self::Fault)
    }

    /// Whether a short session with this end has failed, for comparisons within one network. A session that was
    /// replaced is ignored: the newer one is counted.
    #[must_use]
    pub const fn is_failure(self) -> bool {
        matches!(self, Self::Device | Self::Fault | Self::Silence)
    }
}

crate::labels! {
    /// Why a session must move.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Restart {
        Draining = "draining",
        Ageing = "ageing",
    }
}

impl Close {
    /// 4001, with a hint of 1 to 10 s: a path that broke for many devices does not get all of them back at once.
    pub fn heartbeat_missed(rng: &mut impl Rng) -> Self {
        Self::HeartbeatMissed {
            after: draw(hint::HEARTBEAT_MISSED, rng),
        }
    }

    /// 4002, with the hint that a disabled device gets when it connects: 15 to 30 min.
    pub fn disabled(rng: &mut impl Rng) -> Self {
        Self::Disabled {
            after: draw(hint::DISABLED, rng),
        }
    }

    /// 4003, with a hint of 1 to 5 s.
    pub fn disconnected(rng: &mut impl Rng) -> Self {
        Self::Disconnected {
            after: draw(hint::DISCONNECTED, rng),
        }
    }

    /// 4000, with a hint between `at_least` and twice that; see [`crate::rules::Rule::evicted_for`].
    pub fn evicted(at_least: Duration, rng: &mut impl Rng) -> Self {
        Self::Evicted {
            after: draw(hint::up_to_twice(at_least), rng),
        }
    }

    /// Code on the wire.
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

    /// Value in metrics, in logs and in presence.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        self.end_reason().as_str()
    }

    #[must_use]
    pub const fn end_reason(&self) -> EndReason {
        match self {
            Self::Normal => EndReason::Normal,
            Self::Protocol => EndReason::Protocol,
            Self::WrongKind => EndReason::WrongKind,
            Self::NotUtf8 => EndReason::NotUtf8,
            Self::Policy => EndReason::Policy,
            Self::TooBig => EndReason::TooBig,
            Self::Restart { why, .. } => match why {
                Restart::Draining => EndReason::Draining,
                Restart::Ageing => EndReason::Ageing,
            },
            Self::Evicted { .. } => EndReason::Evicted,
            Self::HeartbeatMissed { .. } => EndReason::HeartbeatMissed,
            Self::Disabled { .. } => EndReason::Disabled,
            Self::Disconnected { .. } => EndReason::Disconnected,
            Self::Replaced => EndReason::Replaced,
            Self::Revoked => EndReason::Revoked,
        }
    }

    /// The text after the code: JSON if it has a hint, otherwise one word. At most [`REASON_LEN_MAX`] bytes: a slot
    /// that does not fit is left out, because the hint alone still works.
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
    fn an_end_is_a_failure_by_who_ended_the_session() {
        let of = |reason: EndReason| (reason.ended_by().may_be_crash(), reason.ended_by().is_failure());

        for reason in [
            EndReason::ClientGone,
            EndReason::Normal,
            EndReason::Protocol,
            EndReason::TooBig,
        ] {
            assert_eq!(of(reason), (true, true), "{reason:?}");
        }
        assert_eq!(of(EndReason::Replaced), (true, false));
        for reason in [EndReason::HeartbeatMissed, EndReason::SlowReader] {
            assert_eq!(of(reason), (false, true), "{reason:?}");
        }
        for reason in [
            EndReason::Draining,
            EndReason::Ageing,
            EndReason::Evicted,
            EndReason::Revoked,
            EndReason::Disconnected,
            EndReason::Shutdown,
            EndReason::Failed,
        ] {
            assert_eq!(of(reason), (false, false), "{reason:?}");
        }
        assert_eq!(Close::Policy.end_reason().ended_by(), EndedBy::Fault);
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
