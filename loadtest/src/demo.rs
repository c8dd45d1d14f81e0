//! The demo: a gateway on embedded SQLite and a fleet of devices, as processes of their own, and what they do, live.
//!
//! Start with [`run`]. What it shows it reads from the gateway's `/metrics`, as any monitoring would.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use tokio_util::sync::CancellationToken;

use crate::{
    guard::TempDir,
    metrics::{Metrics, label},
    process::{self, Process},
    programs,
    progress::Progress,
    server::{Server, without_settings},
};

/// Versions of the fleet, and the parts of it that run them, in percent.
const FIRMWARE_MIX: &str = "3.7.4=15%,3.8.0-b2=50%,3.8.0-b3=25%,3.8.0=10%";
/// What the printed command blocks: over a third of the fleet.
const BLOCKED_RANGE: &str = ">=3.8.0-b3";
/// Devices of one process of the simulator.
const DEVICES_PER_PROCESS: usize = 5_000;
/// Processes at least, so that a fleet is never one program only.
const PROCESSES_MIN: usize = 2;
const LOOK_EVERY: Duration = Duration::from_millis(250);
const COMMAND_TIME_MAX: Duration = Duration::from_secs(120);
const SIM_STOP_GRACE: Duration = Duration::from_secs(5);
/// Calm before the storm, for the eye.
const CALM: Duration = Duration::from_secs(2);
/// Outcomes of handshakes that a healthy demo may have; any other is an error of ours.
const EXPECTED_OUTCOMES: [&str; 8] = [
    "admitted",
    "abandoned",
    "firmware_blocked",
    "device_disabled",
    "overloaded",
    "throttled",
    "registry_unavailable",
    "draining",
];

/// What to show.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub devices: usize,
    /// Drop every socket at once when all are connected.
    pub has_storm: bool,
    /// Ends by itself after this.
    pub length: Option<Duration>,
}

/// How the gateway's figures stand.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    pub connected: u64,
    pub refused: BTreeMap<String, u64>,
    pub admitted: u64,
    pub lookups: u64,
    pub statements: u64,
    pub versions: BTreeMap<String, u64>,
}

/// What has happened so far.
#[derive(Debug, Default)]
struct Story {
    all_connected_at: Option<Instant>,
    storm: Option<Storm>,
}

#[derive(Clone, Copy, Debug)]
struct Storm {
    began: Instant,
    /// The gateway has seen the sockets go.
    was_seen: bool,
    took: Option<Duration>,
}

/// Runs the demo until it is interrupted, or its time is over. Leaves no process and no file behind.
///
/// # Errors
/// Something could not be started, or died by itself; or its time was over and not all was well.
pub async fn run(options: Options, interrupted: &CancellationToken) -> Result<()> {
    let progress = Progress::new();
    progress.note("building the gateway and the simulated devices (the first time takes minutes)");
    let folder = TempDir::new("demo").context("creating a temporary folder")?;
    // Whatever is awaited when the interrupt comes is dropped, and its processes with it.
    let done = interrupted
        .run_until_cancelled(show(options, folder.path(), &progress))
        .await;
    progress.finish();
    done.unwrap_or(Ok(()))
}

async fn show(options: Options, folder: &Path, progress: &Progress) -> Result<()> {
    programs::build(&["seawall", "firmware-sim"]).await?;
    let data = folder.join("data");
    let mut server = Server::gateway(&data, &toml::Table::new(), None).await?;
    let seawall = Cli {
        program: programs::find("seawall")?,
        url: server.ops().url().to_owned(),
        token: data.join("admin.token"),
    };
    progress.note(&format!("registering {} devices", options.devices));
    let parts = seawall.register(options.devices, folder).await?;
    progress.note(&invitation(options.devices, &server, &seawall));
    let mut fleet = Fleet {
        parts,
        folder: folder.to_owned(),
        url: server.url().to_owned(),
        sims: Vec::new(),
    };
    fleet.start()?;
    let started = Instant::now();
    let mut story = Story::default();
    let mut last = Figures::default();
    loop {
        server.check()?;
        fleet.check()?;
        let ops = server.ops().clone();
        // A gateway that is busy for a moment misses one look, not the demo.
        if let Ok(metrics) = tokio::task::spawn_blocking(move || ops.metrics())
            .await
            .context("the task that looks")?
        {
            last = Figures::of(&metrics);
        }
        if story.advance(options, &last, progress) {
            fleet.drop_all(progress)?;
        }
        progress.update(|| status(options.devices, &last, started.elapsed()));
        if options.length.is_some_and(|length| started.elapsed() >= length) {
            break;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    fleet.stop().await;
    server.stop().await;
    progress.finish();
    story.judge(options, &last)?;
    progress.note("all is well");
    Ok(())
}

/// The operator's command line, pointed at the demo's gateway.
struct Cli {
    program: PathBuf,
    url: String,
    token: PathBuf,
}

impl Cli {
    /// Makes devices with random secrets and registers them. Returns files with the parts of the fleet.
    async fn register(&self, devices: usize, folder: &Path) -> Result<Vec<PathBuf>> {
        let all = folder.join("devices.csv");
        let mut seed = self.command()?;
        seed.args(["devices", "seed", "--count"])
            .arg(devices.to_string())
            .arg("--out")
            .arg(&all);
        process::output("seawall devices seed", seed, COMMAND_TIME_MAX).await?;
        let mut import = self.command()?;
        import.args(["devices", "import"]).arg(&all);
        process::output("seawall devices import", import, COMMAND_TIME_MAX).await?;
        split(&all, folder)
    }

    fn command(&self) -> Result<Command> {
        let token = fs::read_to_string(&self.token).context("reading the admin token")?;
        let mut command = Command::new(&self.program);
        without_settings(&mut command)
            .env("SEAWALL_URL", &self.url)
            .env("SEAWALL_TOKEN", token.trim());
        Ok(command)
    }

    /// A line to paste into a shell.
    fn line(&self, arguments: &str) -> String {
        format!(
            "SEAWALL_URL={} SEAWALL_TOKEN=\"$(cat {})\" {} {arguments}",
            self.url,
            quoted(&self.token),
            quoted(&self.program)
        )
    }
}

/// The simulated devices: processes of `firmware-sim`.
struct Fleet {
    parts: Vec<PathBuf>,
    folder: PathBuf,
    url: String,
    sims: Vec<Process>,
}

impl Fleet {
    fn start(&mut self) -> Result<()> {
        for (index, part) in self.parts.iter().enumerate() {
            let name = format!("firmware-sim {}", index + 1);
            let mut command = Command::new(programs::find("firmware-sim")?);
            without_settings(&mut command)
                .arg("--url")
                .arg(&self.url)
                .arg("--devices")
                .arg(part)
                .args(["--firmware-mix", FIRMWARE_MIX, "--profile", "well-behaved"]);
            let log = self.folder.join(format!("sim-{index}.log"));
            self.sims.push(Process::start_steered(name, &mut command, &log)?);
        }
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        self.sims.iter_mut().try_for_each(Process::check)
    }

    /// Every socket is gone at once; every device comes back by its own policy, within 5 s where nobody tells it otherwise.
    fn drop_all(&mut self, progress: &Progress) -> Result<()> {
        progress.note("storm: every socket is dropped at once");
        self.sims.iter_mut().try_for_each(|sim| sim.order("drop"))
    }

    async fn stop(mut self) {
        for sim in &mut self.sims {
            sim.stop(Signal::TERM, SIM_STOP_GRACE).await;
        }
    }
}

impl Figures {
    #[must_use]
    pub fn of(metrics: &Metrics) -> Self {
        let by_outcome: BTreeMap<String, u64> = metrics
            .series("seawall_handshakes_total")
            .filter_map(|(labels, value)| Some((label(labels, "outcome")?, whole(value))))
            .collect();
        let versions = metrics
            .series("seawall_cohort_sessions")
            .filter_map(|(labels, value)| Some((label(labels, "cohort")?, whole(value))))
            .map(|(cohort, count)| (version_of(&cohort).to_owned(), count))
            .fold(
                BTreeMap::new(),
                |mut versions: BTreeMap<String, u64>, (version, count)| {
                    *versions.entry(version).or_default() += count;
                    versions
                },
            );
        Self {
            connected: whole(metrics.sum("seawall_sessions")),
            admitted: by_outcome.get("admitted").copied().unwrap_or(0),
            refused: by_outcome
                .into_iter()
                .filter(|(outcome, count)| outcome != "admitted" && *count > 0)
                .collect(),
            lookups: whole(metrics.sum("seawall_lookups_total")),
            statements: whole(metrics.sum("seawall_lookup_statements_total")),
            versions,
        }
    }

    fn is_rule_in_force(&self) -> bool {
        self.refused.contains_key("firmware_blocked")
    }
}

impl Story {
    /// Takes note of what happened. True: now is the time for the storm.
    fn advance(&mut self, options: Options, figures: &Figures, progress: &Progress) -> bool {
        let now = Instant::now();
        let is_complete = figures.connected >= options.devices as u64;
        if is_complete && self.all_connected_at.is_none() {
            self.all_connected_at = Some(now);
            progress.note(&format!("all {} devices are connected", options.devices));
        }
        match &mut self.storm {
            Some(storm) if storm.took.is_none() => {
                storm.was_seen |= figures.connected < options.devices as u64 / 2;
                // With a rule in force some stay away: then a standstill of the others is not told from a recovery here.
                if storm.was_seen && is_complete {
                    let took = storm.began.elapsed();
                    storm.took = Some(took);
                    progress.note(&format!(
                        "recovered: all {} devices are back after {:.1} s",
                        options.devices,
                        took.as_secs_f64()
                    ));
                }
                false
            }
            Some(_) => false,
            None => {
                let is_time = options.has_storm && self.all_connected_at.is_some_and(|at| at.elapsed() >= CALM);
                if is_time {
                    self.storm = Some(Storm {
                        began: now,
                        was_seen: false,
                        took: None,
                    });
                }
                is_time
            }
        }
    }

    /// # Errors
    /// Something that a demo should show did not happen, or something else did.
    fn judge(&self, options: Options, figures: &Figures) -> Result<()> {
        ensure!(
            self.all_connected_at.is_some(),
            "not all devices were connected in time: {} of {}",
            figures.connected,
            options.devices
        );
        let unexpected: Vec<&String> = figures
            .refused
            .keys()
            .filter(|outcome| !EXPECTED_OUTCOMES.contains(&outcome.as_str()))
            .collect();
        ensure!(
            unexpected.is_empty(),
            "devices were refused for reasons that a demo has none for: {unexpected:?}"
        );
        if options.has_storm {
            match self.storm {
                None => bail!("there was no time for the storm: give more --seconds"),
                Some(storm) => ensure!(
                    storm.took.is_some() || figures.is_rule_in_force(),
                    "{} of {} devices were back after the storm",
                    figures.connected,
                    options.devices
                ),
            }
        }
        Ok(())
    }
}

fn status(devices: usize, figures: &Figures, since: Duration) -> String {
    let devices = devices as u64;
    let refused: u64 = figures.refused.values().sum();
    let mut text = format!(
        "{:5.0} s  connected {} of {devices}  reconnecting {}  refused {refused}  look-ups {} in {} statements",
        since.as_secs_f64(),
        figures.connected,
        devices.saturating_sub(figures.connected),
        figures.lookups,
        figures.statements,
    );
    let list = |text: &mut String, title: &str, counts: &BTreeMap<String, u64>| {
        if !counts.is_empty() {
            let _ = write!(text, "\n  {title}:"); // writing to a String can't fail
            for (name, count) in counts {
                let _ = write!(text, "  {name} {count}");
            }
        }
    };
    list(&mut text, "versions", &figures.versions);
    list(&mut text, "refusals", &figures.refused);
    text
}

fn invitation(devices: usize, server: &Server, seawall: &Cli) -> String {
    format!(
        "\n{devices} devices connect to {url}/v1/connect\n\
         API and metrics:  {ops}  (/metrics, /api/v1/openapi.json)\n\
         admin token:      {token}\n\n\
         Block a firmware; paste into another terminal:\n  {block}\n\
         See what it did:\n  {firmware}\n\
         Ctrl-C ends everything.\n",
        url = server.url(),
        ops = seawall.url,
        token = seawall.token.display(),
        block = seawall.line(&format!(
            "rules block '{BLOCKED_RANGE}' --reason 'scans the device table at every connect' --evict --confirm"
        )),
        firmware = seawall.line("firmware"),
    )
}

/// Cuts a file of devices into parts, each with the header.
fn split(all: &Path, folder: &Path) -> Result<Vec<PathBuf>> {
    let text = fs::read_to_string(all).context("reading the seeded devices")?;
    let (header, rows) = text.split_once('\n').context("the seeded devices have no header")?;
    let rows: Vec<&str> = rows.lines().filter(|row| !row.is_empty()).collect();
    let parts = rows
        .len()
        .div_ceil(DEVICES_PER_PROCESS)
        .max(PROCESSES_MIN)
        .min(rows.len().max(1));
    let mut files = Vec::new();
    for (index, rows) in rows.chunks(rows.len().div_ceil(parts).max(1)).enumerate() {
        let file = folder.join(format!("devices-{index}.csv"));
        fs::write(&file, format!("{header}\n{}\n", rows.join("\n"))).context("writing a part of the devices")?;
        files.push(file);
    }
    Ok(files)
}

/// A cohort is `model/version`.
fn version_of(cohort: &str) -> &str {
    cohort.rsplit_once('/').map_or(cohort, |(_, version)| version)
}

fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = text
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '-' | '_'));
    if is_plain {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counts; negative ones become 0"
)]
const fn whole(value: f64) -> u64 {
    value as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_the_metrics() {
        let metrics = Metrics::parse(
            "seawall_sessions 7\n\
             seawall_handshakes_total{outcome=\"admitted\"} 9\n\
             seawall_handshakes_total{outcome=\"overloaded\"} 2\n\
             seawall_handshakes_total{outcome=\"unauthorized\"} 0\n\
             seawall_cohort_sessions{cohort=\"a/3.8.0-b2\"} 4\n\
             seawall_cohort_sessions{cohort=\"b/3.8.0-b2\"} 1\n\
             seawall_cohort_sessions{cohort=\"other\"} 2\n",
        );

        let figures = Figures::of(&metrics);

        assert_eq!((figures.connected, figures.admitted), (7, 9));
        assert_eq!(figures.refused, BTreeMap::from([("overloaded".to_owned(), 2)]));
        assert_eq!(
            figures.versions,
            BTreeMap::from([("3.8.0-b2".to_owned(), 5), ("other".to_owned(), 2)])
        );
    }

    #[test]
    fn a_demo_ends_well_only_if_everyone_was_there_and_is_back() {
        let options = Options {
            devices: 10,
            has_storm: true,
            length: None,
        };
        let progress = Progress::new();
        let mut story = Story::default();
        let with = |connected| Figures {
            connected,
            ..Figures::default()
        };

        assert!(!story.advance(options, &with(9), &progress));
        assert!(
            story
                .judge(options, &with(9))
                .unwrap_err()
                .to_string()
                .contains("9 of 10")
        );
        assert!(!story.advance(options, &with(10), &progress));
        assert!(
            story
                .judge(options, &with(10))
                .unwrap_err()
                .to_string()
                .contains("no time for the storm")
        );
        story.all_connected_at = story.all_connected_at.map(|at| at - CALM);
        assert!(story.advance(options, &with(10), &progress));
        assert!(!story.advance(options, &with(10), &progress));
        assert!(
            story.judge(options, &with(10)).is_err(),
            "the gateway has not even seen the storm"
        );
        story.advance(options, &with(0), &progress);
        story.advance(options, &with(10), &progress);
        story.judge(options, &with(10)).unwrap();

        let refused = BTreeMap::from([("unauthorized".to_owned(), 1)]);
        assert!(story.judge(options, &Figures { refused, ..with(10) }).is_err());
    }

    #[test]
    fn devices_are_split_over_at_least_two_processes() {
        let folder = tempfile::tempdir().unwrap();
        let all = folder.path().join("all.csv");
        for (count, parts) in [(1, 1), (10, 2), (10_001, 3)] {
            let rows: Vec<String> = (0..count).map(|n| format!("{n},s")).collect();
            fs::write(&all, format!("id,secret\n{}\n", rows.join("\n"))).unwrap();

            let files = split(&all, folder.path()).unwrap();

            assert_eq!(files.len(), parts);
            let lines: usize = files
                .iter()
                .map(|file| fs::read_to_string(file).unwrap().lines().count() - 1)
                .sum();
            assert_eq!(lines, count);
        }
    }

    #[test]
    fn a_path_is_quoted_for_the_shell_only_where_it_must_be() {
        assert_eq!(quoted(Path::new("/tmp/a-b/c.d")), "/tmp/a-b/c.d");
        assert_eq!(quoted(Path::new("/tmp/it's here")), r"'/tmp/it'\''s here'");
    }
}
