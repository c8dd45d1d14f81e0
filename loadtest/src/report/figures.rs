//! Every figure by the flat name that thresholds use.

use super::{Group, MAIN_RUN, Presence, Run, Summary};
use crate::threshold::Figures;

impl Summary {
    fn figures(&self) -> [(&'static str, Option<f64>); 17] {
        let ratio = |part: Option<f64>, whole: Option<f64>| Some(part? / whole?).filter(|ratio| ratio.is_finite());
        [
            ("t99_seconds", self.t99_seconds),
            ("t100_seconds", self.t100_seconds),
            ("optimum_seconds", self.optimum_seconds),
            ("t99_over_optimum", ratio(self.t99_seconds, self.optimum_seconds)),
            ("t100_over_optimum", ratio(self.t100_seconds, self.optimum_seconds)),
            ("attempts_per_device", self.attempts_per_device),
            ("statements", Some(self.statements)),
            ("in_flight_max", Some(self.in_flight_max)),
            ("limit", self.limit_max),
            ("over_limit", Some(self.over_limit)),
            ("queue_max", Some(self.queue_max)),
            ("lost_sessions", Some(self.lost_sessions)),
            ("missing", Some(self.missing)),
            ("slow_lookups", self.slow_lookups),
            ("rss_start_bytes", self.rss_start_bytes),
            ("rss_max_bytes", self.rss_max_bytes),
            ("rss_growth", ratio(self.rss_max_bytes, self.rss_start_bytes)),
        ]
    }
}

impl Summary {
    /// The same, and the figures of watched presence.
    fn all_figures(&self) -> impl Iterator<Item = (String, Option<f64>)> {
        let own = self.figures().map(|(name, value)| (name.to_owned(), value));
        let presence = self.presence.iter().flat_map(Presence::figures);
        own.into_iter().chain(presence)
    }
}

impl Group {
    fn figures(&self) -> impl Iterator<Item = (String, Option<f64>)> {
        let counts = [
            ("devices", self.devices),
            ("connected", self.connected),
            ("attempts", self.attempts),
            ("admitted", self.admitted),
            ("failed", self.failed),
            ("sent", self.sent),
            ("acked", self.acked),
            ("refused", self.refused.values().sum()),
            ("connects", self.latency.count),
        ];
        let latencies = [
            ("p50_ms", self.latency.p50_ms),
            ("p90_ms", self.latency.p90_ms),
            ("p99_ms", self.latency.p99_ms),
            ("p999_ms", self.latency.p999_ms),
            ("max_ms", self.latency.max_ms),
        ];
        let refused = seawall_proto::refusal::Code::ALL
            .into_iter()
            .map(|code| code.as_str())
            .map(|code| {
                (
                    format!("refused_{code}"),
                    Some(count(self.refused.get(code).copied().unwrap_or(0))),
                )
            });
        counts
            .into_iter()
            .map(|(name, value)| (name.to_owned(), Some(count(value))))
            .chain(latencies.into_iter().map(|(name, value)| (name.to_owned(), value)))
            .chain(refused)
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of a load test are far below 2^52")]
pub(super) fn count(value: u64) -> f64 {
    value as f64
}

pub(super) fn figures(runs: &[Run]) -> Figures {
    let mut figures = Figures::new();
    for run in runs {
        for (name, value) in run.summary.all_figures() {
            if run.name == MAIN_RUN {
                figures.insert(name.clone(), value);
            }
            figures.insert(format!("{}.{name}", run.name), value);
        }
        for phase in &run.phases {
            let prefix = format!("{}.{}", run.name, phase.name);
            let drift = phase.drift.unwrap_or_default().figures();
            for (name, value) in phase.summary.all_figures().chain(drift) {
                figures.insert(format!("{prefix}.{name}"), value);
            }
            for (group, figures_of) in &phase.groups {
                for (name, value) in figures_of.figures() {
                    figures.insert(format!("{prefix}.{group}.{name}"), value);
                }
            }
        }
    }
    figures
}
