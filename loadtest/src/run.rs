//! A load test from start to end: registry, servers, devices, phases, report. Start with [`run`].

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rand::{SeedableRng, rngs::StdRng};
use tokio_util::sync::CancellationToken;

use crate::{
    fleet::Fleet,
    follow::Follower,
    generator::{self, Gauge},
    guard::TempDir,
    harm::Watch,
    metrics::{SAMPLE_EVERY, Sample, Sampler},
    phases::{Runner, describe},
    plan::Plan,
    preflight, programs,
    progress::Progress,
    recorder::{PhaseFigures, Recorder},
    report::{self, Drift, MAIN_RUN, PhaseReport, Report, Run, Second, Summary},
    scenario::{Means, Scenario},
    server::Server,
    slow,
    storage::{ServerUrl, Storage},
    target::External,
};

/// A load test to do.
pub struct Job {
    pub scenario: Scenario,
    pub with: With,
    pub interrupted: CancellationToken,
    /// Lag of the generator above which its figures say nothing. `None`: as [`generator`] has it for these means.
    pub lag_max: Option<Duration>,
}

/// What a load test is done with. Everything that is not given is started and stopped.
#[derive(Clone, Debug)]
pub enum With {
    Nothing,
    /// A PostgreSQL that runs already: the registry is a database of its own there, which is dropped at the end.
    Database(ServerUrl),
    /// A gateway that runs already.
    Gateway(Box<External>),
}

impl With {
    #[must_use]
    pub const fn means(&self) -> Means {
        match self {
            Self::Nothing => Means::Own,
            Self::Database(_) => Means::LentDatabase,
            Self::Gateway(_) => Means::RunningGateway,
        }
    }
}

/// Does a load test. Everything it started has ended when it returns, whatever it returns.
///
/// # Errors
/// The scenario asks for what can't be had; a program is missing, can't be started, or died; or it was interrupted.
pub async fn run(job: &Job, progress: &Progress) -> Result<Report> {
    let scenario = &job.scenario;
    let thresholds = scenario.thresholds()?;
    report::check_names(scenario, &thresholds)?;
    let means = job.with.means();
    scenario.check_means(means, &thresholds)?;
    let (judged, others): (Vec<_>, Vec<_>) = thresholds.into_iter().partition(|threshold| means.can_judge(threshold));
    let started_at = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
    let plan = Plan::new(scenario);
    let runs = match &job.with {
        With::Gateway(external) => vec![against(external, job, &plan, progress).await?],
        With::Nothing => {
            let storage = if scenario.is_postgres() {
                progress.note("starting PostgreSQL");
                Some(Storage::private(scenario.database.cores).await?)
            } else {
                None
            };
            with_own_servers(job, &plan, storage, progress).await?
        }
        With::Database(server) => {
            progress.note("creating a database on a PostgreSQL that runs already");
            let storage = Storage::lent(server).await?;
            with_own_servers(job, &plan, Some(storage), progress).await?
        }
    };
    progress.finish();
    let mut report = Report::new(scenario, &judged, started_at, runs);
    report.not_judged = others.iter().map(ToString::to_string).collect();
    report.not_judged.extend(scenario.not_judged.iter().cloned());
    let lag_max = job.lag_max.unwrap_or(match &job.with {
        With::Gateway(external) if external.is_far => generator::LAG_MAX_ALONE,
        With::Gateway(_) | With::Nothing | With::Database(_) => generator::LAG_MAX_SHARED,
    });
    report.inconclusive = limits(&report, lag_max);
    if let With::Gateway(external) = &job.with {
        report.target = Some(external.name.clone());
    }
    report.conclude();
    Ok(report)
}

/// Why the generator was the limit of the main run. The naive server is meant to collapse, and may starve its devices.
fn limits(report: &Report, lag_max: Duration) -> Vec<String> {
    let main = report.runs.iter().filter(|run| run.name == MAIN_RUN);
    main.flat_map(|run| &run.phases)
        .filter_map(|phase| Some((phase, phase.generator?)))
        .flat_map(|(phase, generator)| generator.limits(&phase.name, phase.seconds, lag_max))
        .collect()
}

async fn against(external: &External, job: &Job, plan: &Plan, progress: &Progress) -> Result<Run> {
    progress.note(&format!("asking {} what it is", external.name));
    preflight::check(external).await?;
    let server = Server::external(external);
    let mut plan = plan.clone();
    match &external.identities {
        Some(identities) => plan.adopt(identities),
        None => import(&server, &plan, progress).await.context(
            "registering devices, which takes an admin's token; --devices-file names devices that are registered",
        )?,
    }
    through_phases(MAIN_RUN, job, plan, server, None, progress).await
}

async fn with_own_servers(
    job: &Job,
    plan: &Plan,
    mut storage: Option<Storage>,
    progress: &Progress,
) -> Result<Vec<Run>> {
    let runs = job
        .interrupted
        .run_until_cancelled(runs(job, plan, storage.as_mut(), progress))
        .await;
    if let Some(storage) = storage
        && let Err(error) = storage.stop().await
    {
        progress.note(&format!("{error:#}"));
    }
    runs.unwrap_or_else(|| bail!("interrupted"))
}

async fn runs(job: &Job, plan: &Plan, mut storage: Option<&mut Storage>, progress: &Progress) -> Result<Vec<Run>> {
    let scenario = &job.scenario;
    programs::build(&["seawall"]).await?;
    let folder = TempDir::new("loadtest").context("creating a temporary folder")?;
    let url = storage.as_ref().map(|storage| storage.url());
    let data = folder.path().join("data");
    let server = Server::gateway(&data, &scenario.gateway.config, url.as_deref()).await?;
    import(&server, plan, progress).await?;
    server.stop().await;
    if let Some(storage) = &storage
        && !scenario.database.slow_firmware.is_empty()
    {
        slow::install(&storage.options()).await?;
    }
    if let (true, Some(naive), Some(url)) = (scenario.is_naive_beside, &scenario.naive, &url) {
        let naive = Server::naive(folder.path(), naive, url).await?;
        let main = Server::gateway(&data, &scenario.gateway.config, Some(url)).await?;
        // Both have the same database, and its troubles.
        let (naive, main) = tokio::try_join!(
            through_phases(report::NAIVE_RUN, job, plan.clone(), naive, None, progress),
            through_phases(MAIN_RUN, job, plan.clone(), main, storage, progress),
        )?;
        return Ok(vec![naive, main]);
    }
    let mut runs = Vec::new();
    for name in scenario.run_names() {
        if let Some(storage) = &storage
            && !scenario.database.slow_firmware.is_empty()
        {
            slow::mark_only(&storage.options(), &slow_ids(scenario, plan)).await?;
        }
        let server = match (&scenario.naive, &url) {
            (Some(naive), Some(url)) if name != MAIN_RUN => Server::naive(folder.path(), naive, url).await?,
            _ => Server::gateway(&data, &scenario.gateway.config, url.as_deref()).await?,
        };
        runs.push(through_phases(name, job, plan.clone(), server, storage.as_deref_mut(), progress).await?);
    }
    Ok(runs)
}

fn slow_ids(scenario: &Scenario, plan: &Plan) -> Vec<uuid::Uuid> {
    let is_slow = |firmware: &String| scenario.database.slow_firmware.contains(firmware);
    plan.devices
        .iter()
        .filter(|device| is_slow(&device.firmware))
        .map(|device| device.id)
        .collect()
}

async fn import(server: &Server, plan: &Plan, progress: &Progress) -> Result<()> {
    progress.note("registering devices");
    let (ops, csv) = (server.ops().clone(), plan.csv());
    tokio::task::spawn_blocking(move || ops.import(&csv))
        .await
        .context("the task that imports")?
}

async fn through_phases(
    name: &str,
    job: &Job,
    mut plan: Plan,
    mut server: Server,
    storage: Option<&mut Storage>,
    progress: &Progress,
) -> Result<Run> {
    let scenario = &job.scenario;
    let started = Instant::now();
    let versions: Vec<&str> = plan.devices.iter().map(|device| device.firmware.as_str()).collect();
    let mut recorder = Recorder::new(&versions, &scenario.groups, started);
    if let Some(presence) = &scenario.presence {
        recorder = recorder.comparing(presence.limit());
    }
    let recorder = Arc::new(recorder);
    let follower = match &scenario.presence {
        Some(_) => {
            let has_counts = server.pid().is_some();
            Some(Follower::start(server.ops(), &plan.devices, &recorder, has_counts).await?)
        }
        None => None,
    };
    let sampler = Sampler::start(server.ops().clone(), server.pid());
    let stop = CancellationToken::new();
    let watch = match &job.with {
        With::Gateway(external) => Some(Watch::start(server.ops(), &recorder, external.per_second_max, &stop).await?),
        With::Nothing | With::Database(_) => None,
    };
    let gauge = Gauge::start();
    let target = server.target().await?;
    let fleet = Fleet::start(
        &plan.devices,
        &target,
        Arc::clone(&recorder),
        gauge.lateness(),
        scenario.seed,
    );
    let mut runner = Runner {
        run: name,
        scenario,
        plan: &mut plan,
        fleet: &fleet,
        recorder: &recorder,
        server: &mut server,
        sampler: &sampler,
        storage,
        progress,
        interrupted: &job.interrupted,
        gauge: &gauge,
        loads: Vec::new(),
        watch: watch.as_ref(),
        stop: &stop,
        stopped: None,
        rng: StdRng::seed_from_u64(scenario.seed ^ 0x5ea_3a11),
        begun: 0,
        rules: Vec::new(),
        away: VecDeque::new(),
    };
    let done = runner.run().await;
    let ended = Instant::now();
    let counters = runner.counters().await;
    let (loads, stopped) = (std::mem::take(&mut runner.loads), runner.stopped.take());
    // A gateway that keeps running after us keeps nothing of ours, however the run ended.
    let removed = if runner.server.pid().is_none() {
        runner.remove_rules().await
    } else {
        Ok(())
    };
    let figures = counters.map(|counters| recorder.finish(ended, counters));
    let presence = recorder.presence(ended);
    drop(follower);
    if done.is_ok() && stopped.is_none() {
        tokio::time::sleep(2 * SAMPLE_EVERY).await;
    }
    let samples = sampler.all();
    drop(sampler);
    fleet.stop().await;
    done?;
    removed?;
    let (phases, seconds) = figures?;
    server.stop().await;
    let mut run = assemble(name, scenario, started, phases, seconds, &samples);
    for (phase, load) in run.phases.iter_mut().zip(loads) {
        phase.generator = Some(load);
    }
    run.stopped = stopped;
    run.summary.presence = presence;
    Ok(run)
}

fn assemble(
    name: &str,
    scenario: &Scenario,
    started: Instant,
    phases: Vec<PhaseFigures>,
    mut seconds: Vec<Second>,
    samples: &[Sample],
) -> Run {
    add_samples(&mut seconds, started, samples);
    let mut reports = Vec::new();
    for (phase, figures) in scenario.phases.iter().zip(phases) {
        let from = started + Duration::from_secs_f64(figures.starts_seconds);
        let mut summary = of_samples(samples, from, from + Duration::from_secs_f64(figures.seconds));
        summary.t99_seconds = figures.t99_seconds;
        summary.t100_seconds = figures.t100_seconds;
        #[expect(clippy::cast_precision_loss, reason = "counts of a load test are far below 2^52")]
        {
            summary.optimum_seconds =
                (figures.wanted > 0).then(|| figures.wanted as f64 / scenario.capacity_per_second);
            summary.lost_sessions = figures.lost_sessions as f64;
            summary.missing = figures.missing as f64;
            summary.slow_lookups = figures.counters.slow_lookups.map(|count| count as f64);
        }
        summary.statements = figures.counters.statements;
        summary.attempts_per_device = figures.attempts_per_device;
        summary.presence = figures.presence;
        reports.push(PhaseReport {
            name: phase.name.clone(),
            action: describe(&phase.action),
            starts_seconds: figures.starts_seconds,
            seconds: figures.seconds,
            summary,
            drift: Some(Drift::of(&seconds, figures.starts_seconds, figures.seconds)),
            generator: None,
            groups: figures.groups,
        });
    }
    let summary = of_run(scenario, &reports);
    Run {
        name: name.to_owned(),
        summary,
        phases: reports,
        samples: seconds,
        stopped: None,
    }
}

/// See [`Summary`] for what of it is the leading phase's, and what is everyone's.
pub(crate) fn of_run(scenario: &Scenario, phases: &[PhaseReport]) -> Summary {
    let leading = report::leading_phase(scenario)
        .and_then(|index| phases.get(index))
        .map(|phase| phase.summary.clone())
        .unwrap_or_default();
    let most = |figure: fn(&Summary) -> f64| phases.iter().map(|phase| figure(&phase.summary)).fold(0.0, f64::max);
    let sum = |figure: fn(&Summary) -> f64| phases.iter().map(|phase| figure(&phase.summary)).sum();
    let most_of = |figure: fn(&Summary) -> Option<f64>| {
        phases
            .iter()
            .filter_map(|phase| figure(&phase.summary))
            .reduce(f64::max)
    };
    Summary {
        in_flight_max: most(|summary| summary.in_flight_max),
        limit_max: most_of(|summary| summary.limit_max),
        over_limit: sum(|summary| summary.over_limit),
        queue_max: most(|summary| summary.queue_max),
        lost_sessions: sum(|summary| summary.lost_sessions),
        missing: phases.last().map_or(0.0, |phase| phase.summary.missing),
        slow_lookups: phases.iter().map(|phase| phase.summary.slow_lookups).sum(),
        rss_start_bytes: phases.iter().find_map(|phase| phase.summary.rss_start_bytes),
        rss_max_bytes: most_of(|summary| summary.rss_max_bytes),
        // Quantiles are of all phases together, not sums of theirs.
        presence: None,
        ..leading
    }
}

fn of_samples(samples: &[Sample], from: Instant, to: Instant) -> Summary {
    let before = samples.iter().rev().find(|sample| sample.at <= from);
    let within: Vec<&Sample> = samples
        .iter()
        .filter(|sample| sample.at > from && sample.at <= to)
        .collect();
    let most = |figure: fn(&Sample) -> f64| within.iter().map(|sample| figure(sample)).fold(0.0, f64::max);
    #[expect(clippy::cast_precision_loss, reason = "bytes of memory are far below 2^52")]
    let rss = |sample: &Sample| sample.rss_bytes.map(|bytes| bytes as f64);
    let first = before.or_else(|| within.first().copied());
    let over = within
        .iter()
        .filter(|sample| sample.limit.is_some_and(|limit| sample.in_flight > limit))
        .count();
    Summary {
        in_flight_max: most(|sample| sample.in_flight),
        limit_max: within.iter().filter_map(|sample| sample.limit).reduce(f64::max),
        over_limit: u32::try_from(over).map_or(f64::INFINITY, f64::from),
        queue_max: most(|sample| sample.queue),
        rss_start_bytes: first.and_then(rss),
        rss_max_bytes: within.iter().filter_map(|sample| rss(sample)).reduce(f64::max),
        ..Summary::default()
    }
}

fn add_samples(seconds: &mut [Second], started: Instant, samples: &[Sample]) {
    let mut statements_before = 0.0;
    for sample in samples {
        let at = usize::try_from(sample.at.saturating_duration_since(started).as_secs()).unwrap_or(usize::MAX);
        if let Some(second) = seconds.get_mut(at) {
            second.in_flight = second.in_flight.max(sample.in_flight);
            second.queue = second.queue.max(sample.queue);
            second.limit = sample.limit.or(second.limit);
            second.rss_bytes = second.rss_bytes.max(sample.rss_bytes);
            second.handles = second.handles.max(sample.handles);
            second.threads = second.threads.max(sample.threads);
            second.statements += (sample.statements - statements_before).max(0.0);
        }
        statements_before = sample.statements;
    }
}

#[cfg(test)]
mod tests {
    use seawall_proto::id::SecretHash;
    use sqlx::{Connection, PgConnection};

    use super::*;
    use crate::{naive::Naive, scenario::Executor};

    #[test]
    fn a_phase_takes_the_samples_of_its_own_time() {
        let t0 = Instant::now();
        let at = |seconds: u64| t0 + Duration::from_secs(seconds);
        let samples: Vec<Sample> = (0..10_u32)
            .map(|n| Sample {
                at: at(u64::from(n)),
                sessions: 0.0,
                in_flight: f64::from(n),
                limit: Some(5.0),
                queue: 0.0,
                statements: f64::from(n) * 10.0,
                lookups: 0.0,
                rss_bytes: Some(u64::from(n) + 100),
                handles: None,
                threads: None,
            })
            .collect();

        let summary = of_samples(&samples, at(2), at(7));

        assert_eq!((summary.in_flight_max, summary.over_limit), (7.0, 2.0));
        assert_eq!(
            (summary.rss_start_bytes, summary.rss_max_bytes),
            (Some(102.0), Some(107.0))
        );
    }

    const DROPS: &str = r#"
        name = "drops"
        about = ""
        devices = 60
        capacity_per_second = 60
        database = { kind = "postgres", slow_firmware = ["b3"] }
        groups = { marked = ["b3"] }
        presence = {}
        thresholds = [
            "missing == 0",
            "lost_sessions == 0",
            "attempts_per_device == 1",
            "optimum_seconds == 1",
            "t100_seconds > 0",
            "statements == 60",
            "seawall.growth.marked.devices == 30",
            "seawall.growth.slow_lookups >= 24",
            "seawall.calm.all.connects > 10",
            "rss_growth > 1",
            "presence.closes > 2",
            "presence.closed_offline == presence.closes",
            "seawall.calm.presence.power_cuts > 2",
            "presence.false_offline + presence.missed == 0",
        ]
        [[fleet]]
        name = "all"
        firmware = { b2 = 0.9, b3 = 0.1 }
        profile = { fixed-1s = 1.0 }
        [[phase]]
        name = "connect"
        seconds = 20
        until = "connected"
        action = { connect = { per_second = 200 } }
        [[phase]]
        name = "storm"
        seconds = 30
        until = "connected"
        action = "drop-all"
        [[phase]]
        name = "calm"
        seconds = 1
        churn_per_second = 50
        closes_per_second = 10
        power_cuts_per_second = 10
        [[phase]]
        name = "growth"
        seconds = 1
        action = { grow = { firmware = "b3", to = 0.5 } }
        [[phase]]
        name = "frozen"
        seconds = 0.5
        action = { database = "frozen" }
    "#;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn devices_go_through_the_phases_against_a_real_server_and_database() {
        let scenario: Scenario = toml::from_str(DROPS).unwrap();
        scenario.check(Executor::Run).unwrap();
        let thresholds = scenario.thresholds().unwrap();
        report::check_names(&scenario, &thresholds).unwrap();
        let plan = Plan::new(&scenario);
        let mut storage = Storage::private(None).await.unwrap();
        register(&storage, &plan).await;
        slow::install(&storage.options()).await.unwrap();
        slow::mark_only(&storage.options(), &slow_ids(&scenario, &plan))
            .await
            .unwrap();
        let naive = Naive::start(storage.options(), &settings(8)).await.unwrap();
        let server = Server::of(naive.devices(), naive.ops());
        let job = Job {
            scenario,
            with: With::Nothing,
            interrupted: CancellationToken::new(),
            lag_max: None,
        };

        let run = through_phases(MAIN_RUN, &job, plan, server, Some(&mut storage), &Progress::new())
            .await
            .unwrap();

        let report = Report::new(&job.scenario, &thresholds, String::new(), vec![run]);
        let failed: Vec<_> = report
            .thresholds
            .iter()
            .filter(|outcome| !outcome.passed)
            .map(|outcome| &outcome.expression)
            .collect();
        // The test's server is this process, whose memory is not measured.
        assert_eq!(failed, ["rss_growth > 1"], "{}", report.to_text());
        // Of 60, less than 20 leave or lose power in the second of the calm phase.
        assert!(report.runs[0].samples.iter().any(|second| second.connected > 40));
        drop(naive);
        storage.stop().await.unwrap();
    }

    fn settings(pool: u32) -> crate::scenario::Naive {
        toml::from_str(&format!("pool = {pool}")).unwrap()
    }

    async fn register(storage: &Storage, plan: &Plan) {
        let mut connection = PgConnection::connect_with(&storage.options()).await.unwrap();
        sqlx::query(
            "CREATE TABLE devices (id UUID PRIMARY KEY, secret_sha256 BYTEA NOT NULL, state SMALLINT NOT NULL)",
        )
        .execute(&mut connection)
        .await
        .unwrap();
        for device in &plan.devices {
            sqlx::query("INSERT INTO devices VALUES ($1, $2, 0)")
                .bind(device.id)
                .bind(SecretHash::of(device.secret.as_bytes()).as_bytes().to_vec())
                .execute(&mut connection)
                .await
                .unwrap();
        }
    }
}
