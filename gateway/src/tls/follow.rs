//! Takes new files when they change or an operator asks for it, and tells operators of files that can't be used and of certificates that end.

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::{Reload, Reloaded};
use crate::state::Shared;

/// How often the files are looked at. Changed ones are taken when the look after that finds them as they were.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// The alarm that operators see while the files on disk are not those in use, since they can't be used.
const FILES_ALARM: &str = "tls_files";
/// The alarm that operators see while a certificate has less than [`EXPIRY_NOTICE`](super::EXPIRY_NOTICE) to go.
const EXPIRY_ALARM: &str = "certificate_expires";

/// Until `stop`.
pub async fn follow(state: Shared, stop: CancellationToken) {
    if state.tls.endpoints().next().is_none() {
        return;
    }
    let mut looks = interval(LOOK_INTERVAL);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut was_expiring = false;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = looks.tick() => {}
        }
        reload(&state, Reload::Changed).await;
        watch_expiry(&state, &mut was_expiring);
    }
}

/// Takes the files as they are.
pub async fn reload_now(state: &Shared) {
    reload(state, Reload::Now).await;
}

async fn reload(state: &Shared, which: Reload) {
    let (had_problem, looking) = (state.tls.problem().is_some(), Arc::clone(state));
    let looked = tokio::task::spawn_blocking(move || {
        let endpoints = looking.tls.endpoints();
        endpoints
            .map(|(listener, endpoint)| (listener, endpoint.reload(which)))
            .collect::<Vec<_>>()
    });
    // Cancelled only where the runtime ends.
    for (listener, reloaded) in looked.await.unwrap_or_default() {
        match reloaded {
            Reloaded::Unchanged => {}
            Reloaded::Taken => {
                state.metrics.tls_reloads.increment("taken");
                tracing::info!(listener, "certificate taken anew");
            }
            Reloaded::Refused(error) => {
                state.metrics.tls_reloads.increment("refused");
                tracing::error!(listener, %error, "the TLS files can't be used: those before stay in use");
            }
        }
    }
    match (had_problem, state.tls.problem()) {
        (false, Some(problem)) => state.alarm(FILES_ALARM, true, problem),
        (true, None) => state.alarm(FILES_ALARM, false, "the TLS files are in use"),
        (true, Some(_)) | (false, None) => {}
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "milliseconds of some years are far below 2^53"
)]
fn watch_expiry(state: &Shared, was_expiring: &mut bool) {
    let now = state.clock.wall().as_unix_ms();
    for (listener, endpoint) in state.tls.endpoints() {
        let left = endpoint.expires().as_unix_ms() as f64 - now as f64;
        state.metrics.tls_certificate_seconds.set(listener, left / 1_000.0);
    }
    let is_expiring = state.is_certificate_ending();
    if is_expiring != *was_expiring {
        let detail = if is_expiring {
            "a certificate has less than 14 days to go: then devices refuse to connect"
        } else {
            "every certificate has more than 14 days to go"
        };
        state.alarm(EXPIRY_ALARM, is_expiring, detail);
    }
    *was_expiring = is_expiring;
}
