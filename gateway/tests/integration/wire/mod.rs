//! The device listener, spoken to in bytes: nothing here shares a parser or a frame writer with the gateway.

mod autobahn;
mod awaited;
mod balancer;
mod frames;
mod handshake;
mod heads;
mod pressure;
pub mod raw;
mod refusals;
pub mod rig;
mod tls;
