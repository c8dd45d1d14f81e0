//! `seawall audit`: who changed what, and when.

use super::{Context, Failure, note, table};
use clap::Args;

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
pub struct Audit {
    /// Most lines to show
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=LIST_MAX))]
    limit: u64,
    /// Where to go on, as the list before told
    #[arg(long)]
    cursor: Option<String>,
}

pub fn run(ctx: &Context, args: &Audit) -> Result<(), Failure> {
    let query: Vec<_> = args.cursor.iter().map(|cursor| ("cursor", cursor.clone())).collect();
    let limit = usize::try_from(args.limit).unwrap_or(usize::MAX);
    let answer = ctx.client.list("/api/v1/audit", &query, limit)?;
    ctx.show(&answer, |answer| table::items(answer, &COLUMNS))?;
    if !ctx.json && !answer["next_cursor"].is_null() {
        note(&format!("more: --cursor {}", table::at(&answer, "next_cursor")));
    }
    Ok(())
}
