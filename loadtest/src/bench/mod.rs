//! `loadtest bench`: cost of a connection, compared with a bare tokio-tungstenite server in the same run.
//!
//! [`bench()`] starts the servers in turn, each in its own process, and connects the same devices to both. Costs are
//! memory (Pss) and processor time of the server's process: they hardly depend on other load of the machine. Only the
//! times of the storms do; the report compares them with the other server's. docs/BENCHMARKS.md shows the figures
//! beside their bounds.

mod bystanders;
mod device;
mod messages;
pub mod peer;
mod pool;
mod report;
pub mod scale;
mod schedule;
mod usage;

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use firmware_sim::tls::{Tls, Trust};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use rustls::pki_types::ServerName;

pub use report::Report;

use self::{
    peer::Kind,
    schedule::{Measured, Schedule},
};
use crate::{guard::TempDir, postgres::Postgres, programs, progress::Progress, server::Server};

/// Files of this process that are not devices' sockets.
const FILES_RESERVED: u64 = 500;
/// A firmware version that the gateway's rule admits, and one that it does not.
const FIRMWARE: &str = "3.8.0-b2";
const FIRMWARE_BLOCKED: &str = "9.0.0";
/// Name in the gateway's certificate.
const CERTIFIED_NAME: &str = "gateway.test";

/// Database of the gateway's registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Database {
    Postgres,
    Sqlite,
}

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub devices: usize,
    pub database: Database,
    /// Time for which the devices only send heartbeats.
    pub hold: Duration,
}

/// Measures both servers, one after the other.
///
/// # Errors
/// A program is missing or died, there are too few files for the devices, or a device got an answer that it should not.
pub async fn bench(options: Options, progress: &Progress) -> Result<Report> {
    programs::build(&["seawall"]).await?;
    ensure_files(options.devices)?;
    let folder = TempDir::new("bench").context("creating a temporary folder")?;
    let accounts = device::accounts(options.devices + bystanders::COUNT);
    let schedule = |name, is_gateway| Schedule {
        name,
        is_gateway,
        accounts: &accounts,
        options,
        progress,
    };

    let (process, address) = peer::start(Kind::Echo, folder.path()).await?;
    let mut echo = schedule("echo", false).run(address, process.pid(), None).await?;
    drop(process);
    let (mut process, address) = peer::start(Kind::Refuse, folder.path()).await?;
    echo.refusal_micros = Some(schedule("echo", false).refusals(address, process.pid()).await?);
    process.stop(Signal::TERM, Duration::from_secs(1)).await;

    let postgres = match options.database {
        Database::Postgres => Some(Postgres::start(None).await?),
        Database::Sqlite => None,
    };
    let measured = gateway(&schedule("gateway", true), folder.path(), postgres.as_ref()).await;
    if let Some(postgres) = postgres {
        postgres.stop().await;
    }
    progress.finish();
    Ok(Report {
        options,
        gateway: measured?,
        echo,
    })
}

async fn gateway(schedule: &Schedule<'_>, folder: &Path, postgres: Option<&Postgres>) -> Result<Measured> {
    let data = folder.join("data");
    let url = postgres.map(Postgres::url);
    let start = || async { Server::gateway(&data, &toml::Table::new(), url.as_deref()).await };
    let server = start().await?;
    let (ops, csv) = (server.ops().clone(), device::csv(schedule.accounts));
    tokio::task::spawn_blocking(move || {
        ops.import(&csv)?;
        ops.block("=9.0.0", "measured", false, None, None)
    })
    .await
    .context("the task that registers devices")??;
    // Memory that the import left free would be reused for devices, and hide what they need.
    server.stop().await;

    let server = start().await?;
    let address = address_of(&server)?;
    let pid = server.pid().context("the gateway is a process of ours")?;
    let mut measured = schedule.run(address, pid, Some(server.ops())).await?;
    measured.refusal_micros = Some(schedule.refusals(address, pid).await?);
    server.stop().await;

    let (config, tls) = certified(folder)?;
    let server = Server::gateway(&data, &config, url.as_deref()).await?;
    let pid = server.pid().context("the gateway is a process of ours")?;
    let (bytes, micros) = schedule.over_tls(address_of(&server)?, pid, tls).await?;
    (measured.tls_device_bytes, measured.tls_handshake_micros) = (Some(bytes), Some(micros));
    server.stop().await;
    Ok(measured)
}

/// Returns settings of a gateway with its own certificate (ECDSA P-256), and the trust of its devices.
fn certified(folder: &Path) -> Result<(toml::Table, Tls)> {
    let made = rcgen::generate_simple_self_signed([CERTIFIED_NAME.to_owned()]).context("making a certificate")?;
    let (certificate, key) = (folder.join("certificate.pem"), folder.join("key.pem"));
    fs::write(&certificate, made.cert.pem()).context("writing the certificate")?;
    fs::write(&key, made.signing_key.serialize_pem()).context("writing its key")?;
    let files = [("certificate", &certificate), ("key", &key)];
    let files = files.map(|(name, path)| (name.to_owned(), toml::Value::from(path.display().to_string())));
    let config = toml::Table::from_iter([("tls".to_owned(), toml::Table::from_iter(files).into())]);
    let name = ServerName::try_from(CERTIFIED_NAME).context("the certificate's name")?;
    Ok((config, Tls::new(name, &Trust::File(certificate))?))
}

fn address_of(server: &Server) -> Result<SocketAddr> {
    let url = server.url().trim_start_matches("ws://");
    url.parse().context("reading the gateway's address")
}

/// Raises the soft limit on open files as far as it goes.
fn ensure_files(devices: usize) -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    // Where it can't be raised, the check below says what is missing.
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    );
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let needed = devices as u64 + FILES_RESERVED;
    ensure!(
        needed <= files,
        "{devices} devices need {needed} open files, and a process may have {files} (ulimit -n)"
    );
    Ok(())
}
