//! The verdict for a pull request: a summary in Markdown, and annotations that GitHub shows beside the job.

use std::fmt::Write as _;

use crate::report::{Report, Verdict};

/// A summary in Markdown.
#[must_use]
pub fn markdown(report: &Report) -> String {
    let mut out = String::new();
    // Writing to a String can't fail.
    let _ = write_markdown(report, &mut out);
    out
}

fn write_markdown(report: &Report, out: &mut String) -> std::fmt::Result {
    writeln!(out, "### {}: {}\n", cell(&report.scenario), report.verdict.as_str())?;
    write!(out, "{} devices, seed {}", report.devices, report.seed)?;
    if let Some(target) = &report.target {
        write!(out, ", at `{}`", code(target))?;
    }
    out.push_str("\n\n");
    for reason in report.stopped.iter().chain(&report.inconclusive) {
        writeln!(out, "> {}\n", cell(reason))?;
    }
    out.push_str("| threshold | measured | bound | holds |\n|---|---|---|---|\n");
    for outcome in &report.thresholds {
        writeln!(
            out,
            "| `{}` | {} | {} | {} |",
            code(&outcome.expression),
            number(outcome.left),
            number(outcome.right),
            if outcome.passed { "yes" } else { "**no**" }
        )?;
    }
    if let Some(baseline) = &report.baseline {
        write!(
            out,
            "\n{}\n\n| figure | measured | median | bound | result |\n|---|---|---|---|---|\n",
            baseline.rule()
        )?;
        for figure in &baseline.figures {
            writeln!(
                out,
                "| `{}` | {} | {} | {} | {} |",
                code(&figure.figure),
                number(figure.value),
                number(figure.median),
                number(figure.bound),
                cell(&figure.result_text())
            )?;
        }
    }
    if let Some(command) = &report.command {
        write!(out, "\n```sh\n{}\n```\n", command.replace("```", ""))?;
    }
    Ok(())
}

/// Lines that GitHub turns into annotations of the job: what did not hold, or why there is no verdict.
#[must_use]
pub fn annotations(report: &Report) -> String {
    let mut out = String::new();
    let title = format!("loadtest {}", report.scenario);
    let mut add = |level: &str, text: &str| {
        let _ = writeln!(out, "::{level} title={}::{}", property(&title), data(text));
    };
    for reason in report.stopped.iter().chain(&report.inconclusive) {
        add("error", &format!("{}: {reason}", report.verdict.as_str()));
    }
    if report.verdict == Verdict::Failed {
        for outcome in report.thresholds.iter().filter(|outcome| !outcome.passed) {
            let (left, right) = (number(outcome.left), number(outcome.right));
            add(
                "error",
                &format!("{} does not hold: {left} against {right}", outcome.expression),
            );
        }
    }
    for figure in report.baseline.iter().flat_map(|judged| &judged.figures) {
        if report.verdict == Verdict::Failed && figure.is_regressed() {
            let (value, bound) = (number(figure.value), number(figure.bound));
            add(
                "error",
                &format!("{} is worse than the baseline: {value}, at most {bound}", figure.figure),
            );
        } else if figure.why.is_some() {
            add("notice", &format!("{} {}", figure.figure, figure.result_text()));
        }
    }
    out
}

fn number(value: Option<f64>) -> String {
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

/// Text of a cell: no bar, line break, or markup.
fn cell(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
        .replace('\\', "\\\\")
        .replace('|', "\\|")
        .replace('<', "&lt;")
}

/// Text of a code span in a cell.
fn code(text: &str) -> String {
    text.replace(['\n', '\r', '`'], " ").replace('|', "\\|")
}

/// The escapes of GitHub's workflow commands.
fn data(text: &str) -> String {
    text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A")
}

fn property(text: &str) -> String {
    data(text).replace(':', "%3A").replace(',', "%2C")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threshold::Outcome;

    #[test]
    fn summary_and_annotations_say_what_does_not_hold() {
        let mut report = Report {
            scenario: "smoke".to_owned(),
            command: Some("loadtest run smoke.toml".to_owned()),
            thresholds: vec![Outcome {
                expression: "missing == 0".to_owned(),
                left: Some(3.0),
                right: Some(0.0),
                passed: false,
            }],
            ..Report::default()
        };
        report.conclude();

        let summary = markdown(&report);
        assert!(summary.starts_with("### smoke: FAILED\n"), "{summary}");
        assert!(summary.contains("| `missing == 0` | 3 | 0 | **no** |"), "{summary}");
        assert!(summary.contains("```sh\nloadtest run smoke.toml\n```"), "{summary}");
        let lines = annotations(&report);
        assert_eq!(
            lines,
            "::error title=loadtest smoke::missing == 0 does not hold: 3 against 0\n"
        );
        report.inconclusive.push("50 %\nlag | <b>".to_owned());
        report.conclude();
        let lines = annotations(&report);
        assert_eq!(
            lines,
            "::error title=loadtest smoke::INCONCLUSIVE: 50 %25%0Alag | <b>\n"
        );
        assert!(
            markdown(&report).contains("> 50 % lag \\| &lt;b>"),
            "{}",
            markdown(&report)
        );
    }
}
