//! The real binary: a gateway in a process of its own, and single command lines.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use seawall_gateway::data_dir::{self, Addresses};
use tempfile::TempDir;

/// Longest wait for a gateway to listen, or for a command line to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// Time between two looks at a condition.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// A command line of the binary, without the settings of whoever runs the tests.
pub fn seawall() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_seawall"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("SEAWALL_") {
            command.env_remove(name);
        }
    }
    command
}

/// Runs a command line to its end.
pub fn run(command: &mut Command) -> Result<Output> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let out = reader(child.stdout.take());
    let err = reader(child.stderr.take());
    let status = wait(&mut child, PATIENCE)?;
    let join = |reader: thread::JoinHandle<Vec<u8>>| reader.join().unwrap_or_default();
    Ok(Output {
        status,
        stdout: join(out),
        stderr: join(err),
    })
}

fn reader(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// Waits for a child; kills it when it takes longer.
pub fn wait(child: &mut Child, patience: Duration) -> Result<ExitStatus> {
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        thread::sleep(LOOK_INTERVAL);
    }
    child.kill()?;
    child.wait()?;
    bail!("the process did not end within {patience:?}")
}

/// A running `seawall serve`, killed when it is dropped.
pub struct GatewayProcess {
    child: Child,
    pub addresses: Addresses,
    data_dir: PathBuf,
    _home: Option<TempDir>,
}

impl GatewayProcess {
    /// Starts one on free ports and a data directory of its own.
    pub fn start(args: &[&str]) -> Result<Self> {
        let home = tempfile::tempdir()?;
        let mut process = Self::start_on(&home.path().join("data"), args)?;
        process._home = Some(home);
        Ok(process)
    }

    /// Starts one on free ports and waits until it listens.
    pub fn start_on(data_dir: &Path, args: &[&str]) -> Result<Self> {
        let mut command = seawall();
        command
            .args([
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--ops-listen",
                "127.0.0.1:0",
                "--data-dir",
            ])
            .arg(data_dir);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null());
        let log = fs::File::create(data_dir.with_extension("log"))?;
        // What an earlier gateway left behind must not be taken for this one's.
        let _ = fs::remove_file(data_dir.join(data_dir::ADDRESSES));
        let mut child = command.stderr(log).spawn()?;
        match listening(&mut child, data_dir) {
            Ok(addresses) => Ok(Self {
                child,
                addresses,
                data_dir: data_dir.to_owned(),
                _home: None,
            }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                let log = fs::read_to_string(data_dir.with_extension("log")).unwrap_or_default();
                Err(error.context(log))
            }
        }
    }

    /// An operator's command line for this gateway, with its admin token.
    pub fn operator(&self, args: &[&str]) -> Command {
        let mut command = seawall();
        command
            .env("SEAWALL_URL", format!("http://{}", self.addresses.ops))
            .env("SEAWALL_DATA_DIR", &self.data_dir);
        command.args(args);
        command
    }

    /// Everything the gateway wrote to standard error so far.
    pub fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.data_dir.with_extension("log"))?)
    }

    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?).context("a process id is never 0")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Waits for the gateway to end by itself.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        wait(&mut self.child, patience)
    }
}

impl Drop for GatewayProcess {
    fn drop(&mut self) {
        // One that has ended already is what we want.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn listening(child: &mut Child, data_dir: &Path) -> Result<Addresses> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            bail!("the gateway ended before it listened: {status}");
        }
        if let Ok(Some(addresses)) = data_dir::read_addresses(data_dir) {
            return Ok(addresses);
        }
        thread::sleep(LOOK_INTERVAL);
    }
    bail!("the gateway does not listen after {PATIENCE:?}")
}
