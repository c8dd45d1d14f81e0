//! Rules and previews as people see them.

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
    parts.collect::<Vec<_>>().join(" ")
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
