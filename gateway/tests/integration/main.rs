//! The gateway's integration tests: one binary, a file a capability.

mod harness;
mod store;
