//! The generator's own limits: how late its timers run, the files it opens, the processor time it takes.
//!
//! [`Gauge`] measures during a run, [`Generator`] is the result of a phase, and [`Generator::limits`] decides whether
//! the generator was the limit: then the figures say nothing about the server. docs/SCENARIOS.md has the rule.

use std::{
    fs,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::report::histogram;

/// Period of the timer whose lateness is measured.
const TICK: Duration = Duration::from_millis(10);
/// How often open files are counted.
const COUNT_EVERY: Duration = Duration::from_secs(1);
/// Files beside the devices' sockets: runtime, logs, requests to the server, an ended device's socket.
const FILES_OF_OUR_OWN: u64 = 256;
/// Greatest lag at the 99th percentile where servers and database run on this machine. They share its processors. In a
/// storm of 15,000 devices on two cores the lag is some hundred milliseconds; devices return within seconds.
pub const LAG_MAX_SHARED: Duration = Duration::from_secs(2);
/// The same where the target runs elsewhere.
pub const LAG_MAX_ALONE: Duration = Duration::from_millis(50);
/// Greatest part of the processor time of all its cores.
const CPU_MAX: f64 = 0.9;
/// A shorter phase has too few samples to be judged by lag or processor time.
const SECONDS_MIN: f64 = 1.0;

/// What the generator did in a phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Generator {
    /// How late its timers and the attempts of its devices were.
    pub lag_p50_ms: Option<f64>,
    pub lag_p99_ms: Option<f64>,
    pub lag_max_ms: Option<f64>,
    /// Processor time that this process took, as a part of that of all its cores.
    pub cpu: f64,
    pub cores: u32,
    /// Most open files and sockets so far, and how many it may open.
    pub open_files_max: u64,
    pub open_files_limit: u64,
    /// Attempts for which this machine had no socket.
    pub local_failures: u64,
}

/// Measures while it lives.
#[derive(Debug)]
pub struct Gauge {
    shared: Arc<Shared>,
    timer: tokio::task::JoinHandle<()>,
    cores: u32,
    files_limit: u64,
    begun: Mutex<(Instant, Duration)>,
}

#[derive(Debug)]
struct Shared {
    lag: Mutex<Histogram<u64>>,
    local_failures: AtomicU64,
    open_files_max: AtomicU64,
    ends: AtomicBool,
}

/// Takes what devices report. Cheap: one lock.
#[derive(Clone, Debug)]
pub struct Lateness(Arc<Shared>);

impl Lateness {
    /// A device began an attempt that much later than it meant to.
    pub fn attempt(&self, late: Duration) {
        self.0.late(late);
    }

    /// This machine had no socket for an attempt.
    pub fn local_failure(&self) {
        self.0.local_failures.fetch_add(1, Ordering::Relaxed);
    }
}

impl Shared {
    fn late(&self, late: Duration) {
        let us = u64::try_from(late.as_micros()).unwrap_or(u64::MAX);
        let mut lag = self.lag.lock().unwrap_or_else(PoisonError::into_inner);
        lag.saturating_record(us.max(1));
    }
}

impl Gauge {
    /// Begins to measure, on the runtime that devices run on.
    #[must_use]
    pub fn start() -> Self {
        let shared = Arc::new(Shared {
            lag: Mutex::new(histogram()),
            local_failures: AtomicU64::new(0),
            open_files_max: AtomicU64::new(0),
            ends: AtomicBool::new(false),
        });
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || count_files(&shared)
        });
        Self {
            timer: tokio::spawn(tick(Arc::clone(&shared))),
            shared,
            cores: u32::try_from(cores).unwrap_or(u32::MAX),
            files_limit: firmware_sim::files::raise_limit(),
            begun: Mutex::new((Instant::now(), processor_time())),
        }
    }

    #[must_use]
    pub fn lateness(&self) -> Lateness {
        Lateness(Arc::clone(&self.shared))
    }

    /// Ends a phase: what the generator did since the previous one ended.
    pub fn end_phase(&self) -> Generator {
        let (now, used) = (Instant::now(), processor_time());
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        let seconds = now.saturating_duration_since(begun.0).as_secs_f64();
        let cpu = used.saturating_sub(begun.1).as_secs_f64() / (seconds * f64::from(self.cores));
        *begun = (now, used);
        drop(begun);
        let mut lag = self.shared.lag.lock().unwrap_or_else(PoisonError::into_inner);
        let spans = crate::report::Latency::of(&lag);
        lag.reset();
        drop(lag);
        Generator {
            lag_p50_ms: spans.p50_ms,
            lag_p99_ms: spans.p99_ms,
            lag_max_ms: spans.max_ms,
            cpu: if cpu.is_finite() { cpu } else { 0.0 },
            cores: self.cores,
            open_files_max: self.shared.open_files_max.load(Ordering::Relaxed),
            open_files_limit: self.files_limit,
            local_failures: self.shared.local_failures.swap(0, Ordering::Relaxed),
        }
    }
}

impl Drop for Gauge {
    fn drop(&mut self) {
        self.timer.abort();
        self.shared.ends.store(true, Ordering::Relaxed);
    }
}

/// A timer that is due each [`TICK`], whatever came of the one before: after a standstill each tick in it counts.
async fn tick(shared: Arc<Shared>) {
    let mut due = tokio::time::Instant::now();
    loop {
        due += TICK;
        tokio::time::sleep_until(due).await;
        shared.late(due.elapsed());
    }
}

fn count_files(shared: &Shared) {
    while !shared.ends.load(Ordering::Relaxed) {
        let files = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        let files = u64::try_from(files).unwrap_or(u64::MAX);
        shared.open_files_max.fetch_max(files, Ordering::Relaxed);
        std::thread::sleep(COUNT_EVERY);
    }
}

/// Processor time of this process so far, user and system. Zero where the system does not tell.
fn processor_time() -> Duration {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The second field is a name in brackets that may hold anything. Fields 14 and 15 are clock ticks.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: u64 = after_name
        .split_ascii_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    Duration::from_millis(ticks.saturating_mul(1_000) / per_second)
}

/// Checks that this process may open a socket for each device.
///
/// # Errors
/// It may not.
pub fn check_files(devices: u32) -> Result<()> {
    let (limit, needed) = (
        firmware_sim::files::raise_limit(),
        u64::from(devices) + FILES_OF_OUR_OWN,
    );
    ensure!(
        needed <= limit,
        "inconclusive: this machine can't drive {devices} devices. They need {needed} open files, and this process may \
         open {limit}: raise `ulimit -n`, or give --devices"
    );
    Ok(())
}

impl Generator {
    /// The worst of both, figure by figure.
    #[must_use]
    pub fn worse(self, other: Self) -> Self {
        let most = |one: Option<f64>, two: Option<f64>| one.into_iter().chain(two).reduce(f64::max);
        Self {
            lag_p50_ms: most(self.lag_p50_ms, other.lag_p50_ms),
            lag_p99_ms: most(self.lag_p99_ms, other.lag_p99_ms),
            lag_max_ms: most(self.lag_max_ms, other.lag_max_ms),
            cpu: self.cpu.max(other.cpu),
            cores: other.cores,
            open_files_max: self.open_files_max.max(other.open_files_max),
            open_files_limit: other.open_files_limit,
            local_failures: self.local_failures + other.local_failures,
        }
    }

    /// Why the generator was the limit in a phase of this length; empty where it was not.
    #[must_use]
    pub fn limits(&self, phase: &str, seconds: f64, lag_max: Duration) -> Vec<String> {
        let mut limits = Vec::new();
        if self.local_failures > 0 {
            limits.push(format!(
                "phase {phase}: this machine had no socket for {} attempts ({} of {} files open)",
                self.local_failures, self.open_files_max, self.open_files_limit
            ));
        }
        if seconds < SECONDS_MIN {
            return limits;
        }
        let lag_max_ms = lag_max.as_secs_f64() * 1_000.0;
        if let Some(lag) = self.lag_p99_ms.filter(|lag| *lag > lag_max_ms) {
            limits.push(format!(
                "phase {phase}: its own lag was {lag:.0} ms at the 99th percentile, more than {lag_max_ms:.0} ms"
            ));
        }
        if self.cpu > CPU_MAX {
            limits.push(format!(
                "phase {phase}: it took {:.0} % of the processor time of its {} cores, more than {:.0} %",
                self.cpu * 100.0,
                self.cores,
                CPU_MAX * 100.0
            ));
        }
        limits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_is_named_and_short_phases_are_judged_by_failures_alone() {
        let idle = Generator {
            lag_p99_ms: Some(2.0),
            cpu: 0.3,
            cores: 2,
            ..Generator::default()
        };
        let lagging = Generator {
            lag_p99_ms: Some(51.0),
            ..idle
        };
        let busy = Generator { cpu: 0.95, ..idle };
        let out_of_files = Generator {
            local_failures: 3,
            ..lagging
        };

        assert!(idle.limits("storm", 10.0, LAG_MAX_ALONE).is_empty());
        assert!(lagging.limits("storm", 10.0, LAG_MAX_SHARED).is_empty());
        assert!(lagging.limits("storm", 0.5, LAG_MAX_ALONE).is_empty());
        for (generator, words) in [(lagging, "51 ms"), (busy, "95 %"), (out_of_files, "no socket for 3")] {
            let limits = generator.limits("storm", 10.0, LAG_MAX_ALONE);
            assert!(
                limits[0].contains(words) && limits[0].contains("phase storm"),
                "{limits:?}"
            );
        }
        assert_eq!(out_of_files.limits("storm", 0.5, LAG_MAX_ALONE).len(), 1);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn standstill_of_the_runtime_counts_with_every_tick_in_it() {
        let gauge = Gauge::start();
        tokio::time::sleep(5 * TICK).await;
        gauge.end_phase();

        std::thread::sleep(Duration::from_millis(400));
        tokio::time::sleep(2 * TICK).await;
        gauge.lateness().local_failure();
        let stalled = gauge.end_phase();

        assert!(stalled.lag_max_ms.unwrap() >= 380.0, "{stalled:?}");
        // Not one late tick among many: those that should have come meanwhile are late as well.
        assert!(stalled.lag_p50_ms.unwrap() >= 100.0, "{stalled:?}");
        assert_eq!((stalled.local_failures, gauge.end_phase().local_failures), (1, 0));
    }

    #[tokio::test]
    async fn work_and_open_files_of_this_process_are_seen() {
        let gauge = Gauge::start();
        let before = processor_time();
        while processor_time() < before + Duration::from_millis(30) {
            std::hint::black_box((0..100_000_u64).sum::<u64>());
        }

        let worked = gauge.end_phase();

        assert!(worked.cpu > 0.0 && worked.cores >= 1, "{worked:?}");
        assert!(worked.open_files_limit > 0);
        assert!(check_files(10).is_ok());
        let beyond = check_files(u32::MAX).unwrap_err().to_string();
        assert!(beyond.contains("ulimit -n"), "{beyond}");
    }
}
