//! `GET /node` and `GET /nodes`: the state of a gateway.

use std::sync::Arc;

use axum::{Json, extract::State};
use seawall_proto::{freshness::Freshness, presence::groups::Held};
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
use crate::{
    fleet::faults::Fault,
    node::State as Gateway,
    runtime::{config::Config, telemetry},
    store::PlanReport,
    tasks::configuration,
};

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
    /// As in `/readyz`.
    ready: bool,
    /// Problems, as in `/readyz`.
    reasons: Vec<&'static str>,
    /// Live sessions.
    sessions: usize,
    presence: PresenceView,
    /// Sessions of devices that a rule restricts. They are not among `sessions`.
    restricted: RestrictedView,
    admission: AdmissionView,
    database: DatabaseView,
    config: ConfigView,
    rules: RulesView,
    resume: ResumeView,
    #[serde(rename = "roster")]
    registry_index: RegistryIndexView,
    drain: DrainView,
    /// The log level. Null if the process has no log of the gateway's.
    log_level: Option<String>,
}

/// How far this node can tell who is connected.
#[derive(Debug, Serialize, ToSchema)]
pub struct PresenceView {
    /// How late this node lately ran. What it knows of devices is as old as this.
    observer_lag_ms: u64,
    /// 0 is well, 7 is the worst. From 3 on no device goes offline for silence.
    local_health: u8,
    /// Sessions that left two pings unanswered, and are not held.
    silent: u32,
    /// Silent sessions whose deadline has passed.
    suspects: u32,
    /// Held sessions: their devices are neither online nor offline.
    unknown: u32,
    /// Groups of devices that went silent together.
    groups: Vec<HeldGroupView>,
}

/// Devices that went silent together.
#[derive(Debug, Serialize, ToSchema)]
pub struct HeldGroupView {
    /// `node`, `tenant`, `address_block` or `site`.
    group: &'static str,
    /// The tenant, the block or the address; empty for the node.
    key: String,
    /// `path` or `node_lagging`.
    cause: &'static str,
    /// Members when it was held, silent and not.
    members: u32,
    /// Members that were held, all in all.
    held: u32,
    /// Those that have been heard again.
    resolved: u32,
    /// Those that have not been heard.
    unknown: u32,
}

impl PresenceView {
    fn of(gateway: &Gateway) -> Self {
        let figures = gateway.silence.figures();
        let group = |held: Held| HeldGroupView {
            group: held.group.kind().as_str(),
            key: held.group.key(),
            cause: held.cause.as_str(),
            members: held.members,
            held: held.held,
            resolved: held.resolved,
            unknown: held.left,
        };
        Self {
            observer_lag_ms: u64::try_from(gateway.observer.lag().as_millis()).unwrap_or(u64::MAX),
            local_health: gateway.observer.health(),
            silent: figures.silent,
            suspects: figures.suspects,
            unknown: figures.unknown,
            groups: figures.held.into_iter().map(group).collect(),
        }
    }
}

/// Restricted sessions.
#[derive(Debug, Serialize, ToSchema)]
pub struct RestrictedView {
    /// Open now.
    sessions: usize,
    /// Maximum at a time: 1 % of the connections, at least 4. Further devices are refused with `firmware_blocked`.
    max: usize,
}

/// Admission: how many devices may be looked up.
#[derive(Debug, Serialize, ToSchema)]
pub struct AdmissionView {
    /// Maximum number of keys in flight to the database.
    limit: u32,
    /// Maximum of the limit.
    limit_ceiling: u32,
    /// Reason of the last change of the limit. `start`, `grew` and `held` speak for themselves. `app_limited`: devices
    /// need less than the database could answer. `ceiling`: more keys in flight would give more answers, but are not
    /// allowed. `elasticity`: more keys in flight gave hardly more answers. `latency`, `errors`, `outage` and
    /// `plan_cut` also lowered it.
    limit_reason: &'static str,
    /// Recent rise of the throughput, in percent, for 1 % more keys in flight: 1 below the database's knee, 0 at it.
    elasticity: f64,
    /// Keys answered per second when devices last waited for a whole second; 0 if they never did.
    rate: f64,
    /// 90th percentile of the duration of statements, in the last second that had some; in milliseconds.
    took_p90_ms: f64,
    /// Keys in flight.
    in_flight: u32,
    /// Waiting devices.
    queue: usize,
    /// Devices that can return, per second.
    k_ref: f64,
    /// The best rate of about the last ten minutes, in keys per second.
    k_peak: f64,
    /// The best earlier rate, even from before the last restart; 0 if none is known.
    k_last_known_good: f64,
    /// `closed`: lookups are sent; `open`: no lookups are sent; `half_open`: a few lookups are sent as a probe.
    breaker: &'static str,
}

/// The database.
#[derive(Debug, Serialize, ToSchema)]
pub struct DatabaseView {
    /// `starting`, `available`, `read_only` (lookups work, changes do not) or `unavailable`.
    state: &'static str,
    /// RFC 3339.
    since: String,
    /// Why it is unavailable, or what is wrong with it while it answers.
    reason: Option<String>,
    /// `indexed`, or what is wrong with the plan of a statement of the connect path; null before the first check.
    plan: Option<String>,
}

/// The configuration in use.
#[derive(Debug, Serialize, ToSchema)]
pub struct ConfigView {
    /// When a URL of `[source]` last confirmed it. `fresh`: within 60 s; `stale`: before; `grace`: more than 15 minutes
    /// ago; `expired`: more than 8 hours ago. Nothing changes for devices. Always `fresh` without a URL.
    state: &'static str,
    /// Time since then; since the start, if no URL has answered.
    age_seconds: f64,
    /// Number of configurations so far that this process used.
    revision: u64,
    /// Digest of the settings that are meant to be equal on all nodes: all but `[server]`, `[source]`, `ops.listen` and
    /// secrets.
    digest: String,
    /// Settings that are not the defaults.
    items: usize,
    /// `peer`: a URL of `[source]`; `disk`: files of this node.
    source: &'static str,
    /// Why the configuration that was last read is not used; null if it is.
    refused: Option<String>,
    /// Settings that were changed since the start, and wait for a restart.
    restart_needed: Vec<String>,
}

impl ConfigView {
    fn of(gateway: &Gateway) -> Self {
        let (status, config) = (gateway.settings.status(), gateway.settings.current());
        let age = configuration::age(gateway, gateway.clock.now());
        let is_of_url = status.is_shared && status.confirmed.is_some();
        Self {
            state: Freshness::of(age).as_str(),
            age_seconds: age.as_secs_f64(),
            revision: status.revision,
            digest: config.digest_hex(),
            items: Config::default().changes(&config).len(),
            source: if is_of_url { "peer" } else { "disk" },
            refused: status.refused,
            restart_needed: status.restart_needed,
        }
    }
}

/// The firmware rules in force.
#[derive(Debug, Serialize, ToSchema)]
pub struct RulesView {
    revision: u64,
    /// Digest of the rules: equal on all nodes with the same rules.
    digest: String,
    /// Time since the database confirmed them.
    age_seconds: f64,
    /// Changes of rules that wait in this node's journal for the database.
    local: usize,
}

/// Known revocations of resume tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct ResumeView {
    /// All revocations up to this revision are known. Null: none are, and no token is valid until the database answers.
    revision: Option<u32>,
    /// Devices whose older tokens are not valid.
    revoked: usize,
    /// Time since the database confirmed this.
    age_seconds: f64,
}

/// This node's copy of the registered ids. A device that is neither in it nor was admitted here is an unknown device.
#[derive(Debug, Serialize, ToSchema)]
pub struct RegistryIndexView {
    devices: usize,
    /// Age of the copy; time since the start if nothing was read yet.
    age_seconds: f64,
}

/// Returns what is wrong with a database that answers.
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
        let admission = gateway.lookups.state();
        let database = gateway.store.state();
        let rules = gateway.rules.current();
        Self {
            node: gateway.node.to_string(),
            version: env!("CARGO_PKG_VERSION"),
            started_at: gateway.started.to_rfc3339(),
            ready: readiness.ready,
            reasons: readiness.reasons,
            sessions: gateway.sessions.len(),
            presence: PresenceView::of(gateway),
            restricted: RestrictedView {
                sessions: gateway.restricted.len(),
                max: gateway.restricted.max(),
            },
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
                since: database.since.to_rfc3339(),
                reason: database
                    .reason
                    .or_else(|| trouble(gateway))
                    .or_else(|| gateway.store.scarce_connections()),
                plan: gateway.plan.get().map(|report| match report {
                    PlanReport::Indexed => "indexed".to_owned(),
                    PlanReport::Alarm(what) => what,
                }),
            },
            config: ConfigView::of(gateway),
            rules: RulesView {
                revision: rules.revision(),
                digest: rules.digest_hex(),
                age_seconds: gateway.rules.age(gateway.clock.now()).as_secs_f64(),
                local: gateway.rules.local().writes.len(),
            },
            resume: ResumeView {
                revision: gateway.resume.revision().map(|revision| revision.0),
                revoked: gateway.resume.revoked_len(),
                age_seconds: gateway.resume.age(gateway.clock.now()).as_secs_f64(),
            },
            registry_index: RegistryIndexView {
                devices: gateway.lookups.registry_index().len(),
                age_seconds: gateway.registry_index_age().as_secs_f64(),
            },
            drain: DrainView::of(gateway),
            log_level: telemetry::level(),
        }
    }
}

/// Show this gateway
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

/// List the gateways: this one, as long as there is no clustering
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
