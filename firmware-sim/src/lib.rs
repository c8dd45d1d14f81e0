//! Simulated devices: the reference client of a Seawall gateway, and fleets of it.
//!
//! # Layout
//! - [`device`]: the client machine, pure; the simulator runs it in virtual time. Read this first.
//! - [`profile`], [`backoff`]: how devices behave, from well-behaved to hostile, and how long they wait.
//! - [`connection`]: one connection by hand, for tests and tools.

pub mod backoff;
pub mod device;
pub mod profile;
