//! `/rules`: firmware rules. A rule that is written here is in force on this node when the answer is sent.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::State,
    http::{HeaderName, StatusCode, header},
};
use seawall_proto::{id::RuleId, rules::RuleSpec};
use tokio::time::timeout;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    Api,
    auth::{Caller, Operator, Viewer},
    extract::{Body, Id, Page, PageParams, Params},
    preview::RulePreview,
    problem::{Problem, ProblemBody},
    rule_form::{Asked, PatchDoc, RuleDoc, RuleView, RuleViewDoc},
};
use crate::{events::Body as Event, rules::Written, state::Shared};

/// Time for putting a written rule in force, on a thread of its own. A write has 2 s (contract section 6): 1.8 s of it are the store's,
/// and ten thousand rules are compiled in a few hundredths of a second.
const APPLY_MAX: Duration = Duration::from_millis(150);

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
        .routes(routes!(list_rules, create_rule))
        .routes(routes!(preview_rule))
        .routes(routes!(show_rule, change_rule, delete_rule))
}

/// Firmware rules in force on this node, expired ones too
#[utoipa::path(
    get, path = "/api/v1/rules", tag = "rules", params(PageParams),
    responses(
        (status = 200, description = "A page", body = inline(Page<RuleViewDoc>)),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn list_rules(
    _caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    Params(params): Params<PageParams>,
) -> Result<Json<Page<RuleView>>, Problem> {
    let mut rules: Vec<RuleView> = api.state.rules.current().rules().iter().map(RuleView::from).collect();
    rules.sort_unstable_by_key(|rule| rule.id);
    Page::of_sorted(rules, &params, |rule| rule.id.0).map(Json)
}

/// One rule
#[utoipa::path(
    get, path = "/api/v1/rules/{id}", tag = "rules", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The rule", body = RuleViewDoc),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn show_rule(
    _caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    Id(id): Id<RuleId>,
) -> Result<Json<RuleView>, Problem> {
    let rules = api.state.rules.current();
    let rule = rules.rules().iter().find(|rule| rule.id == id);
    rule.map(|rule| Json(RuleView::from(rule))).ok_or_else(no_such_rule)
}

/// Make a rule; 409 `needs_confirmation` where it would refuse over 30 % of at least 20 connected devices
#[utoipa::path(
    post, path = "/api/v1/rules", tag = "rules", request_body = RuleDoc,
    responses(
        (status = 201, description = "In force on this node; on others within a second", body = RuleViewDoc),
        (status = 409, description = "`needs_confirmation`, with the preview", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn create_rule(
    caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    Body(asked): Body<Asked>,
) -> Result<(StatusCode, [(HeaderName, String); 1], Json<RuleView>), Problem> {
    let (spec, is_confirmed) = asked.into_new(api.state.clock.wall())?;
    if !is_confirmed {
        ask_for_confirmation(&api, &spec).await?;
    }
    let audit = caller.audit(&api, "rule.create");
    let id = RuleId(Uuid::now_v7());
    let gateway = Arc::clone(&api.state);
    let rule = api
        .carry_out(async move {
            let rule = gateway.store.rule_insert(id, spec, &audit).await;
            if let Ok(rule) = &rule {
                take_effect(&gateway, Written::Rule(rule.clone()), id, "created").await;
            }
            rule
        })
        .await??;
    let location = format!("/api/v1/rules/{}", rule.id);
    Ok((
        StatusCode::CREATED,
        [(header::LOCATION, location)],
        Json(RuleView::from(&rule)),
    ))
}

/// What a rule would hit now; changes nothing
#[utoipa::path(
    post, path = "/api/v1/rules/preview", tag = "rules", request_body = RuleDoc,
    responses(
        (status = 200, description = "What it would hit", body = RulePreview),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn preview_rule(
    _caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    Body(asked): Body<Asked>,
) -> Result<Json<RulePreview>, Problem> {
    let (spec, _) = asked.into_new(api.state.clock.wall())?;
    api.survey(move |gateway| RulePreview::of(&spec, gateway))
        .await
        .map(Json)
}

/// Change a rule; `match` is replaced as a whole
#[utoipa::path(
    patch, path = "/api/v1/rules/{id}", tag = "rules", params(("id" = Uuid, Path)), request_body = PatchDoc,
    responses(
        (status = 200, description = "As it is now", body = RuleViewDoc),
        (status = 409, description = "`needs_confirmation`, with the preview; `conflict` where it changed meanwhile", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn change_rule(
    caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    Id(id): Id<RuleId>,
    Body(asked): Body<Asked>,
) -> Result<Json<RuleView>, Problem> {
    let rules = api.state.rules.current();
    let before = rules
        .rules()
        .iter()
        .find(|rule| rule.id == id)
        .ok_or_else(no_such_rule)?;
    let (spec, is_confirmed) = asked.into_change_of(&before.spec, api.state.clock.wall())?;
    if !is_confirmed && hits_others(&before.spec, &spec) {
        ask_for_confirmation(&api, &spec).await?;
    }
    let audit = caller.audit(&api, "rule.update");
    let revision = before.revision;
    let gateway = Arc::clone(&api.state);
    let rule = api
        .carry_out(async move {
            let rule = gateway.store.rule_update(id, revision, spec, &audit).await;
            if let Ok(Some(rule)) = &rule {
                take_effect(&gateway, Written::Rule(rule.clone()), id, "changed").await;
            }
            rule
        })
        .await??;
    rule.map(|rule| Json(RuleView::from(&rule))).ok_or_else(no_such_rule)
}

/// Remove a rule
#[utoipa::path(
    delete, path = "/api/v1/rules/{id}", tag = "rules", params(("id" = Uuid, Path)),
    responses(
        (status = 204, description = "Removed"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn delete_rule(
    caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    Id(id): Id<RuleId>,
) -> Result<StatusCode, Problem> {
    let audit = caller.audit(&api, "rule.delete");
    let gateway = Arc::clone(&api.state);
    let deleted = api
        .carry_out(async move {
            let deleted = gateway.store.rule_delete(id, &audit).await;
            if let Ok(Some(revision)) = deleted {
                take_effect(&gateway, Written::Deleted { rule: id, revision }, id, "deleted").await;
            }
            deleted
        })
        .await??;
    deleted.map(|_| StatusCode::NO_CONTENT).ok_or_else(no_such_rule)
}

/// Puts a written change in force here, and tells of it. Asks the database nothing.
async fn take_effect(gateway: &Shared, written: Written, rule: RuleId, change: &'static str) {
    let applying = gateway.rules.apply(&written, &gateway.clock, &gateway.events);
    if timeout(APPLY_MAX, applying).await.is_err() {
        tracing::warn!(rule.id = %rule, "a written rule is not in force in time: the poll will bring it");
    }
    let revision = gateway.rules.current().revision();
    let event = Event::Rules {
        revision,
        rule: Some(rule),
        change,
    };
    gateway.events.notice(gateway.clock.wall(), event);
    tracing::info!(rule.id = %rule, rules.revision = revision, change, "firmware rule written");
}

async fn ask_for_confirmation(api: &Api, spec: &RuleSpec) -> Result<(), Problem> {
    let spec = spec.clone();
    let preview = api.survey(move |gateway| RulePreview::of(&spec, gateway)).await?;
    if preview.needs_confirmation {
        return Err(Problem::needs_confirmation(preview));
    }
    Ok(())
}

/// Whether a change of a rule may hit other devices than before.
fn hits_others(before: &RuleSpec, after: &RuleSpec) -> bool {
    before.matches != after.matches
        || before.effect != after.effect
        || before.mode != after.mode
        || before.admit_percent != after.admit_percent
        || before.expires_at != after.expires_at
        || (!before.evict && after.evict)
}

fn no_such_rule() -> Problem {
    Problem::not_found("rule")
}
