//! The gateway's integration tests: one binary, one file per capability.

#![expect(clippy::unwrap_used, reason = "a test that cannot continue has failed")]

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
