//! The OpenAPI document and its copy in docs/.

use std::{fs, path::Path};

use serde_json::Value;

#[test]
fn docs_openapi_json_is_what_the_code_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    let current = seawall_gateway::ops::openapi_json();
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&path, &current).unwrap();
    }

    let kept = fs::read_to_string(&path).unwrap_or_default();

    assert!(
        kept == current,
        "docs/openapi.json is out of date: UPDATE=1 cargo test -p seawall-gateway --test integration docs_openapi"
    );
}

#[test]
fn every_reference_in_the_document_leads_somewhere_and_every_call_is_described() {
    let document: Value = serde_json::from_str(&seawall_gateway::ops::openapi_json()).unwrap();
    let mut open = vec![&document];
    while let Some(json) = open.pop() {
        match json {
            Value::Object(map) => {
                if let Some(reference) = map.get("$ref").and_then(Value::as_str) {
                    let pointer = reference.trim_start_matches('#');
                    assert!(document.pointer(pointer).is_some(), "{reference}");
                }
                open.extend(map.values());
            }
            Value::Array(items) => open.extend(items),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    let mut ids = std::collections::BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, call) in item.as_object().unwrap() {
            assert!(call["summary"].is_string(), "{method} {path}");
            let id = call["operationId"].as_str().unwrap();
            assert!(ids.insert(id.to_owned()), "{id} twice");
            assert!(call["responses"]["default"].is_object(), "{method} {path}");
        }
    }
}
