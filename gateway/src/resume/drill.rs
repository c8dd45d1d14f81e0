//! The drill: a few of those who came back by token are looked up, in the background, on a connection of their own.

use seawall_proto::{
    admission::{BreakerState, LOOKUP_MAX},
    resume::{DRILL_INTERVAL, Finding},
};
use tokio_util::sync::CancellationToken;

use super::Case;
use crate::{
    registry,
    state::{Shared, State},
    store::LookupWorker,
};

/// Looks them up, one at a time, until `stop`. At most one key is in flight beside those of admission, and only while nobody waits
/// for one.
pub async fn drill(state: Shared, stop: CancellationToken) {
    let mut worker = state.store.lookup_worker();
    let work = async {
        loop {
            let drawn = state.resume.drawn.notified();
            let (case, is_empty) = {
                let is_idle = is_idle(&state);
                let mut drills = state.resume.drills();
                (drills.poll(is_idle, state.clock.now()), drills.is_empty())
            };
            match case {
                Some(case) => look_up(&state, &mut worker, &case).await,
                None if is_empty => drawn.await,
                None => tokio::time::sleep(DRILL_INTERVAL).await,
            }
        }
    };
    // The endless drill is dropped with the gateway.
    let _: Option<std::convert::Infallible> = stop.run_until_cancelled(work).await;
}

fn is_idle(state: &State) -> bool {
    let admission = state.gate.state();
    admission.queue == 0 && admission.breaker == BreakerState::Closed && state.store.state().status.is_answering()
}

async fn look_up(state: &State, worker: &mut LookupWorker, case: &Case) {
    let device = case.grant.device;
    let answer = match worker.find(&[device], LOOKUP_MAX).await {
        Ok(answer) if answer.unreadable.is_empty() => answer,
        Ok(_) => return state.metrics.resume_drills.increment("failed"),
        Err(error) => {
            tracing::debug!(%error, "a device that came back by token could not be looked up");
            return state.metrics.resume_drills.increment("failed");
        }
    };
    let finding = Finding::of(&case.grant, answer.records.first(), state.clock.wall());
    state.metrics.resume_drills.increment(finding.as_str());
    // A change made through the API has revoked the token and ended the session by itself.
    if finding == Finding::Confirmed || !state.resume.allows(&case.grant) {
        return;
    }
    if finding == Finding::Absent && !registry::may_believe_absence(state).await {
        return;
    }
    tracing::warn!(device.id = %device, finding = finding.as_str(), "the registry no longer says of a device what its resume token does, and nobody told: was it changed past the API?");
    // On all nodes; where that fails, here at least. Other nodes end the session of a device that is revoked and not in the registry as
    // that of a deleted one: an absence that nobody has recorded must not look so.
    if finding != Finding::Absent
        && let Err(error) = state.store.revoke_tokens(device, state.clock.wall()).await
    {
        tracing::warn!(device.id = %device, %error, "a resume token is revoked on this node only");
    }
    state.resume.revoke(device).await;
    let close = finding.close(&mut rand::rng());
    let session = state.sessions.get(device).filter(|session| session.id == case.session);
    if let (Some(close), Some(session)) = (close, session) {
        session.close(close);
    }
}
