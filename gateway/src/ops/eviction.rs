//! `/rules/{id}/eviction`: how far a rule's eviction is on this node, and its end.

use std::sync::Arc;

use axum::{Json, extract::State, http::StatusCode};
use seawall_proto::{
    id::RuleId,
    rules::{Mode, Rule, RuleSpec},
};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    Api,
    auth::{Caller, Operator, Viewer},
    extract::{Id, IfMatch},
    problem::{Code, Problem, ProblemBody},
    rules::{change_to, no_such_rule},
};
use crate::{fleet::rules::hits::Hit, node::State as Gateway, tasks::departures::left_of};

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(show_eviction, cancel_eviction))
}

/// The eviction of a rule, on this node.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Eviction)]
pub struct EvictionView {
    rule: Uuid,
    /// `off` (the rule closes no sessions), `running` (some are left) or `done`.
    state: &'static str,
    /// Sessions that the rule has closed, since it came into force here or the node started.
    evicted: u64,
    /// Sessions that it will close.
    left: usize,
    /// Sessions closed per second, for all rules that evict together; 0 if none is left.
    rate: f64,
    /// Time until the last session is closed at this rate, in seconds. With several evicting rules, that of the last
    /// session of all of them. Null if none is left.
    eta_seconds: Option<f64>,
}

impl EvictionView {
    /// Reads every session.
    fn of(gateway: &Gateway, rule: &Rule) -> Self {
        let evicts = rule.spec.evict && rule.spec.mode == Mode::Enforce && !rule.is_expired(gateway.clock.wall());
        let left = if evicts { left_of(gateway, rule.id) } else { 0 };
        let status = gateway.departures.eviction_status();
        let rate = if left > 0 { status.rate_per_second } else { 0.0 };
        Self {
            rule: rule.id.0,
            state: match (evicts, left) {
                (false, _) => "off",
                (true, 0) => "done",
                (true, _) => "running",
            },
            evicted: gateway
                .rules
                .hits()
                .of(rule.id)
                .map_or(0, |hits| hits.get(Hit::Evicted)),
            left,
            rate,
            eta_seconds: (rate > 0.0).then(|| left.max(status.left) as f64 / rate),
        }
    }

    async fn read(api: &Api, id: RuleId) -> Result<Self, Problem> {
        let rule = find(api, id)?;
        api.scan_devices(move |gateway| Self::of(gateway, &rule)).await
    }
}

fn find(api: &Api, id: RuleId) -> Result<Rule, Problem> {
    let rules = api.state.rules.current();
    let rule = rules.rules().iter().find(|rule| rule.id == id);
    rule.cloned().ok_or_else(no_such_rule)
}

/// The progress of a rule's eviction on this node
#[utoipa::path(
    get, path = "/api/v1/rules/{id}/eviction", tag = "rules", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The progress", body = EvictionView),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn show_eviction(
    _caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    Id(id): Id<RuleId>,
) -> Result<Json<EvictionView>, Problem> {
    EvictionView::read(&api, id).await.map(Json)
}

/// Cancel a rule's eviction on all nodes: `evict` becomes false, sessions that are left stay, and the rule is enforced
#[utoipa::path(
    delete, path = "/api/v1/rules/{id}/eviction", tag = "rules", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "Cancelled", body = EvictionView),
        (status = 202, description = "Cancelled on this node only, until the database can take it", body = EvictionView),
        (status = 409, description = "The rule evicts nobody, or changed meanwhile", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn cancel_eviction(
    caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    Id(id): Id<RuleId>,
) -> Result<(StatusCode, Json<EvictionView>), Problem> {
    let before = find(&api, id)?;
    if !before.spec.evict {
        return Err(Problem::new(Code::Conflict, "the rule evicts nobody"));
    }
    let spec = RuleSpec {
        evict: false,
        ..before.spec.clone()
    };
    let (status, _) = change_to(
        &api,
        &before,
        spec,
        false,
        &IfMatch::ANY,
        caller.audit(&api, "eviction.cancel"),
    )
    .await?;
    Ok((status, Json(EvictionView::read(&api, id).await?)))
}
