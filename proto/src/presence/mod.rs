//! Presence: whether a device is connected, how that is known, and why it can't be known.
//!
//! A node knows what its own sockets and kernel tell it. Where it cannot trust itself or the network between, it says
//! [`Presence::Unknown`] with the cause, never a guess.

pub mod batches;
pub mod gone;
pub mod groups;
pub mod known;
pub mod observer;
pub mod usual;

pub use self::known::Known;
use crate::time::WallTime;

/// State of a device's connection, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// A node holds its socket, and hears from it.
    Online,
    /// Its last session has ended; this proves it.
    Offline(Evidence),
    /// It may be either.
    Unknown(Cause),
}

/// What proves that a device is offline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// A close frame ended its session: the device's own, or one that the gateway sent.
    Closed {
        /// RFC 6455 §7.4.
        code: u16,
        by_device: bool,
    },
    /// Its connection was reset, or ended without a close frame.
    Reset,
    /// It left pings unanswered, and its kernel buffer held nothing unread.
    Silent {
        pings_unanswered: u8,
        /// When its last byte came in.
        last_heard: WallTime,
    },
    /// The process that held its socket ended, and all sockets with it. It did not return within
    /// [`RETURN_GRACE`](known::RETURN_GRACE).
    NotBack {
        /// Since when it could have returned.
        since: WallTime,
    },
}

crate::labels! {
    /// Why it is not known whether a device is connected.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub enum Cause {
        /// The node that holds its socket is too slow to tell.
        NodeLagging = "node_lagging",
        /// Many devices of one network, tenant or load balancer went silent at once: a fault on the path is likelier.
        Path = "path",
        /// The node that held its socket is gone, and its devices were not seen elsewhere yet.
        NodeLost = "node_lost",
        /// The gateway restarted without closing its sessions: the device may be on its way back.
        NodeRestarted = "node_restarted",
        /// No node has seen it.
        NeverSeen = "never_seen",
    }
}
