//! `GET /firmware`: one row per cohort, that is, a model with a firmware version.

use std::{collections::BTreeMap, sync::Arc};

use axum::{Json, extract::State};
use seawall_proto::cohorts::{Figure, Outcome, Rates, STATEMENT_PARTS, Window};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Caller, Viewer},
    extract::{Page, PageParams, Params},
    problem::{Problem, ProblemBody},
};
use crate::fleet::cohorts::Cohort;

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(list_cohorts))
}

/// Figures of one cohort on this node, since its start.
#[derive(Debug, Serialize, ToSchema)]
pub struct CohortRow {
    /// `model/version`; `other` for devices without a row of their own.
    cohort: String,
    #[schema(value_type = Option<String>)]
    model: Option<Arc<str>>,
    #[schema(value_type = Option<String>)]
    firmware: Option<Arc<str>>,
    /// Current sessions.
    connected: usize,
    /// Connect attempts by outcome. Outcomes that never happened are left out.
    attempts: BTreeMap<&'static str, u64>,
    /// Sessions of under 2 minutes that the device ended, and that began within 10 minutes of another one of it.
    repeats: u64,
    lookup: LookupCost,
    /// How far it stands out from the rest of the fleet, by its greatest score. From 1 on there is a proposal, if enough
    /// devices are concerned. 0: not at all.
    stands_out: f64,
    /// `closed`; `proposed` while a proposal about it is open; `open` while a rule of the breaker holds.
    breaker: &'static str,
    /// Rates of the last minute.
    minute: RatesView,
    /// Rates of the last hour.
    hour: RatesView,
    /// Its figures of the last minute relative to those of all other cohorts. 1: as the others.
    compared: Compared,
}

/// Rates of a cohort: averages in which recent events weigh more.
#[derive(Debug, Serialize, ToSchema)]
pub struct RatesView {
    /// Connect attempts per second, by outcome.
    attempts: BTreeMap<&'static str, f64>,
    /// Repeats per second: sessions of under 2 minutes that the device ended, within 10 minutes of another one.
    repeats: f64,
    /// Errors per second: sessions that broke the protocol or a limit, and refused credentials of known devices.
    errors: f64,
    /// Mean time from accept to the 101, in milliseconds. Null without admitted devices.
    connect_ms: Option<f64>,
    /// Devices looked up per second.
    lookups: f64,
    /// Statements per second that looked them up.
    statements: f64,
    /// Mean time that they waited for the database, in milliseconds. Null without lookups.
    lookup_ms: Option<f64>,
    /// Mean duration of the sessions that ended, in seconds. Null if none ended.
    session_seconds: Option<f64>,
    /// Messages from devices per second.
    messages: f64,
    /// Payload bytes per second, both directions.
    bytes: f64,
}

/// A cohort's figures divided by those of the rest of the fleet. Null if the rest has none.
#[derive(Debug, Serialize, ToSchema)]
pub struct Compared {
    /// Repeats per device.
    repeats: Option<f64>,
    /// Errors per device.
    errors: Option<f64>,
    /// Time of a lookup.
    lookup_ms: Option<f64>,
    /// Messages per device.
    messages: Option<f64>,
}

impl RatesView {
    fn of(rates: &Rates, window: Window) -> Self {
        let figure = |figure| rates.figure(figure, window);
        let attempts = Outcome::all()
            .map(|outcome| (outcome.as_str(), rounded(rates.outcome(outcome, window))))
            .filter(|(_, rate)| *rate > 0.0);
        let mean = |sum: f64, count: f64| (count > 0.0).then(|| rounded(sum / count / 1e3));
        let admitted = rates.outcome(Outcome::Admitted, window);
        Self {
            attempts: attempts.collect(),
            repeats: rounded(figure(Figure::Repeats)),
            errors: rounded(figure(Figure::Errors)),
            connect_ms: mean(figure(Figure::ConnectMicros), admitted),
            lookups: rounded(figure(Figure::LookupKeys)),
            statements: rounded(figure(Figure::StatementParts) / STATEMENT_PARTS as f64),
            lookup_ms: mean(figure(Figure::LookupMicros), figure(Figure::LookupKeys)),
            session_seconds: mean(figure(Figure::SessionMillis), figure(Figure::SessionsEnded)),
            messages: rounded(figure(Figure::Messages)),
            bytes: rounded(figure(Figure::Bytes)),
        }
    }
}

/// Rates of the last minute and sessions of all cohorts.
#[derive(Debug, Default)]
struct Fleet {
    sums: [f64; Figure::ALL.len()],
    sessions: usize,
}

impl Fleet {
    fn of(rows: &[Arc<Cohort>]) -> Self {
        rows.iter().fold(Self::default(), |mut fleet, row| {
            let rates = row.rates();
            for figure in Figure::ALL {
                fleet.sums[figure as usize] += rates.figure(figure, Window::Minute);
            }
            fleet.sessions += row.sessions();
            fleet
        })
    }

    fn compare(&self, row: &Cohort) -> Compared {
        let rates = row.rates();
        let own = |figure| rates.figure(figure, Window::Minute);
        let rest = |figure: Figure| (self.sums[figure as usize] - own(figure)).max(0.0);
        let devices = |count: usize| count.max(1) as f64;
        let (here, elsewhere) = (
            devices(row.sessions()),
            devices(self.sessions - row.sessions().min(self.sessions)),
        );
        let ratio = |own: f64, rest: f64| (rest > 1e-9).then(|| rounded(own / rest));
        let each = |figure| ratio(own(figure) / here, rest(figure) / elsewhere);
        let cost = |micros: f64, keys: f64| if keys > 1e-9 { micros / keys } else { 0.0 };
        Compared {
            repeats: each(Figure::Repeats),
            errors: each(Figure::Errors),
            lookup_ms: ratio(
                cost(own(Figure::LookupMicros), own(Figure::LookupKeys)),
                cost(rest(Figure::LookupMicros), rest(Figure::LookupKeys)),
            ),
            messages: each(Figure::Messages),
        }
    }
}

fn rounded(figure: f64) -> f64 {
    (figure * 1e3).round() / 1e3
}

/// Cost of a cohort's lookups.
#[derive(Debug, Serialize, ToSchema)]
pub struct LookupCost {
    /// Devices looked up.
    keys: u64,
    /// Statements that looked them up. A statement for devices of several cohorts counts in parts, by its devices.
    statements: f64,
    /// Sum of their waiting times for the database.
    seconds: f64,
    /// They cost far more than those of others, so they are isolated: one statement at a time.
    apart: bool,
}

/// State of a cohort's breaker, and how far it stands out.
type Judged = (&'static str, f64);

impl CohortRow {
    fn of(cohort: &Cohort, (breaker, stands_out): Judged, fleet: &Fleet) -> Self {
        let (keys, seconds, statements) = cohort.lookup_cost();
        let rates = cohort.rates();
        Self {
            cohort: cohort.name(),
            model: cohort.model.clone(),
            firmware: cohort.firmware.clone(),
            connected: cohort.sessions(),
            attempts: cohort.attempts().into_iter().collect(),
            repeats: cohort.figure(Figure::Repeats),
            lookup: LookupCost {
                keys,
                statements: rounded(statements),
                seconds,
                apart: cohort.is_costly(),
            },
            stands_out: rounded(stands_out),
            breaker,
            minute: RatesView::of(&rates, Window::Minute),
            hour: RatesView::of(&rates, Window::Hour),
            compared: fleet.compare(cohort),
        }
    }
}

/// Cohorts, those with a proposal or a rule of the breaker first, then those that stand out, then those with most
/// sessions
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
    let fleet = Fleet::of(&rows);
    let mut judged: Vec<(Judged, _)> = rows.iter().map(|row| (api.state.breaker.state(row), row)).collect();
    // Stable: otherwise in the order of sessions.
    judged.sort_by(|((left, left_out), _), ((right, right_out), _)| {
        let is_closed = |breaker: &str| breaker == "closed";
        let by_breaker = is_closed(left).cmp(&is_closed(right));
        by_breaker.then(right_out.total_cmp(left_out))
    });
    let numbered: Vec<_> = judged.into_iter().enumerate().collect();
    let page = Page::of_sorted(numbered, &params, |(number, _)| *number)?;
    let rows = page.items.into_iter();
    Ok(Json(Page {
        items: rows
            .map(|(_, (judged, row))| CohortRow::of(row, judged, &fleet))
            .collect(),
        next_cursor: page.next_cursor,
    }))
}
