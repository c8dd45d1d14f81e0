//! `/rules/{id}/release` and `/rules/{id}/rollout`: staged changes of a rule.

use std::sync::Arc;

use axum::{Json, extract::State, http::StatusCode};
use seawall_proto::{
    id::RuleId,
    rollout::{Counts, Direction, NotPossible, Plan, PlanError, Rollout, Step},
    rules::{Mode, RuleSpec},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    Api,
    auth::{Caller, Operator, Viewer},
    call,
    checked_write::author,
    extract::{Body, Id, OptionalBody},
    preview::Checked,
    problem::{Code, Problem, ProblemBody},
    rules::no_such_rule,
};
use crate::{
    fleet::rules::Written,
    node::rule_write::{apply, tell},
    store::{Audit, RolloutWrite, StoreError, StoredRollout},
};

/// Maximum number of attempts to change a rollout that steps meanwhile.
const ATTEMPTS_MAX: usize = 3;

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
        .routes(routes!(release_rule))
        .routes(routes!(show_rollout, change_rollout))
}

/// Stages of a rollout, and what each of them needs. All fields are optional.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RolloutPlan)]
#[expect(
    dead_code,
    reason = "describes `Plan` for the OpenAPI document; a test compares the two"
)]
pub struct PlanDoc {
    /// Rising shares of the matched devices, in percent; at most 20. They are kept as ordered. Default 1, 5, 25, 50,
    /// 100, of which the first has at least 20 devices if that many are known.
    #[schema(nullable = false, default = json!([1, 5, 25, 50, 100]))]
    stages: Option<Vec<u8>>,
    /// Minimum time of a stage. 1 second to 7 days.
    #[schema(nullable = false, default = "10m")]
    bake: Option<String>,
    /// Connects of treated devices that a stage needs; fewer if the stage is known to have few devices. A stage of
    /// fewer than 20 devices waits for them for at most three bakes.
    #[schema(nullable = false, default = 200, minimum = 1, maximum = 1_000_000)]
    connects_min: Option<u32>,
}

/// A staged change of a rule.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Rollout)]
pub struct RolloutView {
    /// The rule that it changes.
    rule: Uuid,
    /// `release` (the share that the rule admits rises) or `rollout` (the share that it is enforced on rises).
    direction: &'static str,
    /// `running`, `paused` (by a person, or for lack of evidence), `halted` (treated devices did worse or
    /// are missing, so it went back one stage), `done` or `reverted`.
    state: &'static str,
    /// Number of stages reached; 0 before the first.
    stage: u8,
    /// Share of the matched devices that is treated now, in percent.
    percent: u8,
    /// Shares of all stages, in percent.
    stages: Vec<u8>,
    /// Minimum time of a stage.
    bake: String,
    /// Maximum time of a stage without a decision, in seconds. Then it is paused.
    stage_seconds_max: u64,
    /// As it was ordered.
    connects_min: u32,
    /// Connects of treated devices that this stage needs.
    connects_needed: u64,
    /// Connects on all nodes since this stage began. After a halt, those that led to it.
    evidence: EvidenceView,
    /// As in `evidence`.
    log_likelihood_ratio: f64,
    /// Oldest first; at most the last 100.
    steps: Vec<StepView>,
}

/// Treated devices, and the others that they are compared with.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RolloutEvidence)]
pub struct EvidenceView {
    treated: CountsView,
    control: CountsView,
    /// 9.16 and more: worse. -3 and less: not worse. Between the two: not decided.
    log_likelihood_ratio: f64,
    returns: ReturnsView,
}

/// Devices that the rule has refused, restricted or evicted in stages of a `rollout`. Empty while several nodes count.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RolloutReturns)]
pub struct ReturnsView {
    /// Those that are back, or were to be back by now: within twice `retry_after` and 2 minutes.
    expected: u64,
    /// Of these, those that did not connect again, with any version.
    missing: u64,
}

/// Connects whose outcome is known.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RolloutCounts)]
pub struct CountsView {
    connects: u64,
    /// Sessions that ended within 120 s (within `bake` if that is shorter), and returns soon after an earlier session.
    /// Closes by the gateway or an operator are not among them. A device that leaves after a longer session of this
    /// stage, and does not return within 10 minutes, is one more failed connect.
    failed: u64,
}

/// A step of a rollout.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RolloutStep)]
pub struct StepView {
    /// RFC 3339.
    at: String,
    /// Number of stages reached after it.
    stage: u8,
    percent: u8,
    /// `started`, `fine`, `worse`, `paused`, `resumed`, `reverted`, `rule_changed`, `evidence_lost`, `missing` or
    /// `no_evidence`. `missing`: devices that were sent away did not return. `no_evidence`: a stage decided nothing in
    /// its time.
    verdict: &'static str,
}

/// A change of a rollout.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RolloutPatch)]
pub struct PatchBody {
    state: Wanted,
}

/// The state that a rollout can be given.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = RolloutWanted)]
enum Wanted {
    /// It stays at its stage.
    Paused,
    /// It resumes, with no evidence for its stage.
    Running,
    /// The rule acts as before the rollout.
    Reverted,
}

impl RolloutView {
    fn of(rule: RuleId, rollout: &Rollout) -> Self {
        let plan = rollout.plan();
        let totals = rollout.totals();
        Self {
            rule: rule.0,
            direction: rollout.direction().as_str(),
            state: rollout.state().as_str(),
            stage: rollout.stage(),
            percent: rollout.percent(),
            stages: plan.stages.clone(),
            bake: humantime::format_duration(plan.bake).to_string(),
            stage_seconds_max: rollout.stage_max().as_secs(),
            connects_min: plan.connects_min,
            connects_needed: rollout.connects_needed(),
            evidence: EvidenceView {
                treated: totals.treated.into(),
                control: totals.control().into(),
                log_likelihood_ratio: rollout.log_likelihood_ratio(),
                returns: ReturnsView {
                    expected: totals.returns.connects,
                    missing: totals.returns.failed,
                },
            },
            log_likelihood_ratio: rollout.log_likelihood_ratio(),
            steps: rollout.steps().iter().map(StepView::from).collect(),
        }
    }
}

impl From<Counts> for CountsView {
    fn from(Counts { connects, failed }: Counts) -> Self {
        Self { connects, failed }
    }
}

impl From<&Step> for StepView {
    fn from(step: &Step) -> Self {
        Self {
            at: step.at.to_rfc3339(),
            stage: step.stage,
            percent: step.percent,
            verdict: step.verdict.as_str(),
        }
    }
}

/// Release a blocked cohort in stages: the share that the rule admits rises on evidence
#[utoipa::path(
    post, path = "/api/v1/rules/{id}/release", tag = "rules", params(("id" = Uuid, Path)), request_body = Option<PlanDoc>,
    responses(
        (status = 201, description = "Started with the first stage", body = RolloutView),
        (status = 409, description = "The rule has a rollout that runs or is paused, or refuses no device", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn release_rule(
    caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    Id(id): Id<RuleId>,
    OptionalBody(plan): OptionalBody<Plan>,
) -> Result<(StatusCode, Json<RolloutView>), Problem> {
    plan.validate().map_err(invalid)?;
    needs_database(&api)?;
    let rules = api.state.rules.current();
    if let Some(unsupported) = rules.unsupported().iter().find(|rule| rule.id == id) {
        let why = format!("this version can't enforce the rule ({})", unsupported.problem);
        return Err(Problem::new(Code::Conflict, why));
    }
    let rule = rules
        .rules()
        .iter()
        .find(|rule| rule.id == id)
        .ok_or_else(no_such_rule)?;
    if rule.spec.is_harmless() || rule.is_expired(api.state.clock.wall()) {
        return Err(Problem::new(
            Code::Conflict,
            "the rule refuses no device: it has expired, is in dry-run mode or admits 100 %",
        ));
    }
    let before = api.state.store.rollout(id).await?;
    if before.as_ref().is_some_and(|before| !before.rollout.is_over()) {
        return Err(Problem::new(
            Code::Conflict,
            "the rule has a rollout that runs or is paused: resume or revert that one",
        ));
    }
    let devices = known(&api, &rule.spec).await?;
    let now = match &before {
        Some(before) => before.now,
        None => api.state.store.now().await?,
    };
    let rollout = Rollout::begin(Direction::Release, plan, rule.spec.admit_percent, devices, now).map_err(invalid)?;
    let view = RolloutView::of(id, &rollout);
    let write = RolloutWrite {
        rule: id,
        seen: before.map(|before| before.revision),
        rule_revision: rule.revision,
        rollout,
    };
    match step(&api, write, caller.audit(&api, "rollout.start")).await? {
        Stored::Yes => {}
        Stored::Changed(detail) => return Err(Problem::new(Code::Conflict, detail)),
    }
    Ok((StatusCode::CREATED, Json(view)))
}

/// The staged change of a rule: its state, evidence and steps
#[utoipa::path(
    get, path = "/api/v1/rules/{id}/rollout", tag = "rules", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The rollout", body = RolloutView),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn show_rollout(
    _caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    Id(id): Id<RuleId>,
) -> Result<Json<RolloutView>, Problem> {
    let stored = find(&api, id).await?;
    Ok(Json(RolloutView::of(id, &stored.rollout)))
}

/// Pause, resume or revert the staged change of a rule
#[utoipa::path(
    patch, path = "/api/v1/rules/{id}/rollout", tag = "rules", params(("id" = Uuid, Path)), request_body = PatchBody,
    responses(
        (status = 200, description = "The changed rollout", body = RolloutView),
        (status = 409, description = "It can't have this state now", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn change_rollout(
    caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    Id(id): Id<RuleId>,
    Body(patch): Body<PatchBody>,
) -> Result<Json<RolloutView>, Problem> {
    needs_database(&api)?;
    let mut attempts = 0;
    loop {
        attempts += 1;
        let StoredRollout {
            revision,
            mut rollout,
            rule_revision,
            now,
            ..
        } = find(&api, id).await?;
        let (changed, action) = match patch.state {
            Wanted::Paused => (rollout.pause(now), "rollout.pause"),
            Wanted::Running => (rollout.resume(now), "rollout.resume"),
            Wanted::Reverted => (rollout.revert(now), "rollout.revert"),
        };
        changed.map_err(|error: NotPossible| Problem::new(Code::Conflict, error.to_string()))?;
        let view = RolloutView::of(id, &rollout);
        let write = RolloutWrite {
            rule: id,
            seen: Some(revision),
            rule_revision,
            rollout,
        };
        match step(&api, write, caller.audit(&api, action)).await? {
            Stored::Yes => return Ok(Json(view)),
            Stored::Changed(detail) if attempts >= ATTEMPTS_MAX => return Err(Problem::new(Code::Conflict, detail)),
            Stored::Changed(_) => {}
        }
    }
}

/// Whether a step was stored.
enum Stored {
    Yes,
    /// Somebody else was faster.
    Changed(String),
}

/// Stores a step, and puts it in force on this node.
async fn step(api: &Api, write: RolloutWrite, audit: Audit) -> Result<Stored, Problem> {
    let gateway = Arc::clone(&api.state);
    let stored = api
        .carry_out(async move {
            let rule = gateway.store.rollout_step(write, &audit).await?;
            if let Some(rule) = &rule {
                apply(&gateway, Written::Rule(rule.clone())).await;
                let request = call::current_id();
                let by = author(&audit, &request);
                tell(&gateway, rule.id, Some(&rule.spec), by, "changed", false);
            }
            Ok::<_, StoreError>(rule.is_some())
        })
        .await?;
    match stored {
        Ok(true) => Ok(Stored::Yes),
        Ok(false) => Err(no_such_rule()),
        Err(StoreError::Conflict(detail)) => Ok(Stored::Changed(detail)),
        Err(error) => Err(error.into()),
    }
}

async fn find(api: &Api, id: RuleId) -> Result<StoredRollout, Problem> {
    let stored = api.state.store.rollout(id).await?;
    stored.ok_or_else(|| Problem::not_found("rollout"))
}

/// A staged change keeps its stages, its evidence and the node that drives it in the database. So no journal can keep
/// it: without the database a node would advance on its own evidence, or take a step that another node takes as well.
///
/// # Errors
/// The database is known to be away: the caller must not wait for it.
fn needs_database(api: &Api) -> Result<(), Problem> {
    if api.state.store.is_away() {
        let problem = "the database can't be reached, and a staged change has its evidence and its steps there: repeat this when it is back, or make a rule without stages";
        return Err(Problem::new(Code::DatabaseUnavailable, problem));
    }
    Ok(())
}

/// Matched devices that the cluster knows. 0 if none are.
pub(super) async fn known(api: &Api, spec: &RuleSpec) -> Result<u64, Problem> {
    let checked = Checked::of(api, spec, None).await?;
    Ok(checked.preview.known.max(checked.preview.connected))
}

/// The rollout of a rule that is made with one.
pub(super) async fn of_new(api: &Api, spec: &RuleSpec, plan: Plan) -> Result<Rollout, Problem> {
    if spec.admit_percent != 0 || spec.mode != Mode::Enforce {
        return Err(Problem::invalid(
            "rollout: the rule must have mode enforce and admit_percent 0, which is what a rollout leads to",
        ));
    }
    needs_database(api)?;
    let devices = known(api, spec).await?;
    let now = api.state.store.now().await?;
    Rollout::begin(Direction::Rollout, plan, 0, devices, now).map_err(invalid)
}

/// The plan in a request is not valid.
pub(super) fn invalid(error: PlanError) -> Problem {
    Problem::invalid(format!("{}: {error}", error.field()))
}

#[cfg(test)]
mod tests {
    use utoipa::PartialSchema as _;

    use super::*;

    #[test]
    fn the_documented_fields_are_those_of_a_plan() {
        let fields = |json: &serde_json::Value| {
            let mut fields: Vec<String> = json.as_object().unwrap().keys().cloned().collect();
            fields.sort();
            fields
        };
        let documented = serde_json::to_value(PlanDoc::schema()).unwrap();

        assert_eq!(
            fields(&documented["properties"]),
            fields(&serde_json::to_value(Plan::default()).unwrap())
        );
        let stages = documented.pointer("/properties/stages/default").unwrap();
        assert_eq!(*stages, serde_json::json!(Plan::STAGES_DEFAULT));
    }
}
