//! The command line: `seawall serve`, and the operator's verbs, which talk to a gateway's API. Start with [`run`].
//!
//! Exit status: [`DONE`], [`FAILED`] or [`WRONG_USE`]. What goes wrong is one line on standard error, with `--json` a JSON object.

use std::{ffi::OsString, fmt, io, path::PathBuf, process::ExitCode};

use clap::{Arg, Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand};

mod alarms;
mod audit;
mod client;
mod config;
mod device_change;
mod device_export;
mod devices;
mod doctor;
mod drain;
mod events;
mod firmware;
mod log_level;
mod migrate;
mod nodes;
mod rule_view;
mod rules;
mod seed;
mod serve;
mod table;
mod tokens;
mod versions;

pub use serve::ServeArgs;

use client::{Client, Refusal};

/// Exit status: the command did what it was asked.
const DONE: u8 = 0;
/// Exit status: the gateway refused, cannot be reached or failed; a file cannot be read; `doctor` found a fault; nothing matches.
const FAILED: u8 = 1;
/// Exit status: an argument, a setting or a value is wrong, whether the command line or the gateway finds it.
const WRONG_USE: u8 = 2;

/// Shown under `seawall --help`.
const EXAMPLES: &str = "\
Examples:
  seawall serve                                                   a gateway with its data in ./seawall-data
  seawall devices seed --count 100 --out devices.csv              100 devices with random secrets
  seawall firmware                                                who runs which version
  seawall rules preview '>=3.8.0-b3'                              whom a block would hit
  seawall rules block '>=3.8.0-b3' --reason 'boot loop' --evict   block it, and end its sessions
  seawall drain start                                             send all sessions away, at a pace
  seawall doctor                                                  check machine, configuration and gateway

Exit status:
  0  done
  1  refused or failed: the gateway refuses or cannot be reached, a file cannot be read, doctor finds a fault,
     versions match finds no line
  2  wrong use: an argument, a setting or a value is not allowed, whether the command or the gateway finds it

Errors are one line on standard error. With --json they are a JSON object in the API's form (problem+json).";

/// Seawall, a WebSocket gateway for device fleets that survives reconnect storms.
#[derive(Debug, Parser)]
#[command(name = "seawall", version, arg_required_else_help = true, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    verb: Verb,
}

/// What every command takes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
struct Common {
    /// Data directory of the gateway: its files, and the admin token that commands use where SEAWALL_TOKEN is not set [default: ./seawall-data]
    #[arg(long, global = true, env = "SEAWALL_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// API of the gateway that the command is for
    #[arg(long, global = true, env = "SEAWALL_URL", default_value = client::DEFAULT_URL, value_name = "URL")]
    url: String,
    /// CA certificates (PEM) to trust for an https API [default: the system's]
    #[arg(long, global = true, env = "SEAWALL_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Print the API's JSON instead of tables, and errors as JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run a gateway
    Serve(ServeArgs),
    /// Firmware rules: who may not connect
    #[command(subcommand, alias = "rule")]
    Rules(rules::Rules),
    /// The registry of devices, and what they do now
    #[command(subcommand, alias = "device")]
    Devices(devices::Devices),
    /// What each firmware version does: connected, refused, repeated, its look-ups
    Firmware(firmware::Firmware),
    /// State of the gateway: sessions, admission, database, rules, drain
    #[command(alias = "node")]
    Nodes,
    /// Send the sessions of a gateway away at a pace, before it leaves
    #[command(subcommand)]
    Drain(drain::Drain),
    /// Change what a gateway logs, until SIGHUP or a restart; `nodes --json` shows it
    LogLevel(log_level::LogLevel),
    /// Active alarms: conditions that a person should look at
    #[command(alias = "alarm")]
    Alarms(alarms::Alarms),
    /// Follow presence, rules, alarms and messages of devices as they happen
    Events(events::Events),
    /// Access tokens for the API
    #[command(subcommand, alias = "token")]
    Tokens(tokens::Tokens),
    /// Firmware version order; needs no gateway
    #[command(subcommand)]
    Versions(versions::Versions),
    /// Who changed what, newest first
    Audit(audit::Audit),
    /// Diagnose this machine, the configuration and the gateway
    Doctor(ServeArgs),
    /// The configuration of a gateway, as TOML; needs no gateway
    #[command(subcommand)]
    Config(config::ConfigVerb),
    /// Bring the tables of the database to this version
    Migrate(ServeArgs),
}

/// Runs one command line and returns its exit status.
#[must_use]
pub fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.collect();
    let cli = match parse(&args) {
        Ok(cli) => cli,
        Err(error) => return usage(&error, args.iter().any(|arg| arg == "--json")),
    };
    match dispatch(&cli.common, cli.verb) {
        Ok(()) => ExitCode::from(DONE),
        Err(failure) => complain(&failure, cli.common.json),
    }
}

fn parse(args: &[OsString]) -> Result<Cli, clap::Error> {
    let mut command = command();
    let matches = command.try_get_matches_from_mut(args)?;
    Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
}

/// The command line. Options that change nothing for a command are taken, and not offered by its help.
fn command() -> Command {
    const OF_API: [&str; 3] = ["url", "ca", "json"];
    const OF_LOG: [&str; 2] = ["log_format", "log_level"];
    let command = Cli::command();
    let global = |names: &[&str]| -> Vec<Arg> {
        let arguments = command
            .get_arguments()
            .filter(|argument| names.contains(&argument.get_id().as_str()));
        arguments.map(|argument| argument.clone().hide(true)).collect()
    };
    let (of_api, of_gateways) = (global(&OF_API), global(&["url", "ca", "json", "data_dir"]));
    let hidden = |command: Command, names: &[&str]| {
        names.iter().fold(command, |command, name| {
            command.mut_arg(name, |argument| argument.hide(true))
        })
    };
    command
        .mut_subcommand("serve", |serve| serve.args(of_api.clone()))
        .mut_subcommand("migrate", |migrate| {
            let of_serve = [
                "listen",
                "ops_listen",
                "tls_cert",
                "tls_key",
                "insecure_ops",
                "max_memory",
            ];
            hidden(hidden(migrate, &of_serve), &OF_LOG).args(of_api.clone())
        })
        .mut_subcommand("doctor", |doctor| hidden(doctor, &OF_LOG))
        .mut_subcommand("versions", |versions| versions.args(of_gateways.clone()))
        .mut_subcommand("rules", |rules| {
            rules.mut_subcommand("preview", |preview| {
                hidden(preview, &["reason", "retry_after", "expires", "evict", "confirm"])
            })
        })
}

fn dispatch(common: &Common, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::Serve(args) => serve::run(common, args),
        Verb::Rules(verb) => rules::run(&Context::new(common)?, verb),
        Verb::Devices(verb) => devices::run(common, verb),
        Verb::Firmware(verb) => firmware::run(&Context::new(common)?, &verb),
        Verb::Nodes => nodes::run(&Context::new(common)?),
        Verb::Drain(verb) => drain::run(&Context::new(common)?, &verb),
        Verb::LogLevel(args) => log_level::run(&Context::new(common)?, &args),
        Verb::Alarms(_) => alarms::run(&Context::new(common)?),
        Verb::Config(verb) => config::run(common, verb),
        Verb::Events(verb) => events::run(&Context::new(common)?, &verb),
        Verb::Tokens(verb) => tokens::run(&Context::new(common)?, verb),
        Verb::Versions(verb) => versions::run(verb),
        Verb::Audit(verb) => audit::run(&Context::new(common)?, &verb),
        Verb::Doctor(args) => doctor::run(common, args),
        Verb::Migrate(args) => migrate::run(common, args),
    }
}

/// What an operator's verb works with.
struct Context {
    client: Client,
    json: bool,
}

impl Context {
    fn new(common: &Common) -> Result<Self, Failure> {
        Ok(Self {
            client: Client::new(common)?,
            json: common.json,
        })
    }

    /// Prints the API's JSON where it was asked for, else what `people` makes of it.
    fn show(
        &self,
        answer: &serde_json::Value,
        people: impl FnOnce(&serde_json::Value) -> String,
    ) -> Result<(), Failure> {
        table::print(&if self.json { table::json(answer) } else { people(answer) })
    }

    /// Tells people the command that shows the next page of a list, where there is one.
    fn note_next_page(&self, answer: &serde_json::Value) {
        if let (false, Some(cursor)) = (self.json, answer.get("next_cursor").and_then(serde_json::Value::as_str)) {
            note(&format!("more: {}", next_command(std::env::args().skip(1), cursor)));
        }
    }
}

/// This command line with another cursor, ready for a shell.
fn next_command(args: impl Iterator<Item = String>, cursor: &str) -> String {
    let mut words = vec!["seawall".to_owned()];
    let mut args = args;
    while let Some(arg) = args.next() {
        if arg == "--cursor" {
            args.next();
        } else if !arg.starts_with("--cursor=") {
            words.push(quoted(&arg));
        }
    }
    words.extend(["--cursor".to_owned(), quoted(cursor)]);
    words.join(" ")
}

/// A word as a POSIX shell reads it.
fn quoted(word: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:=@%+,".contains(&byte);
    if !word.is_empty() && word.bytes().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// Why a verb did not do what it was asked.
#[derive(Debug)]
enum Failure {
    /// The gateway refused. See [`Refusal::status`].
    Refused(Box<Refusal>),
    /// Something else went wrong.
    Failed(anyhow::Error),
    /// No gateway answers.
    Unreachable(anyhow::Error),
    /// The command line or a setting is wrong.
    WrongUse(String),
    /// The log has the reason. With this exit status.
    Logged(u8),
    /// Nothing was found, and the empty output says so.
    NoMatch,
    /// Nobody reads standard output any more. The reader has seen enough.
    OutputClosed,
}

impl Failure {
    fn failed(problem: impl fmt::Display + fmt::Debug + Send + Sync + 'static) -> Self {
        Self::Failed(anyhow::Error::msg(problem))
    }

    fn exit_status(&self) -> u8 {
        match self {
            Self::OutputClosed => DONE,
            Self::Logged(status) => *status,
            Self::Refused(refusal) if refusal.is_wrong_use() => WRONG_USE,
            Self::Refused(_) | Self::Failed(_) | Self::Unreachable(_) | Self::NoMatch => FAILED,
            Self::WrongUse(_) => WRONG_USE,
        }
    }

    /// What went wrong, for people. `None`: there is nothing to say.
    fn text(&self) -> Option<String> {
        match self {
            Self::Refused(refusal) => Some(refusal.text.clone()),
            Self::Failed(error) | Self::Unreachable(error) => Some(format!("{error:#}")),
            Self::WrongUse(problem) => Some(problem.clone()),
            Self::Logged(_) | Self::NoMatch | Self::OutputClosed => None,
        }
    }

    /// The same in the form of the API's errors. A refusal is as the gateway sent it.
    fn problem(&self) -> Option<serde_json::Value> {
        let (code, title) = match self {
            Self::Refused(refusal) if refusal.body.is_object() => return Some(refusal.body.clone()),
            Self::Refused(_) | Self::Failed(_) => ("failed", "The command failed"),
            Self::Unreachable(_) => ("unreachable", "The gateway cannot be reached"),
            Self::WrongUse(_) => ("wrong_use", "The command line or a setting is wrong"),
            Self::Logged(_) | Self::NoMatch | Self::OutputClosed => return None,
        };
        Some(serde_json::json!({
            "type": format!("urn:seawall:problem:{code}"),
            "title": title,
            "code": code,
            "detail": self.text()?,
        }))
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::OutputClosed
        } else {
            Self::Failed(error.into())
        }
    }
}

/// Names of environment variables that look like a setting and are none, in order.
///
/// Kubernetes adds variables of its own for each service, such as `SEAWALL_PORT` and `SEAWALL_SERVICE_HOST`: so these are no error.
fn unknown_variables() -> Vec<String> {
    let mut known = vec!["SEAWALL_TOKEN".to_owned()];
    let mut commands = vec![Cli::command()];
    while let Some(command) = commands.pop() {
        let names = command.get_arguments().filter_map(|argument| argument.get_env());
        known.extend(names.map(|name| name.to_string_lossy().into_owned()));
        commands.extend(command.get_subcommands().cloned());
    }
    let mut names: Vec<_> = std::env::vars_os()
        .map(|(name, _)| name.to_string_lossy().into_owned())
        .filter(|name| is_unknown(name, &known))
        .collect();
    names.sort();
    names
}

fn is_unknown(name: &str, known: &[String]) -> bool {
    let is_for_others = name.starts_with("SEAWALL_LOADTEST_") || name == "SEAWALL_PG_BIN";
    let is_of_kubernetes = name.ends_with("_PORT") || name.contains("_PORT_") || name.contains("_SERVICE_");
    name.starts_with("SEAWALL_") && !is_for_others && !is_of_kubernetes && !known.iter().any(|one| one == name)
}

/// Writes what went wrong to standard error: one line, control characters escaped, or JSON.
fn complain(failure: &Failure, as_json: bool) -> ExitCode {
    let status = ExitCode::from(failure.exit_status());
    if as_json {
        if let Some(problem) = failure.problem() {
            let _ = io::Write::write_all(&mut io::stderr(), table::json(&problem).as_bytes());
        }
        return status;
    }
    let Some(problem) = failure.text() else { return status };
    let line = problem
        .split('\n')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join(" ");
    note(&format!("error: {line}"));
    status
}

/// A line on standard error for people; nothing is left to do where that fails.
fn note(line: &str) {
    let _ = io::Write::write_all(&mut io::stderr(), format!("{}\n", table::text(line)).as_bytes());
}

/// Help and version as clap prints them; a mistake as one line.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "every other kind is a mistake, those that clap may add too"
)]
fn usage(error: &clap::Error, as_json: bool) -> ExitCode {
    use clap::error::ErrorKind;
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            ExitCode::from(DONE)
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(WRONG_USE)
        }
        _ => complain(&Failure::WrongUse(mistake(&error.to_string())), as_json),
    }
}

/// A mistake as clap renders it (what is wrong, tips, the usage, where to find help), as one line.
fn mistake(rendered: &str) -> String {
    let problem = rendered.split("\n\n").next().unwrap_or_default();
    let problem = problem.trim_start_matches("error: ");
    // The standard library's words.
    let mut line = problem.replace("invalid digit found in string", "expected a whole number");
    for tip in rendered.lines().filter_map(|line| line.trim().strip_prefix("tip: ")) {
        line.push_str("; ");
        line.push_str(tip);
    }
    let usage = rendered.lines().find_map(|line| line.trim().strip_prefix("Usage: "));
    if let Some(usage) = usage {
        let words = usage
            .split(' ')
            .take_while(|word| !word.starts_with(['<', '[', '-', '\'']));
        let command: Vec<&str> = words
            .filter(|word| word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'))
            .collect();
        line.push_str(&format!("; see '{} --help'", command.join(" ")));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelled_words_get_a_suggestion_and_the_help_to_read() {
        for (words, suggested, help) in [
            (&["ruels", "list"][..], "'rules'", "'seawall --help'"),
            (&["rules", "blok", ">=3.8"], "'block'", "'seawall rules --help'"),
            (
                &["rules", "block", ">=3.8", "--reson", "x"],
                "'--reason'",
                "'seawall rules block --help'",
            ),
        ] {
            let line = std::iter::once(&"seawall").chain(words);
            let error = Cli::try_parse_from(line).unwrap_err();

            let line = mistake(&error.to_string());

            assert!(
                line.contains(suggested) && line.contains(help) && !line.contains('\n'),
                "{line}"
            );
        }
        assert!(
            Cli::try_parse_from(["seawall", "rule", "list"]).is_ok(),
            "the singular is understood"
        );
    }

    #[test]
    fn variable_that_no_setting_is_called_is_unknown_unless_kubernetes_makes_it() {
        let known = ["SEAWALL_LISTEN".to_owned()];
        for (name, expected) in [
            ("SEAWALL_HEARTBEAT", true),
            ("SEAWALL_LISTENN", true),
            ("SEAWALL_LISTEN", false),
            ("SEAWALL_LOADTEST_DATABASE", false),
            ("SEAWALL_PORT", false),
            ("SEAWALL_PORT_8080_TCP_ADDR", false),
            ("SEAWALL_OPS_SERVICE_HOST", false),
            ("HOME", false),
        ] {
            assert_eq!(is_unknown(name, &known), expected, "{name}");
        }
    }

    #[test]
    fn same_mistake_has_the_same_status_whoever_finds_it() {
        let refused = |status, body| {
            let answer = client::Answer { status, body };
            answer.ok().unwrap_err()
        };
        let bad_file = serde_json::json!({"detail": "1 line is wrong", "bad_lines": [{"number": 2, "reason": "x"}]});

        for (failure, status) in [
            (Failure::WrongUse("--retry-after: expected a time".into()), WRONG_USE),
            (
                refused(422, serde_json::json!({"detail": "retry_after: expected 1s or more"})),
                WRONG_USE,
            ),
            (
                refused(400, serde_json::json!({"detail": "limit: expected 1 to 1000"})),
                WRONG_USE,
            ),
            (refused(422, bad_file.clone()), FAILED),
            (refused(401, serde_json::Value::Null), FAILED),
            (
                refused(404, serde_json::json!({"detail": "there is no such device"})),
                FAILED,
            ),
            (
                refused(503, serde_json::json!({"detail": "the database does not answer"})),
                FAILED,
            ),
            (Failure::failed("x"), FAILED),
            (Failure::NoMatch, FAILED),
            (Failure::OutputClosed, DONE),
        ] {
            assert_eq!(failure.exit_status(), status, "{failure:?}");
        }
        assert_eq!(
            refused(422, bad_file.clone()).problem(),
            Some(bad_file),
            "as the gateway sent it"
        );
    }

    #[test]
    fn next_page_is_a_command_ready_to_paste() {
        let args = [
            "devices",
            "list",
            "--firmware",
            ">=3.8",
            "--cursor",
            "old",
            "--tenant",
            "o'neil",
        ];

        let command = next_command(args.into_iter().map(str::to_owned), "new");

        assert_eq!(
            command,
            r"seawall devices list --firmware '>=3.8' --tenant 'o'\''neil' --cursor new"
        );
    }

    #[test]
    fn number_that_is_none_is_said_in_words() {
        let error = Cli::try_parse_from(["seawall", "audit", "--limit", "ten"]).unwrap_err();

        let line = mistake(&error.to_string());

        assert!(
            line.contains("'ten'") && line.contains("expected a whole number"),
            "{line}"
        );
    }

    #[test]
    fn command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn every_option_that_help_shows_has_a_text() {
        let mut root = command();
        root.build();
        let mut commands = vec![root];
        while let Some(command) = commands.pop() {
            for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
                assert!(
                    argument.get_help().is_some(),
                    "{} {}",
                    command.get_name(),
                    argument.get_id()
                );
            }
            commands.extend(command.get_subcommands().cloned());
        }
    }

    #[test]
    fn option_that_changes_nothing_is_taken_and_not_offered() {
        let help = |words: &[&str]| {
            let line: Vec<OsString> = ["seawall"]
                .iter()
                .chain(words)
                .chain(&["--help"])
                .map(OsString::from)
                .collect();
            parse(&line).unwrap_err().to_string()
        };
        for (words, hidden, shown) in [
            (&["serve"][..], "--json", "--listen"),
            (&["migrate"], "--log-format", "--database"),
            (&["doctor"], "--log-level", "--url"),
            (&["versions", "sort"], "--url", "--help"),
            (&["rules", "preview"], "--confirm", "--from"),
            (&["rules", "block"], "--no-such-option", "--confirm"),
        ] {
            let help = help(words);
            assert!(!help.contains(hidden) && help.contains(shown), "{help}");
        }
        let line = |words: &str| parse(&words.split(' ').map(OsString::from).collect::<Vec<_>>());
        for words in ["seawall --url http://h:1 serve", "seawall serve --url http://h:1"] {
            assert_eq!(line(words).unwrap().common.url, "http://h:1", "{words}");
        }
        assert_eq!(line("seawall nodes --url http://h:2").unwrap().common.url, "http://h:2");
        assert!(line("seawall rules preview =1 --evict --confirm").is_ok());
    }
}
