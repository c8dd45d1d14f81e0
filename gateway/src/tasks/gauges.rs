//! Publishes gauges once a second, with the alarms that follow from them. Start with [`publish`].

use std::{collections::BTreeMap, time::Duration};

use seawall_proto::{
    admission::{BreakerState, LimitReason},
    cohort::CohortTag,
    duplicates::{REPLACEMENTS, WINDOW},
    webhook::Delivery,
};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{fleet::alarms, node::Shared, runtime::telemetry, store::Operation};

/// Interval between two publications of the gauges.
const GAUGES_INTERVAL: Duration = Duration::from_secs(1);
/// Interval at which raw samples of histograms are aggregated. Until then each takes 16 bytes.
const SAMPLES_INTERVAL: Duration = Duration::from_secs(5);

/// Alarm while a cohort's lookups cost far more than those of others.
const COSTLY_ALARM: &str = "costly_cohort";

/// Alarm while devices wait because the limit on lookups is at its ceiling.
const CEILING_ALARM: &str = "admission_ceiling";

/// Alarm while devices share an id.
const DUPLICATE_ALARM: &str = "duplicate_id";

/// Publishes figures that are kept elsewhere or that change only with time, and aggregates samples, until `stop`.
pub async fn publish(state: Shared, stop: CancellationToken) {
    let mut gauges = interval(GAUGES_INTERVAL);
    let mut samples = interval(SAMPLES_INTERVAL);
    let mut costly_cohorts = BTreeMap::new();
    gauges.set_missed_tick_behavior(MissedTickBehavior::Delay);
    samples.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = gauges.tick() => {
                publish_gauges(&state);
                watch_costs(&state, &mut costly_cohorts);
                publish_admission(&state);
                watch_duplicates(&state);
            }
            _ = samples.tick() => state.metrics.aggregate(),
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "gauges are floating point, and these counts far below 2^53"
)]
fn publish_gauges(state: &Shared) {
    let online = state.sessions.len();
    let metrics = &state.metrics;
    metrics.sessions.set(online as f64);
    metrics.restricted_sessions.set("open", state.restricted.len() as f64);
    metrics.restricted_sessions.set("max", state.restricted.max() as f64);
    let known = state.history.groups().total();
    metrics.presence_devices.set("online", known.online as f64);
    metrics.presence_devices.set("offline", known.offline as f64);
    metrics.presence_devices.set("unknown", known.unknown as f64);
    let queue = state.history.queue();
    metrics.presence_queue.set(queue.len() as f64);
    metrics.dropped.absolute("presence", queue.dropped());
    metrics.observer_lag_seconds.set(state.observer.lag().as_secs_f64());
    metrics.local_health.set(f64::from(state.observer.health()));
    let silence = state.silence.figures();
    metrics
        .silent_sessions
        .set("silent", silence.silent.saturating_sub(silence.suspects).into());
    metrics.silent_sessions.set("suspect", silence.suspects.into());
    metrics.silent_sessions.set("held", silence.unknown.into());
    metrics.presence_groups_held.set(silence.held.len() as f64);
    let flag = |holds: bool| if holds { 1.0 } else { 0.0 };
    metrics.ready.set(flag(state.readiness().ready));
    metrics.draining.set(flag(state.departures.is_leaving()));
    let is_up = state.store.state().status.is_answering();
    metrics.database_up.set(flag(is_up));
    let active = state.alarms.active();
    for kind in alarms::kinds() {
        let count = active.iter().filter(|(other, ..)| *other == kind).count();
        metrics.alarm_active.set(kind, count as f64);
    }
    let rules = state.rules.current();
    metrics.rules_revision.set(rules.revision() as f64);
    metrics.rules_unsupported.set(rules.unsupported().len() as f64);
    metrics.rules_lost.set(state.rules.lost().len() as f64);
    metrics.rules_local.set(state.rules.local().writes.len() as f64);
    metrics.revoked_devices.set(state.resume.revoked_len() as f64);
    metrics
        .revocations_age_seconds
        .set(state.resume.age(state.clock.now()).as_secs_f64());
    metrics
        .registry_index_devices
        .set(state.lookups.registry_index().len() as f64);
    metrics
        .registry_index_age_seconds
        .set(state.registry_index_age().as_secs_f64());
    metrics
        .rules_age_seconds
        .set(state.rules.age(state.clock.now()).as_secs_f64());
    for operation in Operation::ALL {
        metrics
            .database_errors
            .absolute(operation.as_str(), state.store.failed(operation));
    }
    for delivery in Delivery::ALL {
        let count = state.webhook.deliveries(delivery);
        metrics.webhook_deliveries.absolute(delivery.as_str(), count);
    }
    metrics.webhook_waiting.set(state.webhook.waiting() as f64);
    metrics.dropped.absolute("log", telemetry::dropped_lines());
    metrics.slots_stateless.absolute(state.lookups.slots().stateless);
}

/// Raises and ends the alarms about isolated cohorts. `alarmed` has those with an alarm, each with its name in it.
///
/// Versions of one cohort may be written in several ways: the one with most sessions names it.
fn watch_costs(state: &Shared, alarmed: &mut BTreeMap<CohortTag, String>) {
    let costly = state.lookups.costly();
    if costly.is_empty() && alarmed.is_empty() {
        return;
    }
    let mut found = BTreeMap::new();
    for cohort in state.cohorts.rows() {
        let costs = costly.iter().find(|costly| cohort.is_claimed_as(costly.cohort));
        cohort.set_costly(costs.is_some());
        if let Some(costs) = costs {
            found.entry(cohort.tag()).or_insert((cohort.name(), costs.per_key));
        }
    }
    alarmed.retain(|tag, name| {
        let is_costly = found.contains_key(tag);
        if !is_costly {
            let detail = format!("lookups of {name} share statements with others again");
            state.alarms.set_for(COSTLY_ALARM, name, false, detail);
        }
        is_costly
    });
    for (tag, (name, per_key)) in found {
        alarmed.entry(tag).or_insert_with(|| {
            let detail = format!(
                "lookups of {name} take {:.1} ms per device, several times as long as those of others: they are sent separately, one statement at a time. Block the version if it is faulty",
                per_key.as_secs_f64() * 1e3
            );
            state.alarms.set_for(COSTLY_ALARM, &name, true, detail);
            name
        });
    }
    // This task may have been restarted, without knowledge of them.
    state
        .alarms
        .retain(COSTLY_ALARM, |subject| alarmed.values().any(|name| name == subject));
}

/// Raises and ends the alarm about devices that share an id: they replace each other, and none stays online.
#[expect(clippy::cast_precision_loss, reason = "a few thousand ids are watched")]
fn watch_duplicates(state: &Shared) {
    let (before, found) = state.shared_ids.update(state.clock.now());
    state.metrics.duplicate_ids.set(found.count as f64);
    match (before.example, found.example) {
        (None, Some(example)) => state.alarms.set(
            DUPLICATE_ALARM,
            true,
            format!(
                "devices with one id replace each other, {REPLACEMENTS} times within {} minutes: {} such ids, for example {example}. Give each device its own id",
                WINDOW.as_secs() / 60,
                found.count
            ),
        ),
        (Some(_), None) => state.alarms.set(DUPLICATE_ALARM, false, "no more devices replace each other"),
        (None, None) | (Some(_), Some(_)) => {}
    }
}

/// Publishes the reason of the limit on lookups, and raises the alarm if its ceiling is too low.
fn publish_admission(state: &Shared) {
    let admission = state.lookups.state();
    let metrics = &state.metrics;
    for reason in LimitReason::ALL {
        let is_it = reason == admission.limit_reason;
        metrics
            .admission_limit_reason
            .set(reason.as_str(), if is_it { 1.0 } else { 0.0 });
    }
    for breaker in BreakerState::ALL {
        let is_it = breaker == admission.breaker;
        metrics.breaker.set(breaker.as_str(), if is_it { 1.0 } else { 0.0 });
    }
    metrics.admission_elasticity.set(admission.elasticity);
    let capacity = &metrics.admission_capacity;
    capacity.set("measured", admission.rate);
    capacity.set("peak", admission.k_peak);
    capacity.set("last_known_good", admission.k_last_known_good);
    capacity.set("reference", admission.k_ref);
    let detail = if admission.is_ceiling_too_low {
        format!(
            "devices wait, and the database would answer more than {} keys at a time: raise admission.keys_in_flight_max",
            admission.limit_ceiling
        )
    } else {
        "the limit on lookups is no longer at its ceiling".to_owned()
    };
    state.alarms.set(CEILING_ALARM, admission.is_ceiling_too_low, detail);
    let is_alarm = state.alarms.is_active(CEILING_ALARM);
    metrics.admission_ceiling_alarm.set(if is_alarm { 1.0 } else { 0.0 });
}
