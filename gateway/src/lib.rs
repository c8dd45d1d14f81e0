//! The gateway: sockets, databases, API and command line around the policy of `seawall_proto`.

pub mod address;
pub mod capacity;
pub mod cli;
pub mod clock;
pub mod cohorts;
pub mod config;
pub mod connection;
pub mod data_dir;
pub mod drain;
pub mod events;
pub mod head;
pub mod history;
pub mod keys;
pub mod lifecycle;
pub mod listener;
pub mod lookup;
pub mod metrics;
pub mod presence;
pub mod rules;
pub mod serve;
pub mod sessions;
pub mod socket;
pub mod state;
pub mod store;
pub mod telemetry;
pub mod tokens;
