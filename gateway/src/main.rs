//! The binary `seawall`: everything is in the library.

use std::process::ExitCode;

/// Has the least overhead with hundreds of thousands of small allocations, and returns memory after a storm, which
/// glibc's allocator keeps. docs/BENCHMARKS.md has the figures; the settings are in `.cargo/config.toml`.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    seawall_gateway::cli::run(std::env::args_os())
}
