//! What came of a load test: figures by run, phase and group, in JSON and for people.
//!
//! [`Report`] is the JSON. Its figures also have flat names ([`Report::figures`]), which thresholds use: those of the run `seawall` by
//! themselves (`t99_seconds`), those of a run, a phase of it and a group of devices in it behind their names
//! (`naive.storm.healthy.p99_ms`).

use std::{collections::BTreeMap, fmt::Write as _};

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::{
    scenario::{Action, FieldError, Scenario},
    threshold::{Figures, Outcome, Threshold},
};

/// The run whose figures also stand at the top.
pub const MAIN_RUN: &str = "seawall";
/// Greatest latency that a histogram tells apart: an hour, in microseconds.
const LATENCY_MAX_US: u64 = 3_600_000_000;

/// A load test, judged.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub scenario: String,
    pub about: String,
    pub seed: u64,
    pub devices: u32,
    pub started_at: String,
    pub passed: bool,
    /// Those of the run `seawall`.
    #[serde(flatten)]
    pub summary: Summary,
    pub thresholds: Vec<Outcome>,
    pub runs: Vec<Run>,
}

/// One server's way through all phases.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Run {
    pub name: String,
    #[serde(flatten)]
    pub summary: Summary,
    pub phases: Vec<PhaseReport>,
    pub samples: Vec<Second>,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct PhaseReport {
    pub name: String,
    pub action: String,
    pub starts_seconds: f64,
    pub seconds: f64,
    #[serde(flatten)]
    pub summary: Summary,
    pub groups: BTreeMap<String, Group>,
}

/// Figures of a phase, or of a whole run: then the first five are those of its last phase that drops all devices, or else of
/// its first that connects some, and the others of all its phases together.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    /// Time until 99 % of the devices that the phase disconnected, or connected first, are connected.
    pub t99_seconds: Option<f64>,
    /// The same for all of them. Devices that a rule refuses don't count.
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
    /// Look-ups of devices with slow firmware that reached the database.
    pub slow_lookups: f64,
    /// Memory of the server at the start, in bytes. None: it does not run here.
    pub rss_start_bytes: Option<f64>,
    pub rss_max_bytes: Option<f64>,
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
    /// From the time at which a device should have been connected until it was, refusals in between included. Devices that never were
    /// count with the time until the run ended; those that a rule refuses don't count.
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
}

/// A histogram for latencies: three significant digits, up to an hour.
#[must_use]
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_MAX_US, 3).expect("1 < an hour, and 3 digits are allowed")
}

impl Latency {
    #[must_use]
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let count = histogram.len();
        #[expect(clippy::cast_precision_loss, reason = "an hour of microseconds is far below 2^52")]
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

impl Summary {
    fn figures(&self) -> [(&'static str, Option<f64>); 17] {
        let ratio = |part: Option<f64>, whole: Option<f64>| Some(part? / whole?).filter(|ratio| ratio.is_finite());
        [
            ("t99_seconds", self.t99_seconds),
            ("t100_seconds", self.t100_seconds),
            ("optimum_seconds", self.optimum_seconds),
            ("t99_over_optimum", ratio(self.t99_seconds, self.optimum_seconds)),
            ("t100_over_optimum", ratio(self.t100_seconds, self.optimum_seconds)),
            ("attempts_per_device", self.attempts_per_device),
            ("statements", Some(self.statements)),
            ("in_flight_max", Some(self.in_flight_max)),
            ("limit", self.limit_max),
            ("over_limit", Some(self.over_limit)),
            ("queue_max", Some(self.queue_max)),
            ("lost_sessions", Some(self.lost_sessions)),
            ("missing", Some(self.missing)),
            ("slow_lookups", Some(self.slow_lookups)),
            ("rss_start_bytes", self.rss_start_bytes),
            ("rss_max_bytes", self.rss_max_bytes),
            ("rss_growth", ratio(self.rss_max_bytes, self.rss_start_bytes)),
        ]
    }
}

impl Group {
    fn figures(&self) -> impl Iterator<Item = (String, Option<f64>)> {
        let counts = [
            ("devices", self.devices),
            ("connected", self.connected),
            ("attempts", self.attempts),
            ("admitted", self.admitted),
            ("failed", self.failed),
            ("refused", self.refused.values().sum()),
            ("connects", self.latency.count),
        ];
        let latencies = [
            ("p50_ms", self.latency.p50_ms),
            ("p90_ms", self.latency.p90_ms),
            ("p99_ms", self.latency.p99_ms),
            ("p999_ms", self.latency.p999_ms),
            ("max_ms", self.latency.max_ms),
        ];
        let refused = seawall_proto::refusal::Code::ALL
            .into_iter()
            .map(|code| code.as_str())
            .map(|code| {
                (
                    format!("refused_{code}"),
                    Some(count(self.refused.get(code).copied().unwrap_or(0))),
                )
            });
        counts
            .into_iter()
            .map(|(name, value)| (name.to_owned(), Some(count(value))))
            .chain(latencies.into_iter().map(|(name, value)| (name.to_owned(), value)))
            .chain(refused)
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of a load test are far below 2^52")]
fn count(value: u64) -> f64 {
    value as f64
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
        Self {
            scenario: scenario.name.clone(),
            about: scenario.about.clone(),
            seed: scenario.seed,
            devices: scenario.devices,
            started_at,
            passed: outcomes.iter().all(|outcome| outcome.passed),
            summary,
            thresholds: outcomes,
            runs,
        }
    }

    /// Every figure by its flat name.
    #[must_use]
    pub fn figures(&self) -> Figures {
        figures(&self.runs)
    }

    /// The report for people.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        // Writing to a String can't fail.
        let _ = self.write_text(&mut text);
        text
    }

    fn write_text(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "{}: {} devices, seed {}", self.scenario, self.devices, self.seed)?;
        writeln!(out, "{}", self.about)?;
        for run in &self.runs {
            let s = &run.summary;
            writeln!(out, "\nrun {}", run.name)?;
            writeln!(
                out,
                "  t99 {}  t100 {}  optimum {}  attempts/device {}  statements {:.0}",
                seconds(s.t99_seconds),
                seconds(s.t100_seconds),
                seconds(s.optimum_seconds),
                s.attempts_per_device
                    .map_or_else(|| "-".to_owned(), |figure| format!("{figure:.2}")),
                s.statements,
            )?;
            writeln!(
                out,
                "  in flight {:.0} at most, limit {}  queue {:.0}  lost sessions {:.0}  missing {:.0}  memory {} -> {}",
                s.in_flight_max,
                s.limit_max
                    .map_or_else(|| "none".to_owned(), |limit| format!("{limit:.0}")),
                s.queue_max,
                s.lost_sessions,
                s.missing,
                megabytes(s.rss_start_bytes),
                megabytes(s.rss_max_bytes),
            )?;
            writeln!(
                out,
                "  {:<16} {:<12} {:>7} {:>9} {:>9} {:>9} {:>8} {:>7} {:>10} {:>10} {:>10}",
                "phase",
                "group",
                "seconds",
                "connected",
                "attempts",
                "admitted",
                "refused",
                "failed",
                "p50 ms",
                "p99 ms",
                "max ms"
            )?;
            for phase in &run.phases {
                for (name, group) in &phase.groups {
                    writeln!(
                        out,
                        "  {:<16} {:<12} {:>7.1} {:>9} {:>9} {:>9} {:>8} {:>7} {:>10} {:>10} {:>10}",
                        phase.name,
                        name,
                        phase.seconds,
                        group.connected,
                        group.attempts,
                        group.admitted,
                        group.refused.values().sum::<u64>(),
                        group.failed,
                        millis(group.latency.p50_ms),
                        millis(group.latency.p99_ms),
                        millis(group.latency.max_ms),
                    )?;
                }
            }
        }
        writeln!(out, "\nthresholds")?;
        for outcome in &self.thresholds {
            writeln!(
                out,
                "  {} {}   ({} against {})",
                if outcome.passed { "ok    " } else { "FAILED" },
                outcome.expression,
                figure(outcome.left),
                figure(outcome.right),
            )?;
        }
        writeln!(out, "\n{}", if self.passed { "passed" } else { "FAILED" })
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
    let phases: Vec<PhaseReport> = scenario
        .phases
        .iter()
        .map(|phase| PhaseReport {
            name: phase.name.clone(),
            groups: groups.clone(),
            ..PhaseReport::default()
        })
        .collect();
    scenario
        .run_names()
        .into_iter()
        .map(|name| Run {
            name: name.to_owned(),
            phases: phases.clone(),
            ..Run::default()
        })
        .collect()
}

/// The phase that speaks for a run's return times: see [`Summary`].
#[must_use]
pub fn leading_phase(scenario: &Scenario) -> Option<usize> {
    let is_storm = |action: &Action| *action == Action::DropAll;
    let phases = &scenario.phases;
    phases.iter().rposition(|phase| is_storm(&phase.action)).or_else(|| {
        phases
            .iter()
            .position(|phase| matches!(phase.action, Action::Connect { .. }))
    })
}

fn figures(runs: &[Run]) -> Figures {
    let mut figures = Figures::new();
    for run in runs {
        for (name, value) in run.summary.figures() {
            if run.name == MAIN_RUN {
                figures.insert(name.to_owned(), value);
            }
            figures.insert(format!("{}.{name}", run.name), value);
        }
        for phase in &run.phases {
            let prefix = format!("{}.{}", run.name, phase.name);
            for (name, value) in phase.summary.figures() {
                figures.insert(format!("{prefix}.{name}"), value);
            }
            for (group, figures_of) in &phase.groups {
                for (name, value) in figures_of.figures() {
                    figures.insert(format!("{prefix}.{group}.{name}"), value);
                }
            }
        }
    }
    figures
}

fn seconds(value: Option<f64>) -> String {
    value.map_or_else(|| "never".to_owned(), |value| format!("{value:.2} s"))
}

fn millis(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1}"))
}

fn megabytes(value: Option<f64>) -> String {
    value.map_or_else(|| "?".to_owned(), |value| format!("{:.1} MiB", value / 1024.0 / 1024.0))
}

fn figure(value: Option<f64>) -> String {
    value.map_or_else(
        || "not reached".to_owned(),
        |value| {
            if value.fract() == 0.0 {
                format!("{value:.0}")
            } else {
                format!("{value:.3}")
            }
        },
    )
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
