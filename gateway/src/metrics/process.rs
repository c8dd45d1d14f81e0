//! The kernel's counters of this process, with the names that all Prometheus clients use.
//!
//! They are read from `/proc` when `/metrics` is read. Without `/proc` the series are missing. Start with [`render`].

use std::{fmt::Write as _, fs};

use crate::metrics::series::Definition;

/// Defines a series of the process.
const fn series(name: &'static str, kind: &'static str, help: &'static str) -> Definition {
    Definition {
        name,
        kind,
        help,
        labels: Vec::new(),
    }
}

/// The series that [`render`] writes, in the order of [`figures`].
pub static SERIES: [Definition; 5] = [
    series(
        "process_cpu_seconds_total",
        "counter",
        "Processor time that this process used, in seconds.",
    ),
    series(
        "process_resident_memory_bytes",
        "gauge",
        "Resident memory of this process.",
    ),
    series("process_open_fds", "gauge", "Open files of this process."),
    series("process_max_fds", "gauge", "Most files that this process may open."),
    series(
        "process_start_time_seconds",
        "gauge",
        "When this process started, in seconds since 1970.",
    ),
];

/// The series in the Prometheus exposition format.
#[must_use]
pub fn render() -> String {
    let mut text = String::new();
    for (series, figure) in SERIES.iter().zip(figures()) {
        if let Some(figure) = figure {
            let (name, kind, help) = (series.name, series.kind, series.help);
            let written = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {figure}\n");
            debug_assert!(written.is_ok(), "writing to a string does not fail");
        }
    }
    text
}

#[expect(clippy::cast_precision_loss, reason = "counts of a process are far below 2^52")]
fn figures() -> [Option<f64>; 5] {
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    let stat = Stat::read();
    let resident = fs::read_to_string("/proc/self/statm").ok().and_then(|text| {
        let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
        Some(pages as f64 * rustix::param::page_size() as f64)
    });
    let open = fs::read_dir("/proc/self/fd").ok().map(|files| files.count() as f64);
    let max = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let start = stat
        .as_ref()
        .and_then(|stat| Some(boot_seconds()? + stat.start_ticks as f64 / ticks));
    [
        stat.map(|stat| stat.cpu_ticks as f64 / ticks),
        resident,
        open,
        max.map(|max| max as f64),
        start,
    ]
}

/// Content of `/proc/self/stat`.
struct Stat {
    /// Time in user and kernel mode.
    cpu_ticks: u64,
    /// Start time of the process since the start of the machine.
    start_ticks: u64,
}

impl Stat {
    fn read() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/self/stat").ok()?)
    }

    /// The second field, the name in brackets, may contain any character.
    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(") ")?;
        let field = |number: usize| rest.split(' ').nth(number - 3)?.trim().parse::<u64>().ok();
        Some(Self {
            cpu_ticks: field(14)?.checked_add(field(15)?)?,
            start_ticks: field(22)?,
        })
    }
}

/// Start time of the machine, in seconds since 1970.
fn boot_seconds() -> Option<f64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    text.lines().find_map(|line| line.strip_prefix("btime ")?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_of_a_process_may_hold_brackets_and_blanks() {
        let line = "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 9 0 12345 1 1";

        let stat = Stat::parse(line).unwrap();

        assert_eq!((stat.cpu_ticks, stat.start_ticks), (300, 12_345));
        assert!(Stat::parse("7 (a) S 1").is_none());
    }

    #[test]
    fn this_process_has_a_figure_for_each_series() {
        let text = render();

        for series in &SERIES {
            let figure = text
                .lines()
                .find_map(|line| line.strip_prefix(series.name)?.strip_prefix(' '));
            assert!(figure.unwrap().parse::<f64>().unwrap() >= 0.0, "{text}");
        }
        let started = figures()[4].unwrap();
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs_f64();
        assert!((now - started).abs() < 86_400.0, "{started}");
    }
}
