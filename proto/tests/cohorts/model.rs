//! A fleet of 200,000 devices in 1,000 cohorts as the detector sees it: repeats, second by second, in virtual time.
//!
//! Sizes follow Zipf's law. Repeats are rare (5 % of the devices' sessions, which last 6 hours), and unevenly spread:
//! every 10 minutes each cohort draws an exponential factor. Slow repeats are half as frequent. There is a daily cycle.
//! Storms multiply all repeats by 20 to 100 for 90 s, three times a day. Twenty times a day the power flickers at one
//! site of a cohort.

use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::SmallRng};
use seawall_proto::{
    close::EndedBy,
    cohort::CohortTag,
    cohorts::{
        Action, Breaker, BreakerRule, Detector, Event, EventKind, Mode, Past, ProposalId, STEADY_SESSION, Signal,
    },
    id::RuleId,
    time::Instant,
};
use uuid::Uuid;

pub const COHORTS: usize = 1_000;
pub const DEVICES: f64 = 200_000.0;
/// Repeats per device and second.
const BASE: f64 = 0.05 / 21_600.0;
const DAY: f64 = 86_400.0;
/// Devices of a site with several.
const DEVICES_A_SITE: u64 = 3;

/// Devices in a crash loop.
#[derive(Clone, Copy)]
pub struct Loop {
    pub cohort: usize,
    /// When the first of them connects, in seconds.
    pub begins: u64,
    /// Time from one crash to the next, in seconds.
    pub period: f64,
    /// Number of devices.
    pub devices: usize,
    /// Time over which they join, in seconds.
    pub ramp: f64,
    pub tenant: u64,
    /// Number of crashes of a device.
    pub crashes: u32,
    /// Whether its devices were never seen before.
    pub is_new: bool,
}

/// Repeats of a cohort that grow slowly.
#[derive(Clone, Copy)]
pub struct Leak {
    pub cohort: usize,
    /// In seconds.
    pub begins: u64,
    /// Time in which all repeats double, in seconds.
    pub doubles_in: f64,
}

/// What troubles the fleet without any bad version.
#[derive(Clone, Copy)]
pub struct Noise {
    pub storms_a_day: f64,
    pub power_cuts_a_day: f64,
}

pub const USUAL: Noise = Noise {
    storms_a_day: 3.0,
    power_cuts_a_day: 20.0,
};

/// What became of a run.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Proposals: second, cohort, signal.
    pub opened: Vec<(u64, usize, Signal)>,
    /// Automatic rules: second, cohort.
    pub applied: Vec<(u64, usize)>,
    pub renewed: usize,
    pub expired: usize,
    pub taken_over: usize,
    pub dismissed: usize,
}

impl Outcome {
    /// Seconds from `begins` to the proposal about this cohort.
    pub fn named_after(&self, cohort: usize, begins: u64) -> Option<u64> {
        let of = self
            .opened
            .iter()
            .find(|(at, other, _)| *other == cohort && *at >= begins);
        of.map(|(at, ..)| at - begins)
    }

    /// Proposals about other cohorts.
    pub fn accused(&self, bad: &[usize]) -> usize {
        self.opened
            .iter()
            .filter(|(_, cohort, _)| !bad.contains(cohort))
            .count()
    }
}

pub struct Fleet {
    pub sizes: Vec<f64>,
    pub detector: Detector,
    pub breaker: Breaker,
    pub noise: Noise,
    pub outcome: Outcome,
    rng: SmallRng,
    second: u64,
    /// Sums of the cohorts' rates, for choosing one.
    sums: Vec<f64>,
    storm: (f64, f64),
    cuts: Vec<(usize, u64, f64)>,
    loops: Vec<Member>,
    pub leak: Option<Leak>,
    /// Devices that have repeats every day, for five hours in the morning: cohort, and their rate relative to others.
    pub mornings: Option<(usize, f64)>,
    ids: u128,
    /// Rules: cohort, id, when it was made, when it ends. They admit a tenth.
    pub rules: Vec<(usize, RuleId, u64, u64)>,
}

struct Member {
    cohort: usize,
    device: u64,
    next: f64,
    period: f64,
    past: Past,
    left: u32,
    tenant: u64,
}

impl Member {
    /// Its session, which began with its last crash, ends with the next one.
    fn end_session(&mut self) {
        let lived = Duration::from_secs_f64(self.period);
        self.past = Past::after(Some(self.past), EndedBy::Device, lived);
    }
}

pub fn tag(cohort: usize) -> CohortTag {
    CohortTag::confirmed(Some("box"), Some(&format!("1.{cohort}")))
}

impl Fleet {
    pub fn new(seed: u64, noise: Noise) -> Self {
        let zipf: Vec<f64> = (0..COHORTS).map(|rank| 1.0 / (rank as f64 + 3.0)).collect();
        let sum: f64 = zipf.iter().sum();
        Self {
            sizes: zipf.iter().map(|z| (z / sum * DEVICES).max(5.0)).collect(),
            detector: Detector::default(),
            breaker: Breaker::new(Mode::Apply),
            noise,
            outcome: Outcome::default(),
            rng: SmallRng::seed_from_u64(seed),
            second: 0,
            sums: Vec::new(),
            storm: (0.0, 1.0),
            cuts: Vec::new(),
            loops: Vec::new(),
            leak: None,
            mornings: None,
            ids: 0,
            rules: Vec::new(),
        }
    }

    pub fn add_loop(&mut self, of: Loop) {
        for device in 0..of.devices {
            let joins = of.begins as f64 + self.rng.random_range(0.0..of.ramp.max(of.period));
            self.loops.push(Member {
                cohort: of.cohort,
                device: 1_000_000 + device as u64,
                next: joins + of.period,
                period: of.period,
                // It was connected for long, and has just restarted.
                past: if of.is_new {
                    Past::default()
                } else {
                    Past::after(None, EndedBy::Device, STEADY_SESSION)
                },
                left: of.crashes,
                tenant: of.tenant,
            });
        }
    }

    /// A storm of the whole fleet from now on.
    pub fn begin_storm(&mut self, seconds: f64, factor: f64) {
        self.storm = (seconds, factor);
    }

    /// The power flickers at a site of `devices` of a cohort, and each of them has a repeat or several.
    pub fn cut_power(&mut self, cohort: usize, devices: f64) {
        self.cuts.push((cohort, self.rng.random(), devices));
    }

    pub fn run(&mut self, seconds: u64) {
        let end = self.second + seconds;
        while self.second < end {
            self.step();
        }
    }

    fn step(&mut self) {
        let now = self.second;
        if now.is_multiple_of(600) || self.sums.is_empty() {
            self.draw_rates();
        }
        if now.is_multiple_of(60) {
            self.note_sizes();
        }
        self.draw_noise();
        let daily = 1.0 + 0.5 * (now as f64 / DAY * std::f64::consts::TAU).sin();
        let factor = if self.storm.0 > 0.0 { self.storm.1 } else { 1.0 };
        let total = self.sums[COHORTS - 1];
        for _ in 0..poisson(total * daily * factor, &mut self.rng) {
            let place = self.rng.random_range(0.0..total);
            let cohort = self.sums.partition_point(|sum| *sum <= place);
            let device = self.rng.random_range(0..self.sizes[cohort] as u64 + 1);
            let is_again = self.rng.random_bool(0.3);
            let site = device / DEVICES_A_SITE;
            self.event(EventKind::Repeat, cohort, site, 7, is_again);
            if self.rng.random_bool(0.5) {
                self.event(EventKind::SlowRepeat, cohort, site + 1, 7, false);
            }
        }
        self.flicker();
        self.crash();
        self.grow();
        self.storm.0 -= 1.0;
        self.judge();
        self.second += 1;
    }

    fn draw_rates(&mut self) {
        let mut sum = 0.0;
        let rates = self.sizes.iter().map(|size| {
            let factor = -self.rng.random_range(f64::MIN_POSITIVE..1.0).ln();
            sum += size * BASE * factor;
            sum
        });
        self.sums = rates.collect();
    }

    fn note_sizes(&mut self) {
        for (cohort, size) in self.sizes.iter().enumerate() {
            let size = if self.is_gated(cohort) { size / 10.0 } else { *size };
            self.detector.handle_cohort(tag(cohort), 1, size as usize, (0, 0, 0));
        }
    }

    fn draw_noise(&mut self) {
        if self.storm.0 <= 0.0 && self.rng.random_bool(self.noise.storms_a_day / DAY) {
            let factor = self.rng.random_range(20.0..100.0);
            self.begin_storm(90.0, factor);
        }
        if self.rng.random_bool(self.noise.power_cuts_a_day / DAY) {
            let cohort = (self.rng.random_range(0.0..1.0_f64).powi(2) * COHORTS as f64) as usize;
            let devices = self.rng.random_range(200.0..500.0_f64).min(self.sizes[cohort] / 2.0);
            self.cut_power(cohort, devices);
        }
    }

    fn flicker(&mut self) {
        let mut cuts = std::mem::take(&mut self.cuts);
        for (cohort, site, left) in &mut cuts {
            let repeats = poisson((*left / 6.0).max(1.0), &mut self.rng);
            for _ in 0..repeats {
                self.event(EventKind::Repeat, *cohort, *site, 7, true);
                self.event(EventKind::SlowRepeat, *cohort, *site, 7, false);
            }
            *left -= f64::from(repeats);
        }
        cuts.retain(|(_, _, left)| *left > 0.0);
        self.cuts = cuts;
    }

    fn crash(&mut self) {
        let end = self.second as f64 + 1.0;
        let mut loops = std::mem::take(&mut self.loops);
        for member in &mut loops {
            if member.next < end && member.left > 0 {
                member.end_session();
                if !self.is_gated(member.cohort) || member.device.is_multiple_of(10) {
                    let Member {
                        cohort,
                        device,
                        tenant,
                        past,
                        ..
                    } = *member;
                    if past.repeats() > 0 {
                        self.event(EventKind::Repeat, cohort, device, tenant, past.repeats() > 1);
                    } else if past.is_in_loop() {
                        self.event(EventKind::SlowRepeat, cohort, device, tenant, false);
                    }
                }
                member.left -= 1;
                member.next += member.period * self.rng.random_range(0.95..1.05);
            }
        }
        self.loops = loops;
    }

    fn grow(&mut self) {
        let elapsed = |leak: Leak| self.second.checked_sub(leak.begins).map(|seconds| seconds as f64);
        let leak = self.leak.and_then(|leak| {
            let factor = (elapsed(leak)? / leak.doubles_in).exp2() - 1.0;
            Some((leak.cohort, factor.min(1_000.0)))
        });
        let hour = (self.second as f64 / 3_600.0) % 24.0;
        let mornings = self.mornings.map(|(cohort, factor)| {
            let share = (-((hour - 7.0) / 2.5).powi(2)).exp();
            (cohort, factor * share)
        });
        for (cohort, factor) in [leak, mornings].into_iter().flatten() {
            for _ in 0..poisson(self.sizes[cohort] * BASE * factor, &mut self.rng) {
                let device = self.rng.random_range(0..self.sizes[cohort] as u64);
                let is_again = self.rng.random_bool(0.5);
                self.event(EventKind::Repeat, cohort, device / DEVICES_A_SITE, 7, is_again);
            }
        }
    }

    pub fn is_gated(&self, cohort: usize) -> bool {
        let mut rules = self.rules.iter();
        rules.any(|(of, .., ends)| *of == cohort && *ends > self.second)
    }

    fn event(&mut self, kind: EventKind, cohort: usize, site: u64, tenant: u64, is_again: bool) {
        self.detector.handle_event(&Event {
            kind,
            cohort: tag(cohort),
            domain: (cohort as u64) << 40 ^ site,
            tenant,
            is_again,
        });
    }

    fn judge(&mut self) {
        let now = Instant::from_micros((self.second + 1) * 1_000_000);
        let findings = self.detector.handle_second(now);
        let second = self.second;
        let gates = self.rules.iter().map(|(cohort, rule, made, ends)| BreakerRule {
            rule: *rule,
            cohort: tag(*cohort),
            age: Duration::from_secs(second - made),
            left: Duration::from_secs(ends.saturating_sub(second)),
        });
        let gates: Vec<_> = gates.collect();
        let ids = &mut self.ids;
        let actions = self.breaker.handle_second(&findings, &gates, &self.detector, now, || {
            *ids += 1;
            ProposalId(Uuid::from_u128(*ids))
        });
        for action in actions {
            let of = |id| {
                let proposal = self.breaker.get(id).expect("it is in the action");
                let cohort = (0..COHORTS).find(|cohort| tag(*cohort) == proposal.cohort);
                (cohort.expect("it is of the fleet"), proposal.signal)
            };
            match action {
                Action::Opened(id) => {
                    let (cohort, signal) = of(id);
                    self.outcome.opened.push((self.second, cohort, signal));
                }
                Action::Apply(id) => {
                    let cohort = of(id).0;
                    self.outcome.applied.push((second, cohort));
                    self.rules.push((cohort, RuleId(id.0), second, second + 900));
                    self.breaker.handle_applied(id, RuleId(id.0), true, &self.detector, now);
                }
                Action::Renew(id) => {
                    self.outcome.renewed += 1;
                    let rule = self.breaker.get(id).and_then(|proposal| proposal.rule);
                    let renewed = self.rules.iter_mut().find(|(_, of, ..)| Some(*of) == rule);
                    renewed.expect("it is in force").3 = second + 900;
                }
                Action::Applied(_) => self.outcome.taken_over += 1,
                Action::Dismissed(_) => self.outcome.dismissed += 1,
                Action::Expired(_) => self.outcome.expired += 1,
            }
        }
    }
}

/// A Poisson variate; above a mean of 30 a rounded normal one.
pub fn poisson(mean: f64, rng: &mut impl Rng) -> u32 {
    if mean < 30.0 {
        let (limit, mut product, mut count) = ((-mean).exp(), 1.0, 0);
        loop {
            product *= rng.random_range(f64::MIN_POSITIVE..1.0);
            if product <= limit {
                return count;
            }
            count += 1;
        }
    }
    let (a, b): (f64, f64) = (rng.random_range(f64::MIN_POSITIVE..1.0), rng.random_range(0.0..1.0));
    let normal = (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos();
    (mean + mean.sqrt() * normal).round().max(0.0) as u32
}
