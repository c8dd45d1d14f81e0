//! `seawall audit`: who changed what, and when.

use clap::{Args, Subcommand};
use serde_json::json;

use super::{Context, Failure, client::Method, note, rules, table};

/// Lines that one listing shows at most.
const LIST_MAX: u64 = 100_000;

const COLUMNS: [(&str, &str); 6] = [
    ("AT", "at"),
    ("ACTOR", "actor"),
    ("ACTION", "action"),
    ("SUBJECT", "subject"),
    ("BEFORE", "before"),
    ("AFTER", "after"),
];

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Audit {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// Most lines to show
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=LIST_MAX))]
    limit: u64,
    /// Where to go on, as the list before told
    #[arg(long)]
    cursor: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Delete old records; the audit log says who did that
    Prune {
        /// Minimum age of the records, as in 90d; at least a day
        #[arg(long, value_name = "SPAN", value_parser = rules::span)]
        older_than: String,
    },
}

pub fn run(ctx: &Context, args: &Audit) -> Result<(), Failure> {
    if let Some(Verb::Prune { older_than }) = &args.verb {
        return prune(ctx, older_than);
    }
    let query: Vec<_> = args.cursor.iter().map(|cursor| ("cursor", cursor.clone())).collect();
    let limit = usize::try_from(args.limit).unwrap_or(usize::MAX);
    let answer = ctx.client.list("/api/v1/audit", &query, limit)?;
    ctx.show(&answer, |answer| table::items(answer, &COLUMNS))?;
    if !ctx.json && !answer["next_cursor"].is_null() {
        note(&format!("more: --cursor {}", table::at(&answer, "next_cursor")));
    }
    Ok(())
}

fn prune(ctx: &Context, older_than: &str) -> Result<(), Failure> {
    let body = json!({ "older_than": older_than });
    let mut deleted = 0;
    loop {
        let answer = ctx.client.send(Method::Post, "/api/v1/audit/prune", Some(&body))?;
        deleted += answer["deleted"].as_u64().unwrap_or_default();
        if answer["more"] != true {
            break;
        }
    }
    ctx.show(&json!({ "deleted": deleted }), |_| {
        format!("deleted {deleted} records\n")
    })
}
