//! The real binary: a gateway in a process of its own, and single command lines.

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
use seawall_gateway::data_dir::{self, Addresses};
use tempfile::TempDir;

/// Longest wait for a gateway to listen, or for a command line to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// Time between two looks at a condition.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// A gateway on free ports.
const SERVE: [&str; 5] = ["serve", "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"];

/// A command line of the binary, without the settings of whoever runs the tests.
pub fn seawall() -> Command {
    plain(env!("CARGO_BIN_EXE_seawall"))
}

/// A command line of any program, without the settings of whoever runs the tests.
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
    log: PathBuf,
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
        // What an earlier gateway left behind must not be taken for this one's.
        let _ = fs::remove_file(data_dir.join(data_dir::ADDRESSES));
        let mut command = seawall();
        command.args(SERVE).arg("--data-dir").arg(data_dir).args(args);
        Self::spawn(command, data_dir.with_extension("log"), |_| data_dir.to_owned())
    }

    /// Starts one on free ports of a loopback address that nothing else uses. The ports stay free while no gateway runs there.
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

    /// Starts one on free ports with these variables in its environment.
    pub fn start_with(data_dir: &Path, variables: &[(&str, &str)]) -> Result<Self> {
        let mut command = seawall();
        command.args(SERVE).arg("--data-dir").arg(data_dir);
        command.envs(variables.iter().copied());
        Self::spawn(command, data_dir.with_extension("log"), |_| data_dir.to_owned())
    }

    /// Starts one whose data directory lies on a disk of its own, of so many bytes (a tmpfs that nobody else sees). `Ok(None)`
    /// where this machine allows no such thing.
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

    /// Starts one in a cgroup, from its first page on.
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

    /// Starts what `command` says and waits until it listens. `data_dir` says where its data directory is seen from here.
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
            .timeout_global(Some(PATIENCE))
            .build()
            .into();
        let answer = agent.get(format!("http://{}/metrics", self.addresses.ops)).call();
        Ok(answer?.body_mut().read_to_string()?)
    }

    /// The sum of all series whose text begins like this.
    pub fn metric(&self, beginning: &str) -> Result<u64> {
        let text = self.metrics()?;
        let figures = text.lines().filter(|line| line.starts_with(beginning));
        let figures = figures.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        Ok(figures.sum::<f64>().round() as u64)
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
        Ok(fs::read_to_string(&self.log)?)
    }

    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(self.pid()?, signal)?)
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

/// A path below whatever is the root.
fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
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
