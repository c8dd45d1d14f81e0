//! `GET /audit`: who changed what, newest first.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Caller, Viewer},
    extract::{Page, PageParams, Params},
    problem::{Problem, ProblemBody},
};
use crate::{events::format_time, store::AuditRecord};

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(list_audit))
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
