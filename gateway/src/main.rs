//! The binary `seawall`: everything is in the library.

use std::process::ExitCode;

/// Gives memory back after a storm, which glibc's allocator keeps: docs/BENCHMARKS.md has the figures.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    seawall_gateway::cli::run(std::env::args_os())
}
