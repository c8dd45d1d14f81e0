//! Background tasks of a running node. Each loop acts on the whole [`Node`](crate::node).

pub mod attempts_summary;
pub mod audit_journal;
pub mod census;
pub mod cohorts;
pub mod departures;
pub mod faults;
pub mod gauges;
pub mod last_known_good;
pub mod memory;
pub mod plan_guard;
pub mod presence;
pub mod presence_returns;
pub mod registry;
pub mod registry_index;
pub mod resume;
pub mod revalidation;
pub mod revoked_sessions;
pub mod rollouts;
pub mod rule_journal;
pub mod rules;
pub mod session_ids;
pub mod silence;
pub mod supervise;
pub mod timer;
pub mod tls;
pub mod webhook;
