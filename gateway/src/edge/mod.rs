//! Incoming connections: the listener and its limits, addresses, the PROXY protocol, TLS and the request head. Start
//! with [`listener`].

pub mod address;
mod bounded;
pub mod head;
pub mod limiter;
pub mod listener;
pub mod proxy;
pub mod tls;
pub mod transport;
