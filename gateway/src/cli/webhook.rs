//! `seawall webhook`: whether messages arrive.

use clap::Subcommand;

use super::{Context, Failure, client::Method, table};

#[derive(Debug, Subcommand)]
pub enum Webhook {
    /// Send a test message from the gateway, and show the answer
    Test,
}

pub fn run(ctx: &Context, verb: &Webhook) -> Result<(), Failure> {
    match verb {
        Webhook::Test => {}
    }
    let answer = ctx.client.send(Method::Post, "/api/v1/webhook/test", None)?;
    ctx.show(&answer, |answer| {
        table::facts(&[
            ("receiver", table::at(answer, "receiver")),
            ("delivered", table::at(answer, "delivered")),
            ("status", table::at(answer, "status")),
            ("problem", table::at(answer, "problem")),
            ("duration (ms)", table::at(answer, "duration_ms")),
            ("webhook-id", table::at(answer, "id")),
        ])
    })?;
    if answer["delivered"] == true {
        Ok(())
    } else {
        Err(Failure::failed("the webhook did not take the test message"))
    }
}
