//! The gateway: sockets, databases, API and command line around the policy of `seawall_proto`.

pub mod config;
pub mod telemetry;
