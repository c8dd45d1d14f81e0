//! `/proposals`: what the cohort breaker would do, and what a person decides.

use std::sync::Arc;

use axum::{Json, extract::State, http::StatusCode};
use seawall_proto::cohorts::{ProposalId, ProposalState};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    Api,
    auth::{Caller, Operator, Viewer},
    checked_write::{checked, made_or_changed},
    extract::{Id, OptionalBody, Page, PageParams, Params},
    preview::{Checked, RulePreview},
    problem::{Code, Problem, ProblemBody},
    record_change,
    rule_form::{RuleView, RuleViewDoc},
    rules::{answer, check},
};
use crate::{
    fleet::breaker::Shown,
    node::{
        State as Gateway,
        rule_write::{Permission, WRITE_MAX, local_write, write},
    },
    store::{Change, Consent},
    tasks,
};

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
        .routes(routes!(list_proposals))
        .routes(routes!(apply_proposal))
        .routes(routes!(dismiss_proposal))
}

/// A rule that the cohort breaker would make, or has made.
#[derive(Debug, Serialize, ToSchema)]
pub struct ProposalView {
    id: Uuid,
    /// `model/version`.
    cohort: String,
    /// What the cohort stands out by: `repeats`, `cost`, `errors` or `messages`.
    signal: &'static str,
    evidence: EvidenceView,
    /// The rule: its fields, and its `id` once it is applied. Null if no rule can match this version.
    #[schema(value_type = Option<Object>)]
    rule: Option<serde_json::Value>,
    /// The devices that the rule would match now. Null unless the proposal is open.
    preview: Option<RulePreview>,
    /// RFC 3339.
    created_at: String,
    /// `open`, `applied`, `dismissed` or `expired`.
    state: &'static str,
}

/// Why a cohort stands out.
#[derive(Debug, Serialize, ToSchema)]
struct EvidenceView {
    /// The figure of the last minute, by `unit`.
    observed: f64,
    /// What the rest of the fleet, or the cohort before, lets expect.
    expected: f64,
    /// `per minute` (repeats and errors, each site once), `ms per lookup`, or `per device and minute`.
    unit: &'static str,
    /// Score of the detector. From 15 on (25 for cost and messages) a cohort is proposed.
    score: f64,
    /// Devices of the cohort, those that are away for a moment included.
    devices: u64,
    /// Devices of this node.
    devices_total: u64,
    /// The tenant of at least 90 % of the events, if there is one.
    #[schema(value_type = Option<String>)]
    tenant: Option<Arc<str>>,
}

/// Options of the application of a proposal.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ApplyBody {
    /// Confirms a rule that refuses over 30 % of the connected devices.
    #[serde(default)]
    confirm: bool,
}

impl ProposalView {
    fn of(shown: &Shown, preview: Option<RulePreview>, gateway: &Gateway) -> Self {
        let proposal = &shown.proposal;
        let evidence = &proposal.evidence;
        // Its id says when it was made.
        let created = proposal.id.0.get_timestamp().map_or(0, |created| {
            let (seconds, nanos) = created.to_unix();
            seconds * 1_000 + u64::from(nanos) / 1_000_000
        });
        let rules = gateway.rules.current();
        let applied = rules.rules().iter().find(|rule| Some(rule.id) == proposal.rule);
        let rule = match (applied, proposal.rule) {
            (Some(rule), _) => Some(serde_json::json!(RuleView::of(
                rule,
                &gateway.rules,
                gateway.clock.wall()
            ))),
            (None, Some(id)) => Some(serde_json::json!({ "id": id })),
            (None, None) => shown.rule(gateway.clock.wall()).map(|spec| serde_json::json!(spec)),
        };
        Self {
            id: proposal.id.0,
            cohort: shown.cohort.name(),
            signal: proposal.signal.as_str(),
            evidence: EvidenceView {
                observed: rounded(evidence.observed),
                expected: rounded(evidence.expected),
                unit: proposal.signal.unit(),
                score: rounded(evidence.score),
                devices: whole(evidence.devices),
                devices_total: whole(evidence.fleet),
                tenant: shown.tenant.clone(),
            },
            rule,
            preview,
            created_at: seawall_proto::time::WallTime::from_unix_ms(created).to_rfc3339(),
            state: proposal.state.as_str(),
        }
    }
}

/// Proposals of this node's cohort breaker, newest first. A restart forgets them
#[utoipa::path(
    get, path = "/api/v1/proposals", tag = "firmware", params(PageParams),
    responses(
        (status = 200, description = "A page", body = Page<ProposalView>),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn list_proposals(
    _caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    Params(params): Params<PageParams>,
) -> Result<Json<Page<ProposalView>>, Problem> {
    let proposals = api.state.breaker.proposals();
    let numbered: Vec<_> = proposals.into_iter().enumerate().collect();
    let page = Page::of_sorted(numbered, &params, |(number, _)| *number)?;
    let shown: Vec<_> = page.items.into_iter().map(|(_, shown)| shown).collect();
    let wall = api.state.clock.wall();
    let spec = |shown: &Shown| shown.rule(wall).filter(|_| shown.proposal.is_open());
    let specs: Vec<_> = shown.iter().filter_map(&spec).collect();
    let previews = if specs.is_empty() {
        Vec::new()
    } else {
        Checked::previews(&api, specs).await?
    };
    let mut previews = previews.into_iter();
    let items = shown.iter().map(|shown| {
        let preview = spec(shown).and_then(|_| previews.next());
        ProposalView::of(shown, preview, &api.state)
    });
    let items = items.collect();
    Ok(Json(Page {
        items,
        next_cursor: page.next_cursor,
    }))
}

/// Apply an open proposal: its rule admits 10 % of the cohort, and is extended while they are bad
#[utoipa::path(
    post, path = "/api/v1/proposals/{id}/apply", tag = "firmware", params(("id" = Uuid, Path)), request_body = Option<ApplyBody>,
    responses(
        (status = 201, description = "The rule, in force on this node", body = RuleViewDoc),
        (status = 202, description = "The rule, in force on this node only, until the database can take it: `state` is `local`", body = RuleViewDoc),
        (status = 409, description = "`needs_confirmation`, with the preview; `conflict` where the proposal is not open", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn apply_proposal(
    caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    Id(id): Id<ProposalId>,
    OptionalBody(body): OptionalBody<ApplyBody>,
) -> Result<(StatusCode, Json<RuleView>), Problem> {
    let shown = open(&api, id)?;
    let Some(spec) = shown.rule(api.state.clock.wall()) else {
        return Err(Problem::new(
            Code::Conflict,
            format!("no rule can match the version of {}", shown.cohort.name()),
        ));
    };
    let rule = shown.proposal.rule_id();
    let (deadline, audit) = (Instant::now() + WRITE_MAX, caller.audit(&api, "proposal.apply"));
    let (asked, wanted) = (&*api, &spec);
    let permission = || async move {
        if body.confirm {
            Ok(Permission::Stored(Consent::Given))
        } else {
            check(asked, wanted, None, deadline).await
        }
    };
    let write = |permission| {
        let change = local_write(rule, &audit, body.confirm, None, Some(spec.clone()));
        let (audit, spec, gateway) = (audit.clone(), spec.clone(), Arc::clone(&api.state));
        async move {
            if !gateway.breaker.begin_apply(id, gateway.clock.now()) {
                return Ok(None);
            }
            let store = gateway.store.clone();
            let direct = async |consent| store.rule_insert(rule, spec.clone(), consent, &audit).await;
            match write(&gateway, change, permission, deadline, |_| true, direct).await {
                Ok(place) => {
                    let place = made_or_changed(&gateway, rule, place, &spec, &audit, "created").await;
                    tasks::cohorts::applied(&gateway, id, rule, false);
                    Ok(Some(place))
                }
                Err(error) => {
                    gateway.breaker.handle_failed(id, gateway.clock.now());
                    Err(error)
                }
            }
        }
    };
    let place = checked(&api, deadline, permission, write).await?;
    let place = place.ok_or_else(not_open)?;
    answer(&api.state, rule, place, StatusCode::CREATED)
}

/// Dismiss an open proposal: the cohort gets no other for an hour
#[utoipa::path(
    post, path = "/api/v1/proposals/{id}/dismiss", tag = "firmware", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The dismissed proposal", body = ProposalView),
        (status = 409, description = "The proposal is not open", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn dismiss_proposal(
    caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    Id(id): Id<ProposalId>,
) -> Result<Json<ProposalView>, Problem> {
    let shown = open(&api, id)?;
    let audit = caller.audit(&api, "proposal.dismiss");
    let gateway = Arc::clone(&api.state);
    let cohort = serde_json::json!({ "cohort": shown.cohort.name() });
    let is_dismissed = api
        .carry_out(async move {
            let is_dismissed = tasks::cohorts::dismiss(&gateway, id);
            if is_dismissed {
                record_change(&gateway, &audit, Change::to(&id.0.to_string(), cohort)).await;
            }
            is_dismissed
        })
        .await?;
    let dismissed = api.state.breaker.proposal(id).filter(|_| is_dismissed);
    dismissed
        .map(|shown| Json(ProposalView::of(&shown, None, &api.state)))
        .ok_or_else(not_open)
}

fn open(api: &Api, id: ProposalId) -> Result<Shown, Problem> {
    let shown = api
        .state
        .breaker
        .proposal(id)
        .ok_or_else(|| Problem::not_found("proposal"))?;
    if shown.proposal.state == ProposalState::Open {
        Ok(shown)
    } else {
        Err(not_open())
    }
}

fn not_open() -> Problem {
    Problem::new(Code::Conflict, "the proposal is not open, or its rule is being written")
}

fn rounded(figure: f64) -> f64 {
    (figure * 100.0).round() / 100.0
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a number of devices"
)]
fn whole(devices: f64) -> u64 {
    devices.round() as u64
}
