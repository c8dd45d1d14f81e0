//! `seawall proposals`: what the cohort breaker proposes, and what a person decides.

use clap::Subcommand;
use serde_json::json;
use uuid::Uuid;

use super::{Context, Failure, client::Method, table};

/// Maximum number of proposals. A node keeps no more.
const PROPOSALS_MAX: usize = 1_000;

#[derive(Debug, Subcommand)]
pub enum Proposals {
    /// Print the proposals, newest first
    List,
    /// Make the rule of an open proposal: 10 % of the cohort are admitted, for 15 minutes and while they are bad
    Apply {
        /// Id of the proposal
        id: Uuid,
        /// Confirm a rule that refuses over 30 % of the connected devices
        #[arg(long)]
        confirm: bool,
    },
    /// Close an open proposal; its cohort gets no other for an hour
    Dismiss {
        /// Id of the proposal
        id: Uuid,
    },
}

pub fn run(ctx: &Context, verb: Proposals) -> Result<(), Failure> {
    match verb {
        Proposals::List => ctx.show(&ctx.client.list("/api/v1/proposals", &[], PROPOSALS_MAX)?, |answer| {
            let rows = table::list(answer).iter().map(|proposal| {
                let of = |path: &str| table::at(proposal, path);
                let evidence = format!(
                    "{} {}, expected {}",
                    of("evidence.observed"),
                    of("evidence.unit"),
                    of("evidence.expected")
                );
                let devices = format!("{} of {}", of("evidence.devices"), of("evidence.devices_total"));
                vec![
                    of("id"),
                    of("state"),
                    of("cohort"),
                    of("signal"),
                    evidence,
                    devices,
                    of("created_at"),
                ]
            });
            table::table(
                &[
                    "PROPOSAL", "STATE", "COHORT", "SIGNAL", "EVIDENCE", "DEVICES", "CREATED",
                ],
                rows,
            )
        }),
        Proposals::Apply { id, confirm } => {
            let path = format!("/api/v1/proposals/{id}/apply");
            let rule = ctx
                .client
                .send(Method::Post, &path, Some(&json!({ "confirm": confirm })))?;
            ctx.show(&rule, |rule| {
                format!(
                    "rule {} admits {} % of the cohort; undo with: seawall rules unblock {}\n",
                    table::at(rule, "id"),
                    table::at(rule, "admit_percent"),
                    table::at(rule, "id")
                )
            })
        }
        Proposals::Dismiss { id } => {
            let path = format!("/api/v1/proposals/{id}/dismiss");
            let proposal = ctx.client.send(Method::Post, &path, None)?;
            ctx.show(&proposal, |proposal| {
                format!("dismissed: {}\n", table::at(proposal, "cohort"))
            })
        }
    }
}
