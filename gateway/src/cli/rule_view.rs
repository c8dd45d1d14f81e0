//! Rules and previews as people see them.

use std::time::Duration;

use seawall_proto::rules::Rule;
use serde_json::Value;

use super::table;

/// Rules, one a row.
pub fn shown_rules(rules: &Value) -> String {
    let rows = table::list(rules).iter().map(|rule| {
        vec![
            table::at(rule, "id"),
            shown_match(rule),
            table::at(rule, "effect"),
            table::at(rule, "state"),
            table::at(rule, "hits.connected"),
            table::at(rule, "hits.refused"),
            table::at(rule, "hits.evicted"),
            table::at(rule, "evict"),
            table::at(rule, "retry_after"),
            table::at(rule, "expires_at"),
            table::at(rule, "reason"),
        ]
    });
    table::table(
        &[
            "ID",
            "MATCH",
            "EFFECT",
            "STATE",
            "CONNECTED",
            "REFUSED",
            "EVICTED",
            "EVICT",
            "RETRY AFTER",
            "EXPIRES",
            "REASON",
        ],
        rows,
    )
}

/// Whom a new rule hits, how fast they leave, and what they are told: one line each.
pub fn rule_effect(rule: &Value, preview: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    let connected = preview.get("connected").and_then(Value::as_u64);
    if let Some(connected) = connected {
        let mut line = format!(
            "blocked {connected} of {} connected devices",
            table::at(preview, "connected_total")
        );
        let versions = preview
            .get("by_version")
            .and_then(Value::as_array)
            .into_iter()
            .flatten();
        let versions: Vec<String> = versions
            .filter(|row| row.get("connected").and_then(Value::as_u64) > Some(0))
            .take(VERSIONS_MAX)
            .map(|row| format!("{}: {}", table::at(row, "firmware"), table::at(row, "connected")))
            .collect();
        if !versions.is_empty() {
            line.push_str(&format!(" ({})", versions.join(", ")));
        }
        lines.push(line);
    }
    let is_evicting = rule.get("evict").and_then(Value::as_bool) == Some(true);
    let rate = preview.get("evictions_per_second").and_then(Value::as_f64);
    match (is_evicting, connected, rate) {
        (true, Some(connected @ 1..), Some(rate)) if rate > 0.0 => {
            let seconds = (connected as f64 / rate).ceil();
            lines.push(format!(
                "evicting at {rate:.0} a second on each node, about {seconds:.0} s; devices are told to stay away for {} at first, and for longer the older the rule is",
                between(told_at_first(rule))
            ));
        }
        (false, Some(1..), _) => {
            lines.push("they stay connected until they leave: --evict closes their sessions".to_owned())
        }
        _ => {}
    }
    if let Some(retry_after) = retry_after(rule) {
        lines.push(format!(
            "refused devices are told to stay away for {}; an unblock does not call them back sooner",
            between(retry_after)
        ));
    }
    lines
}

/// When the devices of a rule that was removed are back.
pub fn return_of(rule: &Value) -> String {
    let Some(retry_after) = retry_after(rule) else {
        return "its devices come back at the time that they were told".to_owned();
    };
    let refused = format!(
        "devices that it refused are back within {}",
        shown_span(retry_after * 2)
    );
    if rule.get("evict").and_then(Value::as_bool) != Some(true) {
        return refused;
    }
    format!(
        "{refused}, those that were evicted and have not tried again within {}",
        shown_span(told_now(rule) * 2)
    )
}

/// Maximum number of versions in a line.
const VERSIONS_MAX: usize = 5;

fn retry_after(rule: &Value) -> Option<Duration> {
    humantime::parse_duration(rule.get("retry_after")?.as_str()?).ok()
}

/// What a device is told that a rule evicts when it has just been made.
fn told_at_first(rule: &Value) -> Duration {
    Rule::EVICTED_MIN.min(retry_after(rule).unwrap_or(Rule::EVICTED_MIN))
}

/// What a device is told that the rule evicts now, at least.
fn told_now(rule: &Value) -> Duration {
    let made = rule.get("created_at").and_then(Value::as_str);
    let age = made
        .and_then(|made| humantime::parse_rfc3339(made).ok())
        .and_then(|made| made.elapsed().ok())
        .unwrap_or_default();
    let longest = retry_after(rule).unwrap_or(Rule::EVICTED_MIN);
    age.max(Rule::EVICTED_MIN).min(longest)
}

fn between(shortest: Duration) -> String {
    format!("{} to {}", shown_span(shortest), shown_span(shortest * 2))
}

/// In whole seconds.
fn shown_span(span: Duration) -> String {
    humantime::format_duration(Duration::from_secs(span.as_secs_f64().ceil() as u64)).to_string()
}

/// What a rule matches, in one line.
pub fn shown_match(rule: &Value) -> String {
    let parts = ["firmware", "model", "tenant"].iter().filter_map(|key| {
        let text = rule.pointer(&format!("/match/{key}"))?.as_str()?;
        Some(if *key == "firmware" {
            table::text(text)
        } else {
            format!("{key}={}", table::text(text))
        })
    });
    let parts: Vec<String> = parts.collect();
    if parts.is_empty() {
        "every device".to_owned()
    } else {
        parts.join(" ")
    }
}

/// Figures first, then the versions.
pub fn shown_preview(preview: &Value) -> String {
    let figures = preview
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(_, value)| !value.is_array() && !value.is_object());
    let mut lines: String = figures
        .map(|(name, value)| format!("{}: {}\n", name.replace('_', " "), table::cell(value)))
        .collect();
    for (name, value) in preview.as_object().into_iter().flatten() {
        match value {
            Value::Array(rows) if !rows.is_empty() => {
                let head: Vec<String> = rows[0]
                    .as_object()
                    .into_iter()
                    .flatten()
                    .map(|(key, _)| key.clone())
                    .collect();
                let names: Vec<&str> = head.iter().map(String::as_str).collect();
                let cells = rows
                    .iter()
                    .map(|row| head.iter().map(|key| table::at(row, key)).collect());
                lines.push_str(&format!(
                    "\n{}\n{}",
                    name.replace('_', " "),
                    table::table(&names, cells)
                ));
            }
            Value::Object(map) => {
                lines.push_str(&format!("\n{}\n", name.replace('_', " ")));
                lines.extend(
                    map.iter()
                        .map(|(key, value)| format!("  {}: {}\n", table::text(key), table::cell(value))),
                );
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {}
        }
    }
    lines
}
