//! Failures of commands: their exit status, and their text for people and programs. Start with [`Failure`].

use std::{fmt, io, process::ExitCode};

use super::{client::Refusal, table};

/// Exit status: the command did what it was asked.
pub const DONE: u8 = 0;
/// Exit status: the gateway refused, cannot be reached or failed; a file cannot be read; `doctor` found a fault;
/// nothing matches.
pub const FAILED: u8 = 1;
/// Exit status: an argument, a setting or a value is wrong, whether the command line or the gateway finds it.
pub const WRONG_USE: u8 = 2;

/// Why a command failed.
#[derive(Debug)]
pub enum Failure {
    /// The gateway refused. See [`Refusal::status`].
    Refused(Box<Refusal>),
    /// Something else went wrong.
    Failed(anyhow::Error),
    /// The gateway can't be reached.
    Unreachable(anyhow::Error),
    /// The command line or a setting is wrong.
    WrongUse(String),
    /// The reason is in the log. The exit status is this one.
    Logged(u8),
    /// The reader has closed standard output.
    OutputClosed,
}

impl Failure {
    /// Something went wrong, with this cause.
    pub fn failed(problem: impl fmt::Display + fmt::Debug + Send + Sync + 'static) -> Self {
        Self::Failed(anyhow::Error::msg(problem))
    }

    /// Returns the exit status of the command.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::OutputClosed => DONE,
            Self::Logged(status) => *status,
            Self::Refused(refusal) if refusal.is_wrong_use() => WRONG_USE,
            Self::Refused(_) | Self::Failed(_) | Self::Unreachable(_) => FAILED,
            Self::WrongUse(_) => WRONG_USE,
        }
    }

    /// Returns the error for people. `None`: nothing is printed.
    pub fn text(&self) -> Option<String> {
        match self {
            Self::Refused(refusal) => Some(refusal.text.clone()),
            Self::Failed(error) | Self::Unreachable(error) => Some(format!("{error:#}")),
            Self::WrongUse(problem) => Some(problem.clone()),
            Self::Logged(_) | Self::OutputClosed => None,
        }
    }

    /// Returns the error in the API's form. A refusal is as the gateway sent it.
    pub fn problem(&self) -> Option<serde_json::Value> {
        let (code, title) = match self {
            Self::Refused(refusal) if refusal.body.is_object() => return Some(refusal.body.clone()),
            Self::Refused(_) | Self::Failed(_) => ("failed", "The command failed"),
            Self::Unreachable(_) => ("unreachable", "The gateway cannot be reached"),
            Self::WrongUse(_) => ("wrong_use", "The command line or a setting is wrong"),
            Self::Logged(_) | Self::OutputClosed => return None,
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

/// Prints an error on standard error: one line with escaped control characters, or JSON.
pub fn complain(failure: &Failure, as_json: bool) -> ExitCode {
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

/// Prints a line for people on standard error. A failure is ignored.
pub fn note(line: &str) {
    let _ = io::Write::write_all(&mut io::stderr(), format!("{}\n", table::text(line)).as_bytes());
}

/// Prints help and version as clap does, and a mistake as one line.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "every other kind is a mistake, including those that clap may add"
)]
pub fn usage(error: &clap::Error, as_json: bool) -> ExitCode {
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

/// Returns clap's text of a mistake (the error, tips, the usage, where to find help) as one line.
fn mistake(rendered: &str) -> String {
    let problem = rendered.split("\n\n").next().unwrap_or_default();
    let problem = problem.trim_start_matches("error: ");
    // The standard library's text.
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
    use clap::Parser;

    use super::{
        super::{Cli, client},
        *,
    };

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
    fn number_that_is_none_is_said_in_words() {
        let error = Cli::try_parse_from(["seawall", "audit", "--limit", "ten"]).unwrap_err();

        let line = mistake(&error.to_string());

        assert!(
            line.contains("'ten'") && line.contains("expected a whole number"),
            "{line}"
        );
    }
}
