//! What a fleet does, in numbers: by firmware version, and how long connecting takes.
//!
//! [`Stats`] is a snapshot: it adds up over processes ([`Stats::merge`]) and is written as JSON.

use std::{collections::BTreeMap, fmt, time::Duration};

use hdrhistogram::Histogram;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A fleet at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Since the fleet began, in milliseconds.
    pub elapsed_ms: u64,
    /// By firmware version.
    pub versions: BTreeMap<String, VersionStats>,
    /// From when a device meant to connect to its session, attempts that were admitted only: the machine's own delay
    /// counts, so that a generator that can't keep up shows it.
    pub connect_latency: Latency,
    /// From the loss of a session (or the first attempt) to the next session, refusals and waits included.
    pub return_latency: Latency,
}

/// Devices of one version at one moment, and what has happened to them so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionStats {
    pub devices: u64,
    /// Now: in a session.
    pub connected: u64,
    /// Now: waiting for the gateway's answer.
    pub connecting: u64,
    /// Now: staying away until a time; before its first attempt too.
    pub waiting: u64,
    /// Currently told not to return.
    pub stopped: u64,
    /// Connections begun.
    pub attempts: u64,
    /// Sessions that were not a device's first.
    pub reconnects: u64,
    /// Attempts that the gateway refused, by its code. `http_NNN` if docs/PROTOCOL.md does not list the code under "Being
    /// refused".
    pub refused: BTreeMap<String, u64>,
    /// Attempts without an answer.
    pub failed: u64,
    /// Sessions that ended, by close code; `lost` where there was no close frame.
    pub closed: BTreeMap<String, u64>,
    /// Messages taken and acked.
    pub messages: u64,
    /// Update notices of restricted sessions.
    pub updates: u64,
    /// Messages of their own.
    pub sent: u64,
    /// Messages that the gateway acknowledged.
    pub acked: u64,
}

impl Stats {
    /// All versions together.
    #[must_use]
    pub fn total(&self) -> VersionStats {
        let mut total = VersionStats::default();
        for version in self.versions.values() {
            total.merge(version);
        }
        total
    }

    /// Adds another part of the same fleet.
    pub fn merge(&mut self, other: &Self) {
        self.elapsed_ms = self.elapsed_ms.max(other.elapsed_ms);
        for (name, version) in &other.versions {
            self.versions.entry(name.clone()).or_default().merge(version);
        }
        self.connect_latency.merge(&other.connect_latency);
        self.return_latency.merge(&other.return_latency);
    }
}

impl VersionStats {
    fn merge(&mut self, other: &Self) {
        self.devices += other.devices;
        self.connected += other.connected;
        self.connecting += other.connecting;
        self.waiting += other.waiting;
        self.stopped += other.stopped;
        self.attempts += other.attempts;
        self.reconnects += other.reconnects;
        self.failed += other.failed;
        self.messages += other.messages;
        self.sent += other.sent;
        self.updates += other.updates;
        self.acked += other.acked;
        for (code, count) in &other.refused {
            *self.refused.entry(code.clone()).or_default() += count;
        }
        for (code, count) in &other.closed {
            *self.closed.entry(code.clone()).or_default() += count;
        }
    }

    /// Refusals of all codes.
    #[must_use]
    pub fn refusals(&self) -> u64 {
        self.refused.values().sum()
    }
}

/// One line for people.
impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.total();
        write!(
            f,
            "{:>5.0} s  connected {}/{}  connecting {}  waiting {}  reconnects {}  refused {}",
            Duration::from_millis(self.elapsed_ms).as_secs_f64(),
            total.connected,
            total.devices,
            total.connecting,
            total.waiting,
            total.reconnects,
            total.refusals(),
        )?;
        for (index, (code, count)) in total.refused.iter().enumerate() {
            write!(f, "{}{code} {count}", if index == 0 { " (" } else { ", " })?;
        }
        f.write_str(if total.refused.is_empty() { "" } else { ")" })?;
        if total.failed > 0 {
            write!(f, "  no answer {}", total.failed)?;
        }
        if total.stopped > 0 {
            write!(f, "  stopped {}", total.stopped)?;
        }
        if total.updates > 0 {
            write!(f, "  update notices {}", total.updates)?;
        }
        if total.sent > 0 {
            write!(f, "  messages acked {}/{}", total.acked, total.sent)?;
        }
        for (index, (version, stats)) in self.versions.iter().enumerate() {
            let divider = if index == 0 { "  | " } else { ", " };
            write!(f, "{divider}{version} {}/{}", stats.connected, stats.devices)?;
        }
        Ok(())
    }
}

/// A histogram of spans, to about 1 %, up to an hour.
#[derive(Clone, PartialEq)]
pub struct Latency(Histogram<u64>);

/// Longest span that is told apart, in microseconds; longer ones count as this.
const LATENCY_MAX_US: u64 = 3_600_000_000;

impl Default for Latency {
    fn default() -> Self {
        let histogram = Histogram::new_with_bounds(1, LATENCY_MAX_US, 2);
        Self(histogram.expect("1 us to an hour in two digits are bounds that a histogram takes"))
    }
}

impl Latency {
    pub(crate) fn record(&mut self, span: Duration) {
        self.0
            .saturating_record(u64::try_from(span.as_micros()).unwrap_or(u64::MAX));
    }

    /// Spans recorded.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// The span that this share (0 to 1) of all spans do not exceed. Zero without any.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Duration {
        Duration::from_micros(self.0.value_at_quantile(share))
    }

    /// The longest span. Zero without any.
    #[must_use]
    pub fn max(&self) -> Duration {
        Duration::from_micros(self.0.max())
    }

    fn merge(&mut self, other: &Self) {
        // Cannot fail: all have the same bounds.
        let _ = self.0.add(&other.0);
    }
}

impl fmt::Debug for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Latency({} spans, p99 {:?})", self.count(), self.quantile(0.99))
    }
}

/// The written form: quantiles for people, and buckets, which sum over parts of a fleet.
#[derive(Serialize, Deserialize)]
struct Written {
    count: u64,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
    /// `[microseconds, spans]`.
    buckets: Vec<(u64, u64)>,
}

impl Serialize for Latency {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let ms = |span: Duration| span.as_secs_f64() * 1000.0;
        Written {
            count: self.count(),
            p50_ms: ms(self.quantile(0.5)),
            p99_ms: ms(self.quantile(0.99)),
            max_ms: ms(self.max()),
            buckets: self
                .0
                .iter_recorded()
                .map(|bucket| (bucket.value_iterated_to(), bucket.count_at_value()))
                .collect(),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Latency {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let written = Written::deserialize(deserializer)?;
        let mut latency = Self::default();
        for (micros, count) in written.buckets {
            latency.0.saturating_record_n(micros, count);
        }
        Ok(latency)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats() -> Stats {
        let mut stats = Stats::default();
        let version = VersionStats {
            devices: 10,
            connected: 6,
            waiting: 4,
            refused: [("overloaded".into(), 4)].into(),
            ..VersionStats::default()
        };
        stats.versions.insert("3.8.0".into(), version);
        for ms in [1, 20, 300] {
            stats.connect_latency.record(Duration::from_millis(ms));
        }
        stats
    }

    #[test]
    fn snapshot_survives_its_json_form() {
        let text = serde_json::to_string(&stats()).unwrap();

        let read: Stats = serde_json::from_str(&text).unwrap();

        assert_eq!(read.versions, stats().versions);
        assert_eq!(serde_json::to_string(&read).unwrap(), text);
    }

    #[test]
    fn parts_of_a_fleet_add_up() {
        let mut whole = stats();

        whole.merge(&stats());

        assert_eq!(whole.total().devices, 20);
        assert_eq!(whole.total().refused["overloaded"], 8);
        assert_eq!(whole.connect_latency.count(), 6);
        assert_eq!(
            whole.connect_latency.quantile(0.5),
            stats().connect_latency.quantile(0.5)
        );
    }

    #[test]
    fn line_for_people_names_what_is_there() {
        assert_eq!(
            stats().to_string(),
            "    0 s  connected 6/10  connecting 0  waiting 4  reconnects 0  refused 4 (overloaded 4)  | 3.8.0 6/10"
        );
    }
}
