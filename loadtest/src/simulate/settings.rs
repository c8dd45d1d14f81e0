//! Section `[simulate]` of a scenario: what the simulator assumes of everything that is not ours. docs/SCENARIOS.md is the reference.
//!
//! Read [`Settings`] first. Every figure has a default, so that a scenario without the section can be simulated.

use std::time::Duration;

use seawall_proto::admission::AdmissionConfig;
use serde::Deserialize;

use super::{database::Curve, network::Network};
use crate::scenario::{FieldError, Scenario, check, problem};

/// Most devices of a simulation: as many as the gateway's memory of devices can be set to hold.
pub const DEVICES_MAX: u32 = 16_000_000;
/// Most nodes.
const NODES_MAX: u8 = 64;
/// Most incidents.
pub const INCIDENTS_MAX: usize = 64;
/// Where nothing else is known of the database, and the ceiling is what bounds it, it can do this many times as much.
const HEADROOM: f64 = 4.0;

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Gateways that share the database, and know nothing of each other. 1 to 64. Each has the scenario's `[gateway]` as it stands; a
    /// device comes to any of them.
    pub nodes: u8,
    /// Shortest round trip between a device and its gateway, in milliseconds.
    pub round_trip_ms: f64,
    /// What a device's round trip is longer than that on average, in milliseconds: drawn once for each, from an exponential distribution.
    pub round_trip_extra_ms: f64,
    /// A device's timer is late by up to this, in milliseconds.
    pub wake_noise_ms: f64,
    /// Ids that nobody has registered, new each time, a second.
    pub strangers_per_second: f64,
    /// The phase with which they begin. Default: the first.
    pub strangers_from: Option<String>,
    /// Look-ups a second that each node remembers from an earlier life. 0: none.
    pub last_known_good_per_second: f64,
    /// So many of the nodes, from the first on, have no registry index: their disks are new, and they read none.
    #[serde(alias = "nodes_without_roster")]
    pub nodes_without_registry_index: u8,
    /// Sockets of its sessions that a node reads in a second, 1 to 1,000,000. It matters to presence alone.
    /// Default: 20,000.
    pub reads_per_second: f64,
    /// What part of all connections goes to each node, relative to the others'. Empty: the same to all.
    pub node_shares: Vec<f64>,
    /// What befalls nodes and devices in the middle of a phase.
    #[serde(rename = "incident")]
    pub incidents: Vec<Incident>,
    pub edge: Edge,
    pub database: Database,
}

/// Something that befalls a node, or devices.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Incident {
    /// The phase in which it happens.
    pub phase: String,
    /// How long after the phase's start. 0 to 3,600; a phase that is over by then never sees it.
    #[serde(default)]
    pub after_seconds: f64,
    /// Which node, from 0 on.
    #[serde(default)]
    pub node: u8,
    pub what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum What {
    /// The node's process dies: all its connections are reset, and its memory is gone but for what it keeps on disk: the capacity and the
    /// registry index. It is there
    /// again after so many seconds, 1 to 3,600; until then the others get its connections.
    Crash { seconds: f64 },
    /// The node drains, within this many seconds, 1 to 3,600. It stays away.
    Drain { seconds: f64 },
    /// The node's wall clock is put forward by this many seconds, or back: up to a day.
    ClockStep { seconds: f64 },
    /// So great a part of the devices that are not connected restart: they come at once, and know nothing of a slot.
    Forget { share: f64 },
}

/// TCP and TLS of each node.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Edge {
    /// Connections per second that a node accepts and takes to a complete request.
    pub handshakes_per_second: f64,
    /// Connections that wait for that, as the time which they take.
    pub backlog_seconds: f64,
    pub overflow: Overflow,
}

/// What becomes of a connection that finds the backlog full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Overflow {
    /// Nothing: the device's own TCP sends its SYN again, 1, 3, 7 s and so on after the first.
    #[default]
    Drop,
    /// It is reset.
    Reset,
}

/// The registry's database, shared by all nodes. See [`Curve`].
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Database {
    /// Keys per second. 0: the scenario's `capacity_per_second`, or four times that where the nodes' ceilings allow no more.
    pub keys_per_second: f64,
    /// Keys in flight at which it does so.
    pub knee: f64,
    /// What each key beyond the knee costs, as a part of the rate.
    pub overload: f64,
    /// Time that the look-up of a device with `slow_firmware` adds to its statement, in milliseconds.
    pub scan_ms: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            nodes: 1,
            round_trip_ms: 20.0,
            round_trip_extra_ms: 80.0,
            wake_noise_ms: 50.0,
            strangers_per_second: 0.0,
            strangers_from: None,
            last_known_good_per_second: 0.0,
            nodes_without_registry_index: 0,
            reads_per_second: 20_000.0,
            node_shares: Vec::new(),
            incidents: Vec::new(),
            edge: Edge::default(),
            database: Database::default(),
        }
    }
}

impl Default for Edge {
    fn default() -> Self {
        Self {
            handshakes_per_second: 20_000.0,
            backlog_seconds: 1.0,
            overflow: Overflow::Drop,
        }
    }
}

impl Default for Database {
    fn default() -> Self {
        Self {
            keys_per_second: 0.0,
            knee: 32.0,
            overload: 0.002,
            scan_ms: 40.0,
        }
    }
}

impl Settings {
    /// # Errors
    /// The first figure out of its bounds.
    pub fn check(&self) -> Result<(), FieldError> {
        check(
            (1..=NODES_MAX).contains(&self.nodes),
            "simulate.nodes",
            format!("expected 1 to {NODES_MAX}"),
        )?;
        check(
            self.nodes_without_registry_index <= self.nodes,
            "simulate.nodes_without_registry_index",
            format!("there are {}", self.nodes),
        )?;
        for (field, value, least, most) in [
            ("round_trip_ms", self.round_trip_ms, 0.0, 2_000.0),
            ("round_trip_extra_ms", self.round_trip_extra_ms, 0.0, 2_000.0),
            ("wake_noise_ms", self.wake_noise_ms, 0.0, 60_000.0),
            ("strangers_per_second", self.strangers_per_second, 0.0, 1_000_000.0),
            ("reads_per_second", self.reads_per_second, 1.0, 1_000_000.0),
            ("last_known_good_per_second", self.last_known_good_per_second, 0.0, 1e6),
            ("edge.handshakes_per_second", self.edge.handshakes_per_second, 1.0, 1e6),
            ("edge.backlog_seconds", self.edge.backlog_seconds, 0.001, 60.0),
            ("database.keys_per_second", self.database.keys_per_second, 0.0, 1e7),
            ("database.knee", self.database.knee, 1.0, 65_536.0),
            ("database.overload", self.database.overload, 0.0, 1.0),
            ("database.scan_ms", self.database.scan_ms, 0.0, 60_000.0),
        ] {
            check(
                (least..=most).contains(&value),
                format!("simulate.{field}"),
                format!("expected {least} to {most}"),
            )?;
        }
        let shares = &self.node_shares;
        check(
            shares.is_empty() || shares.len() == usize::from(self.nodes) && shares.iter().all(|share| *share > 0.0),
            "simulate.node_shares",
            "expected one for each node, all above 0",
        )?;
        self.incidents
            .iter()
            .try_for_each(|incident| self.check_incident(incident))
    }

    fn check_incident(&self, incident: &Incident) -> Result<(), FieldError> {
        let (value, least, most) = match incident.what {
            What::Crash { seconds } | What::Drain { seconds } => (seconds, 1.0, 3_600.0),
            What::ClockStep { seconds } => (seconds, -86_400.0, 86_400.0),
            What::Forget { share } => (share, 0.0, 1.0),
        };
        check(
            (least..=most).contains(&value),
            "simulate.incident.what",
            format!("expected {least} to {most}"),
        )?;
        check(
            (0.0..=3_600.0).contains(&incident.after_seconds),
            "simulate.incident.after_seconds",
            "expected 0 to 3600",
        )?;
        check(
            incident.node < self.nodes,
            "simulate.incident.node",
            format!("there are {}", self.nodes),
        )
    }

    #[must_use]
    pub fn network(&self) -> Network {
        Network {
            round_trip: millis(self.round_trip_ms),
            extra: millis(self.round_trip_extra_ms),
            wake_noise: millis(self.wake_noise_ms),
        }
    }
}

/// The gateway's own settings of admission, as the scenario has them.
///
/// # Errors
/// The section is none that the gateway would take.
pub fn admission(scenario: &Scenario) -> Result<AdmissionConfig, FieldError> {
    const FIELD: &str = "gateway.config.admission";
    let Some(section) = scenario.gateway.config.get("admission") else {
        return Ok(AdmissionConfig::default());
    };
    let config: AdmissionConfig = section
        .clone()
        .try_into()
        .map_err(|error: toml::de::Error| problem(FIELD, error.message()))?;
    config.validate().map_err(|error| problem(FIELD, error.to_string()))?;
    Ok(config)
}

/// The database's curve: as set, or as the scenario's other figures tell.
#[must_use]
pub fn curve(scenario: &Scenario, admission: &AdmissionConfig) -> Curve {
    let database = &scenario.simulate.database;
    let ceilings = f64::from(admission.lookups_per_second_max) * f64::from(scenario.simulate.nodes);
    let keys_per_second = if database.keys_per_second > 0.0 {
        database.keys_per_second
    } else if ceilings <= scenario.capacity_per_second {
        scenario.capacity_per_second * HEADROOM
    } else {
        scenario.capacity_per_second
    };
    Curve {
        keys_per_second,
        knee: database.knee,
        overload: database.overload,
    }
}

fn millis(ms: f64) -> Duration {
    Duration::from_secs_f64(ms / 1_000.0)
}
