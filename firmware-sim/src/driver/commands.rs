//! Commands to a device that wait for its task: at most one of each kind, so that no queue grows.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::Notify;

#[derive(Debug)]
pub(super) struct Commands {
    pending: Mutex<Pending>,
    wake: Notify,
}

/// Commands that the device has not seen yet.
#[derive(Clone, Debug, Default)]
pub(super) struct Pending {
    pub(super) drop_connection: bool,
    pub(super) restart_after: Option<Duration>,
    pub(super) end: bool,
    pub(super) absence: Option<Absence>,
    /// Not a command but a state: the version that the device runs from its next start on.
    pub(super) firmware: Option<Arc<str>>,
}

/// How a device goes away until it is restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Absence {
    /// It closes its session with 1000.
    Leave,
    /// It neither reads nor writes; its socket stays open.
    PowerCut,
}

impl Commands {
    pub(super) fn new(firmware: Option<Arc<str>>) -> Self {
        Self {
            pending: Mutex::new(Pending {
                firmware,
                ..Pending::default()
            }),
            wake: Notify::new(),
        }
    }

    pub(super) fn drop_connection(&self) {
        self.set(|pending| pending.drop_connection = true);
    }

    pub(super) fn go_away(&self, absence: Absence) {
        self.set(|pending| pending.absence = Some(absence));
    }

    pub(super) fn restart(&self, after: Duration) {
        self.set(|pending| {
            pending.absence = None;
            pending.restart_after = Some(after);
        });
    }

    pub(super) fn upgrade(&self, firmware: Option<Arc<str>>, after: Duration) {
        self.set(|pending| {
            pending.firmware = firmware;
            pending.restart_after = Some(after);
        });
    }

    pub(super) fn end(&self) {
        self.set(|pending| pending.end = true);
    }

    /// Takes the waiting commands.
    pub(super) fn take(&self) -> Pending {
        let mut pending = self.lock();
        let firmware = pending.firmware.clone();
        std::mem::replace(
            &mut *pending,
            Pending {
                firmware,
                ..Pending::default()
            },
        )
    }

    /// Waits for a command.
    ///
    /// # Cancel safety
    /// Safe: no wake-up is lost.
    pub(super) async fn given(&self) {
        self.wake.notified().await;
    }

    fn set(&self, give: impl FnOnce(&mut Pending)) {
        give(&mut self.lock());
        self.wake.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
