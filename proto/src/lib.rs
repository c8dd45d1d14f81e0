//! Seawall's wire contract and all of its policy: input and `now` in, decision out.
//!
//! This crate has no sockets, no runtime, no database, no clock, no global random source and no metrics. The gateway,
//! the simulated devices and the simulator run the very same code from here.
//!
//! Start with [`connect`]: it holds the one order of decisions about a connecting device.

pub mod admission;
mod bounded;
pub mod close;

pub mod cohort;
pub mod cohorts;
pub mod config_source;
pub mod connect;
pub mod departures;
pub mod duplicates;
pub mod epoch;
pub mod firmware;
pub mod frame;
pub mod freshness;
pub mod hello;
mod hint;
pub mod id;
mod keyring;
mod labels;
pub mod memory;
pub mod presence;
pub mod proving;
mod rate;
pub mod record;
pub mod refusal;
pub mod resume;
pub mod rollout;
pub mod rules;
pub mod session;
pub mod slots;
pub mod time;
pub mod webhook;
