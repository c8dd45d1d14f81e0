//! The group test of silent devices, once a second, with the events and alarms that follow. Start with [`watch`].

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use seawall_proto::presence::{
    groups::{Change, Group},
    observer::HEALTH_LAGGING,
    usual::{Figures, LOST_WITHIN, Outlook},
};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{
    fleet::events::{Body, GroupNotice},
    node::{Shared, State},
    runtime::lifecycle::blocking,
    session::silence::MemberCounts,
};

/// Interval between two steps of the group test.
const STEP_INTERVAL: Duration = Duration::from_secs(1);
/// Silent sessions that are gone over while the group test is locked: well under a millisecond.
const CHUNK: usize = 1_000;

/// Alarm while silent devices of a group are held.
const GROUP_ALARM: &str = "presence_group";
/// Alarm while this node is too late to tell who is silent.
const LAGGING_ALARM: &str = "node_lagging";
/// Alarm while this node cannot tell of many devices whether they are connected.
const UNKNOWN_ALARM: &str = "presence_unknown";
/// Alarm while many devices go offline or become unknown.
const CHANGES_ALARM: &str = "presence_changes";

/// Tests silent devices until `stop`.
pub async fn watch(state: Shared, stop: CancellationToken) {
    let counts = Arc::new(Mutex::new(MemberCounts::default()));
    let mut outlook = Outlook::default();
    let mut steps = interval(STEP_INTERVAL);
    steps.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(steps.tick()).await.is_some() {
        watch_lag(&state);
        watch_fleet(&state, &mut outlook);
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
        Change::Resolving(held) => (held, "resolving"),
        Change::Released(held) => (held, "released"),
    };
    let subject = subject(&held.group);
    match change {
        Change::Held(_) => {
            let detail = format!(
                "{} of {} devices of {subject} went silent together: they are unknown ({}) until they are heard, or for five minutes",
                held.held,
                held.members,
                held.cause.as_str()
            );
            state.alarms.set_for(GROUP_ALARM, &subject, true, detail);
        }
        Change::Resolving(_) => {}
        Change::Released(_) => {
            let detail = format!(
                "{} devices of {subject} were held, {} of them have been heard again",
                held.held, held.resolved
            );
            state.alarms.set_for(GROUP_ALARM, &subject, false, detail);
        }
    }
    let notice = GroupNotice::new(held, word);
    state
        .events
        .notice(state.clock.wall(), Body::PresenceGroup(Box::new(notice)));
}

/// How an operator names a group.
fn subject(group: &Group) -> String {
    match group {
        Group::Node => "this node".to_owned(),
        Group::Tenant(tenant) => format!("tenant {tenant}"),
        Group::AddressBlock(block) => format!("addresses {block}"),
        Group::Site(site) => format!("address {site}"),
    }
}

/// Raises and ends the alarm about a node that is late.
fn watch_lag(state: &State) {
    let is_lagging = state.observer.health() >= HEALTH_LAGGING;
    let detail = if is_lagging {
        format!(
            "this node runs {:.1} s late: deadlines of silent devices are stretched, and nobody is published as offline for silence. \
             It needs more processor time",
            state.observer.lag().as_secs_f64()
        )
    } else {
        "this node runs in time again".to_owned()
    };
    state.alarms.set(LAGGING_ALARM, is_lagging, detail);
}

/// Raises and ends the alarms about the fleet as a whole.
fn watch_fleet(state: &State, outlook: &mut Outlook) {
    let known = state.history.groups().total();
    let to_u32 = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
    let figures = Figures {
        online: to_u32(known.online),
        unknown: to_u32(known.unknown),
        lost: state.lost.load(Ordering::Relaxed),
    };
    let unusual = outlook.handle(figures, state.clock.now());
    let connected = known.online + known.unknown;
    let detail = if unusual.has_unknown {
        format!(
            "it is not known of {} of {connected} devices whether they are connected",
            known.unknown
        )
    } else {
        "no unusual number of devices is unknown".to_owned()
    };
    state.alarms.set(UNKNOWN_ALARM, unusual.has_unknown, detail);
    let detail = if unusual.has_lost {
        format!(
            "{} devices went offline or became unknown within {} s, and {} are online",
            unusual.lost,
            LOST_WITHIN.as_secs(),
            known.online
        )
    } else {
        "no unusual number of devices goes offline".to_owned()
    };
    state.alarms.set(CHANGES_ALARM, unusual.has_lost, detail);
}
