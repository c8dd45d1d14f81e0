//! Revalidation: a few of the devices that a resume token admitted are looked up in the background, on a separate
//! connection.

use seawall_proto::{
    admission::{BreakerState, LOOKUP_MAX},
    resume::{Finding, REVALIDATION_INTERVAL},
};
use tokio_util::sync::CancellationToken;

use crate::{
    fleet::resume::Case,
    node::{Shared, State},
    store::LookupWorker,
    tasks::registry,
};

/// Looks them up, one at a time, until `stop`. At most one key is in flight in addition to those of admission, and only
/// while no device waits.
pub async fn run(state: Shared, stop: CancellationToken) {
    let mut worker = state.store.lookup_worker();
    let work = async {
        loop {
            let drawn = state.resume.drawn.notified();
            let (case, is_empty) = {
                let is_idle = is_idle(&state);
                let mut revalidations = state.resume.revalidations();
                (revalidations.poll(is_idle, state.clock.now()), revalidations.is_empty())
            };
            match case {
                Some(case) => look_up(&state, &mut worker, &case).await,
                None if is_empty => drawn.await,
                None => tokio::time::sleep(REVALIDATION_INTERVAL).await,
            }
        }
    };
    // The endless loop is dropped with the gateway.
    let _: Option<std::convert::Infallible> = stop.run_until_cancelled(work).await;
}

fn is_idle(state: &State) -> bool {
    let admission = state.lookups.state();
    admission.queue == 0 && admission.breaker == BreakerState::Closed && state.store.state().status.is_answering()
}

async fn look_up(state: &State, worker: &mut LookupWorker, case: &Case) {
    let device = case.grant.device;
    let answer = match worker.find(&[device], LOOKUP_MAX).await {
        Ok(answer) if answer.unreadable.is_empty() => answer,
        Ok(_) => return state.metrics.resume_revalidations.increment("failed"),
        Err(error) => {
            tracing::debug!(%error, "revalidation of a device failed");
            return state.metrics.resume_revalidations.increment("failed");
        }
    };
    let finding = Finding::of(&case.grant, answer.records.first(), state.clock.wall());
    state.metrics.resume_revalidations.increment(finding.as_str());
    // A change through the API has already revoked the token and ended the session.
    if finding == Finding::Confirmed || !state.resume.allows(&case.grant) {
        return;
    }
    if finding == Finding::Absent && !registry::may_believe_absence(state).await {
        return;
    }
    tracing::warn!(device.id = %device, finding = finding.as_str(), "device differs from its resume token, but no revocation was recorded: was the database edited directly?");
    // On all nodes, or at least here. For a revoked device that is not in the registry, other nodes end the session as
    // that of a deleted device. An unrecorded absence must not have that effect.
    if finding != Finding::Absent
        && let Err(error) = state.store.revoke_tokens(device, state.clock.wall()).await
    {
        tracing::warn!(device.id = %device, %error, "resume token revoked on this node only");
    }
    state.resume.revoke(device).await;
    let close = finding.close(&mut rand::rng());
    let session = state.sessions.get(device).filter(|session| session.id == case.session);
    if let (Some(close), Some(session)) = (close, session) {
        session.close(close);
    }
}
