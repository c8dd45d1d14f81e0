//! The binary `seawall`: everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    seawall_gateway::cli::run(std::env::args_os())
}
