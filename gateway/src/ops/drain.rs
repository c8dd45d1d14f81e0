//! `/drain`: start, show and cancel the drain of this gateway.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State, http::StatusCode};
use seawall_proto::{
    departures::{AlreadyDraining, DrainOrder, DrainState},
    time::WallTime,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Caller, Operator, Viewer},
    extract::{OptionalBody, Span, SpanDoc},
    node::SUBJECT,
    problem::{Code, Problem, ProblemBody},
    record_change,
};
use crate::{node::State as Gateway, store::Change};

/// Bounds of a drain's deadline. Same as those of the setting.
const DEADLINE: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_hours(24);
/// Maximum rate, in sessions per second. Same as that of the setting.
const RATE_MAX: f64 = 1_000_000.0;

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(start_drain, show_drain, cancel_drain))
}

/// The state of a drain.
#[derive(Debug, Serialize, ToSchema)]
pub struct DrainView {
    /// `idle`; `announced` (`/readyz` is 503, and devices are still admitted); `draining`; or `drained` (no session is
    /// left, and devices are refused).
    state: &'static str,
    /// Sessions left.
    left: usize,
    /// Sessions closed per second; 0 before the first one.
    rate: f64,
    /// Sessions when the first one was closed; null before that.
    total: Option<usize>,
    /// When the last session is closed at the latest, RFC 3339. Null without a drain.
    deadline: Option<String>,
    /// Time until the last session is closed at this rate, in seconds; null before the first one.
    eta_seconds: Option<f64>,
}

impl DrainView {
    pub fn of(gateway: &Gateway) -> Self {
        let (status, left) = (gateway.departures.drain_status(), gateway.sessions.len());
        Self {
            state: match status.state {
                DrainState::Idle => "idle",
                DrainState::Announced => "announced",
                DrainState::Draining => "draining",
                DrainState::Drained => "drained",
            },
            left,
            rate: status.rate_per_second,
            total: status.sessions,
            deadline: status.deadline.map(WallTime::to_rfc3339),
            eta_seconds: (status.rate_per_second > 0.0).then(|| left as f64 / status.rate_per_second),
        }
    }
}

/// Options of a drain. All of them are optional.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrainBody {
    /// Sessions closed per second. Default: the setting, or the measured capacity. More are closed if the deadline
    /// needs it.
    #[schema(exclusive_minimum = 0, maximum = 1_000_000)]
    rate_per_second: Option<f64>,
    /// Time until the last session is closed: text such as `10m`, or seconds; 1 second to 24 hours. Default: the
    /// setting.
    #[schema(value_type = Option<SpanDoc>)]
    deadline: Option<Span>,
}

/// Start a drain: new devices are refused, and sessions are closed at a pace with 1012
#[utoipa::path(
    post, path = "/api/v1/drain", tag = "drain", request_body = Option<DrainBody>,
    responses(
        (status = 201, description = "Started", body = DrainView),
        (status = 409, description = "A drain is running", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn start_drain(
    caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    OptionalBody(body): OptionalBody<DrainBody>,
) -> Result<(StatusCode, Json<DrainView>), Problem> {
    let current = api.state.settings.current();
    let config = &current.drain;
    let configured = (config.rate_per_second > 0).then(|| f64::from(config.rate_per_second));
    let order = DrainOrder {
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
            "deadline: expected more than drain.announce_seconds, which is {} s",
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
        gateway.departures.start_drain(order)?;
        record_change(&gateway, &audit, Change::to(SUBJECT, details)).await;
        Ok::<_, AlreadyDraining>(())
    })
    .await?
    .map_err(|error| Problem::new(Code::Conflict, error.to_string()))?;
    Ok((StatusCode::CREATED, Json(DrainView::of(&api.state))))
}

/// Show the drain
#[utoipa::path(
    get, path = "/api/v1/drain", tag = "drain",
    responses(
        (status = 200, description = "The state of the drain", body = DrainView),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn show_drain(_caller: Caller<Viewer>, State(api): State<Arc<Api>>) -> Json<DrainView> {
    Json(DrainView::of(&api.state))
}

/// Cancel the drain: sessions that are left stay, and devices are admitted again
#[utoipa::path(
    delete, path = "/api/v1/drain", tag = "drain",
    responses(
        (status = 200, description = "Cancelled", body = DrainView),
        (status = 409, description = "There is no drain", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn cancel_drain(caller: Caller<Operator>, State(api): State<Arc<Api>>) -> Result<Json<DrainView>, Problem> {
    let audit = caller.audit(&api, "drain.cancel");
    let gateway = Arc::clone(&api.state);
    let was_on = api
        .carry_out(async move {
            let was_on = gateway.departures.cancel_drain();
            if was_on {
                record_change(&gateway, &audit, Change::of(SUBJECT)).await;
            }
            was_on
        })
        .await?;
    if !was_on {
        return Err(Problem::new(Code::Conflict, "there is no drain to cancel"));
    }
    Ok(Json(DrainView::of(&api.state)))
}
