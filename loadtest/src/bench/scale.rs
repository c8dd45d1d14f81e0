//! `loadtest scale`: more devices than one process may open files for. Start with [`scale`].
//!
//! Several gateways share one address and one PostgreSQL. The devices are in several processes of this program
//! ([`serve`]), which take commands as lines on standard input.

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Resource, getrlimit};
use tokio::time::sleep;

use super::{
    address_of, device,
    pool::{By, DevicePool},
    report::machine,
    usage::{ProcessorTime, memory_bytes},
};
use crate::{
    guard::TempDir,
    postgres::Postgres,
    process::{self, Process},
    programs,
    progress::Progress,
    server::Server,
};

/// Files of a process that are not devices' sockets: what a gateway keeps for itself, and some.
const FILES_RESERVED: u64 = 1_000;
/// Minimum number of devices of a process.
const EACH_MIN: usize = 1_000;
/// Maximum part of its open files that a gateway should use, in percent: the kernel spreads connections at random.
const FILL_PERCENT: usize = 93;
/// Concurrent handshakes of all device processes together.
const AT_ONCE: usize = 1_024;
/// Time between two heartbeats of a device while devices only hold.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(10);
/// Time for servers to finish their work before they are measured.
const SETTLE: Duration = Duration::from_secs(3);
/// Maximum time to carry out a command.
const ORDER_TIME_MAX: Duration = Duration::from_secs(600);

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub devices: usize,
    /// Time for which the devices only send heartbeats.
    pub hold: Duration,
}

/// Results. All gateways together, unless it says otherwise.
#[derive(Clone, Debug)]
pub struct Report {
    options: Options,
    gateways: usize,
    pools: usize,
    connect: Duration,
    connect_micros: f64,
    /// Growth of Pss for each device.
    device_bytes: f64,
    /// Sessions of the gateway with the fewest, and of the one with the most.
    sessions: (f64, f64),
    /// A part of one core.
    hold_cores: f64,
    /// After all connections were reset, with resume tokens.
    back: Duration,
    after_storm: f64,
}

/// Starts everything, measures, and ends everything.
///
/// # Errors
/// A program is missing or died, or a device got an answer that it should not.
pub async fn scale(options: Options, progress: &Progress) -> Result<Report> {
    programs::build(&["seawall"]).await?;
    let folder = TempDir::new("scale").context("creating a temporary folder")?;
    let postgres = Postgres::start(None).await?;
    let measured = measure(options, folder.path(), &postgres, progress).await;
    postgres.stop().await;
    progress.finish();
    measured
}

async fn measure(options: Options, folder: &Path, postgres: &Postgres, progress: &Progress) -> Result<Report> {
    let files = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let each = usize::try_from(files.saturating_sub(FILES_RESERVED)).unwrap_or(usize::MAX);
    ensure!(
        each >= EACH_MIN,
        "a process may have {files} open files (ulimit -Hn): it takes {} for each",
        FILES_RESERVED + EACH_MIN as u64
    );
    let gateways = options.devices.div_ceil(each * FILL_PERCENT / 100).max(2);
    let pools = options.devices.div_ceil(each);

    progress.note("devices are registered");
    // By a gateway that ends then: memory that the import left free would be reused for devices, and hide what they
    // need.
    let server = start_gateways(1, folder, &postgres.url()).await?.remove(0);
    let (ops, csv) = (server.ops().clone(), device::csv(&device::accounts(options.devices)));
    tokio::task::spawn_blocking(move || ops.import(&csv))
        .await
        .context("the task that registers devices")??;
    server.stop().await;
    progress.note("gateways start");
    let servers = start_gateways(gateways, folder, &postgres.url()).await?;
    let pids = servers
        .iter()
        .map(|server| server.pid().context("a gateway is a process of ours"))
        .collect::<Result<Vec<Pid>>>()?;
    let address = address_of(&servers[0])?;
    let mut pools = start_pools(options.devices, pools, address, folder)?;
    sleep(SETTLE).await;
    let base = memory(&pids)?;

    progress.note("devices connect");
    let before = times(&pids)?;
    let connect = all(&mut pools, "connect").await?;
    let connect_micros = used(&pids, &before)?.as_secs_f64() * 1e6 / options.devices as f64;
    sleep(SETTLE).await;
    let idle = memory(&pids)?;
    let held = sessions(&servers)?;
    ensure!(
        held.iter().sum::<f64>() >= options.devices as f64,
        "the gateways have {held:?} sessions, of {}",
        options.devices
    );

    progress.note("devices hold");
    let before = times(&pids)?;
    let took = all(&mut pools, &format!("hold {}", options.hold.as_secs())).await?;
    let hold_cores = used(&pids, &before)?.as_secs_f64() / took.as_secs_f64();

    progress.note("all connections are reset");
    let back = all(&mut pools, "return").await?;
    sleep(SETTLE).await;
    let after = memory(&pids)?;

    for pool in &mut pools {
        pool.process.kill();
    }
    for server in servers {
        server.stop().await;
    }
    Ok(Report {
        options,
        gateways,
        pools: pools.len(),
        connect,
        connect_micros,
        device_bytes: (idle - base) / options.devices as f64,
        sessions: (
            held.iter().copied().fold(f64::INFINITY, f64::min),
            held.iter().copied().fold(0.0, f64::max),
        ),
        hold_cores,
        back,
        after_storm: after / idle,
    })
}

/// Starts gateways on one address with the same keys: a token of one is valid on all.
async fn start_gateways(count: usize, folder: &Path, database: &str) -> Result<Vec<Server>> {
    let mut servers: Vec<Server> = Vec::new();
    for number in 0..count {
        let data = folder.join(format!("data{number}"));
        if number > 0 {
            fs::create_dir(&data).context("creating a data directory")?;
            fs::copy(folder.join("data0/keys.json"), data.join("keys.json")).context("copying keys.json")?;
        }
        let listen = servers.first().map(address_of).transpose()?;
        let listen = listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)));
        let config = toml::from_str(&format!("[server]\nshare_port = true\nnode = \"node-{number}\"\n"))
            .context("writing a gateway's configuration")?;
        servers.push(Server::gateway_at(listen, &data, &config, Some(database)).await?);
    }
    Ok(servers)
}

fn sessions(servers: &[Server]) -> Result<Vec<f64>> {
    let of = |server: &Server| Ok(server.ops().metrics()?.sum("seawall_sessions"));
    servers.iter().map(of).collect()
}

#[expect(clippy::cast_precision_loss, reason = "bytes of memory are far below 2^52")]
fn memory(pids: &[Pid]) -> Result<f64> {
    pids.iter().map(|pid| Ok(memory_bytes(*pid)? as f64)).sum()
}

fn times(pids: &[Pid]) -> Result<Vec<ProcessorTime>> {
    pids.iter().map(|pid| ProcessorTime::of(*pid)).collect()
}

fn used(pids: &[Pid], before: &[ProcessorTime]) -> Result<Duration> {
    let since = |(pid, before): (&Pid, &ProcessorTime)| Ok(ProcessorTime::of(*pid)?.since(before));
    pids.iter().zip(before).map(since).sum()
}

/// Devices in another process.
struct RemotePool {
    process: Process,
    done: PathBuf,
    orders: usize,
}

fn start_pools(devices: usize, count: usize, server: SocketAddr, folder: &Path) -> Result<Vec<RemotePool>> {
    let program = std::env::current_exe().context("looking for this program's own file")?;
    let start = |number: usize| {
        let (first, end) = (devices * number / count, devices * (number + 1) / count);
        let done = folder.join(format!("pool{number}.done"));
        let mut command = Command::new(&program);
        command
            .args(["bench-pool", "--server", &server.to_string()])
            .args(["--first", &first.to_string()])
            .args(["--count", &(end - first).to_string()])
            .args(["--at-once", &AT_ONCE.div_ceil(count).to_string()])
            .arg("--done")
            .arg(&done);
        let process = Process::start_steered(format!("pool {number}"), &mut command, &done.with_extension("log"))?;
        Ok(RemotePool {
            process,
            done,
            orders: 0,
        })
    };
    (0..count).map(start).collect()
}

/// Passes a command to all device processes. Returns the time until the last has carried it out.
async fn all(pools: &mut [RemotePool], order: &str) -> Result<Duration> {
    let begun = Instant::now();
    for pool in &mut *pools {
        pool.process.order(order)?;
        pool.orders += 1;
    }
    for pool in pools {
        let (orders, done) = (pool.orders, &pool.done);
        let look = || (fs::read_to_string(done).ok()?.lines().count() >= orders).then_some(());
        process::await_from(&mut pool.process, order, ORDER_TIME_MAX, look).await?;
    }
    Ok(begun.elapsed())
}

/// The devices of a process.
#[derive(Clone, Debug, clap::Args)]
pub struct PoolArguments {
    /// The gateways' address.
    #[arg(long)]
    server: SocketAddr,
    /// Number of the first device.
    #[arg(long)]
    first: usize,
    /// Number of devices.
    #[arg(long)]
    count: usize,
    /// Concurrent handshakes.
    #[arg(long)]
    at_once: usize,
    /// File that gets a line for each command that was carried out.
    #[arg(long)]
    done: PathBuf,
}

/// Carries orders out until there are no more: `connect`, `hold SECONDS`, `return` (all connections are reset, and return by token).
///
/// # Errors
/// An order is none, or a device got an answer that it should not.
pub async fn serve(arguments: &PoolArguments) -> Result<()> {
    let PoolArguments {
        server,
        first,
        count,
        at_once,
        ..
    } = *arguments;
    super::ensure_files(count)?;
    let accounts = device::accounts(first + count);
    let pool = DevicePool::new(server, true, &accounts[first..]);
    drop(accounts);
    let mut done = fs::File::create(&arguments.done).context("creating the file of finished commands")?;
    loop {
        let order = tokio::task::spawn_blocking(|| std::io::stdin().lock().lines().next()).await?;
        let Some(order) = order.transpose().context("reading a command")? else {
            return Ok(());
        };
        match order.split_once(' ').unwrap_or((&order, "")) {
            ("connect", "") => {
                pool.connect(at_once, By::LookUp).await?;
            }
            ("hold", seconds) => {
                let seconds = seconds.parse().context("reading how long to hold")?;
                pool.hold(HEARTBEAT_EVERY, Duration::from_secs(seconds)).await?;
            }
            ("return", "") => {
                pool.drop_all().await;
                pool.connect(at_once, By::Token).await?;
            }
            _ => bail!("{order:?} is not an order"),
        }
        writeln!(done, "{order}").context("reporting a finished command")?;
    }
}

impl Report {
    /// docs/SCALE.md.
    #[must_use]
    pub fn page(&self) -> String {
        let Options { devices, hold } = self.options;
        let mut text = String::new();
        // Writing to a string can't fail.
        let _ = write!(
            text,
            "# Scale\n\n\
             More devices than one process may have open files for: several gateways on one address (`server.share_port`) and one PostgreSQL. Written by\n\n\
             ```\n\
             cargo build --release --bin seawall --bin loadtest\n\
             target/release/loadtest scale --devices {devices} --hold {hold} --write docs/SCALE.md\n\
             ```\n\n\
             on {machine}.\n\n{table}\n\
             - Gateways, PostgreSQL and all devices share the machine. Each device is registered, authenticated, and has its presence tracked.\n\
             - Memory is user memory (Pss). Processor time is the CPU time of all gateways.\n\
             - At the end all connections are reset at once, and the devices return with their resume tokens, which are valid on every gateway.\n",
            hold = humantime::format_duration(hold),
            machine = machine(),
            table = self.table(),
        );
        text
    }

    /// A table in Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        let rows = [
            ("devices", format!("{}", self.options.devices)),
            ("gateways", format!("{}", self.gateways)),
            ("processes with devices", format!("{}", self.pools)),
            ("all connected after", format!("{:.1} s", self.connect.as_secs_f64())),
            (
                "processor time of a handshake",
                format!("{:.1} µs", self.connect_micros),
            ),
            ("memory of an idle device", format!("{:.0} B", self.device_bytes)),
            (
                "sessions of a gateway, fewest and most",
                format!("{:.0}, {:.0}", self.sessions.0, self.sessions.1),
            ),
            (
                "a heartbeat of each device every 10 s",
                format!("{:.1} % of a core", self.hold_cores * 100.0),
            ),
            (
                "all back by resume tokens after",
                format!("{:.1} s", self.back.as_secs_f64()),
            ),
            ("memory after that, of that before", format!("{:.2}", self.after_storm)),
        ];
        let mut text = String::from("| what | figure |\n|---|---:|\n");
        for (what, figure) in rows {
            let _ = writeln!(text, "| {what} | {figure} |"); // writing to a string can't fail
        }
        text
    }
}
