//! `GET /events`: the events of this node as server-sent events, from the bounded buffer of [`crate::fleet::events`].

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::{HeaderMap, HeaderName, header},
    response::sse::{self, KeepAlive, Sse},
};
use futures_util::{Stream, stream};
use seawall_proto::id::{DeviceId, Label};
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio_util::sync::CancellationToken;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Caller, Viewer},
    device_list::FirmwareFilter,
    devices::not_a_device,
    extract::{Params, label},
    problem::{Code, Problem, ProblemBody},
};
use crate::{
    fleet::{
        events::{Body, Event, GroupNotice, NAMES},
        history::groups::Group,
    },
    node::{Shared, State as Gateway},
    session::silence::SilentSession,
};

/// Maximum time without a byte on a stream. Then a comment is sent, so that proxies and readers know that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Maximum number of events that are taken from the buffer at once.
const PAGE_LEN: usize = 256;
/// Maximum payload of a page, in bytes: the memory of one slow reader. A larger message is a page of its own.
const PAGE_BYTES: usize = 64 * 1024;
/// Time after which a browser reopens a broken stream.
const RETRY: Duration = Duration::from_secs(2);
/// Name of the event that replaces those that have left the buffer.
const MISSED: &str = "missed";

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(follow_events))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct EventParams {
    /// Only events with these names, separated by commas.
    #[serde(rename = "type")]
    names: Option<String>,
    /// Only events of this device, and `presence_group` of groups that it belongs to.
    device: Option<String>,
    /// Only events of devices of this tenant, and `presence_group` of groups with devices of it.
    tenant: Option<String>,
    /// Only events of devices with this firmware: a range as in rules (`>=3.8.0-b3`) or one version. A text that
    /// is neither is compared as it is. And all `presence_group`: a group may have any firmware.
    firmware: Option<String>,
}

/// Events that a reader wants.
#[derive(Debug)]
struct Filter {
    /// Empty: all.
    names: Vec<&'static str>,
    device: Option<DeviceId>,
    tenant: Option<Label>,
    firmware: Option<FirmwareFilter>,
}

impl Filter {
    fn of(params: &EventParams, gateway: &Gateway) -> Result<Self, Problem> {
        let bad = |detail: String| Problem::new(Code::BadRequest, detail);
        let names = params.names.iter().flat_map(|names| names.split(','));
        let name = |name: &str| {
            let found = NAMES.into_iter().find(|known| *known == name.trim());
            found.ok_or_else(|| bad(format!("type: expected some of {}", NAMES.join(", "))))
        };
        let identity = &gateway.config.identity;
        let device = |text: &String| {
            let named = identity
                .device(text)
                .ok_or_else(|| bad(not_a_device(identity).to_owned()));
            named.map(|named| named.id)
        };
        Ok(Self {
            names: names.map(name).collect::<Result<_, _>>()?,
            device: params.device.as_ref().map(device).transpose()?,
            tenant: label("tenant", params.tenant.as_deref())?,
            firmware: params.firmware.as_deref().map(FirmwareFilter::of).transpose()?,
        })
    }

    fn wants(&self, event: &Event, gateway: &Gateway) -> bool {
        if !self.names.is_empty() && !self.names.contains(&event.body.name()) {
            return false;
        }
        if let Body::PresenceGroup(notice) = &event.body {
            return self.wants_notice(notice, gateway);
        }
        let device = event.body.device();
        if self.device.is_some_and(|wanted| device != Some(wanted)) {
            return false;
        }
        if self.tenant.is_none() && self.firmware.is_none() {
            return true;
        }
        if let Some(group) = event.body.group() {
            return self.wants_group(group);
        }
        let known = device.and_then(|device| gateway.history.record(device)?.group);
        known.is_some_and(|group| self.wants_group(&group))
    }

    /// It may concern any firmware version.
    fn wants_notice(&self, notice: &GroupNotice, gateway: &Gateway) -> bool {
        let is_member = |device| {
            let session = gateway.sessions.get(device);
            session.is_some_and(|session| notice.of.has(&SilentSession(session)))
        };
        self.tenant
            .as_ref()
            .is_none_or(|tenant| notice.concerns(tenant.as_str()))
            && self.device.is_none_or(is_member)
    }

    fn wants_group(&self, group: &Group) -> bool {
        let is_tenant = |wanted: &Label| wanted.as_str() == &*group.tenant;
        let is_version = |wanted: &FirmwareFilter| wanted.matches(group.cohort.firmware.as_deref());
        self.tenant.as_ref().is_none_or(is_tenant) && self.firmware.as_ref().is_none_or(is_version)
    }
}

/// Events of this node, as server-sent events
///
/// Names: `presence`, `presence_group`, `rules`, `rollout`, `alarm`, `proposal`, `drain`, `message`. In place of events
/// that have left the buffer: `missed`, whatever the filter. With `Last-Event-ID` the stream continues after that event.
/// Without it, it begins now. A comment is sent every 15 s. At most `ops.event_readers_max` readers. The stream ends
/// when its token is no longer valid, or when the reader takes nothing for 30 s.
///
/// If many devices go silent together, one `presence_group` with the state `held` replaces their `presence` events:
/// `GET /devices?state=unknown` has them. A device that is heard again is `online` by a `presence` event. If over 20 are
/// within a second, `presence_group` with the state `resolving` stands for the rest. `released`: none is held any more.
#[utoipa::path(
    get, path = "/api/v1/events", tag = "events",
    params(EventParams, ("Last-Event-ID" = Option<u64>, Header, description = "`id` of the last event that was read")),
    responses(
        (status = 200, description = "The stream", body = String, content_type = "text/event-stream"),
        (status = 503, description = "`too_many_readers`", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn follow_events(
    caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    Params(params): Params<EventParams>,
    headers: HeaderMap,
) -> Result<
    (
        [(HeaderName, &'static str); 2],
        Sse<impl Stream<Item = Result<sse::Event, Infallible>>>,
    ),
    Problem,
> {
    let filter = Filter::of(&params, &api.state)?;
    let mut tokens_changed = api.state.tokens.changes();
    // The token may have ended since it was checked.
    tokens_changed.mark_changed();
    let permit = Arc::clone(&api.event_readers).try_acquire_owned().map_err(|_| {
        Problem::new(
            Code::TooManyReaders,
            "ops.event_readers_max streams are open: try again when one is closed",
        )
    })?;
    let newest = api.state.events.subscribe();
    let newest_id = *newest.borrow();
    // A reader that has read nothing yet may send an empty one.
    let last = headers
        .get("last-event-id")
        .filter(|id| !id.as_bytes().trim_ascii().is_empty());
    let after = match last {
        None => newest_id,
        Some(value) => {
            let id = value.to_str().ok().and_then(|text| text.trim().parse::<u64>().ok());
            let id = id.ok_or_else(|| Problem::new(Code::BadRequest, "Last-Event-ID: expected the id of an event"))?;
            // After a clock was set back, the reader may name an id that does not exist yet. Then all events may be new
            // to it.
            if id > newest_id { 0 } else { id }
        }
    };
    let reader = Reader {
        gateway: Arc::clone(&api.state),
        stopping: api.stopping.clone(),
        caller,
        tokens_changed,
        newest,
        after,
        filter,
        left_out: None,
        greeting: Some(sse::Event::default().comment("seawall").retry(RETRY)),
        ready: VecDeque::new(),
        _permit: permit,
    };
    let events = stream::unfold(reader, |mut reader| async move {
        let event = reader.next().await?;
        Some((Ok(event), reader))
    });
    let stream = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE));
    // Proxies must forward each event at once. The first header is nginx's.
    let unbuffered = [
        (HeaderName::from_static("x-accel-buffering"), "no"),
        (header::CACHE_CONTROL, "no-store, no-transform"),
    ];
    Ok((unbuffered, stream))
}

/// One open stream. It holds at most a page: a slow reader loses events instead of taking memory.
struct Reader {
    gateway: Shared,
    stopping: CancellationToken,
    caller: Caller<Viewer>,
    tokens_changed: watch::Receiver<()>,
    newest: watch::Receiver<u64>,
    /// Number of the last event that was taken.
    after: u64,
    filter: Filter,
    /// Number of the last event, where the reader did not want it: it is told the number, to continue there.
    left_out: Option<u64>,
    greeting: Option<sse::Event>,
    /// The rest of the page. Events are serialized one at a time.
    ready: VecDeque<Arc<Event>>,
    _permit: OwnedSemaphorePermit,
}

impl Reader {
    /// Returns the next event. `None`: the gateway stops, or the reader's token is no longer valid.
    ///
    /// # Cancel safety
    /// Safe: events that were taken from the buffer are in `ready`.
    async fn next(&mut self) -> Option<sse::Event> {
        loop {
            // Fails only when the tokens are gone with the gateway.
            if self.tokens_changed.has_changed().unwrap_or(true) {
                self.tokens_changed.mark_unchanged();
                if !self.caller.is_allowed(&self.gateway.tokens) {
                    return None;
                }
            }
            if let Some(greeting) = self.greeting.take() {
                return Some(greeting);
            }
            if let Some(event) = self.ready.pop_front() {
                if !self.filter.wants(&event, &self.gateway) {
                    self.left_out = Some(event.id);
                    continue;
                }
                self.left_out = None;
                match as_sse(&event) {
                    Some(event) => return Some(event),
                    None => continue,
                }
            }
            if let Some(id) = self.left_out.take() {
                return Some(sse::Event::default().id(id.to_string()));
            }
            // Seen before the buffer is read, so that an event in between wakes us.
            let newest_id = *self.newest.borrow_and_update();
            let page = self.gateway.events.after(self.after, PAGE_LEN, PAGE_BYTES);
            // Never back: the buffer may hold an event whose number is not published yet.
            self.after = page.events.last().map_or(newest_id, |last| last.id).max(self.after);
            self.ready.extend(page.events);
            if page.missed {
                self.gateway.metrics.dropped.increment("events");
                return Some(sse::Event::default().event(MISSED).data("{\"type\":\"missed\"}"));
            }
            if !self.ready.is_empty() {
                continue;
            }
            tokio::select! {
                () = self.stopping.cancelled() => return None,
                changed = self.newest.changed() => changed.ok()?,
                changed = self.tokens_changed.changed() => {
                    changed.ok()?;
                    // Seen again at the top.
                    self.tokens_changed.mark_changed();
                }
            }
        }
    }
}

/// Returns the event as a frame.
fn as_sse(event: &Event) -> Option<sse::Event> {
    let json = serde_json::to_string(event);
    debug_assert!(json.is_ok(), "events are texts, numbers and JSON");
    let event_name = event.body.name();
    // A payload is the device's own JSON, which may have line ends between its tokens: SSE would read them as its own.
    let json = json.ok()?.replace(['\n', '\r'], " ");
    Some(
        sse::Event::default()
            .id(event.id.to_string())
            .event(event_name)
            .data(json),
    )
}
