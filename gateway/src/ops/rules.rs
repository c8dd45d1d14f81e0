//! `/rules`: firmware rules. A rule that is written here is in force on this node when the answer is sent.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::State,
    http::{HeaderName, StatusCode, header},
};
use seawall_proto::{
    firmware::Range,
    id::RuleId,
    rules::{RuleSet, RuleSpec},
};
use tokio::time::{Instant, timeout, timeout_at};
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    Api,
    auth::{Caller, Operator, Viewer},
    call,
    extract::{Body, Id, Page, PageParams, Params},
    preview::{Checked, RulePreview},
    problem::{Code, Problem, ProblemBody},
    rule_form::{Asked, PatchDoc, RuleDoc, RuleView, RuleViewDoc},
    write_down,
};
use crate::{
    census::Census,
    events::Body as Event,
    rules::Written,
    state::{Shared, State as Gateway},
    store::{Change, Consent, StoreError},
};

/// Time for putting a written rule in force, on a thread of its own. A write has 2 s (contract section 6): 1.8 s of it are the store's,
/// and ten thousand rules are compiled in a few hundredths of a second.
const APPLY_MAX: Duration = Duration::from_millis(150);

/// Maximum time of a check and the write after it, [`APPLY_MAX`] included.
const WRITE_MAX: Duration = Duration::from_millis(1_950);

/// Maximum number of times that a rule is checked where others are written meanwhile.
const CHECKS_MAX: usize = 3;

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
        .routes(routes!(list_rules, create_rule))
        .routes(routes!(preview_rule))
        .routes(routes!(show_rule, change_rule, delete_rule))
}

/// Firmware rules, also those that are expired or that this version can't enforce
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
        .survey(move |gateway| {
            let census = Census::of_connected(gateway);
            let shown = items.iter().filter_map(|id| view(gateway, &rules, *id, &census));
            shown.collect()
        })
        .await?;
    Ok(Json(Page { items, next_cursor }))
}

/// The rule of this id as it is shown, with the devices of `census` that it matches.
fn view(gateway: &Gateway, rules: &RuleSet, id: RuleId, census: &Census) -> Option<RuleView> {
    if let Some(rule) = rules.rules().iter().find(|rule| rule.id == id) {
        let shown = RuleView::of(rule, &gateway.rules);
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
        .survey(move |gateway| view(gateway, &rules, id, &Census::of_connected(gateway)))
        .await?;
    shown.map(Json).ok_or_else(no_such_rule)
}

/// Make a rule; 409 `needs_confirmation` where it would refuse over 30 % of at least 20 connected devices
#[utoipa::path(
    post, path = "/api/v1/rules", tag = "rules", request_body = RuleDoc,
    responses(
        (status = 201, description = "In force on this node; on others within a second", body = RuleViewDoc),
        (status = 409, description = "`needs_confirmation`, with the preview; `conflict` where another rule says this already", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn create_rule(
    caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    Body(asked): Body<Asked>,
) -> Result<(StatusCode, [(HeaderName, String); 1], Json<RuleView>), Problem> {
    let (spec, is_confirmed) = asked.into_new(api.state.clock.wall())?;
    if let Some(other) = same_rule(&api.state, &spec) {
        return Err(Problem::new(
            Code::Conflict,
            format!("rule {other} says this already: change or delete that one"),
        ));
    }
    let id = RuleId(Uuid::now_v7());
    let (mut checks, deadline) = (0, Instant::now() + WRITE_MAX);
    let rule = loop {
        checks += 1;
        let consent = if is_confirmed {
            Consent::Given
        } else {
            check(&api, &spec, None, deadline).await?
        };
        let (audit, spec) = (caller.audit(&api, "rule.create"), spec.clone());
        let gateway = Arc::clone(&api.state);
        let writing = api.carry_out(async move {
            let rule = gateway.store.rule_insert(id, spec, consent, &audit).await;
            if let Ok(rule) = &rule {
                take_effect(&gateway, Written::Rule(rule.clone()), &audit.actor, "created").await;
            }
            rule
        });
        // A write that takes longer goes on.
        let written = timeout_at(deadline, writing)
            .await
            .unwrap_or(Ok(Err(StoreError::TimedOut)))?;
        match written {
            Err(StoreError::Outdated) if checks < CHECKS_MAX => {}
            written => break written?,
        }
    };
    let location = format!("/api/v1/rules/{}", rule.id);
    Ok((
        StatusCode::CREATED,
        [(header::LOCATION, location)],
        Json(RuleView::of(&rule, &api.state.rules)),
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
    let checked = Checked::of(&api, &spec, None, false).await?;
    Ok(Json(checked.preview))
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
    let (spec, is_confirmed) = asked.into_change_of(&before.spec, api.state.clock.wall())?;
    let (revision, hits_others) = (before.revision, hits_others(&before.spec, &spec));
    let (mut checks, deadline) = (0, Instant::now() + WRITE_MAX);
    let rule = loop {
        checks += 1;
        let consent = match (is_confirmed, hits_others) {
            (true, _) => Consent::Given,
            (false, false) => Consent::NotNeeded,
            (false, true) => check(&api, &spec, Some(id), deadline).await?,
        };
        let (audit, spec) = (caller.audit(&api, "rule.update"), spec.clone());
        let gateway = Arc::clone(&api.state);
        let writing = api.carry_out(async move {
            let rule = gateway.store.rule_update(id, revision, spec, consent, &audit).await;
            if let Ok(Some(rule)) = &rule {
                take_effect(&gateway, Written::Rule(rule.clone()), &audit.actor, "changed").await;
            }
            rule
        });
        // A write that takes longer goes on.
        let written = timeout_at(deadline, writing)
            .await
            .unwrap_or(Ok(Err(StoreError::TimedOut)))?;
        match written {
            Err(StoreError::Outdated) if checks < CHECKS_MAX => {}
            written => break written?,
        }
    };
    rule.map(|rule| Json(RuleView::of(&rule, &api.state.rules)))
        .ok_or_else(no_such_rule)
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
            let deleted = gateway.store.rule_delete(id, &audit).await?;
            if let Some(revision) = deleted {
                take_effect(
                    &gateway,
                    Written::Deleted { rule: id, revision },
                    &audit.actor,
                    "deleted",
                )
                .await;
            }
            // A rule that the database has lost is not there to be deleted.
            let is_released = gateway.rules.release(id, &gateway.clock, &gateway.events).await;
            if is_released && deleted.is_none() {
                write_down(&gateway, &audit, Change::of(&id.to_string())).await;
            }
            Ok::<_, StoreError>(deleted.is_some() || is_released)
        })
        .await??;
    if deleted {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(no_such_rule())
    }
}

/// Puts a written change in force here, and tells of it. Asks the database nothing.
async fn take_effect(gateway: &Shared, written: Written, actor: &str, change: &'static str) {
    let id = written.id();
    let before = gateway.rules.current();
    let applying = gateway.rules.apply(&written, &gateway.clock, &gateway.events);
    if timeout(APPLY_MAX, applying).await.is_err() {
        tracing::warn!(rule.id = %id, "a written rule is not in force in time: the poll will bring it");
    }
    let revision = gateway.rules.current().revision();
    let event = Event::Rules {
        revision,
        rule: Some(id),
        change,
    };
    gateway.events.notice(gateway.clock.wall(), event);
    // Of a deleted rule, what it was.
    let spec = match &written {
        Written::Rule(rule) => Some(&rule.spec),
        Written::Deleted { .. } => before.rules().iter().find(|rule| rule.id == id).map(|rule| &rule.spec),
    };
    let field = |label: Option<&str>| label.unwrap_or("any").to_owned();
    let matches = spec.map(|spec| &spec.matches);
    tracing::info!(
        request.id = &*call::current_id(),
        rule.id = %id,
        rule.firmware = field(matches.and_then(|matches| matches.firmware.as_ref()).map(Range::as_str)),
        rule.model = field(matches.and_then(|matches| matches.model.as_deref())),
        rule.tenant = field(matches.and_then(|matches| matches.tenant.as_deref())),
        rule.effect = spec.map(|spec| spec.effect.as_str()),
        rule.evict = spec.map(|spec| spec.evict),
        rule.reason = spec.map(|spec| spec.reason.as_str()),
        rules.revision = revision,
        actor,
        change,
        "firmware rule written"
    );
}

/// Checks a rule that nobody has confirmed. `of` is the rule that it changes.
async fn check(api: &Api, spec: &RuleSpec, of: Option<RuleId>, deadline: Instant) -> Result<Consent, Problem> {
    let checking = Checked::of(api, spec, of, true);
    let checked = timeout_at(deadline, checking).await;
    let Checked { preview, revision } = checked.map_err(|_| StoreError::TimedOut)??;
    match revision {
        Some(revision) if !preview.needs_confirmation => Ok(Consent::Checked { revision }),
        _ => Err(Problem::needs_confirmation(preview)),
    }
}

/// A rule in force that does the same as `spec`, whatever its reason says.
fn same_rule(gateway: &Gateway, spec: &RuleSpec) -> Option<RuleId> {
    let rules = gateway.rules.current();
    let (lost, wall) = (gateway.rules.lost(), gateway.clock.wall());
    let is_same = |other: &RuleSpec| {
        let reason = spec.reason.clone();
        RuleSpec {
            reason,
            ..other.clone()
        } == *spec
    };
    let mut stored = rules
        .rules()
        .iter()
        .filter(|rule| !rule.is_expired(wall) && lost.iter().all(|lost| lost.rule.id != rule.id));
    stored
        .find(|rule| rule.spec.matches == spec.matches && is_same(&rule.spec))
        .map(|rule| rule.id)
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
