//! The demo's devices: registered through the operator's command line, run by processes of `firmware-sim`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};
use rustix::process::Signal;

use crate::{
    process::{self, Process},
    programs,
    progress::Progress,
    server::without_settings,
};

/// Versions of the fleet, and the parts of it that run them, in percent.
const FIRMWARE_MIX: &str = "3.7.4=20%,3.8.0-b2=52%,3.8.0-b3=20%,3.8.0=8%";
/// Devices of one process of the simulator.
const DEVICES_PER_PROCESS: usize = 5_000;
/// Processes at least, so that a fleet is never one program only.
const PROCESSES_MIN: usize = 2;
const COMMAND_TIME_MAX: Duration = Duration::from_secs(120);
const SIM_STOP_GRACE: Duration = Duration::from_secs(5);

/// The operator's command line, pointed at the demo's gateway.
pub(super) struct Cli {
    pub(super) program: PathBuf,
    pub(super) url: String,
    pub(super) token: PathBuf,
}

impl Cli {
    /// Makes devices with random secrets and registers them. Returns files with the parts of the fleet.
    pub(super) async fn register(&self, devices: usize, folder: &Path) -> Result<Vec<PathBuf>> {
        let all = folder.join("devices.csv");
        let mut seed = self.command()?;
        seed.args(["devices", "seed", "--count"])
            .arg(devices.to_string())
            .arg("--out")
            .arg(&all);
        process::output("seawall devices seed", seed, COMMAND_TIME_MAX).await?;
        let mut import = self.command()?;
        import.args(["devices", "import"]).arg(&all);
        process::output("seawall devices import", import, COMMAND_TIME_MAX).await?;
        split(&all, folder)
    }

    fn command(&self) -> Result<Command> {
        let token = fs::read_to_string(&self.token).context("reading the admin token")?;
        let mut command = Command::new(&self.program);
        without_settings(&mut command)
            .env("SEAWALL_URL", &self.url)
            .env("SEAWALL_TOKEN", token.trim());
        Ok(command)
    }

    /// A line to paste into a shell.
    pub(super) fn line(&self, arguments: &str) -> String {
        format!(
            "SEAWALL_URL={} SEAWALL_TOKEN=\"$(cat {})\" {} {arguments}",
            self.url,
            quoted(&self.token),
            quoted(&self.program)
        )
    }
}

/// The simulated devices: processes of `firmware-sim`.
pub(super) struct Fleet {
    pub(super) parts: Vec<PathBuf>,
    pub(super) folder: PathBuf,
    pub(super) url: String,
    pub(super) sims: Vec<Process>,
}

impl Fleet {
    pub(super) fn start(&mut self) -> Result<()> {
        for (index, part) in self.parts.iter().enumerate() {
            let name = format!("firmware-sim {}", index + 1);
            let mut command = Command::new(programs::find("firmware-sim")?);
            without_settings(&mut command)
                .arg("--url")
                .arg(&self.url)
                .arg("--devices")
                .arg(part)
                .args(["--firmware-mix", FIRMWARE_MIX, "--profile", "well-behaved"]);
            let log = self.folder.join(format!("sim-{index}.log"));
            self.sims.push(Process::start_steered(name, &mut command, &log)?);
        }
        Ok(())
    }

    pub(super) fn check(&mut self) -> Result<()> {
        self.sims.iter_mut().try_for_each(Process::check)
    }

    /// Every socket is gone at once; every device returns by its own policy, within 5 s unless it is told otherwise.
    pub(super) fn drop_all(&mut self, progress: &Progress) -> Result<()> {
        progress.note("storm: every socket is dropped at once");
        self.sims.iter_mut().try_for_each(|sim| sim.order("drop"))
    }

    pub(super) async fn stop(mut self) {
        for sim in &mut self.sims {
            sim.stop(Signal::TERM, SIM_STOP_GRACE).await;
        }
    }
}

/// Cuts a file of devices into parts, each with the header.
pub(super) fn split(all: &Path, folder: &Path) -> Result<Vec<PathBuf>> {
    let text = fs::read_to_string(all).context("reading the seeded devices")?;
    let (header, rows) = text.split_once('\n').context("the seeded devices have no header")?;
    let rows: Vec<&str> = rows.lines().filter(|row| !row.is_empty()).collect();
    let parts = rows
        .len()
        .div_ceil(DEVICES_PER_PROCESS)
        .max(PROCESSES_MIN)
        .min(rows.len().max(1));
    let mut files = Vec::new();
    for (index, rows) in rows.chunks(rows.len().div_ceil(parts).max(1)).enumerate() {
        let file = folder.join(format!("devices-{index}.csv"));
        fs::write(&file, format!("{header}\n{}\n", rows.join("\n"))).context("writing a part of the devices")?;
        files.push(file);
    }
    Ok(files)
}

/// A cohort is `model/version`.
pub(super) fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = text
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '-' | '_'));
    if is_plain {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}
