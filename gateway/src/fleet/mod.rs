//! State of the fleet on this node: rules in force, resume tokens, the registry index, cohorts, history, events and
//! alarms.

pub mod alarms;
pub mod audit_journal;
pub mod breaker;
pub mod cohorts;
pub mod events;
pub mod faults;
pub mod history;
pub mod http;
pub mod last_known_good;
pub mod panics;
pub mod registered;
pub mod registry;
pub mod registry_index;
pub mod resume;
pub mod rollouts;
pub mod rules;
pub mod settings;
pub mod shared_config;
pub mod webhook;
