//! What came of a load test: figures by run, phase and group, in JSON and for people.
//!
//! [`Report`] is the JSON. Its figures also have flat names ([`Report::figures`]), which thresholds use: those of the run `seawall` by
//! themselves (`t99_seconds`), those of a run, a phase of it and a group of devices in it behind their names
//! (`naive.storm.healthy.p99_ms`).

mod figures;
mod text;
mod watch;

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::Serialize;

use self::figures::figures;
pub use self::watch::{Drift, Presence, Spread};
use crate::{
    baseline::Judged,
    exit::Exit,
    generator::Generator,
    scenario::{Action, FieldError, Scenario},
    threshold::{Figures, Outcome, Threshold},
};

/// The run whose figures also stand at the top.
pub const MAIN_RUN: &str = "seawall";
/// The run of the naive server.
pub const NAIVE_RUN: &str = "naive";
/// Greatest latency that a histogram tells apart: six hours, in microseconds.
const LATENCY_MAX_US: u64 = 21_600_000_000;

/// What a load test came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// All thresholds hold, and no figure is worse than the baseline.
    #[default]
    Passed,
    Failed,
    /// The generator was the limit: the figures say nothing about the server.
    Inconclusive,
    /// The run was stopped before its end.
    Stopped,
}

/// A load test, judged. docs/report.schema.json describes its JSON.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    pub scenario: String,
    pub about: String,
    pub seed: u64,
    pub devices: u32,
    pub started_at: String,
    pub passed: bool,
    pub verdict: Verdict,
    /// Why the run was stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// Why the generator was the limit.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub inconclusive: Vec<String>,
    /// Version of `loadtest`.
    pub version: &'static str,
    /// The command that repeats it. It holds no secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Device address of the gateway that ran already.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Figures of the run `seawall`.
    #[serde(flatten)]
    pub summary: Summary,
    pub thresholds: Vec<Outcome>,
    /// Thresholds on figures that this way of testing doesn't have.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_judged: Vec<String>,
    /// Comparison with earlier runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<Judged>,
    /// Where the time was virtual: what else is to be known of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub simulation: Option<Simulation>,
    pub runs: Vec<Run>,
}

/// What there is to know of a simulation besides its figures.
#[derive(Clone, Debug, Serialize)]
pub struct Simulation {
    pub nodes: u8,
    pub virtual_seconds: f64,
    pub events: u64,
    /// A hash of all events: two simulations with the same were the same.
    pub trace: String,
    /// Most attempts of a single device until it was connected.
    pub attempts_max: u16,
}

/// One server's way through all phases.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Run {
    pub name: String,
    #[serde(flatten)]
    pub summary: Summary,
    pub phases: Vec<PhaseReport>,
    pub samples: Vec<Second>,
    /// Why it was stopped before its end.
    #[serde(skip)]
    pub stopped: Option<String>,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct PhaseReport {
    pub name: String,
    pub action: String,
    pub starts_seconds: f64,
    pub seconds: f64,
    #[serde(flatten)]
    pub summary: Summary,
    /// None: time was virtual.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drift: Option<Drift>,
    /// What the generator itself did. None: time was virtual.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generator: Option<Generator>,
    pub groups: BTreeMap<String, Group>,
}

/// Figures of a phase, or of a whole run: then the first five are those of its last phase that drops all devices, or else of
/// its first that connects some, and the others of all its phases together.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Time until 99 % of the devices that the phase disconnected, or connected first, are connected.
    pub t99_seconds: Option<f64>,
    /// The same for all of them. Devices that a rule refuses are left out.
    pub t100_seconds: Option<f64>,
    /// Their number, divided by the look-ups per second that the server can do.
    pub optimum_seconds: Option<f64>,
    /// Connection attempts of each of them, on average.
    pub attempts_per_device: Option<f64>,
    /// Look-up statements sent to the database meanwhile.
    pub statements: f64,
    /// Most look-ups that were sent to the database and not answered.
    pub in_flight_max: f64,
    /// Greatest limit that the server had for them. None: it has no limit.
    pub limit_max: Option<f64>,
    /// Samples in which more were in flight than the limit allows.
    pub over_limit: f64,
    /// Most devices that waited for a look-up.
    pub queue_max: f64,
    /// Sessions that ended without a reason of ours: neither dropped by the test, nor evicted by a rule.
    pub lost_sessions: f64,
    /// Devices without a connection at the end that should have one.
    pub missing: f64,
    /// Look-ups of devices with slow firmware that reached the database. None: they stand in the log of one that isn't ours.
    pub slow_lookups: Option<f64>,
    /// Memory of the server at the start, in bytes. None: it does not run here.
    pub rss_start_bytes: Option<f64>,
    pub rss_max_bytes: Option<f64>,
    /// None: the scenario has no `[presence]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence: Option<Presence>,
}

/// Devices that run certain versions, in one phase.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Group {
    /// Devices in it when the phase ended.
    pub devices: u64,
    pub connected: u64,
    pub attempts: u64,
    pub admitted: u64,
    /// Refusals by code; codes that never came are left out.
    pub refused: BTreeMap<&'static str, u64>,
    /// Attempts without an answer: refused or reset by TCP, timed out, or not HTTP.
    pub failed: u64,
    /// Messages that they sent of their own accord.
    pub sent: u64,
    /// Messages that were acknowledged.
    pub acked: u64,
    /// From the time at which a device should have been connected until it was, refusals in between included. Devices that never were
    /// count with the time until the run ended; those that a rule refuses are left out.
    pub latency: Latency,
}

/// Percentiles of a histogram with two significant digits or better, in milliseconds. None without a single value.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Latency {
    pub count: u64,
    pub p50_ms: Option<f64>,
    pub p90_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    pub p999_ms: Option<f64>,
    pub max_ms: Option<f64>,
}

/// One second of a run. Gauges are the greatest value in it.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Second {
    pub at_seconds: f64,
    pub connected: u64,
    pub attempts: u64,
    pub admitted: u64,
    pub refused: u64,
    pub failed: u64,
    pub in_flight: f64,
    pub limit: Option<f64>,
    pub queue: f64,
    pub statements: f64,
    pub rss_bytes: Option<u64>,
    /// Open files and sockets of the server, and its threads.
    pub handles: Option<u64>,
    pub threads: Option<u64>,
    /// Devices that were due and connected, and the sum of their times.
    pub connects: u64,
    pub connect_ms: f64,
    /// Devices that the server calls online beyond those that are.
    pub presence_error: Option<f64>,
    /// Devices back, of those that a phase waits for.
    pub returned: u64,
    /// Hints of slots: how many, and their sum in seconds.
    pub hints: u64,
    pub hint_seconds: f64,
    /// Keys per second that slots are given out by.
    pub k_ref: Option<f64>,
}

impl Second {
    /// A slot was given out, that far ahead.
    pub fn add_hint(&mut self, seconds: f64) {
        self.hints += 1;
        self.hint_seconds += seconds;
    }
}

/// A histogram for latencies: three significant digits, up to six hours: ten million simulated devices take longer than one.
#[must_use]
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_MAX_US, 3).expect("1 < six hours, and 3 digits are allowed")
}

impl Latency {
    #[must_use]
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let count = histogram.len();
        #[expect(clippy::cast_precision_loss, reason = "hours of microseconds is far below 2^52")]
        let at = |quantile: f64| (count > 0).then(|| histogram.value_at_quantile(quantile) as f64 / 1000.0);
        Self {
            count,
            p50_ms: at(0.5),
            p90_ms: at(0.9),
            p99_ms: at(0.99),
            p999_ms: at(0.999),
            max_ms: at(1.0),
        }
    }
}

impl Verdict {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "FAILED",
            Self::Inconclusive => "INCONCLUSIVE",
            Self::Stopped => "STOPPED",
        }
    }

    /// How the program ends with it.
    #[must_use]
    pub const fn exit(self) -> Exit {
        match self {
            Self::Passed => Exit::Held,
            Self::Failed => Exit::Missed,
            Self::Inconclusive => Exit::Inconclusive,
            Self::Stopped => Exit::Stopped,
        }
    }
}

impl Report {
    /// Judges the runs.
    #[must_use]
    pub fn new(scenario: &Scenario, thresholds: &[Threshold], started_at: String, runs: Vec<Run>) -> Self {
        let figures = figures(&runs);
        let outcomes: Vec<Outcome> = thresholds.iter().map(|threshold| threshold.judge(&figures)).collect();
        let summary = runs
            .iter()
            .find(|run| run.name == MAIN_RUN)
            .map(|run| run.summary.clone())
            .unwrap_or_default();
        let mut report = Self {
            scenario: scenario.name.clone(),
            about: scenario.about.clone(),
            seed: scenario.seed,
            devices: scenario.devices,
            started_at,
            version: env!("CARGO_PKG_VERSION"),
            stopped: runs.iter().find_map(|run| run.stopped.clone()),
            summary,
            thresholds: outcomes,
            runs,
            ..Self::default()
        };
        report.conclude();
        report
    }

    /// Draws the verdict. A run that was stopped, or whose generator was the limit, is not judged by its thresholds.
    pub fn conclude(&mut self) {
        let holds = self.thresholds.iter().all(|outcome| outcome.passed)
            && !self.baseline.as_ref().is_some_and(Judged::is_regressed);
        self.verdict = if self.stopped.is_some() {
            Verdict::Stopped
        } else if !self.inconclusive.is_empty() {
            Verdict::Inconclusive
        } else if holds {
            Verdict::Passed
        } else {
            Verdict::Failed
        };
        self.passed = self.verdict == Verdict::Passed;
    }

    /// Every figure by its flat name.
    #[must_use]
    pub fn figures(&self) -> Figures {
        figures(&self.runs)
    }
}

/// # Errors
/// A threshold names a figure that the scenario's report will not have.
pub fn check_names(scenario: &Scenario, thresholds: &[Threshold]) -> Result<(), FieldError> {
    let known = figures(&outline(scenario));
    for threshold in thresholds {
        for name in threshold.figures() {
            if !known.contains_key(name) {
                return Err(FieldError {
                    field: "thresholds".to_owned(),
                    problem: format!("no figure `{name}` in `{threshold}`: see docs/SCENARIOS.md for their names"),
                });
            }
        }
    }
    Ok(())
}

/// What the runs of a scenario will look like, without any figures.
fn outline(scenario: &Scenario) -> Vec<Run> {
    let groups: BTreeMap<String, Group> = scenario
        .group_names()
        .map(|name| (name.to_owned(), Group::default()))
        .collect();
    let summary = Summary {
        presence: scenario.presence.map(|_| Presence::default()),
        ..Summary::default()
    };
    let phases: Vec<PhaseReport> = scenario
        .phases
        .iter()
        .map(|phase| PhaseReport {
            name: phase.name.clone(),
            summary: summary.clone(),
            groups: groups.clone(),
            ..PhaseReport::default()
        })
        .collect();
    scenario
        .run_names()
        .into_iter()
        .map(|name| Run {
            name: name.to_owned(),
            summary: summary.clone(),
            phases: phases.clone(),
            ..Run::default()
        })
        .collect()
}

/// The phase that speaks for a run's return times: see [`Summary`].
#[must_use]
pub fn leading_phase(scenario: &Scenario) -> Option<usize> {
    let is_storm = |action: &Action| matches!(action, Action::DropAll | Action::Drop { .. });
    let phases = &scenario.phases;
    phases.iter().rposition(|phase| is_storm(&phase.action)).or_else(|| {
        phases
            .iter()
            .position(|phase| matches!(phase.action, Action::Connect { .. }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latency_is_told_in_milliseconds() {
        let mut values = histogram();
        for us in 1..=1000 {
            values.record(us * 1000).unwrap();
        }

        let latency = Latency::of(&values);

        assert_eq!(latency.count, 1000);
        assert!((latency.p99_ms.unwrap() - 990.0).abs() < 2.0, "{latency:?}");
        assert!(Latency::of(&histogram()).p99_ms.is_none());
    }

    #[test]
    fn figures_of_the_main_run_stand_at_the_top_too() {
        let group = Group {
            refused: BTreeMap::from([("overloaded", 3)]),
            ..Group::default()
        };
        let phase = PhaseReport {
            name: "storm".to_owned(),
            groups: BTreeMap::from([("all".to_owned(), group)]),
            ..PhaseReport::default()
        };
        let summary = Summary {
            t99_seconds: Some(3.0),
            optimum_seconds: Some(2.0),
            ..Summary::default()
        };
        let runs = ["naive", MAIN_RUN].map(|name| Run {
            name: name.to_owned(),
            summary: summary.clone(),
            phases: vec![phase.clone()],
            samples: Vec::new(),
            stopped: None,
        });

        let figures = figures(&runs);

        assert_eq!(figures["t99_over_optimum"], Some(1.5));
        assert_eq!(figures["naive.t99_seconds"], Some(3.0));
        assert_eq!(figures["t100_seconds"], None);
        assert_eq!(figures["seawall.storm.all.refused_overloaded"], Some(3.0));
        assert_eq!(figures["seawall.storm.all.refused_draining"], Some(0.0));
        assert_eq!(figures["naive.storm.all.refused"], Some(3.0));
    }
}
