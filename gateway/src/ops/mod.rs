//! The ops API, which operators, tools and the command line use.
//!
//! Handlers are thin: they parse a request, call the store or a part of the gateway, and build the answer. There is no
//! policy here. The OpenAPI document is generated from the handlers. A test compares docs/openapi.json with it.
//!
//! Start with [`Api`]; [`serve`] puts it on a listener.
//!
//! | without a token | |
//! |---|---|
//! | `GET /` | the list of paths |
//! | `GET /healthz` | 200 while the process lives |
//! | `GET /readyz` | 503 before the first contact with rules and registry, and while draining |
//! | `GET /metrics` | Prometheus text |
//! | `GET /api/v1/openapi.json` | every call that needs a token |

mod alarms;
mod answer;
mod audit;
mod auth;
mod call;
mod checked_write;
mod csv;
pub(crate) mod csv_text;
mod device_list;
mod device_view;
mod devices;
mod discard;
mod drain;
mod events;
mod eviction;
mod extract;
mod firmware;
mod hyper_errors;
mod import;
mod log_level;
mod messages;
mod node;
mod permits;
mod presence;
mod preview;
mod problem;
mod proposals;
mod public;
mod rollouts;
mod rule_form;
mod rules;
mod server;
mod tokens;
mod webhook;

use std::{future::Future, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderValue, header},
    middleware::{self, Next},
    response::Response,
};
use tokio::{sync::Semaphore, time::timeout};
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
    node::{Shared, State as Gateway},
    store::{Audit, AuditEntry, Change},
};

/// Space for the JSON around a message's payload, in bytes.
const MESSAGE_ENVELOPE_BYTES: usize = 16 * 1024;
/// Maximum size of the bodies of all calls together, in bytes, except imports. A single larger body is allowed alone.
/// A call over it gets 503 `busy`. JSON takes several times its size in memory.
const BODIES_BYTES_MAX: usize = 8 * 1024 * 1024;

/// What all handlers share.
pub struct Api {
    state: Shared,
    /// One permit per reader of the event stream.
    event_readers: Arc<Semaphore>,
    /// One permit per byte of a body.
    bodies: Arc<Semaphore>,
    /// One permit per byte of a long answer.
    answers: Arc<Semaphore>,
    /// Maximum size of a body, in bytes, except for imports.
    body_bytes_max: usize,
    /// Which messages to devices the audit log records.
    message_records: std::sync::Mutex<messages::MessageRecords>,
    /// Changes that continue after their caller has left. The store bounds the time of each.
    tasks: TaskTracker,
    /// Cancelled when the gateway stops: streams end, and no new background work starts.
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
            message_records: std::sync::Mutex::new(messages::MessageRecords::new(state.clock.now())),
            event_readers: Arc::new(Semaphore::new(state.config.ops.event_readers_max)),
            tasks: TaskTracker::new(),
            stopping,
            state,
        })
    }

    /// Maximum time for one request, except imports and event streams.
    fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.state.config.ops.request_timeout_ms)
    }

    /// Runs `work` to its end, even if the caller hangs up or has waited too long. A change that is in the database
    /// must take effect.
    async fn carry_out<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Result<T, Problem> {
        let work = call::on_behalf_of(call::current(), work);
        self.tasks.spawn(work).await.map_err(|error| {
            tracing::error!(%error, request.id = &*call::current_id(), "a change made through the API panicked");
            self.state.panics.count("a change made through the API");
            Problem::new(Code::Internal, "the gateway failed: see its log")
        })
    }

    /// Scans every device that this node knows. That takes tens of milliseconds, so it runs on a blocking thread: the
    /// runtime's workers have handshakes to do.
    async fn scan_devices<T: Send + 'static>(
        &self,
        scan: impl FnOnce(&Gateway) -> T + Send + 'static,
    ) -> Result<T, Problem> {
        let state = Arc::clone(&self.state);
        tokio::task::spawn_blocking(move || scan(&state))
            .await
            .map_err(|error| {
                tracing::error!(%error, "a scan of all devices panicked");
                self.state.panics.count("a call of the API");
                Problem::new(Code::Internal, "the gateway failed: see its log")
            })
    }

    /// Runs `work` that no caller waits for, until the gateway stops.
    fn spawn_background(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stopping = self.stopping.clone();
        self.tasks
            .spawn(async move { stopping.run_until_cancelled(work).await });
    }
}

/// Maximum time for the database to take an audit record. Then it waits on disk.
const RECORD_MAX: Duration = Duration::from_millis(250);

/// Records a change that is not one of the database.
///
/// An operator must be able to make it while the database is unavailable. Then the record waits on this node's disk. If
/// that cannot take it either, it is in the log.
async fn record_change(gateway: &Gateway, audit: &Audit, change: Change) {
    let entry = AuditEntry::new(audit, change);
    let is_away = gateway.store.is_away();
    let stored = !is_away
        && matches!(
            timeout(RECORD_MAX, gateway.store.audit_append(&entry)).await,
            Ok(Ok(()))
        );
    let (journal, kept) = (Arc::clone(&gateway.audit_journal), entry.clone());
    let outcome = if stored {
        "stored"
    } else {
        // A record whose outcome is not known has the same id there, and is taken once.
        match tokio::task::spawn_blocking(move || journal.keep(kept)).await {
            Ok(Ok(())) => "kept",
            Ok(Err(error)) => {
                lose(&entry, &error);
                "lost"
            }
            Err(error) => {
                lose(&entry, &error);
                "lost"
            }
        }
    };
    gateway.metrics.audit_records.increment(outcome);
}

fn lose(entry: &AuditEntry, error: &dyn std::fmt::Display) {
    let AuditEntry {
        actor,
        action,
        subject,
        before,
        after,
        ..
    } = entry;
    let (before, after) = (before.clone().unwrap_or_default(), after.clone().unwrap_or_default());
    let id = call::current_id();
    tracing::warn!(%error, request.id = &*id, actor, action, subject, %before, %after, "audit record not written");
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

/// Calls that need a token: those with a bound on their time, and the streams.
fn documented(message_body_bytes_max: usize) -> (OpenApiRouter<Arc<Api>>, OpenApiRouter<Arc<Api>>) {
    let messages = messages::routes().layer(DefaultBodyLimit::max(message_body_bytes_max));
    let timed = OpenApiRouter::with_openapi(Document::openapi())
        .merge(device_list::routes())
        .merge(presence::routes())
        .merge(devices::routes())
        .merge(messages)
        .merge(rules::routes())
        .merge(eviction::routes())
        .merge(rollouts::routes())
        .merge(firmware::routes())
        .merge(proposals::routes())
        .merge(node::routes())
        .merge(alarms::routes())
        .merge(webhook::routes())
        .merge(log_level::routes())
        .merge(drain::routes())
        .merge(audit::routes())
        .merge(tokens::routes());
    let streams = OpenApiRouter::new()
        .merge(events::routes())
        .merge(import::routes().layer(DefaultBodyLimit::disable()));
    (timed, streams)
}

/// Returns the OpenAPI document, as served and as stored in docs/openapi.json.
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

/// Returns the routes of all calls.
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
        .fallback(async || Problem::new(Code::NotFound, "there is nothing at this path: GET / lists all paths"))
        .method_not_allowed_fallback(async || {
            Problem::new(
                Code::MethodNotAllowed,
                "this path does not support the method: see Allow",
            )
        })
        .layer(middleware::from_fn(discard::discard_rest))
        .layer(middleware::from_fn_with_state(Arc::clone(api), call::accompany))
        .layer(middleware::map_response(forbid_caching))
        .with_state(Arc::clone(api))
}

/// Answers 503 to a request that takes too long. A change continues.
async fn within_time(State(api): State<Arc<Api>>, request: Request, next: Next) -> Result<Response, Problem> {
    let detail = if call::is_change(request.method(), request.uri().path()) {
        "the request took longer than ops.request_timeout_ms: whether the change was made is not known"
    } else {
        "the request took longer than ops.request_timeout_ms"
    };
    tokio::time::timeout(api.request_timeout(), next.run(request))
        .await
        .map_err(|_| Problem::new(Code::TimedOut, detail))
}

/// Maximum size of a body with a message, in bytes. A string of control characters is six times as long in JSON.
fn message_body_bytes_max(state: &Gateway) -> usize {
    state.config.limits.message_bytes_max * 6 + MESSAGE_ENVELOPE_BYTES
}

/// Forbids caching, since answers hold secrets and current states, and the guessing of media types.
async fn forbid_caching(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers
        .entry(header::CACHE_CONTROL)
        .or_insert(HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests {
    use axum::{
        body::Body,
        routing::{get, post},
    };
    use hyper::service::Service as _;
    use hyper_util::service::TowerToHyperService;

    use super::*;
    use crate::{runtime::config::Config, serve};

    #[tokio::test]
    async fn only_a_change_that_times_out_leaves_open_whether_it_was_made() {
        let home = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.server.data_dir = home.path().to_owned();
        config.server.listen.set_port(0);
        config.ops.listen.set_port(0);
        config.ops.request_timeout_ms = 1;
        let running = serve::start(config).await.unwrap();
        let api = Api::new(Arc::clone(&running.state), CancellationToken::new());
        let router: Router = Router::new()
            .route(
                "/api/v1/rules",
                get(std::future::pending::<()>).post(std::future::pending::<()>),
            )
            .route("/api/v1/rules/preview", post(std::future::pending::<()>))
            .layer(middleware::from_fn_with_state(api, within_time));
        let router = TowerToHyperService::new(router);
        let detail = async |request: hyper::http::request::Builder| {
            let answer = router.call(request.body(Body::empty()).unwrap()).await.unwrap();
            assert_eq!(answer.status(), 503);
            let body = axum::body::to_bytes(answer.into_body(), 10_000).await.unwrap();
            serde_json::from_slice::<serde_json::Value>(&body).unwrap()["detail"].to_string()
        };

        let doubt = "whether the change was made is not known";
        assert!(detail(Request::post("/api/v1/rules")).await.contains(doubt));
        assert!(!detail(Request::get("/api/v1/rules")).await.contains(doubt));
        assert!(!detail(Request::post("/api/v1/rules/preview")).await.contains(doubt));
        running.stop().await.unwrap();
    }
}
