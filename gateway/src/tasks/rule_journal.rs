//! Moves changes of rules from this node's journal to the database, in order. Start with [`follow`].

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use seawall_proto::{
    id::RuleId,
    rules::{LocalWrite, chains, net},
};
use tokio::{
    task::spawn_blocking,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    fleet::{
        alarms::NODE,
        rules::{CONFLICT_ALARM, LOCAL_ALARM},
    },
    node::{
        Shared, State,
        preview::{Basis, RulePreview},
    },
    session::census::Census,
    store::{Seen, Settled, StoreError},
};

/// Interval of checks of the journal.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum pause after the database did not accept a change. The pause doubles with each attempt.
const PAUSE_MAX: Duration = Duration::from_secs(16);
/// Maximum number of chains of changes that are moved before the journal is written again.
const MOVED_AT_ONCE_MAX: usize = 50;
/// Time after which the devices that an unconfirmed rule refuses are counted again.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);
/// Time after a conflict at which its alarm ends. The audit log keeps the record.
const CONFLICT_ALARM_LASTS: Duration = Duration::from_hours(1);
/// Maximum number of alarms about conflicts. A further one ends the oldest.
const CONFLICT_ALARMS_MAX: usize = 20;

/// Last reported state.
#[derive(Debug, Default)]
struct Told {
    reason: Option<String>,
    /// Active alarms about conflicts by subject: a rule, or the node for a damaged journal.
    conflicts: BTreeMap<String, Instant>,
    /// Rules that stay local until an operator confirms them.
    held: BTreeMap<RuleId, Held>,
}

/// A chain of changes that needs a confirmation.
#[derive(Debug)]
struct Held {
    /// Its last change.
    last: Uuid,
    why: String,
    checked_at: Instant,
}

/// Moves changes, and reports those that wait, until `stop`.
pub async fn follow(state: Shared, stop: CancellationToken) {
    let mut told = Told::default();
    // This task may have been restarted.
    let active = state.alarms.active().into_iter();
    let conflicts = active.filter(|(kind, ..)| *kind == CONFLICT_ALARM);
    told.conflicts = conflicts.map(|(_, subject, _)| (subject, Instant::now())).collect();
    if let Some(damage) = state.rules.journal_damage() {
        tell_conflict(&state, &mut told, NODE.to_owned(), damage.to_owned());
    }
    let mut polls = interval(POLL_INTERVAL);
    polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut pause, mut next) = (POLL_INTERVAL, Instant::now());
    while stop.run_until_cancelled(polls.tick()).await.is_some() {
        if !state.rules.local().writes.is_empty() && Instant::now() >= next && !state.store.is_away() {
            // A change that was sent is settled, and its outcome is recorded.
            match move_some(&state, &mut told).await {
                Ok(()) => {
                    pause = POLL_INTERVAL;
                    told.reason = None;
                }
                Err(reason) => {
                    pause = (pause * 2).min(PAUSE_MAX);
                    told.reason = Some(reason);
                }
            }
            next = Instant::now() + pause - POLL_INTERVAL;
        }
        tell(&state, &mut told);
    }
}

/// Moves the oldest changes. The text says why not all of them could be moved.
async fn move_some(state: &Shared, told: &mut Told) -> Result<(), String> {
    let local = state.rules.local();
    let chains = chains(&local.writes);
    told.held
        .retain(|rule, _| local.writes.iter().any(|write| write.rule == *rule));
    let (mut moved, mut revision, mut refused) = (Vec::new(), 0, None);
    let mut is_blocked = Vec::new();
    for chain in &chains {
        if moved.len() >= MOVED_AT_ONCE_MAX {
            break;
        }
        // Changes of one rule keep their order.
        let Some(net) = net(chain).filter(|net| !is_blocked.contains(&net.rule)) else {
            continue;
        };
        let checked = match check(state, &net, told).await {
            Ok(Some(checked)) => checked,
            Ok(None) => {
                is_blocked.push(net.rule);
                continue;
            }
            Err(error) => {
                refused = Some(error);
                break;
            }
        };
        let seen = Seen {
            is_lost: state.rules.lost().iter().any(|lost| lost.rule.id == net.rule),
            checked: checked.revision,
        };
        match state.store.rule_settle(chain, seen, state.clock.wall()).await {
            Ok(settled) => {
                moved.push(chain);
                revision = settled.revision;
                told.held.remove(&net.rule);
                note(state, &net, settled, told);
            }
            Err(error) => {
                refused = Some(error.to_string());
                break;
            }
        }
    }
    if !moved.is_empty() {
        // Before they are dropped here, so that each is in force all the time, even after a restart.
        let reloaded = state.rules.reload(&state.store, &state.clock, &state.events).await;
        reloaded.map_err(|error: StoreError| error.to_string())?;
        if state.rules.stored_revision() < revision {
            return Err("the rules were written to the database and not read back yet".to_owned());
        }
        let kept = state.rules.keep().await;
        kept.map_err(|error| format!("the rules can't be written to disk: {error}"))?;
        let moved = moved.into_iter().flatten().map(|write| write.id).collect();
        let dropped = state.rules.drop_local(moved, &state.clock, &state.events).await;
        dropped.map_err(|error| error.to_string())?;
    }
    refused.map_or(Ok(()), Err)
}

/// A change that the database may accept.
struct Checked {
    /// Revision of the rules with which its devices were counted, if that was needed.
    revision: Option<u64>,
}

/// Counts the devices that an unconfirmed change would refuse on all nodes. Its author's node counted only its own.
/// `None`: it needs a confirmation.
async fn check(state: &Shared, net: &LocalWrite, told: &mut Told) -> Result<Option<Checked>, String> {
    let Some(spec) = net.after.clone().filter(|_| net.needs_check()) else {
        return Ok(Some(Checked { revision: None }));
    };
    let is_recent = |held: &Held| held.last == net.id && held.checked_at.elapsed() < CHECK_INTERVAL;
    if told.held.get(&net.rule).is_some_and(is_recent) {
        return Ok(None);
    }
    let counted = state
        .store
        .rule_check(state.run)
        .await
        .map_err(|error| error.to_string())?;
    let revision = counted.revision;
    let (gateway, rule, basis) = (Arc::clone(state), net.rule, Basis::Cluster { revision });
    let counting = spawn_blocking(move || {
        let census = Census::of(&gateway.sessions, &gateway.history);
        RulePreview::of(&spec, Some(rule), &Ok(counted), basis, &census, &gateway)
    });
    let preview = counting.await.map_err(|error| error.to_string())?;
    let Some(why) = preview.confirmation else {
        return Ok(Some(Checked {
            revision: Some(revision),
        }));
    };
    tracing::warn!(rule.id = %net.rule, why, "rule of the journal needs a confirmation before it is moved to the database");
    let held = Held {
        last: net.id,
        why,
        checked_at: Instant::now(),
    };
    told.held.insert(net.rule, held);
    Ok(None)
}

/// Logs a change that the database has applied, and raises an alarm about a conflict.
fn note(state: &State, write: &LocalWrite, settled: Settled, told: &mut Told) {
    let Settled { settlement, revision } = settled;
    let outcome = settlement.as_str();
    tracing::info!(
        rule.id = %write.rule,
        rules.revision = revision,
        actor = write.actor,
        written_at = write.at.to_rfc3339(),
        outcome,
        "rule of the journal stored in the database"
    );
    if !settlement.is_conflict() {
        return;
    }
    let (rule, at) = (write.rule, write.at.to_rfc3339());
    let detail = match write.written(settlement) {
        Some((second, _)) if second != rule => format!(
            "rule {rule} was changed at this node ({at}) while the database was away, and by another author in the database: both forms are in force, the one of this node as rule {second}. Remove the wrong one: seawall rules show {rule}, seawall rules show {second}"
        ),
        Some(_) => format!(
            "rule {rule} was changed at this node ({at}) while the database was away, and deleted by another author in the database: it is in force as this node changed it. Remove it if that is wrong: seawall rules unblock {rule}"
        ),
        None => format!(
            "rule {rule} was deleted at this node ({at}) while the database was away, and changed by another author in the database: it is in force as they changed it. Remove it if that is wrong: seawall rules unblock {rule}"
        ),
    };
    tell_conflict(state, told, rule.to_string(), detail);
}

fn tell_conflict(state: &State, told: &mut Told, subject: String, detail: String) {
    state.alarms.set_for(CONFLICT_ALARM, &subject, true, detail);
    told.conflicts.insert(subject, Instant::now());
    if told.conflicts.len() > CONFLICT_ALARMS_MAX
        && let Some((oldest, _)) = told.conflicts.iter().min_by_key(|(_, at)| **at)
    {
        let oldest = oldest.clone();
        end_conflict(state, &oldest, "replaced by later conflicts: the audit log has it");
        told.conflicts.remove(&oldest);
    }
}

fn end_conflict(state: &State, subject: &str, why: &str) {
    state.alarms.set_for(CONFLICT_ALARM, subject, false, why);
}

fn tell(state: &State, told: &mut Told) {
    let local = state.rules.local();
    if local.writes.is_empty() {
        told.held.clear();
        told.reason = None;
    }
    let detail = local.writes.first().map_or_else(
        || "every change of rules is in the database".to_owned(),
        |first| {
            let reason = told.reason.clone().or_else(|| state.store.state().reason);
            let mut detail = format!(
                "{} changes of rules wait in this node's journal for the database, the first since {}: they are in force on this node only. They move on their own once the database accepts them{}",
                local.writes.len(),
                first.at.to_rfc3339(),
                reason.map(|reason| format!(". It does not accept them now: {reason}")).unwrap_or_default()
            );
            if let Some((rule, held)) = told.held.first_key_value() {
                let (waiting, why) = (told.held.len(), &held.why);
                detail.push_str(&format!(
                    ". {waiting} rules need a confirmation first, for example {rule}: {why}. Confirm it on this node (seawall rules edit {rule} --reason TEXT --confirm), or remove it (seawall rules unblock {rule})"
                ));
            }
            detail
        },
    );
    state.alarms.set(LOCAL_ALARM, !local.writes.is_empty(), detail);
    told.conflicts.retain(|subject, at| {
        let is_recent = at.elapsed() < CONFLICT_ALARM_LASTS;
        if !is_recent {
            end_conflict(state, subject, "no conflict about it for an hour");
        }
        is_recent
    });
}
