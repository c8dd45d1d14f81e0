//! The real binary: a gateway in its own process, and single command lines.

use std::{
    fs,
    io::Read,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use seawall_gateway::runtime::data_dir::{self, Addresses};
use tempfile::TempDir;

use super::figures;

/// Maximum wait for a gateway to listen, or for a command line to end.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// Time between two checks of a condition.
const CHECK_INTERVAL: Duration = Duration::from_millis(10);

/// A gateway on free ports.
const SERVE: [&str; 5] = ["serve", "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"];

/// A command line of the binary, without the environment settings of the test run.
pub fn seawall() -> Command {
    plain(env!("CARGO_BIN_EXE_seawall"))
}

/// A command line of any program, without the environment settings of the test run.
fn plain(program: &str) -> Command {
    let mut command = Command::new(program);
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
    let status = wait(&mut child, WAIT_MAX)?;
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

/// Waits for a child, and kills it if it takes longer.
pub fn wait(child: &mut Child, time_max: Duration) -> Result<ExitStatus> {
    let deadline = Instant::now() + time_max;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        thread::sleep(CHECK_INTERVAL);
    }
    child.kill()?;
    child.wait()?;
    bail!("the process did not end within {time_max:?}")
}

/// A running `seawall serve`, killed when dropped.
pub struct GatewayProcess {
    child: Child,
    pub addresses: Addresses,
    data_dir: PathBuf,
    log: PathBuf,
    _home: Option<TempDir>,
}

impl GatewayProcess {
    /// Starts one on free ports and a new data directory.
    pub fn start(args: &[&str]) -> Result<Self> {
        let home = tempfile::tempdir()?;
        let mut process = Self::start_on(&home.path().join("data"), args)?;
        process._home = Some(home);
        Ok(process)
    }

    /// Starts one on free ports and waits until it listens.
    pub fn start_on(data_dir: &Path, args: &[&str]) -> Result<Self> {
        // A file of an earlier gateway must not be taken for this one's.
        let _ = fs::remove_file(data_dir.join(data_dir::ADDRESSES));
        let mut command = seawall();
        command.args(SERVE).arg("--data-dir").arg(data_dir).args(args);
        Self::spawn(command, data_dir.with_extension("log"), |_| data_dir.to_owned())
    }

    /// Starts one on free ports of a loopback address that nothing else uses. The ports stay free while no gateway runs
    /// there.
    pub fn start_at(address: Ipv4Addr) -> Result<Self> {
        let home = tempfile::tempdir()?;
        let data_dir = home.path().join("data");
        let free = SocketAddr::from((address, 0));
        let mut process = Self::start_listening(
            Addresses {
                devices: free,
                ops: free,
            },
            &data_dir,
        )?;
        process._home = Some(home);
        Ok(process)
    }

    /// Starts the next process of a gateway that has ended: same addresses, same data directory.
    pub fn start_next(mut self) -> Result<Self> {
        let mut next = Self::start_listening(self.addresses, &self.data_dir)?;
        next._home = self._home.take();
        Ok(next)
    }

    fn start_listening(addresses: Addresses, data_dir: &Path) -> Result<Self> {
        let mut command = seawall();
        command.args(["serve", "--listen", &addresses.devices.to_string()]);
        command.args(["--ops-listen", &addresses.ops.to_string()]);
        command.arg("--data-dir").arg(data_dir);
        Self::spawn(command, data_dir.with_extension("log"), |_| data_dir.to_owned())
    }

    /// Starts one on free ports with these environment variables.
    pub fn start_with(data_dir: &Path, variables: &[(&str, &str)]) -> Result<Self> {
        let mut command = seawall();
        command.args(SERVE).arg("--data-dir").arg(data_dir);
        command.envs(variables.iter().copied());
        Self::spawn(command, data_dir.with_extension("log"), |_| data_dir.to_owned())
    }

    /// Starts one whose data directory is on a separate disk of `bytes` bytes (a tmpfs that no other process sees).
    /// `Ok(None)` if this machine does not allow it.
    pub fn start_on_small_disk(bytes: usize) -> Result<Option<Self>> {
        let private: &[&str] = if rustix::process::geteuid().is_root() {
            &["--mount"]
        } else {
            &["--mount", "--map-root-user"]
        };
        let home = tempfile::tempdir()?;
        let disk = home.path().join("disk");
        fs::create_dir(&disk)?;
        let mount = "mount -t tmpfs -o size=\"$1\" tmpfs \"$2\" && shift 2 && exec \"$@\"";
        let mut command = plain("unshare");
        command
            .args(private)
            .args(["sh", "-c", mount, "sh", &bytes.to_string()])
            .arg(&disk);
        if !run(command.arg("true"))?.status.success() {
            return Ok(None);
        }
        let mut command = plain("unshare");
        command
            .args(private)
            .args(["sh", "-c", mount, "sh", &bytes.to_string()])
            .arg(&disk);
        command
            .arg(seawall().get_program())
            .args(SERVE)
            .arg("--data-dir")
            .arg(disk.join("data"));
        // Neither unshare nor the shell leaves a process behind: the child becomes the gateway.
        let seen = |pid: u32| {
            Path::new("/proc")
                .join(pid.to_string())
                .join("root")
                .join(relative(&disk))
                .join("data")
        };
        let mut process = Self::spawn(command, home.path().join("log"), seen)?;
        process._home = Some(home);
        Ok(Some(process))
    }

    /// Starts one in a cgroup, from its first page.
    pub fn start_in_group(group: &Path, args: &[&str]) -> Result<Self> {
        let home = tempfile::tempdir()?;
        let data_dir = home.path().join("data");
        let enter = "echo $$ > \"$1/cgroup.procs\" && shift && exec \"$@\"";
        let mut command = plain("sh");
        command
            .args(["-c", enter, "sh"])
            .arg(group)
            .arg(seawall().get_program())
            .args(SERVE)
            .arg("--data-dir")
            .arg(&data_dir)
            .args(args);
        let mut process = Self::spawn(command, data_dir.with_extension("log"), |_| data_dir)?;
        process._home = Some(home);
        Ok(process)
    }

    /// Starts `command` and waits until it listens. `data_dir` returns the path of its data directory as seen from
    /// here.
    fn spawn(mut command: Command, log: PathBuf, data_dir: impl FnOnce(u32) -> PathBuf) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .spawn()?;
        let data_dir = data_dir(child.id());
        match listening(&mut child, &data_dir) {
            Ok(addresses) => Ok(Self {
                child,
                addresses,
                data_dir,
                log,
                _home: None,
            }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error.context(fs::read_to_string(log).unwrap_or_default()))
            }
        }
    }

    pub fn pid(&self) -> Result<Pid> {
        Pid::from_raw(i32::try_from(self.child.id())?).context("a process id is never 0")
    }

    /// Text of `/metrics`.
    pub fn metrics(&self) -> Result<String> {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .proxy(None)
            .timeout_global(Some(WAIT_MAX))
            .build()
            .into();
        let answer = agent.get(format!("http://{}/metrics", self.addresses.ops)).call();
        Ok(answer?.body_mut().read_to_string()?)
    }

    /// Sum of the series that `series` names, to the nearest whole number.
    #[track_caller]
    pub fn metric(&self, series: &str) -> Result<u64> {
        Ok(figures::sum(&self.metrics()?, series).round() as u64)
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

    /// All that the gateway wrote to standard error so far.
    pub fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.log)?)
    }

    pub fn has_logged(&self, text: &str) -> bool {
        self.log().unwrap().contains(text)
    }

    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(self.pid()?, signal)?)
    }

    /// Waits for the gateway to end on its own.
    pub fn wait(&mut self, time_max: Duration) -> Result<ExitStatus> {
        wait(&mut self.child, time_max)
    }
}

impl Drop for GatewayProcess {
    fn drop(&mut self) {
        // A process that has ended already is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The path without a leading root.
fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

fn listening(child: &mut Child, data_dir: &Path) -> Result<Addresses> {
    let deadline = Instant::now() + WAIT_MAX;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            bail!("the gateway ended before it listened: {status}");
        }
        if let Ok(Some(addresses)) = data_dir::read_addresses(data_dir) {
            return Ok(addresses);
        }
        thread::sleep(CHECK_INTERVAL);
    }
    bail!("the gateway does not listen after {WAIT_MAX:?}")
}
