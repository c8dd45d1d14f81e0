//! Logs on standard error, and the handle that changes their level while the gateway runs.

use tracing_subscriber::EnvFilter;

/// Reads a level, or directives such as `info,seawall_gateway::lookup=debug`.
///
/// # Errors
/// The text is neither.
pub fn parse_level(text: &str) -> Result<EnvFilter, tracing_subscriber::filter::ParseError> {
    EnvFilter::builder().parse(text)
}
