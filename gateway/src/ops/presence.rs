//! `GET /presence` and `GET /devices/{id}/history`: counts of devices by presence, and what changed for one of them.

use std::{collections::BTreeMap, sync::Arc};

use axum::{Json, extract::State};
use seawall_proto::{
    epoch::node_of,
    id::DeviceId,
    presence::{
        Known,
        gone::{Sign, doubt, fate},
    },
    time::WallTime,
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Caller, Viewer},
    device_view::{Source, registry_unavailable, unless_unavailable},
    extract::{Id, Params, page_limit},
    problem::{Problem, ProblemBody},
};
use crate::{
    fleet::history::{groups::By, queue::Transition},
    node::State as Gateway,
    session::presence::Presence,
    store::{EvidenceText, PresenceState, Reason, StoredPresence, cause_of},
    tasks::presence_returns::is_alone,
};

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
        .routes(routes!(count_presence))
        .routes(routes!(list_history))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct CountParams {
    /// What the counts are of. Default `tenant`.
    #[serde(default)]
    #[param(inline)]
    by: CountBy,
}

/// Key of counts.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum CountBy {
    #[default]
    Tenant,
    /// The model of the last session.
    Model,
    /// The firmware version of the last session.
    Firmware,
}

/// Devices by presence.
#[derive(Debug, Serialize, ToSchema)]
pub struct PresenceCounts {
    /// When this was counted, RFC 3339.
    as_of: String,
    /// How far this node lags behind what its sockets hold, in milliseconds.
    observer_lag_ms: u64,
    items: Vec<PresenceCount>,
}

/// Devices of one tenant, model or firmware version that had a session on this node.
#[derive(Debug, Serialize, ToSchema)]
pub struct PresenceCount {
    /// Null for devices that name none.
    #[schema(value_type = Option<String>)]
    key: Option<Arc<str>>,
    online: u64,
    offline: u64,
    unknown: u64,
}

/// How many devices are online, offline and unknown: those that had a session on this node, counted in its memory
#[utoipa::path(
    get, path = "/api/v1/presence", tag = "devices", params(CountParams),
    responses(
        (status = 200, description = "Counts, in the order of keys", body = PresenceCounts),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn count_presence(
    _caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    Params(params): Params<CountParams>,
) -> Json<PresenceCounts> {
    let by = match params.by {
        CountBy::Tenant => By::Tenant,
        CountBy::Model => By::Model,
        CountBy::Firmware => By::Firmware,
    };
    let counts = api.state.history.groups().by(by);
    let items = counts.into_iter().map(|(key, counts)| PresenceCount {
        key,
        online: counts.online,
        offline: counts.offline,
        unknown: counts.unknown,
    });
    Json(PresenceCounts {
        as_of: api.state.clock.wall().to_rfc3339(),
        observer_lag_ms: api.state.observer_lag_ms(),
        items: items.collect(),
    })
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct HistoryParams {
    /// Maximum number of items: 1 to 1,000. Default 100.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

/// Changes of a device's presence.
#[derive(Debug, Serialize, ToSchema)]
pub struct DeviceHistory {
    #[schema(value_type = uuid::Uuid)]
    device: DeviceId,
    /// When this was read, RFC 3339.
    as_of: String,
    /// `memory`: the database did not answer. These are the newest state, and what waits to be written.
    source: Source,
    /// Newest first.
    items: Vec<PresenceChange>,
}

/// A change of a device's presence.
#[derive(Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct PresenceChange {
    state: PresenceState,
    /// RFC 3339.
    at: String,
    /// The session that it is about, as in its welcome frame; greater if the clock of the session's node was behind that
    /// of another one. Of two changes the one with the greater epoch is the newer.
    epoch: String,
    /// As in a device's `presence`.
    reason: &'static str,
    /// Why it was unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    cause: Option<&'static str>,
    /// What proved that it was offline.
    #[serde(skip_serializing_if = "Option::is_none")]
    evidence: Option<EvidenceText>,
}

impl PresenceChange {
    fn of(known: Known, at: WallTime, reason: Reason) -> Self {
        Self {
            state: PresenceState::of(known.presence),
            at: at.to_rfc3339(),
            epoch: known.epoch.to_string(),
            reason: reason.as_str(),
            cause: cause_of(known.presence),
            evidence: EvidenceText::of(known.presence),
        }
    }
}

/// Changes of a device's presence, newest first, for as long as `presence.history_seconds` keeps them
#[utoipa::path(
    get, path = "/api/v1/devices/{id}/history", tag = "devices", params(("id" = uuid::Uuid, Path), HistoryParams),
    responses(
        (status = 200, description = "The changes; none if no node has seen the device", body = DeviceHistory),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn list_history(
    _caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    Id(device): Id<DeviceId>,
    Params(params): Params<HistoryParams>,
) -> Result<Json<DeviceHistory>, Problem> {
    let limit = page_limit(params.limit)?;
    // Read first: what is written meanwhile is in both.
    let waiting = waiting(&api.state, device);
    let stored = async { Ok(api.state.store.presence_history(device, limit).await?) };
    let (mut items, source) = match unless_unavailable(&api.state, stored).await? {
        Some(stored) => {
            let stored = stored
                .iter()
                .map(|stored| PresenceChange::of(stored.known, stored.known.since, stored.reason));
            let stored: Vec<PresenceChange> = stored.collect();
            let mut items: Vec<PresenceChange> = waiting.into_iter().filter(|item| !stored.contains(item)).collect();
            items.extend(stored);
            (items, Source::Database)
        }
        None if waiting.is_empty() => {
            let record = api.state.history.record(device).filter(|record| record.group.is_some());
            let record = record.ok_or_else(registry_unavailable)?;
            let newest = PresenceChange::of(record.known, record.known.since, record.reason);
            (vec![newest], Source::Memory)
        }
        None => (waiting, Source::Memory),
    };
    items.truncate(limit as usize);
    Ok(Json(DeviceHistory {
        device,
        as_of: api.state.clock.wall().to_rfc3339(),
        source,
        items,
    }))
}

/// What the database has of devices, where this node knows less: those without a socket here that another node has
/// seen, or that this node does not remember. None if the database does not answer.
pub async fn elsewhere(gateway: &Gateway, devices: &[DeviceId]) -> BTreeMap<DeviceId, Presence> {
    let is_alone = is_alone(gateway);
    let is_held = |device: DeviceId| gateway.sessions.get(device).is_some();
    let is_known_best = |device: DeviceId| is_held(device) || (is_alone && gateway.history.group(device).is_some());
    let asked = devices.iter().copied().filter(|device| !is_known_best(*device));
    let asked: Vec<DeviceId> = asked.collect();
    if asked.is_empty() {
        return BTreeMap::new();
    }
    let Ok(stored) = gateway.store.presence_among(&asked).await else {
        return BTreeMap::new();
    };
    let Ok(nodes) = gateway.store.presence_nodes().await else {
        return BTreeMap::new();
    };
    let signs: Vec<Sign> = nodes.iter().map(|node| node.sign).collect();
    let now = gateway.clock.wall();
    let newer = stored.into_iter().filter(|stored| {
        let (epoch, known) = (stored.known.epoch, gateway.history.epoch(stored.device));
        let is_own = node_of(epoch) == gateway.boot.node;
        let is_known = known > epoch || (known == epoch && is_own);
        let is_remembered = is_known && gateway.history.group(stored.device).is_some();
        !is_held(stored.device) && !is_remembered
    });
    let presence = |stored: StoredPresence| {
        let epoch = stored.known.epoch;
        let holder = nodes.iter().find(|node| node.has(epoch));
        let cause = if is_alone {
            fate(epoch, gateway.boot, &signs, true)
        } else {
            doubt(epoch, &signs)
        };
        // Nothing is known of it since.
        let written = holder.filter(|node| node.sign.written.is_some());
        let as_of = written.map_or(now, |node| now - node.age);
        let lost = cause.and_then(|cause| Some((stored.known.left_behind(cause, as_of)?, cause.into())));
        let (known, reason) = lost.unwrap_or((stored.known, stored.reason));
        let node = holder.map_or("", |node| node.node.as_str());
        (stored.device, Presence::known(known, reason, node, as_of))
    };
    newer.map(presence).collect()
}

/// Changes that are not written yet, newest first.
fn waiting(gateway: &Gateway, device: DeviceId) -> Vec<PresenceChange> {
    let transitions = gateway.history.queue().of(device).into_iter().rev();
    let change = |transition: Transition| PresenceChange::of(transition.known, transition.at, transition.reason);
    transitions.map(change).collect()
}
