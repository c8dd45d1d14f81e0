//! `GET /node` and `GET /nodes`: how a gateway is.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Caller, Viewer},
    drain::DrainView,
    extract::{Page, PageParams, Params},
    problem::{Problem, ProblemBody},
};
use crate::{events::format_time, faults::Fault, roster, state::State as Gateway, store::PlanReport, telemetry};

/// This gateway in the audit log.
pub const SUBJECT: &str = "node";

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
        .routes(routes!(show_node))
        .routes(routes!(list_nodes))
}

/// One gateway.
#[derive(Debug, Serialize, ToSchema)]
pub struct Node {
    node: String,
    version: &'static str,
    /// RFC 3339.
    started_at: String,
    /// As `/readyz` says.
    ready: bool,
    /// What is not as it should be.
    reasons: Vec<&'static str>,
    /// Live sessions.
    sessions: usize,
    admission: AdmissionView,
    database: DatabaseView,
    rules: RulesView,
    resume: ResumeView,
    roster: RosterView,
    drain: DrainView,
    /// What is logged. Null: the process has no log of the gateway's.
    log_level: Option<String>,
}

/// The way to the registry.
#[derive(Debug, Serialize, ToSchema)]
pub struct AdmissionView {
    /// Keys that may be with the database at a time.
    limit: u32,
    /// The most that the limit may come to.
    limit_ceiling: u32,
    /// Why the limit is what it is: `start`, `grew`, `held`, `app_limited` (devices ask for less than the database could answer),
    /// `ceiling` (more in flight would give more answers, but is not allowed), or what made it shrink: `elasticity` (more in flight gave
    /// hardly more answers), `latency`, `errors`, `outage`, `plan_cut`.
    limit_reason: &'static str,
    /// How much of one percent more in flight came out as answers, lately: 1 below the database's knee, 0 at it.
    elasticity: f64,
    /// Keys answered a second when devices last waited for a second on end; 0 where they never did.
    rate: f64,
    /// Nine of ten statements took no longer, in the last second that had some; in milliseconds.
    took_p90_ms: f64,
    /// Keys that are.
    in_flight: u32,
    /// Devices that wait.
    queue: usize,
    /// Devices a second that can be taken back.
    k_ref: f64,
    /// The best rate of the last ten minutes or so, in keys a second.
    k_peak: f64,
    /// The best rate known from before, also from before the last restart; 0 where none is.
    k_last_known_good: f64,
    /// `closed`: asking; `open`: the database is not asked; `half_open`: being tried.
    breaker: &'static str,
}

/// The database.
#[derive(Debug, Serialize, ToSchema)]
pub struct DatabaseView {
    /// `starting`, `available`, `read_only` (look-ups are answered, nothing can be changed) or `unavailable`.
    state: &'static str,
    /// RFC 3339.
    since: String,
    /// Why it is not available, or what is wrong with it while it answers.
    reason: Option<String>,
    /// `indexed`, what is wrong with the plan of a statement of the connect path, or null before the first look at it.
    plan: Option<String>,
}

/// The firmware rules in force.
#[derive(Debug, Serialize, ToSchema)]
pub struct RulesView {
    revision: u64,
    /// The same on every node with the same rules.
    digest: String,
    /// Time since the database confirmed them.
    age_seconds: f64,
}

/// What is known of revoked resume tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct ResumeView {
    /// All revocations up to it are known. Null: none are, and no token counts until the database answers.
    revision: Option<u32>,
    /// Devices whose older tokens don't count.
    revoked: usize,
    /// Time since the database confirmed this.
    age_seconds: f64,
}

/// Who is registered, as this node remembers it: whoever is not in it, and was not let in here, is a stranger.
#[derive(Debug, Serialize, ToSchema)]
pub struct RosterView {
    devices: usize,
    /// Time since the registry was like that; since the start where nothing was read yet.
    age_seconds: f64,
}

/// What is wrong with a database that answers.
fn trouble(gateway: &Gateway) -> Option<String> {
    let faults = [
        Fault::DatabaseFile,
        Fault::DatabaseRefuses,
        Fault::RegistryUnreadable,
        Fault::RegistryShrunken,
        Fault::LookupsFail,
    ];
    faults.into_iter().find_map(|fault| gateway.faults.detail(fault))
}

impl Node {
    fn of(gateway: &Gateway) -> Self {
        let readiness = gateway.readiness();
        let admission = gateway.gate.state();
        let database = gateway.store.state();
        let rules = gateway.rules.current();
        Self {
            node: gateway.node.clone(),
            version: env!("CARGO_PKG_VERSION"),
            started_at: format_time(gateway.started),
            ready: readiness.ready,
            reasons: readiness.reasons,
            sessions: gateway.sessions.len(),
            admission: AdmissionView {
                limit: admission.limit,
                limit_ceiling: admission.limit_ceiling,
                limit_reason: admission.limit_reason.as_str(),
                elasticity: admission.elasticity,
                rate: admission.rate,
                took_p90_ms: admission.took_p90.as_secs_f64() * 1e3,
                in_flight: admission.in_flight,
                queue: admission.queue,
                k_ref: admission.k_ref,
                k_peak: admission.k_peak,
                k_last_known_good: admission.k_last_known_good,
                breaker: admission.breaker.as_str(),
            },
            database: DatabaseView {
                state: database.status.as_str(),
                since: format_time(database.since),
                reason: database
                    .reason
                    .or_else(|| trouble(gateway))
                    .or_else(|| gateway.store.scarce_connections()),
                plan: gateway.plan.get().map(|report| match report {
                    PlanReport::Indexed => "indexed".to_owned(),
                    PlanReport::Alarm(what) => what,
                }),
            },
            rules: RulesView {
                revision: rules.revision(),
                digest: rules.digest_hex(),
                age_seconds: gateway.rules.age(gateway.clock.now()).as_secs_f64(),
            },
            resume: ResumeView {
                revision: gateway.resume.revision().map(|revision| revision.0),
                revoked: gateway.resume.revoked_len(),
                age_seconds: gateway.resume.age(gateway.clock.now()).as_secs_f64(),
            },
            roster: RosterView {
                devices: gateway.gate.roster().len(),
                age_seconds: roster::age(gateway).as_secs_f64(),
            },
            drain: DrainView::of(gateway),
            log_level: telemetry::level(),
        }
    }
}

/// This gateway
#[utoipa::path(
    get, path = "/api/v1/node", tag = "nodes",
    responses(
        (status = 200, description = "Its state", body = Node),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn show_node(_caller: Caller<Viewer>, State(api): State<Arc<Api>>) -> Json<Node> {
    Json(Node::of(&api.state))
}

/// Every gateway that this one knows of: itself, as long as there is no clustering
#[utoipa::path(
    get, path = "/api/v1/nodes", tag = "nodes", params(PageParams),
    responses(
        (status = 200, description = "A page", body = Page<Node>),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn list_nodes(
    _caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    Params(params): Params<PageParams>,
) -> Result<Json<Page<Node>>, Problem> {
    let nodes = vec![Node::of(&api.state)];
    Page::of_sorted(nodes, &params, |node| node.node.clone()).map(Json)
}
