//! `seawall tokens`: who may use the API, and as what.

use clap::Subcommand;
use serde_json::json;

use super::{Context, Failure, client::Method, table};

/// Tokens of one gateway; more than this is not asked for.
const TOKENS_MAX: usize = 10_000;
const PATH: &str = "/api/v1/tokens";

#[derive(Debug, Subcommand)]
pub enum Tokens {
    /// Make a token; it is shown this once
    Create {
        /// Whose it is, or what for
        name: String,
        /// viewer reads; operator also changes rules, drains and disconnects; admin also manages devices and tokens
        #[arg(long, value_parser = ["viewer", "operator", "admin"])]
        role: String,
    },
    /// Every token, without its secret
    List,
    /// End a token
    Revoke { id: uuid::Uuid },
}

pub fn run(ctx: &Context, verb: Tokens) -> Result<(), Failure> {
    match verb {
        Tokens::Create { name, role } => {
            let answer = ctx
                .client
                .send(Method::Post, PATH, Some(&json!({"name": name, "role": role})))?;
            ctx.show(&answer, |answer| {
                table::facts(&[
                    ("id", table::at(answer, "id")),
                    ("name", table::at(answer, "name")),
                    ("role", table::at(answer, "role")),
                    ("token", table::at(answer, "token")),
                ])
            })
        }
        Tokens::List => ctx.show(&ctx.client.list(PATH, &[], TOKENS_MAX)?, |answer| {
            table::items(
                answer,
                &[
                    ("ID", "id"),
                    ("NAME", "name"),
                    ("ROLE", "role"),
                    ("CREATED", "created_at"),
                    ("REVOKED", "revoked_at"),
                ],
            )
        }),
        Tokens::Revoke { id } => {
            ctx.client.send(Method::Delete, &format!("{PATH}/{id}"), None)?;
            ctx.show(&json!({ "revoked": id }), |_| format!("revoked {id}\n"))
        }
    }
}
