//! Whether the registry is believed when it lacks a device. A registry that is suddenly empty, far smaller than before,
//! or without most of the devices that it had, is not: it may be a lost volume, a wrong database or a partial backup.
//! Devices that it lacks are then refused as devices that cannot be verified now, and no session ends.
//!
//! The registry index tells what it had; deletions through the API are recorded. A missing device of the index is
//! refused in the same way until a later count finds the registry complete. An operator accepts the registry by
//! creating a file named [`ACCEPT_FILE`] in the data directory. Start with [`Registry`].

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use seawall_proto::{resume::Generation, time::Instant};

/// File in the data directory that accepts the registry as it is. It is removed when it has been read.
pub const ACCEPT_FILE: &str = "accept-registry";

/// State of the registry.
#[derive(Debug, Default)]
pub struct Registry {
    /// Whether this node has decided at least once whether it is believed.
    pub(crate) was_judged: AtomicBool,
    /// Whether an operator accepted it as it is, until the registry index is next read.
    pub(crate) is_accepted: AtomicBool,
    /// Whether the last reading of the registry did not have most devices of the registry index.
    pub(crate) is_another: AtomicBool,
    /// Reading of the registry index in use. `None` if it was not read since the start.
    index_read: Mutex<Option<IndexRead>>,
}

/// The beginning of a reading of the registry index. No wall clock can be set back here.
#[derive(Clone, Copy, Debug)]
pub struct IndexRead {
    pub at: Instant,
    /// Revision of the revocations that this node knew; `None` if it knew none.
    pub revision: Option<Generation>,
}

impl Registry {
    #[must_use]
    pub fn was_judged(&self) -> bool {
        self.was_judged.load(Ordering::Acquire)
    }

    /// Reading of the registry index in use. `None` if it was not read since the start.
    #[must_use]
    pub fn index_read(&self) -> Option<IndexRead> {
        *self.index_read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A registry index with the current content of the registry was accepted.
    pub fn handle_registry_index(&self, read: IndexRead) {
        *self.index_read.lock().unwrap_or_else(PoisonError::into_inner) = Some(read);
        self.is_accepted.store(false, Ordering::Release);
    }
}
