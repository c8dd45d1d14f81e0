//! Two reports of one scenario side by side, such as a simulated run and a real one, and whether they agree.

use std::{fmt, fs, path::Path};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, de::DeserializeOwned};

/// Greatest report, in bytes: ten million devices leave no more than a few hundred of them a second.
const FILE_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// What a report says at its top, of the run `seawall`. Figures that it does not have are left out.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Side {
    pub scenario: String,
    pub devices: u64,
    pub t99_seconds: Option<f64>,
    pub t100_seconds: Option<f64>,
    pub optimum_seconds: Option<f64>,
    pub attempts_per_device: Option<f64>,
    pub statements: Option<f64>,
    pub in_flight_max: Option<f64>,
    pub limit_max: Option<f64>,
    pub queue_max: Option<f64>,
}

/// The comparison, judged.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    pub scenario: String,
    pub devices: u64,
    /// Greatest difference that counts as agreement: 0.1 is 10 % of the first report's figure.
    pub tolerance: f64,
    pub lines: Vec<Line>,
}

/// One figure of both.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    pub figure: &'static str,
    pub first: Option<f64>,
    pub second: Option<f64>,
    /// Whether agreement is asked for.
    pub is_judged: bool,
}

/// Reads a file of JSON that is not too big.
///
/// # Errors
/// The file can't be read, or is not such JSON.
pub(crate) fn read_bounded<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let reading = || format!("reading {}", path.display());
    let bytes = fs::metadata(path).with_context(reading)?.len();
    ensure!(
        bytes <= FILE_BYTES_MAX,
        "{}: {bytes} bytes are not a report",
        path.display()
    );
    serde_json::from_slice(&fs::read(path).with_context(reading)?).with_context(reading)
}

impl Side {
    /// # Errors
    /// The file can't be read, or is not a report.
    pub fn from_file(path: &Path) -> Result<Self> {
        let side: Self = read_bounded(path)?;
        ensure!(
            !side.scenario.is_empty(),
            "{}: no report: it names no scenario",
            path.display()
        );
        Ok(side)
    }
}

impl Comparison {
    /// # Errors
    /// The reports are of different scenarios, or of fleets of different sizes.
    pub fn new(first: &Side, second: &Side, tolerance: f64) -> Result<Self> {
        ensure!(
            first.scenario == second.scenario,
            "the reports are of different scenarios: {} and {}",
            first.scenario,
            second.scenario
        );
        ensure!(
            first.devices == second.devices,
            "the reports are of fleets of different sizes: {} and {} devices",
            first.devices,
            second.devices
        );
        let line = |figure, of: fn(&Side) -> Option<f64>, is_judged| Line {
            figure,
            first: of(first),
            second: of(second),
            is_judged,
        };
        Ok(Self {
            scenario: first.scenario.clone(),
            devices: first.devices,
            tolerance,
            lines: vec![
                line("t99 seconds", |side| side.t99_seconds, true),
                line("t100 seconds", |side| side.t100_seconds, false),
                line("optimum seconds", |side| side.optimum_seconds, false),
                line("attempts a device", |side| side.attempts_per_device, true),
                line("statements", |side| side.statements, false),
                line("in flight, at most", |side| side.in_flight_max, false),
                line("limit, at most", |side| side.limit_max, false),
                line("queue, at most", |side| side.queue_max, false),
            ],
        })
    }

    /// Whether every figure that is judged is in both, and within the tolerance.
    #[must_use]
    pub fn agrees(&self) -> bool {
        self.lines.iter().all(|line| line.agrees(self.tolerance))
    }
}

impl Line {
    /// The second figure's difference from the first, as a part of the first. None: one is missing, or the first is 0 and the other not.
    #[must_use]
    pub fn delta(&self) -> Option<f64> {
        let (first, second) = (self.first?, self.second?);
        if first == second {
            return Some(0.0);
        }
        Some((second - first) / first).filter(|delta| delta.is_finite())
    }

    fn agrees(&self, tolerance: f64) -> bool {
        !self.is_judged || self.delta().is_some_and(|delta| delta.abs() <= tolerance)
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {} devices", self.scenario, self.devices)?;
        writeln!(f, "  {:<20} {:>12} {:>12} {:>10}", "", "first", "second", "delta")?;
        let figure = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
        for line in &self.lines {
            let delta = line
                .delta()
                .map_or_else(|| "-".to_owned(), |delta| format!("{:+.1} %", delta * 100.0));
            let verdict = match (line.is_judged, line.agrees(self.tolerance)) {
                (false, _) => "",
                (true, true) => "  agrees",
                (true, false) => "  DIFFERS",
            };
            writeln!(
                f,
                "  {:<20} {:>12} {:>12} {:>10}{verdict}",
                line.figure,
                figure(line.first),
                figure(line.second),
                delta
            )?;
        }
        let verdict = if self.agrees() { "agree" } else { "DIFFER" };
        writeln!(f, "they {verdict} (tolerance {:.0} %)", self.tolerance * 100.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(t99: Option<f64>, attempts: f64) -> Side {
        Side {
            scenario: "reconnect-storm".to_owned(),
            devices: 100,
            t99_seconds: t99,
            attempts_per_device: Some(attempts),
            statements: Some(10.0),
            ..Side::default()
        }
    }

    fn agree(first: &Side, second: &Side) -> bool {
        Comparison::new(first, second, 0.1).unwrap().agrees()
    }

    #[test]
    fn runs_agree_within_the_tolerance_of_return_time_and_attempts() {
        let first = side(Some(10.0), 2.0);

        assert!(agree(&first, &side(Some(10.9), 1.85)));
        assert!(!agree(&first, &side(Some(11.1), 2.0)));
        assert!(!agree(&first, &side(Some(10.0), 1.7)));
        assert!(!agree(&first, &side(None, 2.0)), "one never got there");
        let other = Side {
            statements: Some(90.0),
            ..first.clone()
        };
        assert!(agree(&first, &other), "statements are shown, not judged");
    }

    #[test]
    fn runs_of_different_tests_are_not_compared() {
        let first = side(Some(10.0), 2.0);
        let other = Side {
            devices: 101,
            ..first.clone()
        };

        let error = Comparison::new(&first, &other, 0.1).unwrap_err().to_string();

        assert!(error.contains("100 and 101"), "{error}");
    }

    #[test]
    fn a_report_is_read_from_its_json() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        fs::write(
            &path,
            r#"{"scenario":"s","devices":5,"t99_seconds":null,"attempts_per_device":1.5,"runs":[]}"#,
        )
        .unwrap();

        let side = Side::from_file(&path).unwrap();

        assert_eq!((side.t99_seconds, side.attempts_per_device), (None, Some(1.5)));
        fs::write(&path, "{}").unwrap();
        assert!(Side::from_file(&path).is_err());
    }

    #[test]
    fn differences_are_told_in_words() {
        let comparison = Comparison::new(&side(Some(10.0), 2.0), &side(Some(12.0), 2.0), 0.1).unwrap();

        let text = comparison.to_string();

        assert!(
            text.contains("+20.0 %  DIFFERS") && text.contains("they DIFFER"),
            "{text}"
        );
    }
}
