//! The report as one page of HTML that needs nothing else: tables, and charts drawn as SVG here.

use std::fmt::Write as _;

use crate::report::{Report, Run, Second, Verdict};

const WIDTH: f64 = 920.0;
const HEIGHT: f64 = 180.0;
/// Space for the axes.
const LEFT: f64 = 64.0;
const BOTTOM: f64 = 22.0;
const TOP: f64 = 8.0;
/// Points of a line: as many as a chart has room for. Of several the greatest is drawn, so that no peak gets lost.
const POINTS_MAX: usize = 900;
const COLOURS: [&str; 4] = ["#0b6e99", "#c4451c", "#3b7a2a", "#7a4ea3"];

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222;background:#fff}\
h1{font-size:1.5em}h2{font-size:1.2em;margin-top:2em}h3{font-size:1em;margin-bottom:.2em}\
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}th,td{padding:.25em .6em;text-align:right;border-bottom:1px solid #ddd}\
th:first-child,td:first-child,td.text{text-align:left}.ok{color:#2a6a1c}.bad{color:#b3261e;font-weight:600}\
svg{width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:#555}.key span{margin-right:1.4em}.key i{display:inline-block;width:1em;height:.3em;margin-right:.4em;vertical-align:middle}";

/// A line of a chart.
struct Line<'a> {
    name: &'a str,
    points: Vec<(f64, f64)>,
}

/// The whole page.
#[must_use]
pub fn page(report: &Report) -> String {
    let mut out = String::new();
    let _ = write(report, &mut out); // writing to a String can't fail
    out
}

fn write(report: &Report, out: &mut String) -> std::fmt::Result {
    let verdict = match report.verdict {
        Verdict::Passed => ("ok", "passed"),
        Verdict::Failed => ("bad", "failed"),
        Verdict::Inconclusive => ("bad", "inconclusive"),
        Verdict::Stopped => ("bad", "stopped"),
    };
    write!(
        out,
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>\
         <title>{name}: {verdict}</title><style>{STYLE}</style><h1>{name}: <span class={class}>{verdict}</span></h1>\
         <p>{about}</p><p>{devices} devices, seed {seed}, started {started}</p>",
        name = escape(&report.scenario),
        verdict = verdict.1,
        class = verdict.0,
        about = escape(&report.about),
        devices = report.devices,
        seed = report.seed,
        started = escape(&report.started_at),
    )?;
    origin(report, out)?;
    thresholds(report, out)?;
    baseline(report, out)?;
    for run in &report.runs {
        write!(out, "<h2>Run {}</h2>", escape(&run.name))?;
        summary(run, out)?;
        charts(run, out)?;
        phases(run, out)?;
    }
    out.push_str("</html>\n");
    Ok(())
}

/// Where it comes from, and why it has no verdict.
fn origin(report: &Report, out: &mut String) -> std::fmt::Result {
    for (what, reason) in report
        .stopped
        .iter()
        .map(|reason| ("Stopped before its end", reason))
        .chain(
            report
                .inconclusive
                .iter()
                .map(|reason| ("The generator was the limit", reason)),
        )
    {
        write!(out, "<p class=bad>{what}: {}</p>", escape(reason))?;
    }
    if let Some(target) = &report.target {
        write!(out, "<p>Target: <code>{}</code></p>", escape(target))?;
    }
    write!(out, "<p>loadtest {}", escape(report.version))?;
    if let Some(command) = &report.command {
        write!(out, ", repeated with <code>{}</code>", escape(command))?;
    }
    out.push_str("</p>");
    Ok(())
}

fn baseline(report: &Report, out: &mut String) -> std::fmt::Result {
    let Some(baseline) = &report.baseline else {
        return Ok(());
    };
    write!(
        out,
        "<h2>Baseline</h2><p>{}</p><table><tr><th>figure<th>measured<th>median<th>bound<th>result</tr>",
        escape(&baseline.rule())
    )?;
    for figure in &baseline.figures {
        let class = if figure.is_regressed() { "bad" } else { "ok" };
        write!(
            out,
            "<tr><td class=text>{}<td>{}<td>{}<td>{}<td class={class}>{}</tr>",
            escape(&figure.figure),
            number(figure.value),
            number(figure.median),
            number(figure.bound),
            escape(&figure.result_text()),
        )?;
    }
    out.push_str("</table>");
    Ok(())
}

fn thresholds(report: &Report, out: &mut String) -> std::fmt::Result {
    out.push_str("<h2>Thresholds</h2><table><tr><th>threshold<th>measured<th>bound<th>holds</tr>");
    for outcome in &report.thresholds {
        let (class, word) = if outcome.passed { ("ok", "yes") } else { ("bad", "no") };
        write!(
            out,
            "<tr><td class=text><code>{}</code><td>{}<td>{}<td class={class}>{word}</tr>",
            escape(&outcome.expression),
            number(outcome.left),
            number(outcome.right),
        )?;
    }
    out.push_str("</table>");
    Ok(())
}

fn summary(run: &Run, out: &mut String) -> std::fmt::Result {
    let s = &run.summary;
    let mib = |bytes: Option<f64>| number(bytes.map(|bytes| bytes / 1024.0 / 1024.0));
    out.push_str("<table><tr><th>figure<th>value</tr>");
    for (name, value) in [
        ("99 % back, seconds", number(s.t99_seconds)),
        ("all back, seconds", number(s.t100_seconds)),
        ("optimum, seconds", number(s.optimum_seconds)),
        ("attempts a device", number(s.attempts_per_device)),
        ("statements", number(Some(s.statements))),
        ("most look-ups in flight", number(Some(s.in_flight_max))),
        ("limit", number(s.limit_max)),
        ("most devices waiting", number(Some(s.queue_max))),
        ("lost sessions", number(Some(s.lost_sessions))),
        ("missing at the end", number(Some(s.missing))),
        ("memory at the start, MiB", mib(s.rss_start_bytes)),
        ("most memory, MiB", mib(s.rss_max_bytes)),
    ] {
        write!(out, "<tr><td>{name}<td>{value}</tr>")?;
    }
    if let Some(presence) = &s.presence {
        for (name, value) in [
            ("devices falsely called offline", presence.false_offline),
            ("sessions closed by a stall", presence.sessions_closed_by_stall),
            ("devices called online too long", presence.false_online_after),
            ("devices without power that were called offline", presence.true_offline),
        ] {
            write!(out, "<tr><td>{name}<td>{value}</tr>")?;
        }
    }
    out.push_str("</table>");
    Ok(())
}

fn charts(run: &Run, out: &mut String) -> std::fmt::Result {
    let line = |name, value: &dyn Fn(&Second) -> Option<f64>| {
        let points = run.samples.iter();
        let points = points.filter_map(|second| Some((second.at_seconds, value(second)?)));
        Line {
            name,
            points: thinned(points.collect()),
        }
    };
    #[expect(clippy::cast_precision_loss, reason = "a chart's points")]
    let count = |value: u64| Some(value as f64);
    let mib = |bytes: u64| {
        #[expect(clippy::cast_precision_loss, reason = "a chart's points")]
        let bytes = bytes as f64;
        bytes / 1024.0 / 1024.0
    };
    chart(run, "Sessions", &[line("connected", &|s| count(s.connected))], out)?;
    chart(
        run,
        "Attempts a second",
        &[
            line("attempts", &|s| count(s.attempts)),
            line("failed", &|s| count(s.failed)),
            line("admitted", &|s| count(s.admitted)),
            line("refused", &|s| count(s.refused)),
        ],
        out,
    )?;
    chart(
        run,
        "Look-ups in flight",
        &[line("in flight", &|s| Some(s.in_flight)), line("limit", &|s| s.limit)],
        out,
    )?;
    let mut back = 0;
    let recovered = run.samples.iter().map(|second| {
        back += second.returned;
        #[expect(clippy::cast_precision_loss, reason = "a chart's points")]
        let back = back as f64;
        (second.at_seconds, back)
    });
    let recovered = Line {
        name: "back",
        points: thinned(recovered.collect()),
    };
    if back > 0 {
        chart(run, "Devices back, of those that phases wait for", &[recovered], out)?;
    }
    #[expect(clippy::cast_precision_loss, reason = "a chart's points")]
    let hint = |s: &Second| (s.hints > 0).then(|| s.hint_seconds / s.hints as f64);
    chart(run, "Hints of slots, seconds", &[line("mean", &hint)], out)?;
    chart(
        run,
        "Keys per second that slots are given out by",
        &[line("reference", &|s| s.k_ref)],
        out,
    )?;
    chart(
        run,
        "Devices waiting for a look-up",
        &[line("queue", &|s| Some(s.queue))],
        out,
    )?;
    chart(
        run,
        "Statements per second",
        &[line("statements", &|s| Some(s.statements))],
        out,
    )?;
    chart(
        run,
        "Memory of the server, MiB",
        &[line("resident", &|s| s.rss_bytes.map(mib))],
        out,
    )
}

/// At most [`POINTS_MAX`] points.
fn thinned(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let each = points.len().div_ceil(POINTS_MAX).max(1);
    let greatest = |some: &[(f64, f64)]| {
        let most = some.iter().map(|point| point.1).fold(f64::MIN, f64::max);
        some.first().map(|first| (first.0, most))
    };
    points.chunks(each).filter_map(greatest).collect()
}

fn chart(run: &Run, title: &str, lines: &[Line<'_>], out: &mut String) -> std::fmt::Result {
    if lines.iter().all(|line| line.points.is_empty()) {
        return Ok(());
    }
    let x_max = run
        .phases
        .iter()
        .map(|phase| phase.starts_seconds + phase.seconds)
        .fold(1.0, f64::max);
    let y_max = nice(
        lines
            .iter()
            .flat_map(|line| &line.points)
            .map(|point| point.1)
            .fold(0.0, f64::max),
    );
    let x = |seconds: f64| LEFT + (WIDTH - LEFT) * (seconds / x_max).min(1.0);
    let y = |value: f64| TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - value / y_max);
    write!(
        out,
        "<h3>{title}</h3><svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{title}'>"
    )?;
    for (index, phase) in run.phases.iter().enumerate() {
        let (from, to) = (x(phase.starts_seconds), x(phase.starts_seconds + phase.seconds));
        let fill = if index % 2 == 0 { "#f4f6f7" } else { "#e8edef" };
        write!(
            out,
            "<rect x={from:.1} y={TOP} width={:.1} height={:.1} fill='{fill}'><title>{}</title></rect>\
             <text x={:.1} y={:.1}>{}</text>",
            (to - from).max(0.0),
            HEIGHT - TOP - BOTTOM,
            escape(&phase.name),
            from + 3.0,
            HEIGHT - 6.0,
            if to - from > 40.0 {
                escape(&phase.name)
            } else {
                String::new()
            },
        )?;
    }
    for part in [0.0, 0.5, 1.0] {
        write!(
            out,
            "<line x1={LEFT} x2={WIDTH} y1={0:.1} y2={0:.1} stroke='#ccc' stroke-width=.5 /><text x={1} y={2:.1} text-anchor=end>{3}</text>",
            y(part * y_max),
            LEFT - 6.0,
            y(part * y_max) + 4.0,
            number(Some(part * y_max)),
        )?;
    }
    for (line, colour) in lines.iter().zip(COLOURS) {
        let points: Vec<String> = line
            .points
            .iter()
            .map(|(seconds, value)| format!("{:.1},{:.1}", x(*seconds), y(*value)))
            .collect();
        write!(
            out,
            "<polyline points='{}' fill=none stroke='{colour}' stroke-width=1.5 />",
            points.join(" ")
        )?;
    }
    out.push_str("</svg><div class=key>");
    for (line, colour) in lines.iter().zip(COLOURS) {
        write!(out, "<span><i style='background:{colour}'></i>{}</span>", line.name)?;
    }
    out.push_str("</div>");
    Ok(())
}

fn phases(run: &Run, out: &mut String) -> std::fmt::Result {
    out.push_str(
        "<h3>Phases</h3><table><tr><th>phase<th>group<th>seconds<th>connected<th>attempts<th>admitted<th>refused<th>failed\
         <th>connects<th>p50 ms<th>p99 ms<th>max ms</tr>",
    );
    for phase in &run.phases {
        for (name, group) in &phase.groups {
            write!(
                out,
                "<tr><td>{}<td class=text>{}<td>{:.1}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}</tr>",
                escape(&phase.name),
                escape(name),
                phase.seconds,
                group.connected,
                group.attempts,
                group.admitted,
                group.refused.values().sum::<u64>(),
                group.failed,
                group.latency.count,
                number(group.latency.p50_ms),
                number(group.latency.p99_ms),
                number(group.latency.max_ms),
            )?;
        }
    }
    out.push_str("</table>");
    Ok(())
}

/// The next of 1, 2, 5, 10, 20, … at or above `value`.
fn nice(value: f64) -> f64 {
    let mut step = 1.0;
    loop {
        for factor in [1.0, 2.0, 5.0] {
            if step * factor >= value || step > 1e15 {
                return step * factor;
            }
        }
        step *= 10.0;
    }
}

fn number(value: Option<f64>) -> String {
    value.map_or_else(
        || "–".to_owned(),
        |value| {
            if value.fract() == 0.0 || value.abs() >= 1000.0 {
                format!("{value:.0}")
            } else {
                format!("{value:.2}")
            }
        },
    )
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        report::{PhaseReport, Summary},
        threshold::Outcome,
    };

    #[test]
    fn the_page_holds_the_charts_and_escapes_every_text() {
        let run = Run {
            name: "seawall".to_owned(),
            summary: Summary::default(),
            phases: vec![PhaseReport {
                name: "storm".to_owned(),
                seconds: 10.0,
                ..PhaseReport::default()
            }],
            samples: vec![
                Second {
                    connected: 7,
                    returned: 2,
                    hints: 4,
                    hint_seconds: 10.0,
                    k_ref: Some(100.0),
                    ..Second::default()
                };
                3
            ],
            stopped: None,
        };
        let report = Report {
            scenario: "s".to_owned(),
            about: "<script>alert('x')</script>".to_owned(),
            seed: 1,
            devices: 7,
            started_at: String::new(),
            verdict: Verdict::Failed,
            command: Some("loadtest run '<x>'".to_owned()),
            thresholds: vec![Outcome {
                expression: "a < 1".to_owned(),
                left: None,
                right: Some(1.0),
                passed: false,
            }],
            runs: vec![run],
            ..Report::default()
        };

        let page = page(&report);

        assert!(!page.contains("<script"), "{page}");
        assert!(page.contains("&lt;script&gt;alert(&#39;x&#39;)") && page.contains("a &lt; 1"));
        for chart in [
            "Sessions",
            "Attempts",
            "in flight",
            "waiting",
            "Devices back",
            "Hints",
            "given out by",
        ] {
            assert!(page.contains(chart), "{chart}");
        }
        assert_eq!(page.matches("<svg").count(), 8);
        assert!(!page.contains("NaN"));
        assert!(!page.contains("http"), "the page needs nothing from elsewhere");
    }

    #[test]
    fn long_runs_keep_their_peaks_in_few_points() {
        let mut points: Vec<(f64, f64)> = (0..100_000_u32).map(|n| (f64::from(n), 1.0)).collect();
        points[77_777].1 = 5.0;

        let thin = thinned(points);

        assert!(thin.len() <= POINTS_MAX);
        assert!(thin.iter().any(|point| point.1 > 4.0));
        assert_eq!(thinned(vec![(1.0, 2.0)]), [(1.0, 2.0)]);
        assert!(thinned(Vec::new()).is_empty());
    }

    #[test]
    fn axes_end_at_round_numbers() {
        assert_eq!(
            [0.0, 1.0, 1.5, 3.0, 51.0, 18_000.0].map(nice),
            [1.0, 1.0, 2.0, 5.0, 100.0, 20_000.0]
        );
    }
}
