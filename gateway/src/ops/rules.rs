//! `/rules`: firmware rules. A rule that is written here is in force on this node when the answer is sent.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::State,
    http::{HeaderName, StatusCode, header},
};
use seawall_proto::{
    id::RuleId,
    rules::{Rule, RuleSpec},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::time::timeout;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    Api,
    auth::{Caller, Operator, Viewer},
    extract::{Body, Id, Page, PageParams, Params},
    preview::RulePreview,
    problem::{Problem, ProblemBody, shortened},
};
use crate::{
    events::{Body as Event, format_time},
    state::Shared,
};

/// Time for reading a written rule back. A write has 2 s (contract section 6), and nearly all of it is the store's.
const READ_BACK_MAX: Duration = Duration::from_millis(500);

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
        .routes(routes!(list_rules, create_rule))
        .routes(routes!(preview_rule))
        .routes(routes!(show_rule, change_rule, delete_rule))
}

/// A rule as it is asked for: the fields of a rule, and `confirm`. What a rule's fields may be is written once, in `seawall_proto`.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
struct Asked(Map<String, Value>);

/// A rule. Unknown fields are refused.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RuleBody)]
#[expect(
    dead_code,
    reason = "describes `RuleSpec` for the OpenAPI document; a test compares the two"
)]
struct RuleDoc {
    r#match: MatchDoc,
    /// `block`; `restrict` and `throttle` are not available yet.
    #[schema(pattern = "^(block|restrict|throttle)$")]
    effect: String,
    /// Share of the matched devices that is let through, in percent. Only 0 is available yet.
    #[schema(nullable = false, default = 0, maximum = 100)]
    admit_percent: Option<u8>,
    /// `enforce`; `dry_run` is not available yet.
    #[schema(nullable = false, default = "enforce")]
    mode: Option<String>,
    /// Told to the devices that are refused: public. At most 256 bytes, no control characters.
    #[schema(nullable = false)]
    reason: Option<String>,
    /// Refused devices come back between this and twice this. 1 second to 7 days.
    #[schema(nullable = false, default = "15m")]
    retry_after: Option<String>,
    /// From then on it matches nothing. RFC 3339.
    expires_at: Option<String>,
    /// Close live sessions that match, too, at a pace.
    #[schema(nullable = false, default = false)]
    evict: Option<bool>,
    /// The caller knows that it refuses over 30 % of the connected devices.
    #[schema(nullable = false, default = false)]
    confirm: Option<bool>,
}

/// Which devices: all that is given must hold.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RuleMatch)]
#[expect(
    dead_code,
    reason = "describes `Match` for the OpenAPI document; a test compares the two"
)]
struct MatchDoc {
    /// A comma-separated conjunction of `=`, `!=`, `<`, `<=`, `>`, `>=` and wildcards.
    #[schema(nullable = false, example = ">=3.8.0-b3")]
    firmware: Option<String>,
    #[schema(nullable = false)]
    model: Option<String>,
    #[schema(nullable = false)]
    tenant: Option<String>,
}

/// What to change of a rule; what is not given stays. `match` is replaced as a whole.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RulePatch)]
#[expect(dead_code, reason = "describes a part of `RuleSpec` for the OpenAPI document")]
struct PatchDoc {
    #[schema(nullable = false)]
    r#match: Option<MatchDoc>,
    #[schema(nullable = false)]
    effect: Option<String>,
    #[schema(nullable = false)]
    admit_percent: Option<u8>,
    #[schema(nullable = false)]
    mode: Option<String>,
    #[schema(nullable = false)]
    reason: Option<String>,
    #[schema(nullable = false)]
    retry_after: Option<String>,
    /// RFC 3339; null takes the expiry away.
    expires_at: Option<String>,
    #[schema(nullable = false)]
    evict: Option<bool>,
    #[schema(nullable = false)]
    confirm: Option<bool>,
}

/// A rule in force.
#[derive(Debug, Serialize)]
pub struct RuleView {
    id: RuleId,
    #[serde(flatten)]
    spec: RuleSpec,
    created_at: String,
    revision: u64,
}

/// A rule in force.
#[derive(ToSchema)]
#[schema(as = Rule)]
#[expect(
    dead_code,
    reason = "describes `RuleView` for the OpenAPI document; a test compares the two"
)]
struct RuleViewDoc {
    id: Uuid,
    r#match: MatchDoc,
    effect: String,
    admit_percent: u8,
    mode: String,
    reason: String,
    retry_after: String,
    expires_at: Option<String>,
    evict: bool,
    /// RFC 3339.
    created_at: String,
    /// Revision of all rules at which this one was changed last.
    revision: u64,
}

impl From<&Rule> for RuleView {
    fn from(rule: &Rule) -> Self {
        Self {
            id: rule.id,
            spec: rule.spec.clone(),
            created_at: format_time(rule.created_at),
            revision: rule.revision,
        }
    }
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
    let (spec, is_confirmed) = asked.into_new()?;
    if !is_confirmed {
        ask_for_confirmation(&api, &spec)?;
    }
    let audit = caller.audit(&api, "rule.create");
    let id = RuleId(Uuid::now_v7());
    let gateway = Arc::clone(&api.state);
    let rule = api
        .carry_out(async move {
            let rule = gateway.store.rule_insert(id, spec, &audit).await;
            if rule.is_ok() {
                take_effect(&gateway, id, "created").await;
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
    let (spec, _) = asked.into_new()?;
    Ok(Json(RulePreview::of(&spec, &api.state)))
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
    let (spec, is_confirmed) = asked.into_change_of(&before.spec)?;
    if !is_confirmed && hits_others(&before.spec, &spec) {
        ask_for_confirmation(&api, &spec)?;
    }
    let audit = caller.audit(&api, "rule.update");
    let revision = before.revision;
    let gateway = Arc::clone(&api.state);
    let rule = api
        .carry_out(async move {
            let rule = gateway.store.rule_update(id, revision, spec, &audit).await;
            if matches!(rule, Ok(Some(_))) {
                take_effect(&gateway, id, "changed").await;
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
            if matches!(deleted, Ok(Some(_))) {
                take_effect(&gateway, id, "deleted").await;
            }
            deleted
        })
        .await??;
    deleted.map(|_| StatusCode::NO_CONTENT).ok_or_else(no_such_rule)
}

/// Makes what the database holds the rules in force here, and tells of the change. Where it is not known whether a change was made, the
/// poll finds out.
async fn take_effect(gateway: &Shared, rule: RuleId, change: &'static str) {
    let reload = gateway.rules.reload(&gateway.store, &gateway.clock, &gateway.events);
    match timeout(READ_BACK_MAX, reload).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(%error, rule.id = %rule, "a written rule can't be read back: the poll will bring it");
        }
        Err(_) => tracing::warn!(rule.id = %rule, "a written rule is not read back in time: the poll will bring it"),
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

fn ask_for_confirmation(api: &Api, spec: &RuleSpec) -> Result<(), Problem> {
    let preview = RulePreview::of(spec, &api.state);
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
}

fn no_such_rule() -> Problem {
    Problem::not_found("rule")
}

impl Asked {
    fn into_new(mut self) -> Result<(RuleSpec, bool), Problem> {
        let is_confirmed = self.take_confirm()?;
        Ok((spec(self.0)?, is_confirmed))
    }

    fn into_change_of(mut self, before: &RuleSpec) -> Result<(RuleSpec, bool), Problem> {
        let is_confirmed = self.take_confirm()?;
        if self.0.is_empty() {
            return Err(Problem::invalid("name what should change"));
        }
        let Ok(Value::Object(mut fields)) = serde_json::to_value(before) else {
            return Err(Problem::invalid("the rule has no JSON form"));
        };
        fields.extend(self.0);
        Ok((spec(fields)?, is_confirmed))
    }

    fn take_confirm(&mut self) -> Result<bool, Problem> {
        match self.0.remove("confirm") {
            None => Ok(false),
            Some(Value::Bool(is_confirmed)) => Ok(is_confirmed),
            Some(_) => Err(Problem::invalid("confirm: expected true or false")),
        }
    }
}

fn spec(fields: Map<String, Value>) -> Result<RuleSpec, Problem> {
    let spec: RuleSpec = serde_json::from_value(Value::Object(fields))
        .map_err(|error| Problem::invalid(shortened(&error.to_string())))?;
    spec.validate()
        .map_err(|error| Problem::invalid(format!("{}: {error}", error.field())))?;
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use utoipa::{
        PartialSchema as _,
        openapi::{RefOr, Schema},
    };

    use super::*;

    #[test]
    fn the_documented_fields_are_those_of_a_rule() {
        let minimal =
            serde_json::json!({"match": {"firmware": ">=3.8", "model": "m", "tenant": "t"}, "effect": "block"});
        let Value::Object(minimal) = minimal else { panic!() };
        let spec = spec(minimal).unwrap();
        let rule = Rule {
            id: RuleId(Uuid::nil()),
            spec: spec.clone(),
            created_at: seawall_proto::time::WallTime::default(),
            revision: 1,
        };

        let mut body = keys(&serde_json::to_value(&spec).unwrap());
        body.push("confirm".into());
        body.sort();

        assert_eq!(documented(RuleDoc::schema()), body);
        assert_eq!(documented(PatchDoc::schema()), body);
        assert_eq!(
            documented(RuleViewDoc::schema()),
            keys(&serde_json::to_value(RuleView::from(&rule)).unwrap())
        );
        assert_eq!(
            documented(MatchDoc::schema()),
            keys(&serde_json::to_value(&spec.matches).unwrap())
        );
    }

    #[test]
    fn a_change_keeps_what_it_does_not_name() {
        let Value::Object(fields) = serde_json::json!({"match": {"model": "m"}, "effect": "block", "reason": "a", "expires_at": "2099-01-01T00:00:00Z"})
        else {
            panic!()
        };
        let before = spec(fields).unwrap();
        let asked = |json: Value| serde_json::from_value::<Asked>(json).unwrap();

        let (after, is_confirmed) = asked(serde_json::json!({"reason": "b", "expires_at": null, "confirm": true}))
            .into_change_of(&before)
            .unwrap();

        assert!(is_confirmed);
        assert_eq!((after.reason.as_str(), after.expires_at), ("b", None));
        assert_eq!(after.matches, before.matches);
        assert!(asked(serde_json::json!({})).into_change_of(&before).is_err());
        assert!(asked(serde_json::json!({"colour": 1})).into_change_of(&before).is_err());
    }

    fn keys(json: &Value) -> Vec<String> {
        let mut keys: Vec<String> = json.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys
    }

    fn documented(schema: RefOr<Schema>) -> Vec<String> {
        keys(&serde_json::to_value(schema).unwrap()["properties"])
    }
}
