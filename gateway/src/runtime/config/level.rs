//! Log levels and directives.

use tracing_subscriber::{
    EnvFilter,
    filter::{LevelFilter, ParseError},
};

/// Maximum length of a level, in bytes. A longer one is an error.
const LEVEL_BYTES_MAX: usize = 1_024;

/// A text that is not a log level.
#[derive(Debug, thiserror::Error)]
pub enum InvalidLevel {
    /// A word such as `hyper`, which the syntax of directives would take for a target.
    #[error("{0:?} is not a log level: expected off, error, warn, info, debug, trace, or TARGET=LEVEL")]
    Unknown(String),
    /// It has neither a level nor a directive.
    #[error("is empty: expected a level, or directives such as info,seawall_gateway::lookup=debug")]
    Empty,
    /// It is longer than the maximum.
    #[error("is longer than {LEVEL_BYTES_MAX} bytes")]
    TooLong,
    /// An invalid directive.
    #[error(transparent)]
    Directive(#[from] ParseError),
}

/// Parses a level, or directives such as `info,seawall_gateway::lookup=debug`.
///
/// # Errors
/// The text is neither.
pub fn parse_level(text: &str) -> Result<EnvFilter, InvalidLevel> {
    if text.len() > LEVEL_BYTES_MAX {
        return Err(InvalidLevel::TooLong);
    }
    let mut directives = text.split(',').filter(|directive| !directive.is_empty()).peekable();
    if directives.peek().is_none() {
        return Err(InvalidLevel::Empty);
    }
    // A misspelt level would be taken for a target, and nothing but that target would be logged.
    let unknown =
        directives.find(|directive| !directive.contains(['=', '[']) && directive.parse::<LevelFilter>().is_err());
    match unknown {
        Some(unknown) => Err(InvalidLevel::Unknown(unknown.to_owned())),
        None => Ok(EnvFilter::builder().parse(text)?),
    }
}
