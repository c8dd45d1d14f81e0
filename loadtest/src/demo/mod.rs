//! The demo: a gateway on embedded SQLite and a fleet of devices, in separate processes, with live figures.
//!
//! Start with [`run`]. The figures are those of the gateway's `/metrics`.

mod fleet;
#[cfg(test)]
mod tests;
mod timeline;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use tokio_util::sync::CancellationToken;

use self::{
    fleet::{Cli, Fleet},
    timeline::{Figures, Timeline},
};
use crate::{guard::TempDir, programs, progress::Progress, server::Server};

/// Versions that the printed command blocks: over a third of the fleet.
const BLOCKED_RANGE: &str = ">=3.8.0-b3";
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Options of the demo.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub devices: usize,
    /// Drop every socket at once when all devices are connected.
    pub has_storm: bool,
    /// Duration of the demo. `None`: until it is interrupted.
    pub length: Option<Duration>,
}

/// Runs the demo until it is interrupted or its time is over. Leaves no process and no file behind.
///
/// # Errors
/// A process could not be started or died, or the demo did not go well.
pub async fn run(options: Options, interrupted: &CancellationToken) -> Result<()> {
    let progress = Progress::new();
    progress.note("building the gateway and the simulated devices (the first time takes minutes)");
    let folder = TempDir::new("demo").context("creating a temporary folder")?;
    // An interrupt drops what is awaited, and its processes with it.
    let done = interrupted
        .run_until_cancelled(show(options, folder.path(), &progress))
        .await;
    progress.finish();
    done.unwrap_or(Ok(()))
}

async fn show(options: Options, folder: &Path, progress: &Progress) -> Result<()> {
    programs::build(&["seawall", "firmware-sim"]).await?;
    let data = folder.join("data");
    let mut server = Server::gateway(&data, &toml::Table::new(), None).await?;
    let seawall = Cli {
        program: programs::find("seawall")?,
        url: server.ops().url().to_owned(),
        token: data.join("admin.token"),
    };
    progress.note(&format!("registering {} devices", options.devices));
    let parts = seawall.register(options.devices, folder).await?;
    progress.note(&invitation(options.devices, &server, &seawall));
    let mut fleet = Fleet {
        parts,
        folder: folder.to_owned(),
        url: server.url().to_owned(),
        sims: Vec::new(),
    };
    fleet.start()?;
    let started = Instant::now();
    let mut timeline = Timeline::default();
    let mut last = Figures::default();
    loop {
        server.check()?;
        fleet.check()?;
        let ops = server.ops().clone();
        // A gateway that is busy for a moment loses one sample only.
        if let Ok(metrics) = tokio::task::spawn_blocking(move || ops.metrics())
            .await
            .context("the task that reads metrics")?
        {
            last = Figures::of(&metrics);
        }
        if timeline.advance(options, &last, progress) {
            fleet.drop_all(progress)?;
        }
        progress.update(|| status(options.devices, &last, started.elapsed()));
        if options.length.is_some_and(|length| started.elapsed() >= length) {
            break;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    fleet.stop().await;
    server.stop().await;
    progress.finish();
    timeline.judge(options, &last)?;
    progress.note("all is well");
    Ok(())
}

fn status(devices: usize, figures: &Figures, since: Duration) -> String {
    let devices = devices as u64;
    let refused: u64 = figures.refused.values().sum();
    let mut text = format!(
        "{:5.0} s  connected {} of {devices}  reconnecting {}  refused {refused}  look-ups {} in {} statements",
        since.as_secs_f64(),
        figures.connected,
        devices.saturating_sub(figures.connected),
        figures.lookups,
        figures.statements,
    );
    let list = |text: &mut String, title: &str, counts: &BTreeMap<String, u64>| {
        if !counts.is_empty() {
            let _ = write!(text, "\n  {title}:"); // writing to a String can't fail
            for (name, count) in counts {
                let _ = write!(text, "  {name} {count}");
            }
        }
    };
    list(&mut text, "versions", &figures.versions);
    list(&mut text, "refusals", &figures.refused);
    text
}

fn invitation(devices: usize, server: &Server, seawall: &Cli) -> String {
    format!(
        "\n{devices} devices connect to {url}/v1/connect\n\
         API and metrics:  {ops}  (/metrics, /api/v1/openapi.json)\n\
         admin token:      {token}\n\n\
         Block a firmware; paste into another terminal:\n  {block}\n\
         See what it did:\n  {firmware}\n\
         Ctrl-C ends everything.\n",
        url = server.url(),
        ops = seawall.url,
        token = seawall.token.display(),
        block = seawall.line(&format!(
            "rules block '{BLOCKED_RANGE}' --reason 'scans the device table at every connect' --evict"
        )),
        firmware = seawall.line("firmware"),
    )
}
