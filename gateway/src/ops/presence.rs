//! `GET /presence` and `GET /devices/{id}/history`: counts of devices by presence, and what changed for one of them.

use std::{collections::BTreeMap, fmt, str::FromStr, sync::Arc};

use axum::{Json, extract::State};
use seawall_proto::{
    epoch::node_of,
    id::{DeviceId, SessionId},
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
    devices::no_such_device,
    extract::{Id, Params, page_cursor, page_limit},
    problem::{Problem, ProblemBody},
};
use crate::{
    fleet::history::{
        Record,
        groups::{By, Registered},
        queue::Transition,
    },
    node::State as Gateway,
    session::presence::Presence,
    store::{EvidenceText, PresenceState, Reason, StoredPresence, cause_of},
    tasks::presence_returns::{is_alone, leave},
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
    /// The registry's tenant.
    #[default]
    Tenant,
    /// The registry's model, whatever the device claims.
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

/// Devices of one tenant, model or firmware version.
#[derive(Debug, Serialize, ToSchema)]
pub struct PresenceCount {
    /// Null for devices without one. No firmware version is known of a device that was never seen.
    #[schema(value_type = Option<String>)]
    key: Option<Arc<str>>,
    online: u64,
    offline: u64,
    /// Those that were never seen are among them.
    unknown: u64,
}

/// How many devices are online, offline and unknown, counted in memory
///
/// These are the devices whose last session was on this node, and registered devices that no node has seen. Tenant,
/// model and firmware mean the same as in the filters of `GET /devices`. The registry is counted again within a second
/// of a change through this node, and every minute.
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
    let counted = api.state.registered.get();
    let registered = if is_alone(&api.state) {
        Registered::All(&counted)
    } else {
        Registered::NeverSeen(&counted)
    };
    let counts = api.state.history.groups().by_with(by, &registered);
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
    /// `next_cursor` of the previous page. Default: the newest changes.
    cursor: Option<String>,
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
    /// The `cursor` of the next page; null on the last page.
    next_cursor: Option<String>,
}

/// A change of a device's presence.
#[derive(Debug, Serialize, ToSchema)]
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

/// Place of a change in the history of its device: epoch and number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place(SessionId, u64);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(epoch, number) = self;
        write!(f, "{epoch}-{number}")
    }
}

/// The text is not a place.
struct NotAPlace;

impl FromStr for Place {
    type Err = NotAPlace;

    fn from_str(text: &str) -> Result<Self, NotAPlace> {
        let (epoch, number) = text.split_once('-').ok_or(NotAPlace)?;
        let epoch = u64::from_str_radix(epoch, 16).map_err(|_| NotAPlace)?;
        Ok(Self(SessionId(epoch), number.parse().map_err(|_| NotAPlace)?))
    }
}

/// Changes of a device's presence, newest first, for as long as `presence.history_seconds` keeps them
#[utoipa::path(
    get, path = "/api/v1/devices/{id}/history", tag = "devices", params(("id" = uuid::Uuid, Path), HistoryParams),
    responses(
        (status = 200, description = "A page; empty if no node has seen the device", body = DeviceHistory),
        (status = 404, description = "The device is not registered", body = ProblemBody, content_type = "application/problem+json"),
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
    let from: Option<Place> = page_cursor(params.cursor.as_deref())?;
    let gateway = &api.state;
    // Read first: what is written meanwhile is in both.
    let mut changes = waiting(gateway, device);
    changes.retain(|place, _| from.is_none_or(|from| *place <= from));
    let stored = async {
        if gateway.store.present_among(&[device]).await?.is_empty() {
            return Err(no_such_device());
        }
        let from = from.map(|Place(epoch, number)| (epoch, number));
        Ok(gateway.store.presence_history(device, from, limit + 1).await?)
    };
    let source = match unless_unavailable(gateway, stored).await? {
        Some(stored) => {
            for stored in stored {
                let (known, place) = (stored.known, Place(stored.known.epoch, stored.number));
                changes.insert(place, PresenceChange::of(known, known.since, stored.reason));
            }
            Source::Database
        }
        None => {
            if changes.is_empty() {
                let record = gateway.history.record(device);
                let newest = record.filter(|record| record.group.is_some() && from.is_none());
                let Record { known, reason, .. } = newest.ok_or_else(registry_unavailable)?;
                let newest = PresenceChange::of(known, known.since, reason);
                changes.insert(Place(known.epoch, 0), newest);
            }
            Source::Memory
        }
    };
    let mut changes = changes.into_iter().rev();
    let items = changes
        .by_ref()
        .take(limit as usize)
        .map(|(_, change)| change)
        .collect();
    Ok(Json(DeviceHistory {
        device,
        as_of: gateway.clock.wall().to_rfc3339(),
        source,
        items,
        next_cursor: changes.next().map(|(place, _)| place.to_string()),
    }))
}

/// A device as another node has seen it.
#[derive(Debug)]
pub struct SeenElsewhere {
    pub presence: Presence,
    /// Of its last session.
    pub firmware: Option<Arc<str>>,
}

/// What the database has of devices, where this node knows less: those without a socket here that another node has
/// seen, or that this node does not remember. None if the database does not answer. This node counts them no longer.
pub async fn elsewhere(gateway: &Gateway, devices: &[DeviceId]) -> BTreeMap<DeviceId, SeenElsewhere> {
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
    if !is_alone {
        leave(gateway, &stored, &signs);
    }
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
        let seen = SeenElsewhere {
            presence: Presence::known(known, reason, node, as_of),
            firmware: stored.firmware.map(Arc::from),
        };
        (stored.device, seen)
    };
    newer.map(presence).collect()
}

/// Changes that are not written yet.
fn waiting(gateway: &Gateway, device: DeviceId) -> BTreeMap<Place, PresenceChange> {
    let transitions = gateway.history.queue().of(device).into_iter();
    let change = |transition: Transition| {
        let Transition {
            known,
            at,
            reason,
            number,
            ..
        } = transition;
        (Place(known.epoch, number), PresenceChange::of(known, at, reason))
    };
    transitions.map(change).collect()
}
