//! The servers that a scenario can be run against: a gateway or a naive server that we start, or a gateway that runs already.
//!
//! The one type to read is [`Server`].

use std::{fs, net::SocketAddr, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result};
use firmware_sim::target::Target;
use rustix::process::{Pid, Signal};
use serde::Deserialize;

use crate::{
    metrics::Ops,
    process::{self, Process, Slowness},
    programs,
    scenario::{Naive, Trouble},
    target::External,
};

const START_TIME_MAX: Duration = Duration::from_secs(30);
/// The gateway drains for 25 s at most; a load test's devices have gone by then.
const STOP_GRACE: Duration = Duration::from_secs(30);
/// Environment variable by which the naive server is told its database, so that the password stays out of the process list.
pub const NAIVE_DATABASE: &str = "SEAWALL_NAIVE_DATABASE";

/// A server that devices connect to.
#[derive(Debug)]
pub struct Server {
    /// `ws://…`, without a path.
    url: String,
    /// Where it runs already. None: it is ours.
    target: Option<Target>,
    ops: Ops,
    /// None: not ours.
    process: Option<Process>,
    slowness: Option<Slowness>,
}

/// What a server writes of where it listens.
#[derive(Debug, Deserialize)]
struct Addresses {
    devices: String,
    ops: String,
}

impl Server {
    /// Starts the gateway beside this program on free ports, and waits until it takes devices.
    ///
    /// # Errors
    /// It is not there, does not start, or does not get ready.
    pub async fn gateway(data: &Path, config: &toml::Table, database: Option<&str>) -> Result<Self> {
        Self::gateway_at(SocketAddr::from(([127, 0, 0, 1], 0)), data, config, database).await
    }

    /// The same, with this address for devices.
    ///
    /// # Errors
    /// It is not there, does not start, or does not get ready.
    pub async fn gateway_at(
        listen: SocketAddr,
        data: &Path,
        config: &toml::Table,
        database: Option<&str>,
    ) -> Result<Self> {
        fs::create_dir_all(data).context("creating the gateway's data directory")?;
        let addresses = data.join("addresses.json");
        remove_if_there(&addresses)?;
        let config_file = data.with_extension("toml");
        let text = toml::to_string(config).context("writing the gateway's configuration")?;
        fs::write(&config_file, text).context("writing the gateway's configuration")?;
        let mut command = Command::new(programs::find("seawall")?);
        without_settings(&mut command)
            .arg("serve")
            .arg("--config")
            .arg(&config_file)
            .arg("--data-dir")
            .arg(data)
            .args(["--listen", &listen.to_string(), "--ops-listen", "127.0.0.1:0"]);
        if let Some(database) = database {
            command.env("SEAWALL_DATABASE", database);
        }
        let mut process = Process::start("seawall", &mut command, &data.with_extension("log"))?;
        let addresses = await_addresses(&mut process, &addresses).await?;
        let token_file = data.join("admin.token");
        let token = process::await_from(&mut process, "admin token", START_TIME_MAX, || read_word(&token_file)).await?;
        let ops = Ops::new(&format!("http://{}", addresses.ops), Some(token));
        process::await_from(&mut process, "readiness", START_TIME_MAX, || {
            ops.is_ready().then_some(())
        })
        .await?;
        Ok(Self {
            url: format!("ws://{}", addresses.devices),
            target: None,
            ops,
            process: Some(process),
            slowness: None,
        })
    }

    /// Starts the naive server as a process of its own: this program again.
    ///
    /// # Errors
    /// It does not start.
    pub async fn naive(folder: &Path, naive: &Naive, database: &str) -> Result<Self> {
        let addresses = folder.join("naive.json");
        remove_if_there(&addresses)?;
        let mut command = Command::new(std::env::current_exe().context("looking for this program's own file")?);
        command
            .arg("naive-server")
            .arg("--pool")
            .arg(naive.pool.to_string())
            .args(["--heartbeat-seconds", &naive.heartbeat_seconds.to_string()])
            .args(["--deadline-seconds", &naive.deadline_seconds.to_string()])
            .arg("--addresses")
            .arg(&addresses)
            .env(NAIVE_DATABASE, database);
        let mut process = Process::start("naive", &mut command, &folder.join("naive.log"))?;
        let addresses = await_addresses(&mut process, &addresses).await?;
        let ops = Ops::new(&format!("http://{}", addresses.ops), None);
        Ok(Self {
            url: format!("ws://{}", addresses.devices),
            target: None,
            ops,
            process: Some(process),
            slowness: None,
        })
    }

    /// A server that runs already, and continues to run afterwards.
    #[must_use]
    pub fn external(external: &External) -> Self {
        Self {
            url: external.name.clone(),
            target: Some(external.devices.clone()),
            ops: external.ops.clone(),
            process: None,
            slowness: None,
        }
    }

    /// Where devices connect.
    ///
    /// # Errors
    /// Its address can't be read.
    pub async fn target(&self) -> Result<Target> {
        match &self.target {
            Some(target) => Ok(target.clone()),
            None => Target::resolve(&self.url).await.context("looking for the gateway"),
        }
    }

    /// Whether it is not ours.
    #[must_use]
    pub const fn is_external(&self) -> bool {
        self.target.is_some()
    }

    /// A server that a test runs itself.
    #[cfg(test)]
    pub(crate) fn of(devices: std::net::SocketAddr, ops: std::net::SocketAddr) -> Self {
        let ops = Ops::new(&format!("http://{ops}"), None);
        Self {
            url: format!("ws://{devices}"),
            target: None,
            ops,
            process: None,
            slowness: None,
        }
    }

    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    #[must_use]
    pub const fn ops(&self) -> &Ops {
        &self.ops
    }

    #[must_use]
    pub fn pid(&self) -> Option<Pid> {
        self.process.as_ref().map(Process::pid)
    }

    /// Disturbs it, where it is ours, until [`Self::mend`]. It is never killed.
    pub fn disturb(&mut self, trouble: Trouble) {
        let Some(pid) = self.pid() else {
            return;
        };
        match trouble {
            Trouble::Frozen => process::freeze(pid),
            Trouble::Slow { factor } => self.slowness = Some(Slowness::begin(pid, factor)),
            Trouble::Killed => {}
        }
    }

    /// Ends what [`Self::disturb`] began.
    pub fn mend(&mut self) {
        self.slowness = None;
        if let Some(pid) = self.pid() {
            process::thaw(pid);
        }
    }

    /// # Errors
    /// The server has ended on its own.
    pub fn check(&mut self) -> Result<()> {
        self.process.as_mut().map_or(Ok(()), Process::check)
    }

    /// Ends it in order, where it is ours.
    pub async fn stop(mut self) {
        self.mend();
        if let Some(mut process) = self.process {
            process.stop(Signal::TERM, STOP_GRACE).await;
        }
    }
}

/// Settings in our environment are meant for another gateway.
pub fn without_settings(command: &mut Command) -> &mut Command {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("SEAWALL_") {
            command.env_remove(name);
        }
    }
    command
}

async fn await_addresses(process: &mut Process, path: &Path) -> Result<Addresses> {
    // A file that is half written is not JSON yet.
    let read = || serde_json::from_slice(&fs::read(path).ok()?).ok();
    process::await_from(process, "addresses", START_TIME_MAX, read).await
}

fn read_word(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let word = text.trim();
    (!word.is_empty()).then(|| word.to_owned())
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}
