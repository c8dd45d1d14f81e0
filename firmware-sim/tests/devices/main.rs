//! Devices on real sockets, against a small gateway that each test scripts itself.

#![expect(clippy::unwrap_used, reason = "a test that cannot continue has failed")]

mod connection;
mod fleet;
mod gateway;
mod program;

use std::time::Duration;

use firmware_sim::identity::{Identity, Lines, read_devices};

/// Longest that any test waits for anything.
const DEADLINE: Duration = Duration::from_secs(20);

/// Waits until it is so.
async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < DEADLINE, "{what}: not in {DEADLINE:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn csv(count: usize) -> String {
    let mut text = String::from("id,secret,tenant,model\n");
    for n in 0..count {
        text += &format!("00000000-0000-4000-8000-{n:012x},secret-of-device-{n:06},acme,m1\n");
    }
    text
}

fn devices(count: usize) -> Vec<Identity> {
    read_devices(csv(count).as_bytes(), Lines::default()).unwrap()
}
