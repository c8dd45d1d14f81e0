//! How sessions end, what they are counted as, and what that proves about their devices.

use seawall_proto::{
    close::{Close, EndReason},
    presence::Evidence,
    session::Silence,
    time::WallTime,
};

use crate::session::socket::SendError;

/// How a session ended.
pub(super) enum End {
    /// We close it.
    Closed(Close),
    /// The peer broke the protocol.
    Failed(Close),
    /// The peer said goodbye, with this code.
    Goodbye(u16),
    /// The peer said goodbye because the protocol was broken, or by breaking it.
    BadGoodbye,
    /// The connection broke.
    Gone,
    /// The peer is there, and does not read.
    Slow,
    /// The peer did not read in time what would tell it that its session ends for this reason, with this close code.
    Unheard {
        reason: EndReason,
        code: u16,
        /// Bytes written when it began to be waited for.
        written: u64,
    },
}

impl End {
    pub(super) const fn reason(&self) -> EndReason {
        match self {
            Self::Closed(close) | Self::Failed(close) => close.end_reason(),
            Self::Goodbye(_) => EndReason::Normal,
            Self::BadGoodbye => EndReason::Protocol,
            Self::Gone => EndReason::ClientGone,
            Self::Slow => EndReason::SlowReader,
            Self::Unheard { reason, .. } => *reason,
        }
    }

    /// What proves that the device is offline. `silence`: how long nothing was heard of it.
    pub(super) fn evidence(&self, silence: impl FnOnce() -> Silence, wall: WallTime) -> Evidence {
        match self {
            Self::Closed(Close::HeartbeatMissed { .. }) => {
                let silence = silence();
                Evidence::Silent {
                    pings_unanswered: silence.pings_unanswered,
                    last_heard: wall - silence.lasts,
                }
            }
            Self::Closed(close) | Self::Failed(close) => Evidence::Closed {
                code: close.code(),
                by_device: false,
            },
            Self::Goodbye(code) => Evidence::Closed {
                code: *code,
                by_device: true,
            },
            Self::BadGoodbye => Evidence::Closed {
                code: Close::Protocol.code(),
                by_device: true,
            },
            Self::Slow => Evidence::Closed {
                code: Close::Policy.code(),
                by_device: false,
            },
            Self::Unheard { code, .. } => Evidence::Closed {
                code: *code,
                by_device: false,
            },
            Self::Gone => Evidence::Reset,
        }
    }
}

impl From<SendError> for End {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Slow => Self::Slow,
            SendError::Gone => Self::Gone,
        }
    }
}
