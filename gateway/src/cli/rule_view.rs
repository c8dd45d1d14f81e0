//! Rules and previews as text for people.

use std::time::Duration;

use seawall_proto::rules::{Mode, Rule};
use serde_json::Value;

use super::table;

/// Returns rules as a table.
pub fn shown_rules(rules: &Value) -> String {
    let rows = table::list(rules).iter().map(|rule| {
        vec![
            table::at(rule, "id"),
            shown_match(rule),
            table::at(rule, "effect"),
            table::at(rule, "state"),
            table::at(rule, "admit_percent"),
            table::at(rule, "hits.connected"),
            table::at(rule, "hits.refused"),
            table::at(rule, "hits.restricted"),
            table::at(rule, "hits.throttled"),
            table::at(rule, "hits.evicted"),
            table::at(rule, "hits.dry_run"),
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
            "ADMIT %",
            "CONNECTED",
            "REFUSED",
            "RESTRICTED",
            "THROTTLED",
            "EVICTED",
            "DRY RUN",
            "EVICT",
            "RETRY AFTER",
            "EXPIRES",
            "REASON",
        ],
        rows,
    )
}

/// Returns one rule, with a line per field.
pub fn shown_rule(rule: &Value) -> String {
    let mut facts = vec![("id", table::at(rule, "id")), ("match", shown_match(rule))];
    for (name, path) in [
        ("effect", "effect"),
        ("mode", "mode"),
        ("admit percent", "admit_percent"),
        ("state", "state"),
        ("problem", "problem"),
        ("reason", "reason"),
        ("retry after", "retry_after"),
        ("expires", "expires_at"),
        ("evict", "evict"),
        ("created", "created_at"),
        ("revision", "revision"),
        ("connected now", "hits.connected"),
        ("refused", "hits.refused"),
        ("restricted", "hits.restricted"),
        ("throttled", "hits.throttled"),
        ("evicted", "hits.evicted"),
        ("would have matched in dry run", "hits.dry_run"),
    ] {
        facts.push((name, table::at(rule, path)));
    }
    if rule.get("effect").and_then(Value::as_str) == Some("throttle") {
        let rate = rule.get("rate_per_second").map_or_else(
            || "5 % of the capacity of the database".to_owned(),
            |rate| format!("{rate} per second on each node"),
        );
        facts.push(("rate", rate));
    }
    if let Some(allowed) = rule.get("allow").and_then(Value::as_array) {
        let devices: Vec<&str> = allowed.iter().filter_map(Value::as_str).collect();
        facts.push(("allow", table::text(&devices.join(" "))));
    }
    if let Some(update) = rule.get("update") {
        facts.push(("update", table::text(&update.to_string())));
    }
    table::facts(&facts)
}

/// Returns the effect of a new rule: its devices, the pace of the eviction, and the retry hint.
pub fn rule_effect(rule: &Value, preview: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    let is_dry_run = rule.get("mode").and_then(Value::as_str) == Some(Mode::DryRun.as_str());
    let connected = preview.get("affected").and_then(Value::as_u64);
    if let Some(connected) = connected {
        let mut line = format!(
            "{} {connected} of {} connected devices",
            done_by(rule, is_dry_run),
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
        let admitted = rule.get("admit_percent").and_then(Value::as_u64);
        if let Some(percent) = admitted.filter(|percent| *percent > 0) {
            line.push_str(&format!(
                "; it admits {percent} % of the {} that it matches",
                table::at(preview, "connected")
            ));
        }
        lines.push(line);
    }
    if is_dry_run {
        lines.push(format!(
            "it only counts: enforce it with seawall rules edit {} --dry-run false",
            table::at(rule, "id")
        ));
        return lines;
    }
    let is_throttle = rule.get("effect").and_then(Value::as_str) == Some("throttle");
    let is_evicting = rule.get("evict").and_then(Value::as_bool) == Some(true);
    let rate = preview.get("evictions_per_second").and_then(Value::as_f64);
    match (is_evicting, connected, rate) {
        (true, Some(connected @ 1..), Some(rate)) if rate > 0.0 => {
            let seconds = (connected as f64 / rate).ceil();
            lines.push(format!(
                "evicting at {rate:.0} per second on each node, about {seconds:.0} s; devices are told to stay away for {} at first, and for longer the older the rule is",
                between(told_at_first(rule))
            ));
        }
        (false, Some(1..), _) if is_throttle => {
            lines.push("they stay connected: a throttle closes no sessions".to_owned());
        }
        (false, Some(1..), _) => {
            lines.push("they stay connected until they leave: --evict closes their sessions".to_owned())
        }
        _ => {}
    }
    if let Some(retry_after) = retry_after(rule).filter(|_| !is_throttle) {
        lines.push(format!(
            "refused devices are told to stay away for {}; an unblock does not make them return sooner",
            between(retry_after)
        ));
    }
    lines
}

/// Returns what a change that the database could not take means.
pub fn local_note(answer: &Value) -> Option<String> {
    let is_local = answer.get("state").and_then(Value::as_str) == Some("local");
    is_local.then(|| {
        "only on this node, because the database can't take it now: it moves to the database and the other nodes \
         automatically (seawall alarms)"
            .to_owned()
    })
}

/// Returns the verb of a rule's effect.
fn done_by(rule: &Value, is_dry_run: bool) -> &'static str {
    match (rule.get("effect").and_then(Value::as_str), is_dry_run) {
        (Some("restrict"), false) => "restricted",
        (Some("restrict"), true) => "would restrict",
        (Some("throttle"), false) => "throttled",
        (Some("throttle"), true) => "would throttle",
        (_, false) => "blocked",
        (_, true) => "would block",
    }
}

/// Returns when the devices of a removed rule reconnect.
pub fn return_of(rule: &Value) -> String {
    let Some(retry_after) = retry_after(rule) else {
        return "its devices return at the time that they were told".to_owned();
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

/// Returns the retry hint of a device that a new rule evicts.
fn told_at_first(rule: &Value) -> Duration {
    Rule::EVICTED_MIN.min(retry_after(rule).unwrap_or(Rule::EVICTED_MIN))
}

/// Returns the minimum retry hint of a device that the rule evicts now.
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

/// Returns a rule's match in one line.
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

/// Returns a preview: the matched devices, the confirmation, and the versions.
pub fn shown_preview(preview: &Value) -> String {
    let number = |key: &str| preview.get(key).and_then(Value::as_u64).unwrap_or_default();
    let mut lines = format!(
        "matches {} of {} connected devices, and {} of {} seen within a day ({})\n",
        number("connected"),
        number("connected_total"),
        number("known"),
        number("known_total"),
        match number("nodes") {
            1 => "1 node".to_owned(),
            nodes => format!("{nodes} nodes"),
        }
    );
    if number("affected") < number("connected") {
        lines.push_str(&format!(
            "affects {} of the connected ones: its admit_percent admits the others\n",
            number("affected")
        ));
    }
    if number("dark_tenants_total") > 0 {
        let names = preview.get("dark_tenants").map(table::list).unwrap_or_default();
        let names: Vec<String> = names.iter().map(table::cell).collect();
        let more = number("dark_tenants_total") - names.len() as u64;
        lines.push_str(&format!(
            "no connected device of {} tenants may connect any more: {}{}\n",
            number("dark_tenants_total"),
            names.join(", "),
            if more > 0 {
                format!(" and {more} more")
            } else {
                String::new()
            }
        ));
    }
    if number("unlisted") > 0 {
        lines.push_str(&format!(
            "{} connected devices have versions that this node does not know: they may match too\n",
            number("unlisted")
        ));
    }
    if preview.get("needs_confirmation").and_then(Value::as_bool) == Some(true) {
        lines.push_str(&format!("needs --confirm: {}\n", table::at(preview, "confirmation")));
    }
    let rate = preview.get("evictions_per_second").and_then(Value::as_f64);
    if let Some(rate) = rate.filter(|rate| *rate > 0.0 && number("affected") > 0) {
        lines.push_str(&format!(
            "with --evict: sessions are closed at {rate:.0} per second on each node, in about {:.0} s\n",
            (number("affected") as f64 / rate).ceil()
        ));
    }
    let versions = preview.get("by_version").map(table::list).unwrap_or_default();
    if !versions.is_empty() {
        let columns = [
            ("FIRMWARE", "firmware"),
            ("CONNECTED", "connected"),
            ("SEEN WITHIN A DAY", "known"),
        ];
        lines.push_str(&format!("\n{}", table::items(&preview["by_version"], &columns)));
    }
    if number("other_versions") > 0 {
        lines.push_str(&format!("{} devices have other versions\n", number("other_versions")));
    }
    lines
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn preview_is_a_summary_and_a_table_in_the_order_that_people_read() {
        let mut preview = json!({
            "connected": 30, "affected": 30, "connected_total": 100, "known": 45, "known_total": 120, "registered": 500, "nodes": 2,
            "unconfirmed_rules": 0, "unlisted": 0, "needs_confirmation": false, "evictions_per_second": 20.0,
            "by_version": [{"firmware": "3.8.0-b3", "connected": 30, "known": 45}], "other_versions": 0,
        });

        let shown = shown_preview(&preview);

        assert_eq!(
            shown,
            "matches 30 of 100 connected devices, and 45 of 120 seen within a day (2 nodes)\n\
             with --evict: sessions are closed at 20 per second on each node, in about 2 s\n\
             \n\
             FIRMWARE  CONNECTED  SEEN WITHIN A DAY\n\
             3.8.0-b3  30         45\n"
        );
        preview["needs_confirmation"] = true.into();
        preview["confirmation"] = "the rule would refuse 30 of 40 devices".into();
        preview["dark_tenants"] = json!(["a\u{7}b", "c"]);
        preview["dark_tenants_total"] = 5.into();

        let shown = shown_preview(&preview);

        assert!(shown.contains("needs --confirm: the rule would refuse 30 of 40 devices\n"));
        assert!(
            shown.contains("no connected device of 5 tenants may connect any more: a\\u{7}b, c and 3 more\n"),
            "{shown}"
        );
    }
}
