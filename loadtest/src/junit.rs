//! The verdict as JUnit XML: a test case for each threshold and each figure of the baseline, with the command that
//! repeats it.

use std::fmt::Write as _;

use crate::{
    baseline,
    report::{Report, Verdict},
};

/// Outcome of a test case.
enum Outcome<'a> {
    Passed,
    /// The threshold does not hold.
    Failed(&'a str),
    /// There is no verdict.
    Error(&'a str),
    /// Not judged.
    Skipped(&'a str),
}

/// Test cases of one suite.
#[derive(Default)]
struct Cases {
    text: String,
    tests: usize,
    failures: usize,
    errors: usize,
    skipped: usize,
}

/// The report of a run. Where the run gives no verdict, one more case says why, and no threshold has failed.
#[must_use]
pub fn page(report: &Report) -> String {
    let repeat = report.command.as_deref().unwrap_or_default();
    let mut cases = Cases::default();
    let class = format!("loadtest.{}", report.scenario);
    let is_judged = matches!(report.verdict, Verdict::Passed | Verdict::Failed);
    let why = report.verdict.as_str();
    for outcome in &report.thresholds {
        let measured = format!("{} against {}", number(outcome.left), number(outcome.right));
        let result = match (is_judged, outcome.passed) {
            (true, true) => Outcome::Passed,
            (true, false) => Outcome::Failed(&measured),
            (false, _) => Outcome::Skipped(why),
        };
        let told = format!("{measured}\nseed {}\n{repeat}", report.seed);
        cases.add(&class, &outcome.expression, &result, &told);
    }
    for threshold in &report.not_judged {
        cases.add(
            &class,
            threshold,
            &Outcome::Skipped("not known in this kind of run"),
            repeat,
        );
    }
    for figure in report.baseline.iter().flat_map(|judged| &judged.figures) {
        let told = format!(
            "{} against at most {} (median {})\nseed {}\n{repeat}",
            number(figure.value),
            number(figure.bound),
            number(figure.median),
            report.seed
        );
        let text = figure.result_text();
        let result = match (is_judged, figure.result) {
            (false, _) => Outcome::Skipped(why),
            (true, baseline::Outcome::Held) => Outcome::Passed,
            (true, baseline::Outcome::Regressed) => Outcome::Failed("worse than the baseline"),
            (true, baseline::Outcome::NotJudged) => Outcome::Skipped(&text),
        };
        cases.add(&class, &format!("baseline: {}", figure.figure), &result, &told);
    }
    for reason in report.stopped.iter().chain(&report.inconclusive) {
        cases.add(&class, &format!("verdict: {why}"), &Outcome::Error(reason), repeat);
    }
    let seconds = report
        .runs
        .iter()
        .flat_map(|run| &run.phases)
        .map(|phase| phase.seconds)
        .sum();
    let mut properties = vec![
        ("version", report.version.to_owned()),
        ("devices", report.devices.to_string()),
        ("seed", report.seed.to_string()),
        ("command", repeat.to_owned()),
    ];
    properties.extend(report.target.iter().map(|target| ("target", target.clone())));
    cases.suite(&class, &report.started_at, seconds, &properties)
}

/// A run that could not be made. `scenario`: its name, or its file.
#[must_use]
pub fn failure(scenario: &str, problem: &str) -> String {
    let mut cases = Cases::default();
    let class = format!("loadtest.{scenario}");
    cases.add(&class, "the run", &Outcome::Error(problem), "");
    cases.suite(&class, "", 0.0, &[])
}

impl Cases {
    fn add(&mut self, class: &str, name: &str, result: &Outcome<'_>, told: &str) {
        self.tests += 1;
        let (count, element) = match result {
            Outcome::Passed => (None, None),
            Outcome::Failed(message) => (Some(&mut self.failures), Some(("failure", message))),
            Outcome::Error(message) => (Some(&mut self.errors), Some(("error", message))),
            Outcome::Skipped(message) => (Some(&mut self.skipped), Some(("skipped", message))),
        };
        if let Some(count) = count {
            *count += 1;
        }
        let out = &mut self.text;
        // Writing to a String can't fail.
        let _ = write!(
            out,
            "    <testcase classname=\"{}\" name=\"{}\" time=\"0\">",
            escape(class),
            escape(name)
        );
        if let Some((element, message)) = element {
            let _ = write!(out, "<{element} message=\"{}\"/>", escape(message));
        }
        let _ = writeln!(out, "<system-out>{}</system-out></testcase>", escape(told));
    }

    fn suite(&self, name: &str, started_at: &str, seconds: f64, properties: &[(&str, String)]) -> String {
        let counts = format!(
            "tests=\"{}\" failures=\"{}\" errors=\"{}\" skipped=\"{}\" time=\"{seconds:.3}\"",
            self.tests, self.failures, self.errors, self.skipped
        );
        let mut out = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites {counts}>\n  <testsuite name=\"{}\" {counts}",
            escape(name)
        );
        if !started_at.is_empty() {
            let _ = write!(out, " timestamp=\"{}\"", escape(started_at.trim_end_matches('Z')));
        }
        out.push_str(">\n");
        if !properties.is_empty() {
            out.push_str("    <properties>\n");
            for (name, value) in properties {
                let _ = writeln!(out, "      <property name=\"{name}\" value=\"{}\"/>", escape(value));
            }
            out.push_str("    </properties>\n");
        }
        out + &self.text + "  </testsuite>\n</testsuites>\n"
    }
}

fn number(value: Option<f64>) -> String {
    value.map_or_else(|| "not reached".to_owned(), |value| value.to_string())
}

/// Text for XML 1.0, which has no form at all for most control characters.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' => out.push_str("&#10;"),
            '\t' => out.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threshold;

    fn outcome(expression: &str, passed: bool) -> threshold::Outcome {
        threshold::Outcome {
            expression: expression.to_owned(),
            left: Some(3.5),
            right: None,
            passed,
        }
    }

    fn report() -> Report {
        Report {
            scenario: "smoke".to_owned(),
            command: Some("loadtest run 'a & b.toml' --seed 7".to_owned()),
            thresholds: vec![outcome("missing == 0", true), outcome("t100_seconds < \"8\"", false)],
            not_judged: vec!["rss_growth < 2".to_owned()],
            ..Report::default()
        }
    }

    #[test]
    fn each_threshold_is_a_case_with_the_command_that_repeats_it() {
        let mut failed = report();
        failed.conclude();

        let page = page(&failed);

        assert!(
            page.contains("tests=\"3\" failures=\"1\" errors=\"0\" skipped=\"1\""),
            "{page}"
        );
        assert!(page.contains("name=\"t100_seconds &lt; &quot;8&quot;\""), "{page}");
        assert!(
            page.contains("<failure message=\"3.5 against not reached\"/>"),
            "{page}"
        );
        assert_eq!(
            page.matches("loadtest run 'a &amp; b.toml' --seed 7").count(),
            4,
            "{page}"
        );
    }

    #[test]
    fn run_without_a_verdict_is_an_error_and_fails_no_threshold() {
        let mut inconclusive = report();
        inconclusive
            .inconclusive
            .push("phase storm: its own lag\u{1b}[0m".to_owned());
        inconclusive.conclude();

        let page = page(&inconclusive);

        assert!(page.contains("failures=\"0\" errors=\"1\" skipped=\"3\""), "{page}");
        assert!(
            page.contains("INCONCLUSIVE") && page.contains("its own lag\u{fffd}[0m"),
            "{page}"
        );
        let unmade = failure("smoke.toml", "nothing listens there");
        assert!(
            unmade.contains("errors=\"1\"") && unmade.contains("nothing listens there"),
            "{unmade}"
        );
    }
}
