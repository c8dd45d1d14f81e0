//! Measures memory at intervals; raises and ends the alarm. Start with [`follow`].

use std::{sync::Arc, time::Duration};

use seawall_proto::memory::Usage;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::{node::Shared, runtime::lifecycle::blocking};

/// Time between two measurements, normally and while over half of the memory is used.
const INTERVAL: Duration = Duration::from_secs(1);
const INTERVAL_HIGH: Duration = Duration::from_millis(100);
/// Alarm while devices are refused because memory is short.
const ALARM: &str = "memory_short";

/// Measures until `stop`. Raises and ends the alarm.
pub async fn follow(state: Shared, stop: CancellationToken) {
    loop {
        let measuring = Arc::clone(&state);
        let measured = blocking(move || measuring.memory.measure(measuring.sessions.len()));
        let usage = measured.await.flatten();
        publish(&state, usage);
        let span = if usage.is_some_and(Usage::is_high) {
            INTERVAL_HIGH
        } else {
            INTERVAL
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(span) => {}
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "gauges are floating point, and bytes of memory below 2^53"
)]
fn publish(state: &Shared, usage: Option<Usage>) {
    let Usage { used, limit } = usage.unwrap_or(Usage { used: 0, limit: 0 });
    state.metrics.memory_bytes.set("used", used as f64);
    state.metrics.memory_bytes.set("limit", limit as f64);
    let is_full = state.memory.is_full();
    state.metrics.memory_alarm.set(if is_full { 1.0 } else { 0.0 });
    let (used, limit) = (used >> 20, limit >> 20);
    let detail = if is_full {
        format!(
            "{used} of {limit} MiB are used: new devices are refused with slots, live sessions stay. Give this node more memory, or add a node"
        )
    } else {
        format!("{used} of {limit} MiB are used: new devices are admitted again")
    };
    state.alarms.set(ALARM, is_full, detail);
}
