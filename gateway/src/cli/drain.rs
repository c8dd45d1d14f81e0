//! `seawall drain`: send the sessions of a gateway away at a pace.

use clap::Subcommand;
use serde_json::Map;

use super::{Context, Failure, client::Method, rules, table};

#[derive(Debug, Subcommand)]
pub enum Drain {
    /// Refuse new devices and close sessions at a pace; the gateway goes on running
    Start {
        /// Sessions to close a second; not given: as the deadline and the other side allow
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        rate: Option<u32>,
        /// Time to close them in, as in 10m
        #[arg(long, value_name = "SPAN", value_parser = rules::span)]
        deadline: Option<String>,
    },
    /// How far a drain is
    Status,
    /// Stop draining and take devices again
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
    ctx.show(&answer, |drain| {
        table::facts(&[
            ("state", table::at(drain, "state")),
            ("sessions left", table::at(drain, "left")),
            ("closed a second", table::at(drain, "rate")),
        ])
    })
}
