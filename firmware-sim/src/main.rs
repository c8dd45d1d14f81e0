//! `firmware-sim`: a fleet of simulated devices against a gateway.
//!
//! Prints a line a second (`--json`: a JSON object), takes orders on standard input, and splits a fleet that is too big for
//! one process over several of itself. Exit 0: done; 1: failed; 2: wrong use.

mod program;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let options = program::Options::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("firmware-sim: starting the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(program::run(options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("firmware-sim: {:#}", failure.error());
            failure.exit_code()
        }
    }
}
