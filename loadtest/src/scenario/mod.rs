//! What a load test does, read from a TOML file and checked before anything starts. docs/SCENARIOS.md is the reference.
//!
//! Read [`Scenario`] first. A scenario that parses and passes [`Scenario::check`] names only fleets, groups, versions and figures
//! that exist.

mod changes;
mod check;
mod means;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use firmware_sim::device::{ANSWER_TIMEOUT_DEFAULT, CONNECT_TIMEOUT_DEFAULT, Patience};
use serde::Deserialize;

pub use self::changes::Changes;
pub(crate) use self::check::{check, problem};
pub use self::means::Means;
use crate::{
    report::{MAIN_RUN, NAIVE_RUN},
    simulate::settings::Settings,
    threshold::{Threshold, ThresholdError},
};

/// Most devices of one scenario: each takes a socket of this process, and its limit on open files is 20,000 by common default.
pub const DEVICES_MAX: u32 = 18_000;
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
    /// Present: what is published about devices is compared with what they do.
    pub presence: Option<PresenceWatch>,
    /// What `--short` changes.
    pub short: Option<Short>,
    /// What the simulator assumes. `run` ignores it.
    #[serde(default)]
    pub simulate: Settings,
    /// Devices that it would have without a bound.
    #[serde(skip)]
    pub bounded_from: Option<u32>,
    /// Whether the naive server goes through the phases at the same time as the gateway, on the same machine.
    #[serde(skip)]
    pub is_naive_beside: bool,
    /// Thresholds that were left out with a phase, a run or a server.
    #[serde(skip)]
    pub not_judged: Vec<String>,
}

/// What goes through a scenario's phases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Executor {
    /// Real devices and a real gateway.
    Run,
    /// Virtual time.
    Simulate,
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
    /// Cores of the machine that a PostgreSQL runs on at most, 1 to 64. None: all.
    pub cores: Option<u32>,
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

/// The server of 2020: one query a connect, no bound, and heartbeats that are stamped when they are processed.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Naive {
    /// Connections of its pool. 1 to 400.
    pub pool: u32,
    /// Time between two of its pings, in seconds. 1 to 3,600. Default: 30.
    #[serde(default = "naive_heartbeat")]
    pub heartbeat_seconds: f64,
    /// It calls a device offline when the last heartbeat was processed this long ago, in seconds. 1 to 3,600.
    /// Default: 90.
    #[serde(default = "naive_deadline")]
    pub deadline_seconds: f64,
}

/// How published presence is judged.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PresenceWatch {
    /// Silence after which the server calls a device offline, in seconds. 1 to 3,600. Default: 90, the gateway's own.
    pub deadline_seconds: f64,
    /// What that may take longer, in seconds. 0 to 3,600. Default: 20.
    pub grace_seconds: f64,
    /// A device that left or lost its power returns after this time, in seconds. 1 to 86,400. Default: never.
    pub away_seconds: Option<f64>,
}

impl Default for PresenceWatch {
    fn default() -> Self {
        Self {
            deadline_seconds: 90.0,
            grace_seconds: 20.0,
            away_seconds: None,
        }
    }
}

impl PresenceWatch {
    /// Age of an ended session above which its device may no longer be called online.
    #[must_use]
    pub fn limit(&self) -> Duration {
        Duration::from_secs_f64(self.deadline_seconds + self.grace_seconds)
    }

    /// How long devices stay away.
    #[must_use]
    pub fn away(&self) -> Option<Duration> {
        self.away_seconds.map(Duration::from_secs_f64)
    }
}

/// A form of a scenario that takes less time.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Short {
    /// Devices. Default: the scenario's.
    pub devices: Option<u32>,
    /// Lengths of phases by name, in seconds. 0 leaves a phase out.
    pub seconds: BTreeMap<String, f64>,
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
    /// How long a device tries to open its connection, TCP and TLS together. 0.1 to 600. Default: 10, as the reference device.
    #[serde(default = "connect_timeout")]
    pub connect_timeout_seconds: f64,
    /// How long it waits for an answer then, before it tries again. 0.1 to 600. Default: 60, as the reference device.
    #[serde(default = "answer_timeout")]
    pub answer_timeout_seconds: f64,
    /// Messages that each device sends in a minute while it is connected. 0 to 6,000. Default: none.
    #[serde(default)]
    pub messages_per_minute: f64,
    /// Whether its devices return by resume token, without the database. Default: they are looked up, as after their first start.
    #[serde(default)]
    pub resume: bool,
}

/// A stretch of time with figures of its own.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// Lower-case letters, digits, `_`: thresholds name it.
    pub name: String,
    /// How long it lasts, at most. Over 0, up to 43,200.
    pub seconds: f64,
    /// What happens at its start, or all through it.
    #[serde(default)]
    pub action: Action,
    /// Ends it early.
    pub until: Option<Until>,
    /// Healthy life: this many random devices per second lose their connection and return at once. Open loop: the times
    /// are drawn beforehand, and latency counts from them.
    #[serde(default)]
    pub churn_per_second: f64,
    /// Which groups churn draws from. Default: `all`.
    pub churn_group: Option<String>,
    /// This many random devices per second lose their power: they are silent, and their connections stay open.
    #[serde(default)]
    pub power_cuts_per_second: f64,
    /// This many random devices per second close their session with 1000, and stay away.
    #[serde(default)]
    pub closes_per_second: f64,
    /// How much longer than `seconds` it lasts: for more devices than the file asks for.
    #[serde(skip, default = "whole")]
    pub stretch: f64,
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
    /// The same, of the devices of a group only.
    Drop { group: String },
    /// Devices change to a version, evenly over the phase, until it has this share of all. Each loses its connection and returns as
    /// the new version.
    Grow { firmware: String, to: f64 },
    /// Something is wrong with the database until the phase ends. PostgreSQL only.
    Database(Trouble),
    /// Something is wrong with the server until the phase ends: the gateway, or the naive one. It can't be killed.
    Gateway(Trouble),
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
    /// Every device that can be is connected: those that a rule refuses are left out.
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

/// Fault in one setting.
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
    /// It can't be read, is not a scenario, or contradicts itself.
    pub fn from_file(path: &Path, changes: &Changes, executor: Executor) -> Result<Self, ScenarioError> {
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
        scenario
            .change(changes, executor)
            .map_err(|error| invalid(error.to_string()))?;
        scenario.check(executor).map_err(|error| invalid(error.to_string()))?;
        Ok(scenario)
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

    /// Every version that a device ever runs; some more than once.
    pub fn versions(&self) -> impl Iterator<Item = &str> {
        let grown = self.phases.iter().filter_map(|phase| match &phase.action {
            Action::Grow { firmware, .. } => Some(firmware.as_str()),
            Action::Hold
            | Action::Connect { .. }
            | Action::DropAll
            | Action::Drop { .. }
            | Action::Database(_)
            | Action::Gateway(_)
            | Action::Block { .. }
            | Action::Unblock => None,
        });
        self.fleets
            .iter()
            .flat_map(|fleet| fleet.firmware.keys().map(String::as_str))
            .chain(grown)
    }

    /// Names of the groups, `all` first.
    pub fn group_names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(GROUP_ALL).chain(self.groups.keys().map(String::as_str))
    }

    /// The servers that go through the phases, in order.
    #[must_use]
    pub fn run_names(&self) -> Vec<&'static str> {
        match self.naive {
            Some(_) => vec![NAIVE_RUN, MAIN_RUN],
            None => vec![MAIN_RUN],
        }
    }

    /// Time that all phases together can take, at most.
    #[must_use]
    pub fn time_max(&self) -> Duration {
        self.phases.iter().map(Phase::time_max).sum()
    }
}

impl Phase {
    #[must_use]
    pub fn time_max(&self) -> Duration {
        Duration::from_secs_f64(self.seconds * self.stretch)
    }
}

const fn one() -> u64 {
    1
}

const fn connect_timeout() -> f64 {
    CONNECT_TIMEOUT_DEFAULT.as_secs() as f64
}

const fn answer_timeout() -> f64 {
    ANSWER_TIMEOUT_DEFAULT.as_secs() as f64
}

impl Fleet {
    /// How long attempts of its devices may take.
    #[must_use]
    pub fn patience(&self) -> Patience {
        Patience {
            connect: Duration::from_secs_f64(self.connect_timeout_seconds),
            answer: Duration::from_secs_f64(self.answer_timeout_seconds),
        }
    }
}

const fn naive_heartbeat() -> f64 {
    30.0
}

const fn naive_deadline() -> f64 {
    90.0
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
