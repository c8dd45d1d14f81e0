//! What a load test does, read from a TOML file and checked before anything starts. docs/SCENARIOS.md is the reference.
//!
//! Read [`Scenario`] first. A scenario that parses and passes [`Scenario::check`] names only fleets, groups, versions and figures
//! that exist.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::Duration,
};

use firmware_sim::profile::{Profile, UnknownProfile};
use serde::Deserialize;

use crate::threshold::{Threshold, ThresholdError};

/// Most devices of one scenario: each takes a socket of this process, and its limit on open files is 20,000 by common default.
pub const DEVICES_MAX: u32 = 18_000;
/// Most rows in the registry.
const REGISTERED_MAX: u32 = 1_000_000;
/// Longest phase, in seconds.
const SECONDS_MAX: f64 = 3_600.0;
/// Greatest scenario file, in bytes.
const FILE_BYTES_MAX: u64 = 256 * 1024;
/// The group that holds every device. No other may be called so.
pub const GROUP_ALL: &str = "all";

/// A load test.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Lower-case letters, digits, `-`.
    pub name: String,
    /// One sentence for the report.
    pub about: String,
    /// Devices of all fleets together. 1 to 18,000. `--devices` wins.
    pub devices: u32,
    /// Seed of everything that is drawn by chance. `--seed` wins.
    #[serde(default = "one")]
    pub seed: u64,
    /// Look-ups per second that the servers can do: the C of the optimum N/C.
    pub capacity_per_second: f64,
    #[serde(default)]
    pub database: Database,
    #[serde(default)]
    pub gateway: Gateway,
    /// Present: the naive server goes through the same phases first.
    pub naive: Option<Naive>,
    #[serde(rename = "fleet")]
    pub fleets: Vec<Fleet>,
    /// Groups of firmware versions that figures are kept for, beside `all`.
    #[serde(default)]
    pub groups: BTreeMap<String, Vec<String>>,
    #[serde(rename = "phase")]
    pub phases: Vec<Phase>,
    /// What must hold, in the form that [`Threshold`] reads.
    pub thresholds: Vec<String>,
}

/// The registry's database.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Database {
    pub kind: DatabaseKind,
    /// Devices registered, those of the fleets among them. 0: those of the fleets only.
    pub registered: u32,
    /// Look-ups of devices that run these versions cost a scan of the whole table, inside the database.
    pub slow_firmware: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DatabaseKind {
    /// A file in the gateway's data directory.
    #[default]
    Sqlite,
    /// A private PostgreSQL on a free port.
    Postgres,
}

/// How the gateway is started.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gateway {
    /// The gateway's own configuration, written to a file as it stands.
    pub config: toml::Table,
}

/// The server of 2020: one query a connect, no bound.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Naive {
    /// Connections of its pool. 1 to 400.
    pub pool: u32,
}

/// Devices of one kind.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fleet {
    pub name: String,
    /// Its part of all devices. Shares add up to 1.
    #[serde(default = "whole")]
    pub share: f64,
    /// Versions and their parts, which add up to 1.
    pub firmware: BTreeMap<String, f64>,
    /// Behaviours and their parts, which add up to 1. Default: all well-behaved.
    #[serde(default = "well_behaved")]
    pub profile: BTreeMap<String, f64>,
    pub tenant: Option<String>,
    pub model: Option<String>,
    /// How long a device waits for an answer before it tries again. 0.1 to 600. Default: 60, as the reference device.
    #[serde(default = "minute")]
    pub connect_timeout_seconds: f64,
}

/// A stretch of time with figures of its own.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// Lower-case letters, digits, `_`: thresholds name it.
    pub name: String,
    /// How long it lasts, at most. Over 0, up to 3,600.
    pub seconds: f64,
    /// What happens at its start, or all through it.
    #[serde(default)]
    pub action: Action,
    /// Ends it early.
    pub until: Option<Until>,
    /// Healthy life: so many devices a second, drawn by chance, lose their connection and come back at once. Open loop: the times
    /// are drawn beforehand, and latency counts from them.
    #[serde(default)]
    pub churn_per_second: f64,
    /// Which groups churn draws from. Default: `all`.
    pub churn_group: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Action {
    /// Nothing but time.
    #[default]
    Hold,
    /// Devices that never connected do so, at even distances.
    Connect { per_second: f64 },
    /// Every open socket is closed at once, by reset; each device then does what its profile says.
    DropAll,
    /// Devices change to a version, evenly over the phase, until it has this share of all. Each loses its connection and comes back as
    /// the new version.
    Grow { firmware: String, to: f64 },
    /// Something is wrong with the database until the phase ends. PostgreSQL only.
    Database(Trouble),
    /// A firmware rule is made, through the gateway's API.
    Block {
        range: String,
        #[serde(default = "default_reason")]
        reason: String,
        #[serde(default)]
        evict: bool,
        /// The rule's `retry_after`, such as `10s`. Default: the gateway's.
        retry_after: Option<String>,
    },
    /// All rules of this run are removed.
    Unblock,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Trouble {
    /// Its processes run for one part in `factor` of the time.
    Slow { factor: f64 },
    /// Its processes are stopped: connections stay open and nothing answers.
    Frozen,
    /// It is killed, and started again at the end of the phase.
    Killed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Until {
    /// Every device that can be is connected: those that a rule refuses don't count.
    Connected,
}

/// A scenario that can't be run, and why.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    #[error("reading {path}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path}: {problem}")]
    Invalid { path: PathBuf, problem: String },
}

/// What is wrong with one setting.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("`{field}`: {problem}")]
pub struct FieldError {
    pub field: String,
    pub problem: String,
}

impl Scenario {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// It can't be read, is no scenario, or contradicts itself.
    pub fn from_file(path: &Path, devices: Option<u32>, seed: Option<u64>) -> Result<Self, ScenarioError> {
        let unreadable = |source| ScenarioError::Unreadable {
            path: path.to_owned(),
            source,
        };
        let invalid = |problem| ScenarioError::Invalid {
            path: path.to_owned(),
            problem,
        };
        let bytes = std::fs::metadata(path).map_err(unreadable)?.len();
        if bytes > FILE_BYTES_MAX {
            return Err(invalid(format!(
                "{bytes} bytes, more than a scenario of {FILE_BYTES_MAX} can have"
            )));
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        let mut scenario: Self =
            toml::from_str(&text).map_err(|error| invalid(error.to_string().trim_end().to_owned()))?;
        scenario.devices = devices.unwrap_or(scenario.devices);
        scenario.seed = seed.unwrap_or(scenario.seed);
        scenario.check().map_err(|error| invalid(error.to_string()))?;
        Ok(scenario)
    }

    /// # Errors
    /// The first setting that can't be, by its path. Names of figures are checked by the report, which knows them.
    pub fn check(&self) -> Result<(), FieldError> {
        check(
            is_name(&self.name, '-'),
            "name",
            "expected lower-case letters, digits and `-`",
        )?;
        check(
            (1..=DEVICES_MAX).contains(&self.devices),
            "devices",
            "expected 1 to 18000",
        )?;
        check(
            self.capacity_per_second.is_finite() && self.capacity_per_second > 0.0,
            "capacity_per_second",
            "expected more than 0",
        )?;
        check(
            self.database.registered <= REGISTERED_MAX,
            "database.registered",
            "expected at most 1000000",
        )?;
        check(
            self.is_postgres() || (self.naive.is_none() && self.database.slow_firmware.is_empty()),
            "database.kind",
            "[naive] and slow_firmware need \"postgres\"",
        )?;
        if let Some(naive) = &self.naive {
            check((1..=400).contains(&naive.pool), "naive.pool", "expected 1 to 400")?;
        }
        self.check_fleets()?;
        self.check_versions()?;
        self.check_phases()?;
        self.thresholds().map(drop)
    }

    /// The thresholds, parsed.
    ///
    /// # Errors
    /// The first that can't be read.
    pub fn thresholds(&self) -> Result<Vec<Threshold>, FieldError> {
        check(
            !self.thresholds.is_empty(),
            "thresholds",
            "a load test without thresholds proves nothing",
        )?;
        self.thresholds
            .iter()
            .map(|text| {
                Threshold::parse(text).map_err(|error: ThresholdError| problem("thresholds", error.to_string()))
            })
            .collect()
    }

    #[must_use]
    pub fn is_postgres(&self) -> bool {
        self.database.kind == DatabaseKind::Postgres
    }

    /// Names of the groups, `all` first.
    pub fn group_names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(GROUP_ALL).chain(self.groups.keys().map(String::as_str))
    }

    /// The servers that go through the phases, in order.
    #[must_use]
    pub fn run_names(&self) -> Vec<&'static str> {
        match self.naive {
            Some(_) => vec!["naive", "seawall"],
            None => vec!["seawall"],
        }
    }

    /// Time that all phases together can take, at most.
    #[must_use]
    pub fn time_max(&self) -> Duration {
        self.phases.iter().map(Phase::time_max).sum()
    }

    fn check_fleets(&self) -> Result<(), FieldError> {
        check(!self.fleets.is_empty(), "fleet", "expected at least one")?;
        let mut names = BTreeSet::new();
        for fleet in &self.fleets {
            let field = |key: &str| format!("fleet.{}.{key}", fleet.name);
            check(
                is_name(&fleet.name, '-'),
                "fleet.name",
                "expected lower-case letters, digits and `-`",
            )?;
            check(
                names.insert(&fleet.name),
                "fleet.name",
                format!("`{}` is there twice", fleet.name),
            )?;
            check(
                adds_up(fleet.firmware.values()),
                field("firmware"),
                "parts must add up to 1",
            )?;
            check(
                adds_up(fleet.profile.values()),
                field("profile"),
                "parts must add up to 1",
            )?;
            for profile in fleet.profile.keys() {
                let profile: Profile = profile
                    .parse()
                    .map_err(|error: UnknownProfile| problem(field("profile"), error.to_string()))?;
                check(
                    profile.devices_per_identity() == 1,
                    field("profile"),
                    format!("{profile}: two devices of one identity have no place in the books of a load test"),
                )?;
            }
            check(
                (0.1..=600.0).contains(&fleet.connect_timeout_seconds),
                field("connect_timeout_seconds"),
                "expected 0.1 to 600",
            )?;
            for version in fleet.firmware.keys() {
                check_label(version, &field("firmware"))?;
            }
            for (key, label) in [("tenant", &fleet.tenant), ("model", &fleet.model)] {
                if let Some(label) = label {
                    check_label(label, &field(key))?;
                }
            }
        }
        check(
            adds_up(self.fleets.iter().map(|fleet| &fleet.share)),
            "fleet.share",
            "shares must add up to 1",
        )
    }

    fn check_versions(&self) -> Result<(), FieldError> {
        let mut known: BTreeSet<&str> = self
            .fleets
            .iter()
            .flat_map(|fleet| fleet.firmware.keys().map(String::as_str))
            .collect();
        for phase in &self.phases {
            if let Action::Grow { firmware, .. } = &phase.action {
                check_label(firmware, &format!("phase.{}.action.grow.firmware", phase.name))?;
                known.insert(firmware);
            }
        }
        for (name, versions) in &self.groups {
            check(
                is_name(name, '_') && name != GROUP_ALL,
                "groups",
                format!("`{name}` can't be a group's name"),
            )?;
            check(!versions.is_empty(), format!("groups.{name}"), "is empty")?;
            for version in versions {
                check(
                    known.contains(version.as_str()),
                    format!("groups.{name}"),
                    format!("no fleet ever runs version {version}"),
                )?;
            }
        }
        for version in &self.database.slow_firmware {
            check(
                known.contains(version.as_str()),
                "database.slow_firmware",
                format!("no fleet ever runs version {version}"),
            )?;
        }
        Ok(())
    }

    fn check_phases(&self) -> Result<(), FieldError> {
        check(!self.phases.is_empty(), "phase", "expected at least one")?;
        let mut names = BTreeSet::new();
        for phase in &self.phases {
            let field = |key: &str| format!("phase.{}.{key}", phase.name);
            check(
                is_name(&phase.name, '_'),
                "phase.name",
                "expected lower-case letters, digits and `_`",
            )?;
            check(
                names.insert(&phase.name),
                "phase.name",
                format!("`{}` is there twice", phase.name),
            )?;
            check(
                phase.seconds > 0.0 && phase.seconds <= SECONDS_MAX,
                field("seconds"),
                "expected more than 0, at most 3600",
            )?;
            check(
                (0.0..=10_000.0).contains(&phase.churn_per_second),
                field("churn_per_second"),
                "expected 0 to 10000",
            )?;
            if let Some(group) = &phase.churn_group {
                check(
                    self.group_names().any(|name| name == group),
                    field("churn_group"),
                    format!("no group `{group}`"),
                )?;
            }
            self.check_action(&phase.action, &field("action"))?;
        }
        Ok(())
    }

    fn check_action(&self, action: &Action, field: &str) -> Result<(), FieldError> {
        match action {
            Action::Hold | Action::DropAll | Action::Unblock => Ok(()),
            Action::Connect { per_second } => check(
                (0.1..=100_000.0).contains(per_second),
                field,
                "per_second: expected 0.1 to 100000",
            ),
            Action::Grow { to, .. } => check((0.0..=1.0).contains(to), field, "to: expected 0 to 1"),
            Action::Database(trouble) => {
                check(
                    self.is_postgres(),
                    field,
                    "only a PostgreSQL can be slow, frozen or killed",
                )?;
                match trouble {
                    Trouble::Slow { factor } => {
                        check((1.5..=100.0).contains(factor), field, "factor: expected 1.5 to 100")
                    }
                    Trouble::Frozen | Trouble::Killed => Ok(()),
                }
            }
            Action::Block { range, reason, .. } => {
                check(!range.trim().is_empty(), field, "range: is empty")?;
                check(!reason.trim().is_empty(), field, "reason: is empty")
            }
        }
    }
}

impl Phase {
    #[must_use]
    pub fn time_max(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

fn check(holds: bool, field: impl Into<String>, otherwise: impl Into<String>) -> Result<(), FieldError> {
    if holds { Ok(()) } else { Err(problem(field, otherwise)) }
}

fn problem(field: impl Into<String>, problem: impl Into<String>) -> FieldError {
    FieldError {
        field: field.into(),
        problem: problem.into(),
    }
}

fn check_label(text: &str, field: &str) -> Result<(), FieldError> {
    match seawall_proto::id::Label::parse(text) {
        Ok(Some(label)) if label.as_str() == text => Ok(()),
        Ok(_) => Err(problem(field, format!("{text:?} is empty or has spaces around it"))),
        Err(error) => Err(problem(field, format!("{text:?}: {error}"))),
    }
}

fn is_name(text: &str, and: char) -> bool {
    text.starts_with(|c: char| c.is_ascii_lowercase())
        && text
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == and)
}

/// Parts between 0 and 1 that make a whole, as well as decimal fractions can.
fn adds_up<'a>(parts: impl Iterator<Item = &'a f64>) -> bool {
    let mut sum = 0.0;
    for part in parts {
        if !(0.0..=1.0).contains(part) {
            return false;
        }
        sum += part;
    }
    (sum - 1.0_f64).abs() < 1e-6
}

const fn one() -> u64 {
    1
}

const fn minute() -> f64 {
    60.0
}

const fn whole() -> f64 {
    1.0
}

fn well_behaved() -> BTreeMap<String, f64> {
    BTreeMap::from([("well-behaved".to_owned(), 1.0)])
}

fn default_reason() -> String {
    "blocked by a load test".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        name = "storm"
        about = "Everything drops."
        devices = 100
        capacity_per_second = 50
        thresholds = ["lost_sessions == 0"]
        groups = { healthy = ["3.8.0-b2"] }

        [[fleet]]
        name = "displays"
        firmware = { "3.8.0-b2" = 0.7, "3.8.0-b3" = 0.3 }

        [[phase]]
        name = "connect"
        seconds = 10
        until = "connected"
        action = { connect = { per_second = 50 } }

        [[phase]]
        name = "storm"
        seconds = 10
        action = "drop-all"

        [[phase]]
        name = "blocked"
        seconds = 10
        action = { block = { range = ">=3.8.0-b3", evict = true } }
        churn_per_second = 2
        churn_group = "healthy"
    "#;

    #[test]
    fn a_scenario_is_read() {
        let scenario = parse(GOOD).unwrap();

        assert_eq!(scenario.phases.len(), 3);
        assert_eq!(scenario.seed, 1);
        assert_eq!(scenario.group_names().collect::<Vec<_>>(), ["all", "healthy"]);
        assert_eq!(scenario.time_max(), Duration::from_secs(30));
        assert_eq!(scenario.run_names(), ["seawall"]);
    }

    #[test]
    fn each_mistake_is_named() {
        for (from, to, expected) in [
            ("devices = 100", "devices = 0", "`devices`: expected 1 to 18000"),
            ("devices = 100", "device = 100", "unknown field `device`"),
            ("0.7", "0.8", "`fleet.displays.firmware`: parts must add up to 1"),
            ("\"drop-all\"", "\"drop-some\"", "unknown variant `drop-some`"),
            (
                "per_second = 50 }",
                "per_second = 50, x = 1 }",
                "unexpected keys in table: x",
            ),
            (
                "\"drop-all\"",
                "{ database = \"frozen\" }",
                "only a PostgreSQL can be slow, frozen or killed",
            ),
            (
                "\"storm\"\n        seconds",
                "\"connect\"\n        seconds",
                "`connect` is there twice",
            ),
            ("churn_group = \"healthy\"", "churn_group = \"well\"", "no group `well`"),
            ("[\"3.8.0-b2\"]", "[\"3.8.0\"]", "no fleet ever runs version 3.8.0"),
            (
                "[\"lost_sessions == 0\"]",
                "[\"lost_sessions = 0\"]",
                "expected <, <=, ==, !=, >= or >",
            ),
            ("[\"lost_sessions == 0\"]", "[]", "proves nothing"),
            ("seconds = 10", "seconds = -1", "expected more than 0"),
            (
                "name = \"displays\"",
                "name = \"displays\"\n profile = { rude = 1.0 }",
                "rude",
            ),
            ("about", "naive = { pool = 10 }\n about", "need \"postgres\""),
        ] {
            let text = GOOD.replacen(from, to, 1);
            assert_ne!(text, GOOD, "{from} is in the scenario");

            let error = parse(&text).unwrap_err();

            assert!(error.contains(expected), "{to}: {error}");
        }
    }

    #[test]
    fn devices_and_seed_can_be_overridden() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.toml");
        std::fs::write(&path, GOOD).unwrap();

        let scenario = Scenario::from_file(&path, Some(7), Some(9)).unwrap();
        let error = Scenario::from_file(&path, Some(20_000), None).unwrap_err().to_string();

        assert_eq!((scenario.devices, scenario.seed), (7, 9));
        assert!(error.contains("`devices`"), "{error}");
    }

    #[test]
    fn the_scenarios_that_we_deliver_can_be_run() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
        let mut count = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();

            let scenario = Scenario::from_file(&path, None, None).unwrap();
            crate::report::check_names(&scenario, &scenario.thresholds().unwrap()).unwrap();

            assert_eq!(path.file_stem().unwrap().to_str(), Some(scenario.name.as_str()));
            count += 1;
        }
        assert!(count >= 3);
    }

    #[test]
    fn a_threshold_on_a_figure_that_there_is_not_is_a_mistake() {
        let scenario = parse(&GOOD.replace("lost_sessions == 0", "naive.lost_sessions == 0")).unwrap();

        let error = crate::report::check_names(&scenario, &scenario.thresholds().unwrap()).unwrap_err();

        assert!(error.to_string().contains("no figure `naive.lost_sessions`"), "{error}");
    }

    fn parse(text: &str) -> Result<Scenario, String> {
        let scenario: Scenario = toml::from_str(text).map_err(|error| error.to_string())?;
        scenario.check().map_err(|error| error.to_string())?;
        Ok(scenario)
    }
}
