//! `seawall nodes`: the state of each gateway.

use serde_json::Value;

use super::{Context, Failure, table};

/// Maximum number of nodes that are requested.
const NODES_MAX: usize = 1_000;

pub fn run(ctx: &Context) -> Result<(), Failure> {
    ctx.show(&ctx.client.list("/api/v1/nodes", &[], NODES_MAX)?, shown)
}

fn shown(answer: &Value) -> String {
    let rows = table::list(answer).iter().map(|node| {
        vec![
            table::at(node, "node"),
            table::at(node, "version"),
            table::at(node, "ready"),
            table::at(node, "sessions"),
            table::at(node, "admission.in_flight"),
            table::at(node, "admission.limit"),
            table::at(node, "admission.limit_ceiling"),
            table::at(node, "admission.limit_reason"),
            table::at(node, "admission.queue"),
            table::at(node, "admission.breaker"),
            table::at(node, "database.state"),
            table::at(node, "database.plan"),
            table::at(node, "rules.revision"),
            table::at(node, "drain.state"),
        ]
    });
    let head = [
        "NODE",
        "VERSION",
        "READY",
        "SESSIONS",
        "LOOKUPS IN FLIGHT",
        "LIMIT",
        "LIMIT MAX",
        "LIMIT REASON",
        "QUEUE",
        "BREAKER",
        "DATABASE",
        "QUERY PLAN",
        "RULES REVISION",
        "DRAIN",
    ];
    table::table(&head, rows)
}
