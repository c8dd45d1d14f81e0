//! Reports against docs/report.schema.json: they are valid, and have no field that it does not describe.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::Value;

/// Faults of a report, each with its path.
pub fn faults(report: &Value) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/report.schema.json");
    let schema: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let mut faults = Vec::new();
    check(report, &schema, &schema, "", &mut faults);
    faults
}

/// The keywords that the schema uses. Any other one is a fault: it would not be checked.
fn check(value: &Value, schema: &Value, root: &Value, at: &str, faults: &mut Vec<String>) {
    let mut fault = |what: String| faults.push(format!("{at}: {what}"));
    let schema = resolved(schema, root);
    for (keyword, rule) in schema.as_object().unwrap() {
        let is_right = match keyword.as_str() {
            "$schema" | "$defs" | "title" | "description" | "properties" | "additionalProperties" | "items" => true,
            // The properties of its parts are checked with the others below.
            "allOf" => {
                let mut parts = rule.as_array().unwrap().iter().map(|part| resolved(part, root));
                parts.all(|part| has_all(value, &part["required"]))
            }
            "type" => {
                let named = rule.as_array().cloned().unwrap_or_else(|| vec![rule.clone()]);
                named.iter().any(|name| is_of(value, name.as_str().unwrap()))
            }
            "enum" => rule.as_array().unwrap().contains(value),
            "minimum" => value.as_f64().is_none_or(|value| value >= rule.as_f64().unwrap()),
            "required" => has_all(value, rule),
            _ => panic!("{at}: the keyword {keyword} is not checked"),
        };
        if !is_right {
            fault(format!("{keyword} is {rule}"));
        }
    }
    if let (Some(items), Some(item)) = (value.as_array(), schema.get("items")) {
        for (index, value) in items.iter().enumerate() {
            check(value, item, root, &format!("{at}/{index}"), faults);
        }
    }
    let described = properties(schema, root);
    for (name, value) in value.as_object().into_iter().flatten() {
        let at = format!("{at}/{name}");
        match described
            .get(name.as_str())
            .copied()
            .or_else(|| schema.get("additionalProperties"))
        {
            Some(schema) => check(value, schema, root, &at, faults),
            None => faults.push(format!("{at}: not described")),
        }
    }
}

fn has_all(value: &Value, names: &Value) -> bool {
    let mut names = names.as_array().unwrap().iter();
    names.all(|name| value.get(name.as_str().unwrap()).is_some())
}

fn properties<'a>(schema: &'a Value, root: &'a Value) -> BTreeMap<&'a str, &'a Value> {
    let mut found = BTreeMap::new();
    for part in schema.get("allOf").and_then(Value::as_array).into_iter().flatten() {
        found.extend(properties(resolved(part, root), root));
    }
    let own = schema
        .get("properties")
        .and_then(Value::as_object)
        .into_iter()
        .flatten();
    found.extend(own.map(|(name, schema)| (name.as_str(), schema)));
    found
}

fn resolved<'a>(schema: &'a Value, root: &'a Value) -> &'a Value {
    match schema.get("$ref").and_then(Value::as_str) {
        Some(reference) => root.pointer(reference.strip_prefix('#').unwrap()).unwrap(),
        None => schema,
    }
}

fn is_of(value: &Value, kind: &str) -> bool {
    match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "number" => value.is_number(),
        "integer" => value.is_u64() || value.is_i64(),
        _ => panic!("the type {kind} is not checked"),
    }
}

#[test]
fn schema_finds_what_is_wrong_with_a_report() {
    let outline = serde_json::json!({"scenario": 7, "verdict": "maybe", "runs": [{"name": "seawall", "extra": 1}]});

    let faults = faults(&outline);

    for expected in [
        "/scenario: type",
        "/verdict: enum",
        "/runs/0/extra: not described",
        "/runs/0: required",
        ": required",
    ] {
        assert!(
            faults.iter().any(|fault| fault.starts_with(expected)),
            "{expected}: {faults:?}"
        );
    }
}
