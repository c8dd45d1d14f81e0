//! Whole gateways and the devices of a fleet over real sockets, as an operator sees them.

mod devices;
mod drain;
mod frozen;
mod killed;
mod limit;
mod moving;
mod outage;
mod port;
mod presence;
mod registry;
mod registry_index;
mod restart;
mod restricted;
mod resume;
mod revoked;
mod rollouts;
mod rules;
mod silence;
mod storm;
