//! `PUT /node/log-level`: what this gateway logs from now on.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Caller, Operator},
    extract::Body,
    node::SUBJECT,
    problem::{Code, Problem, ProblemBody},
    record_change,
};
use crate::{
    runtime::telemetry::{self, LevelError},
    store::Change,
};

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(set_log_level))
}

/// A log level.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LogLevelBody {
    /// As the setting `logging.level`: `off`, `error`, `warn`, `info`, `debug`, `trace`, or directives such as
    /// `info,seawall_gateway::lookup=debug`.
    level: String,
}

/// The current and the previous log level.
#[derive(Debug, Serialize, ToSchema)]
pub struct LogLevel {
    level: String,
    /// The previous level.
    before: String,
}

/// Change the log level until the next change, SIGHUP or restart
#[utoipa::path(
    put, path = "/api/v1/node/log-level", tag = "nodes", request_body = LogLevelBody,
    responses(
        (status = 200, description = "In force", body = LogLevel),
        (status = 409, description = "The process has no log of the gateway's", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn set_log_level(
    caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    Body(body): Body<LogLevelBody>,
) -> Result<Json<LogLevel>, Problem> {
    let audit = caller.audit(&api, "node.log_level");
    let gateway = Arc::clone(&api.state);
    let change = api
        .carry_out(async move {
            let change = telemetry::set_level(&body.level)?;
            if change.is_change() {
                let written = Change {
                    before: Some(serde_json::json!({ "level": change.from })),
                    ..Change::to(SUBJECT, serde_json::json!({ "level": change.to }))
                };
                record_change(&gateway, &audit, written).await;
            }
            Ok(change)
        })
        .await?
        .map_err(|error: LevelError| match error {
            LevelError::Invalid(error) => Problem::invalid(format!("level: {error}")),
            LevelError::NoLog => Problem::new(Code::Conflict, error.to_string()),
        })?;
    Ok(Json(LogLevel {
        level: change.to,
        before: change.from,
    }))
}
