//! `/devices`: the registry of devices, and what each does now. The list is in [`super::device_list`].

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{
    Json,
    extract::State,
    http::{HeaderName, StatusCode, header},
};
use rand::{SeedableRng as _, rngs::SmallRng};
use seawall_proto::{
    close::Close,
    hello::{IdentityNames, NamedDevice},
    id::{DeviceId, Label, SecretHash},
    record::DeviceState,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Admin, Caller, Operator, Viewer},
    extract::{Body, Id, OptionalBody, Span, SpanDoc, nullable},
    problem::{Code, Problem, ProblemBody},
    write_down,
};
use crate::{
    events::format_time,
    presence::{Presence, PresenceState},
    resume::{HANDSHAKE_MAX, end_unwanted_session},
    state::State as Gateway,
    store::{Change, DatabaseStatus, DeviceChange, DeviceRow, NewDevice, Rotation, StoreError},
    tokens::random_secret,
};

/// Longest time for which an old secret may stay valid.
const OVERLAP_MAX: Duration = Duration::from_hours(30 * 24);

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
        .routes(routes!(register_device))
        .routes(routes!(show_device, change_device, delete_device))
        .routes(routes!(rotate_secret))
        .routes(routes!(disconnect_device))
}

/// Where an answer about devices comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The registry, which is complete.
    Database,
    /// The memory of this node, because the database did not answer. It is not complete: it has the devices with a session on
    /// this node, and those that had one since its start.
    Memory,
}

/// A device, and what this node knows of its connection. `source` says where it comes from.
#[derive(Debug, Serialize, ToSchema)]
pub struct Device {
    #[schema(value_type = uuid::Uuid)]
    id: DeviceId,
    /// What the device is called, where that is not a UUID (`identity.namespace`).
    #[schema(value_type = Option<String>)]
    external_id: Option<Label>,
    /// From memory: the tenant of its last session on this node.
    #[schema(value_type = Option<String>)]
    tenant: Option<Label>,
    /// The registry's model. From memory: the model of its last session on this node.
    #[schema(value_type = Option<String>)]
    model: Option<Label>,
    /// The version that it connected with last.
    #[schema(value_type = Option<String>)]
    firmware: Option<Arc<str>>,
    /// `enabled`, `disabled` or `revoked`. Null from memory, which does not know it.
    state: Option<&'static str>,
    presence: Presence,
    /// RFC 3339. Null from memory.
    created_at: Option<String>,
    /// RFC 3339. Null from memory.
    updated_at: Option<String>,
    /// End of the validity of the secret before the last rotation, RFC 3339. Null if it has ended, and from memory.
    previous_secret_until: Option<String>,
    source: Source,
}

impl Device {
    pub fn of(row: DeviceRow, gateway: &Gateway) -> Self {
        let wall = gateway.clock.wall();
        let DeviceRow {
            record,
            external_id,
            created_at,
            updated_at,
        } = row;
        let session = gateway.sessions.get(record.id);
        // Registered by its UUID alone, the device itself says what it is called.
        let stated = session
            .as_ref()
            .and_then(|session| session.info.external_id.as_deref().cloned());
        let firmware = match session {
            Some(session) => session.info.cohort.firmware.clone(),
            None => gateway
                .history
                .record(record.id)
                .and_then(|known| known.identity)
                .and_then(|identity| identity.cohort.firmware.clone()),
        };
        Self {
            presence: Presence::of(record.id, &gateway.sessions, &gateway.history, &gateway.node, wall),
            id: record.id,
            external_id: external_id.or(stated),
            tenant: Some(record.tenant),
            model: record.model,
            firmware,
            state: Some(record.state.as_str()),
            created_at: Some(format_time(created_at)),
            updated_at: Some(format_time(updated_at)),
            previous_secret_until: record
                .previous_secret
                .map(|(_, until)| until)
                .filter(|until| wall < *until)
                .map(format_time),
            source: Source::Database,
        }
    }

    /// The device as this node remembers it, without the database. `None` if it has neither a session nor an attempt here.
    pub fn remembered(id: DeviceId, gateway: &Gateway) -> Option<Self> {
        let session = gateway.sessions.get(id);
        let record = gateway.history.record(id);
        if session.is_none() && record.is_none() {
            return None;
        }
        let last = record.and_then(|record| record.identity);
        let (tenant, cohort) = match &session {
            Some(session) => (Some(&session.info.tenant), Some(&session.info.cohort)),
            None => (
                last.as_ref().map(|last| &last.tenant),
                last.as_ref().map(|last| &last.cohort),
            ),
        };
        let label = |text: &str| Label::parse(text).ok().flatten();
        Some(Self {
            id,
            external_id: session
                .as_ref()
                .and_then(|session| session.info.external_id.as_deref().cloned()),
            tenant: tenant.and_then(|tenant| label(tenant)),
            model: cohort.and_then(|cohort| label(cohort.model.as_deref()?)),
            firmware: cohort.and_then(|cohort| cohort.firmware.clone()),
            state: None,
            presence: Presence::of(
                id,
                &gateway.sessions,
                &gateway.history,
                &gateway.node,
                gateway.clock.wall(),
            ),
            created_at: None,
            updated_at: None,
            previous_secret_until: None,
            source: Source::Memory,
        })
    }

    pub const fn tenant(&self) -> Option<&Label> {
        self.tenant.as_ref()
    }

    pub const fn model(&self) -> Option<&Label> {
        self.model.as_ref()
    }

    pub const fn presence(&self) -> PresenceState {
        self.presence.state
    }
}

/// Reads from the database, unless it is known to be unavailable.
///
/// # Errors
/// `Ok(None)` where the database does not answer; other errors are the caller's.
pub async fn unless_unavailable<T>(
    gateway: &Gateway,
    read: impl Future<Output = Result<T, Problem>>,
) -> Result<Option<T>, Problem> {
    if gateway.store.state().status == DatabaseStatus::Away {
        return Ok(None);
    }
    match read.await {
        Err(problem) if problem.code() == Code::DatabaseUnavailable => Ok(None),
        done => done.map(Some),
    }
}

/// 503 for what only the registry can say.
pub fn registry_unavailable() -> Problem {
    Problem::new(
        Code::DatabaseUnavailable,
        "the database does not answer, and this node does not remember what was asked for",
    )
}

/// A device with its last connection attempts.
#[derive(Debug, Serialize, ToSchema)]
pub struct DeviceWithAttempts {
    #[serde(flatten)]
    device: Device,
    /// The last 20 attempts on this node, newest first.
    attempts: Vec<Attempt>,
}

/// One attempt to connect.
#[derive(Debug, Serialize, ToSchema)]
pub struct Attempt {
    /// RFC 3339.
    at: String,
    /// `admitted`, `abandoned`, or the code of the refusal.
    outcome: &'static str,
}

/// One device, with its last 20 connection attempts; from this node's memory while the database does not answer
#[utoipa::path(
    get, path = "/api/v1/devices/{id}", tag = "devices", params(("id" = uuid::Uuid, Path)),
    responses(
        (status = 200, description = "The device", body = DeviceWithAttempts),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn show_device(
    _caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    Id(id): Id<DeviceId>,
) -> Result<Json<DeviceWithAttempts>, Problem> {
    let registered = async { Ok(api.state.store.device(id).await?) };
    let device = match unless_unavailable(&api.state, registered).await? {
        Some(row) => Device::of(row.ok_or_else(no_such_device)?, &api.state),
        None => Device::remembered(id, &api.state).ok_or_else(registry_unavailable)?,
    };
    let known = api.state.history.record(id).unwrap_or_default();
    Ok(Json(DeviceWithAttempts {
        device,
        attempts: known
            .attempts
            .iter()
            .rev()
            .map(|attempt| Attempt {
                at: format_time(attempt.at),
                outcome: attempt.outcome.as_str(),
            })
            .collect(),
    }))
}

/// A device to register.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewDeviceBody {
    /// A UUID, or with `identity.namespace` what the device is called. Not given: a random UUID.
    id: Option<String>,
    /// 1 to 64 bytes of printable ASCII. Default `default`.
    #[schema(value_type = Option<String>)]
    tenant: Option<Label>,
    /// 1 to 64 bytes of printable ASCII.
    #[schema(value_type = Option<String>)]
    model: Option<Label>,
}

/// A device with its secret.
#[derive(Serialize, ToSchema)]
pub struct RegisteredDevice {
    #[serde(flatten)]
    device: Device,
    /// Shown this once.
    secret: String,
}

/// Register a device; its secret is in this answer only
#[utoipa::path(
    post, path = "/api/v1/devices", tag = "devices", request_body = Option<NewDeviceBody>,
    responses(
        (status = 201, description = "Registered", body = RegisteredDevice),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn register_device(
    caller: Caller<Admin>,
    State(api): State<Arc<Api>>,
    OptionalBody(body): OptionalBody<NewDeviceBody>,
) -> Result<(StatusCode, [(HeaderName, String); 1], Json<RegisteredDevice>), Problem> {
    let secret = random_secret();
    let named = match &body.id {
        Some(text) => api
            .state
            .config
            .identity
            .device(text)
            .ok_or_else(|| Problem::invalid(not_a_device(&api.state.config.identity)))?,
        None => NamedDevice {
            id: DeviceId::from_uuid(uuid::Uuid::new_v4()),
            external_id: None,
        },
    };
    let new = NewDevice {
        id: named.id,
        external_id: named.external_id,
        tenant: body.tenant,
        model: body.model,
        secret: SecretHash::of(secret.as_bytes()),
    };
    let audit = caller.audit(&api, "device.create");
    let state = Arc::clone(&api.state);
    let row = api
        .carry_out(async move {
            let row = state.store.device_insert(&new, &audit).await;
            state.gate.forget(new.id);
            if let Ok(row) = &row {
                state.gate.learn(new.id, &row.record.tenant);
            }
            row
        })
        .await??;
    let location = format!("/api/v1/devices/{}", row.record.id);
    let device = Device::of(row, &api.state);
    Ok((
        StatusCode::CREATED,
        [(header::LOCATION, location)],
        Json(RegisteredDevice { device, secret }),
    ))
}

/// What to change of a device; what is not given stays.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DevicePatch {
    /// `enabled`, `disabled` (for now: its session is closed with 4002) or `revoked` (closed with 4501: it does not come back by itself).
    #[schema(value_type = Option<String>, pattern = "^(enabled|disabled|revoked)$")]
    state: Option<DeviceState>,
    /// 1 to 64 bytes of printable ASCII. A live session keeps the one it came with.
    #[schema(value_type = Option<String>)]
    tenant: Option<Label>,
    /// 1 to 64 bytes of printable ASCII; null takes it away.
    #[serde(default, deserialize_with = "nullable")]
    #[schema(value_type = Option<String>)]
    model: Option<Option<Label>>,
}

/// Disable, enable or revoke a device, or change its tenant or model
#[utoipa::path(
    patch, path = "/api/v1/devices/{id}", tag = "devices", params(("id" = uuid::Uuid, Path)), request_body = DevicePatch,
    responses(
        (status = 200, description = "As it is now", body = Device),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn change_device(
    caller: Caller<Admin>,
    State(api): State<Arc<Api>>,
    Id(id): Id<DeviceId>,
    Body(patch): Body<DevicePatch>,
) -> Result<Json<Device>, Problem> {
    let change = DeviceChange {
        state: patch.state,
        tenant: patch.tenant,
        model: patch.model,
    };
    if change == DeviceChange::default() {
        return Err(Problem::invalid("name what should change: state, tenant or model"));
    }
    let audit = caller.audit(&api, "device.update");
    let store = api.state.store.clone();
    let row = carry_out(&api, id, Leaves::Row, async move {
        store.device_update(id, &change, &audit).await
    })
    .await?;
    Ok(Json(Device::of(row, &api.state)))
}

/// Remove a device from the registry; its session is closed with 4501
#[utoipa::path(
    delete, path = "/api/v1/devices/{id}", tag = "devices", params(("id" = uuid::Uuid, Path)),
    responses(
        (status = 204, description = "Removed"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn delete_device(
    caller: Caller<Admin>,
    State(api): State<Arc<Api>>,
    Id(id): Id<DeviceId>,
) -> Result<StatusCode, Problem> {
    let audit = caller.audit(&api, "device.delete");
    let store = api.state.store.clone();
    carry_out(&api, id, Leaves::Nothing, async move {
        store.device_delete(id, &audit).await
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// How to rotate.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RotationBody {
    /// How long the old secret stays valid: text such as `24h`, or seconds; at most 30 days. Default: it ends at once, and so does the
    /// device's session (4003).
    #[schema(value_type = Option<SpanDoc>)]
    overlap: Option<Span>,
}

/// A new secret.
#[derive(Serialize, ToSchema)]
pub struct NewSecret {
    #[schema(value_type = uuid::Uuid)]
    id: DeviceId,
    /// Shown this once.
    secret: String,
    /// Until then the old secret is valid, too; null where it ended at once. RFC 3339.
    previous_secret_until: Option<String>,
    /// End of an earlier rotation's overlap that was still running, RFC 3339. The secret before the old one ended now instead.
    ended_overlap_until: Option<String>,
}

/// Give a device a new secret; the old one stays valid for `overlap`
#[utoipa::path(
    post, path = "/api/v1/devices/{id}/secret", tag = "devices", params(("id" = uuid::Uuid, Path)), request_body = Option<RotationBody>,
    responses(
        (status = 201, description = "The new secret", body = NewSecret),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn rotate_secret(
    caller: Caller<Admin>,
    State(api): State<Arc<Api>>,
    Id(id): Id<DeviceId>,
    OptionalBody(body): OptionalBody<RotationBody>,
) -> Result<(StatusCode, Json<NewSecret>), Problem> {
    let overlap = body.overlap.map_or(Duration::ZERO, |span| span.0);
    if overlap > OVERLAP_MAX {
        return Err(Problem::invalid("overlap: at most 30 days"));
    }
    let secret = random_secret();
    let rotation = Rotation {
        secret: SecretHash::of(secret.as_bytes()),
        overlap,
    };
    let audit = caller.audit(&api, "device.rotate");
    let store = api.state.store.clone();
    let ended_overlap = Arc::new(OnceLock::new());
    let ended = Arc::clone(&ended_overlap);
    let row = carry_out(&api, id, Leaves::Row, async move {
        let rotated = store.device_rotate(id, rotation, &audit).await?;
        Ok(rotated.map(|rotated| {
            if let Some(until) = rotated.ended_overlap {
                // Set once.
                let _ = ended.set(until);
            }
            rotated.row
        }))
    })
    .await?;
    let previous_secret_until = row.record.previous_secret.map(|(_, until)| format_time(until));
    Ok((
        StatusCode::CREATED,
        Json(NewSecret {
            id,
            secret,
            previous_secret_until,
            ended_overlap_until: ended_overlap.get().map(|until| format_time(*until)),
        }),
    ))
}

/// A session that was told to close.
#[derive(Debug, Serialize, ToSchema)]
pub struct Disconnected {
    #[schema(value_type = uuid::Uuid)]
    id: DeviceId,
    /// The session, as in its welcome frame.
    session: String,
}

/// Close a device's session with 4003; the device comes back
#[utoipa::path(
    post, path = "/api/v1/devices/{id}/disconnect", tag = "devices", params(("id" = uuid::Uuid, Path)),
    responses(
        (status = 200, description = "Told to close", body = Disconnected),
        (status = "default", description = "An error; `device_offline` where there is no session", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn disconnect_device(
    caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    Id(id): Id<DeviceId>,
) -> Result<Json<Disconnected>, Problem> {
    let Some(session) = api.state.sessions.get(id) else {
        return Err(offline_or_unknown(&api, id).await);
    };
    let audit = caller.audit(&api, "device.disconnect");
    let state = Arc::clone(&api.state);
    let closed = Arc::clone(&session);
    api.carry_out(async move {
        closed.close(Close::disconnected(&mut SmallRng::from_os_rng()));
        let details = serde_json::json!({ "session": closed.id.to_string() });
        write_down(&state, &audit, Change::to(&id.to_string(), details)).await;
    })
    .await?;
    Ok(Json(Disconnected {
        id,
        session: session.id.to_string(),
    }))
}

/// What an id has to be.
pub fn not_a_device(names: &IdentityNames) -> &'static str {
    match names.namespace {
        Some(_) => "id: expected a UUID, or 1 to 64 bytes of printable ASCII",
        None => "id: not a UUID; `identity.namespace` allows other ids",
    }
}

/// 404 for a device that is not registered, else 409. While the registry can't be asked, offline is all that is known.
pub async fn offline_or_unknown(api: &Api, id: DeviceId) -> Problem {
    match api.state.store.device(id).await {
        Ok(None) => no_such_device(),
        Ok(Some(_)) | Err(_) => Problem::new(Code::DeviceOffline, "the device has no session on this node"),
    }
}

fn no_such_device() -> Problem {
    Problem::not_found("device")
}

/// What a change leaves in the registry.
#[derive(Clone, Copy)]
enum Leaves {
    Row,
    Nothing,
}

/// Makes a change to the end, whether or not the caller waits, and lets it take effect: what was remembered of the device's absence no longer
/// counts, nor do its resume tokens, and its session ends where the registry does not want it any more.
async fn carry_out(
    api: &Arc<Api>,
    id: DeviceId,
    leaves: Leaves,
    change: impl Future<Output = Result<Option<DeviceRow>, StoreError>> + Send + 'static,
) -> Result<DeviceRow, Problem> {
    let gateway = Arc::clone(&api.state);
    let changed = api
        .carry_out(async move {
            let changed = change.await;
            gateway.gate.forget(id);
            if !matches!(changed, Ok(None)) {
                gateway.resume.revoke(id).await;
            }
            if let Ok(Some(row)) = &changed {
                let record = match leaves {
                    Leaves::Row => {
                        gateway.gate.learn(id, &row.record.tenant);
                        Some(&row.record)
                    }
                    Leaves::Nothing => {
                        if let Some(session) = gateway.sessions.get(id) {
                            // Its end would be remembered, otherwise.
                            session.mark_deleted();
                        }
                        gateway.history.forget(id);
                        None
                    }
                };
                end_unwanted_session(&gateway, id, record);
            }
            changed
        })
        .await?;
    if changed.is_err() {
        // The error may leave open what was done. Not waited for.
        let gateway = Arc::clone(&api.state);
        api.in_background(async move {
            tokio::time::sleep(HANDSHAKE_MAX).await;
            if let Err(error) = gateway.store.revoke_tokens(id, gateway.clock.wall()).await {
                tracing::warn!(device.id = %id, %error, "a device whose change failed is looked up at each return, until another device is changed");
            }
        });
    }
    changed?.ok_or_else(no_such_device)
}
