//! What the tests stand on: databases of their own.

pub mod pg;
