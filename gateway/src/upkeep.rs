//! What a gateway does every so often, whoever connects: read the plans of its statements, publish gauges,
//! tell which cohorts cost too much, measure its own lag.

use std::{collections::BTreeMap, time::Duration};

use seawall_proto::{
    admission::{BreakerState, LimitReason},
    duplicates::{REPLACEMENTS, WINDOW},
};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::{
    roster,
    state::Shared,
    store::{Operation, PlanReport},
    telemetry,
};

/// Maximum time between two checks of the plans of the connect path.
const PLAN_INTERVAL: Duration = Duration::from_secs(600);
/// Time between two checks while an alarm is on, a check failed, or look-ups became slower.
const PLAN_EXPEDITED_INTERVAL: Duration = Duration::from_secs(5);
/// Look-ups that take this many times longer than usual are a reason to check the plans.
const PLAN_SLOWER_FACTOR: u32 = 2;
/// Look-ups that take no longer are fast, whatever is usual.
const PLAN_FAST_ENOUGH: Duration = Duration::from_millis(3);
/// How often gauges are published.
const GAUGES_INTERVAL: Duration = Duration::from_secs(1);
/// How often raw samples of histograms are put into buckets: until then each takes 16 bytes.
const SAMPLES_INTERVAL: Duration = Duration::from_secs(5);
/// How often it is looked which sessions are to be called. A ping may be so much later than it should.
const CALL_INTERVAL: Duration = Duration::from_millis(100);
/// How often the runtime's lag is measured.
const LAG_INTERVAL: Duration = Duration::from_millis(100);

/// How often connect attempts are summed up in the log.
const SUMMARY_INTERVAL: Duration = Duration::from_secs(60);
/// How a line of the metrics begins that counts connect attempts.
const ATTEMPTS_SERIES: &str = "seawall_handshakes_total{outcome=\"";

/// The alarm that operators see while a cohort's look-ups cost far more than the others'.
const COSTLY_ALARM: &str = "costly_cohort";
/// The alarm that operators see while a statement of the connect path is too costly.
const PLAN_ALARM: &str = "plan";

/// The alarm that operators see while devices wait because the limit on look-ups may not grow.
const CEILING_ALARM: &str = "admission_ceiling";
/// It ends once there was no sign of it for so long.
const CEILING_QUIET: Duration = Duration::from_secs(60);

/// The alarm that operators see while devices share an id.
const DUPLICATE_ALARM: &str = "duplicate_id";

/// Guards the plans of the connect path until `stop`: an alarm is told once, cuts the limit on look-ups, and ends by itself.
pub async fn guard_plans(state: Shared, stop: CancellationToken) {
    let guard = async {
        state.store.ready().await;
        let mut is_failing = false;
        let mut usual = Usual::default();
        loop {
            let checked = state.store.plan_check().await;
            let checked_at = Instant::now();
            match &checked {
                Ok(report) => take_report(&state, report),
                Err(error) if !is_failing => {
                    tracing::warn!(error = %error, "the plans of look-ups can't be read: trying again")
                }
                Err(_) => {}
            }
            is_failing = checked.is_err();
            let is_urgent = !matches!(checked, Ok(PlanReport::Indexed));
            usual.set(state.gate.state().took_p90);
            loop {
                tokio::time::sleep(PLAN_EXPEDITED_INTERVAL).await;
                let is_slower = usual.is_exceeded(state.gate.state().took_p90);
                if is_urgent || is_slower || checked_at.elapsed() >= PLAN_INTERVAL {
                    break;
                }
            }
        }
    };
    // The endless guard is dropped with the gateway.
    let _: Option<std::convert::Infallible> = stop.run_until_cancelled(guard).await;
}

/// How long look-ups took when their plans were checked, or less if they became faster since.
#[derive(Debug, Default)]
struct Usual(Duration);

impl Usual {
    const fn set(&mut self, took: Duration) {
        self.0 = took;
    }

    fn is_exceeded(&mut self, took: Duration) -> bool {
        // Nothing was looked up yet.
        if !took.is_zero() {
            self.0 = self.0.min(took);
        }
        took > PLAN_FAST_ENOUGH && took > self.0 * PLAN_SLOWER_FACTOR
    }
}

fn take_report(state: &Shared, report: &PlanReport) {
    let was_alarm = state.plan.get().is_some_and(|report| report.is_alarm());
    let is_alarm = report.is_alarm();
    state.gate.set_limit_cut(is_alarm);
    state.metrics.plan_alarm.set(if is_alarm { 1.0 } else { 0.0 });
    match (was_alarm, report) {
        (false, PlanReport::Alarm(detail)) => state.alarm(PLAN_ALARM, true, detail.as_str()),
        (true, PlanReport::Indexed) => state.alarm(PLAN_ALARM, false, "every look-up goes through an index again"),
        (true, PlanReport::Alarm(_)) | (false, PlanReport::Indexed) => {}
    }
    state.plan.set(report.clone());
}

/// Calls the sessions whose time has come, until `stop`: one timer for all of them.
pub async fn call_sessions(state: Shared, stop: CancellationToken) {
    let mut calls = interval(CALL_INTERVAL);
    calls.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(calls.tick()).await.is_some() {
        state.sessions.call_due(state.clock.now());
    }
}

/// Publishes figures that others keep or that nothing else changes, and sorts samples into buckets, until `stop`.
pub async fn publish(state: Shared, stop: CancellationToken) {
    let mut ceiling_seen: Option<Instant> = None;
    let mut gauges = interval(GAUGES_INTERVAL);
    let mut samples = interval(SAMPLES_INTERVAL);
    let mut had_costly = false;
    gauges.set_missed_tick_behavior(MissedTickBehavior::Delay);
    samples.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = gauges.tick() => {
                publish_gauges(&state);
                watch_costs(&state, &mut had_costly);
                publish_admission(&state, &mut ceiling_seen);
                watch_duplicates(&state);
            }
            _ = samples.tick() => state.metrics.upkeep(),
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
    metrics.presence_devices.set("online", online as f64);
    metrics
        .presence_devices
        .set("offline", state.history.known_len().saturating_sub(online) as f64);
    let flag = |holds: bool| if holds { 1.0 } else { 0.0 };
    metrics.ready.set(flag(state.readiness().ready));
    metrics.draining.set(flag(state.drain.is_on()));
    let is_up = state.store.state().status.is_answering();
    metrics.database_up.set(flag(is_up));
    let rules = state.rules.current();
    metrics.rules_revision.set(rules.revision() as f64);
    metrics.rules_unsupported.set(rules.unsupported().len() as f64);
    metrics.rules_lost.set(state.rules.lost().len() as f64);
    metrics.revoked_devices.set(state.resume.revoked_len() as f64);
    metrics
        .revocations_age_seconds
        .set(state.resume.age(state.clock.now()).as_secs_f64());
    metrics.roster_devices.set(state.gate.roster().len() as f64);
    metrics.roster_age_seconds.set(roster::age(state).as_secs_f64());
    metrics
        .rules_age_seconds
        .set(state.rules.age(state.clock.now()).as_secs_f64());
    for operation in Operation::ALL {
        metrics
            .database_errors
            .absolute(operation.as_str(), state.store.failed(operation));
    }
    metrics.dropped.absolute("log", telemetry::dropped_lines());
    metrics.slots_stateless.absolute(state.gate.state().slots_stateless);
}

/// Tells operators which cohorts admission looks up apart.
fn watch_costs(state: &Shared, had_costly: &mut bool) {
    let costly = state.gate.costly();
    if costly.is_empty() && !*had_costly {
        return;
    }
    *had_costly = !costly.is_empty();
    for cohort in state.cohorts.rows() {
        let found = costly.iter().find(|costly| cohort.is_tagged(costly.cohort));
        if !cohort.set_costly(found.is_some()) {
            continue;
        }
        let name = cohort.name();
        match found {
            Some(costly) => state.alarm_about(
                COSTLY_ALARM,
                &name,
                true,
                format!(
                    "look-ups of {name} take {:.1} ms a device, several times what the others' take: they are sent apart, one statement at a time. Block the version if it is a bad one",
                    costly.per_key.as_secs_f64() * 1e3
                ),
            ),
            None => state.alarm_about(
                COSTLY_ALARM,
                &name,
                false,
                format!("look-ups of {name} are sent with the others' again"),
            ),
        }
    }
    // A version that nobody has any more has no row.
    let rows = state.cohorts.rows();
    state.alarms.retain(COSTLY_ALARM, |subject| {
        rows.iter().any(|cohort| cohort.is_costly() && cohort.name() == subject)
    });
}

/// Tells operators that devices share an id: one replaces the other, and neither is online for long.
#[expect(clippy::cast_precision_loss, reason = "a few thousand ids are watched")]
fn watch_duplicates(state: &Shared) {
    let (before, found) = state.shared_ids.look(state.clock.now());
    state.metrics.duplicate_ids.set(found.count as f64);
    match (before.example, found.example) {
        (None, Some(example)) => state.alarm(
            DUPLICATE_ALARM,
            true,
            format!(
                "devices with one id replace each other, {REPLACEMENTS} times within {} minutes: {} such ids, {example} is one. Give each device an id of its own",
                WINDOW.as_secs() / 60,
                found.count
            ),
        ),
        (Some(_), None) => state.alarm(DUPLICATE_ALARM, false, "no devices replace each other any more"),
        (None, None) | (Some(_), Some(_)) => {}
    }
}

/// Publishes why the limit on look-ups is what it is, and tells operators where its ceiling is too low. `ceiling_seen` is when that was
/// seen last, while the alarm is on.
fn publish_admission(state: &Shared, ceiling_seen: &mut Option<Instant>) {
    let admission = state.gate.state();
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
    let now = Instant::now();
    if admission.is_ceiling_too_low {
        if ceiling_seen.is_none() {
            let detail = format!(
                "devices wait, and the database would answer more than {} keys at a time: raise admission.keys_in_flight_max",
                admission.limit_ceiling
            );
            state.alarm(CEILING_ALARM, true, detail);
        }
        *ceiling_seen = Some(now);
    } else if ceiling_seen.is_some_and(|seen| now.duration_since(seen) >= CEILING_QUIET) {
        state.alarm(
            CEILING_ALARM,
            false,
            "the limit on look-ups is no longer at its ceiling",
        );
        *ceiling_seen = None;
    }
    let is_alarm = ceiling_seen.is_some();
    metrics.admission_ceiling_alarm.set(if is_alarm { 1.0 } else { 0.0 });
}

/// Logs what became of the connect attempts of each minute that had any, until `stop`. In a storm nothing else at INFO tells of refusals.
pub async fn sum_up_attempts(state: Shared, stop: CancellationToken) {
    let mut minutes = interval(SUMMARY_INTERVAL);
    minutes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before: BTreeMap<String, u64> = BTreeMap::new();
    while stop.run_until_cancelled(minutes.tick()).await.is_some() {
        let counted = attempts(&state.metrics.render());
        let (admitted, refused, by_outcome) = difference(&before, &counted);
        before = counted;
        if admitted + refused > 0 {
            let sessions = state.sessions.len();
            tracing::info!(
                admitted,
                refused,
                by_outcome,
                sessions,
                "connect attempts of the last minute"
            );
        }
    }
}

/// Connect attempts since the start, by outcome, from the text of the metrics.
fn attempts(metrics: &str) -> BTreeMap<String, u64> {
    let series = metrics.lines().filter_map(|line| line.strip_prefix(ATTEMPTS_SERIES));
    series
        .filter_map(|rest| {
            let (outcome, count) = rest.split_once("\"} ")?;
            Some((outcome.to_owned(), count.parse().ok()?))
        })
        .collect()
}

/// Attempts admitted and not admitted since `before`; the latter by outcome, the most frequent first.
fn difference(before: &BTreeMap<String, u64>, counted: &BTreeMap<String, u64>) -> (u64, u64, String) {
    let since = |outcome: &String, count: &u64| count.saturating_sub(before.get(outcome).copied().unwrap_or_default());
    let mut others: Vec<(u64, &String)> = counted
        .iter()
        .map(|(outcome, count)| (since(outcome, count), outcome))
        .filter(|(count, outcome)| *count > 0 && outcome.as_str() != "admitted")
        .collect();
    others.sort_by(|one, other| other.cmp(one));
    let refused = others.iter().map(|(count, _)| count).sum();
    let by_outcome: Vec<String> = others
        .iter()
        .map(|(count, outcome)| format!("{outcome} {count}"))
        .collect();
    let admitted = counted
        .get_key_value("admitted")
        .map_or(0, |(outcome, count)| since(outcome, count));
    (admitted, refused, by_outcome.join(", "))
}

/// Measures how late tasks run, until `stop`.
pub async fn measure_lag(state: Shared, stop: CancellationToken) {
    loop {
        let due = Instant::now() + LAG_INTERVAL;
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep_until(due) => {}
        }
        state.metrics.event_loop_lag_seconds.record(due.elapsed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minute_is_summed_up_by_outcome() {
        let text = |admitted: u64, overloaded: u64, unauthorized: u64| {
            format!(
                "# HELP seawall_handshakes_total x\nseawall_handshakes_total{{outcome=\"admitted\"}} {admitted}\n\
                 seawall_handshakes_total{{outcome=\"overloaded\"}} {overloaded}\n\
                 seawall_handshakes_total{{outcome=\"unauthorized\"}} {unauthorized}\nseawall_sessions 3\n"
            )
        };

        let (before, counted) = (attempts(&text(100, 5, 1)), attempts(&text(1_300, 255, 51)));

        assert_eq!(
            difference(&before, &counted),
            (1_200, 300, "overloaded 250, unauthorized 50".to_owned())
        );
        assert_eq!(difference(&counted, &counted), (0, 0, String::new()));
    }

    #[test]
    fn look_ups_that_became_twice_as_slow_are_noticed_once() {
        let mut usual = Usual::default();
        let ms = Duration::from_millis;
        usual.set(ms(10));

        assert!(!usual.is_exceeded(ms(19)));
        assert!(usual.is_exceeded(ms(23)));
        usual.set(ms(23));
        assert!(!usual.is_exceeded(ms(23)));
        assert!(!usual.is_exceeded(ms(4)), "faster");
        assert!(usual.is_exceeded(ms(23)), "and slow again");
    }

    #[test]
    fn fast_look_ups_are_not_slow_however_fast_they_were() {
        let mut usual = Usual::default();
        usual.set(Duration::from_micros(300));

        assert!(!usual.is_exceeded(Duration::from_millis(2)));
        assert!(usual.is_exceeded(Duration::from_millis(23)));
    }
}
