//! Output for people and scripts: tables and JSON. Text of devices and operators is escaped, so that a terminal obeys
//! none of it.

use std::{
    io::{self, Write},
    time::{Duration, UNIX_EPOCH},
};

use comfy_table::{ContentArrangement, Table, presets};
use serde_json::Value;

use super::Failure;

/// Escapes control characters, and characters that reorder or hide text.
pub fn text(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if is_harmful(character) {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

fn is_harmful(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// Returns a value of the API as one cell, with escaped text.
pub fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(content) => text(content),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::Array(_) | Value::Object(_) => text(&value.to_string()),
    }
}

/// Returns the value at a path like `presence.state`, as one cell. Milliseconds since 1970 become text.
pub fn at(value: &Value, path: &str) -> String {
    let found = path
        .split('.')
        .try_fold(value, |value, key| value.get(key))
        .unwrap_or(&Value::Null);
    match found.as_u64() {
        Some(unix_ms) if is_time(path) => time(unix_ms),
        Some(_) | None => cell(found),
    }
}

/// Returns milliseconds since 1970 as RFC 3339. Too large a number stays as it is.
pub fn time(unix_ms: u64) -> String {
    UNIX_EPOCH
        .checked_add(Duration::from_millis(unix_ms.min(YEAR_9999_UNIX_MS)))
        .map_or_else(
            || unix_ms.to_string(),
            |time| humantime::format_rfc3339_seconds(time).to_string(),
        )
}

/// End of the year 9999, the last one of RFC 3339.
const YEAR_9999_UNIX_MS: u64 = 253_402_300_799_000;

fn is_time(path: &str) -> bool {
    let key = path.rsplit('.').next().unwrap_or(path);
    matches!(key, "at" | "since" | "as_of") || key.ends_with("_at")
}

/// Returns an aligned table without borders, or a sentence if there are no rows. Cells must be escaped.
pub fn table(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(head);
    let mut is_empty = true;
    for row in rows {
        is_empty = false;
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    if is_empty {
        return "none\n".to_owned();
    }
    let mut lines = String::new();
    for line in table.lines() {
        lines.push_str(line.trim_end());
        lines.push('\n');
    }
    lines
}

/// Returns the items of a page as rows, with each cell by its path.
pub fn items(answer: &Value, columns: &[(&str, &str)]) -> String {
    let head: Vec<&str> = columns.iter().map(|(head, _)| *head).collect();
    let rows = list(answer)
        .iter()
        .map(|item| columns.iter().map(|(_, path)| at(item, path)).collect());
    table(&head, rows)
}

/// Returns `name  value` lines for one object.
pub fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    facts
        .iter()
        .map(|(name, value)| format!("{name:width$}  {value}\n"))
        .collect()
}

/// Returns the items of a page, or of an answer that is a list.
pub fn list(answer: &Value) -> &[Value] {
    answer
        .get("items")
        .unwrap_or(answer)
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default()
}

/// Returns indented JSON. DEL and the C1 controls, which JSON allows in strings, are escaped as well.
pub fn json(value: &Value) -> String {
    let pretty = format!("{value:#}\n");
    escape_json(&pretty)
}

/// Escapes DEL and the C1 controls in JSON text: they can only occur inside strings.
pub fn escape_json(json: &str) -> String {
    let mut shown = String::with_capacity(json.len());
    for character in json.chars() {
        if matches!(character, '\u{7f}'..='\u{9f}') {
            shown.push_str(&format!("\\u{:04x}", u32::from(character)));
        } else {
            shown.push(character);
        }
    }
    shown
}

/// Writes to standard output.
///
/// # Errors
/// [`Failure::OutputClosed`]: the reader has closed it.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_survives() {
        let nasty = json!({"items": [{"reason": "a\u{1b}[31mb\nc\u{9b}d\u{202e}e\u{7f}"}]});

        let people = items(&nasty, &[("REASON", "reason")]);
        let scripts = json(&nasty);

        assert_eq!(people, "REASON\na\\u{1b}[31mb\\nc\\u{9b}d\\u{202e}e\\u{7f}\n");
        assert!(!scripts.chars().any(|c| c.is_control() && c != '\n'), "{scripts}");
        assert_eq!(serde_json::from_str::<Value>(&scripts).unwrap(), nasty);
    }

    #[test]
    fn missing_values_are_dashes() {
        assert_eq!(at(&json!({"presence": {"state": null}}), "presence.state"), "-");
        assert_eq!(at(&json!({}), "presence.state"), "-");
        assert_eq!(
            at(&json!({"presence": {"state": "online"}}), "presence.state"),
            "online"
        );
    }
}
