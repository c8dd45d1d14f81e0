//! Closes sessions that must end: the node drains, a rule evicts them, or they have reached their maximum age.
//!
//! [`Departures`](crate::session::departures::Departures) decides when. Start with [`run`].

use std::{collections::HashMap, sync::Arc};

use rand::{Rng, SeedableRng as _, rngs::SmallRng};
use seawall_proto::{
    admission::BreakerState,
    close::Close,
    departures::{Departure, DrainState, EvictionStatus, NodeLoad, Output, Scan},
    id::RuleId,
    refusal::Hint,
    rules::{RuleSet, Subject},
    time::{Instant, WallTime},
};
use tokio::{task::yield_now, time::sleep_until};
use tokio_util::sync::CancellationToken;

use crate::{
    fleet::{cohorts::Cohort, events::Body, rules::hits::Hit},
    node::{Shared, State},
    runtime::lifecycle::blocking,
    session::sessions::{Session, Sessions},
};

/// Maximum number of sessions that are closed before other tasks of this worker run.
const CLOSES_AT_ONCE_MAX: usize = 500;

/// Closes sessions until `stop`.
pub async fn run(state: Shared, stop: CancellationToken) {
    let mut rules = state.rules.subscribe();
    let mut rng = SmallRng::from_os_rng();
    state.departures.handle_restarted();
    while let Some(next) = stop.run_until_cancelled(act(&state, &mut rng)).await {
        tokio::select! {
            () = stop.cancelled() => return,
            () = state.departures.ordered() => {}
            changed = rules.changed() => match changed {
                Ok(()) => state.departures.handle_rules(),
                Err(_) => return,
            },
            () = sleep_until(state.clock.deadline(next.unwrap_or(Instant::FAR_FUTURE))) => {}
        }
    }
}

/// Closes a session that has just registered, if it must end: a scan may have missed it.
pub fn handle_registered(state: &State, session: &Session) {
    // Without a drain only the rules decide.
    let departure = state.departures.handle_registered().unwrap_or(Departure::Eviction);
    close(state, session, departure, &mut rand::rng());
}

/// Does what is due. Returns the time of the next call.
async fn act(state: &Shared, rng: &mut SmallRng) -> Option<Instant> {
    let mut closes = 0_usize;
    loop {
        match state.departures.poll_output() {
            Output::Drain(reached) => report(state, reached),
            Output::Scan(scan) => {
                let found = find(state, scan).await;
                let before = state.departures.eviction_status();
                state.departures.handle_found(scan, found, &load(state));
                report_eviction(state, before);
            }
            Output::Close(session, departure) => {
                close(state, &session, departure, rng);
                closes += 1;
                if closes.is_multiple_of(CLOSES_AT_ONCE_MAX) {
                    yield_now().await;
                }
            }
            Output::Wait(at) => return at,
        }
    }
}

fn report(state: &State, reached: DrainState) {
    let sessions = state.sessions.len();
    let event = match reached {
        DrainState::Idle => {
            tracing::info!(sessions, "drain cancelled");
            "cancelled"
        }
        DrainState::Announced => {
            let announce_seconds = state.settings.current().drain.announce().as_secs();
            tracing::info!(
                announce_seconds,
                "drain announced: not ready, devices are still admitted"
            );
            "announced"
        }
        DrainState::Draining => {
            let rate_per_second = state.departures.drain_status().rate_per_second;
            tracing::info!(sessions, rate_per_second, "drain started");
            "draining"
        }
        DrainState::Drained => {
            tracing::info!("drain ended: no session is left");
            "drained"
        }
    };
    state.events.notice(state.clock.wall(), Body::Drain { state: event });
}

/// Reports an eviction that has begun, grown or ended since.
fn report_eviction(state: &State, before: EvictionStatus) {
    let now = state.departures.eviction_status();
    let change = match (before.sessions, now.sessions) {
        (before, now) if before == now => return,
        (0, _) => "started",
        (_, 0) => "ended",
        _ => "changed",
    };
    let (sessions, rate_per_second) = (now.sessions, now.rate_per_second);
    tracing::info!(sessions, rate_per_second, change, "eviction of blocked sessions");
    let event = Body::Eviction {
        state: change,
        sessions,
        rate_per_second,
    };
    state.events.notice(state.clock.wall(), event);
}

fn load(state: &State) -> NodeLoad {
    let admission = state.lookups.state();
    NodeLoad {
        sessions: state.sessions.len(),
        capacity_per_second: admission.k_ref,
        is_calm: admission.queue == 0 && admission.breaker == BreakerState::Closed,
    }
}

/// Finds sessions that are not closing yet. Reads every session, so it runs off the runtime's workers.
async fn find(state: &Shared, scan: Scan) -> Vec<Arc<Session>> {
    let (rules, wall, now) = (state.rules.current(), state.clock.wall(), state.clock.now());
    if scan == Scan::Evicted && !rules.is_evicting(wall) {
        return Vec::new();
    }
    let state = Arc::clone(state);
    let find = move || match scan {
        Scan::Left => state.sessions.matching(|session| !session.is_closing()),
        Scan::Evicted => evicted(&state.sessions, &rules, wall),
        Scan::Aged(lives) => {
            let is_aged = |session: &Session| lives.is_over(session.id, session.info.opened_at, now);
            let mut aged = state
                .sessions
                .matching(|session| is_aged(session) && !session.is_closing());
            aged.sort_by_key(|session| session.info.opened_at);
            aged
        }
    };
    blocking(find).await.unwrap_or_default()
}

/// Whether a rule evicts a cohort of a tenant, and whether its share must be evaluated per device. Each entry keeps its
/// cohort alive, so that the address is not reused.
type Asked = HashMap<(*const Cohort, Arc<str>), (Arc<Cohort>, Option<bool>)>;

/// Finds the sessions that a rule evicts. Evaluates the rules once per cohort and tenant.
fn evicted(sessions: &Sessions, rules: &RuleSet, wall: WallTime) -> Vec<Arc<Session>> {
    let mut asked = Asked::new();
    sessions.matching(|session| {
        let cohort = session.info.cohort();
        let key = (Arc::as_ptr(cohort), Arc::clone(session.info.tenant()));
        let (_, has_share) = asked.entry(key).or_insert_with(|| {
            let all = Subject {
                device: None,
                ..subject_of(session)
            };
            let has_share = rules.evicting(&all, wall).map(|rule| rule.spec.is_partial());
            (Arc::clone(cohort), has_share)
        });
        !session.is_closing()
            && match has_share {
                None => false,
                Some(false) => true,
                // It evicts only some of them.
                Some(true) => rules.evicting(&subject_of(session), wall).is_some(),
            }
    })
}

/// Number of sessions that this rule evicts and that are not closing yet. Reads every session, so it is to run off the
/// runtime's workers.
#[must_use]
pub fn left_of(state: &State, rule: RuleId) -> usize {
    let (rules, wall) = (state.rules.current(), state.clock.wall());
    let left = evicted(&state.sessions, &rules, wall).into_iter();
    left.filter(|session| {
        let by = rules.evicting(&subject_of(session), wall);
        by.is_some_and(|by| by.id == rule)
    })
    .count()
}

fn subject_of(session: &Session) -> Subject<'_> {
    Subject {
        device: Some(session.info.device),
        firmware: session.info.cohort().firmware.as_deref(),
        model: session.info.cohort().model.as_deref(),
        tenant: Some(session.info.tenant()),
    }
}

fn close(state: &State, session: &Session, departure: Departure, rng: &mut impl Rng) {
    if session.is_closing() {
        return;
    }
    match departure {
        Departure::Restart { why, back_within } => {
            let back = Hint::draw(back_within, rng).after;
            let hint = state.lookups.slot_for_close(session.info.device, back);
            session.close(Close::Restart { why, hint });
        }
        Departure::Eviction => {
            let rules = state.rules.current();
            if let Some(rule) = rules.evicting(&subject_of(session), state.clock.wall()) {
                let at_least = state.rules.evicted_for(rule, state.clock.now());
                if session.close(Close::evicted(at_least, rng)) {
                    state.rules.count(rule.id, Hit::Evicted);
                }
            }
        }
    }
}
