//! What a machine runs out of: room on its disk, files, connections of the database, permissions, readers of its log. And what it must not run out of:
//! room for many devices behind one address.

mod backends;
mod crowd;
mod disk;
mod files;
mod heartbeat;
mod log;
mod memory;
mod permission;

pub use disk::import;

/// Held by a test that opens more than half of the files that this process may have: one at a time.
pub static MANY_FILES: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
