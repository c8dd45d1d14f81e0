//! The base of all other modules: configuration, clock, data directory, lifecycle, logs and memory. It uses no other
//! module of the gateway.

pub mod capacity;
pub mod clock;
pub mod config;
pub mod data_dir;
pub mod keys;
pub mod lifecycle;
pub mod memory;
pub mod telemetry;
