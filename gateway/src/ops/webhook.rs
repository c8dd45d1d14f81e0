//! `POST /webhook/test`: a message to the webhook, to see whether it arrives.

use std::{sync::Arc, time::Instant};

use axum::{Json, extract::State};
use serde::Serialize;
use serde_json::json;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Caller, Operator},
    problem::{Code, Problem, ProblemBody},
};

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(test_webhook))
}

/// The outcome of a test message.
#[derive(Debug, Serialize, ToSchema)]
pub struct WebhookTest {
    /// The header `webhook-id` of the message.
    id: String,
    /// Scheme, host and port of the webhook.
    receiver: String,
    /// Whether the receiver answered 2xx.
    delivered: bool,
    /// HTTP status of the answer; null if there was none.
    status: Option<u16>,
    /// Why there was no answer.
    problem: Option<String>,
    duration_ms: u64,
}

/// Send a test message to the webhook, once
#[utoipa::path(
    post, path = "/api/v1/webhook/test", tag = "nodes",
    responses(
        (status = 200, description = "What the receiver answered", body = WebhookTest),
        (status = 409, description = "No webhook is configured", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn test_webhook(_caller: Caller<Operator>, State(api): State<Arc<Api>>) -> Result<Json<WebhookTest>, Problem> {
    let gateway = Arc::clone(&api.state);
    let Some(receiver) = gateway.webhook.receiver().cloned() else {
        return Err(Problem::new(
            Code::Conflict,
            "no webhook is configured: give webhook.url and webhook.secret_file",
        ));
    };
    let origin = receiver.origin();
    let wall = gateway.clock.wall();
    let message = gateway.webhook.message("webhook.test", wall, json!({}));
    let (id, begun) = (message.id.to_string(), Instant::now());
    let posting = tokio::task::spawn_blocking(move || receiver.post(&message, wall));
    let posted = posting.await.map_err(|error| {
        tracing::error!(%error, "a test of the webhook panicked");
        api.state.panics.count("a call of the API");
        Problem::new(Code::Internal, "the gateway failed: see its log")
    })?;
    Ok(Json(WebhookTest {
        id,
        receiver: origin,
        delivered: posted.answer == seawall_proto::webhook::Answer::Accepted,
        status: posted.status,
        problem: posted.problem,
        duration_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
    }))
}
