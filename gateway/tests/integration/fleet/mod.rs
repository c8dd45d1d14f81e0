//! Whole gateways and the devices of a fleet, over real sockets: what an operator would see.

mod devices;
mod drain;
mod frozen;
mod limit;
mod moving;
mod outage;
mod port;
mod registry;
mod restart;
mod resume;
mod revoked;
pub mod rig;
mod roster;
mod rules;
mod storm;
