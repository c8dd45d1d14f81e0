//! `GET /firmware`: one row per cohort, that is, a model with a firmware version.

use std::{collections::BTreeMap, sync::Arc};

use axum::{Json, extract::State};
use seawall_proto::{
    cohort::CohortTag,
    cohorts::{Figure, Outcome, Rates, STATEMENT_PARTS, Window},
    id::Label,
    proving::{Tested, VersionState},
    rollout::Counts,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Caller, Operator, Viewer},
    extract::{Body, Page, PageParams, Params},
    problem::{Problem, ProblemBody},
};
use crate::{
    fleet::cohorts::{Cohort, name_of},
    store::StoredVersion,
};

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
        .routes(routes!(list_cohorts))
        .routes(routes!(clear_version))
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
    /// Test of a version that is new to the fleet. Null if the version is proven.
    version: Option<VersionView>,
    /// Rates of the last minute.
    minute: RatesView,
    /// Rates of the last hour.
    hour: RatesView,
    /// Its figures of the last minute relative to those of all other cohorts. 1: as the others.
    compared: Compared,
}

/// Test of a version that is new to the fleet: few of its devices are admitted at a time. Its figures are this node's.
#[derive(Debug, Serialize, ToSchema)]
pub struct VersionView {
    /// `unproven`: there is no verdict yet. `worse`: its devices fail more often than others.
    state: &'static str,
    /// Open sessions of under 2 minutes.
    young: u32,
    /// Maximum of `young`.
    room: u32,
    /// Attempts that were refused for lack of room.
    refused: u64,
    /// Devices have been refused for 15 minutes, without a verdict.
    waiting: bool,
    /// Sessions of the version that are too young to count, whether they are open or not.
    pending: VersionCounts,
    /// Sessions of the version that count.
    sessions: VersionCounts,
    /// Sessions of the same minutes that they are compared with.
    control: VersionCounts,
    /// 9.16 and more: worse. -3 and less: not worse. Between the two: not decided.
    log_likelihood_ratio: f64,
}

/// Sessions of a test. Those that the gateway, an operator or a newer session ended before 2 minutes are left out.
#[derive(Debug, Serialize, ToSchema)]
pub struct VersionCounts {
    began: u64,
    /// The device or its network ended them before 2 minutes.
    failed: u64,
}

impl From<Counts> for VersionCounts {
    fn from(counts: Counts) -> Self {
        Self {
            began: counts.connects,
            failed: counts.failed,
        }
    }
}

impl VersionView {
    /// The test of a cohort: of its model and version, otherwise of its version as devices without a model claim it.
    fn of(cohort: &Cohort, tested: &BTreeMap<CohortTag, Tested>) -> Option<Self> {
        let kind = cohort.kind();
        let is_rest = cohort.is_rest();
        let tested = tested.get(&kind.named).or_else(|| tested.get(&kind.unnamed));
        let tested = tested.filter(|_| !is_rest)?;
        Some(Self {
            state: tested.state.as_str(),
            young: tested.young,
            room: tested.room,
            refused: tested.refused,
            waiting: tested.is_waiting,
            pending: tested.pending.into(),
            sessions: tested.evidence.0.into(),
            control: tested.evidence.1.into(),
            log_likelihood_ratio: rounded(tested.log_likelihood_ratio),
        })
    }
}

/// A version whose test is ended.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ClearBody {
    /// As devices claim it; left out where they leave it to the registry.
    model: Option<String>,
    /// As devices claim it; left out for those that name none.
    firmware: Option<String>,
}

/// A version whose test was ended.
#[derive(Debug, Serialize, ToSchema)]
pub struct ClearedVersion {
    /// `model/version`.
    cohort: String,
    /// `unproven` or `worse`.
    before: &'static str,
    /// `proven`.
    state: &'static str,
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
    fn of(cohort: &Cohort, (breaker, stands_out): Judged, fleet: &Fleet, tested: &BTreeMap<CohortTag, Tested>) -> Self {
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
            version: VersionView::of(cohort, tested),
            minute: RatesView::of(&rates, Window::Minute),
            hour: RatesView::of(&rates, Window::Hour),
            compared: fleet.compare(cohort),
        }
    }
}

/// Cohorts, those with a proposal, a rule of the breaker or an unproven version first, then those that stand out, then
/// those with most sessions
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
    let (tested, _) = api.state.lookups.tested_versions();
    let tag = |version: &Tested| CohortTag::of(version.model.as_deref(), version.firmware.as_deref());
    let tested: BTreeMap<_, _> = tested.into_iter().map(|version| (tag(&version), version)).collect();
    let mut judged: Vec<(Judged, _)> = rows.iter().map(|row| (api.state.breaker.state(row), row)).collect();
    // Stable: otherwise in the order of sessions.
    judged.sort_by(|((left, left_out), left_row), ((right, right_out), right_row)| {
        let is_usual = |breaker: &str, row: &Cohort| breaker == "closed" && VersionView::of(row, &tested).is_none();
        let by_state = is_usual(left, left_row).cmp(&is_usual(right, right_row));
        by_state.then(right_out.total_cmp(left_out))
    });
    let numbered: Vec<_> = judged.into_iter().enumerate().collect();
    let page = Page::of_sorted(numbered, &params, |(number, _)| *number)?;
    let rows = page.items.into_iter();
    Ok(Json(Page {
        items: rows
            .map(|(_, (judged, row))| CohortRow::of(row, judged, &fleet, &tested))
            .collect(),
        next_cursor: page.next_cursor,
    }))
}

/// End the test of a firmware version: it is proven, and no longer limited
#[utoipa::path(
    post, path = "/api/v1/firmware/clear", tag = "firmware", request_body = ClearBody,
    responses(
        (status = 200, description = "The version. Other nodes follow within 10 s", body = ClearedVersion),
        (status = 404, description = "No such version is tested", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn clear_version(
    caller: Caller<Operator>,
    State(api): State<Arc<Api>>,
    Body(body): Body<ClearBody>,
) -> Result<Json<ClearedVersion>, Problem> {
    let label = |text: Option<&str>, field: &str| {
        let label = text.map(Label::parse).transpose();
        let label = label.map_err(|error| Problem::invalid(format!("{field}: {error}")))?;
        Ok::<_, Problem>(label.flatten())
    };
    let version = StoredVersion {
        model: label(body.model.as_deref(), "model")?,
        firmware: label(body.firmware.as_deref(), "firmware")?,
        state: VersionState::Proven,
    };
    let cohort = name_of(version.model.as_deref(), version.firmware.as_deref());
    let audit = caller.audit(&api, "firmware.clear");
    let (gateway, subject) = (Arc::clone(&api.state), cohort.clone());
    let cleared = api
        .carry_out(async move {
            let name = (version.model.as_deref(), version.firmware.as_deref());
            let before = gateway.store.version_clear(name, &subject, &audit).await?;
            if before.is_some() {
                gateway.lookups.handle_version(&version);
            }
            Ok::<_, Problem>(before)
        })
        .await??;
    let before = cleared.ok_or_else(|| Problem::not_found("firmware version under test"))?;
    Ok(Json(ClearedVersion {
        cohort,
        before: before.as_str(),
        state: VersionState::Proven.as_str(),
    }))
}
