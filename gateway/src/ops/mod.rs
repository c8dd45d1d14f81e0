//! The ops API: everything that operators, tools and the command line ask of a gateway (contract section 6).
//!
//! Handlers are thin: they take a request apart, ask the store or a part of the gateway, and put the answer together. No policy is here.
//! The OpenAPI document is made from the handlers; docs/openapi.json is a copy that a test compares.
//!
//! Start with [`Api`]; [`serve`] puts it on a listener.
//!
//! | without a token | |
//! |---|---|
//! | `GET /` | the list of what is here |
//! | `GET /healthz` | 200 while the process lives |
//! | `GET /readyz` | 503 before the first contact with rules and registry, and while draining |
//! | `GET /metrics` | Prometheus text |
//! | `GET /api/v1/openapi.json` | every call that needs a token |

mod alarms;
mod answer;
mod audit;
mod auth;
mod bare;
mod call;
mod csv;
mod csv_text;
mod device_list;
mod devices;
mod discard;
mod drain;
mod events;
mod extract;
mod firmware;
mod import;
mod log_level;
mod messages;
mod node;
mod places;
mod preview;
mod problem;
mod public;
mod rule_form;
mod rules;
mod server;
mod tokens;

use std::{future::Future, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderValue, header},
    middleware::{self, Next},
    response::Response,
};
use tokio::sync::{Mutex, Semaphore};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use utoipa::{
    Modify, OpenApi,
    openapi::{
        Components,
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};
use utoipa_axum::router::OpenApiRouter;

use self::problem::{Code, Problem};
pub use self::server::serve;
use crate::{
    state::{Shared, State as Gateway},
    store::{Audit, Change},
};

/// Room for the JSON around a message's payload, and for its escapes.
const MESSAGE_ENVELOPE_BYTES: usize = 16 * 1024;
/// Maximum size of the bodies of all calls together, in bytes, imports apart; a greater single body that is allowed is allowed alone.
/// A call over it gets 503 `busy`. JSON takes several times its size in memory.
const BODIES_BYTES_MAX: usize = 8 * 1024 * 1024;

/// What all handlers share.
pub struct Api {
    state: Shared,
    /// One permit a reader of the event stream.
    event_readers: Arc<Semaphore>,
    /// One permit a byte of a body.
    bodies: Arc<Semaphore>,
    /// One permit a byte of a long answer.
    answers: Arc<Semaphore>,
    /// Greatest body that any call but an import takes.
    body_bytes_max: usize,
    /// The last walk over all devices that this node knows, for the further pages of a list.
    seen: Mutex<Option<device_list::Seen>>,
    /// Which messages to devices the audit log records.
    message_records: std::sync::Mutex<messages::MessageRecords>,
    /// Changes that go on when their caller has left. Each is bounded in time by the store.
    tasks: TaskTracker,
    /// The gateway ends: streams end, and nothing new is begun in the background.
    stopping: CancellationToken,
}

impl Api {
    #[must_use]
    pub fn new(state: Shared, stopping: CancellationToken) -> Arc<Self> {
        let body_bytes_max = message_body_bytes_max(&state).max(state.config.ops.body_bytes_max);
        Arc::new(Self {
            bodies: Arc::new(Semaphore::new(BODIES_BYTES_MAX.max(body_bytes_max))),
            answers: Arc::new(Semaphore::new(answer::ANSWERS_BYTES_MAX)),
            body_bytes_max,
            seen: Mutex::default(),
            message_records: std::sync::Mutex::new(messages::MessageRecords::new(state.clock.now())),
            event_readers: Arc::new(Semaphore::new(state.config.ops.event_readers_max)),
            tasks: TaskTracker::new(),
            stopping,
            state,
        })
    }

    /// Time for one request, imports and event streams apart.
    fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.state.config.ops.request_timeout_ms)
    }

    /// Does something to the end, also when the caller hangs up or has waited too long: a change that is in the database must take effect.
    async fn carry_out<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Result<T, Problem> {
        let work = call::on_behalf_of(call::current_id(), work);
        self.tasks.spawn(work).await.map_err(|error| {
            tracing::error!(%error, request.id = &*call::current_id(), "a change made through the API failed half way");
            self.state.note_panic("a change made through the API");
            Problem::new(Code::Internal, "the gateway failed: see its log")
        })
    }

    /// Looks at every device that this node knows, which takes tens of milliseconds: on a thread of its own, since the runtime's
    /// workers have handshakes to do.
    async fn survey<T: Send + 'static>(&self, look: impl FnOnce(&Gateway) -> T + Send + 'static) -> Result<T, Problem> {
        let state = Arc::clone(&self.state);
        tokio::task::spawn_blocking(move || look(&state))
            .await
            .map_err(|error| {
                tracing::error!(%error, "a look at all devices failed");
                self.state.note_panic("a call of the API");
                Problem::new(Code::Internal, "the gateway failed: see its log")
            })
    }

    /// Does something that no caller waits for, unless the gateway ends.
    fn in_background(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stopping = self.stopping.clone();
        self.tasks
            .spawn(async move { stopping.run_until_cancelled(work).await });
    }
}

/// Writes down a change that is none of the database's. An operator must be able to make it while the database is away: then it is in the log.
async fn write_down(gateway: &Gateway, audit: &Audit, change: Change) {
    if let Err(error) = gateway.store.audit_append(audit, change.clone()).await {
        let Change { subject, before, after } = change;
        let (before, after) = (before.unwrap_or_default(), after.unwrap_or_default());
        let id = call::current_id();
        tracing::warn!(%error, request.id = &*id, actor = audit.actor, action = audit.action, subject, %before, %after, "the audit log could not be written");
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Seawall ops API",
        description = "Roles: `viewer` reads, `operator` also changes rules and the log level, drains, disconnects devices and sends them messages, `admin` also manages devices and tokens. Every error is `application/problem+json`. Unknown fields and parameters are refused.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0"),
    ),
    modifiers(&BearerTokens),
    security(("token" = [])),
)]
struct Document;

struct BearerTokens;

impl Modify for BearerTokens {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        document
            .components
            .get_or_insert_with(Components::new)
            .add_security_scheme("token", SecurityScheme::Http(scheme));
    }
}

/// Calls that need a token; all but streams have a bound on their time.
fn documented(message_body_bytes_max: usize) -> (OpenApiRouter<Arc<Api>>, OpenApiRouter<Arc<Api>>) {
    let messages = messages::routes().layer(DefaultBodyLimit::max(message_body_bytes_max));
    let timed = OpenApiRouter::with_openapi(Document::openapi())
        .merge(device_list::routes())
        .merge(devices::routes())
        .merge(messages)
        .merge(rules::routes())
        .merge(firmware::routes())
        .merge(node::routes())
        .merge(alarms::routes())
        .merge(log_level::routes())
        .merge(drain::routes())
        .merge(audit::routes())
        .merge(tokens::routes());
    let streams = OpenApiRouter::new()
        .merge(events::routes())
        .merge(import::routes().layer(DefaultBodyLimit::disable()));
    (timed, streams)
}

/// The OpenAPI document, as served and as kept in docs/openapi.json.
///
/// # Panics
/// Never: a document of texts and numbers has a JSON form.
#[must_use]
pub fn openapi_json() -> String {
    let (timed, streams) = documented(0);
    let (_, document) = timed.merge(streams).split_for_parts();
    let mut json = document
        .to_pretty_json()
        .expect("a document of texts and numbers has a JSON form");
    json.push('\n');
    json
}

/// Every call, ready for a listener.
fn router(api: &Arc<Api>) -> Router {
    let ops = &api.state.config.ops;
    let (timed, streams) = documented(api.body_bytes_max);
    let (timed, _) = timed.split_for_parts();
    let (streams, _) = streams.split_for_parts();
    timed
        .merge(public::routes(openapi_json()))
        .layer(middleware::from_fn_with_state(Arc::clone(api), within_time))
        .merge(streams)
        .layer(DefaultBodyLimit::max(ops.body_bytes_max))
        .fallback(async || {
            Problem::new(
                Code::NotFound,
                "there is nothing at this path: GET / lists what there is",
            )
        })
        .method_not_allowed_fallback(async || {
            Problem::new(Code::MethodNotAllowed, "this path has other methods: see Allow")
        })
        .layer(middleware::from_fn(discard::rest))
        .layer(middleware::from_fn_with_state(Arc::clone(api), call::accompany))
        .layer(middleware::map_response(never_stored))
        .with_state(Arc::clone(api))
}

/// 503 for a request that takes too long. What it asked for goes on where it is a change.
async fn within_time(State(api): State<Arc<Api>>, request: Request, next: Next) -> Result<Response, Problem> {
    tokio::time::timeout(api.request_timeout(), next.run(request))
        .await
        .map_err(|_| {
            Problem::new(
                Code::TimedOut,
                "the request took longer than ops.request_timeout_ms: whether a change was made is not known",
            )
        })
}

/// Greatest body with a message. A string of control characters is six times as long in JSON.
fn message_body_bytes_max(state: &Gateway) -> usize {
    state.config.limits.message_bytes_max * 6 + MESSAGE_ENVELOPE_BYTES
}

/// Answers hold secrets and states of the moment: no cache may keep them, and no browser guess what they are.
async fn never_stored(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers
        .entry(header::CACHE_CONTROL)
        .or_insert(HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
