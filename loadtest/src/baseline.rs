//! A run against earlier runs of the same scenario: what has become worse, beyond the tolerance and the noise.
//!
//! [`Baseline`] is read before the run, and [`Baseline::judge`] decides. docs/SCENARIOS.md states the rule.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde_json::Value;

use crate::{
    compare::read_bounded,
    report::{MAIN_RUN, Report},
    scenario::{Executor, Scenario},
};

/// Runs that a figure needs in the baseline: from fewer, nothing is known about its noise.
pub const RUNS_MIN: usize = 3;
/// Most runs of a baseline.
const RUNS_MAX: usize = 100;
/// Figures at the top of a report that are judged, where less is better. With them are the `p99_ms` of each phase.
const FIGURES: [&str; 7] = [
    "t99_seconds",
    "t100_seconds",
    "attempts_per_device",
    "statements",
    "lost_sessions",
    "missing",
    "rss_max_bytes",
];

/// Earlier runs.
#[derive(Clone, Debug)]
pub struct Baseline {
    runs: Vec<BTreeMap<String, Option<f64>>>,
    tolerance: f64,
}

/// A run, compared with its baseline.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Judged {
    pub runs: usize,
    /// What a figure may be above the median of the baseline, as a part of it.
    pub tolerance: f64,
    pub figures: Vec<Figure>,
}

/// One figure of both.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    pub figure: String,
    /// `None`: not reached.
    pub value: Option<f64>,
    /// Of the baseline. `None`: no run of it has the figure.
    pub median: Option<f64>,
    /// A greater value is a regression. `None`: not judged.
    pub bound: Option<f64>,
    pub result: Outcome,
    /// Why it is not judged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Held,
    Regressed,
    NotJudged,
}

impl Baseline {
    /// Reads reports that `--json` wrote, one in a file or several in an array.
    ///
    /// # Errors
    /// A file can't be read, or has a report that this scenario's can't be compared with.
    pub fn read(
        files: &[PathBuf],
        tolerance: f64,
        scenario: &Scenario,
        executor: Executor,
        has_target: bool,
    ) -> Result<Self> {
        ensure!(
            tolerance.is_finite() && tolerance >= 0.0,
            "--tolerance: expected a part such as 0.1"
        );
        let mut runs = Vec::new();
        for file in files {
            let found = reports(file)?;
            for report in &found {
                check(report, scenario, executor, has_target)
                    .with_context(|| format!("--baseline: {}", file.display()))?;
                runs.push(figures_of(report));
            }
        }
        ensure!(runs.len() <= RUNS_MAX, "--baseline: at most {RUNS_MAX} runs");
        ensure!(!runs.is_empty(), "--baseline: there is no run in it");
        Ok(Self { runs, tolerance })
    }

    /// Compares a report with it.
    #[must_use]
    pub fn judge(&self, report: &Report) -> Judged {
        // The figures of both are read in the same way. A report always has a JSON form.
        let values = figures_of(&serde_json::to_value(report).unwrap_or_default());
        let figures = values
            .into_iter()
            .filter_map(|(figure, value)| self.figure(figure, value))
            .collect();
        Judged {
            runs: self.runs.len(),
            tolerance: self.tolerance,
            figures,
        }
    }

    /// `None`: neither side has it.
    fn figure(&self, figure: String, value: Option<f64>) -> Option<Figure> {
        let mut known: Vec<f64> = self
            .runs
            .iter()
            .filter_map(|run| run.get(&figure).copied().flatten())
            .collect();
        known.sort_by(f64::total_cmp);
        if known.is_empty() && value.is_none() {
            return None;
        }
        let median = known.get(known.len() / 2).copied().map(|upper| {
            let lower = known.get(known.len().saturating_sub(1) / 2).copied().unwrap_or(upper);
            f64::midpoint(lower, upper)
        });
        let not_judged = |why: String| Figure {
            figure: figure.clone(),
            value,
            median,
            bound: None,
            result: Outcome::NotJudged,
            why: Some(why),
        };
        let (Some(median_of), Some(best), Some(worst)) = (median, known.first(), known.last()) else {
            return Some(not_judged("no run of the baseline has it".to_owned()));
        };
        if known.len() < RUNS_MIN {
            return Some(not_judged(format!(
                "{} of the {RUNS_MIN} runs that tell noise from change",
                known.len()
            )));
        }
        let bound = (median_of * (1.0 + self.tolerance)).max(worst + (worst - best));
        let has_gaps = known.len() < self.runs.len();
        let result = match value {
            Some(value) if value <= bound => Outcome::Held,
            None if has_gaps => {
                return Some(not_judged(
                    "it was not always reached in the baseline either".to_owned(),
                ));
            }
            Some(_) | None => Outcome::Regressed,
        };
        Some(Figure {
            figure,
            value,
            median,
            bound: Some(bound),
            result,
            why: None,
        })
    }
}

fn reports(file: &Path) -> Result<Vec<Value>> {
    let value: Value = read_bounded(file).context("--baseline")?;
    Ok(value.as_array().cloned().unwrap_or_else(|| vec![value]))
}

/// Whether a report of the baseline is of the same test.
fn check(report: &Value, scenario: &Scenario, executor: Executor, has_target: bool) -> Result<()> {
    let name = report.get("scenario").and_then(Value::as_str);
    let name = name.context("it is not a report: it names no scenario")?;
    ensure!(name == scenario.name, "it is of the scenario {name}");
    let devices = report.get("devices").and_then(Value::as_u64).unwrap_or(0);
    ensure!(
        devices == u64::from(scenario.devices),
        "it is of {devices} devices, and this run has {}",
        scenario.devices
    );
    let was_simulated = report.get("simulation").is_some();
    ensure!(
        was_simulated == (executor == Executor::Simulate),
        "one of both is simulated, the other real"
    );
    ensure!(
        report.get("target").is_some() == has_target,
        "one of both is of a gateway that ran already, the other of one that loadtest started"
    );
    match report.get("verdict").and_then(Value::as_str) {
        Some(verdict @ ("inconclusive" | "stopped")) => bail!("its run was {verdict}: leave it out"),
        _ => Ok(()),
    }
}

/// The judged figures of a report, by the names that thresholds use.
fn figures_of(report: &Value) -> BTreeMap<String, Option<f64>> {
    let mut figures: BTreeMap<String, Option<f64>> = FIGURES
        .iter()
        .map(|name| ((*name).to_owned(), report.get(name).and_then(Value::as_f64)))
        .collect();
    let list = |value: &Value, name: &str| value.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
    for run in list(report, "runs") {
        if run.get("name").and_then(Value::as_str) != Some(MAIN_RUN) {
            continue;
        }
        for phase in list(&run, "phases") {
            let name = phase.get("name").and_then(Value::as_str).unwrap_or_default();
            let p99 = phase.pointer("/groups/all/latency/p99_ms").and_then(Value::as_f64);
            figures.insert(format!("{MAIN_RUN}.{name}.all.p99_ms"), p99);
        }
    }
    figures
}

impl Judged {
    #[must_use]
    pub fn is_regressed(&self) -> bool {
        self.figures.iter().any(Figure::is_regressed)
    }

    /// The rule, in words.
    #[must_use]
    pub fn rule(&self) -> String {
        format!(
            "{} earlier runs. A figure is worse if it is more than {:.0} % above their median, and further above the worst of them than \
             they differ among each other.",
            self.runs,
            self.tolerance * 100.0
        )
    }
}

impl Figure {
    #[must_use]
    pub fn is_regressed(&self) -> bool {
        self.result == Outcome::Regressed
    }

    #[must_use]
    pub fn result_text(&self) -> String {
        match (self.result, &self.why) {
            (Outcome::Held, _) => "ok".to_owned(),
            (Outcome::Regressed, _) => "WORSE".to_owned(),
            (Outcome::NotJudged, why) => format!("not judged: {}", why.as_deref().unwrap_or_default()),
        }
    }
}

impl fmt::Display for Judged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "baseline: {}", self.rule())?;
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
        for figure in &self.figures {
            writeln!(
                f,
                "  {:<36} {:>14}  median {:>14}  bound {:>14}  {}",
                figure.figure,
                number(figure.value),
                number(figure.median),
                number(figure.bound),
                figure.result_text()
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Summary;

    fn baseline(t99: &[Option<f64>]) -> Baseline {
        let runs = t99.iter().map(|t99| BTreeMap::from([("t99_seconds".to_owned(), *t99)]));
        Baseline {
            runs: runs.collect(),
            tolerance: 0.1,
        }
    }

    fn judged(baseline: &Baseline, t99: Option<f64>) -> Figure {
        let report = Report {
            summary: Summary {
                t99_seconds: t99,
                ..Summary::default()
            },
            ..Report::default()
        };
        let judged = baseline.judge(&report);
        judged
            .figures
            .into_iter()
            .find(|figure| figure.figure == "t99_seconds")
            .unwrap()
    }

    #[test]
    fn figure_is_worse_beyond_the_tolerance_and_beyond_the_noise() {
        let quiet = baseline(&[Some(10.0), Some(10.1), Some(9.9)]);
        let noisy = baseline(&[Some(10.0), Some(14.0), Some(9.0), Some(11.0)]);

        assert_eq!(judged(&quiet, Some(10.9)).result, Outcome::Held);
        assert_eq!(judged(&quiet, Some(11.1)).result, Outcome::Regressed);
        assert_eq!(judged(&quiet, Some(1.0)).result, Outcome::Held, "better is not worse");
        assert_eq!(judged(&quiet, None).result, Outcome::Regressed, "never reached");
        // Their worst is 14, and they differ by 5.
        assert_eq!(judged(&noisy, Some(18.9)).result, Outcome::Held);
        assert_eq!(judged(&noisy, Some(19.1)).result, Outcome::Regressed);
        assert_eq!(judged(&noisy, Some(1.0)).median, Some(10.5));
    }

    #[test]
    fn with_fewer_than_three_runs_it_says_what_it_can_not_judge() {
        let two = baseline(&[Some(10.0), Some(10.0)]);
        let gaps = baseline(&[Some(10.0), Some(10.0), Some(10.0), None]);

        for figure in [judged(&two, Some(99.0)), judged(&two, None), judged(&gaps, None)] {
            assert_eq!((figure.result, figure.bound), (Outcome::NotJudged, None));
            assert!(figure.why.is_some(), "{figure:?}");
        }
        assert!(judged(&two, Some(99.0)).result_text().contains("2 of the 3 runs"));
        let report = Report {
            baseline: Some(two.judge(&Report::default())),
            ..Report::default()
        };
        assert!(!report.baseline.unwrap().is_regressed());
    }

    #[test]
    fn reports_of_another_test_are_refused() {
        let scenario: Scenario = toml::from_str(
            "name = \"s\"\nabout = \"\"\ndevices = 5\ncapacity_per_second = 1\nthresholds = [\"missing == 0\"]\nfleet = []\nphase = []",
        )
        .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("baseline.json");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Baseline::read(std::slice::from_ref(&path), 0.1, &scenario, Executor::Run, false)
        };

        let two = r#"[{"scenario":"s","devices":5,"t99_seconds":1.5},{"scenario":"s","devices":5,"verdict":"failed",
            "runs":[{"name":"seawall","phases":[{"name":"storm","groups":{"all":{"latency":{"p99_ms":7.5}}}}]}]}]"#;
        let baseline = read(two).unwrap();
        assert_eq!(baseline.runs[0]["t99_seconds"], Some(1.5));
        assert_eq!(baseline.runs[1]["seawall.storm.all.p99_ms"], Some(7.5));
        for (text, words) in [
            ("{}", "not a report"),
            ("[]", "no run"),
            ("no JSON", "baseline"),
            (r#"{"scenario":"other","devices":5}"#, "scenario other"),
            (r#"{"scenario":"s","devices":6}"#, "6 devices"),
            (r#"{"scenario":"s","devices":5,"simulation":{}}"#, "simulated"),
            (r#"{"scenario":"s","devices":5,"target":"ws://x"}"#, "ran already"),
            (
                r#"{"scenario":"s","devices":5,"verdict":"inconclusive"}"#,
                "leave it out",
            ),
        ] {
            let why = format!("{:#}", read(text).unwrap_err());
            assert!(why.contains(words), "{text}: {why}");
        }
    }
}
