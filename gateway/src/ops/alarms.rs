//! `GET /alarms`: the active alarms of this node.

use std::{borrow::Cow, sync::Arc};

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Caller, Viewer},
    extract::{Page, PageParams, Params},
    problem::{Problem, ProblemBody},
};
use crate::fleet::alarms::Severity;

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(list_alarms))
}

/// An active alarm.
#[derive(Debug, Serialize, ToSchema)]
pub struct Alarm {
    /// As in events, the log and `/readyz`.
    kind: &'static str,
    /// The subject: `node`, or the name of a part of it.
    subject: String,
    /// `critical` (devices are refused, or data can be lost) or `warning`.
    severity: &'static str,
    /// RFC 3339.
    since: String,
    /// The problem, and what to do.
    detail: String,
    /// A command that repairs the cause or shows more of it, ready to paste.
    #[serde(skip_serializing_if = "Option::is_none")]
    action: Option<Cow<'static, str>>,
}

/// Active alarms of this node, critical ones first
#[utoipa::path(
    get, path = "/api/v1/alarms", tag = "nodes", params(PageParams),
    responses(
        (status = 200, description = "A page", body = Page<Alarm>),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn list_alarms(
    _caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    Params(params): Params<PageParams>,
) -> Result<Json<Page<Alarm>>, Problem> {
    let alarms = api
        .state
        .alarms
        .active()
        .into_iter()
        .map(|(kind, subject, alarm)| Alarm {
            kind,
            subject,
            severity: Severity::of(kind).as_str(),
            since: alarm.since.to_rfc3339(),
            detail: alarm.detail,
            action: alarm.action,
        });
    let page = Page::of_sorted(alarms.collect(), &params, |alarm| {
        format!("{}/{}/{}", alarm.severity, alarm.kind, alarm.subject)
    })?;
    Ok(Json(page))
}
