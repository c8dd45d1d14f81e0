//! `cargo demo`: a gateway, a fleet of devices, and a firmware to block.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use clap::Parser;
use loadtest::{demo, guard, signals};
use tokio_util::sync::CancellationToken;

/// Shows Seawall at work: a gateway on embedded SQLite, and devices of several firmware versions that connect to it.
#[derive(Parser)]
#[command(name = "demo", version)]
struct Cli {
    /// Devices of the fleet.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=18_000))]
    devices: u32,
    /// When all are connected, drop every socket at once and show the recovery.
    #[arg(long)]
    storm: bool,
    /// End after this many seconds; exit 0 only if all was well. Without it the demo runs until Ctrl-C.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    seconds: Option<u32>,
}

fn main() -> ExitCode {
    guard::serve_if_asked();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let cli = Cli::parse();
    guard::start().context("starting the guard that cleans up")?;
    let options = demo::Options {
        devices: usize::try_from(cli.devices).context("more devices than this machine can count")?,
        has_storm: cli.storm,
        length: cli.seconds.map(|seconds| Duration::from_secs(seconds.into())),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    runtime.block_on(async {
        let interrupted = CancellationToken::new();
        tokio::spawn(signals::cancel(interrupted.clone()));
        demo::run(options, &interrupted).await
    })
}
