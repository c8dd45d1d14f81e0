//! The command line: `seawall serve`, and the operator's commands, which use a gateway's API. Start with [`run`].
//!
//! See [`failure`] for the exit status. An error is one line on standard error; with `--json` it is a JSON object.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{Arg, Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;

mod access;
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
mod eviction;
mod failure;
mod firmware;
mod log_level;
mod migrate;
mod nodes;
mod presence;
mod proposals;
mod rollouts;
mod rule_args;
mod rule_view;
mod rules;
mod seed;
mod serve;
mod table;
mod time;
mod tokens;
mod versions;
mod webhook;

pub use serve::ServeArgs;

use crate::runtime::config::is_long_form;
use client::Client;
use failure::{DONE, Failure, complain, note, usage};

use crate::fleet::alarms::quoted;

/// Shown under `seawall --help`.
const EXAMPLES: &str = "\
Examples:
  seawall serve                                                   a gateway with its data in ./seawall-data
  seawall devices seed --count 100 --out devices.csv              100 devices with random secrets
  seawall firmware                                                who runs which version
  seawall rules preview '>=3.8.0-b3'                              what a block would match
  seawall rules block '>=3.8.0-b3' --reason 'boot loop' --evict   block it, and end its sessions
  seawall drain start                                             close all sessions, at a pace
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

/// Options of every command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
struct Common {
    /// Data directory of the gateway: its files, and the admin token that commands use if SEAWALL_TOKEN is not set
    /// [default: ./seawall-data]
    #[arg(long, global = true, env = "SEAWALL_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// API of the gateway that the command is for
    #[arg(long, global = true, env = "SEAWALL_URL", default_value = access::DEFAULT_URL, value_name = "URL")]
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
    /// The registry of devices, and their state
    #[command(subcommand, alias = "device")]
    Devices(devices::Devices),
    /// How many devices are online, offline and unknown
    Presence(presence::Presence),
    /// Figures of each firmware version: connected, refused, repeated, lookups
    Firmware(firmware::Firmware),
    /// Proposals of the cohort breaker: firmware versions whose devices fail
    #[command(subcommand, alias = "proposal")]
    Proposals(proposals::Proposals),
    /// State of the gateway: sessions, admission, database, rules, drain
    #[command(alias = "node")]
    Nodes,
    /// Close the sessions of a gateway at a pace, before it stops
    #[command(subcommand)]
    Drain(drain::Drain),
    /// Change the log level of a gateway, until SIGHUP or a restart; `nodes --json` shows it
    LogLevel(log_level::LogLevel),
    /// Active alarms: conditions that a person should look at
    #[command(alias = "alarm")]
    Alarms(alarms::Alarms),
    /// The webhook that alarms are posted to
    #[command(subcommand)]
    Webhook(webhook::Webhook),
    /// Follow presence, rules, alarms and messages of devices as they happen
    Events(events::Events),
    /// Access tokens for the API
    #[command(subcommand, alias = "token")]
    Tokens(tokens::Tokens),
    /// Firmware version order; needs no gateway
    #[command(subcommand)]
    Versions(versions::Versions),
    /// The audit log, newest first
    Audit(audit::Audit),
    /// Diagnose this machine, the configuration and the gateway
    Doctor(ServeArgs),
    /// The configuration of a gateway, as TOML; needs no gateway
    #[command(subcommand)]
    Config(config::ConfigVerb),
    /// Migrate the tables of the database to this version
    Migrate(ServeArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
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

/// Returns the command line. Options that have no effect on a command are accepted, and hidden in its help.
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
        .mut_subcommand("completions", |completions| completions.args(of_gateways.clone()))
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
        Verb::Presence(verb) => presence::run(&Context::new(common)?, &verb),
        Verb::Firmware(verb) => firmware::run(&Context::new(common)?, &verb),
        Verb::Proposals(verb) => proposals::run(&Context::new(common)?, verb),
        Verb::Nodes => nodes::run(&Context::new(common)?),
        Verb::Drain(verb) => drain::run(&Context::new(common)?, &verb),
        Verb::LogLevel(args) => log_level::run(&Context::new(common)?, &args),
        Verb::Alarms(_) => alarms::run(&Context::new(common)?),
        Verb::Webhook(verb) => webhook::run(&Context::new(common)?, &verb),
        Verb::Config(verb) => config::run(common, verb),
        Verb::Events(verb) => events::run(&Context::new(common)?, &verb),
        Verb::Tokens(verb) => tokens::run(&Context::new(common)?, verb),
        Verb::Versions(verb) => versions::run(verb),
        Verb::Audit(verb) => audit::run(&Context::new(common)?, &verb),
        Verb::Doctor(args) => doctor::run(common, args),
        Verb::Migrate(args) => migrate::run(common, args),
        Verb::Completions { shell } => table::print(&completions(shell)),
    }
}

fn completions(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "seawall", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// The context of an operator's command.
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

    /// Prints the API's JSON with `--json`, else the text that `people` makes of it.
    fn show(
        &self,
        answer: &serde_json::Value,
        people: impl FnOnce(&serde_json::Value) -> String,
    ) -> Result<(), Failure> {
        table::print(&if self.json { table::json(answer) } else { people(answer) })
    }

    /// Tells people the command that shows the next page of a list, if there is one.
    fn note_next_page(&self, answer: &serde_json::Value) {
        if let (false, Some(cursor)) = (self.json, answer.get("next_cursor").and_then(serde_json::Value::as_str)) {
            note(&format!("more: {}", next_command(std::env::args().skip(1), cursor)));
        }
    }
}

/// Returns this command line with another cursor, quoted for a shell.
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

/// Maximum number of wrong characters in the name of a variable that is taken for a misspelt setting.
const TYPOS_MAX: usize = 2;

/// An environment variable that looks like a setting and is not one.
struct UnknownVariable {
    name: String,
    /// The setting that is meant, if the name is almost the same. Then it is an error.
    meant: Option<String>,
}

/// Returns the environment variables that look like a setting and are not one, in order.
///
/// Most are not an error: Kubernetes adds variables for each service, such as `SEAWALL_PORT` and
/// `SEAWALL_SERVICE_HOST`.
fn unknown_variables() -> Vec<UnknownVariable> {
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
    let meant = |name: &str| known.iter().find(|one| typos(one, name) <= TYPOS_MAX).cloned();
    let unknown = names.into_iter().map(|name| UnknownVariable {
        meant: meant(&name),
        name,
    });
    unknown.collect()
}

/// Number of characters to insert, remove or replace that make one text of the other (Levenshtein).
fn typos(left: &str, right: &str) -> usize {
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (at, left) in left.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], at + 1);
        for (column, right) in right.bytes().enumerate() {
            let replaced = diagonal + usize::from(left != right);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[right.len()]
}

fn is_unknown(name: &str, known: &[String]) -> bool {
    let is_for_others = name.starts_with("SEAWALL_LOADTEST_") || name == "SEAWALL_PG_BIN";
    let is_of_kubernetes = name.ends_with("_PORT") || name.contains("_PORT_") || name.contains("_SERVICE_");
    // The long forms of settings are checked where they are read.
    name.starts_with("SEAWALL_")
        && !is_long_form(name)
        && !is_for_others
        && !is_of_kubernetes
        && !known.iter().any(|one| one == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variable_that_no_setting_is_called_is_unknown_unless_kubernetes_makes_it() {
        let known = ["SEAWALL_LISTEN".to_owned()];
        for (name, expected) in [
            ("SEAWALL_HEARTBEAT", true),
            ("SEAWALL_LISTENN", true),
            ("SEAWALL_LISTEN", false),
            ("SEAWALL_LOADTEST_DATABASE", false),
            ("SEAWALL_LIMITS__HEAD_BYTES_MAX", false),
            ("SEAWALL_PORT", false),
            ("SEAWALL_PORT_8080_TCP_ADDR", false),
            ("SEAWALL_OPS_SERVICE_HOST", false),
            ("HOME", false),
        ] {
            assert_eq!(is_unknown(name, &known), expected, "{name}");
        }
    }

    #[test]
    fn typos_are_counted() {
        for (left, right, expected) in [
            ("SEAWALL_LISTEN", "SEAWALL_LISTEN", 0),
            ("SEAWALL_LISTEN", "SEAWALL_LISTENN", 1),
            ("SEAWALL_DATABASE", "SEAWALL_DATBASE", 1),
            ("SEAWALL_DATABASE", "SEAWALL_DATABASE_URL", 4),
            ("SEAWALL_TLS_CERT", "SEAWALL_TSL_CERT", 2),
            ("", "abc", 3),
        ] {
            assert_eq!(
                (typos(left, right), typos(right, left)),
                (expected, expected),
                "{left} {right}"
            );
        }
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
