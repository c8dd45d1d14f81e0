//! `GET /devices`: the registry in the order of ids, filtered by stored fields and by the current state of devices.
//! While the database does not answer, the list comes from this node's memory, and says so.

use std::sync::Arc;

use axum::{Json, extract::State};
use seawall_proto::{
    firmware::Range,
    id::{DeviceId, Label},
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Caller, Viewer},
    device_view::{Device, Source, presence, registry_unavailable, unless_unavailable},
    extract::{Params, label, page_cursor, page_limit},
    presence::{SeenElsewhere, elsewhere},
    problem::{Code, Problem, ProblemBody},
};
use crate::{
    fleet::history::groups::Group,
    node::State as Gateway,
    store::{DeviceFilter, DeviceRow, PresenceState},
};

/// Maximum number of rows that one request reads. Then the page is short, and its cursor leads to the rest.
const SCANNED_MAX: usize = 5_000;
/// Number of rows that are read from the database at once.
const CHUNK: u32 = 500;

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
    /// A range as in rules (`>=3.8.0-b3`) or one version, which the device's last connection had. A text that is
    /// neither is compared as it is.
    firmware: Option<String>,
    /// `enabled`, `disabled`, `revoked`; or `online`, `offline`, `unknown`.
    state: Option<String>,
    /// Maximum number of items: 1 to 1,000. Default 100. There may be fewer before the end of the list.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
    /// `next_cursor` of the previous page. Default: the first page.
    cursor: Option<String>,
}

/// The filter of a request.
struct Wanted {
    stored: DeviceFilter,
    presence: Option<PresenceState>,
    firmware: Option<FirmwareFilter>,
}

/// The versions that a list or a stream is about.
#[derive(Debug)]
pub enum FirmwareFilter {
    Range(Range),
    /// Exactly this text, which is not a range.
    Text(String),
}

impl FirmwareFilter {
    /// A range, or one version, or else a text.
    ///
    /// # Errors
    /// `bad_request`: it begins as a range, and is not valid.
    pub fn of(text: &str) -> Result<Self, Problem> {
        let error = match text
            .parse::<Range>()
            .or_else(|error| format!("={text}").parse().map_err(|_| error))
        {
            Ok(range) => return Ok(Self::Range(range)),
            Err(error) => error,
        };
        if text.trim_start().starts_with(['<', '>', '=', '!']) {
            return Err(Problem::new(Code::BadRequest, format!("firmware: {error}")));
        }
        Ok(Self::Text(text.trim().to_owned()))
    }

    pub fn matches(&self, firmware: Option<&str>) -> bool {
        match self {
            Self::Range(range) => range.matches(firmware),
            Self::Text(text) => firmware.is_some_and(|firmware| firmware.trim() == text),
        }
    }
}

/// A page of devices.
#[derive(Debug, Serialize, ToSchema)]
pub struct DevicePage {
    items: Vec<Device>,
    /// Devices of the page whose rows cannot be read. The alarm `registry_unreadable` says why.
    #[schema(value_type = Vec<uuid::Uuid>)]
    unreadable: Vec<DeviceId>,
    /// The `cursor` of the next page; null on the last page.
    next_cursor: Option<String>,
    /// `memory`: the database did not answer, and the list is not complete.
    source: Source,
    /// When the presence of the items was read, RFC 3339.
    as_of: String,
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
    let request = ListRequest { wanted, asked, first };
    let registered = unless_unavailable(&api.state, registered(&api, &request)).await?;
    match registered {
        Some(page) => Ok(Json(page)),
        None => remembered(&api, &request).await.map(Json),
    }
}

/// A checked request for a page.
struct ListRequest {
    wanted: Arc<Wanted>,
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
    let page = |items, mut unreadable: Vec<DeviceId>, next: Option<DeviceId>| {
        unreadable.retain(|id| next.is_none_or(|next| *id < next));
        DevicePage {
            items,
            unreadable,
            next_cursor: next.map(|id| id.to_string()),
            source: Source::Database,
            as_of: gateway.clock.wall().to_rfc3339(),
        }
    };

    // If only devices can match that this node knows, those are looked up, unless the registry has fewer to show.
    let needs_sight = wanted.needs_sight() && wanted.is_faster_in_memory(gateway);
    // If the database applies the whole filter, one of its pages is one of this list.
    let is_whole = wanted.presence.is_none() && wanted.firmware.is_none();
    let chunk = if is_whole { *asked } else { CHUNK };
    let (mut items, mut unreadable) = (Vec::new(), Vec::new());
    let mut scanned = 0;
    loop {
        let rows = if needs_sight {
            let (ids, goes_on_at) = known(api, wanted, next, CHUNK as usize, Labels::Registered).await?;
            scanned += ids.len();
            let mut rows = gateway.store.devices_among(&ids).await?;
            rows.next_cursor = goes_on_at;
            rows
        } else {
            let rows = gateway.store.devices_page(&wanted.stored, next, chunk).await?;
            scanned += rows.items.len() + rows.unreadable.len();
            rows
        };
        unreadable.extend(rows.unreadable);
        let ids: Vec<DeviceId> = rows.items.iter().map(|row| row.record.id).collect();
        let mut others = elsewhere(gateway, &ids).await;
        for row in rows.items {
            let other = others.remove(&row.record.id);
            if !wanted.wants(&row, other.as_ref(), gateway) {
                continue;
            }
            if items.len() == limit {
                return Ok(page(items, unreadable, Some(row.record.id)));
            }
            let mut device = Device::of(row, gateway);
            if let Some(other) = other {
                device.take(other);
            }
            items.push(device);
        }
        next = rows.next_cursor;
        if next.is_none() || items.len() == limit || scanned >= SCANNED_MAX {
            return Ok(page(items, unreadable, next));
        }
    }
}

/// Returns a page of this node's memory: devices that had a session here.
///
/// # Errors
/// The filter has a field that only the registry knows.
async fn remembered(api: &Arc<Api>, request: &ListRequest) -> Result<DevicePage, Problem> {
    let wanted = &request.wanted;
    if wanted.stored.state.is_some() {
        return Err(registry_unavailable());
    }
    let (ids, next) = known(api, wanted, request.first, request.asked as usize, Labels::OfGroup).await?;
    let items = ids.iter().filter_map(|id| Device::remembered(*id, &api.state));
    Ok(DevicePage {
        items: items.collect(),
        unreadable: Vec::new(),
        next_cursor: next.map(|id| id.to_string()),
        source: Source::Memory,
        as_of: api.state.clock.wall().to_rfc3339(),
    })
}

/// Where tenant and model of a filter are compared.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Labels {
    /// With the registry, afterwards.
    Registered,
    /// With what this node knows of the registry.
    OfGroup,
}

/// Returns known devices from `first` on that match, and where the next page begins.
async fn known(
    api: &Arc<Api>,
    wanted: &Arc<Wanted>,
    first: Option<DeviceId>,
    len: usize,
    labels: Labels,
) -> Result<(Vec<DeviceId>, Option<DeviceId>), Problem> {
    let wanted = Arc::clone(wanted);
    let scan = move |gateway: &Gateway| {
        let history = &gateway.history;
        history.page(first, len + 1, wanted.presence, |group| {
            wanted.wants_group(group, labels)
        })
    };
    let mut ids = api.scan_devices(scan).await?;
    let next = ids.get(len).copied();
    ids.truncate(len);
    Ok((ids, next))
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
            firmware: params.firmware.as_deref().map(FirmwareFilter::of).transpose()?,
        };
        if let Some(state) = &params.state {
            let stored = seawall_proto::record::DeviceState::ALL;
            let presence = PresenceState::ALL;
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

    /// Whether only known devices can match.
    fn needs_sight(&self) -> bool {
        self.firmware.is_some() || matches!(self.presence, Some(PresenceState::Online | PresenceState::Offline))
    }

    /// Whether memory has fewer candidates of all tenants than the registry has of the wanted ones.
    fn is_faster_in_memory(&self, gateway: &Gateway) -> bool {
        if self.stored.tenant.is_none() && self.stored.model.is_none() {
            return true;
        }
        let (mut in_memory, mut registered) = (0, 0);
        let (groups, _) = gateway.history.groups().all();
        for (group, counts) in groups {
            if self.wants_group(&group, Labels::Registered) {
                in_memory += self.presence.map_or(counts.total(), |state| counts.of(state));
            }
            if self.has_labels(&group) {
                registered += counts.total();
            }
        }
        in_memory <= registered
    }

    /// `other`: what another node knows of the device, if that is more.
    fn wants(&self, row: &DeviceRow, other: Option<&SeenElsewhere>, gateway: &Gateway) -> bool {
        let record = &row.record;
        let is_same =
            |wanted: &Option<_>, stored: Option<&_>| wanted.as_ref().is_none_or(|wanted| stored == Some(wanted));
        is_same(&self.stored.tenant, Some(&record.tenant))
            && is_same(&self.stored.model, record.model.as_ref())
            && self.stored.state.is_none_or(|state| state == record.state)
            && self.presence.is_none_or(|wanted| {
                let state = other.map_or_else(|| presence(record.id, gateway).state, |other| other.presence.state);
                wanted == state
            })
            && self.firmware.as_ref().is_none_or(|wanted| match other {
                Some(other) => wanted.matches(other.firmware.as_deref()),
                None => {
                    let group = gateway.history.group(record.id);
                    group.is_some_and(|group| wanted.matches(group.cohort.firmware.as_deref()))
                }
            })
    }

    fn wants_group(&self, group: &Group, labels: Labels) -> bool {
        let is_version = |wanted: &FirmwareFilter| wanted.matches(group.cohort.firmware.as_deref());
        let has_labels = labels == Labels::Registered || self.has_labels(group);
        has_labels && self.firmware.as_ref().is_none_or(is_version)
    }

    fn has_labels(&self, group: &Group) -> bool {
        let is_same = |wanted: &Option<Label>, known: Option<&str>| {
            wanted.as_ref().is_none_or(|wanted| known == Some(wanted.as_str()))
        };
        is_same(&self.stored.tenant, Some(&group.tenant)) && is_same(&self.stored.model, group.model.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::FirmwareFilter;

    #[test]
    fn firmware_is_a_range_or_one_version_or_else_the_exact_text() {
        let filter = |wanted: &str| FirmwareFilter::of(wanted).unwrap();
        let matches = |wanted: &str, firmware: &str| filter(wanted).matches(Some(firmware));

        assert!(matches(">=3.8.0-b3", "3.8.0") && !matches(">=3.8.0-b3", "3.7"));
        assert!(matches("3.8", "v3.8.0+x") && !matches("3.8", "3.8.1"));
        assert!(matches("main,x", "main,x") && !matches("main,x", "main") && !matches("main,x", "x"));
        assert!(!filter("main,x").matches(None));
        assert!(FirmwareFilter::of(">").is_err() && FirmwareFilter::of("=1,<x,").is_err());
    }
}
