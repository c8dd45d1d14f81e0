//! `seawall drain`: closes the sessions of a gateway at a pace.

use clap::Subcommand;
use serde_json::{Map, Value};

use super::{Context, Failure, client::Method, table, time};

#[derive(Debug, Subcommand)]
pub enum Drain {
    /// Refuse new devices and close sessions at a pace; the gateway keeps running
    Start {
        /// Sessions to close per second [default: the measured capacity, or more if the deadline needs it]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        rate: Option<u32>,
        /// Time in which to close them, as in 10m [default: drain.deadline_seconds]
        #[arg(long, value_name = "SPAN", value_parser = time::span)]
        deadline: Option<String>,
    },
    /// Show the state of the drain
    Status,
    /// Stop draining and admit devices again
    Cancel,
}

const PATH: &str = "/api/v1/drain";

pub fn run(ctx: &Context, verb: &Drain) -> Result<(), Failure> {
    let answer = match verb {
        Drain::Start { rate, deadline } => {
            let mut body = Map::new();
            if let Some(rate) = rate {
                body.insert("rate_per_second".into(), (*rate).into());
            }
            if let Some(deadline) = deadline {
                body.insert("deadline".into(), deadline.as_str().into());
            }
            let answer = ctx.client.send_any(Method::Post, PATH, Some(&body.into()))?;
            if answer.code() == Some("conflict") {
                return Err(answer.refused(
                    "a drain is running already: see seawall drain status, or end it with seawall drain cancel".into(),
                ));
            }
            answer.ok()?
        }
        Drain::Status => ctx.client.get(PATH, &[])?,
        Drain::Cancel => {
            let answer = ctx.client.send(Method::Delete, PATH, None)?;
            if answer.is_null() {
                ctx.client.get(PATH, &[])?
            } else {
                answer
            }
        }
    };
    ctx.show(&answer, shown)
}

/// Returns the state. Without a drain there is nothing else to show.
fn shown(drain: &Value) -> String {
    let state = table::at(drain, "state");
    let left = table::at(drain, "left");
    if state == "idle" {
        return table::facts(&[("state", state), ("sessions", left)]);
    }
    let eta = drain.get("eta_seconds").and_then(Value::as_f64);
    let rate = drain.get("rate").and_then(Value::as_f64).filter(|rate| *rate > 0.0);
    table::facts(&[
        ("state", state),
        (
            "sessions",
            match drain.get("total").and_then(Value::as_u64) {
                Some(total) => format!("{left} of {total} left"),
                None => format!("{left} left"),
            },
        ),
        (
            "rate",
            rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1} per second")),
        ),
        (
            "time left",
            eta.map_or_else(|| "-".to_owned(), |eta| format!("about {:.0} s", eta.ceil())),
        ),
        ("deadline", table::at(drain, "deadline")),
    ])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn drain_says_how_far_it_is_and_when_it_ends() {
        let drain = json!({"state": "draining", "left": 150, "total": 200, "rate": 40.0, "eta_seconds": 3.75,
            "deadline": "2026-11-28T20:11:19.000Z"});

        let shown = shown(&drain);

        for part in ["150 of 200 left", "40.0 per second", "about 4 s", "2026-11-28T20:11:19"] {
            assert!(shown.contains(part), "{shown}");
        }
        assert_eq!(
            super::shown(&json!({"state": "idle", "left": 199, "rate": 0.0})),
            "state     idle\nsessions  199\n"
        );
    }
}
