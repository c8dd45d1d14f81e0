//! The group test of silent devices, once a second, with the events and alarms that follow. Start with [`watch`].

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use seawall_proto::presence::{
    groups::{Change, Group},
    observer::HEALTH_LAGGING,
};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{
    fleet::events::Body,
    node::{Shared, State},
    runtime::lifecycle::blocking,
    session::silence::MemberCounts,
};

/// Interval between two steps of the group test.
const STEP_INTERVAL: Duration = Duration::from_secs(1);
/// Silent sessions that are gone over while the group test is locked: well under a millisecond.
const CHUNK: usize = 1_000;

/// The alarm that operators see while silent devices of a group are held.
const GROUP_ALARM: &str = "presence_group";
/// The alarm that operators see while this node is too late to tell who is silent.
pub const LAGGING_ALARM: &str = "node_lagging";
/// Time for which the node lags before that alarm, and for which it does not before the alarm ends.
const LAGGING_FOR: Duration = Duration::from_secs(10);
const WELL_FOR: Duration = Duration::from_secs(60);

/// Tests silent devices until `stop`.
pub async fn watch(state: Shared, stop: CancellationToken) {
    let counts = Arc::new(Mutex::new(MemberCounts::default()));
    let mut lagging = Lagging::default();
    let mut steps = interval(STEP_INTERVAL);
    steps.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(steps.tick()).await.is_some() {
        watch_lag(&state, &mut lagging);
        let (shared, counts) = (Arc::clone(&state), Arc::clone(&counts));
        let step = move || step(&shared, &mut counts.lock().unwrap_or_else(PoisonError::into_inner));
        if blocking(step).await.is_none() {
            return;
        }
    }
}

fn step(state: &State, counts: &mut MemberCounts) {
    let (now, health) = (state.observer.now(), state.observer.health());
    let sessions = u32::try_from(state.sessions.len()).unwrap_or(u32::MAX);
    let silence = &state.silence;
    if silence.groups().begin_step(sessions, now) {
        while silence.groups().count_some(CHUNK) {}
        let candidates = silence.groups().candidates();
        let counts = counts.of(&state.sessions, candidates, now);
        silence.groups().handle_counts(counts, sessions, health);
    }
    while hold_some(state) {}
    for member in silence.groups().poll_released(health, now) {
        member.0.call();
    }
    loop {
        let Some(change) = silence.groups().poll_change() else {
            return;
        };
        note_change(state, &change);
    }
}

/// Holds the next members of held groups. False once there are no more.
fn hold_some(state: &State) -> bool {
    let mut groups = state.silence.groups();
    let Some(held) = groups.poll_held(CHUNK) else {
        return false;
    };
    let wall = state.clock.wall();
    // Behind the lock: a device that is heard now is online after this. A session that closes has a newer one, or ends.
    for (member, cause) in held.iter().filter(|(member, _)| !member.0.is_closing()) {
        state.note_held(&member.0, *cause, wall);
    }
    drop(groups);
    true
}

fn note_change(state: &State, change: &Change) {
    let (held, word) = match change {
        Change::Held(held) => (held, "held"),
        Change::Released(held) => (held, "released"),
    };
    let subject = subject(&held.group);
    let is_held = word == "held";
    let detail = if is_held {
        format!(
            "{} of {} devices of {subject} went silent together: they are unknown ({}) until they are heard, or for five minutes",
            held.held,
            held.members,
            held.cause.as_str()
        )
    } else {
        format!(
            "{} devices of {subject} were held, {} of them have been heard again",
            held.held, held.resolved
        )
    };
    state.alarms.set_for(GROUP_ALARM, &subject, is_held, detail);
    let body = Body::PresenceGroup {
        group: held.group.kind().as_str(),
        key: held.group.key(),
        state: word,
        cause: held.cause.as_str(),
        members: held.members,
        held: held.held,
        resolved: held.resolved,
    };
    state.events.notice(state.clock.wall(), body);
}

/// How an operator names a group.
fn subject(group: &Group) -> String {
    match group {
        Group::Node => "this node".to_owned(),
        Group::Tenant(tenant) => format!("tenant {tenant}"),
        Group::AddressBlock(block) => format!("addresses {block}"),
    }
}

/// How long the node has been lagging, or well.
#[derive(Debug, Default)]
struct Lagging {
    is_raised: bool,
    /// Since when it has been other than the alarm says.
    since: Option<seawall_proto::time::Instant>,
}

/// Raises and ends the alarm about a node that is late. By the monotonic clock: the observed one stands still
/// meanwhile.
fn watch_lag(state: &State, lagging: &mut Lagging) {
    let (now, health) = (state.clock.now(), state.observer.health());
    let is_other = if lagging.is_raised {
        health == 0
    } else {
        health >= HEALTH_LAGGING
    };
    if !is_other {
        lagging.since = None;
        return;
    }
    let lasts = now.saturating_since(*lagging.since.get_or_insert(now));
    let hold = if lagging.is_raised { WELL_FOR } else { LAGGING_FOR };
    if lasts < hold {
        return;
    }
    lagging.is_raised = !lagging.is_raised;
    lagging.since = None;
    let detail = if lagging.is_raised {
        format!(
            "this node runs {:.1} s late: deadlines of silent devices are stretched, and nobody is published as offline for silence. \
             It needs more processor time",
            state.observer.lag().as_secs_f64()
        )
    } else {
        "this node runs in time again".to_owned()
    };
    state.alarms.set(LAGGING_ALARM, lagging.is_raised, detail);
}
