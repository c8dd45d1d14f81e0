//! `seawall doctor`: what is wrong with this machine, the configuration and the gateway, in words.

use std::path::Path;

use serde_json::Value;

use super::{Common, Failure, ServeArgs, client::Client, serve, table};
use crate::{
    clock::Clock,
    config::{Config, DatabaseKind},
    data_dir,
    store::Store,
    tls::{self, Files, Note},
};

/// Below so many open files a gateway takes too few devices to be worth it.
const FILES_WANTED: u64 = 16_384;

/// What was looked at, and what was found.
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
    /// Works, but a person should know.
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

/// Looks at everything it can reach; changes nothing.
pub fn run(common: &Common, args: ServeArgs) -> Result<(), Failure> {
    let mut findings = Findings::default();
    match args.load(common.data_dir.as_ref()) {
        Ok(config) => {
            findings.fine("configuration: every setting is known and within its bounds");
            machine(&config, &mut findings);
            certificates(&config, &mut findings);
            let is_running = directory(&config.server.data_dir, &mut findings);
            database(&config, is_running, &mut findings)?;
        }
        Err(error) => findings.wrong(format!("configuration: {error}")),
    }
    for name in super::unknown_variables() {
        findings.notice(format!("environment: no setting is called {name}"));
    }
    gateway(common, &mut findings)?;
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

/// What the kernel's settings should not be. A setting that can't be read is not judged.
fn kernel(setting: impl Fn(&'static str) -> Option<u64>, shares_port: bool) -> Vec<&'static str> {
    let mut found = Vec::new();
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

/// Whether a gateway runs on it.
fn directory(path: &Path, findings: &mut Findings) -> bool {
    let shown = path.display();
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            findings.notice(format!(
                "data directory: {shown} is not there yet; the first start makes it"
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
                "database: {url} is not there: the gateway that runs uses another one; give its --config, or its --database"
            )
        } else {
            format!("database: {url} is not there yet; the first start makes it")
        });
        return Ok(());
    }
    if let Some(what) = Store::unverified_server(&url) {
        findings.notice(format!(
            "database: {what}: sslmode=verify-full and sslrootcert=FILE in its URL let nobody stand in between"
        ));
    }
    match serve::runtime()?.block_on(Store::probe(&url)) {
        Ok(probe) => {
            findings.fine(format!("database: {url} answers"));
            if probe.is_read_only {
                findings.wrong("database: it is read-only: point the gateway at the primary");
            }
            if probe.is_pooled {
                findings.notice(
                    "database: a pooler in between does not pass start-up options on: each statement runs in a transaction \
                     of its own, which takes three round trips more. Connect past it, or let `options` through in session mode",
                );
            }
        }
        Err(error) => findings.wrong(error.to_string()),
    }
    Ok(())
}

fn gateway(common: &Common, findings: &mut Findings) -> Result<(), Failure> {
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
        (Some(false), _) => findings.wrong(format!("gateway: {} takes no devices: {reasons}", client.base())),
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

/// What only the API tells.
fn token_holder(node: &Value, findings: &mut Findings) {
    findings.fine(format!(
        "token: accepted; {} devices are connected",
        table::at(node, "sessions")
    ));
    let breaker = table::at(node, "admission.breaker");
    if !matches!(breaker.as_str(), "closed" | "-") {
        findings.wrong(format!(
            "look-ups: the breaker is {breaker}: devices can't be verified, and get slots"
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
        findings.wrong(format!(
            "database: {reason}: raise the limit, look-ups go first until then"
        ));
    }
    let plan = table::at(node, "database.plan");
    if !matches!(plan.as_str(), "indexed" | "-") {
        findings.wrong(format!(
            "database: look-ups of connecting devices are too costly: {plan}"
        ));
    }
    let drain = table::at(node, "drain.state");
    if matches!(drain.as_str(), "announced" | "draining" | "drained") {
        findings.notice("drain: devices are sent away; `seawall drain cancel` ends that");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_settings_that_harm_are_named_and_others_are_not() {
        let with = |abort, migrate| {
            move |name| match name {
                "ipv4/tcp_abort_on_overflow" => abort,
                _ => migrate,
            }
        };

        assert!(kernel(with(Some(0), Some(0)), false).is_empty());
        assert!(kernel(with(Some(0), Some(1)), true).is_empty());
        assert!(kernel(with(None, None), true).is_empty());
        assert!(kernel(with(Some(1), Some(1)), true)[0].contains("tcp_abort_on_overflow"));
        assert!(kernel(with(Some(0), Some(0)), true)[0].contains("tcp_migrate_req"));
    }
}
