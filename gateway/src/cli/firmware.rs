//! `seawall firmware`: one row a cohort, that is, a model with a firmware version.

use clap::Args;
use serde_json::Value;

use super::{Context, Failure, table};

/// Cohorts that one listing shows at most; a node knows no more.
const COHORTS_MAX: usize = 10_000;

#[derive(Debug, Args)]
pub struct Firmware {
    /// Most rows to show
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=COHORTS_MAX as u64))]
    limit: u64,
}

pub fn run(ctx: &Context, args: &Firmware) -> Result<(), Failure> {
    let limit = usize::try_from(args.limit).unwrap_or(COHORTS_MAX);
    ctx.show(&ctx.client.list("/api/v1/firmware", &[], limit)?, shown)
}

fn shown(answer: &Value) -> String {
    let rows = table::list(answer).iter().map(|cohort| {
        vec![
            table::at(cohort, "cohort"),
            table::at(cohort, "connected"),
            attempts(cohort),
            table::at(cohort, "repeats"),
            table::at(cohort, "lookup.keys"),
            table::at(cohort, "lookup.seconds"),
        ]
    });
    table::table(
        &[
            "COHORT",
            "CONNECTED",
            "ATTEMPTS SINCE START",
            "REPEATS",
            "LOOKUPS",
            "LOOKUP SECONDS",
        ],
        rows,
    )
}

/// Outcomes that happened, as in `admitted 20, firmware_blocked 3`.
fn attempts(cohort: &Value) -> String {
    let outcomes = cohort.get("attempts").and_then(Value::as_object).into_iter().flatten();
    let shown: Vec<String> = outcomes
        .filter(|(_, count)| count.as_u64() != Some(0))
        .map(|(outcome, count)| format!("{} {}", table::text(outcome), table::cell(count)))
        .collect();
    if shown.is_empty() {
        "-".to_owned()
    } else {
        shown.join(", ")
    }
}
