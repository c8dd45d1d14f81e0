//! Timeline of a demo, read from the gateway's metrics, and its verdict.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};

use super::Options;
use crate::{
    metrics::{Metrics, label},
    progress::Progress,
};

/// Time between the last connect and the storm, so that a viewer sees it.
pub(super) const CALM: Duration = Duration::from_secs(2);
/// Outcomes of handshakes in a healthy demo. Any other is a bug.
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

/// Current figures of the gateway.
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
pub(super) struct Timeline {
    pub(super) all_connected_at: Option<Instant>,
    storm: Option<Storm>,
}

#[derive(Clone, Copy, Debug)]
struct Storm {
    began: Instant,
    /// The gateway has noticed the loss of the sockets.
    was_seen: bool,
    took: Option<Duration>,
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

impl Timeline {
    /// Records the current figures. Returns whether the storm starts now.
    pub(super) fn advance(&mut self, options: Options, figures: &Figures, progress: &Progress) -> bool {
        let now = Instant::now();
        let is_complete = figures.connected >= options.devices as u64;
        if is_complete && self.all_connected_at.is_none() {
            self.all_connected_at = Some(now);
            progress.note(&format!("all {} devices are connected", options.devices));
        }
        match &mut self.storm {
            Some(storm) if storm.took.is_none() => {
                storm.was_seen |= figures.connected < options.devices as u64 / 2;
                // With a rule in force some devices stay away, so that a recovery of the others can't be recognized.
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

    /// Decides whether the demo went well.
    ///
    /// # Errors
    /// Something expected did not happen, or something unexpected did.
    pub(super) fn judge(&self, options: Options, figures: &Figures) -> Result<()> {
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

/// A cohort is `model/version`.
fn version_of(cohort: &str) -> &str {
    cohort.rsplit_once('/').map_or(cohort, |(_, version)| version)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counts; negative ones become 0"
)]
const fn whole(value: f64) -> u64 {
    value as u64
}
