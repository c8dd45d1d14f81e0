//! `/devices/{id}`: one device of the registry. The list is in [`super::device_list`].

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
    device_view::{Device, registry_unavailable, unless_unavailable},
    extract::{Body, Id, OptionalBody, Span, SpanDoc, nullable},
    presence::elsewhere,
    problem::{Code, Problem, ProblemBody},
    record_change,
};
use crate::{
    fleet::resume::HANDSHAKE_MAX,
    store::{Change, DeviceChange, DeviceRow, NewDevice, Rotation, StoreError},
    tasks::revoked_sessions::{end_revoked_session, handle_deleted},
    tokens::random_secret,
};

/// Maximum time for which an old secret stays valid.
const OVERLAP_MAX: Duration = Duration::from_hours(30 * 24);

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
        .routes(routes!(register_device))
        .routes(routes!(show_device, change_device, delete_device))
        .routes(routes!(rotate_secret))
        .routes(routes!(disconnect_device))
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
        Some(row) => {
            let mut device = Device::of(row.ok_or_else(no_such_device)?, &api.state);
            if let Some(newer) = elsewhere(&api.state, &[id]).await.remove(&id) {
                device.take(newer);
            }
            device
        }
        None => Device::remembered(id, &api.state).ok_or_else(registry_unavailable)?,
    };
    let attempts = api.state.history.record(id).map(|known| known.attempts);
    Ok(Json(DeviceWithAttempts {
        device,
        attempts: attempts
            .unwrap_or_default()
            .iter()
            .rev()
            .map(|attempt| Attempt {
                at: attempt.at.to_rfc3339(),
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
            state.lookups.forget(new.id);
            if let Ok(row) = &row {
                state.lookups.learn(new.id, &row.record.tenant);
                state.registered.ask();
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

/// Changes of a device. Fields that are not given stay as they are.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DevicePatch {
    /// `enabled`, `disabled` (for now: its session is closed with 4002) or `revoked` (closed with 4501: it does not
    /// reconnect).
    #[schema(value_type = Option<String>, pattern = "^(enabled|disabled|revoked)$")]
    state: Option<DeviceState>,
    /// 1 to 64 bytes of printable ASCII. A live session keeps its tenant.
    #[schema(value_type = Option<String>)]
    tenant: Option<Label>,
    /// 1 to 64 bytes of printable ASCII; null removes it.
    #[serde(default, deserialize_with = "nullable")]
    #[schema(value_type = Option<String>)]
    model: Option<Option<Label>>,
}

/// Disable, enable or revoke a device, or change its tenant or model
#[utoipa::path(
    patch, path = "/api/v1/devices/{id}", tag = "devices", params(("id" = uuid::Uuid, Path)), request_body = DevicePatch,
    responses(
        (status = 200, description = "The changed device", body = Device),
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
        return Err(Problem::invalid("give at least one of state, tenant and model"));
    }
    let audit = caller.audit(&api, "device.update");
    let store = api.state.store.clone();
    let change = async move { store.device_update(id, &change, &audit).await };
    let row = make_change(&api, id, |row| Some(row), change).await?;
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
    let deletion = async move { store.device_delete(id, &audit).await };
    make_change(&api, id, |()| None, deletion).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Options of a rotation.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RotationBody {
    /// Time for which the old secret stays valid: text such as `24h`, or seconds; at most 30 days. Default: it ends at
    /// once. Then a session that was authenticated with it is closed (4003). A session with a client certificate stays.
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
    /// The old secret stays valid until then; null if it ended at once. RFC 3339.
    previous_secret_until: Option<String>,
    /// Planned end of an earlier rotation's overlap, RFC 3339. This rotation ended it: the secret before the old one is
    /// not valid any more.
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
    let rotation = async move {
        let rotated = store.device_rotate(id, rotation, &audit).await?;
        Ok(rotated.map(|rotated| {
            if let Some(until) = rotated.ended_overlap {
                // Set once.
                let _ = ended.set(until);
            }
            rotated.row
        }))
    };
    let row = make_change(&api, id, |row| Some(row), rotation).await?;
    let previous_secret_until = row.record.previous_secret.map(|(_, until)| until.to_rfc3339());
    Ok((
        StatusCode::CREATED,
        Json(NewSecret {
            id,
            secret,
            previous_secret_until,
            ended_overlap_until: ended_overlap.get().map(|until| until.to_rfc3339()),
        }),
    ))
}

/// A session that is being closed.
#[derive(Debug, Serialize, ToSchema)]
pub struct Disconnected {
    #[schema(value_type = uuid::Uuid)]
    id: DeviceId,
    /// The session, as in its welcome frame.
    session: String,
}

/// Close a device's session with 4003; the device reconnects
#[utoipa::path(
    post, path = "/api/v1/devices/{id}/disconnect", tag = "devices", params(("id" = uuid::Uuid, Path)),
    responses(
        (status = 200, description = "The session is being closed", body = Disconnected),
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
        record_change(&state, &audit, Change::to(&id.to_string(), details)).await;
    })
    .await?;
    Ok(Json(Disconnected {
        id,
        session: session.id.to_string(),
    }))
}

/// The expected form of a device's id.
pub fn not_a_device(names: &IdentityNames) -> &'static str {
    match names.namespace {
        Some(_) => "id: expected a UUID, or 1 to 64 bytes of printable ASCII",
        None => "id: not a UUID; `identity.namespace` allows other ids",
    }
}

/// 404 for a device that is not registered, else 409. While the database is unavailable: 409.
pub async fn offline_or_unknown(api: &Api, id: DeviceId) -> Problem {
    match api.state.store.device(id).await {
        Ok(None) => no_such_device(),
        Ok(Some(_)) | Err(_) => Problem::new(Code::DeviceOffline, "the device has no session on this node"),
    }
}

/// 404 for a device that is not registered.
pub fn no_such_device() -> Problem {
    Problem::not_found("device")
}

/// Changes a device in the registry and lets the change take effect, whether or not the caller waits.
///
/// The device's absence and its resume tokens are forgotten. Its session ends if the device may not connect any more,
/// or not with the credential that it has shown. `row` returns the device as it is now; `None` if it was deleted.
async fn make_change<T: Send + 'static>(
    api: &Arc<Api>,
    id: DeviceId,
    row: fn(&T) -> Option<&DeviceRow>,
    statement: impl Future<Output = Result<Option<T>, StoreError>> + Send + 'static,
) -> Result<T, Problem> {
    let gateway = Arc::clone(&api.state);
    let changed = api
        .carry_out(async move {
            let changed = statement.await;
            gateway.lookups.forget(id);
            if !matches!(changed, Ok(None)) {
                gateway.resume.revoke(id).await;
            }
            if let Ok(Some(done)) = &changed {
                gateway.registered.ask();
                match row(done) {
                    Some(row) => {
                        gateway.lookups.learn(id, &row.record.tenant);
                        end_revoked_session(&gateway, id, &row.record);
                    }
                    None => handle_deleted(&gateway, id),
                }
            }
            changed
        })
        .await?;
    if changed.is_err() {
        // The change may have been made all the same. The caller does not wait for this.
        let gateway = Arc::clone(&api.state);
        api.spawn_background(async move {
            tokio::time::sleep(HANDSHAKE_MAX).await;
            if let Err(error) = gateway.store.revoke_tokens(id, gateway.clock.wall()).await {
                tracing::warn!(device.id = %id, %error, "resume tokens not revoked after a failed change: the device is looked up at each reconnect until another device is changed");
            }
        });
    }
    changed?.ok_or_else(no_such_device)
}
