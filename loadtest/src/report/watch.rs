//! Figures of what is watched over time: published presence, and slow drift.

use serde::Serialize;

/// States that the server published about devices, compared with the fleet's own record.
/// docs/SCENARIOS.md explains each figure.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Presence {
    /// `offline` published of devices that were well, in a session or just thrown out of one.
    pub false_offline: u64,
    /// Most devices that a count called offline beyond those that had left.
    pub counted_false_offline: u64,
    /// Devices that were still called online longer than the deadline and its grace after their session ended.
    pub false_online_after: u64,
    /// Sessions of devices that were well, which the server gave up or lost.
    pub sessions_closed_by_stall: u64,
    /// Events that called a device unknown.
    pub unknown: u64,
    /// Events about a group of devices.
    pub groups: u64,
    /// Times that the event stream had a gap.
    pub missed: u64,
    /// Devices whose power was cut.
    pub power_cuts: u64,
    /// Devices that closed their session.
    pub closes: u64,
    /// Devices called offline after a power cut.
    pub true_offline: u64,
    /// Devices called offline after they closed their session.
    pub closed_offline: u64,
    /// From a power cut until `offline` was published, without the time in which the test disturbed the server.
    pub true_offline_seconds: Spread,
    /// The same after a close.
    pub closed_offline_seconds: Spread,
}

/// Median, 99th percentile and greatest of some values. `None` without any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    pub p50: Option<f64>,
    pub p99: Option<f64>,
    pub max: Option<f64>,
}

impl Spread {
    #[must_use]
    pub fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |percent: usize| {
            sorted
                .get((sorted.len() * percent).div_ceil(100).saturating_sub(1))
                .copied()
        };
        Self {
            p50: at(50),
            p99: at(99),
            max: at(100),
        }
    }
}

/// Slow drift of a phase: what its samples prove, 0 if they are as likely without any. `None`: too few samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Drift {
    /// Length of the phase.
    pub hours: f64,
    /// Memory of the server.
    pub rss_bytes_per_hour: Option<f64>,
    /// Its open files and sockets.
    pub handles_per_hour: Option<f64>,
    pub threads_per_hour: Option<f64>,
    /// Mean time of a connect.
    pub connect_ms_per_hour: Option<f64>,
    /// Devices that it calls online beyond those that are.
    pub presence_per_hour: Option<f64>,
}

impl Presence {
    /// Its figures by the names that thresholds use, behind `presence.`.
    pub(super) fn figures(&self) -> Vec<(String, Option<f64>)> {
        let counts = [
            ("false_offline", self.false_offline),
            ("counted_false_offline", self.counted_false_offline),
            ("false_online_after", self.false_online_after),
            ("sessions_closed_by_stall", self.sessions_closed_by_stall),
            ("unknown", self.unknown),
            ("groups", self.groups),
            ("missed", self.missed),
            ("power_cuts", self.power_cuts),
            ("closes", self.closes),
            ("true_offline", self.true_offline),
            ("closed_offline", self.closed_offline),
        ];
        let spreads = [
            ("true_offline_seconds", self.true_offline_seconds),
            ("closed_offline_seconds", self.closed_offline_seconds),
        ];
        let counts = counts
            .into_iter()
            .map(|(name, value)| (format!("presence.{name}"), Some(super::figures::count(value))));
        let spreads = spreads.into_iter().flat_map(|(name, spread)| {
            [("p50", spread.p50), ("p99", spread.p99), ("max", spread.max)]
                .map(|(part, value)| (format!("presence.{name}.{part}"), value))
        });
        counts.chain(spreads).collect()
    }
}

impl Drift {
    /// Its figures by the names that thresholds use, behind `drift.`.
    pub(super) fn figures(&self) -> [(String, Option<f64>); 6] {
        [
            ("hours", Some(self.hours)),
            ("rss_bytes_per_hour", self.rss_bytes_per_hour),
            ("handles_per_hour", self.handles_per_hour),
            ("threads_per_hour", self.threads_per_hour),
            ("connect_ms_per_hour", self.connect_ms_per_hour),
            ("presence_per_hour", self.presence_per_hour),
        ]
        .map(|(name, value)| (format!("drift.{name}"), value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_of_nearest_ranks() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();

        let spread = Spread::of(&values);

        assert_eq!(
            (spread.p50, spread.p99, spread.max),
            (Some(100.0), Some(198.0), Some(200.0))
        );
        assert_eq!(Spread::of(&[]), Spread::default());
        assert_eq!(Spread::of(&[3.0]).p50, Some(3.0));
    }
}
