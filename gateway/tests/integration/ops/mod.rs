//! The ops API over real HTTP, on a gateway with SQLite and port 0.

mod access;
mod alarms;
mod devices;
mod document;
mod drain;
mod duplicates;
mod events;
mod form;
mod import;
mod journal;
mod listener;
mod messages;
mod names;
mod presence;
mod presence_nodes;
mod proposals;
mod rig;
mod rollouts;
mod rules;
mod versions;
mod webhook;
