//! The context of every API request: its id, its caller, its connection permit and its log line.
//!
//! Start with [`Call`]; [`accompany`] is the outermost layer of the router.

use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures_util::FutureExt as _;
use tokio::sync::OwnedSemaphorePermit;

use super::{
    Api,
    answer::{Held, READ_MAX, Share},
    permits::{Busy, Permit},
    problem::{Code, Problem},
};

/// Header with the request id, in requests and answers.
const REQUEST_ID: &str = "x-request-id";
/// Maximum length of a caller's request id, in bytes. A longer one is replaced.
const REQUEST_ID_LEN_MAX: usize = 64;
/// Maximum length of a path in the log, in bytes.
const LOGGED_PATH_LEN_MAX: usize = 200;

tokio::task_local! {
    static CURRENT: Current;
}

/// The request that is being handled.
#[derive(Clone, Debug, Default)]
pub struct Current {
    /// Empty outside a request.
    pub id: Arc<str>,
    /// The request may change something.
    pub is_change: bool,
}

/// A connection as the listener knows it. An extension of each of its requests.
#[derive(Clone, Debug)]
pub struct Origin {
    pub permit: Arc<Permit>,
    /// The connection came to a loopback address.
    pub is_loopback: bool,
}

/// One request. An extension of it, shared by its extractors.
#[derive(Debug)]
pub struct Call {
    id: Arc<str>,
    permit: Option<Arc<Permit>>,
    busy: OnceLock<Busy>,
    actor: OnceLock<Arc<str>>,
    action: OnceLock<&'static str>,
    body: Mutex<Option<OwnedSemaphorePermit>>,
}

impl Call {
    /// Records the authenticated caller. From now on the connection is not evicted.
    ///
    /// # Errors
    /// `busy`: the maximum number of calls is running.
    pub fn authenticated(&self, actor: &Arc<str>) -> Result<(), Problem> {
        if let Some(permit) = &self.permit {
            let busy = permit.occupy().ok_or_else(|| {
                Problem::new(
                    Code::Busy,
                    "ops.connections_max calls are running: try again in a second",
                )
            })?;
            // Another extractor of the same request has set it.
            let _ = self.busy.set(busy);
        }
        let _ = self.actor.set(Arc::clone(actor));
        Ok(())
    }

    /// Whether the caller has shown a valid token.
    pub fn is_authenticated(&self) -> bool {
        self.actor.get().is_some()
    }

    /// Records the action, as the audit log names it.
    pub fn set_action(&self, action: &'static str) {
        let _ = self.action.set(action);
    }

    /// Keeps the permit for the body's memory until the answer is written, or until [`Self::release_body`].
    pub fn hold_body(&self, permit: OwnedSemaphorePermit) {
        *self.body.lock().unwrap_or_else(PoisonError::into_inner) = Some(permit);
    }

    /// Releases the permit for the body's memory: its content is somewhere else now, with its own bound.
    pub fn release_body(&self) {
        *self.body.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Returns the request that this task handles.
#[must_use]
pub fn current() -> Current {
    CURRENT.try_with(Clone::clone).unwrap_or_default()
}

/// Returns the id of the request that this task handles; empty outside one.
#[must_use]
pub fn current_id() -> Arc<str> {
    current().id
}

/// Runs `work` on behalf of a request.
pub async fn on_behalf_of<T>(request: Current, work: impl Future<Output = T>) -> T {
    CURRENT.scope(request, work).await
}

/// Assigns the request id, answers 500 if the handler panics, and writes the log line.
pub async fn accompany(State(api): State<Arc<Api>>, mut request: Request, next: Next) -> Response {
    let started = api.state.clock.now();
    let origin = request.extensions_mut().remove::<Origin>();
    let call = Arc::new(Call {
        id: id_of(request.headers()),
        permit: origin.as_ref().map(|origin| Arc::clone(&origin.permit)),
        busy: OnceLock::new(),
        actor: OnceLock::new(),
        action: OnceLock::new(),
        body: Mutex::new(None),
    });
    request.extensions_mut().insert(Arc::clone(&call));
    let method = request.method().clone();
    let path = logged(request.uri().path());
    let is_loopback = origin.is_some_and(|origin| origin.is_loopback);
    let handled = async {
        match host_problem(&request, is_loopback, &api) {
            Some(problem) => problem.into_response(),
            None => match AssertUnwindSafe(next.run(request)).catch_unwind().await {
                Ok(response) => response,
                Err(_) => {
                    api.state.panics.count("a call of the API");
                    Problem::new(Code::Internal, "the gateway failed: see its log").into_response()
                }
            },
        }
    };
    let current = Current {
        id: Arc::clone(&call.id),
        is_change: is_change(&method, &path),
    };
    let mut response = on_behalf_of(current, handled).await;
    let actor = call.actor.get().map(|actor| &**actor);
    // Connections without an authenticated caller are evicted instead.
    let share = match actor {
        Some(_) => Share::of(&api.answers, response.body(), call.permit.as_ref(), READ_MAX),
        None => Ok(None),
    };
    // A change is always confirmed.
    if share.is_err() && !is_change(&method, &path) {
        let problem = "unread answers take all the memory for answers: try again in a second";
        response = Problem::new(Code::Busy, problem).into_response();
    }
    if let Ok(id) = HeaderValue::from_str(&call.id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    let status = response.status().as_u16();
    let action = call.action.get().copied();
    let duration = api.state.clock.now().saturating_since(started);
    let labels = [call_label(&method, &path), status_label(response.status())];
    api.state.metrics.api_request_duration_seconds.record(labels, duration);
    let duration_ms = duration.as_secs_f64() * 1e3;
    // Callers without a valid token must not fill the log.
    if actor.is_some() && (action.is_some() || is_change(&method, &path)) {
        tracing::info!(request.id = &*call.id, actor, action, %method, path, status, duration_ms, "API change");
    } else {
        tracing::debug!(request.id = &*call.id, actor, %method, path, status, duration_ms, "API call");
    }
    response.map(|body| Body::new(Held::new(body, (call, share))))
}

/// The label `call` of `seawall_api_request_duration_seconds`.
fn call_label(method: &Method, path: &str) -> &'static str {
    if !path.starts_with("/api/v1/") {
        "public"
    } else if path == "/api/v1/devices/import" {
        "import"
    } else if is_change(method, path) {
        "change"
    } else {
        "read"
    }
}

/// The label `status` of the same metric.
fn status_label(status: StatusCode) -> &'static str {
    if status.is_server_error() {
        "server_error"
    } else if status.is_client_error() {
        "client_error"
    } else {
        "success"
    }
}

/// Whether a call may change something, or send something to a device.
pub fn is_change(method: &Method, path: &str) -> bool {
    !method.is_safe() && !path.ends_with("/preview")
}

fn logged(path: &str) -> String {
    // A path is visible ASCII.
    path.chars().take(LOGGED_PATH_LEN_MAX).collect()
}

/// Returns the caller's request id if it is short and harmless, else a random one.
fn id_of(headers: &HeaderMap) -> Arc<str> {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let is_harmless = |text: &&str| {
        (1..=REQUEST_ID_LEN_MAX).contains(&text.len())
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte))
    };
    match given.filter(is_harmless) {
        Some(id) => id.into(),
        None => format!("{:016x}", rand::random::<u64>()).into(),
    }
}

/// Checks the host that a request names (RFC 9112 §3.2).
///
/// On loopback, `/metrics` is for this machine alone. A web page can reach it under a name that resolves to 127.0.0.1
/// (DNS rebinding). So a browser must name one of this machine's names; other clients may name any.
fn host_problem(request: &Request, is_loopback: bool, api: &Api) -> Option<Problem> {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().ok(),
        (None, _) if request.version() < Version::HTTP_11 => Some(""),
        (None, _) | (_, Some(_)) => return Some(Problem::new(Code::BadRequest, "expected one Host header")),
    };
    let authority = host.and_then(|host| match host {
        "" => Some(None),
        host => host.parse::<Authority>().ok().map(Some),
    });
    let Some(authority) = authority else {
        return Some(Problem::new(Code::BadRequest, "Host: expected a host name"));
    };
    // The host of a target in absolute form takes precedence.
    let authority = request.uri().authority().cloned().or(authority);
    let name = authority.as_ref().map_or("", Authority::host);
    let is_guarded = is_loopback && request.uri().path() == "/metrics" && is_of_browser(request.headers());
    if is_guarded && !is_of_this_machine(name, &api.state.node) {
        return Some(Problem::new(
            Code::BadRequest,
            "Host: on loopback, /metrics is served to browsers under localhost, IP addresses and this node's name",
        ));
    }
    None
}

/// Whether a browser has sent the request. Over plain HTTP to an unknown name it sends no `Sec-Fetch-Site`, and with a
/// simple request no `Origin`. But it always sends its languages, and a page cannot suppress them.
fn is_of_browser(headers: &HeaderMap) -> bool {
    let marks = [
        "origin",
        "sec-fetch-site",
        "sec-fetch-mode",
        "referer",
        "accept-language",
    ];
    let agent = headers.get(header::USER_AGENT).map(HeaderValue::as_bytes);
    marks.iter().any(|mark| headers.contains_key(*mark)) || agent.is_some_and(|agent| agent.starts_with(b"Mozilla/"))
}

fn is_of_this_machine(name: &str, node: &str) -> bool {
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    let is_local = |suffix: &str| name.eq_ignore_ascii_case(suffix);
    // Every browser sends it.
    name.is_empty()
        || bare.parse::<std::net::IpAddr>().is_ok()
        || is_local("localhost")
        || name.to_ascii_lowercase().ends_with(".localhost")
        || is_local(node)
        || rustix::system::uname().nodename().to_str().is_ok_and(is_local)
}

#[cfg(test)]
mod tests {
    use axum::{Router, middleware, routing::get};
    use hyper::service::Service as _;
    use hyper_util::service::TowerToHyperService;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{runtime::config::Config, serve};

    #[tokio::test]
    async fn a_handler_that_panics_is_a_500_counted_and_an_alarm() {
        let home = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.server.data_dir = home.path().to_owned();
        config.server.listen.set_port(0);
        config.ops.listen.set_port(0);
        let running = serve::start(config).await.unwrap();
        let shared = Arc::clone(&running.state);
        let api = Api::new(Arc::clone(&shared), CancellationToken::new());
        let router: Router = Router::new()
            .route("/panic", get(async || -> &'static str { panic!("a bug") }))
            .layer(middleware::from_fn_with_state(api, accompany));
        let request = Request::get("/panic").header("host", "x").header(REQUEST_ID, "r-1");

        let answer = TowerToHyperService::new(router)
            .call(request.body(Body::empty()).unwrap())
            .await
            .unwrap();

        assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(answer.headers()["content-type"], "application/problem+json");
        let body = axum::body::to_bytes(answer.into_body(), 10_000).await.unwrap();
        let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(problem["instance"], "urn:seawall:request:r-1");
        assert!(shared.metrics.render().contains("seawall_task_panics_total 1\n"));
        assert!(shared.readiness().ready && shared.readiness().reasons.contains(&"panic"));
        running.stop().await.unwrap();
    }

    #[test]
    fn an_id_that_could_break_a_log_or_an_address_is_replaced() {
        let id = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_static(text));
            id_of(&headers)
        };

        assert_eq!(&*id("0198c0de-aa.B:c_1"), "0198c0de-aa.B:c_1");
        for bad in ["", "a b", "a\"b", "a/b", "a%0a", "a\tb"] {
            assert_eq!(id(bad).len(), 16, "{bad:?}");
        }
        assert_eq!(id_of(&HeaderMap::new()).len(), 16);
        let mut long = HeaderMap::new();
        long.insert(REQUEST_ID, HeaderValue::from_str(&"x".repeat(65)).unwrap());
        assert_eq!(id_of(&long).len(), 16);
    }

    #[test]
    fn every_request_has_labels_of_the_closed_sets() {
        use crate::metrics::{API_CALLS, API_STATUSES};

        let calls = [
            (Method::GET, "/api/v1/devices", "read"),
            (Method::POST, "/api/v1/rules/preview", "read"),
            (Method::POST, "/api/v1/devices/import", "import"),
            (Method::DELETE, "/api/v1/devices/9b0c", "change"),
            (Method::GET, "/readyz", "public"),
            (Method::PUT, "/x", "public"),
        ];
        for (method, path, label) in calls {
            assert_eq!(call_label(&method, path), label, "{method} {path}");
            assert!(API_CALLS.contains(&label));
        }
        for status in (100..1_000).filter_map(|code| StatusCode::from_u16(code).ok()) {
            assert!(API_STATUSES.contains(&status_label(status)));
        }
        assert_eq!(status_label(StatusCode::SERVICE_UNAVAILABLE), "server_error");
        assert_eq!(status_label(StatusCode::CONFLICT), "client_error");
    }

    #[test]
    fn browser_is_told_by_headers_that_a_page_cannot_remove() {
        let is_of_browser = |name: &'static str, value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_static("evil.example"));
            headers.insert(name, HeaderValue::from_static(value));
            is_of_browser(&headers)
        };

        assert!(is_of_browser("origin", "http://evil.example"));
        assert!(is_of_browser("sec-fetch-site", "cross-site"));
        assert!(is_of_browser("accept-language", "en"));
        assert!(is_of_browser("user-agent", "Mozilla/5.0 (X11)"));
        assert!(!is_of_browser("user-agent", "Prometheus/3.0"));
        assert!(!is_of_browser("authorization", "Bearer x"));
    }

    #[test]
    fn names_of_this_machine_are_addresses_localhost_and_the_node() {
        for name in [
            "",
            "localhost",
            "LOCALHOST",
            "a.localhost",
            "127.0.0.1",
            "[::1]",
            "10.0.0.7",
            "gw-1",
        ] {
            assert!(is_of_this_machine(name, "gw-1"), "{name}");
        }
        for name in [
            "evil.example",
            "localhost.evil.example",
            "gw-10",
            "127.0.0.1.evil.example",
        ] {
            assert!(!is_of_this_machine(name, "gw-1"), "{name}");
        }
    }
}
