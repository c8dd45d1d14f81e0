//! What a phase came to: return times, attempts, and the counts of each group.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;

use super::{Counters, PhaseFigures};
use crate::report::{Group, Latency, histogram};

#[derive(Debug)]
pub(super) struct Phase {
    pub(super) started: Instant,
    pub(super) ended: Option<Instant>,
    pub(super) wanted: u64,
    pub(super) wanted_attempts: u64,
    pub(super) returned: Vec<Duration>,
    pub(super) lost_sessions: u64,
    pub(super) missing: u64,
    /// At its start and at its end.
    pub(super) counters: (Counters, Counters),
    pub(super) groups: Vec<GroupCounts>,
}

#[derive(Debug)]
pub(super) struct GroupCounts {
    pub(super) devices: u64,
    pub(super) connected: u64,
    pub(super) attempts: u64,
    pub(super) admitted: u64,
    pub(super) refused: BTreeMap<&'static str, u64>,
    pub(super) failed: u64,
    pub(super) sent: u64,
    pub(super) acked: u64,
    pub(super) latency: Histogram<u64>,
}

impl GroupCounts {
    pub(super) fn new() -> Self {
        Self {
            devices: 0,
            connected: 0,
            attempts: 0,
            admitted: 0,
            refused: BTreeMap::new(),
            failed: 0,
            sent: 0,
            acked: 0,
            latency: histogram(),
        }
    }
}

impl Phase {
    pub(super) fn figures(&self, run_started: Instant, names: &[String]) -> PhaseFigures {
        let mut returned = self.returned.clone();
        returned.sort_unstable();
        // The time at which `part` of all were back; None while fewer are.
        let back = |part: f64| {
            #[expect(
                clippy::cast_precision_loss,
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "at most 18,000 devices"
            )]
            let needed = (self.wanted as f64 * part).ceil() as usize;
            returned.get(needed.checked_sub(1)?).map(Duration::as_secs_f64)
        };
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let attempts_per_device = (self.wanted > 0).then(|| self.wanted_attempts as f64 / self.wanted as f64);
        let ended = self.ended.unwrap_or(self.started);
        let groups = names
            .iter()
            .zip(&self.groups)
            .map(|(name, counts)| {
                let group = Group {
                    devices: counts.devices,
                    connected: counts.connected,
                    attempts: counts.attempts,
                    admitted: counts.admitted,
                    refused: counts.refused.clone(),
                    failed: counts.failed,
                    sent: counts.sent,
                    acked: counts.acked,
                    latency: Latency::of(&counts.latency),
                };
                (name.clone(), group)
            })
            .collect();
        PhaseFigures {
            starts_seconds: self.started.saturating_duration_since(run_started).as_secs_f64(),
            seconds: ended.saturating_duration_since(self.started).as_secs_f64(),
            wanted: self.wanted,
            t99_seconds: back(0.99),
            t100_seconds: back(1.0),
            attempts_per_device,
            lost_sessions: self.lost_sessions,
            missing: self.missing,
            counters: self.counters.1.since(self.counters.0),
            presence: None,
            groups,
        }
    }
}
