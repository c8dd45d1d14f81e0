//! Simulated devices: the reference client of a Seawall gateway, and fleets of it.
//!
//! # Layout
//! - [`device`]: the client machine, pure; the simulator runs it in virtual time. Read this first.
//! - [`profile`], [`backoff`]: how devices behave, from well-behaved to hostile, and how long they wait.
//! - [`driver`]: machines on real sockets, a task each; [`fleet`]: thousands of them, with figures ([`stats`]).
//! - [`identity`], [`mix`]: who the devices are, and what they run; [`messages`]: what they send of their own accord.
//! - [`connection`]: one connection by hand, for tests and tools.
//! - [`tls`]: whom devices believe that a gateway is the one they look for.
//! - [`target`]: the gateway's URL, and the local addresses that devices connect from.

pub mod backoff;
mod board;
pub mod connection;
pub mod device;
pub mod driver;
pub mod fleet;
mod handshake;
pub mod identity;
pub mod messages;
pub mod mix;
pub mod profile;
pub mod stats;
pub mod target;
pub mod tls;
