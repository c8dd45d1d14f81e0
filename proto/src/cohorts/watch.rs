//! Events of one kind: a Poisson CUSUM of each cohort against the rest of the fleet.

use std::collections::BTreeMap;

use super::{Level, decay};

/// Ratio of rates that the test is tuned for: 8 times what is expected.
const RATIO: f64 = 8.0;
/// Score from which a cohort is proposed.
const PROPOSE: f64 = 15.0;
/// Score from which a cohort may be gated without a person.
const APPLY: f64 = 25.0;
/// Maximum score, so that an old incident is forgotten.
const SCORE_MAX: f64 = 4.0 * APPLY;
/// Below this score events are learned as normal; never above it.
const LEARN_MAX: f64 = APPLY / 2.0;
/// Least rate that is expected of any cohort, per second.
const RATE_MIN: f64 = 1.0 / 600.0;
/// Time constant of the usual rates, in seconds.
const USUAL: f64 = 3_600.0;
/// Minimum time in which the greatest usual rate of a device doubles, in seconds. So what grows within hours does not
/// become usual, and what returns every day does. The first day of a cohort is free.
const DOUBLING: f64 = 86_400.0;
/// Time constant with which that rate falls, in seconds.
const PEAK_OVER: f64 = 14.0 * 86_400.0;
/// Least impact: failure domains with an event within the last minute.
const IMPACT_MIN: f64 = 20.0;
/// The same as a share of the cohort's devices, up to [`IMPACT_ENOUGH`].
const IMPACT_SHARE: f64 = 0.02;
const IMPACT_ENOUGH: f64 = 100.0;
/// Time constant of the impact, in seconds. A failure domain counts once in that time.
const IMPACT: f64 = 60.0;
/// Minimum impact of a cohort that is still bad: fewer repeats come by chance, where few devices are left.
const STILL_BAD_MIN: f64 = 3.0;
/// Above this multiple of its usual rate the rest of the fleet is in a storm as well.
const STORM: f64 = 4.0;
/// Time constant of that multiple, in seconds.
const STORM_OVER: f64 = 30.0;
/// Least usual rate of the rest that the multiple refers to, per second.
const STORM_RATE_MIN: f64 = 0.1;
/// Number of other suspected cohorts that do not count as the rest of the fleet: two models with one bad version would
/// hide each other.
const SUSPECTS_MAX: usize = 3;
/// Maximum number of failure domains remembered for a cohort. Further ones count as new.
const DOMAINS_MAX: usize = 512;
/// Interval at which old domains are forgotten, in seconds.
const DOMAINS_FORGOTTEN: u64 = 16;
/// Share of events of one tenant from which they are its own.
const TENANT_SHARE: f64 = 0.9;

/// Events of one kind of all cohorts. A cohort is an index below the number of slots.
#[derive(Debug, Default)]
pub(super) struct Watch {
    slots: Vec<Slot>,
    /// Cohorts with events in this second, a score or an impact.
    awake: Vec<u32>,
    /// Usual rate of the fleet, per second, at `usual_at`.
    usual: f64,
    usual_at: u64,
    storm: f64,
}

#[derive(Debug, Default)]
struct Slot {
    is_awake: bool,
    /// Events since the last second, each failure domain once a minute.
    fresh: f64,
    /// Of devices that had a repeat just before.
    fresh_again: f64,
    score: f64,
    /// Usual rate, per second, at `usual_at`.
    usual: f64,
    usual_at: u64,
    /// Greatest usual rate of one device, per second, at `peak_at`.
    peak: f64,
    peak_at: u64,
    /// When that rate last rose.
    risen_at: u64,
    /// When its first event was.
    began: Option<u64>,
    storm: f64,
    impact: f64,
    impact_again: f64,
    /// Rate that the rest let expect in the last second.
    expected: f64,
    domains: BTreeMap<u64, Domain>,
    tenant: Tenant,
}

/// Seconds of the last counted events of a failure domain, plus one. Zero: none.
#[derive(Clone, Copy, Debug, Default)]
struct Domain {
    event: u64,
    again: u64,
}

/// The tenant of most events, by majority vote.
#[derive(Clone, Copy, Debug, Default)]
struct Tenant {
    hash: u64,
    lead: f64,
    events: f64,
}

/// A cohort that stands out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub slot: u32,
    pub level: Level,
    /// Events per minute.
    pub observed: f64,
    pub expected: f64,
    pub score: f64,
    pub tenant: Option<u64>,
}

impl Slot {
    fn usual(&self, now: u64) -> f64 {
        self.usual * decay(now.saturating_sub(self.usual_at) as f64, USUAL)
    }

    /// The usual rate, as far as it can be expected of so many devices by their greatest usual rate.
    fn bounded_usual(&mut self, devices: f64, now: u64) -> f64 {
        let usual = self.usual(now);
        let of_one = usual / devices.max(1.0);
        let elapsed = |since: u64| now.saturating_sub(since) as f64;
        self.peak *= decay(elapsed(self.peak_at), PEAK_OVER);
        self.peak_at = now;
        if of_one > self.peak {
            let is_young = elapsed(*self.began.get_or_insert(now)) < DOUBLING;
            let growth = (elapsed(self.risen_at) / DOUBLING).min(1.0).exp2();
            self.peak = if is_young {
                of_one
            } else {
                of_one.min(self.peak * growth)
            };
            self.risen_at = now;
        }
        usual.min(self.peak * devices.max(1.0))
    }

    /// Learns the events of this second, without those of an outlier. Returns what the usual rate rose by.
    fn learn(&mut self, now: u64) -> f64 {
        let usual = self.usual(now);
        let rise = self.fresh.min(usual * 10.0 + 2.0) / USUAL;
        (self.usual, self.usual_at) = (usual + rise, now);
        rise
    }

    /// Counts an event of a failure domain. Only the first one within a minute counts.
    fn handle_event(&mut self, domain: u64, is_again: bool, now: u64) {
        let is_full = self.domains.len() >= DOMAINS_MAX;
        let seen = match self.domains.get_mut(&domain) {
            Some(seen) => seen,
            None if is_full => {
                self.fresh += 1.0;
                self.fresh_again += f64::from(u8::from(is_again));
                return;
            }
            None => self.domains.entry(domain).or_default(),
        };
        let is_new = |last: u64| last == 0 || now + 1 >= last + IMPACT as u64;
        if is_new(seen.event) {
            seen.event = now + 1;
            self.fresh += 1.0;
        }
        if is_again && is_new(seen.again) {
            seen.again = now + 1;
            self.fresh_again += 1.0;
        }
    }
}

impl Tenant {
    fn handle_event(&mut self, tenant: u64) {
        self.events += 1.0;
        if self.hash == tenant {
            self.lead += 1.0;
        } else if self.lead < 1.0 {
            (self.hash, self.lead) = (tenant, 1.0);
        } else {
            self.lead -= 1.0;
        }
    }

    fn majority(&self) -> Option<u64> {
        // The lead is the events of the tenant less those of all others.
        let is_clear = self.lead >= (2.0 * TENANT_SHARE - 1.0) * self.events;
        (self.events >= 1.0 && is_clear).then_some(self.hash)
    }
}

impl Watch {
    /// Makes room for the cohort of this index, without events.
    pub fn reset(&mut self, slot: usize) {
        while self.slots.len() <= slot {
            self.slots.push(Slot::default());
        }
        self.slots[slot] = Slot {
            // The list of those that are awake may still have it.
            is_awake: self.slots[slot].is_awake,
            ..Slot::default()
        };
    }

    /// Whether the cohort has neither events nor a score.
    pub fn is_idle(&self, slot: usize) -> bool {
        !self.slots[slot].is_awake
    }

    pub fn handle_event(&mut self, slot: u32, domain: u64, tenant: u64, is_again: bool, now: u64) {
        let cohort = &mut self.slots[slot as usize];
        cohort.handle_event(domain, is_again, now);
        cohort.tenant.handle_event(tenant);
        if !cohort.is_awake {
            cohort.is_awake = true;
            cohort.storm = self.storm;
            self.awake.push(slot);
        }
    }

    /// Score relative to that of a proposal.
    pub fn stands_out(&self, slot: u32) -> f64 {
        self.slots[slot as usize].score / PROPOSE
    }

    /// Whether the cohort still has several times the events that are expected.
    pub fn is_bad(&self, slot: u32) -> bool {
        let cohort = &self.slots[slot as usize];
        cohort.impact >= (RATIO / 2.0 * cohort.expected * IMPACT).max(STILL_BAD_MIN)
    }

    /// Ends a second, `elapsed` seconds after the last one. `devices` returns the devices of a cohort, of `fleet` in
    /// all.
    pub fn handle_second(
        &mut self,
        now: u64,
        elapsed: f64,
        fleet: f64,
        devices: impl Fn(u32) -> f64,
        mut found: impl FnMut(Found),
    ) {
        let total: f64 = self.awake.iter().map(|slot| self.slots[*slot as usize].fresh).sum();
        let usual_total = self.usual * decay(now.saturating_sub(self.usual_at) as f64, USUAL);
        let awake = std::mem::take(&mut self.awake);
        let parts = awake.iter().map(|slot| self.part(*slot, now, devices(*slot)));
        let parts: Vec<_> = parts.collect();
        let suspects = self.suspects(&parts);
        for own in &parts {
            let out = Part::others(&suspects, own, fleet);
            let share = share_of(own, usual_total, fleet);
            let share_rest = (1.0 - share - share_of(&out, usual_total, fleet)).max(0.05);
            let rest = (total - own.fresh - out.fresh).max(0.0);
            let expected = (share / share_rest * rest)
                .max(own.usual * elapsed)
                .max(RATE_MIN * elapsed);
            let cohort = &mut self.slots[own.slot as usize];
            cohort.expected = expected / elapsed;
            cohort.score += cohort.fresh * RATIO.ln() - (RATIO - 1.0) * expected;
            cohort.score = cohort.score.clamp(0.0, SCORE_MAX);
        }

        // The events of this second may have made others suspect.
        let suspects = self.suspects(&parts);
        let (mut rise, kept_impact) = (0.0, decay(elapsed, IMPACT));
        let storm = |before: f64, own: &Part, out: &Part| {
            let rest = (total - own.fresh - out.fresh).max(0.0) / elapsed;
            let usual_rest = usual_total - own.usual - own.unusual - out.usual - out.unusual;
            let usual_rest = usual_rest.max(STORM_RATE_MIN);
            let kept = decay(elapsed, STORM_OVER);
            before * kept + rest / usual_rest * (1.0 - kept)
        };
        for own in &parts {
            let out = Part::others(&suspects, own, fleet);
            let cohort = &mut self.slots[own.slot as usize];
            cohort.storm = storm(cohort.storm, own, &out);
            if cohort.storm > STORM {
                // Admission handles it. A cohort that is bad still stands out afterwards.
                cohort.score = cohort.score.min(0.9 * PROPOSE);
            }
            cohort.impact = cohort.impact * kept_impact + cohort.fresh;
            cohort.impact_again = cohort.impact_again * kept_impact + cohort.fresh_again;
            if cohort.score < LEARN_MAX && cohort.fresh > 0.0 {
                rise += cohort.learn(now);
            }
            (cohort.fresh, cohort.fresh_again) = (0.0, 0.0);
            if let Some(level) = cohort.level(own.devices, fleet) {
                found(Found {
                    slot: own.slot,
                    level,
                    observed: cohort.impact,
                    expected: cohort.expected * IMPACT,
                    score: cohort.score,
                    tenant: cohort.tenant.majority(),
                });
            }
        }
        let nobody = Part::default();
        self.storm = storm(self.storm, &nobody, &Part::sum(suspects.iter()));
        (self.usual, self.usual_at) = (usual_total + rise, now);
        self.awake = awake;
        self.settle(now);
    }

    fn part(&mut self, slot: u32, now: u64, devices: f64) -> Part {
        let cohort = &mut self.slots[slot as usize];
        let usual = cohort.bounded_usual(devices, now);
        Part {
            slot,
            fresh: cohort.fresh,
            usual,
            unusual: cohort.usual(now) - usual,
            devices,
        }
    }

    /// The cohorts with the highest scores, at most [`SUSPECTS_MAX`] and one.
    fn suspects(&self, parts: &[Part]) -> Vec<Part> {
        let score = |part: &Part| self.slots[part.slot as usize].score;
        let mut suspects: Vec<_> = parts
            .iter()
            .filter(|part| score(part) > PROPOSE / 2.0)
            .copied()
            .collect();
        suspects.sort_by(|left, right| score(right).total_cmp(&score(left)));
        suspects.truncate(SUSPECTS_MAX + 1);
        suspects
    }

    /// Forgets domains that count again, and lets cohorts sleep.
    fn settle(&mut self, now: u64) {
        let forgets = now.is_multiple_of(DOMAINS_FORGOTTEN);
        let slots = &mut self.slots;
        self.awake.retain(|slot| {
            let cohort = &mut slots[*slot as usize];
            if forgets {
                let is_recent = |last: u64| last + IMPACT as u64 > now + 1;
                cohort
                    .domains
                    .retain(|_, seen| is_recent(seen.event) || is_recent(seen.again));
            }
            if cohort.score <= 0.0 && cohort.impact < 0.01 && cohort.domains.is_empty() {
                cohort.tenant = Tenant::default();
                cohort.is_awake = false;
            }
            cohort.is_awake
        });
    }
}

impl Slot {
    fn level(&self, devices: f64, fleet: f64) -> Option<Level> {
        let impact_min = (IMPACT_SHARE * devices).clamp(IMPACT_MIN, IMPACT_ENOUGH);
        let has_rest = fleet - devices >= (0.02 * fleet).max(IMPACT_MIN);
        if self.score <= PROPOSE || self.impact < impact_min || !has_rest {
            return None;
        }
        // A device that restarts once more after an update has one repeat, and no loop.
        let loops = self.impact_again >= impact_min / 2.0;
        Some(if self.score > APPLY && loops {
            Level::Apply
        } else {
            Level::Propose
        })
    }
}

/// Some cohorts in this second.
#[derive(Clone, Copy, Debug, Default)]
struct Part {
    slot: u32,
    fresh: f64,
    usual: f64,
    /// Part of the learned rate that is not taken for usual.
    unusual: f64,
    devices: f64,
}

impl Part {
    fn sum<'a>(parts: impl Iterator<Item = &'a Self>) -> Self {
        parts.take(SUSPECTS_MAX).fold(Self::default(), |sum, part| Self {
            slot: 0,
            fresh: sum.fresh + part.fresh,
            usual: sum.usual + part.usual,
            unusual: sum.unusual + part.unusual,
            devices: sum.devices + part.devices,
        })
    }

    /// Other suspects, which do not count as the rest of the fleet. None, if they are most of it: then there would be
    /// nothing to compare with.
    fn others(suspects: &[Self], own: &Self, fleet: f64) -> Self {
        let sum = Self::sum(suspects.iter().filter(|part| part.slot != own.slot));
        if sum.devices > (fleet - own.devices) / 2.0 {
            Self::default()
        } else {
            sum
        }
    }
}

/// Share of the fleet's events that is expected of a part: by what is usual, and at least by its devices.
fn share_of(part: &Part, usual_total: f64, fleet: f64) -> f64 {
    let usual_total = usual_total - part.unusual;
    let by_usual = if usual_total > 0.0 {
        part.usual / usual_total
    } else {
        0.0
    };
    let by_devices = if fleet > 0.0 { part.devices / fleet } else { 0.0 };
    by_usual.max(by_devices).min(1.0)
}
