//! The figures of a bench beside each other and beside their bounds, for a terminal and for docs/BENCHMARKS.md.

use std::{fmt::Write as _, fs};

use super::{Database, Options, schedule::Measured};

/// What a bench found.
#[derive(Clone, Debug)]
pub struct Report {
    pub options: Options,
    pub gateway: Measured,
    pub echo: Measured,
}

/// One line.
struct Row {
    what: &'static str,
    gateway: f64,
    echo: Option<f64>,
    unit: &'static str,
    /// How many digits behind the point.
    digits: usize,
    bound: Bound,
}

/// What a figure must be at most.
enum Bound {
    /// The gateway's.
    Most(f64),
    /// The gateway's over the echo's.
    Over(f64),
    /// As a multiple of the echo server's.
    Times(f64),
    None,
}

impl Report {
    fn rows(&self) -> Vec<Row> {
        let (gateway, echo) = (&self.gateway, &self.echo);
        let row = |what, of: fn(&Measured) -> f64, unit, digits, bound| Row {
            what,
            gateway: of(gateway),
            echo: Some(of(echo)),
            unit,
            digits,
            bound,
        };
        vec![
            row("memory with no device", |m| m.base_bytes / 1e6, "MB", 1, Bound::None),
            row(
                "memory of an idle device",
                |m| m.device_bytes,
                "B",
                0,
                Bound::Most(2_000.0),
            ),
            row(
                "memory after a storm, of that before",
                |m| m.after_storm,
                "",
                2,
                Bound::Most(1.1),
            ),
            row(
                "admitted by a look-up",
                |m| m.handshake_micros,
                "µs",
                1,
                Bound::Most(40.0),
            ),
            row(
                "admitted by a resume token",
                |m| m.resume_micros,
                "µs",
                1,
                Bound::Most(28.0),
            ),
            Row {
                what: "memory of an idle device over TLS",
                gateway: gateway.tls_device_bytes.unwrap_or(f64::NAN),
                echo: None,
                unit: "B",
                digits: 0,
                bound: Bound::Most(11_000.0),
            },
            Row {
                what: "admitted by a look-up over TLS",
                gateway: gateway.tls_handshake_micros.unwrap_or(f64::NAN),
                echo: None,
                unit: "µs",
                digits: 1,
                bound: Bound::None,
            },
            Row {
                what: "refused by a rule (echo: sockets alone)",
                gateway: gateway.refusal_micros.unwrap_or(f64::NAN),
                echo: echo.refusal_micros,
                unit: "µs",
                digits: 1,
                bound: Bound::Over(15.0),
            },
            row(
                "message of a device and its answer",
                |m| m.message_in_micros,
                "µs",
                1,
                Bound::Times(1.5),
            ),
            Row {
                // A request and its answer, a frame and the one back: as many reads and writes as two messages.
                what: "message through the API and its acknowledgement (echo: two messages)",
                gateway: gateway.message_out_micros.unwrap_or(f64::NAN),
                echo: Some(2.0 * echo.message_in_micros),
                unit: "µs",
                digits: 1,
                bound: Bound::Times(1.5),
            },
            row(
                "a heartbeat of each device every 10 s",
                |m| m.hold_cores * 100.0,
                "% of a core",
                2,
                Bound::Times(1.3),
            ),
            row(
                "storm: a reconnect by a look-up",
                |m| m.storm_micros,
                "µs",
                1,
                Bound::None,
            ),
            row("storm: all back by look-ups", |m| m.storm_seconds, "s", 2, Bound::None),
            row(
                "storm: all back by resume tokens",
                |m| m.resume_storm_seconds,
                "s",
                2,
                Bound::Times(2.0),
            ),
            row(
                "sockets first: all back by look-ups",
                |m| m.sockets_first_seconds,
                "s",
                2,
                Bound::Most(2.5),
            ),
            row(
                "sockets first: all back by resume tokens",
                |m| m.sockets_first_resume_seconds,
                "s",
                2,
                Bound::Most(1.5),
            ),
            row(
                "storm: p99 of a heartbeat of the others",
                |m| m.heartbeat_p99_millis,
                "ms",
                1,
                Bound::Most(50.0),
            ),
        ]
    }

    /// A table in Markdown, readable on a terminal as well.
    #[must_use]
    pub fn table(&self) -> String {
        let mut lines = vec![["what", "gateway", "echo", "ratio", "bound", ""].map(str::to_owned)];
        for row in self.rows() {
            let figure = |value: f64| format!("{value:.*} {}", row.digits, row.unit).trim_end().to_owned();
            let ratio = row.echo.map(|echo| row.gateway / echo);
            let (bound, holds) = match row.bound {
                Bound::Most(most) => (figure(most), Some(row.gateway <= most)),
                Bound::Over(over) => (
                    format!("echo + {}", figure(over)),
                    row.echo.map(|echo| row.gateway - echo <= over),
                ),
                Bound::Times(times) => (format!("{times} x echo"), ratio.map(|ratio| ratio <= times)),
                Bound::None => (String::new(), None),
            };
            lines.push([
                row.what.to_owned(),
                figure(row.gateway),
                row.echo.map(figure).unwrap_or_default(),
                ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
                bound,
                holds
                    .map_or("", |holds| if holds { "holds" } else { "missed" })
                    .to_owned(),
            ]);
        }
        let widths: [usize; 6] =
            std::array::from_fn(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0));
        let mut text = String::new();
        for (number, line) in lines.iter().enumerate() {
            for (column, (cell, width)) in line.iter().zip(widths).enumerate() {
                let gap = if column == 0 { "| " } else { " | " };
                let cell = match column {
                    1..=3 => format!("{cell:>width$}"),
                    _ => format!("{cell:<width$}"),
                };
                let _ = write!(text, "{gap}{cell}"); // writing to a string can't fail
            }
            text.push_str(" |\n");
            if number == 0 {
                for (column, width) in widths.iter().enumerate() {
                    let end = if matches!(column, 1..=3) { ":" } else { "-" };
                    let _ = write!(text, "|{}{end}", "-".repeat(width + 1));
                }
                text.push_str("|\n");
            }
        }
        text
    }

    /// docs/BENCHMARKS.md.
    #[must_use]
    pub fn page(&self) -> String {
        let Options {
            devices,
            database,
            hold,
        } = self.options;
        let registry = match database {
            Database::Postgres => "PostgreSQL",
            Database::Sqlite => "SQLite",
        };
        format!(
            "# Benchmarks\n\n\
             Cost of a connection at the gateway, beside a bare tokio-tungstenite echo server without authentication, in one run. Written by\n\n\
             ```\n\
             cargo build --release --bin seawall --bin loadtest\n\
             target/release/loadtest bench --devices {devices} --database {database} --hold {hold} --write docs/BENCHMARKS.md\n\
             ```\n\n\
             on {machine}.\n\n\
             {table}\n\
             - {devices} devices, authenticated against {registry}, registered and with their presence tracked.\n\
             - Servers run with their defaults, each in its own process, one after the other. The devices share the machine with the server and the database.\n\
             - Memory is user memory (Pss) of the server's process. Kernel memory, about 5 KB per socket, comes on top for every server.\n\
             - Times in µs are CPU time (user and system) of the server's process for one operation. The database's CPU time is not included.\n\
             - Connections are opened 256 at a time, messages sent 64 at a time.\n\
             - A message through the API is an HTTP request and its answer, a frame to the device and one back. These are as many reads and writes as two messages of the echo server.\n\
             - Over TLS: 1.3, an ECDSA P-256 certificate, at most 5,000 devices, in a process of its own.\n\
             - A storm resets all connections, and all devices return at once, without a pause. Its times are wall-clock times with everything on one machine.\n  \
               Compare them with the echo server's, not with another machine's. 200 devices are left out of it, and time heartbeats of their own.\n\
             - With lookups a storm takes as long as the database allows. A device that it has no room for returns at its slot, half a second later at the soonest.\n\
             - Sockets first: the same, but all devices connect before the first of them sends its request. The time is from the first connect to the last session.\n\
             - The gateway also pings each device every 30 s, which is in its figures.\n",
            database = match database {
                Database::Postgres => "postgres",
                Database::Sqlite => "sqlite",
            },
            hold = humantime::format_duration(hold),
            machine = machine(),
            table = self.table(),
        )
    }
}

/// Processor, memory and kernel.
pub(super) fn machine() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let processors = read("/proc/cpuinfo");
    let model = processors
        .lines()
        .find_map(|line| Some(line.strip_prefix("model name")?.trim_start_matches([' ', '\t', ':'])))
        .unwrap_or("a processor without a name")
        .to_owned();
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let memory = read("/proc/meminfo")
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .split_ascii_whitespace()
                .next()?
                .parse::<u64>()
                .ok()
        })
        .map_or(0, |kilobytes| kilobytes.div_ceil(1024 * 1024));
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{model}, {cores} cores, {memory} GiB, Linux {}", kernel.trim())
}
