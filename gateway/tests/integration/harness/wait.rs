//! Waiting for a condition, with a deadline.

use std::{
    future::Future,
    panic::Location,
    thread,
    time::{Duration, Instant},
};

/// Maximum wait for a condition that must become true.
pub const PATIENCE: Duration = Duration::from_secs(15);
/// Maximum wait for a condition that needs neither another node nor many devices.
pub const SHORT_PATIENCE: Duration = Duration::from_secs(10);
/// Time between two checks of a condition.
const CHECK_INTERVAL: Duration = Duration::from_millis(5);

/// Waits until `holds`.
#[track_caller]
pub fn eventually(holds: impl FnMut() -> bool) -> impl Future<Output = ()> {
    eventually_within(PATIENCE, holds)
}

/// Waits until `holds`, for at most [`SHORT_PATIENCE`].
#[track_caller]
pub fn soon(holds: impl FnMut() -> bool) -> impl Future<Output = ()> {
    eventually_within(SHORT_PATIENCE, holds)
}

#[track_caller]
fn eventually_within(span: Duration, mut holds: impl FnMut() -> bool) -> impl Future<Output = ()> {
    let deadline = Deadline::after(span);
    async move {
        while !holds() {
            deadline.assert_is_ahead();
            tokio::time::sleep(CHECK_INTERVAL).await;
        }
    }
}

/// Waits until `holds`, which itself waits for something.
#[track_caller]
pub fn eventually_async(holds: impl AsyncFn() -> bool) -> impl Future<Output = ()> {
    let deadline = Deadline::after(PATIENCE);
    async move {
        while !holds().await {
            deadline.assert_is_ahead();
            tokio::time::sleep(CHECK_INTERVAL).await;
        }
    }
}

/// Waits until `holds`, outside a runtime, for at most [`SHORT_PATIENCE`].
#[track_caller]
pub fn eventually_blocking(mut holds: impl FnMut() -> bool) {
    let deadline = Deadline::after(SHORT_PATIENCE);
    while !holds() {
        deadline.assert_is_ahead();
        thread::sleep(CHECK_INTERVAL);
    }
}

/// The end of a wait, and the test's line that waits.
struct Deadline {
    at: Instant,
    caller: &'static Location<'static>,
}

impl Deadline {
    #[track_caller]
    fn after(span: Duration) -> Self {
        Self {
            at: Instant::now() + span,
            caller: Location::caller(),
        }
    }

    fn assert_is_ahead(&self) {
        assert!(Instant::now() < self.at, "never came true: {}", self.caller);
    }
}
