//! What the tests stand on: databases and gateways of their own.

pub mod authority;
pub mod pg;
pub mod process;
