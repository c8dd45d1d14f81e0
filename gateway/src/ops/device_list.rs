//! `GET /devices`: the registry in the order of ids, filtered by what is stored and by what devices do now. While the database does
//! not answer, the list has what this node remembers, and says so.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State};
use seawall_proto::{firmware::Range, id::DeviceId};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Caller, Viewer},
    devices::{Device, Source, registry_unavailable, unless_unavailable},
    extract::{Params, label, page_cursor, page_limit},
    problem::{Code, Problem, ProblemBody},
};
use crate::{
    presence::{Presence, PresenceState},
    state::State as Gateway,
    store::{DeviceFilter, DeviceRow},
};

/// Rows that one request reads at most. A filter that few devices pass then answers with a short page, and where to go on.
const SCANNED_MAX: usize = 5_000;
/// Rows that are read from the database at once.
const CHUNK: u32 = 500;
/// Time for which one walk over all devices seen serves the further pages of a list.
const SEEN_KEPT: Duration = Duration::from_secs(10);

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(list_devices))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct DeviceParams {
    tenant: Option<String>,
    /// The registry's model.
    model: Option<String>,
    /// A range as in rules (`>=3.8.0-b3`) or one version: devices that connected with such a one last.
    firmware: Option<String>,
    /// `enabled`, `disabled`, `revoked`; or `online`, `offline`, `unknown`.
    state: Option<String>,
    /// Most items of the answer: 1 to 1,000. Default 100. There may be fewer before the end of the list.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
    /// Where to go on: `next_cursor` of the page before.
    cursor: Option<String>,
}

/// Devices that this node has seen with a wanted version, from one walk over all that it knows: 16 bytes a device.
pub struct Seen {
    /// The filter as it was written.
    firmware: Option<String>,
    taken: Instant,
    /// Sorted.
    ids: Arc<[DeviceId]>,
}

/// What a request asks for.
struct Wanted {
    stored: DeviceFilter,
    presence: Option<PresenceState>,
    firmware: Option<Range>,
}

/// A page of devices.
#[derive(Debug, Serialize, ToSchema)]
pub struct DevicePage {
    items: Vec<Device>,
    /// Give it as `cursor` to get the next page; null on the last one.
    next_cursor: Option<String>,
    /// `memory`: the database did not answer, and the list is not complete.
    source: Source,
}

/// Devices in the order of their ids: the registered ones, or this node's memory while the database does not answer
#[utoipa::path(
    get, path = "/api/v1/devices", tag = "devices", params(DeviceParams),
    responses(
        (status = 200, description = "A page", body = DevicePage),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn list_devices(
    _caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    Params(params): Params<DeviceParams>,
) -> Result<Json<DevicePage>, Problem> {
    let asked = page_limit(params.limit)?;
    let first: Option<DeviceId> = page_cursor(params.cursor.as_deref())?;
    let wanted = Arc::new(Wanted::of(&params)?);
    let request = ListRequest {
        wanted,
        firmware: params.firmware,
        asked,
        first,
    };
    let registered = unless_unavailable(&api.state, registered(&api, &request)).await?;
    match registered {
        Some(page) => Ok(Json(page)),
        None => remembered(&api, &request).await.map(Json),
    }
}

/// A checked request for a page.
struct ListRequest {
    wanted: Arc<Wanted>,
    /// The filter as it was written.
    firmware: Option<String>,
    /// Maximum number of items.
    asked: u32,
    first: Option<DeviceId>,
}

/// A page of the registry.
async fn registered(api: &Arc<Api>, request: &ListRequest) -> Result<DevicePage, Problem> {
    let ListRequest { wanted, asked, .. } = request;
    let limit = *asked as usize;
    let mut next = request.first;
    let gateway = &api.state;
    let page = |items, next: Option<DeviceId>| DevicePage {
        items,
        next_cursor: next.map(|id| id.to_string()),
        source: Source::Database,
    };

    // Few devices are seen, compared with how many may be registered: where only seen ones can pass, those are looked up.
    let mut seen = match wanted.needs_sight() {
        true => Some(seen_from(api, request).await?),
        false => None,
    };
    // Where the database filters, a page of its is a page of ours.
    let chunk = if wanted.presence.is_some() { CHUNK } else { *asked };
    let mut items = Vec::new();
    let mut scanned = 0;
    loop {
        let (rows, goes_on_at) = match &mut seen {
            Some((ids, start)) => {
                let end = ids.len().min(*start + CHUNK as usize);
                let rows = gateway.store.devices_among(&ids[*start..end]).await?;
                scanned += end - *start;
                *start = end;
                (rows, ids.get(end).copied())
            }
            None => {
                let page = gateway.store.devices_page(&wanted.stored, next, chunk).await?;
                scanned += page.items.len();
                (page.items, page.next_cursor)
            }
        };
        for row in rows {
            if !wanted.wants(&row, gateway) {
                continue;
            }
            if items.len() == limit {
                return Ok(page(items, Some(row.record.id)));
            }
            items.push(Device::of(row, gateway));
        }
        next = goes_on_at;
        if next.is_none() || items.len() == limit || scanned >= SCANNED_MAX {
            return Ok(page(items, next));
        }
    }
}

/// A page of what this node remembers: devices with a session, and those that had one since its start.
///
/// # Errors
/// The filter asks for what only the registry knows.
async fn remembered(api: &Arc<Api>, request: &ListRequest) -> Result<DevicePage, Problem> {
    let wanted = &request.wanted;
    if wanted.stored.state.is_some() || wanted.presence == Some(PresenceState::Unknown) {
        return Err(registry_unavailable());
    }
    let (ids, start) = seen_from(api, request).await?;
    let end = ids.len().min(start + SCANNED_MAX);
    let mut items = Vec::new();
    let mut next = ids.get(end).copied();
    for id in &ids[start..end] {
        let device = Device::remembered(*id, &api.state).filter(|device| wanted.wants_remembered(device));
        let Some(device) = device else { continue };
        if items.len() == request.asked as usize {
            next = Some(*id);
            break;
        }
        items.push(device);
    }
    Ok(DevicePage {
        items,
        next_cursor: next.map(|id| id.to_string()),
        source: Source::Memory,
    })
}

/// Devices that this node has seen, sorted, and where the page begins in them.
async fn seen_from(api: &Arc<Api>, request: &ListRequest) -> Result<(Arc<[DeviceId]>, usize), Problem> {
    let is_further = request.first.is_some();
    let ids = seen_devices(api, &request.wanted, request.firmware.clone(), is_further).await?;
    let start = request.first.map_or(0, |first| ids.partition_point(|id| *id < first));
    Ok((ids, start))
}

impl Wanted {
    fn of(params: &DeviceParams) -> Result<Self, Problem> {
        let mut wanted = Self {
            stored: DeviceFilter {
                tenant: label("tenant", params.tenant.as_deref())?,
                model: label("model", params.model.as_deref())?,
                state: None,
            },
            presence: None,
            firmware: params.firmware.as_deref().map(range).transpose()?,
        };
        if let Some(state) = &params.state {
            let stored = seawall_proto::record::DeviceState::ALL;
            let presence = [PresenceState::Online, PresenceState::Offline, PresenceState::Unknown];
            wanted.stored.state = stored.into_iter().find(|known| known.as_str() == state);
            wanted.presence = presence.into_iter().find(|known| known.as_str() == state);
            if wanted.stored.state.is_none() && wanted.presence.is_none() {
                return Err(Problem::new(
                    Code::BadRequest,
                    "state: expected enabled, disabled, revoked, online, offline or unknown",
                ));
            }
        }
        Ok(wanted)
    }

    /// Only devices that this node has seen can pass.
    fn needs_sight(&self) -> bool {
        self.firmware.is_some() || matches!(self.presence, Some(PresenceState::Online | PresenceState::Offline))
    }

    fn wants(&self, row: &DeviceRow, gateway: &Gateway) -> bool {
        let record = &row.record;
        let is_same =
            |wanted: &Option<_>, stored: Option<&_>| wanted.as_ref().is_none_or(|wanted| stored == Some(wanted));
        is_same(&self.stored.tenant, Some(&record.tenant))
            && is_same(&self.stored.model, record.model.as_ref())
            && self.stored.state.is_none_or(|state| state == record.state)
            && self
                .presence
                .is_none_or(|wanted| wanted == presence_of(record.id, gateway))
    }

    fn wants_remembered(&self, device: &Device) -> bool {
        let is_same =
            |wanted: &Option<_>, known: Option<&_>| wanted.as_ref().is_none_or(|wanted| known == Some(wanted));
        is_same(&self.stored.tenant, device.tenant())
            && is_same(&self.stored.model, device.model())
            && self.presence.is_none_or(|wanted| wanted == device.presence())
    }
}

/// The devices with a wanted version that this node knows. A further page of a list takes those of the page before, so that a list
/// of many pages does not walk over all devices for each.
async fn seen_devices(
    api: &Arc<Api>,
    wanted: &Arc<Wanted>,
    firmware: Option<String>,
    is_further: bool,
) -> Result<Arc<[DeviceId]>, Problem> {
    // Held during the walk: a second list waits, and does not walk at the same time.
    let mut kept = api.seen.lock().await;
    if let Some(seen) = &*kept
        && is_further
        && seen.firmware == firmware
        && seen.taken.elapsed() < SEEN_KEPT
    {
        return Ok(Arc::clone(&seen.ids));
    }
    let wanted = Arc::clone(wanted);
    let ids: Arc<[DeviceId]> = api.survey(move |gateway| walk(gateway, &wanted)).await?.into();
    let taken = Instant::now();
    *kept = Some(Seen {
        firmware,
        taken,
        ids: Arc::clone(&ids),
    });
    drop(kept);
    let keeper = Arc::clone(api);
    api.in_background(async move {
        sleep(SEEN_KEPT).await;
        keeper.seen.lock().await.take_if(|seen| seen.taken == taken);
    });
    Ok(ids)
}

fn walk(gateway: &Gateway, wanted: &Wanted) -> Vec<DeviceId> {
    let mut ids = Vec::new();
    let mut take = |id: DeviceId, firmware: Option<&str>| {
        if wanted.firmware.as_ref().is_none_or(|range| range.matches(firmware)) {
            ids.push(id);
        }
    };
    gateway
        .history
        .for_each_known(|id, identity| take(id, identity.cohort.firmware.as_deref()));
    // All but sessions whose device has been pushed out of the history are there already.
    gateway
        .sessions
        .for_each(|session| take(session.info.device, session.info.cohort.firmware.as_deref()));
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn presence_of(id: DeviceId, gateway: &Gateway) -> PresenceState {
    Presence::of(
        id,
        &gateway.sessions,
        &gateway.history,
        &gateway.node,
        gateway.clock.wall(),
    )
    .state
}

/// A range, or one version.
fn range(text: &str) -> Result<Range, Problem> {
    text.parse().or_else(|error| {
        format!("={text}")
            .parse()
            .map_err(|_| Problem::new(Code::BadRequest, format!("firmware: {error}")))
    })
}
