//! Takes new files when they change or an operator asks for it, and tells operators of files that can't be used and of certificates that end.

use std::{sync::Arc, time::Duration};

use seawall_proto::time::WallTime;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::{Reload, Reloaded, Told};
use crate::state::Shared;

/// How often the files are looked at. Changed ones are taken when the look after that finds them as they were.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// The alarm that operators see while the files on disk are not those in use, since they can't be used.
const FILES_ALARM: &str = "tls_files";
/// The alarm that operators see while a certificate has less than [`EXPIRY_NOTICE`](super::EXPIRY_NOTICE) to go.
const EXPIRY_ALARM: &str = "certificate_expires";
/// The alarm that operators see while a revocation list should have been replaced by a newer one.
const LISTS_ALARM: &str = "revocation_list_out_of_date";

/// Until `stop`.
pub async fn follow(state: Shared, stop: CancellationToken) {
    if state.tls.endpoints().next().is_none() {
        return;
    }
    let mut looks = interval(LOOK_INTERVAL);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = looks.tick() => {}
        }
        reload(&state, Reload::Changed).await;
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
        (false, Some(problem)) => state.alarm(FILES_ALARM, true, problem.as_str()),
        (true, None) => state.alarm(FILES_ALARM, false, "the TLS files are in use"),
        (true, Some(_)) | (false, None) => {}
    }
    watch_certificates(state);
    watch_lists(state);
}

fn watch_certificates(state: &Shared) {
    for (listener, endpoint) in state.tls.endpoints() {
        let left = seconds_until(state, endpoint.expires());
        state.metrics.tls_certificate_seconds.set(listener, left);
    }
    let is_ending = state.is_certificate_ending();
    if Told::is_news(&state.tls.told.is_certificate_ending, is_ending) {
        let detail = if is_ending {
            "a certificate has less than 14 days to go: then devices refuse to connect"
        } else {
            "every certificate has more than 14 days to go"
        };
        state.alarm(EXPIRY_ALARM, is_ending, detail);
    }
}

fn watch_lists(state: &Shared) {
    let until = state.tls.lists_until();
    let left = until.map_or(f64::INFINITY, |until| seconds_until(state, until));
    state.metrics.tls_revocation_list_seconds.set(left);
    let is_out_of_date = state.is_revocation_list_out_of_date();
    if Told::is_news(&state.tls.told.is_list_out_of_date, is_out_of_date) {
        let detail = if is_out_of_date {
            "a list in tls.client_crl should have been replaced by a newer one: certificates revoked since are let in"
        } else {
            "every list in tls.client_crl is of now"
        };
        state.alarm(LISTS_ALARM, is_out_of_date, detail);
    }
}

/// Negative where it is over.
#[expect(
    clippy::cast_precision_loss,
    reason = "milliseconds of some years are far below 2^53"
)]
fn seconds_until(state: &Shared, end: WallTime) -> f64 {
    (end.as_unix_ms() as f64 - state.clock.wall().as_unix_ms() as f64) / 1_000.0
}
