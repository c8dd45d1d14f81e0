//! Registered devices by tenant and model, as counted last. With it, devices that no node has seen are counted as well.
//! Start with [`Registered`].

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use crate::store::DeviceKinds;

/// The last count, and requests for the next. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Registered(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    counted: Mutex<Arc<DeviceKinds>>,
    wanted: Notify,
}

impl Registered {
    /// Devices were registered, changed or deleted.
    pub fn ask(&self) {
        self.0.wanted.notify_one();
    }

    /// Waits until somebody [asks](Self::ask). For one task alone.
    ///
    /// # Cancel safety
    /// Safe: a request that nobody waits for is kept for the next caller.
    pub async fn asked(&self) {
        self.0.wanted.notified().await;
    }

    pub fn set(&self, counted: DeviceKinds) {
        *self.0.counted.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(counted);
    }

    /// The last count. Empty before the first one.
    #[must_use]
    pub fn get(&self) -> Arc<DeviceKinds> {
        Arc::clone(&self.0.counted.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
