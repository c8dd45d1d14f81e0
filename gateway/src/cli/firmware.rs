//! `seawall firmware`: one row per cohort, that is, a model with a firmware version.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Context, Failure, client::Method, table};

/// Maximum number of rows. A node knows no more cohorts.
const COHORTS_MAX: usize = 10_000;
/// Bounds of `--during`.
const DURING_MIN: Duration = Duration::from_secs(1);
const DURING_MAX: Duration = Duration::from_mins(10);

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Firmware {
    #[command(subcommand)]
    action: Option<Action>,
    /// Maximum number of rows to show
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=COHORTS_MAX as u64))]
    limit: u64,
    /// Count for this long, such as 10s, and show what happened per second [default: show rates of the last minute and
    /// hour]
    #[arg(long, value_name = "DURATION", value_parser = during)]
    during: Option<Duration>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// End the test of a version that is new to the fleet: it is proven, and no longer limited
    Clear {
        /// The version, as its devices claim it [default: the devices that name none]
        version: Option<String>,
        /// The model, as the devices claim it [default: the devices that leave it to the registry]
        #[arg(long)]
        model: Option<String>,
    },
}

fn during(text: &str) -> Result<Duration, String> {
    let span = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if (DURING_MIN..=DURING_MAX).contains(&span) {
        Ok(span)
    } else {
        Err("expected 1s to 10m".to_owned())
    }
}

pub fn run(ctx: &Context, args: &Firmware) -> Result<(), Failure> {
    if let Some(Action::Clear { version, model }) = &args.action {
        let body = json!({ "model": model, "firmware": version });
        let cleared = ctx.client.send(Method::Post, "/api/v1/firmware/clear", Some(&body))?;
        return ctx.show(&cleared, |cleared| {
            let (cohort, before) = (table::at(cleared, "cohort"), table::at(cleared, "before"));
            format!("{cohort} is proven; it was {before}\n")
        });
    }
    let limit = usize::try_from(args.limit).unwrap_or(COHORTS_MAX);
    let list = |limit| ctx.client.list("/api/v1/firmware", &[], limit);
    let Some(during) = args.during else {
        return ctx.show(&list(limit)?, shown);
    };
    // The order changes, so the first sample needs all cohorts.
    let before = list(COHORTS_MAX)?;
    let begun = Instant::now();
    std::thread::sleep(during);
    let after = list(limit)?;
    ctx.show(&rates(&before, &after, begun.elapsed()), shown_rates)
}

/// Returns the rates of the cohorts of `after` since `before`, per second.
fn rates(before: &Value, after: &Value, elapsed: Duration) -> Value {
    let before: HashMap<&str, &Value> = table::list(before)
        .iter()
        .filter_map(|cohort| Some((cohort.get("cohort")?.as_str()?, cohort)))
        .collect();
    let items = table::list(after).iter().map(|cohort| {
        let name = cohort.get("cohort").and_then(Value::as_str).unwrap_or_default();
        let earlier = before.get(name);
        let per_second = |path: &str| {
            let at = |cohort: &Value| cohort.pointer(path).and_then(Value::as_f64).unwrap_or_default();
            // A lower count is that of a restarted gateway.
            let happened = at(cohort) - earlier.map_or(0.0, |earlier| at(earlier));
            let rate = if happened < 0.0 { at(cohort) } else { happened } / elapsed.as_secs_f64();
            (rate * 10.0).round() / 10.0
        };
        let outcomes = cohort.get("attempts").and_then(Value::as_object).into_iter().flatten();
        let attempts: serde_json::Map<String, Value> = outcomes
            .map(|(outcome, _)| (outcome.clone(), per_second(&format!("/attempts/{outcome}"))))
            .filter(|(_, rate)| *rate > 0.0)
            .map(|(outcome, rate)| (outcome, json!(rate)))
            .collect();
        json!({
            "cohort": name,
            "connected": cohort.get("connected"),
            "attempts_per_second": attempts,
            "repeats_per_second": per_second("/repeats"),
            "lookups_per_second": per_second("/lookup/keys"),
        })
    });
    json!({ "items": items.collect::<Vec<_>>(), "seconds": elapsed.as_secs_f64().round() })
}

fn shown_rates(answer: &Value) -> String {
    let rows = table::list(answer).iter().map(|cohort| {
        vec![
            table::at(cohort, "cohort"),
            table::at(cohort, "connected"),
            attempts(cohort, "attempts_per_second"),
            table::at(cohort, "repeats_per_second"),
            table::at(cohort, "lookups_per_second"),
        ]
    });
    table::table(&["COHORT", "CONNECTED", "ATTEMPTS/S", "REPEATS/S", "LOOKUPS/S"], rows)
}

/// Returns the cohorts, those that stand out first, each against the others.
fn shown(answer: &Value) -> String {
    let rows = table::list(answer).iter().map(|cohort| {
        vec![
            table::at(cohort, "cohort"),
            table::at(cohort, "breaker"),
            table::at(cohort, "stands_out"),
            version(cohort),
            table::at(cohort, "connected"),
            attempts(cohort, "minute.attempts"),
            rate(cohort, "repeats"),
            rate(cohort, "errors"),
            rate(cohort, "messages"),
            rate(cohort, "lookup_ms"),
            rate(cohort, "session_seconds"),
        ]
    });
    let table = table::table(
        &[
            "COHORT",
            "BREAKER",
            "STANDS OUT",
            "VERSION",
            "CONNECTED",
            "ATTEMPTS/S",
            "REPEATS/S",
            "ERRORS/S",
            "MESSAGES/S",
            "LOOKUP MS",
            "SESSION S",
        ],
        rows,
    );
    format!("{table}\nFigures: the last minute | the last hour (the last minute relative to all other cohorts)\n")
}

/// Returns the state of the version, and its sessions that have not proved themselves, as in `unproven (20 of 20)`.
fn version(cohort: &Value) -> String {
    let of = |path: &str| table::at(cohort, path);
    if cohort.get("version").is_none_or(Value::is_null) {
        "proven".to_owned()
    } else {
        format!(
            "{} ({} of {})",
            of("version.state"),
            of("version.young"),
            of("version.room")
        )
    }
}

/// Returns a figure of the last minute and hour, and how it compares with the rest of the fleet, as in
/// `0.5 | 0.1 (12x)`.
fn rate(cohort: &Value, figure: &str) -> String {
    let at = |path: &str| table::at(cohort, &format!("{path}.{figure}"));
    let (minute, hour, ratio) = (at("minute"), at("hour"), at("compared"));
    if ratio == "-" || ratio.is_empty() {
        format!("{minute} | {hour}")
    } else {
        format!("{minute} | {hour} ({ratio}x)")
    }
}

/// Returns outcomes that happened, as in `admitted 20, firmware_blocked 3`.
fn attempts(cohort: &Value, field: &str) -> String {
    let pointer = format!("/{}", field.replace('.', "/"));
    let outcomes = cohort
        .pointer(&pointer)
        .and_then(Value::as_object)
        .into_iter()
        .flatten();
    let shown: Vec<String> = outcomes
        .filter(|(_, count)| count.as_f64() != Some(0.0))
        .map(|(outcome, count)| format!("{} {}", table::text(outcome), table::cell(count)))
        .collect();
    if shown.is_empty() {
        "-".to_owned()
    } else {
        shown.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cohorts_are_shown_with_their_rates_and_against_the_rest() {
        let rates = |repeats: f64| json!({"attempts": {"admitted": 2.5, "overloaded": 0.0}, "repeats": repeats, "errors": 0.0, "messages": 7.0, "lookup_ms": null, "session_seconds": 61.0});
        let answer = json!({"items": [{"cohort": "box/3.8.0-b3", "breaker": "proposed", "stands_out": 2.5, "connected": 60, "version": {"state": "unproven", "young": 3, "room": 20},
            "attempts": {"admitted": 977}, "repeats": 955, "minute": rates(0.5), "hour": rates(0.1),
            "compared": {"repeats": 12.0, "errors": null, "messages": 1.0, "lookup_ms": null}}]});

        let text = shown(&answer);

        for part in [
            "proposed",
            "2.5",
            "unproven (3 of 20)",
            "admitted 2.5",
            "0.5 | 0.1 (12",
            "7.0 | 7.0 (1",
            "- | -",
            "61.0 | 61.0",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        for total in ["977", "955", "overloaded"] {
            assert!(!text.contains(total), "{total}: {text}");
        }
    }

    #[test]
    fn rates_are_what_happened_in_between() {
        let cohort = |name: &str, admitted: u64, keys: u64| json!({"cohort": name, "connected": 7, "attempts": {"admitted": admitted}, "repeats": 0, "lookup": {"keys": keys}});
        let before = json!({"items": [cohort("a", 100, 40), cohort("restarted", 900, 900)]});
        let after = json!({"items": [cohort("a", 150, 45), cohort("restarted", 20, 0), cohort("new", 5, 0)]});

        let rates = rates(&before, &after, Duration::from_secs(10));

        let of = |at: usize| &rates["items"][at];
        assert_eq!(of(0)["attempts_per_second"], json!({"admitted": 5.0}));
        assert_eq!(
            (&of(0)["lookups_per_second"], &of(0)["connected"]),
            (&json!(0.5), &json!(7))
        );
        assert_eq!(of(1)["attempts_per_second"], json!({"admitted": 2.0}));
        assert_eq!(of(2)["attempts_per_second"], json!({"admitted": 0.5}));
        assert!(shown_rates(&rates).contains("admitted 0.5"), "{}", shown_rates(&rates));
    }
}
