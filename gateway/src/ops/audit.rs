//! `/audit`: the audit log, newest first.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State};
use seawall_proto::time::WallTime;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    Api,
    auth::{Admin, Caller, Viewer},
    extract::{Body, Page, PageParams, Params, Span, SpanDoc},
    problem::{Problem, ProblemBody},
};
use crate::store::{AUDIT_PRUNE_MAX, AuditRecord, TokenRow};

/// Maximum time until a revoked token is refused on every node.
const REVOKED_WITHIN: Duration = Duration::from_secs(5);

/// Minimum age of records that can be deleted, so that a stolen token can't remove its traces at once.
const PRUNE_AGE_MIN: Duration = Duration::from_hours(24);

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
        .routes(routes!(list_audit))
        .routes(routes!(prune_audit))
}

/// One change.
#[derive(Debug, Serialize, ToSchema)]
pub struct AuditLine {
    /// Rises with each record. There may be gaps.
    seq: i64,
    /// RFC 3339.
    at: String,
    /// When it reached the database, if it had to wait for it in a node's journal. RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    arrived_at: Option<String>,
    /// Name of the token.
    actor: String,
    /// Id of the token. Null for the admin token, for the gateway itself, and if it is not known any more.
    actor_id: Option<Uuid>,
    /// `device.create`, `rule.delete`, `drain.start`, …
    action: String,
    /// The changed object: its id, or a word for an object without one.
    subject: String,
    /// Never a secret or a hash.
    before: Option<Value>,
    /// Never a secret or a hash.
    after: Option<Value>,
}

impl AuditLine {
    fn of(record: AuditRecord, tokens: &[TokenRow]) -> Self {
        Self {
            seq: record.seq,
            actor_id: actor_id(&record.actor, record.at, tokens),
            at: record.at.to_rfc3339(),
            arrived_at: record.arrived_at.map(WallTime::to_rfc3339),
            actor: record.actor,
            action: record.action,
            subject: record.subject,
            before: record.before,
            after: record.after,
        }
    }
}

/// Returns the token that had this name at that time.
fn actor_id(name: &str, at: WallTime, tokens: &[TokenRow]) -> Option<Uuid> {
    let mut valid = tokens.iter().filter(|token| {
        let is_over = token.revoked_at.is_some_and(|end| end + REVOKED_WITHIN < at);
        token.name == name && token.created_at <= at && !is_over
    });
    match (valid.next(), valid.next()) {
        (Some(token), None) => Some(token.id),
        (None, _) | (Some(_), Some(_)) => None,
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
    let tokens = api.state.store.tokens().await?;
    Ok(Json(Page {
        items: page
            .items
            .into_iter()
            .map(|record| AuditLine::of(record, &tokens))
            .collect(),
        next_cursor: page.next_cursor.map(|seq| seq.to_string()),
    }))
}

/// The records to delete.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PruneBody {
    /// Minimum age: text such as `90d`, or seconds; at least a day.
    #[schema(value_type = SpanDoc)]
    older_than: Span,
}

/// The result of a deletion.
#[derive(Debug, Serialize, ToSchema)]
pub struct Pruned {
    deleted: u64,
    /// Whether there may be more records to delete. Then call again.
    more: bool,
}

/// Delete old records of the audit log, at most 10,000 per call; the deletion is recorded
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

#[cfg(test)]
mod tests {
    use seawall_proto::id::SecretHash;

    use super::*;

    #[test]
    fn actor_is_the_one_token_that_had_the_name_then() {
        let token = |id, name: &str, created, revoked: Option<u64>| TokenRow {
            id: Uuid::from_u128(id),
            name: name.to_owned(),
            role: None,
            sha256: SecretHash::of(b""),
            created_at: WallTime::from_unix_ms(created),
            revoked_at: revoked.map(WallTime::from_unix_ms),
        };
        let tokens = [
            token(1, "ci", 10, Some(1_000)),
            token(2, "ci", 20_000, None),
            token(3, "twin", 10, None),
            token(4, "twin", 10, None),
        ];
        let actor = |name, at| actor_id(name, WallTime::from_unix_ms(at), &tokens).map(|id| id.as_u128());

        assert_eq!((actor("ci", 500), actor("ci", 30_000)), (Some(1), Some(2)));
        assert_eq!(actor("ci", 5_000), Some(1), "another node had not heard of its end");
        assert_eq!(actor("ci", 10_000), None);
        assert_eq!((actor("twin", 500), actor("admin.token", 500)), (None, None));
    }
}
