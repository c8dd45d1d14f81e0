//! `seawall log-level`: what a running gateway logs.

use clap::Args;
use serde_json::json;

use super::{Context, Failure, client::Method, table};

#[derive(Debug, Args)]
pub struct LogLevel {
    /// off, error, warn, info, debug or trace, or directives such as info,seawall_gateway::lookup=debug
    level: String,
}

pub fn run(ctx: &Context, LogLevel { level }: &LogLevel) -> Result<(), Failure> {
    let path = "/api/v1/node/log-level";
    let answer = ctx.client.send(Method::Put, path, Some(&json!({ "level": level })))?;
    ctx.show(&answer, |answer| {
        format!(
            "log level {}, before: {}\n",
            table::at(answer, "level"),
            table::at(answer, "before")
        )
    })
}
