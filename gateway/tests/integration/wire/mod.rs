//! The device listener in bytes: these tests share no parser or frame writer with the gateway.

mod autobahn;
mod awaited;
mod balancer;
mod frames;
mod handshake;
mod heads;
mod pressure;
mod refusals;
mod tls;
