//! The binary `seawall`: everything is in the library.

use std::process::ExitCode;

/// Wastes the least on a hundred thousand small things, and gives memory back after a storm, which glibc's allocator keeps:
/// docs/BENCHMARKS.md has the figures. Its settings are in `.cargo/config.toml`.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    seawall_gateway::cli::run(std::env::args_os())
}
