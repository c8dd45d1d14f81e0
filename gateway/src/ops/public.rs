//! Paths that need no token: health, readiness, metrics, the OpenAPI document, and a list of all paths.

use std::{fmt::Write as _, sync::Arc};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderName, StatusCode, header},
    response::Html,
    routing::get,
};
use bytes::Bytes;

use super::Api;
use crate::{metrics::process, node::Readiness};

/// Media type of the Prometheus text format.
const METRICS_MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

pub fn routes(openapi_json: String) -> Router<Arc<Api>> {
    let index = Bytes::from(index(&openapi_json));
    let openapi_json = Bytes::from(openapi_json);
    Router::new()
        .route("/", get(async move || Html(index.clone())))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route(
            "/api/v1/openapi.json",
            get(async move || ([(header::CONTENT_TYPE, "application/json")], openapi_json.clone())),
        )
}

/// Answers 503 only if devices must go elsewhere. Never for overload, a plan alarm or a database that is lost later:
/// that would move the storm to other nodes.
async fn ready(State(api): State<Arc<Api>>) -> (StatusCode, Json<Readiness>) {
    let readiness = api.state.readiness();
    let status = if readiness.ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(readiness))
}

async fn metrics(State(api): State<Arc<Api>>) -> ([(HeaderName, &'static str); 1], String) {
    let mut text = api.state.metrics.render();
    text.push_str(&api.state.cohorts.render());
    text.push_str(&api.state.rules.hits().render());
    text.push_str(&process::render());
    ([(header::CONTENT_TYPE, METRICS_MEDIA_TYPE)], text)
}

/// A page without scripts that lists the calls of the OpenAPI document.
fn index(openapi_json: &str) -> String {
    let document: serde_json::Value = serde_json::from_str(openapi_json).unwrap_or_default();
    let mut rows = String::new();
    let paths = document["paths"].as_object().into_iter().flatten();
    for (path, item) in paths {
        for (method, operation) in item.as_object().into_iter().flatten() {
            let (method, summary) = (method.to_uppercase(), operation["summary"].as_str().unwrap_or_default());
            let written = writeln!(
                rows,
                "<tr><td>{method}<td><code>{}</code><td>{}",
                escape(path),
                escape(summary)
            );
            debug_assert!(written.is_ok(), "writing to a string does not fail");
        }
    }
    format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>Seawall</title>\n\
         <style>body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}\
         td{{padding:.15rem .8rem .15rem 0;vertical-align:top}}</style>\n\
         <h1>Seawall {}</h1>\n\
         <p>Without a token: <a href=\"/healthz\">/healthz</a>, <a href=\"/readyz\">/readyz</a>, \
         <a href=\"/metrics\">/metrics</a>, <a href=\"/api/v1/openapi.json\">/api/v1/openapi.json</a>.</p>\n\
         <p>With <code>Authorization: Bearer TOKEN</code>; the first token is in <code>admin.token</code> of the data directory, \
         and <code>seawall --help</code> uses it:</p>\n<table>\n{rows}</table>\n</html>\n",
        env!("CARGO_PKG_VERSION")
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
