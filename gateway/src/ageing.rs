//! Sessions that have lived their time move on: closed with 1012 `ageing` and a slot, a few at a time.
//!
//! [`seawall_proto::ageing`] says how long each may live and how many may end; start with [`run`].

use std::{sync::Arc, time::Duration};

use rand::{SeedableRng as _, rngs::SmallRng};
use seawall_proto::{
    admission::BreakerState,
    ageing::Ageing,
    close::{Close, Restart},
    refusal::{Hint, Peers},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{sessions::Session, state::Shared};

/// Time between two looks at who is old enough.
const PASS_INTERVAL: Duration = Duration::from_secs(5);

/// Ends old sessions until `stop`. Does nothing where the configuration gives sessions no end.
pub async fn run(state: Shared, stop: CancellationToken) {
    let Some(life) = state.config.session.age_max() else {
        return;
    };
    let mut ageing = Ageing::new(life, state.clock.now());
    let mut rng = SmallRng::from_os_rng();
    while stop
        .run_until_cancelled(tokio::time::sleep(PASS_INTERVAL.min(life)))
        .await
        .is_some()
    {
        let old = old_sessions(&state, &ageing).await;
        let due = ageing.take_due(old.len(), state.sessions.len(), is_calm(&state), state.clock.now());
        for session in old.into_iter().take(due) {
            send_on(&state, &session, &mut rng);
        }
    }
}

/// Nobody waits, the database answers, and the node stays.
fn is_calm(state: &Shared) -> bool {
    let admission = state.gate.state();
    admission.queue == 0 && admission.breaker == BreakerState::Closed && !state.drain.is_on()
}

/// Those that have lived their time, the oldest first. Looks at every session: off the runtime's workers.
async fn old_sessions(state: &Shared, ageing: &Ageing) -> Vec<Arc<Session>> {
    let (looked_at, ageing, now) = (Arc::clone(state), ageing.clone(), state.clock.now());
    let look = move || {
        let mut old = looked_at.sessions.matching(|session| is_old(session, &ageing, now));
        old.sort_by_key(|session| session.info.opened_at);
        old
    };
    // Cancelled only where the runtime ends.
    tokio::task::spawn_blocking(look).await.unwrap_or_default()
}

fn is_old(session: &Session, ageing: &Ageing, now: Instant) -> bool {
    now.saturating_since(session.info.opened_at) >= ageing.life_of(session.id) && !session.is_closing()
}

/// This node takes the device back: it may come soon.
fn send_on(state: &Shared, session: &Session, rng: &mut SmallRng) {
    let back = Hint::draw(Peers::Some.hint_range(), rng).after;
    let hint = state.gate.slot_for_close(session.info.device, back);
    session.close(Close::Restart {
        why: Restart::Ageing,
        hint,
    });
}
