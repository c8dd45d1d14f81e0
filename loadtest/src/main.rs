//! `loadtest`: runs a scenario of real devices against a real gateway, and says whether it held.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use firmware_sim::identity::{Identity, Lines, read_devices};
use loadtest::{
    baseline::Baseline,
    bench::{self, Database},
    compare::{Comparison, Side},
    exit::{Exit, Failure},
    generator, guard, html, junit,
    naive::Naive,
    progress::Progress,
    report::{self, Report},
    run::{Job, With, run},
    scenario::{self, Changes, Executor, Means, Scenario},
    server::NAIVE_DATABASE,
    signals,
    simulate::{SimulateError, simulate},
    storage::ServerUrl,
    summary,
    target::Asked,
};
use tokio_util::sync::CancellationToken;

/// Load tests for Seawall.
///
/// Exit status 0: all thresholds hold. 1: one does not. 2: wrong use. 3: the run could not be made, or was stopped.
/// 4: inconclusive, the generator was the limit.
#[derive(Parser)]
#[command(name = "loadtest", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a scenario with real sockets, against servers of its own or a gateway that runs already.
    Run(Box<RunArguments>),
    /// Put two reports of one scenario side by side. Exit 0 if they agree in t99 and attempts per device, 1 if not, 2
    /// where they can't be compared.
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
    /// Devices at most: a scenario that has more runs with these.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_devices: Option<u32>,
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
    /// Write the verdict as JUnit XML, a case for each threshold. A run that could not be made writes it as well.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Write a summary in Markdown.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Print annotations for this service, and add the summary to that of its job.
    #[arg(long, value_enum, value_name = "SERVICE")]
    annotate: Option<Service>,
    /// Fail if a figure is worse than in these reports: files that `--json` wrote, or arrays of such reports. May be
    /// repeated. Figures that fewer than three runs have are not judged.
    #[arg(long, value_name = "FILE")]
    baseline: Vec<PathBuf>,
    /// What a figure may be above the median of the baseline, as a part of it.
    #[arg(long, value_name = "PART", default_value_t = 0.1)]
    tolerance: f64,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Service {
    Github,
}

#[derive(Args)]
struct RunArguments {
    #[command(flatten)]
    what: ScenarioArguments,
    /// Drive the gateway or cluster that runs here, such as wss://staging.example/v1/connect, and start none.
    #[arg(long, visible_alias = "gateway", value_name = "URL", requires = "ops")]
    target: Option<String>,
    /// Its API, such as https://staging.example:8081.
    #[arg(long, value_name = "URL", requires = "target")]
    ops: Option<String>,
    /// File with a token of it: an admin's, or with --devices-file an operator's [default: the token in SEAWALL_TOKEN]
    #[arg(long, value_name = "FILE", requires = "target")]
    token_file: Option<PathBuf>,
    /// Devices that are registered there, as `seawall devices seed --out` writes them. Without it the load test
    /// registers its own.
    #[arg(long, value_name = "FILE", requires = "target")]
    devices_file: Option<PathBuf>,
    /// Allow a target that is not on loopback. Whatever runs there may be harmed.
    #[arg(long, requires = "target")]
    confirm_target: bool,
    /// Attempts per second at most: more are not scheduled, and stop the run [default outside loopback: 1000]
    #[arg(long, value_name = "N", requires = "target", value_parser = rate)]
    max_per_second: Option<f64>,
    /// Authorities that the target is verified by, as PEM [default: those of this machine]
    #[arg(long, value_name = "FILE", requires = "target")]
    ca: Option<PathBuf>,
    /// Lag of the generator, at its 99th percentile, above which the run is inconclusive [default: 2s, outside
    /// loopback 50ms]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    max_lag: Option<Duration>,
    /// Use the PostgreSQL that runs at this address: in a database of the load test's own, which is created, and dropped at the end. In
    /// the environment its password is in no list of processes.
    #[arg(
        long,
        value_name = "URL",
        env = "SEAWALL_LOADTEST_DATABASE",
        hide_env_values = true,
        conflicts_with = "target"
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
        Command::Run(arguments) => noted(&arguments.what, run_scenario(&arguments)),
        Command::Compare(arguments) => compare(&arguments),
        Command::Simulate(arguments) => noted(&arguments, simulate_scenario(&arguments)),
        Command::Bench(arguments) => measure(&arguments),
        Command::Scale(arguments) => scale(&arguments),
        Command::BenchPool(arguments) => serve_bench_pool(&arguments),
        Command::BenchPeer(arguments) => serve_bench_peer(&arguments),
        Command::NaiveServer(arguments) => serve_naive(&arguments),
    };
    match done {
        Ok(exit) => exit.code(),
        Err(failure) => {
            eprintln!("error: {:#}", failure.error());
            failure.code()
        }
    }
}

/// Writes a run that could not be made to the JUnit file, so that a pipeline shows the reason.
fn noted(arguments: &ScenarioArguments, done: Result<Exit, Failure>) -> Result<Exit, Failure> {
    if let (Err(failure), Some(path)) = (&done, &arguments.junit) {
        let name = arguments.scenario.file_stem().unwrap_or_default().to_string_lossy();
        let page = junit::failure(&name, &format!("{:#}", failure.error()));
        if let Err(error) = fs::write(path, page) {
            eprintln!("error: writing {}: {error}", path.display());
        }
    }
    done
}

fn run_scenario(arguments: &RunArguments) -> Result<Exit, Failure> {
    let what = &arguments.what;
    check_outputs(what)?;
    let identities = arguments.devices_file.as_deref().map(identities).transpose()?;
    let in_file = identities
        .as_ref()
        .and_then(|devices| u32::try_from(devices.len()).ok());
    let devices_max = [what.max_devices, in_file].into_iter().flatten().min();
    let scenario = read(what, devices_max, Executor::Run).map_err(Failure::WrongUse)?;
    if let Some(devices) = scenario.bounded_from {
        eprintln!(
            "note: {} of the scenario's {devices} devices, as --max-devices or --devices-file bounds them",
            scenario.devices
        );
    }
    check_identities(identities.as_deref(), &scenario).map_err(Failure::WrongUse)?;
    let baseline = baseline(what, &scenario, Executor::Run, arguments.target.is_some())?;
    let asked = asked(arguments, identities)?;
    let means = match (&asked, &arguments.database) {
        (Some(_), _) => Means::RunningGateway,
        (None, Some(_)) => Means::LentDatabase,
        (None, None) => Means::Own,
    };
    let thresholds = scenario.thresholds().map_err(Failure::wrong_use)?;
    scenario
        .check_means(means, &thresholds)
        .with_context(|| what.scenario.display().to_string())
        .map_err(Failure::WrongUse)?;
    generator::check_files(scenario.devices).map_err(Failure::Inconclusive)?;
    let database = match &arguments.database {
        Some(url) => Some(
            url.parse::<ServerUrl>()
                .context("--database")
                .map_err(Failure::WrongUse)?,
        ),
        None => None,
    };
    let runtime = runtime()?;
    let with = match (asked, database) {
        (Some(asked), _) => With::Gateway(Box::new(runtime.block_on(asked.resolve(&scenario))?)),
        (None, Some(server)) => With::Database(server),
        (None, None) => With::Nothing,
    };
    guard::start().context("starting the guard that cleans up")?;
    let job = Job {
        scenario,
        with,
        interrupted: CancellationToken::new(),
        lag_max: arguments.max_lag,
    };
    let mut report = runtime.block_on(async {
        tokio::spawn(signals::cancel(job.interrupted.clone()));
        run(&job, &Progress::new()).await
    })?;
    let mut command = what.repeat("run", report.seed);
    arguments.add_to(&mut command);
    report.command = Some(command.join(" "));
    publish(report, what, baseline.as_ref())
}

/// What the command line says about a gateway that runs already.
fn asked(arguments: &RunArguments, identities: Option<Vec<Identity>>) -> Result<Option<Asked>, Failure> {
    let (Some(target), Some(ops)) = (&arguments.target, &arguments.ops) else {
        return Ok(None);
    };
    let token = token(arguments.token_file.as_deref()).map_err(Failure::WrongUse)?;
    Ok(Some(Asked {
        target: target.clone(),
        ops: ops.clone(),
        token,
        identities: identities.map(Arc::from),
        ca: arguments.ca.clone(),
        is_confirmed: arguments.confirm_target,
        devices_max: arguments.what.max_devices,
        per_second_max: arguments.max_per_second,
    }))
}

/// Devices of a file.
fn identities(path: &Path) -> Result<Vec<Identity>, Failure> {
    let named = || format!("--devices-file: {}", path.display());
    let file = fs::File::open(path).with_context(named).map_err(Failure::WrongUse)?;
    let lines = Lines {
        limit: usize::try_from(scenario::DEVICES_MAX).unwrap_or(usize::MAX),
        ..Lines::default()
    };
    read_devices(file, lines).with_context(named).map_err(Failure::WrongUse)
}

/// Published presence is compared by UUID, and which one the gateway makes of another name is not known here.
fn check_identities(identities: Option<&[Identity]>, scenario: &Scenario) -> Result<()> {
    let has_names = identities.is_some_and(|all| all.iter().any(|identity| identity.external_id.is_some()));
    if has_names && scenario.presence.is_some() {
        bail!("--devices-file: a scenario with [presence] takes devices whose ids are UUIDs");
    }
    Ok(())
}

/// The token of a file, else of the environment. Never of an argument: every user of a machine can list those.
fn token(file: Option<&Path>) -> Result<String> {
    let (token, source) = match file {
        Some(path) => {
            let token = fs::read_to_string(path).with_context(|| format!("--token-file: {}", path.display()))?;
            (token, "--token-file")
        }
        None => {
            let token = env::var("SEAWALL_TOKEN")
                .ok()
                .context("--target needs --token-file or SEAWALL_TOKEN")?;
            (token, "SEAWALL_TOKEN")
        }
    };
    let token = token.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        bail!("{source} holds no token");
    }
    Ok(token.to_owned())
}

fn simulate_scenario(arguments: &ScenarioArguments) -> Result<Exit, Failure> {
    check_outputs(arguments)?;
    let scenario = read(arguments, arguments.max_devices, Executor::Simulate).map_err(Failure::WrongUse)?;
    let baseline = baseline(arguments, &scenario, Executor::Simulate, false)?;
    match simulate(&scenario) {
        Ok(mut report) => {
            report.command = Some(arguments.repeat("simulate", report.seed).join(" "));
            publish(report, arguments, baseline.as_ref())
        }
        Err(SimulateError::Scenario(error)) => Err(Failure::wrong_use(error)),
        // An invariant is a bound that every scenario has.
        Err(SimulateError::Broken(broken)) => {
            let problem = format!("{:#}", anyhow::Error::from(broken));
            eprintln!("error: {problem}");
            if let Some(path) = &arguments.junit {
                let page = junit::failure(&scenario.name, &problem);
                fs::write(path, page).with_context(|| format!("writing {}", path.display()))?;
            }
            Ok(Exit::Missed)
        }
    }
}

/// Reads the baseline, before a minute is spent on a run that can't be compared with it.
fn baseline(
    arguments: &ScenarioArguments,
    scenario: &Scenario,
    executor: Executor,
    has_target: bool,
) -> Result<Option<Baseline>, Failure> {
    if arguments.baseline.is_empty() {
        return Ok(None);
    }
    Baseline::read(&arguments.baseline, arguments.tolerance, scenario, executor, has_target)
        .map(Some)
        .map_err(Failure::WrongUse)
}

/// Files that the report goes to can be written, as far as that shows before the run.
fn check_outputs(arguments: &ScenarioArguments) -> Result<(), Failure> {
    let files = [&arguments.json, &arguments.html, &arguments.junit, &arguments.markdown];
    for path in files.into_iter().flatten() {
        check_output(path).map_err(Failure::WrongUse)?;
    }
    Ok(())
}

fn check_output(path: &Path) -> Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if path.is_dir() || !folder.is_dir() {
        bail!("{} can't be written: it is a folder, or is in none", path.display());
    }
    Ok(())
}

/// Prints the report, and writes it where it was asked for.
fn publish(mut report: Report, arguments: &ScenarioArguments, baseline: Option<&Baseline>) -> Result<Exit, Failure> {
    if let Some(baseline) = baseline {
        report.baseline = Some(baseline.judge(&report));
        report.conclude();
    }
    print!("{}", report.to_text());
    let json = serde_json::to_string_pretty(&report).context("writing the report")?;
    for (path, text) in [
        (&arguments.json, json),
        (&arguments.html, html::page(&report)),
        (&arguments.junit, junit::page(&report)),
        (&arguments.markdown, summary::markdown(&report)),
    ] {
        if let Some(path) = path {
            fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
        }
    }
    if arguments.annotate == Some(Service::Github) {
        print!("{}", summary::annotations(&report));
        if let Some(path) = env::var_os("GITHUB_STEP_SUMMARY") {
            append(Path::new(&path), &summary::markdown(&report))
                .with_context(|| format!("adding the summary to {}", path.display()))?;
        }
    }
    Ok(report.verdict.exit())
}

fn append(path: &Path, text: &str) -> io::Result<()> {
    use io::Write as _;
    fs::File::options()
        .append(true)
        .create(true)
        .open(path)?
        .write_all(text.as_bytes())
}

impl ScenarioArguments {
    /// The command that repeats a run, in words that a shell takes as they are.
    fn repeat(&self, verb: &str, seed: u64) -> Vec<String> {
        let mut words = vec![
            "loadtest".to_owned(),
            verb.to_owned(),
            quoted(&self.scenario.to_string_lossy()),
        ];
        let mut add = |option: &str, value: Option<String>| {
            words.push(option.to_owned());
            words.extend(value);
        };
        if self.short {
            add("--short", None);
        }
        if let Some(devices) = self.devices {
            add("--devices", Some(devices.to_string()));
        }
        if let Some(devices) = self.max_devices {
            add("--max-devices", Some(devices.to_string()));
        }
        add("--seed", Some(seed.to_string()));
        for (phase, seconds) in &self.seconds {
            add("--seconds", Some(quoted(&format!("{phase}={seconds}"))));
        }
        if self.without_naive {
            add("--without-naive", None);
        }
        for file in &self.baseline {
            add("--baseline", Some(quoted(&file.to_string_lossy())));
        }
        if !self.baseline.is_empty() {
            add("--tolerance", Some(self.tolerance.to_string()));
        }
        words
    }
}

impl RunArguments {
    /// The rest of the command that repeats it. What may hold a secret is left out.
    fn add_to(&self, words: &mut Vec<String>) {
        if self.database.is_some() {
            words.insert(0, "SEAWALL_LOADTEST_DATABASE=…".to_owned());
        }
        let path = |path: &PathBuf| quoted(&path.to_string_lossy());
        let without_query = |url: &String| match url.split_once('?') {
            Some((address, _)) => quoted(&format!("{address}?…")),
            None => quoted(url),
        };
        let options = [
            ("--target", self.target.as_ref().map(without_query)),
            ("--ops", self.ops.as_ref().map(without_query)),
            ("--token-file", self.token_file.as_ref().map(path)),
            ("--devices-file", self.devices_file.as_ref().map(path)),
            ("--ca", self.ca.as_ref().map(path)),
            ("--max-per-second", self.max_per_second.map(|rate| rate.to_string())),
            (
                "--max-lag",
                self.max_lag
                    .map(|lag| quoted(&humantime::format_duration(lag).to_string())),
            ),
        ];
        for (option, value) in options {
            if let Some(value) = value {
                words.extend([option.to_owned(), value]);
            }
        }
        if self.confirm_target {
            words.push("--confirm-target".to_owned());
        }
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

fn compare(arguments: &CompareArguments) -> Result<Exit, Failure> {
    let comparison = Side::from_file(&arguments.first)
        .and_then(|first| Comparison::new(&first, &Side::from_file(&arguments.second)?, arguments.tolerance))
        .map_err(Failure::WrongUse)?;
    print!("{comparison}");
    Ok(if comparison.agrees() { Exit::Held } else { Exit::Missed })
}

/// Everything that can be wrong before a minute is spent on it.
fn read(arguments: &ScenarioArguments, devices_max: Option<u32>, executor: Executor) -> Result<Scenario> {
    let changes = Changes {
        is_short: arguments.short,
        devices: arguments.devices,
        devices_max,
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

/// Attempts per second.
fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate > 0.0);
    rate.ok_or_else(|| "expected a number above 0".to_owned())
}

fn measure(arguments: &BenchArguments) -> Result<Exit, Failure> {
    if let Some(path) = &arguments.write {
        check_output(path).map_err(Failure::WrongUse)?;
    }
    let options = bench::Options {
        devices: arguments.devices,
        database: arguments.database,
        hold: arguments.hold,
    };
    let report = interruptible(async |progress| bench::bench(options, progress).await)?;
    print!("{}", report.table());
    write_page(arguments.write.as_deref(), || report.page())
}

fn scale(arguments: &ScaleArguments) -> Result<Exit, Failure> {
    if let Some(path) = &arguments.write {
        check_output(path).map_err(Failure::WrongUse)?;
    }
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

fn write_page(path: Option<&Path>, page: impl FnOnce() -> String) -> Result<Exit, Failure> {
    if let Some(path) = path {
        fs::write(path, page()).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(Exit::Held)
}

fn serve_bench_pool(arguments: &bench::scale::PoolArguments) -> Result<Exit, Failure> {
    runtime()?.block_on(bench::scale::serve(arguments))?;
    Ok(Exit::Held)
}

fn serve_bench_peer(arguments: &BenchPeerArguments) -> Result<Exit, Failure> {
    runtime()?.block_on(bench::peer::serve(arguments.kind, &arguments.address))?;
    Ok(Exit::Held)
}

fn serve_naive(arguments: &NaiveArguments) -> Result<Exit, Failure> {
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
        Ok(Exit::Held)
    })
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the runtime")
}
