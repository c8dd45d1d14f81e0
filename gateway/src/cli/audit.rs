//! `seawall audit`: the audit log.

use std::collections::BTreeMap;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Context, Failure, client::Method, table, time};

/// Maximum number of lines that one listing shows.
const LIST_MAX: u64 = 100_000;

/// Characters of a token's id that are shown.
const ID_END_LEN: usize = 8;

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Audit {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// Maximum number of lines to show
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=LIST_MAX))]
    limit: u64,
    /// Show all lines, up to 100,000
    #[arg(long, conflicts_with = "limit")]
    all: bool,
    /// Cursor of the next page, as the previous list shows it
    #[arg(long)]
    cursor: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Delete old records; the audit log says who did that
    Prune {
        /// Minimum age of the records, as in 90d; at least a day
        #[arg(long, value_name = "SPAN", value_parser = time::span)]
        older_than: String,
    },
}

pub fn run(ctx: &Context, args: &Audit) -> Result<(), Failure> {
    if let Some(Verb::Prune { older_than }) = &args.verb {
        return prune(ctx, older_than);
    }
    let query: Vec<_> = args.cursor.iter().map(|cursor| ("cursor", cursor.clone())).collect();
    let limit = if args.all { LIST_MAX } else { args.limit };
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let answer = ctx.client.list("/api/v1/audit", &query, limit)?;
    ctx.show(&answer, shown)?;
    ctx.note_next_page(&answer);
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

fn shown(answer: &Value) -> String {
    let rows = table::list(answer).iter().map(|line| {
        let before = line.get("before").unwrap_or(&Value::Null);
        let after = line.get("after").unwrap_or(&Value::Null);
        vec![
            time(line),
            actor(line),
            table::at(line, "action"),
            table::at(line, "subject"),
            change(before, after),
        ]
    });
    table::table(&["AT", "ACTOR", "ACTION", "SUBJECT", "CHANGE"], rows)
}

/// Returns when the change was made, and when it reached the database if it had to wait for it.
fn time(line: &Value) -> String {
    let at = table::at(line, "at");
    match line.get("arrived_at") {
        Some(_) => format!("{at} (stored {})", table::at(line, "arrived_at")),
        None => at,
    }
}

/// Returns the token's name, and the end of its id, which `tokens revoke` accepts.
fn actor(line: &Value) -> String {
    let name = table::at(line, "actor");
    match line.get("actor_id").and_then(Value::as_str) {
        Some(id) => format!(
            "{name} (…{})",
            table::text(id.get(id.len().saturating_sub(ID_END_LEN)..).unwrap_or(id))
        ),
        None => name,
    }
}

/// Returns the fields that differ: `state=enabled -> disabled`, `tenant=acme` for a new one, `was tenant=acme` for a
/// removed one.
fn change(before: &Value, after: &Value) -> String {
    let (before, after) = (fields(before), fields(after));
    let mut names: Vec<&String> = before.keys().chain(after.keys()).collect();
    names.sort_unstable();
    names.dedup();
    let changes: Vec<String> = names
        .into_iter()
        .filter_map(|name| match (before.get(name), after.get(name)) {
            (Some(before), Some(after)) if before == after => None,
            (Some(before), Some(after)) => Some(format!("{name}={before} -> {after}")),
            (None, Some(after)) => Some(format!("{name}={after}")),
            (Some(before), None) => Some(format!("was {name}={before}")),
            (None, None) => None,
        })
        .collect();
    if changes.is_empty() {
        "-".to_owned()
    } else {
        changes.join(", ")
    }
}

/// Returns the fields of an object that have a value, nested ones by their path, as text. Milliseconds since 1970
/// become times.
fn fields(value: &Value) -> BTreeMap<String, String> {
    let mut shown = BTreeMap::new();
    let mut pending = vec![(String::new(), value)];
    while let Some((path, value)) = pending.pop() {
        match value {
            Value::Null => {}
            Value::Object(map) => pending.extend(map.iter().map(|(key, value)| {
                let key = table::text(key);
                let path = if path.is_empty() { key } else { format!("{path}.{key}") };
                (path, value)
            })),
            Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
                let (name, text) = match (path.strip_suffix("_ms"), value.as_u64()) {
                    (Some(name), Some(unix_ms)) if name.ends_with("_at") || name.ends_with("_until") => {
                        (name.to_owned(), table::time(unix_ms))
                    }
                    _ => (path, table::cell(value)),
                };
                shown.insert(name, text);
            }
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn record_that_waited_for_the_database_has_both_times() {
        let line = json!({"at": "2026-01-31T12:00:00Z", "arrived_at": "2026-01-31T12:05:00Z"});

        assert_eq!(time(&line), "2026-01-31T12:00:00Z (stored 2026-01-31T12:05:00Z)");
        assert_eq!(time(&json!({"at": "2026-01-31T12:00:00Z"})), "2026-01-31T12:00:00Z");
    }

    #[test]
    fn line_says_what_differs_and_times_are_times() {
        let old = json!({"state": "enabled", "tenant": "acme", "previous_secret_until_ms": null});
        let new = json!({"state": "disabled", "tenant": "acme", "previous_secret_until_ms": 1_790_000_000_000_u64});

        assert_eq!(
            change(&old, &new),
            "previous_secret_until=2026-09-21T14:13:20Z, state=enabled -> disabled"
        );
        assert_eq!(
            change(&Value::Null, &json!({"match": {"firmware": ">=3"}, "evict": true})),
            "evict=true, match.firmware=>=3"
        );
        assert_eq!(change(&json!({"name": "x"}), &Value::Null), "was name=x");
        assert_eq!(change(&old, &old), "-");
    }
}
