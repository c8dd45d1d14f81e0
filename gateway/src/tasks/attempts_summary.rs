//! One log line per minute about connect attempts. Start with [`run`].

use std::{collections::BTreeMap, time::Duration};

use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;

use crate::node::Shared;

/// Interval between two log lines.
const SUMMARY_INTERVAL: Duration = Duration::from_secs(60);
/// Prefix of the lines of `/metrics` that count connect attempts.
const ATTEMPTS_SERIES: &str = "seawall_handshakes_total{outcome=\"";

/// Logs the outcomes of each minute's connect attempts until `stop`, except for minutes without any. It is the only
/// line at INFO that shows the refusals of a storm.
pub async fn run(state: Shared, stop: CancellationToken) {
    let mut minutes = interval_at(Instant::now() + SUMMARY_INTERVAL, SUMMARY_INTERVAL);
    minutes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Attempts counted before are not part of the first minute.
    let mut before = attempts(&state.metrics.render());
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
}
