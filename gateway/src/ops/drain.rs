//! `/drain`: start, look at and cancel the drain of this gateway.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State, http::StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Caller, Operator, Viewer},
    extract::{OptionalBody, Span, SpanDoc},
    node::SUBJECT,
    problem::{Code, Problem, ProblemBody},
    write_down,
};
use crate::{
    drain::{AlreadyDraining, DrainState, Order},
    events::format_time,
    state::State as Gateway,
    store::Change,
};

/// Bounds of a drain's deadline; the same as of the setting.
const DEADLINE: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_hours(24);
/// Greatest rate; the same as of the setting.
const RATE_MAX: f64 = 1_000_000.0;

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(start_drain, show_drain, cancel_drain))
}

/// Where a drain stands.
#[derive(Debug, Serialize, ToSchema)]
pub struct DrainView {
    /// `idle`; `announced`: not ready, so that balancers turn away, and devices that come are let in; `draining`; or `drained`:
    /// nobody is left, and new devices are refused.
    state: &'static str,
    /// Sessions that are still here.
    left: usize,
    /// Sessions closed a second; 0 before the first is told to leave.
    rate: f64,
    /// Sessions when the first was told to leave; null before that.
    total: Option<usize>,
    /// When the last session has been told to leave, RFC 3339. Null without a drain.
    deadline: Option<String>,
    /// Time until the last session is told to leave at this rate, in seconds; null before the first is.
    eta_seconds: Option<f64>,
}

impl DrainView {
    pub fn of(gateway: &Gateway) -> Self {
        let status = gateway.drain.status(gateway.sessions.len());
        Self {
            state: match status.state {
                DrainState::Idle => "idle",
                DrainState::Announced => "announced",
                DrainState::Draining => "draining",
                DrainState::Drained => "drained",
            },
            left: status.left,
            rate: status.rate,
            total: status.total,
            deadline: status.deadline.map(format_time),
            eta_seconds: (status.rate > 0.0).then(|| status.left as f64 / status.rate),
        }
    }
}

/// How a drain shall go; all of it may be left out.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrainBody {
    /// Sessions closed a second. Default: the setting, or as many as admission could take back. More are closed where the deadline needs it.
    #[schema(exclusive_minimum = 0, maximum = 1_000_000)]
    rate_per_second: Option<f64>,
    /// When the last session has been told: text such as `10m`, or seconds; 1 second to 24 hours. Default: the setting.
    #[schema(value_type = Option<SpanDoc>)]
    deadline: Option<Span>,
}

/// Start: new devices are refused, and sessions are closed at a pace with 1012
#[utoipa::path(
    post, path = "/api/v1/drain", tag = "drain", request_body = Option<DrainBody>,
    responses(
        (status = 201, description = "Started", body = DrainView),
        (status = 409, description = "One is under way", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn start_drain(
    caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    OptionalBody(body): OptionalBody<DrainBody>,
) -> Result<(StatusCode, Json<DrainView>), Problem> {
    let config = &api.state.config.drain;
    let configured = (config.rate_per_second > 0).then(|| f64::from(config.rate_per_second));
    let order = Order {
        rate_per_second: body.rate_per_second.or(configured),
        announce: config.announce(),
        deadline: body.deadline.map_or_else(|| config.deadline(), |span| span.0),
    };
    if !order.rate_per_second.is_none_or(|rate| rate > 0.0 && rate <= RATE_MAX) {
        return Err(Problem::invalid(
            "rate_per_second: expected more than 0, up to 1,000,000",
        ));
    }
    if !DEADLINE.contains(&order.deadline) {
        return Err(Problem::invalid("deadline: expected 1s to 24h"));
    }
    if order.deadline <= order.announce {
        return Err(Problem::invalid(format!(
            "deadline: expected more than the {} s of drain.announce_seconds",
            order.announce.as_secs()
        )));
    }
    let details = serde_json::json!({
        "rate_per_second": order.rate_per_second,
        "deadline_seconds": order.deadline.as_secs(),
    });
    let audit = caller.audit(&api, "drain.start");
    let gateway = Arc::clone(&api.state);
    api.carry_out(async move {
        gateway.drain.start(order)?;
        write_down(&gateway, &audit, Change::to(SUBJECT, details)).await;
        Ok::<_, AlreadyDraining>(())
    })
    .await?
    .map_err(|error| Problem::new(Code::Conflict, error.to_string()))?;
    Ok((StatusCode::CREATED, Json(DrainView::of(&api.state))))
}

/// How far it is
#[utoipa::path(
    get, path = "/api/v1/drain", tag = "drain",
    responses(
        (status = 200, description = "Where it stands", body = DrainView),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn show_drain(_caller: Caller<Viewer>, State(api): State<Arc<Api>>) -> Json<DrainView> {
    Json(DrainView::of(&api.state))
}

/// Cancel: who is still here stays, and new devices are taken again
#[utoipa::path(
    delete, path = "/api/v1/drain", tag = "drain",
    responses(
        (status = 200, description = "Cancelled", body = DrainView),
        (status = 409, description = "There is none", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn cancel_drain(caller: Caller<Operator>, State(api): State<Arc<Api>>) -> Result<Json<DrainView>, Problem> {
    let audit = caller.audit(&api, "drain.cancel");
    let gateway = Arc::clone(&api.state);
    let was_on = api
        .carry_out(async move {
            let was_on = gateway.drain.cancel();
            if was_on {
                write_down(&gateway, &audit, Change::of(SUBJECT)).await;
            }
            was_on
        })
        .await?;
    if !was_on {
        return Err(Problem::new(Code::Conflict, "there is no drain to cancel"));
    }
    Ok(Json(DrainView::of(&api.state)))
}
