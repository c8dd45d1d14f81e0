//! How the program ends: an exit status has one meaning, in all subcommands.

use std::process::ExitCode;

use anyhow::Error;

/// End of a command that did its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// 0: all thresholds hold, the reports agree, the figures are measured.
    Held,
    /// 1: a threshold does not hold, a figure is worse than the baseline, or the reports differ.
    Missed,
    /// 3: the run was stopped before it could be judged.
    Stopped,
    /// 4: the generator was the limit, so that the figures say nothing about the server.
    Inconclusive,
}

/// Why a command did not do its work.
#[derive(Debug)]
pub enum Failure {
    /// 2: arguments, or a file that they name, are wrong. The same command can never succeed.
    WrongUse(Error),
    /// 3: the run could not be made: a program, a port, a database or a target is missing, or it was interrupted.
    NotRun(Error),
    /// 4: this machine can't drive the fleet.
    Inconclusive(Error),
}

impl Failure {
    pub fn wrong_use(error: impl Into<Error>) -> Self {
        Self::WrongUse(error.into())
    }

    #[must_use]
    pub const fn error(&self) -> &Error {
        match self {
            Self::WrongUse(error) | Self::NotRun(error) | Self::Inconclusive(error) => error,
        }
    }

    #[must_use]
    pub fn code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::WrongUse(_) => 2,
            Self::NotRun(_) => 3,
            Self::Inconclusive(_) => 4,
        })
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::NotRun(error)
    }
}

impl Exit {
    #[must_use]
    pub fn code(self) -> ExitCode {
        ExitCode::from(match self {
            Self::Held => 0,
            Self::Missed => 1,
            Self::Stopped => 3,
            Self::Inconclusive => 4,
        })
    }
}
