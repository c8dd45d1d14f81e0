//! PostgreSQL for tests: a cluster of this process, on a free port, removed when the process ends.
//!
//! Most tests share one cluster and use a database each: [`shared`], [`Cluster::database`]. Tests that break the server
//! start their own: [`Cluster::start`]. A guardian holds the other end of a pipe. When the process ends it sees the
//! pipe close, kills the server and removes its files. The guardian is a shell.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use seawall_gateway::runtime::config::DatabaseUrl;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};

/// Maximum time for the server to start, or to end.
const START_MAX: Duration = Duration::from_secs(30);
/// Ports are chosen before the server binds them: another process may be faster.
const PORTS_TRIED_MAX: u32 = 5;

/// Reads `start PORT` lines. At the end of its input (this process has ended) it ends the server and removes the files.
/// It uses KILL, because stopped processes do not handle other signals. It traps HUP, because the kernel sends that to
/// an orphaned group with stopped processes.
const GUARDIAN: &str = r#"
trap '' HUP INT TERM
dir=$1; shift
server=
while read -r verb port; do
    [ -z "$server" ] || wait "$server"
    "$@" -p "$port" >>"$dir/log" 2>&1 &
    server=$!
    echo "$server"
done
children=$(cat "/proc/$server/task/$server/children" 2>/dev/null)
kill -KILL $server $children 2>/dev/null
wait
rm -rf "$dir"
"#;

/// The cluster of this process, for tests that do not change it.
pub fn shared() -> &'static Cluster {
    static SHARED: OnceLock<Cluster> = OnceLock::new();
    SHARED.get_or_init(|| Cluster::start().expect("starting PostgreSQL for the tests"))
}

/// A running server.
pub struct Cluster {
    directory: PathBuf,
    port: u16,
    guardian: Mutex<Guardian>,
    databases: AtomicU32,
}

struct Guardian {
    process: Child,
    /// `None` once the cluster is dropped, which closes the pipe.
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    server: Pid,
}

impl Cluster {
    /// Creates and starts a cluster, which takes one or two seconds.
    pub fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    /// The same with these additional settings, each as `name=value`.
    pub fn start_with(settings: &[&str]) -> Result<Self> {
        let binaries = binaries()?;
        let directory = tempfile::Builder::new().prefix("seawall-pg-").tempdir()?.keep();
        let data = directory.join("data");
        let user = server_user();
        if let Some(user) = user {
            run(Command::new("chown").arg(user).arg(&directory))?;
        }
        let mut initdb = as_user(user, &binaries.join("initdb"));
        initdb.args([
            "--no-sync",
            "--auth=trust",
            "--username=postgres",
            "--encoding=UTF8",
            "--no-locale",
        ]);
        run(initdb.arg("-D").arg(&data))?;

        let mut guardian = as_user(user, Path::new("sh"));
        guardian
            .args(["-c", GUARDIAN, "guardian"])
            .arg(&directory)
            .arg(binaries.join("postgres"));
        guardian.arg("-D").arg(&data).arg("-k").arg(&directory);
        for setting in [
            "listen_addresses=127.0.0.1",
            "fsync=off",
            "full_page_writes=off",
            "max_connections=200",
            "shared_buffers=64MB",
        ]
        .iter()
        .chain(settings)
        {
            guardian.args(["-c", setting]);
        }
        // Protects it from Ctrl-C, and from a test runner that kills the whole group of this process.
        guardian.process_group(0);
        guardian
            .current_dir(&directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut process = guardian.spawn().context("starting the guardian")?;
        let mut commands = process.stdin.take().context("the guardian's input")?;
        let mut answers = BufReader::new(process.stdout.take().context("the guardian's output")?);
        for _ in 0..PORTS_TRIED_MAX {
            let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
            let server = launch(&mut commands, &mut answers, port)?;
            if !wait_until_ready(&data, server)? {
                continue;
            }
            let guardian = Guardian {
                process,
                commands: Some(commands),
                answers,
                server,
            };
            return Ok(Self {
                directory,
                port,
                guardian: Mutex::new(guardian),
                databases: AtomicU32::new(0),
            });
        }
        let log = fs::read_to_string(directory.join("log")).unwrap_or_default();
        bail!("PostgreSQL does not start:\n{log}");
    }

    /// A new, empty database.
    pub async fn database(&self) -> Result<DatabaseUrl> {
        let name = format!("test_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        let mut connection = self.connect("postgres").await?;
        sqlx::raw_sql(AssertSqlSafe(format!("CREATE DATABASE {name}")))
            .execute(&mut connection)
            .await?;
        Ok(self.url(&name))
    }

    pub fn url(&self, database: &str) -> DatabaseUrl {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
            .parse()
            .expect("it has the form of one")
    }

    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Server processes with clients of `database`, without the one for this query.
    pub async fn backends(&self, database: &str) -> Result<i64> {
        let mut connection = self.connect("postgres").await?;
        let row = sqlx::query(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid() AND backend_type = 'client backend'",
        )
        .bind(database)
        .fetch_one(&mut connection)
        .await?;
        Ok(row.try_get(0)?)
    }

    async fn connect(&self, database: &str) -> Result<PgConnection> {
        Ok(PgConnection::connect(self.url(database).expose()).await?)
    }

    /// Stops every process of the server (SIGSTOP): it answers nothing, and closes nothing.
    pub fn freeze(&self) -> Result<()> {
        self.signal_all(Signal::STOP)
    }

    /// Continues a frozen server.
    pub fn thaw(&self) -> Result<()> {
        self.signal_all(Signal::CONT)
    }

    /// Kills every process of the server, like a power cut.
    pub fn kill(&self) -> Result<()> {
        let server = self.server();
        let processes = family(server)?;
        self.signal_all(Signal::KILL)?;
        let deadline = Instant::now() + START_MAX;
        while processes.iter().any(|process| is_alive(*process)) {
            ensure!(Instant::now() < deadline, "the server does not die");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Starts a killed server again, on the same port.
    pub fn restart(&self) -> Result<()> {
        let mut guardian = self.guardian.lock().expect("no test panics while it holds this");
        let Guardian { commands, answers, .. } = &mut *guardian;
        let commands = commands.as_mut().context("the guardian is gone")?;
        let server = launch(commands, answers, self.port)?;
        guardian.server = server;
        ensure!(
            wait_until_ready(&self.directory.join("data"), server)?,
            "the server does not start again"
        );
        Ok(())
    }

    fn server(&self) -> Pid {
        self.guardian.lock().expect("no test panics while it holds this").server
    }

    fn signal_all(&self, signal: Signal) -> Result<()> {
        // The parent first: a stopped or dead one starts no more children.
        let server = self.server();
        kill_process(server, signal)?;
        if signal == Signal::STOP {
            // It may still be at a child that it has begun.
            let deadline = Instant::now() + START_MAX;
            while stat(server.as_raw_nonzero().get()).is_some_and(|stat| stat.state != 'T') {
                ensure!(Instant::now() < deadline, "the server does not stop");
                thread::sleep(Duration::from_millis(1));
            }
        }
        for child in family(server)? {
            // A child may end on its own meanwhile.
            let _ = kill_process(child, signal);
        }
        Ok(())
    }
}

/// The shared cluster is never dropped: the end of the process closes its pipe.
impl Drop for Cluster {
    fn drop(&mut self) {
        if let Ok(guardian) = self.guardian.get_mut() {
            drop(guardian.commands.take());
            let _ = guardian.process.wait();
        }
    }
}

fn launch(commands: &mut ChildStdin, answers: &mut BufReader<ChildStdout>, port: u16) -> Result<Pid> {
    writeln!(commands, "start {port}")?;
    let mut answer = String::new();
    answers.read_line(&mut answer)?;
    Pid::from_raw(answer.trim().parse()?).context("the guardian names no process")
}

/// `Ok(false)`: the server ended, most likely because its port was in use.
fn wait_until_ready(data: &Path, server: Pid) -> Result<bool> {
    let deadline = Instant::now() + START_MAX;
    while Instant::now() < deadline {
        // Its first line is the process id, its eighth the state.
        let status = fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
        let mut lines = status.lines().map(str::trim);
        let is_ours = lines.next() == Some(server.as_raw_nonzero().to_string().as_str());
        if is_ours && lines.nth(6) == Some("ready") {
            return Ok(true);
        }
        if !is_alive(server) {
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(10));
    }
    bail!("PostgreSQL takes longer than {START_MAX:?} to start");
}

/// A process and its children.
fn family(parent: Pid) -> Result<Vec<Pid>> {
    let mut found = vec![parent];
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(number) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if let (Some(pid), Some(stat)) = (Pid::from_raw(number), stat(number))
            && stat.parent == parent.as_raw_nonzero().get()
        {
            found.push(pid);
        }
    }
    Ok(found)
}

struct Stat {
    state: char,
    parent: i32,
}

/// Parses `PID (NAME) STATE PARENT …`. The name may contain spaces and parentheses.
fn stat(number: i32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{number}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    Some(Stat {
        state: fields.next()?.chars().next()?,
        parent: fields.next()?.parse().ok()?,
    })
}

/// A process that has ended, and only waits for its parent to notice, is not alive.
fn is_alive(process: Pid) -> bool {
    test_kill_process(process).is_ok()
        && stat(process.as_raw_nonzero().get()).is_some_and(|stat| !matches!(stat.state, 'Z' | 'X'))
}

/// Directory of `initdb` and `postgres`: SEAWALL_TEST_PG_BIN, PATH, or Debian's directory with the highest version.
fn binaries() -> Result<PathBuf> {
    if let Some(directory) = std::env::var_os("SEAWALL_TEST_PG_BIN") {
        return Ok(directory.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut debian: Vec<_> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    debian.sort_by_key(|directory| {
        let version = directory.file_name().and_then(|name| name.to_str());
        std::cmp::Reverse(version.and_then(|version| version.parse::<u32>().ok()))
    });
    std::env::split_paths(&path)
        .chain(debian.into_iter().map(|directory| directory.join("bin")))
        .find(|directory| is_program(&directory.join("initdb")) && is_program(&directory.join("postgres")))
        .context("no PostgreSQL found: install it (Debian: apt-get install postgresql), or set SEAWALL_TEST_PG_BIN")
}

pub(super) fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// PostgreSQL refuses to run as root, so root's tests run it as `postgres`.
pub(super) fn server_user() -> Option<&'static str> {
    rustix::process::geteuid().is_root().then_some("postgres")
}

fn as_user(user: Option<&str>, program: &Path) -> Command {
    let Some(user) = user else {
        return Command::new(program);
    };
    let mut command = Command::new("setpriv");
    command
        .arg(format!("--reuid={user}"))
        .arg(format!("--regid={user}"))
        .arg("--clear-groups")
        .arg(program);
    command.current_dir("/");
    command
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
