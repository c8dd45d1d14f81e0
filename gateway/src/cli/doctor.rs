//! `seawall doctor`: checks of the machine, the configuration and the gateway.

use std::{path::Path, time::Duration};

use seawall_proto::admission::LOOKUP_MAX;
use serde_json::Value;

use super::{Common, Failure, ServeArgs, client::Client, serve, table};
use crate::{
    edge::tls::{self, Files, Note},
    runtime::{
        clock::Clock,
        config::{Config, DatabaseKind},
        data_dir,
    },
    store::Store,
};

/// Minimum number of open files. With fewer a gateway takes too few devices to be worth it.
const FILES_WANTED: u64 = 16_384;
/// Minimum length of the kernel's queue of connections that wait to be accepted: Linux's default since 5.4.
const SOMAXCONN_WANTED: u64 = 4_096;
/// Free space of the data directory below which there is a notice, in bytes.
const DISK_FREE_WANTED: u64 = 1 << 30;
/// Difference between the clocks of this machine and of the database from which there is a notice. Rules and tokens end
/// by the clock.
const CLOCK_OFFSET_MAX: Duration = Duration::from_secs(5);

/// The results of all checks.
#[derive(Default)]
struct Findings {
    lines: Vec<Finding>,
}

struct Finding {
    level: Level,
    text: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Fine,
    /// It works, but a person should know.
    Notice,
    Wrong,
}

impl Level {
    const fn word(self) -> &'static str {
        match self {
            Self::Fine => "ok",
            Self::Notice => "notice",
            Self::Wrong => "wrong",
        }
    }
}

impl Findings {
    fn fine(&mut self, text: impl Into<String>) {
        self.lines.push(Finding {
            level: Level::Fine,
            text: text.into(),
        });
    }

    fn notice(&mut self, text: impl Into<String>) {
        self.lines.push(Finding {
            level: Level::Notice,
            text: text.into(),
        });
    }

    fn wrong(&mut self, text: impl Into<String>) {
        self.lines.push(Finding {
            level: Level::Wrong,
            text: text.into(),
        });
    }
}

/// Checks everything it can reach. Changes nothing.
pub fn run(common: &Common, args: ServeArgs) -> Result<(), Failure> {
    let mut findings = Findings::default();
    let mut is_listening = false;
    match args.load_kept(common.data_dir.as_ref()) {
        Ok(config) => {
            findings.fine("configuration: every setting is known and within its bounds");
            machine(&config, &mut findings);
            certificates(&config, &mut findings);
            let is_running = directory(&config.server.data_dir, &mut findings);
            is_listening = is_running && matches!(data_dir::read_addresses(&config.server.data_dir), Ok(Some(_)));
            database(&config, is_running, &mut findings)?;
        }
        Err(error) => findings.wrong(format!("configuration: {error}")),
    }
    for super::UnknownVariable { name, meant } in super::unknown_variables() {
        match meant {
            Some(meant) => findings.wrong(format!("environment: {name} is not a setting: {meant} is meant?")),
            None => findings.notice(format!("environment: {name} is not a setting")),
        }
    }
    gateway(common, is_listening, &mut findings)?;
    report(common, &findings)
}

fn report(common: &Common, findings: &Findings) -> Result<(), Failure> {
    let wrong = findings
        .lines
        .iter()
        .filter(|finding| finding.level == Level::Wrong)
        .count();
    if common.json {
        let items: Vec<Value> = findings
            .lines
            .iter()
            .map(|finding| serde_json::json!({"level": finding.level.word(), "text": finding.text}))
            .collect();
        table::print(&table::json(
            &serde_json::json!({"healthy": wrong == 0, "findings": items}),
        ))?;
    } else {
        let lines: String = findings
            .lines
            .iter()
            .map(|finding| format!("{:6}  {}\n", finding.level.word(), table::text(&finding.text)))
            .collect();
        table::print(&lines)?;
    }
    match wrong {
        0 => Ok(()),
        1 => Err(Failure::failed("one thing is wrong")),
        several => Err(Failure::failed(format!("{several} things are wrong"))),
    }
}

fn machine(config: &Config, findings: &mut Findings) {
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile)
        .maximum
        .unwrap_or(u64::MAX);
    if files < FILES_WANTED {
        findings.notice(format!(
            "open files: this process may have {files} at most, and each device takes one: raise the hard limit (ulimit -Hn, LimitNOFILE=)"
        ));
    } else {
        findings.fine(format!(
            "open files: this process may have {files} at most, and each device takes one"
        ));
    }
    let cores = rustix::process::getrlimit(rustix::process::Resource::Core);
    if cores.current != Some(0) {
        findings.notice("core dumps are on, and hold secrets: turn them off (ulimit -c 0, LimitCORE=0)");
    }
    let setting = |name| {
        let text = std::fs::read_to_string(Path::new("/proc/sys/net").join(name)).ok()?;
        text.trim().parse().ok()
    };
    for text in kernel(setting, config.server.share_port) {
        findings.notice(text);
    }
    if !config.ops.listen.ip().is_loopback() && config.ops.tls_certificate.is_none() {
        findings.notice(format!(
            "ops.listen: {} is outside loopback: tokens cross the network in clear text",
            config.ops.listen
        ));
    }
}

/// Returns bad settings of the kernel. A setting that can't be read is not judged.
fn kernel(setting: impl Fn(&'static str) -> Option<u64>, shares_port: bool) -> Vec<&'static str> {
    let mut found = Vec::new();
    if setting("core/somaxconn").is_some_and(|value| value < SOMAXCONN_WANTED) {
        found.push(
            "net.core.somaxconn is below 4096: when many devices connect at once, most try again seconds later: set it to 4096 or more",
        );
    }
    if setting("ipv4/tcp_abort_on_overflow").is_some_and(|value| value != 0) {
        found.push("net.ipv4.tcp_abort_on_overflow is on: devices that should wait are reset: set it to 0");
    }
    if shares_port && setting("ipv4/tcp_migrate_req") == Some(0) {
        found.push(
            "net.ipv4.tcp_migrate_req is 0: half-open connections are lost when one of the gateways that share a port leaves: set it to 1",
        );
    }
    found
}

fn certificates(config: &Config, findings: &mut Findings) {
    let now = Clock::start().wall();
    for files in [Files::of_devices(config), Files::of_ops(config)].into_iter().flatten() {
        let notes = match tls::inspect(&files, now) {
            Ok(notes) => notes,
            Err(error) => {
                findings.wrong(error.to_string());
                continue;
            }
        };
        for note in notes {
            match note {
                Note::Fine(text) => findings.fine(text),
                Note::Notice(text) => findings.notice(text),
                Note::Wrong(text) => findings.wrong(text),
            }
        }
    }
}

fn free_space(free: u64, path: &Path) -> Finding {
    let text = format!("disk: {} MiB free at {}", free >> 20, path.display());
    if free < DISK_FREE_WANTED {
        Finding {
            level: Level::Notice,
            text: format!("{text}: on a full disk no change of a rule or a device is taken"),
        }
    } else {
        Finding {
            level: Level::Fine,
            text,
        }
    }
}

/// `offset` is the difference to the database's clock.
fn clock(offset: Duration) -> Finding {
    let text = format!("clock: {:.1} s from the database's", offset.as_secs_f64());
    if offset > CLOCK_OFFSET_MAX {
        Finding {
            level: Level::Notice,
            text: format!("{text}: rules and tokens end too early or too late: synchronize the clocks (NTP)"),
        }
    } else {
        Finding {
            level: Level::Fine,
            text,
        }
    }
}

/// A finding about a database so far away that lookups take a large part of their time limit. A lookup is one round
/// trip.
fn round_trip(lookup: Duration) -> Option<Finding> {
    let limit = LOOKUP_MAX.as_millis();
    let text = format!(
        "database: a lookup takes at least {} ms, and has {limit} ms: put the gateway near the database",
        lookup.as_millis()
    );
    let level = match lookup {
        lookup if lookup >= LOOKUP_MAX => Level::Wrong,
        lookup if lookup >= LOOKUP_MAX / 4 => Level::Notice,
        _ => return None,
    };
    Some(Finding { level, text })
}

/// Checks the data directory. Returns whether a gateway runs on it.
fn directory(path: &Path, findings: &mut Findings) -> bool {
    let shown = path.display();
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            findings.notice(format!(
                "data directory: {shown} does not exist yet; the first start creates it"
            ));
            return false;
        }
        Err(error) => {
            findings.wrong(format!("data directory: {shown}: {error}"));
            return false;
        }
        Ok(metadata) if !metadata.is_dir() => {
            findings.wrong(format!(
                "data directory: {shown} is a file: move it away, or name another directory"
            ));
            return false;
        }
        Ok(_) => {}
    }
    if let Err(error) = rustix::fs::access(path, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK) {
        findings.wrong(format!(
            "data directory: {shown} can't be written by this user: {error}"
        ));
    }
    // A file system without this figure is not judged.
    if let Ok(disk) = rustix::fs::statvfs(path) {
        findings
            .lines
            .push(free_space(disk.f_bavail.saturating_mul(disk.f_frsize), path));
    }
    let is_running = match data_dir::is_in_use(path) {
        Ok(is_running) => is_running,
        Err(error) => {
            findings.wrong(format!("data directory: {shown}: {error}"));
            return false;
        }
    };
    match (is_running, data_dir::read_addresses(path)) {
        (true, Ok(Some(addresses))) => findings.fine(format!(
            "data directory: a gateway runs on {shown}, with devices at {} and the API at {}",
            addresses.devices, addresses.ops
        )),
        (true, Ok(None)) => findings.notice(format!(
            "data directory: a gateway holds {shown}, but doesn't listen yet"
        )),
        (true, Err(error)) => findings.wrong(format!("data directory: {shown}/{}: {error}", data_dir::ADDRESSES)),
        (false, _) => findings.fine(format!("data directory: {shown} is free; no gateway runs on it")),
    }
    is_running
}

fn database(config: &Config, is_running: bool, findings: &mut Findings) -> Result<(), Failure> {
    let url = config.database_url();
    if url.kind() == DatabaseKind::Sqlite && !url.sqlite_path().is_some_and(|path| path.exists()) {
        findings.notice(if is_running {
            format!(
                "database: {url} does not exist: the running gateway uses another one; give its --config or --database"
            )
        } else {
            format!("database: {url} does not exist yet; the first start creates it")
        });
        return Ok(());
    }
    if let Some(what) = Store::unverified_server(&url) {
        findings.notice(format!(
            "database: {what}: add sslmode=verify-full and sslrootcert=FILE to its URL"
        ));
    }
    match serve::runtime()?.block_on(Store::probe(&url)) {
        Ok(probe) => {
            findings.fine(format!("database: {url} answers"));
            findings.lines.extend(probe.clock_offset.map(clock));
            findings.lines.extend(round_trip(probe.round_trip));
            if probe.is_read_only {
                findings.wrong("database: it is read-only: point the gateway at the primary");
            }
            if probe.is_pooled {
                findings.notice(
                    "database: a pooler in between does not pass start-up options on: each statement runs in a transaction \
                     of its own, which takes three round trips more (for a lookup none). Connect past it, or let `options` through in session mode",
                );
            }
        }
        Err(error) => findings.wrong(error.to_string()),
    }
    Ok(())
}

/// `is_listening`: a gateway of this machine's data directory has written its addresses, and still runs.
fn gateway(common: &Common, is_listening: bool, findings: &mut Findings) -> Result<(), Failure> {
    let client = match Client::for_check(common) {
        Ok(client) => client,
        Err(Failure::Failed(error)) => {
            findings.wrong(format!("token: {error}"));
            return Ok(());
        }
        Err(other) => return Err(other),
    };
    let ready = match client.get_any("/readyz", &[]) {
        Ok(answer) => answer.body,
        Err(Failure::Unreachable(error)) if is_listening => {
            findings.wrong(format!("gateway: it runs, and does not answer: {error}"));
            return Ok(());
        }
        Err(Failure::Unreachable(error)) => {
            findings.notice(format!("gateway: {error}"));
            return Ok(());
        }
        Err(other) => return Err(other),
    };
    let reasons: Vec<String> = ready
        .get("reasons")
        .map(table::list)
        .unwrap_or_default()
        .iter()
        .map(table::cell)
        .collect();
    let reasons = reasons.join("; ");
    match (ready.get("ready").and_then(Value::as_bool), reasons.is_empty()) {
        (Some(true), true) => findings.fine(format!("gateway: {} is ready", client.base())),
        (Some(true), false) => findings.notice(format!("gateway: {} is ready, but: {reasons}", client.base())),
        (Some(false), _) => findings.wrong(format!("gateway: {} is not ready: {reasons}", client.base())),
        (None, _) => {
            findings.wrong(format!(
                "gateway: the server at {} is not a Seawall gateway",
                client.base()
            ));
            return Ok(());
        }
    }
    if let Some(reason) = client.missing_token() {
        findings.notice(reason.to_owned());
        return Ok(());
    }
    match client.get_any("/api/v1/node", &[])?.ok() {
        Ok(node) => token_holder(&node, findings),
        Err(failure) => match failure.text() {
            Some(problem) => findings.wrong(format!("token: {problem}")),
            None => return Err(failure),
        },
    }
    Ok(())
}

/// Checks that need the API.
fn token_holder(node: &Value, findings: &mut Findings) {
    findings.fine(format!(
        "token: accepted; {} devices are connected",
        table::at(node, "sessions")
    ));
    let breaker = table::at(node, "admission.breaker");
    if !matches!(breaker.as_str(), "closed" | "-") {
        findings.wrong(format!(
            "lookups: the breaker is {breaker}: devices can't be verified, and get slots"
        ));
    }
    let state = table::at(node, "database.state");
    let reason = table::at(node, "database.reason");
    if !matches!(state.as_str(), "available" | "-") {
        findings.wrong(format!(
            "database: the gateway says it is {state} since {}: {reason}",
            table::at(node, "database.since")
        ));
    } else if reason != "-" {
        findings.wrong(format!("database: {reason}"));
    }
    let reasons = node.get("reasons").map(table::list).unwrap_or_default();
    if reasons.iter().any(|reason| reason == "database_connections_scarce") {
        findings.wrong("database: too few connections are free: raise its limit; until then lookups go first");
    }
    let plan = table::at(node, "database.plan");
    if !matches!(plan.as_str(), "indexed" | "-") {
        findings.wrong(format!(
            "database: lookups of connecting devices are too costly: {plan}"
        ));
    }
    let drain = table::at(node, "drain.state");
    if matches!(drain.as_str(), "announced" | "draining" | "drained") {
        findings.notice("drain: devices are refused; `seawall drain cancel` ends that");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_space_and_a_wrong_clock_are_noticed() {
        let path = Path::new("data");

        assert!(free_space(2 << 30, path).level == Level::Fine);
        let little = free_space(100 << 20, path);
        assert!(little.level == Level::Notice && little.text.contains("100 MiB free at data"));
        assert!(clock(Duration::from_millis(300)).level == Level::Fine);
        let wrong = clock(Duration::from_secs(61));
        assert!(wrong.level == Level::Notice && wrong.text.contains("61.0 s"));
    }

    #[test]
    fn far_database_is_noticed_and_one_beyond_the_limit_of_lookups_is_wrong() {
        let level = |ms| round_trip(Duration::from_millis(ms)).map(|finding| finding.level.word());

        assert_eq!(level(249), None);
        assert_eq!(level(250), Some("notice"));
        assert_eq!(level(1_000), Some("wrong"));
    }

    #[test]
    fn advice_about_connections_is_given_only_if_they_are_scarce() {
        let texts = |reason: &str, reasons: &[&str]| {
            let mut findings = Findings::default();
            let database = serde_json::json!({"state": "available", "reason": reason});
            token_holder(
                &serde_json::json!({"database": database, "reasons": reasons}),
                &mut findings,
            );
            let texts = findings.lines.into_iter().map(|finding| finding.text);
            texts.collect::<Vec<_>>().join("\n")
        };

        let refused = texts("permission denied for table devices", &["database_refuses"]);
        let scarce = texts("too many clients already", &["database_connections_scarce"]);

        assert!(
            refused.contains("database: permission denied for table devices"),
            "{refused}"
        );
        assert!(!refused.contains("raise its limit"), "{refused}");
        assert!(
            scarce.contains("too many clients") && scarce.contains("raise its limit"),
            "{scarce}"
        );
    }

    #[test]
    fn kernel_settings_that_harm_are_named_and_others_are_not() {
        let with = |abort, migrate| {
            move |name| match name {
                "ipv4/tcp_abort_on_overflow" => abort,
                "ipv4/tcp_migrate_req" => migrate,
                _ => Some(4_096),
            }
        };

        assert!(kernel(with(Some(0), Some(0)), false).is_empty());
        assert!(kernel(with(Some(0), Some(1)), true).is_empty());
        assert!(kernel(with(None, None), true).is_empty());
        assert!(kernel(|name| (name == "core/somaxconn").then_some(128), false)[0].contains("somaxconn"));
        assert!(kernel(with(Some(1), Some(1)), true)[0].contains("tcp_abort_on_overflow"));
        assert!(kernel(with(Some(0), Some(0)), true)[0].contains("tcp_migrate_req"));
    }
}
