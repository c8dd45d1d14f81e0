//! `/rules`: firmware rules. A written rule is in force on this node when the answer is sent.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{HeaderName, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use seawall_proto::{
    id::RuleId,
    rules::{Rule, RuleSet, RuleSpec},
};
use serde::Serialize;
use tokio::time::{Instant, timeout_at};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    Api,
    auth::{Caller, Operator, Viewer},
    call,
    checked_write::{author, checked, made_or_changed},
    extract::{Body, Id, IfMatch, Page, PageParams, Params},
    preview::{Basis, Checked, RulePreview},
    problem::{Code, Problem, ProblemBody},
    rollouts,
    rule_form::{PatchDoc, RuleDoc, RuleRequest, RuleView, RuleViewDoc, State as RuleState},
};
use crate::{
    fleet::rules::Written,
    node::{
        State as Gateway,
        rule_write::{Permission, Place, WRITE_MAX, WriteError, apply, local_write, tell, write},
    },
    session::census::Census,
    store::{Audit, Consent, RULES_MAX, StoreError},
};

/// Maximum number of devices in the lists of all rules.
const ALLOWED_MAX: usize = 100_000;

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
        .routes(routes!(list_rules, create_rule))
        .routes(routes!(preview_rule))
        .routes(routes!(show_rule, change_rule, delete_rule))
}

/// Firmware rules, including expired ones and those that this version can't enforce
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
    let rules = api.state.rules.current();
    let mut ids: Vec<RuleId> = rules.rules().iter().map(|rule| rule.id).collect();
    ids.extend(rules.unsupported().iter().map(|rule| rule.id));
    ids.sort_unstable();
    let Page { items, next_cursor } = Page::of_sorted(ids, &params, |id| id.0)?;
    let items = api
        .scan_devices(move |gateway| {
            let census = Census::of_connected(&gateway.sessions);
            let shown = items.iter().filter_map(|id| view(gateway, &rules, *id, &census));
            shown.collect()
        })
        .await?;
    Ok(Json(Page { items, next_cursor }))
}

/// Returns the rule with this id, and the number of devices in `census` that it matches.
fn view(gateway: &Gateway, rules: &RuleSet, id: RuleId, census: &Census) -> Option<RuleView> {
    if let Some(rule) = rules.rules().iter().find(|rule| rule.id == id) {
        let shown = RuleView::of(rule, &gateway.rules, gateway.clock.wall());
        return Some(shown.with_connected(census.matched(&rule.spec)));
    }
    rules
        .unsupported()
        .iter()
        .find(|rule| rule.id == id)
        .map(RuleView::from)
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
    let shown = api
        .scan_devices(move |gateway| view(gateway, &rules, id, &Census::of_connected(&gateway.sessions)))
        .await?;
    shown.map(Json).ok_or_else(no_such_rule)
}

/// Create a rule; 409 `needs_confirmation` if it would refuse over 30 % of at least 20 connected devices
#[utoipa::path(
    post, path = "/api/v1/rules", tag = "rules", request_body = RuleDoc,
    responses(
        (status = 201, description = "In force on this node; on others within a second", body = RuleViewDoc),
        (status = 202, description = "In force on this node only, until the database can take it: `state` is `local`", body = RuleViewDoc),
        (status = 409, description = "`needs_confirmation`, with the preview; `conflict` where another rule says this already", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn create_rule(
    caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    Body(mut request): Body<RuleRequest>,
) -> Result<(StatusCode, [(HeaderName, String); 1], Json<RuleView>), Problem> {
    let plan = request.take_rollout()?;
    let (spec, is_confirmed) = request.into_new(&api.state.config.identity, api.state.clock.wall())?;
    check_allowed(&api.state, &spec, None)?;
    check_new(&api.state, &spec, None, plan.is_some())?;
    let id = RuleId(Uuid::now_v7());
    let rollout = match plan {
        Some(plan) => Some(rollouts::of_new(&api, &spec, plan).await?),
        None => None,
    };
    let (deadline, audit) = (Instant::now() + WRITE_MAX, caller.audit(&api, "rule.create"));
    let (asked, wanted) = (&*api, &spec);
    let permission = || async move {
        if is_confirmed {
            Ok(Permission::Stored(Consent::Given))
        } else if wanted.is_harmless() {
            Ok(Permission::Stored(Consent::NotNeeded))
        } else {
            check(asked, wanted, None, deadline).await
        }
    };
    let write = |permission| {
        let change = local_write(id, &audit, is_confirmed, None, Some(spec.clone()));
        let (audit, spec, gateway) = (audit.clone(), spec.clone(), Arc::clone(&api.state));
        let rollout = rollout.clone();
        async move {
            if gateway.rules.current().rules().len() as u64 >= RULES_MAX.unsigned_abs() {
                let detail = format!("there are {RULES_MAX} rules already: delete some first");
                return Err(WriteError::Store(StoreError::Conflict(detail)));
            }
            let store = gateway.store.clone();
            let place = match (rollout, permission) {
                (None, _) => {
                    let direct = async |consent| store.rule_insert(id, spec.clone(), consent, &audit).await;
                    write(&gateway, change, permission, deadline, |_| true, direct).await?
                }
                // The journal has no place for its evidence.
                (Some(rollout), Permission::Stored(consent)) => {
                    let made = store.rule_insert_staged(id, spec.clone(), rollout, consent, &audit);
                    Place::Database(made.await.map_err(WriteError::Store)?)
                }
                (Some(_), Permission::Local) => {
                    let why = "it is not reached, and a rule is only enforced in stages with it".to_owned();
                    return Err(WriteError::Store(StoreError::Unavailable(why)));
                }
            };
            Ok(made_or_changed(&gateway, id, place, &spec, &audit, "created").await)
        }
    };
    let place = checked(&api, deadline, permission, write).await?;
    let location = [(header::LOCATION, format!("/api/v1/rules/{id}"))];
    let (status, view) = answer(&api.state, id, place, StatusCode::CREATED)?;
    Ok((status, location, view))
}

/// Preview the devices that a rule would match; changes nothing
#[utoipa::path(
    post, path = "/api/v1/rules/preview", tag = "rules", request_body = RuleDoc,
    responses(
        (status = 200, description = "The devices that it would match", body = RulePreview),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn preview_rule(
    _caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    Body(mut request): Body<RuleRequest>,
) -> Result<Json<RulePreview>, Problem> {
    // Of all that the rule would match once it is enforced on all.
    request.take_rollout()?;
    let (spec, _) = request.into_new(&api.state.config.identity, api.state.clock.wall())?;
    let checked = Checked::of(&api, &spec, None).await?;
    Ok(Json(checked.preview))
}

/// Change a rule; `match` is replaced as a whole
#[utoipa::path(
    patch, path = "/api/v1/rules/{id}", tag = "rules",
    params(("id" = Uuid, Path), ("If-Match" = Option<String>, Header, description = "`\"REVISION\"` of the rule")),
    request_body = PatchDoc,
    responses(
        (status = 200, description = "The changed rule", body = RuleViewDoc),
        (status = 202, description = "Changed on this node only, until the database can take it: `state` is `local`", body = RuleViewDoc),
        (status = 412, description = "The rule has another revision than `If-Match` names", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`needs_confirmation`, with the preview; `conflict` where it changed meanwhile", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn change_rule(
    caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    Id(id): Id<RuleId>,
    if_match: IfMatch,
    Body(request): Body<RuleRequest>,
) -> Result<(StatusCode, Json<RuleView>), Problem> {
    let rules = api.state.rules.current();
    if let Some(unsupported) = rules.unsupported().iter().find(|rule| rule.id == id) {
        return Err(Problem::new(
            Code::Conflict,
            format!(
                "this version of the gateway can't read the whole rule and would lose a part of it ({}): change it through a node of the version that wrote it, or delete it",
                unsupported.problem
            ),
        ));
    }
    let before = rules
        .rules()
        .iter()
        .find(|rule| rule.id == id)
        .ok_or_else(no_such_rule)?;
    let (names, wall) = (&api.state.config.identity, api.state.clock.wall());
    let (spec, is_confirmed) = request.into_change_of(&before.spec, names, wall)?;
    check_allowed(&api.state, &spec, Some(id))?;
    if !spec.is_same_as(&before.spec) {
        check_new(&api.state, &spec, Some(id), false)?;
    }
    let audit = caller.audit(&api, "rule.update");
    change_to(&api, before, spec, is_confirmed, &if_match, audit).await
}

/// Replaces what a rule says, and answers with it.
pub(super) async fn change_to(
    api: &Api,
    before: &Rule,
    spec: RuleSpec,
    is_confirmed: bool,
    if_match: &IfMatch,
    audit: Audit,
) -> Result<(StatusCode, Json<RuleView>), Problem> {
    let (id, deadline) = (before.id, Instant::now() + WRITE_MAX);
    let (revision, hits_others) = (before.revision, spec.is_wider_than(&before.spec));
    let (asked, wanted) = (api, &spec);
    let permission = || async move {
        match (is_confirmed, hits_others) {
            (true, _) => Ok(Permission::Stored(Consent::Given)),
            (false, false) => Ok(Permission::Stored(Consent::NotNeeded)),
            (false, true) => check(asked, wanted, Some(id), deadline).await,
        }
    };
    let write = |permission| {
        let change = local_write(id, &audit, is_confirmed, Some(before.spec.clone()), Some(spec.clone()));
        let (audit, spec, gateway) = (audit.clone(), spec.clone(), Arc::clone(&api.state));
        let if_match = if_match.clone();
        async move {
            let store = gateway.store.clone();
            let direct = async |consent| {
                let changed = store.rule_update(id, revision, spec.clone(), consent, &audit);
                changed.await
            };
            let expected = |revision| if_match.has(revision);
            let place = match write(&gateway, change, permission, deadline, expected, direct).await {
                Ok(Place::Database(None)) => return Ok(Err(no_such_rule())),
                Ok(Place::Database(Some(rule))) => Place::Database(rule),
                Ok(Place::Journal) => Place::Journal,
                Err(WriteError::Store(StoreError::OtherRevision(revision))) => {
                    return Ok(Err(if_match.problem(revision)));
                }
                Err(error) => return Err(error),
            };
            let made = made_or_changed(&gateway, id, place, &spec, &audit, "changed");
            Ok(Ok(made.await))
        }
    };
    let place = checked(api, deadline, permission, write).await??;
    answer(&api.state, id, place, StatusCode::OK)
}

/// The answer to the removal of a rule that the database could not take.
#[derive(Debug, Serialize, ToSchema)]
pub struct LocalDeletion {
    #[schema(value_type = Uuid)]
    id: RuleId,
    /// `local`.
    state: RuleState,
}

/// Remove a rule
#[utoipa::path(
    delete, path = "/api/v1/rules/{id}", tag = "rules",
    params(("id" = Uuid, Path), ("If-Match" = Option<String>, Header, description = "`\"REVISION\"` of the rule")),
    responses(
        (status = 204, description = "Removed"),
        (status = 202, description = "Removed on this node only, until the database can take it", body = LocalDeletion),
        (status = 412, description = "The rule has another revision than `If-Match` names", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn delete_rule(
    caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    Id(id): Id<RuleId>,
    if_match: IfMatch,
) -> Result<Response, Problem> {
    let audit = caller.audit(&api, "rule.delete");
    let expected = if_match.clone();
    let (gateway, deadline) = (Arc::clone(&api.state), Instant::now() + WRITE_MAX);
    let deleting = api.carry_out(async move {
        let (rules, lost) = (gateway.rules.current(), gateway.rules.lost());
        let before = rules.rules().iter().find(|rule| rule.id == id).map(|rule| &rule.spec);
        let store = gateway.store.clone();
        let direct = async |_| match lost.iter().find(|lost| lost.rule.id == id) {
            Some(lost) => {
                let released = store.rule_release(&lost.rule, expected.revisions(), &audit);
                released.await.map(Some)
            }
            None => store.rule_delete_at(id, expected.revisions(), &audit).await,
        };
        let place = match before {
            Some(before) => {
                let change = local_write(id, &audit, true, Some(before.clone()), None);
                let permission = Permission::Stored(Consent::Given);
                let is_expected = |revision| expected.has(revision);
                write(&gateway, change, permission, deadline, is_expected, direct).await?
            }
            // This version can't read it, so it can't wait in the journal. It refuses nobody here.
            None => Place::Database(direct(Consent::Given).await.map_err(WriteError::Store)?),
        };
        let is_local = match place {
            Place::Database(None) => return Ok(None),
            Place::Database(Some(revision)) => {
                apply(&gateway, Written::Deleted { rule: id, revision }).await;
                false
            }
            Place::Journal => true,
        };
        let request = call::current_id();
        tell(&gateway, id, before, author(&audit, &request), "deleted", is_local);
        Ok::<_, WriteError>(Some(is_local))
    });
    // A write that takes longer continues.
    match timeout_at(deadline, deleting)
        .await
        .map_err(|_| StoreError::TimedOut)??
    {
        Err(WriteError::Store(StoreError::OtherRevision(revision))) => Err(if_match.problem(revision)),
        Err(error) => Err(error.into()),
        Ok(None) => Err(no_such_rule()),
        Ok(Some(false)) => Ok(StatusCode::NO_CONTENT.into_response()),
        Ok(Some(true)) => {
            let state = RuleState::Local;
            Ok((StatusCode::ACCEPTED, Json(LocalDeletion { id, state })).into_response())
        }
    }
}

/// Answers with a rule that was made or changed.
pub(super) fn answer(
    gateway: &Gateway,
    id: RuleId,
    place: Place<Rule>,
    stored: StatusCode,
) -> Result<(StatusCode, Json<RuleView>), Problem> {
    match place {
        Place::Database(rule) => Ok((stored, Json(RuleView::of(&rule, &gateway.rules, gateway.clock.wall())))),
        Place::Journal => {
            let rules = gateway.rules.current();
            let rule = rules.rules().iter().find(|rule| rule.id == id);
            let rule = rule.ok_or_else(no_such_rule)?;
            Ok((
                StatusCode::ACCEPTED,
                Json(RuleView::of(rule, &gateway.rules, gateway.clock.wall()).local()),
            ))
        }
    }
}

/// Checks an unconfirmed rule. `of` is the rule that it changes.
pub(super) async fn check(
    api: &Api,
    spec: &RuleSpec,
    of: Option<RuleId>,
    deadline: Instant,
) -> Result<Permission, Problem> {
    let checked = timeout_at(deadline, Checked::of(api, spec, of)).await;
    let Checked { preview, basis } = checked.map_err(|_| StoreError::TimedOut)??;
    match basis {
        Basis::Cluster { revision } if !preview.needs_confirmation => {
            Ok(Permission::Stored(Consent::Checked { revision }))
        }
        Basis::Node if !preview.needs_confirmation => Ok(Permission::Local),
        Basis::Cluster { .. } | Basis::Node | Basis::Unknown => Err(Problem::needs_confirmation(preview)),
    }
}

/// Checks that the lists of allowed devices of all rules fit in memory. `of` is the rule that is changed.
fn check_allowed(gateway: &Gateway, spec: &RuleSpec, of: Option<RuleId>) -> Result<(), Problem> {
    let rules = gateway.rules.current();
    let others = rules.rules().iter().filter(|rule| Some(rule.id) != of);
    let devices = others.map(|rule| rule.spec.allow.len()).sum::<usize>() + spec.allow.len();
    if spec.allow.is_empty() || devices <= ALLOWED_MAX {
        return Ok(());
    }
    Err(Problem::new(
        Code::Conflict,
        format!(
            "all rules together would allow {devices} devices, more than the maximum of {ALLOWED_MAX}: delete rules that nobody needs"
        ),
    ))
}

/// Checks that no rule in force is the same, its reason included: devices are told it. `of` is the rule that changes.
/// A staged rule is the same as one with any share: two with shares of their own would refuse more than either.
fn check_new(gateway: &Gateway, spec: &RuleSpec, of: Option<RuleId>, is_staged: bool) -> Result<(), Problem> {
    let rules = gateway.rules.current();
    let (lost, wall) = (gateway.rules.lost(), gateway.clock.wall());
    let is_in_force =
        |rule: &Rule| !rule.is_expired(wall) && Some(rule.id) != of && lost.iter().all(|lost| lost.rule.id != rule.id);
    let mut others = rules.rules().iter().filter(|rule| is_in_force(rule));
    let mut spec = spec.clone();
    let is_same = |rule: &&Rule| {
        if is_staged {
            spec.admit_percent = rule.spec.admit_percent;
        }
        rule.spec.is_same_as(&spec)
    };
    match others.find(is_same) {
        None => Ok(()),
        Some(other) => Err(Problem::new(
            Code::Conflict,
            format!("rule {} is the same: change or delete that one", other.id),
        )),
    }
}

pub(super) fn no_such_rule() -> Problem {
    Problem::not_found("rule")
}
