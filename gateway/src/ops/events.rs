//! `GET /events`: what happens on this node, as server-sent events, from the bounded buffer of [`crate::events`].

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::{HeaderMap, HeaderName, header},
    response::sse::{self, KeepAlive, Sse},
};
use futures_util::{Stream, stream};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio_util::sync::CancellationToken;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Caller, Viewer},
    problem::{Code, Problem, ProblemBody},
};
use crate::{events::Event, state::Shared};

/// A comment goes out when nothing else did for so long: proxies and readers then know that the stream lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Events taken from the buffer at once.
const PAGE_LEN: usize = 256;
/// Maximum payload of a page, in bytes: what one reader holds, also when it does not read. One greater message is a page of its own.
const PAGE_BYTES: usize = 64 * 1024;
/// Tells a browser when to come back to a stream that broke.
const RETRY: Duration = Duration::from_secs(2);
/// Name of the event that stands for those that are no longer in the buffer.
const MISSED: &str = "missed";

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(follow_events))
}

/// What happens on this node, as server-sent events
///
/// Names: `presence`, `rules`, `alarm`, `drain`, `message`, and `missed` where events went by that are no longer in the buffer. With
/// `Last-Event-ID` the stream goes on behind that event, without it begins now. A comment is sent every 15 s. `ops.event_readers_max`
/// readers at a time. The stream ends when its token is no longer valid, or when the reader takes nothing for 30 s.
#[utoipa::path(
    get, path = "/api/v1/events", tag = "events",
    params(("Last-Event-ID" = Option<u64>, Header, description = "`id` of the last event that was read")),
    responses(
        (status = 200, description = "The stream", body = String, content_type = "text/event-stream"),
        (status = 503, description = "`too_many_readers`", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn follow_events(
    caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
) -> Result<
    (
        [(HeaderName, &'static str); 2],
        Sse<impl Stream<Item = Result<sse::Event, Infallible>>>,
    ),
    Problem,
> {
    let mut tokens_changed = api.state.tokens.changes();
    // The token may have ended since it was checked.
    tokens_changed.mark_changed();
    let permit = Arc::clone(&api.event_readers).try_acquire_owned().map_err(|_| {
        Problem::new(
            Code::TooManyReaders,
            "ops.event_readers_max readers have the stream open: try again when one has left",
        )
    })?;
    let newest = api.state.events.subscribe();
    let newest_id = *newest.borrow();
    let after = match headers.get("last-event-id") {
        None => newest_id,
        Some(value) => {
            let id = value.to_str().ok().and_then(|text| text.trim().parse::<u64>().ok());
            let id = id.ok_or_else(|| Problem::new(Code::BadRequest, "Last-Event-ID: expected the id of an event"))?;
            // A number that was never given here is of a clock that was set back: all that there is may be new to the reader.
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
        greeting: Some(sse::Event::default().comment("seawall").retry(RETRY)),
        ready: VecDeque::new(),
        _permit: permit,
    };
    let events = stream::unfold(reader, |mut reader| async move {
        let event = reader.next().await?;
        Some((Ok(event), reader))
    });
    let stream = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE));
    // Proxies must hand each event on at once: the first is nginx's own word for it.
    let unbuffered = [
        (HeaderName::from_static("x-accel-buffering"), "no"),
        (header::CACHE_CONTROL, "no-store, no-transform"),
    ];
    Ok((unbuffered, stream))
}

/// One open stream. Holds no more than a page: a slow reader falls behind in the buffer, not in memory.
struct Reader {
    gateway: Shared,
    stopping: CancellationToken,
    caller: Caller<Viewer>,
    tokens_changed: watch::Receiver<()>,
    newest: watch::Receiver<u64>,
    /// Number of the last event that was taken.
    after: u64,
    greeting: Option<sse::Event>,
    /// The rest of the page. An event gets its form when its turn comes.
    ready: VecDeque<Arc<Event>>,
    _permit: OwnedSemaphorePermit,
}

impl Reader {
    /// `None` when the gateway ends, or the reader's token is no longer valid.
    ///
    /// # Cancel safety
    /// What was taken from the buffer is in `ready`.
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
                match as_sse(&event) {
                    Some(event) => return Some(event),
                    None => continue,
                }
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

/// `None` for an event without a JSON form, which there is none of.
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
