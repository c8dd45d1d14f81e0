//! Live sessions: the WebSocket, who is connected, and what that says of a device. Start with [`sessions`].

pub mod census;
pub mod departures;
pub mod ids;
pub mod observer;
pub mod presence;
pub mod restricted;
pub mod sessions;
pub mod silence;
pub mod socket;
