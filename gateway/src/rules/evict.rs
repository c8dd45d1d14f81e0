//! Closes live sessions that a rule with `evict` refuses.

use std::{collections::HashMap, sync::Arc, time::Duration};

use rand::{Rng, SeedableRng as _, rngs::SmallRng};
use seawall_proto::{
    close::Close,
    drain::Pacing,
    rules::{Rule, RuleSet, Subject},
    time::WallTime,
};
use tokio::{sync::watch, task::spawn_blocking};
use tokio_util::sync::CancellationToken;

use crate::{
    cohorts::Cohort,
    sessions::Session,
    state::{Shared, State},
};

/// Shortest time between two looks at what is due: evictions are paced in small groups, not one by one.
const PASS_MIN: Duration = Duration::from_millis(10);

/// Closes the live sessions that a rule with `evict` refuses, at a pace, until `stop`.
pub async fn evict(state: Shared, stop: CancellationToken) {
    let mut changes = state.rules.subscribe();
    loop {
        while evict_matching(&state, &stop, &mut changes).await {}
        tokio::select! {
            () = stop.cancelled() => return,
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

/// One pass over the sessions. True where there may be more to do: a handshake that had passed the rules before the change may
/// have become a session during the pass, or the rules changed again.
async fn evict_matching(state: &Shared, stop: &CancellationToken, changes: &mut watch::Receiver<u64>) -> bool {
    changes.borrow_and_update();
    let rules = state.rules.current();
    let wall = state.clock.wall();
    if !rules.is_evicting(wall) {
        return false;
    }
    let mut rng = SmallRng::from_os_rng();
    let (shared, asked) = (Arc::clone(state), Arc::clone(&rules));
    // All sessions are looked at: off the runtime's workers, which have handshakes to do.
    let Ok(mut left) = spawn_blocking(move || sessions_to_evict(&shared, &asked, wall)).await else {
        return false;
    };
    if left.is_empty() {
        return false;
    }
    let mut pacing = Pacing::evict(state.gate.k_ref(), left.len(), state.clock.now());
    tracing::info!(
        sessions = left.len(),
        rate_per_second = pacing.rate_per_second(),
        "evicting blocked sessions"
    );
    while !left.is_empty() {
        let now = state.clock.now();
        let wall = state.clock.wall();
        for session in left.drain(..pacing.take_due(left.len(), now)) {
            if let Some(rule) = evicting_rule(&rules, &session, wall) {
                evict_session(state, &session, rule, &mut rng);
            }
        }
        let next = pacing.poll_timeout().max(now + PASS_MIN);
        tokio::select! {
            () = stop.cancelled() => return false,
            () = tokio::time::sleep_until(state.clock.deadline(next)) => {}
        }
        if changes.has_changed().unwrap_or(true) {
            return true;
        }
    }
    true
}

/// Closes a session that began while a rule against it came into force: the pass over all sessions may have missed it.
pub fn evict_newcomer(state: &Shared, session: &Session) {
    let wall = state.clock.wall();
    if let Some(rule) = evicting_rule(&state.rules.current(), session, wall) {
        evict_session(state, session, rule, &mut rand::rng());
    }
}

fn evict_session(state: &State, session: &Session, rule: &Rule, rng: &mut impl Rng) {
    let at_least = state.rules.evicted_for(rule, state.clock.now());
    if session.close(Close::evicted(at_least, rng)) {
        state.rules.count_evicted(rule.id);
    }
}

/// Whether a rule closes the sessions of a cohort and tenant. Each entry holds its cohort, so that no address is used twice meanwhile.
type Asked = HashMap<(*const Cohort, Arc<str>), (Arc<Cohort>, bool)>;

/// The sessions that a rule closes. Asks the rules once for each cohort and tenant.
fn sessions_to_evict(state: &State, rules: &RuleSet, wall: WallTime) -> Vec<Arc<Session>> {
    let mut asked = Asked::new();
    state.sessions.matching(|session| {
        let cohort = &session.info.cohort;
        let key = (Arc::as_ptr(cohort), Arc::clone(&session.info.tenant));
        let (_, is_hit) = asked.entry(key).or_insert_with(|| {
            let is_hit = rules.evicting(&subject_of(session), wall).is_some();
            (Arc::clone(cohort), is_hit)
        });
        *is_hit && !session.is_closing()
    })
}

fn subject_of(session: &Session) -> Subject<'_> {
    Subject {
        firmware: session.info.cohort.firmware.as_deref(),
        model: session.info.cohort.model.as_deref(),
        tenant: Some(&session.info.tenant),
    }
}

/// The rule that wants this session gone, if one does and it has not been told yet.
fn evicting_rule<'a>(rules: &'a RuleSet, session: &Session, wall: WallTime) -> Option<&'a Rule> {
    rules
        .evicting(&subject_of(session), wall)
        .filter(|_| !session.is_closing())
}
