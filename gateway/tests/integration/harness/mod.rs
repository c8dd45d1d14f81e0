//! What the tests stand on: databases and gateways of their own.

pub mod authority;
pub mod group;
pub mod pg;
pub mod pooler;
pub mod process;
