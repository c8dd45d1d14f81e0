//! Resources that a machine lacks: disk space, files, database connections, permissions, readers of its log. And many
//! devices behind one address, which must fit.

mod backends;
mod crowd;
mod disk;
mod files;
mod heartbeat;
mod log;
mod memory;
mod permission;

pub use disk::import;

/// Locked by a test that opens more than half of this process's files, so that only one runs.
pub static MANY_FILES: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
