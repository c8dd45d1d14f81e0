//! Seawall's wire contract and all of its policy: input and `now` in, decision out.
//!
//! This crate has no sockets, no runtime, no database, no clock, no global random source and no metrics. The gateway,
//! the simulated devices and the simulator run the very same code from here.
//!
//! Start with [`handshake`]: it holds the fixed order of decisions that a connecting device goes through.

pub mod admission;
pub mod ageing;
pub mod close;
pub mod drain;
pub mod duplicates;
pub mod firmware;
pub mod frame;
pub mod handshake;
pub mod hello;
pub mod id;
pub mod memory;
pub mod record;
pub mod refusal;
pub mod resume;
pub mod rules;
pub mod session;
pub mod slots;
pub mod time;
