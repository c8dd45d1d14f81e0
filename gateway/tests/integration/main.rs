//! The gateway's integration tests: one binary, a file a capability.

#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod cli;
mod documents;
mod fleet;
mod fuzz;
mod harness;
mod lookup;
mod ops;
mod scarce;
mod siege;
mod store;
mod wire;
