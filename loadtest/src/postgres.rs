//! A private PostgreSQL: a new cluster in a temporary folder, on a free port of 127.0.0.1, gone with its owner.
//!
//! It can be made slow, frozen and killed from outside, by signals to its processes: the database itself has no switch.

use std::{
    env, fs, io,
    os::unix::{
        fs::{PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::{
    process::{Pid, Signal, setpriority_process},
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};
use sqlx::{
    Connection, PgConnection,
    postgres::{PgConnectOptions, PgSslMode},
};

use crate::{
    guard::TempDir,
    process::{self, Process, Slowness},
};

/// In the field the database is a machine of its own: on this one its scans must not take the processor from the gateway and the devices,
/// whose times are measured. Its look-ups and its scans compete as they do there.
const NICENESS: i32 = 5;
/// Connections it takes: the naive server's pool, and the gateway's.
const CONNECTIONS_MAX: u32 = 500;
const INITDB_TIME_MAX: Duration = Duration::from_secs(60);
const START_TIME_MAX: Duration = Duration::from_secs(30);
/// Somebody may take the free port before the server does.
const START_ATTEMPTS_MAX: u32 = 5;
const STOP_GRACE: Duration = Duration::from_secs(5);
/// A running server.
#[derive(Debug)]
pub struct Postgres {
    programs: PathBuf,
    account: Option<Account>,
    cores: Option<u32>,
    port: u16,
    password: String,
    server: Process,
    slowness: Option<Slowness>,
    folder: TempDir,
}

#[derive(Clone, Copy, Debug)]
struct Account {
    uid: u32,
    gid: u32,
}

impl Postgres {
    /// `cores`: of this machine, that it runs on at most. None: all.
    ///
    /// # Errors
    /// PostgreSQL's programs are missing, or it does not start.
    pub async fn start(cores: Option<u32>) -> Result<Self> {
        let programs = programs()?;
        let account = account()?;
        let folder = TempDir::new("pg").context("creating a folder for PostgreSQL")?;
        let password = uuid::Uuid::new_v4().simple().to_string();
        let password_file = folder.path().join("password");
        fs::write(&password_file, &password).context("writing the password file")?;
        fs::set_permissions(&password_file, fs::Permissions::from_mode(0o600))
            .context("protecting the password file")?;
        if let Some(account) = account {
            for path in [folder.path(), &password_file] {
                chown(path, Some(account.uid), Some(account.gid))
                    .context("handing the folder to PostgreSQL's account")?;
            }
        }
        let mut initdb = command(account, &programs.join("initdb"), folder.path());
        initdb
            .arg("-D")
            .arg(folder.path().join("data"))
            .args([
                "-U",
                "seawall",
                "-E",
                "UTF8",
                "--locale=C",
                "--no-sync",
                "-A",
                "scram-sha-256",
            ])
            .arg("--pwfile")
            .arg(&password_file);
        process::output("initdb", initdb, INITDB_TIME_MAX).await?;

        let mut attempt = 1;
        let (port, server) = loop {
            let port = process::free_port().context("looking for a free port")?;
            match serve(account, &programs, folder.path(), port, &password, cores).await {
                Ok(server) => break (port, server),
                Err(_) if attempt < START_ATTEMPTS_MAX => attempt += 1,
                Err(error) => return Err(error),
            }
        };
        Ok(Self {
            programs,
            account,
            cores,
            port,
            password,
            server,
            slowness: None,
            folder,
        })
    }

    /// Its address, for the gateway's `--database`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("postgres://seawall:{}@127.0.0.1:{}/postgres", self.password, self.port)
    }

    #[must_use]
    pub fn options(&self) -> PgConnectOptions {
        options(self.port, &self.password)
    }

    /// Lines of its log that hold `text`.
    ///
    /// # Errors
    /// The log can't be read.
    pub fn count_in_log(&self, text: &str) -> io::Result<u64> {
        let log = fs::read(self.folder.path().join("log"))?;
        Ok(String::from_utf8_lossy(&log)
            .lines()
            .map(|line| u64::from(line.contains(text)))
            .sum())
    }

    /// # Errors
    /// The server has ended on its own.
    pub fn check(&mut self) -> Result<()> {
        match self.slowness {
            Some(_) => Ok(()),
            None => self.server.check(),
        }
    }

    /// Stops all of its processes where they are: connections stay open, and nothing answers.
    pub fn freeze(&mut self) {
        process::freeze(self.server.pid());
    }

    /// Resumes them.
    pub fn thaw(&mut self) {
        process::thaw(self.server.pid());
    }

    /// Lets its processes run for one part in `factor` of the time, until [`Self::mend`].
    pub fn slow_down(&mut self, factor: f64) {
        self.slowness = Some(Slowness::begin(self.server.pid(), factor));
    }

    /// Kills all of its processes, as a crash would.
    pub fn kill(&mut self) {
        self.server.kill();
    }

    /// Ends whatever [`Self::freeze`], [`Self::slow_down`] or [`Self::kill`] began.
    ///
    /// # Errors
    /// It does not start again.
    pub async fn mend(&mut self) -> Result<()> {
        self.slowness = None;
        if self.server.ended().is_some() {
            self.server = serve(
                self.account,
                &self.programs,
                self.folder.path(),
                self.port,
                &self.password,
                self.cores,
            )
            .await?;
        } else {
            self.thaw();
        }
        Ok(())
    }

    /// Ends it in order.
    pub async fn stop(mut self) {
        self.slowness = None;
        self.thaw();
        self.server.stop(Signal::INT, STOP_GRACE).await;
    }
}

async fn serve(
    account: Option<Account>,
    programs: &Path,
    folder: &Path,
    port: u16,
    password: &str,
    cores: Option<u32>,
) -> Result<Process> {
    let mut postgres = command(account, &programs.join("postgres"), folder);
    postgres
        .arg("-D")
        .arg(folder.join("data"))
        .arg("-p")
        .arg(port.to_string())
        .arg("-k")
        .arg(folder)
        .args(["-c", "listen_addresses=127.0.0.1"])
        .args(["-c", &format!("max_connections={CONNECTIONS_MAX}")])
        .args([
            "-c",
            "fsync=off",
            "-c",
            "synchronous_commit=off",
            "-c",
            "full_page_writes=off",
        ])
        .args([
            "-c",
            "shared_buffers=128MB",
            "-c",
            "max_wal_size=1GB",
            "-c",
            "autovacuum_naptime=10s",
        ])
        // A scan keeps to one core, as it must where many run at once; two would leave none of a small machine to anybody else.
        .args(["-c", "max_parallel_workers_per_gather=0"])
        .args(["-c", "log_error_verbosity=terse"]);
    let mut server = Process::start("postgres", &mut postgres, &folder.join("log"))?;
    setpriority_process(Some(server.pid()), NICENESS).context("lowering PostgreSQL's priority")?;
    if let Some(cores) = cores {
        confine(server.pid(), cores).context("keeping PostgreSQL to some of the cores")?;
    }
    let deadline = tokio::time::Instant::now() + START_TIME_MAX;
    loop {
        server.check()?;
        match PgConnection::connect_with(&options(port, password)).await {
            Ok(connection) => {
                connection.close().await.context("closing the first connection")?;
                return Ok(server);
            }
            Err(error) if tokio::time::Instant::now() >= deadline => {
                bail!("PostgreSQL takes no connection: {error}; {}", server.tail())
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Keeps a process, and all that it starts from now on, to the last `cores` of those that this one may use.
fn confine(pid: Pid, cores: u32) -> io::Result<()> {
    let ours = sched_getaffinity(None)?;
    let mut theirs = CpuSet::new();
    (0..CpuSet::MAX_CPU)
        .rev()
        .filter(|core| ours.is_set(*core))
        .take(usize::try_from(cores).unwrap_or(usize::MAX))
        .for_each(|core| theirs.set(core));
    Ok(sched_setaffinity(Some(pid), &theirs)?)
}

fn options(port: u16, password: &str) -> PgConnectOptions {
    PgConnectOptions::new_without_pgpass()
        .host("127.0.0.1")
        .port(port)
        .username("seawall")
        .password(password)
        .database("postgres")
        .ssl_mode(PgSslMode::Disable)
}

/// PostgreSQL refuses to run as root: then it runs under its own account.
fn command(account: Option<Account>, program: &Path, folder: &Path) -> Command {
    let mut command = Command::new(program);
    if let Some(Account { uid, gid }) = account {
        command.uid(uid).gid(gid); // as root, this also drops the supplementary groups
    }
    command.current_dir(folder).env("LC_ALL", "C");
    for (name, _) in env::vars_os() {
        // PGPORT, PGDATA and their like mean somebody else's server.
        if name.to_string_lossy().starts_with("PG") {
            command.env_remove(name);
        }
    }
    command
}

fn account() -> Result<Option<Account>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let passwd = fs::read_to_string("/etc/passwd").context("reading /etc/passwd")?;
    account_in(&passwd)
        .map(Some)
        .context("PostgreSQL can't run as root, and there is no account `postgres` to run it under")
}

fn account_in(passwd: &str) -> Option<Account> {
    let line = passwd.lines().find_map(|line| line.strip_prefix("postgres:"))?;
    let mut fields = line.split(':').skip(1);
    Some(Account {
        uid: fields.next()?.parse().ok()?,
        gid: fields.next()?.parse().ok()?,
    })
}

/// Folder with `initdb` and `postgres`: `SEAWALL_PG_BIN`, Debian's newest, or on the path.
fn programs() -> Result<PathBuf> {
    if let Some(folder) = env::var_os("SEAWALL_PG_BIN") {
        let folder = PathBuf::from(folder);
        if !folder.join("initdb").exists() {
            bail!(
                "SEAWALL_PG_BIN names {}, and there is no `initdb` in it",
                folder.display()
            );
        }
        return Ok(folder);
    }
    let mut debian: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(io::Result::ok)
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .filter(|(_, folder)| folder.join("initdb").exists())
        .collect();
    debian.sort();
    if let Some((_, folder)) = debian.pop() {
        return Ok(folder);
    }
    env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .find(|folder| folder.join("initdb").exists() && folder.join("postgres").exists())
        .context("no PostgreSQL here: `apt install postgresql`, or name the folder of its programs in SEAWALL_PG_BIN")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_private_server_freezes_is_killed_and_comes_back() {
        let mut postgres = Postgres::start(Some(1)).await.unwrap();
        let mut connection = PgConnection::connect_with(&postgres.options()).await.unwrap();

        // The server process of this connection, and not only the first of them.
        let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()")
            .fetch_one(&mut connection)
            .await
            .unwrap();
        assert_eq!(sched_getaffinity(Pid::from_raw(pid)).unwrap().count(), 1);
        postgres.freeze();
        assert!(
            tokio::time::timeout(Duration::from_millis(200), connection.ping())
                .await
                .is_err()
        );
        postgres.mend().await.unwrap();
        connection.ping().await.unwrap();

        postgres.slow_down(8.0);
        connection.ping().await.unwrap();
        postgres.mend().await.unwrap();

        postgres.kill();
        assert!(connection.ping().await.is_err());
        postgres.mend().await.unwrap();
        let mut connection = PgConnection::connect_with(&postgres.options()).await.unwrap();
        connection.ping().await.unwrap();

        let folder = postgres.folder.path().to_owned();
        postgres.stop().await;
        assert!(!folder.exists());
    }

    #[test]
    fn the_account_is_found_by_name() {
        let account =
            account_in("root:x:0:0::/root:/bin/sh\npostgres:x:103:107:,,,:/var/lib/postgresql:/bin/bash\n").unwrap();

        assert_eq!((account.uid, account.gid), (103, 107));
        assert!(account_in("postgresql:x:1:1::/:/bin/sh").is_none());
    }
}
