//! The report for people.

use std::fmt::Write as _;

use super::Report;
use crate::generator::Generator;

impl Report {
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
        if let Some(s) = &self.simulation {
            writeln!(
                out,
                "simulated: {:.1} s of virtual time, {} nodes, {} events, trace {}, at most {} attempts a device",
                s.virtual_seconds, s.nodes, s.events, s.trace, s.attempts_max
            )?;
        }
        if let Some(target) = &self.target {
            writeln!(out, "at {target}, which ran already")?;
        }
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
            if let Some(p) = &s.presence {
                writeln!(
                    out,
                    "  presence: false offline {}  closed by a stall {}  online too long {}  unknown {}  groups {}",
                    p.false_offline, p.sessions_closed_by_stall, p.false_online_after, p.unknown, p.groups,
                )?;
                writeln!(
                    out,
                    "  power cut {}, of them offline {} (p50 {}, p99 {}, max {})  closed {}, of them offline {} (max {})",
                    p.power_cuts,
                    p.true_offline,
                    seconds(p.true_offline_seconds.p50),
                    seconds(p.true_offline_seconds.p99),
                    seconds(p.true_offline_seconds.max),
                    p.closes,
                    p.closed_offline,
                    seconds(p.closed_offline_seconds.max),
                )?;
            }
            let worst = run
                .phases
                .iter()
                .filter_map(|phase| phase.generator)
                .reduce(Generator::worse);
            if let Some(g) = worst {
                writeln!(
                    out,
                    "  generator, in its worst phase: lag p99 {} ms (max {}), {:.0} % of {} cores, {} of {} files, {} attempts without a socket",
                    millis(g.lag_p99_ms),
                    millis(g.lag_max_ms),
                    g.cpu * 100.0,
                    g.cores,
                    g.open_files_max,
                    g.open_files_limit,
                    g.local_failures,
                )?;
            }
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
        for threshold in &self.not_judged {
            writeln!(out, "  not judged {threshold}")?;
        }
        if let Some(baseline) = &self.baseline {
            write!(out, "\n{baseline}")?;
        }
        if let Some(reason) = &self.stopped {
            writeln!(out, "\nstopped before its end: {reason}")?;
        }
        for reason in &self.inconclusive {
            writeln!(out, "\nthe generator was the limit: {reason}")?;
        }
        writeln!(out, "\n{}", self.verdict.as_str())
    }
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
