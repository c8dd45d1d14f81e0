//! Simulated devices: the reference client of a Seawall gateway, and fleets of it.
//!
//! # Layout
//! - [`device`]: the client machine, pure; the simulator runs it in virtual time. Read this first.
//! - [`profile`], [`backoff`]: how devices behave, from well-behaved to hostile, and how long they wait.
//! - [`driver`]: machines on real sockets, a task each; [`fleet`]: thousands of them, with figures ([`stats`]).
//! - [`identity`], [`mix`]: ids and versions of the devices; [`messages`]: what they send on their own.
//! - [`connection`]: one connection by hand, for tests and tools.
//! - [`tls`]: how devices verify the gateway.
//! - [`files`]: the sockets that this process may open.
//! - [`target`]: the gateway's URL, and the local addresses that devices connect from.

pub mod backoff;
pub mod connection;
pub mod device;
pub mod driver;
pub mod files;
pub mod fleet;
mod handshake;
pub mod identity;
pub mod messages;
pub mod mix;
pub mod profile;
mod recorder;
pub mod stats;
pub mod target;
pub mod tls;
