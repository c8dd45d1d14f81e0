//! Reloads TLS files when they change or an operator requests it, and raises alarms about unusable files and expiring
//! certificates.

use std::{sync::Arc, time::Duration};

use rand::{SeedableRng as _, rngs::SmallRng};
use seawall_proto::{close::Close, id::CredentialTag, time::WallTime};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{
    edge::tls::{Reload, Reloaded},
    node::Shared,
    runtime::lifecycle::blocking,
};

/// Interval of checks of the files. Changed files are loaded when the next check finds them unchanged.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// Alarm while the files on disk cannot be used, so that older ones are in use.
const FILES_ALARM: &str = "tls_files";
/// Alarm while a certificate expires within [`EXPIRY_NOTICE`](crate::edge::tls::EXPIRY_NOTICE).
const EXPIRY_ALARM: &str = "certificate_expires";
/// Alarm while a revocation list should have been replaced by a newer one.
const LISTS_ALARM: &str = "revocation_list_out_of_date";

/// Checks the files until `stop`.
pub async fn follow(state: Shared, stop: CancellationToken) {
    if state.tls.endpoints().next().is_none() {
        return;
    }
    let mut checks = interval(CHECK_INTERVAL);
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = checks.tick() => {}
        }
        reload(&state, Reload::Changed).await;
    }
}

/// Loads the files as they are.
pub async fn reload_now(state: &Shared) {
    reload(state, Reload::Now).await;
}

async fn reload(state: &Shared, which: Reload) {
    let shared = Arc::clone(state);
    let reloaded = tokio::task::spawn_blocking(move || {
        let endpoints = shared.tls.endpoints();
        endpoints
            .map(|(listener, endpoint)| (listener, endpoint.reload(which)))
            .collect::<Vec<_>>()
    });
    // Cancelled only when the runtime ends.
    for (listener, reloaded) in reloaded.await.unwrap_or_default() {
        match reloaded {
            Reloaded::Unchanged => {}
            Reloaded::Taken => {
                state.metrics.tls_reloads.increment("taken");
                tracing::info!(listener, "TLS files reloaded");
            }
            Reloaded::Refused(error) => {
                state.metrics.tls_reloads.increment("refused");
                tracing::error!(listener, %error, "TLS files not usable: the previous ones stay in use");
            }
        }
    }
    match state.tls.problem() {
        Some(problem) => state.alarms.set(FILES_ALARM, true, problem.as_str()),
        None => state.alarms.set(FILES_ALARM, false, "the TLS files are in use"),
    }
    watch_certificates(state);
    watch_lists(state);
    close_revoked(state).await;
}

/// Closes the sessions whose certificates new lists revoke. Reads every session, so it runs off the runtime's workers.
async fn close_revoked(state: &Shared) {
    let Some(revoked) = state.tls.take_newly_revoked() else {
        return;
    };
    let shared = Arc::clone(state);
    let is_revoked =
        move |credential: CredentialTag| credential.certificate().is_some_and(|tag| revoked.contains(&tag));
    let found = blocking(move || shared.sessions.matching(|session| is_revoked(session.info.credential)));
    let mut rng = SmallRng::from_os_rng();
    let mut closed = 0_usize;
    for session in found.await.unwrap_or_default() {
        if session.close(Close::disconnected(&mut rng)) {
            closed += 1;
            tracing::debug!(device.id = %session.info.device, session.id = %session.id, "session of a revoked certificate closed");
        }
    }
    if closed > 0 {
        tracing::info!(sessions = closed, "sessions of revoked certificates closed");
    }
}

fn watch_certificates(state: &Shared) {
    for (listener, endpoint) in state.tls.endpoints() {
        let left = seconds_until(state, endpoint.expires());
        state.metrics.tls_certificate_seconds.set(listener, left);
    }
    let is_ending = state.is_certificate_ending();
    let detail = if is_ending {
        "a certificate expires in less than 14 days: after that devices refuse to connect"
    } else {
        "every certificate is valid for more than 14 days"
    };
    state.alarms.set(EXPIRY_ALARM, is_ending, detail);
}

fn watch_lists(state: &Shared) {
    let until = state.tls.lists_until();
    let left = until.map_or(f64::INFINITY, |until| seconds_until(state, until));
    state.metrics.tls_revocation_list_seconds.set(left);
    let is_out_of_date = state.is_revocation_list_out_of_date();
    let detail = if is_out_of_date {
        "a list in tls.client_crl should have been replaced by a newer one: certificates revoked since are still accepted"
    } else {
        "every list in tls.client_crl is current"
    };
    state.alarms.set(LISTS_ALARM, is_out_of_date, detail);
}

/// Negative if it has passed.
#[expect(
    clippy::cast_precision_loss,
    reason = "milliseconds of some years are far below 2^53"
)]
fn seconds_until(state: &Shared, end: WallTime) -> f64 {
    (end.as_unix_ms() as f64 - state.clock.wall().as_unix_ms() as f64) / 1_000.0
}
