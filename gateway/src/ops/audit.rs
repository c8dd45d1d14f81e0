//! `/audit`: who changed what, newest first.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State};
use seawall_proto::time::WallTime;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Admin, Caller, Viewer},
    extract::{Body, Page, PageParams, Params, Span, SpanDoc},
    problem::{Problem, ProblemBody},
};
use crate::{
    events::format_time,
    store::{AUDIT_PRUNE_MAX, AuditRecord},
};

/// Minimum age of records that can be deleted: whoever misuses a token must not remove the traces at once.
const PRUNE_AGE_MIN: Duration = Duration::from_hours(24);

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
        .routes(routes!(list_audit))
        .routes(routes!(prune_audit))
}

/// One change.
#[derive(Debug, Serialize, ToSchema)]
pub struct AuditLine {
    /// Counts up; there may be gaps.
    seq: i64,
    /// RFC 3339.
    at: String,
    /// Name of the token.
    actor: String,
    /// `device.create`, `rule.delete`, `drain.start`, …
    action: String,
    /// What was changed: an id, or a word for what has none.
    subject: String,
    /// Never a secret or a hash.
    before: Option<Value>,
    /// Never a secret or a hash.
    after: Option<Value>,
}

impl From<AuditRecord> for AuditLine {
    fn from(record: AuditRecord) -> Self {
        Self {
            seq: record.seq,
            at: format_time(record.at),
            actor: record.actor,
            action: record.action,
            subject: record.subject,
            before: record.before,
            after: record.after,
        }
    }
}

/// Changes, newest first
#[utoipa::path(
    get, path = "/api/v1/audit", tag = "audit", params(PageParams),
    responses(
        (status = 200, description = "A page", body = Page<AuditLine>),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn list_audit(
    _caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    Params(params): Params<PageParams>,
) -> Result<Json<Page<AuditLine>>, Problem> {
    let page = api.state.store.audit_page(params.cursor()?, params.limit()?).await?;
    Ok(Json(Page {
        items: page.items.into_iter().map(AuditLine::from).collect(),
        next_cursor: page.next_cursor.map(|seq| seq.to_string()),
    }))
}

/// Which records to delete.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PruneBody {
    /// Minimum age: text such as `90d`, or seconds; at least a day.
    #[schema(value_type = SpanDoc)]
    older_than: Span,
}

/// What was deleted.
#[derive(Debug, Serialize, ToSchema)]
pub struct Pruned {
    deleted: u64,
    /// There may be more: call again.
    more: bool,
}

/// Delete old records of the audit log, at most 10,000 a call; that is recorded
#[utoipa::path(
    post, path = "/api/v1/audit/prune", tag = "audit", request_body = PruneBody,
    responses(
        (status = 200, description = "Deleted", body = Pruned),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn prune_audit(
    caller: Caller<Admin>,
    State(api): State<Arc<Api>>,
    Body(body): Body<PruneBody>,
) -> Result<Json<Pruned>, Problem> {
    let age = body.older_than.0;
    if age < PRUNE_AGE_MIN {
        return Err(Problem::invalid("older_than: at least a day"));
    }
    let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
    let before = WallTime::from_unix_ms(api.state.clock.wall().as_unix_ms().saturating_sub(age_ms));
    let audit = caller.audit(&api, "audit.prune");
    let store = api.state.store.clone();
    let deleted = api
        .carry_out(async move { store.audit_prune(before, &audit).await })
        .await??;
    Ok(Json(Pruned {
        deleted,
        more: deleted == u64::from(AUDIT_PRUNE_MAX),
    }))
}
