//! `POST /devices/{id}/messages`: one message to one device, and how far it came.

use std::{sync::Arc, time::Duration};

use axum::{Extension, Json, extract::State, http::StatusCode};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use seawall_proto::id::DeviceId;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use tokio::{sync::oneshot, time::timeout};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Caller, Operator},
    call::Call,
    devices::offline_or_unknown,
    extract::{Body, Id},
    problem::{Code, Problem, ProblemBody},
};
use crate::sessions::{Delivery, Outgoing, OutgoingBody, PostError, Session};

/// Left of a request's time for its answer, where the acknowledgement does not come.
const ANSWER_RESERVE: Duration = Duration::from_millis(500);

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(send_message))
}

/// A message: one of the two.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MessageBody {
    /// Any JSON. A plain session gets a string as one text frame, anything else as its JSON text.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Value)]
    payload: Option<Box<RawValue>>,
    /// Bytes in base64, for plain sessions only: one binary frame.
    payload_base64: Option<String>,
}

/// `null` is a payload, too.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Box<RawValue>>, D::Error> {
    Box::<RawValue>::deserialize(deserializer).map(Some)
}

/// How far a message came.
#[derive(Debug, Serialize, ToSchema)]
pub struct Sent {
    /// The message's, as the device sees it.
    id: String,
    /// `acked`, or `sent`: no acknowledgement in 10 s (a setting), or a plain session, which has none.
    state: &'static str,
}

/// Send a message to a device
///
/// It is sent once; the gateway never sends it again.
#[utoipa::path(
    post, path = "/api/v1/devices/{id}/messages", tag = "devices", params(("id" = uuid::Uuid, Path)), request_body = MessageBody,
    responses(
        (status = 200, description = "The device acknowledged it", body = Sent),
        (status = 202, description = "On its way: not acknowledged in time, or a plain session", body = Sent),
        (status = 409, description = "`device_offline`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 429, description = "`mailbox_full`", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn send_message(
    _caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    Id(id): Id<DeviceId>,
    Extension(call): Extension<Arc<Call>>,
    Body(body): Body<MessageBody>,
) -> Result<(StatusCode, Json<Sent>), Problem> {
    let Some(session) = api.state.sessions.get(id) else {
        return Err(counted(&api, offline_or_unknown(&api, id).await));
    };
    let config = &api.state.config;
    let body = outgoing(body, &session, config.limits.message_bytes_max).map_err(|problem| counted(&api, problem))?;
    // Not `now_v7`, which asks the kernel for each.
    let message = uuid::Builder::from_unix_timestamp_millis(api.state.clock.wall().as_unix_ms(), &rand::random())
        .into_uuid()
        .to_string();
    let (done, delivery) = oneshot::channel();
    let posted = session.post(Outgoing {
        id: message.as_str().into(),
        body,
        done,
    });
    if let Err(error) = posted {
        let problem = match error {
            PostError::Offline => Problem::new(Code::DeviceOffline, "the device's session is ending"),
            PostError::MailboxFull => Problem::new(
                Code::MailboxFull,
                "messages to this device wait already: send it again when they are gone",
            ),
        };
        return Err(counted(&api, problem));
    }
    // The message is in the device's mailbox, which has a bound of its own.
    call.release_body();
    let patience = config
        .session
        .ack_timeout()
        .min(api.request_timeout().saturating_sub(ANSWER_RESERVE));
    let (status, state) = match timeout(patience, delivery).await {
        Ok(Ok(Delivery::Acked)) => (StatusCode::OK, "acked"),
        Ok(Ok(Delivery::Sent)) | Err(_) => (StatusCode::ACCEPTED, "sent"),
        Ok(Err(_)) => {
            let problem = Problem::new(
                Code::DeviceOffline,
                "the session ended before the device acknowledged the message: it may have arrived",
            );
            return Err(counted(&api, problem));
        }
    };
    api.state.metrics.messages_out.increment(state);
    Ok((status, Json(Sent { id: message, state })))
}

/// Counts a message that was not sent: each call has one outcome.
fn counted(api: &Api, problem: Problem) -> Problem {
    let outcome = if problem.code() == Code::DeviceOffline {
        "device_offline"
    } else if problem.code() == Code::MailboxFull {
        "mailbox_full"
    } else {
        "refused"
    };
    api.state.metrics.messages_out.increment(outcome);
    problem
}

fn outgoing(body: MessageBody, session: &Session, bytes_max: usize) -> Result<OutgoingBody, Problem> {
    let too_large = |len: usize| {
        (len > bytes_max).then(|| {
            Problem::new(
                Code::TooLarge,
                format!("the payload has {len} bytes, limits.message_bytes_max allows {bytes_max}"),
            )
        })
    };
    match (body.payload, body.payload_base64) {
        (Some(payload), None) => {
            let text: Box<str> = if session.info.speaks_v1 {
                payload.get().into()
            } else {
                serde_json::from_str::<String>(payload.get())
                    .map_or_else(|_| payload.get().into(), String::into_boxed_str)
            };
            too_large(text.len()).map_or(Ok(OutgoingBody::Json(text)), Err)
        }
        (None, Some(_)) if session.info.speaks_v1 => Err(Problem::invalid(
            "payload_base64: this device speaks seawall.v1, which has no binary messages",
        )),
        (None, Some(base64)) => {
            let bytes = STANDARD
                .decode(base64)
                .map_err(|_| Problem::invalid("payload_base64: not base64"))?;
            too_large(bytes.len()).map_or(Ok(OutgoingBody::Binary(bytes.into())), Err)
        }
        (Some(_), Some(_)) | (None, None) => Err(Problem::invalid("expected payload or payload_base64, one of them")),
    }
}
