//! `POST /devices/{id}/messages`: one message to one device, and whether it was delivered.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use axum::{Extension, Json, extract::State, http::StatusCode};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use seawall_proto::{id::DeviceId, time::Instant};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use tokio::{sync::oneshot, time::timeout};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Caller, Operator},
    call::{self, Call},
    devices::offline_or_unknown,
    extract::{Body, Id},
    problem::{Code, Problem, ProblemBody},
    record_change,
};
use crate::{
    session::sessions::{Delivery, Outgoing, OutgoingBody, PostError, Session},
    store::{Audit, Change},
};

/// Time that is left for the answer if the acknowledgement does not arrive.
const ANSWER_RESERVE: Duration = Duration::from_millis(500);

/// Minimum mean time between two messages that the audit log records: a backend may send thousands per second.
const RECORD_INTERVAL: Duration = Duration::from_millis(100);
/// Burst of messages that the audit log records.
const RECORD_BURST: u32 = 20;

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

/// `null` is a payload as well.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Box<RawValue>>, D::Error> {
    Box::<RawValue>::deserialize(deserializer).map(Some)
}

/// Delivery of a message.
#[derive(Debug, Serialize, ToSchema)]
pub struct Sent {
    /// Id of the message, as the device sees it.
    id: String,
    /// `acked`; or `sent`: not acknowledged within 10 s (a setting), or to a plain session, which does not acknowledge.
    state: &'static str,
}

/// Send a message to a device
///
/// The gateway sends it once, and never repeats it.
#[utoipa::path(
    post, path = "/api/v1/devices/{id}/messages", tag = "devices", params(("id" = uuid::Uuid, Path)), request_body = MessageBody,
    responses(
        (status = 200, description = "The device acknowledged it", body = Sent),
        (status = 202, description = "Sent, and not acknowledged in time; or sent to a plain session", body = Sent),
        (status = 409, description = "`device_offline`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 429, description = "`mailbox_full`", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn send_message(
    caller: Caller<Operator>,
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
    let audit = caller.audit(&api, "device.message");
    let details = serde_json::json!({
        "session": session.id.to_string(),
        "message": message,
        "kind": body.kind(),
        "bytes": body.len(),
    });
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
                "too many messages wait for this device: try again later",
            ),
        };
        return Err(counted(&api, problem));
    }
    record(&api, audit, id, details);
    // The message is in the device's mailbox, which has its own bound.
    call.release_body();
    let wait_max = config
        .session
        .ack_timeout()
        .min(api.request_timeout().saturating_sub(ANSWER_RESERVE));
    let (status, state) = match timeout(wait_max, delivery).await {
        Ok(Ok(Delivery::Acked)) => (StatusCode::OK, "acked"),
        Ok(Ok(Delivery::Sent)) | Err(_) => (StatusCode::ACCEPTED, "sent"),
        Ok(Err(_)) => {
            let problem = Problem::new(
                Code::DeviceOffline,
                "the session ended before an acknowledgement: whether the message arrived is not known",
            );
            return Err(counted(&api, problem));
        }
    };
    api.state.metrics.messages_out.increment(state);
    Ok((status, Json(Sent { id: message, state })))
}

/// Records the message in the audit log, unless too many were recorded recently. The sender does not wait for it.
fn record(api: &Arc<Api>, audit: Audit, device: DeviceId, mut details: serde_json::Value) {
    let now = api.state.clock.now();
    let taken = api
        .message_records
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take(now);
    let Some(unrecorded) = taken else {
        api.state.metrics.audit_records.increment("unrecorded");
        return;
    };
    if unrecorded > 0 {
        details["unrecorded_before"] = unrecorded.into();
    }
    let gateway = Arc::clone(&api.state);
    let work = async move { record_change(&gateway, &audit, Change::to(&device.to_string(), details)).await };
    api.tasks.spawn(call::on_behalf_of(call::current(), work));
}

/// Limit on messages in the audit log: a burst of [`RECORD_BURST`], then one per [`RECORD_INTERVAL`].
#[derive(Debug)]
pub struct MessageRecords {
    /// When the whole burst is available again.
    settled_at: Instant,
    /// Unrecorded messages since the last record.
    unrecorded: u64,
}

impl MessageRecords {
    pub const fn new(now: Instant) -> Self {
        Self {
            settled_at: now,
            unrecorded: 0,
        }
    }

    /// If this message is to be recorded, returns the number of unrecorded ones since the last record.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let settled_at = self.settled_at.max(now);
        if settled_at.saturating_since(now) > RECORD_INTERVAL * (RECORD_BURST - 1) {
            self.unrecorded += 1;
            return None;
        }
        self.settled_at = settled_at + RECORD_INTERVAL;
        Some(std::mem::take(&mut self.unrecorded))
    }
}

/// Counts a message that was not sent. Each call has one outcome.
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
            "payload_base64: this device uses seawall.v1, which has no binary messages",
        )),
        (None, Some(base64)) => {
            let bytes = STANDARD
                .decode(base64)
                .map_err(|_| Problem::invalid("payload_base64: not base64"))?;
            too_large(bytes.len()).map_or(Ok(OutgoingBody::Binary(bytes.into())), Err)
        }
        (Some(_), Some(_)) | (None, None) => Err(Problem::invalid("expected either payload or payload_base64")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_messages_are_bounded_and_say_how_many_have_none() {
        let at = |ms| Instant::ZERO + Duration::from_millis(ms);
        let mut records = MessageRecords::new(at(0));

        let taken: Vec<_> = (0..1_000).filter_map(|_| records.take(at(0))).collect();

        assert_eq!(taken, [0; RECORD_BURST as usize]);
        assert_eq!(records.take(at(99)), None);
        assert_eq!(records.take(at(100)), Some(981));
        assert_eq!(records.take(at(100)), None);
        assert_eq!(records.take(at(200)), Some(1));
        let later = (201..10_000).filter(|ms| records.take(at(*ms)).is_some());
        assert_eq!(later.count(), 97, "one each interval");
    }
}
