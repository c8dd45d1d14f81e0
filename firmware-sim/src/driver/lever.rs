//! What others want of a device, waiting for its task: at most one order of a kind, so that no queue grows.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::Notify;

#[derive(Debug)]
pub(super) struct Lever {
    orders: Mutex<Orders>,
    wake: Notify,
}

/// Orders that the device has not seen yet.
#[derive(Clone, Debug, Default)]
pub(super) struct Orders {
    pub(super) drop_connection: bool,
    pub(super) restart_after: Option<Duration>,
    pub(super) end: bool,
    /// Not an order but a state: what runs on the device from its next start.
    pub(super) firmware: Option<Arc<str>>,
}

impl Lever {
    pub(super) fn new(firmware: Option<Arc<str>>) -> Self {
        Self {
            orders: Mutex::new(Orders {
                firmware,
                ..Orders::default()
            }),
            wake: Notify::new(),
        }
    }

    pub(super) fn drop_connection(&self) {
        self.order(|orders| orders.drop_connection = true);
    }

    pub(super) fn restart(&self, after: Duration) {
        self.order(|orders| orders.restart_after = Some(after));
    }

    pub(super) fn upgrade(&self, firmware: Option<Arc<str>>, after: Duration) {
        self.order(|orders| {
            orders.firmware = firmware;
            orders.restart_after = Some(after);
        });
    }

    pub(super) fn end(&self) {
        self.order(|orders| orders.end = true);
    }

    /// Takes what is there.
    pub(super) fn take(&self) -> Orders {
        let mut orders = self.lock();
        let firmware = orders.firmware.clone();
        std::mem::replace(
            &mut *orders,
            Orders {
                firmware,
                ..Orders::default()
            },
        )
    }

    /// # Cancel safety
    /// Safe: a wake-up that nobody took is kept.
    pub(super) async fn pulled(&self) {
        self.wake.notified().await;
    }

    fn order(&self, give: impl FnOnce(&mut Orders)) {
        give(&mut self.lock());
        self.wake.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
