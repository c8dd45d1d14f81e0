//! The figures that a device lives by, each with its source.

use std::time::Duration;

/// How long an attempt tries to open its connection, TCP and TLS together. A device gives up behind TCP's third SYN again (7 s): the
/// next come after 15 and 31 s, and a full gateway that is idle again by then would wait for them.
pub const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);

/// How long it waits for the answer to its request: longer than any queue of a gateway that keeps its word (3 s), so that it only ends
/// attempts that nobody answers. See docs/design/slots.md.
pub const ANSWER_TIMEOUT_DEFAULT: Duration = Duration::from_secs(60);

/// A session this long resets the attempts. Reset on connect instead, and a gateway that accepts and then falls over
/// meets its fleet at the shortest waits, again and again. See docs/design/slots.md.
pub const STABLE: Duration = Duration::from_secs(60);

/// Between pings of the gateway, where no welcome named it (a plain session).
pub const HEARTBEAT_DEFAULT: Duration = Duration::from_secs(30);

/// Bounds of what a welcome may name: a slip must neither flood the gateway nor silence the device.
pub const HEARTBEAT_MIN: Duration = Duration::from_secs(1);
/// See [`HEARTBEAT_MIN`].
pub const HEARTBEAT_MAX: Duration = Duration::from_secs(3600);

/// A heartbeat goes out a quarter of `heartbeat_ms` late, so that a gateway that pings on time (the pong counts) is never
/// sent both. Well within the three that it may miss.
pub const HEARTBEAT_SLACK_DIVISOR: u32 = 4;

/// Number of heartbeats without a frame after which a gateway is gone, at least [`SILENCE_MIN`]. The same limit as the
/// gateway has for a device (docs/PROTOCOL.md, "Frames of `seawall.v1`").
pub const HEARTBEATS_MISSED_MAX: u32 = 3;
/// See [`HEARTBEATS_MISSED_MAX`].
pub const SILENCE_MIN: Duration = Duration::from_secs(60);

/// Close 4500: stay away for at least a quarter of an hour, with as much again as jitter.
pub const REPLACED_WAIT: (Duration, Duration) = (Duration::from_secs(900), Duration::from_secs(1800));

/// A newer session of this device replaced this one.
pub const CODE_REPLACED: u16 = 4500;
/// Service restart: the reason has the hint.
pub const CODE_RESTART: u16 = 1012;
