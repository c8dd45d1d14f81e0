//! Checks the query plans of the connect path, so that a lookup without an index is found before a storm. Start with
//! [`guard`].

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{node::Shared, store::PlanReport};

/// Maximum time between two checks of the plans.
const CHECK_INTERVAL: Duration = Duration::from_secs(600);
/// Time between two checks while an alarm is active, a check failed, or lookups became slower.
const EXPEDITED_INTERVAL: Duration = Duration::from_secs(5);
/// Factor by which lookups must be slower than usual for an early check.
const SLOWER_FACTOR: u32 = 2;
/// Lookup time below which the plans are not checked early.
const FAST_ENOUGH: Duration = Duration::from_millis(3);
/// Alarm while a statement of the connect path is too costly.
const ALARM: &str = "plan";

/// Guards the plans until `stop`. The alarm cuts the limit on lookups, and ends on its own.
pub async fn guard(state: Shared, stop: CancellationToken) {
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
                    tracing::warn!(error = %error, "plans of lookups not readable: retrying")
                }
                Err(_) => {}
            }
            is_failing = checked.is_err();
            let is_urgent = !matches!(checked, Ok(PlanReport::Indexed));
            usual.set(state.lookups.state().took_p90);
            loop {
                tokio::time::sleep(EXPEDITED_INTERVAL).await;
                let is_slower = usual.is_exceeded(state.lookups.state().took_p90);
                if is_urgent || is_slower || checked_at.elapsed() >= CHECK_INTERVAL {
                    break;
                }
            }
        }
    };
    // The endless loop is dropped with the gateway.
    let _: Option<std::convert::Infallible> = stop.run_until_cancelled(guard).await;
}

/// Lookup time at the last check of the plans, or the minimum since.
#[derive(Debug, Default)]
struct Usual(Duration);

impl Usual {
    const fn set(&mut self, took: Duration) {
        self.0 = took;
    }

    fn is_exceeded(&mut self, took: Duration) -> bool {
        // No device was looked up yet.
        if !took.is_zero() {
            self.0 = self.0.min(took);
        }
        took > FAST_ENOUGH && took > self.0 * SLOWER_FACTOR
    }
}

fn take_report(state: &Shared, report: &PlanReport) {
    let is_alarm = report.is_alarm();
    state.lookups.set_limit_cut(is_alarm);
    state.metrics.plan_alarm.set(if is_alarm { 1.0 } else { 0.0 });
    match report {
        PlanReport::Alarm(detail) => state.alarms.set(ALARM, true, detail.as_str()),
        PlanReport::Indexed => state.alarms.set(ALARM, false, "every lookup uses an index again"),
    }
    state.plan.set(report.clone());
}

#[cfg(test)]
mod tests {
    use super::*;

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
