//! `loadtest`: runs a scenario of real devices against a real gateway, and says whether it held.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Parser, Subcommand};
use loadtest::{
    bench::{self, Database},
    compare::{Comparison, Side},
    guard, html,
    naive::Naive,
    progress::Progress,
    report::{self, Report},
    run::{Job, With, run},
    scenario::{self, Changes, Executor, Scenario},
    server::{External, NAIVE_DATABASE},
    signals,
    simulate::{SimulateError, simulate},
    storage::ServerUrl,
};
use tokio_util::sync::CancellationToken;

/// Load tests for Seawall.
#[derive(Parser)]
#[command(name = "loadtest", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a scenario with real sockets. Exit 0 only if all of its thresholds hold, 1 if not, 2 for a wrong scenario.
    Run(RunArguments),
    /// Put two reports of one scenario side by side. Exit 0 if they agree in t99 and attempts a device, 1 if not, 2 where they can't be
    /// compared.
    Compare(CompareArguments),
    /// Run a scenario in virtual time, with production's decisions and a model of the rest. Exits as `run` does.
    Simulate(ScenarioArguments),
    /// What a connection costs the gateway, beside a bare tokio-tungstenite server: memory, processor time, time to return.
    Bench(BenchArguments),
    /// More devices than one process may have files for: several gateways on one address.
    Scale(ScaleArguments),
    /// Devices of `scale`, in a process of their own.
    #[command(hide = true)]
    BenchPool(bench::scale::PoolArguments),
    /// A server that `bench` measures beside.
    #[command(hide = true)]
    BenchPeer(BenchPeerArguments),
    /// The server that `[naive]` in a scenario asks for.
    #[command(hide = true)]
    NaiveServer(NaiveArguments),
}

#[derive(Args)]
struct ScenarioArguments {
    /// The scenario: docs/SCENARIOS.md has its format.
    scenario: PathBuf,
    /// Devices, instead of the scenario's number.
    #[arg(long)]
    devices: Option<u32>,
    /// Seed, instead of the scenario's.
    #[arg(long)]
    seed: Option<u64>,
    /// Run the scenario's short form. Its naive server goes through the phases at the same time as the gateway.
    #[arg(long)]
    short: bool,
    /// Length of a phase, instead of the scenario's. 0 leaves the phase out. May be repeated.
    #[arg(long, value_name = "PHASE=SECONDS", value_parser = phase_seconds)]
    seconds: Vec<(String, f64)>,
    /// Leave out the naive server of the scenario, which saves time; thresholds on it are not judged.
    #[arg(long)]
    without_naive: bool,
    /// Write the report as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the report as a page with charts.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

#[derive(Args)]
struct RunArguments {
    #[command(flatten)]
    what: ScenarioArguments,
    /// Use the gateway that runs here, such as ws://127.0.0.1:8080, and start none.
    #[arg(long, value_name = "URL", requires = "ops")]
    gateway: Option<String>,
    /// The ops address of that gateway, such as http://127.0.0.1:8081.
    #[arg(long, value_name = "URL", requires = "gateway")]
    ops: Option<String>,
    /// File with an admin's token of that gateway [default: the token in SEAWALL_TOKEN]
    #[arg(long, value_name = "FILE", requires = "gateway")]
    token_file: Option<PathBuf>,
    /// Use the PostgreSQL that runs at this address: in a database of the load test's own, which is created, and dropped at the end. In
    /// the environment its password is in no list of processes.
    #[arg(
        long,
        value_name = "URL",
        env = "SEAWALL_LOADTEST_DATABASE",
        hide_env_values = true,
        conflicts_with = "gateway"
    )]
    database: Option<String>,
}

#[derive(Args)]
struct BenchArguments {
    /// Devices.
    #[arg(long, default_value_t = 15_000)]
    devices: usize,
    /// Where they are registered.
    #[arg(long, value_enum, default_value = "postgres")]
    database: Database,
    /// How long the devices only send heartbeats, one every 10 s.
    #[arg(long, default_value = "20s", value_parser = humantime::parse_duration)]
    hold: Duration,
    /// Write the page with the figures, such as docs/BENCHMARKS.md.
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
}

#[derive(Args)]
struct ScaleArguments {
    /// Devices.
    #[arg(long, default_value_t = 200_000)]
    devices: usize,
    /// How long the devices only send heartbeats, one every 10 s.
    #[arg(long, default_value = "20s", value_parser = humantime::parse_duration)]
    hold: Duration,
    /// Write the page with the figures, such as docs/SCALE.md.
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
}

#[derive(Args)]
struct BenchPeerArguments {
    #[arg(long, value_enum)]
    kind: bench::peer::Kind,
    /// File for the address it listens on.
    #[arg(long)]
    address: PathBuf,
}

#[derive(Args)]
struct CompareArguments {
    /// A report that `--json` wrote: what the other is measured by.
    first: PathBuf,
    /// The other.
    second: PathBuf,
    /// Greatest difference that counts as agreement, as a part of the first report's figure.
    #[arg(long, value_name = "PART", default_value_t = 0.1)]
    tolerance: f64,
}

#[derive(Args)]
struct NaiveArguments {
    /// Connections to the database.
    #[arg(long)]
    pool: u32,
    /// Time between two pings.
    #[arg(long)]
    heartbeat_seconds: f64,
    /// Age of the last processed heartbeat at which a device is called offline.
    #[arg(long)]
    deadline_seconds: f64,
    /// File for the addresses it listens on.
    #[arg(long)]
    addresses: PathBuf,
}

fn main() -> ExitCode {
    guard::serve_if_asked();
    let done = match Cli::parse().command {
        Command::Run(arguments) => run_scenario(arguments),
        Command::Compare(arguments) => Ok(compare(&arguments)),
        Command::Simulate(arguments) => simulate_scenario(&arguments),
        Command::Bench(arguments) => measure(&arguments),
        Command::Scale(arguments) => scale(&arguments),
        Command::BenchPool(arguments) => serve_bench_pool(&arguments),
        Command::BenchPeer(arguments) => serve_bench_peer(&arguments),
        Command::NaiveServer(arguments) => serve_naive(&arguments),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run_scenario(arguments: RunArguments) -> Result<ExitCode> {
    let asked = with(&arguments).and_then(|with| {
        let scenario = read(&arguments.what, Executor::Run)?;
        scenario
            .check_means(with.means(), &scenario.thresholds()?)
            .with_context(|| arguments.what.scenario.display().to_string())?;
        Ok((with, scenario))
    });
    let (with, scenario) = match asked {
        Ok(asked) => asked,
        Err(error) => {
            eprintln!("error: {error:#}");
            return Ok(ExitCode::from(2));
        }
    };
    guard::start().context("starting the guard that cleans up")?;
    let job = Job {
        scenario,
        with,
        interrupted: CancellationToken::new(),
    };
    let report = runtime()?.block_on(async {
        tokio::spawn(signals::cancel(job.interrupted.clone()));
        run(&job, &Progress::new()).await
    })?;
    publish(&report, &arguments.what)
}

/// What a run is done with.
fn with(arguments: &RunArguments) -> Result<With> {
    let RunArguments {
        gateway,
        ops,
        token_file,
        database,
        ..
    } = arguments;
    if let (Some(gateway), Some(ops)) = (gateway, ops) {
        return Ok(With::Gateway(External {
            gateway: gateway.clone(),
            ops: ops.clone(),
            token: admin_token(token_file.as_deref())?,
        }));
    }
    match database {
        Some(url) => Ok(With::Database(url.parse::<ServerUrl>().context("--database")?)),
        None => Ok(With::Nothing),
    }
}

/// The token of a file, else of the environment. Never of an argument: every user of a machine can list those.
fn admin_token(file: Option<&Path>) -> Result<String> {
    let (token, source) = match file {
        Some(path) => {
            let token = fs::read_to_string(path).with_context(|| format!("--token-file: {}", path.display()))?;
            (token, "--token-file")
        }
        None => {
            let token = std::env::var("SEAWALL_TOKEN")
                .ok()
                .context("--gateway needs --token-file or SEAWALL_TOKEN")?;
            (token, "SEAWALL_TOKEN")
        }
    };
    let token = token.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        bail!("{source} holds no token");
    }
    Ok(token.to_owned())
}

fn simulate_scenario(arguments: &ScenarioArguments) -> Result<ExitCode> {
    let done = read(arguments, Executor::Simulate).and_then(|scenario| match simulate(&scenario) {
        Ok(report) => Ok(Ok(report)),
        Err(SimulateError::Scenario(error)) => Err(error.into()),
        Err(SimulateError::Broken(broken)) => Ok(Err(broken)),
    });
    match done {
        Ok(Ok(report)) => publish(&report, arguments),
        Ok(Err(broken)) => Err(broken.into()),
        Err(error) => {
            eprintln!("error: {error:#}");
            Ok(ExitCode::from(2))
        }
    }
}

/// Prints the report, and writes it where it was asked for.
fn publish(report: &Report, arguments: &ScenarioArguments) -> Result<ExitCode> {
    print!("{}", report.to_text());
    if let Some(path) = &arguments.json {
        let json = serde_json::to_vec_pretty(report).context("writing the report")?;
        fs::write(path, json).with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &arguments.html {
        fs::write(path, html::page(report)).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(verdict(report))
}

fn compare(arguments: &CompareArguments) -> ExitCode {
    let comparison = Side::from_file(&arguments.first)
        .and_then(|first| Comparison::new(&first, &Side::from_file(&arguments.second)?, arguments.tolerance));
    match comparison {
        Ok(comparison) => {
            print!("{comparison}");
            ExitCode::from(u8::from(!comparison.agrees()))
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Everything that can be wrong before a minute is spent on it.
fn read(arguments: &ScenarioArguments, executor: Executor) -> Result<Scenario> {
    let changes = Changes {
        is_short: arguments.short,
        devices: arguments.devices,
        seed: arguments.seed,
        seconds: arguments.seconds.clone(),
        is_without_naive: arguments.without_naive,
    };
    let scenario = Scenario::from_file(&arguments.scenario, &changes, executor)?;
    report::check_names(&scenario, &scenario.thresholds()?)
        .with_context(|| arguments.scenario.display().to_string())?;
    Ok(scenario)
}

/// `PHASE=SECONDS`.
fn phase_seconds(text: &str) -> Result<(String, f64), String> {
    let parsed = text.split_once('=').and_then(|(phase, seconds)| {
        let seconds: f64 = seconds.parse().ok()?;
        (seconds.is_finite() && seconds >= 0.0).then(|| (phase.to_owned(), seconds))
    });
    parsed.ok_or_else(|| "expected PHASE=SECONDS, such as steady=600".to_owned())
}

fn verdict(report: &Report) -> ExitCode {
    if report.passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn measure(arguments: &BenchArguments) -> Result<ExitCode> {
    let options = bench::Options {
        devices: arguments.devices,
        database: arguments.database,
        hold: arguments.hold,
    };
    let report = interruptible(async |progress| bench::bench(options, progress).await)?;
    print!("{}", report.table());
    write_page(arguments.write.as_deref(), || report.page())
}

fn scale(arguments: &ScaleArguments) -> Result<ExitCode> {
    let options = bench::scale::Options {
        devices: arguments.devices,
        hold: arguments.hold,
    };
    let report = interruptible(async |progress| bench::scale::scale(options, progress).await)?;
    print!("{}", report.table());
    write_page(arguments.write.as_deref(), || report.page())
}

/// Runs a measurement until it is done, or until Ctrl-C.
fn interruptible<T>(measure: impl AsyncFnOnce(&Progress) -> Result<T>) -> Result<T> {
    guard::start().context("starting the guard that cleans up")?;
    runtime()?.block_on(async {
        let interrupted = CancellationToken::new();
        tokio::spawn(signals::cancel(interrupted.clone()));
        let progress = Progress::new();
        let measured = interrupted.run_until_cancelled(measure(&progress)).await;
        measured.unwrap_or_else(|| bail!("interrupted"))
    })
}

fn write_page(path: Option<&Path>, page: impl FnOnce() -> String) -> Result<ExitCode> {
    if let Some(path) = path {
        fs::write(path, page()).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn serve_bench_pool(arguments: &bench::scale::PoolArguments) -> Result<ExitCode> {
    runtime()?.block_on(bench::scale::serve(arguments))?;
    Ok(ExitCode::SUCCESS)
}

fn serve_bench_peer(arguments: &BenchPeerArguments) -> Result<ExitCode> {
    runtime()?.block_on(bench::peer::serve(arguments.kind, &arguments.address))?;
    Ok(ExitCode::SUCCESS)
}

fn serve_naive(arguments: &NaiveArguments) -> Result<ExitCode> {
    let database = std::env::var(NAIVE_DATABASE).with_context(|| format!("{NAIVE_DATABASE} is not set"))?;
    // The text of the parser's error may repeat a part of the password.
    let database = database
        .parse()
        .map_err(|_| anyhow!("{NAIVE_DATABASE} is not the address of a PostgreSQL"))?;
    runtime()?.block_on(async {
        let ended = CancellationToken::new();
        tokio::spawn(signals::cancel(ended.clone()));
        let settings = scenario::Naive {
            pool: arguments.pool,
            heartbeat_seconds: arguments.heartbeat_seconds,
            deadline_seconds: arguments.deadline_seconds,
        };
        let naive = Naive::start(database, &settings).await?;
        let addresses = serde_json::json!({"devices": naive.devices(), "ops": naive.ops()});
        fs::write(&arguments.addresses, addresses.to_string()).context("writing the addresses")?;
        ended.cancelled().await;
        Ok(ExitCode::SUCCESS)
    })
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the runtime")
}
