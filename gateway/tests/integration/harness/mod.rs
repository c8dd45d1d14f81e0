//! Building blocks of the tests: gateways and databases, devices, and waiting.

pub mod authority;
pub mod devices;
pub mod figures;
pub mod gateway;
pub mod group;
pub mod pg;
pub mod pooler;
pub mod process;
pub mod raw;
pub mod receiver;
pub mod skip;
pub mod wait;
