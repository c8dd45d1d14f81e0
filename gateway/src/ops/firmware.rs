//! `GET /firmware`: one row a cohort, that is, a model with a firmware version.

use std::{collections::BTreeMap, sync::Arc};

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
use crate::cohorts::Cohort;

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(list_cohorts))
}

/// What the devices of one cohort did on this node since it started.
#[derive(Debug, Serialize, ToSchema)]
pub struct CohortRow {
    /// `model/version`; `other`: devices that no row of its own is kept for.
    cohort: String,
    #[schema(value_type = Option<String>)]
    model: Option<Arc<str>>,
    #[schema(value_type = Option<String>)]
    firmware: Option<Arc<str>>,
    /// Sessions now.
    connected: usize,
    /// Attempts to connect by outcome; those that never happened are left out.
    attempts: BTreeMap<&'static str, u64>,
    /// Sessions of a device that had another session a short time before.
    repeats: u64,
    lookup: LookupCost,
    /// Always `closed`, that is, letting devices through: breakers of cohorts are not available yet.
    breaker: &'static str,
}

/// What a cohort's look-ups cost.
#[derive(Debug, Serialize, ToSchema)]
pub struct LookupCost {
    /// Devices looked up.
    keys: u64,
    /// Time that they waited for the database, in sum.
    seconds: f64,
    /// They cost so much more than the others' that they are sent apart, one statement at a time.
    apart: bool,
}

impl From<&Arc<Cohort>> for CohortRow {
    fn from(cohort: &Arc<Cohort>) -> Self {
        let (keys, seconds) = cohort.lookup_cost();
        Self {
            cohort: cohort.name(),
            model: cohort.model.clone(),
            firmware: cohort.firmware.clone(),
            connected: cohort.sessions(),
            attempts: cohort.attempts().into_iter().collect(),
            repeats: cohort.repeats(),
            lookup: LookupCost {
                keys,
                seconds,
                apart: cohort.is_costly(),
            },
            breaker: "closed",
        }
    }
}

/// Cohorts, those with most sessions first
///
/// The order changes while devices come and go: a row may be missing or come twice across pages.
#[utoipa::path(
    get, path = "/api/v1/firmware", tag = "firmware", params(PageParams),
    responses(
        (status = 200, description = "A page", body = Page<CohortRow>),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn list_cohorts(
    _caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    Params(params): Params<PageParams>,
) -> Result<Json<Page<CohortRow>>, Problem> {
    let rows = api.state.cohorts.rows();
    let numbered: Vec<_> = rows.iter().enumerate().collect();
    let page = Page::of_sorted(numbered, &params, |(number, _)| *number)?;
    Ok(Json(Page {
        items: page.items.into_iter().map(|(_, cohort)| cohort.into()).collect(),
        next_cursor: page.next_cursor,
    }))
}
