//! PgBouncer between a gateway and PostgreSQL. It ends with its owner.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use seawall_gateway::runtime::config::DatabaseUrl;
use tempfile::TempDir;

use super::pg::{Cluster, is_program, server_user};
use crate::harness::skip::skip_without_program;

/// Maximum wait for it to listen.
const START_MAX: Duration = Duration::from_secs(10);

/// Handling of start-up options, which it cannot pass on.
#[derive(Clone, Copy, Debug)]
pub enum Options {
    /// Its default: it refuses the connection.
    Refused,
    /// The usual setting: it drops them.
    Dropped,
}

pub struct Pooler {
    process: Child,
    port: u16,
    _directory: TempDir,
}

impl Pooler {
    /// `None`, and a line on stderr, if PgBouncer is not installed and not required.
    pub fn start(cluster: &Cluster, mode: &str, options: Options) -> Result<Option<Self>> {
        let Some(program) = program() else {
            skip_without_program("PgBouncer is missing (apt-get install pgbouncer): nothing is tested behind it");
            return Ok(None);
        };
        let directory = tempfile::Builder::new().prefix("seawall-pooler-").tempdir()?;
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let (users, ini) = (directory.path().join("users"), directory.path().join("pgbouncer.ini"));
        fs::write(&users, "\"postgres\" \"\"\n")?;
        let ignored = match options {
            Options::Refused => "",
            Options::Dropped => "ignore_startup_parameters = extra_float_digits, options\n",
        };
        let server = cluster.port();
        let text = format!(
            "[databases]\n* = host=127.0.0.1 port={server}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             auth_type = trust\nauth_file = {}\npool_mode = {mode}\ndefault_pool_size = 4\nunix_socket_dir =\n{ignored}",
            users.display()
        );
        fs::write(&ini, text)?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        if let Some(user) = server_user() {
            command
                .arg(format!("--reuid={user}"))
                .arg(format!("--regid={user}"))
                .arg("--clear-groups");
        }
        command.arg(program).arg("-q").arg(ini).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().context("starting PgBouncer")?;
        let mut pooler = Self {
            process,
            port,
            _directory: directory,
        };
        let deadline = Instant::now() + START_MAX;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if pooler.process.try_wait()?.is_some() || Instant::now() > deadline {
                bail!("PgBouncer does not start");
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(Some(pooler))
    }

    pub const fn port(&self) -> u16 {
        self.port
    }

    /// The same database through the pooler.
    pub fn url(&self, direct: &DatabaseUrl, cluster: &Cluster) -> DatabaseUrl {
        let text = direct.expose();
        let port = format!(":{}/", cluster.port());
        text.replace(&port, &format!(":{}/", self.port))
            .parse()
            .expect("it has the form of one")
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .map(|directory| Path::join(&directory, "pgbouncer"))
        .find(|program| is_program(program))
}
