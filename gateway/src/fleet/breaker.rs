//! The cohort breaker of this node: events of devices, and proposals. Start with [`CohortBreaker`].
//!
//! `seawall_proto::cohorts` decides. A task asks it once a second, and writes the rules.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash, Hasher as _},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use seawall_proto::{
    cohort::CohortTag,
    cohorts::{
        Action, Breaker, BreakerRule, Detector, Event, EventKind, Figure, Mode, Proposal, ProposalId, Sites, Totals,
        rule_for,
    },
    id::{DeviceId, Network, RuleId},
    rules::{RuleSet, RuleSpec, Subject},
    time::{Instant, WallTime},
};
use uuid::Uuid;

use crate::fleet::cohorts::{Cohort, Cohorts};

/// Maximum number of tenants whose names are known for evidence. Then all are forgotten.
const TENANTS_MAX: usize = 1_000;

/// Detector and proposals of this node.
#[derive(Debug)]
pub struct CohortBreaker {
    sites: Sites,
    machine: Mutex<Machine>,
}

#[derive(Debug)]
struct Machine {
    detector: Detector,
    breaker: Breaker,
    /// The cohorts with a row, by tag. Of several that are written differently, the one with most sessions.
    named: BTreeMap<CohortTag, Arc<Cohort>>,
    /// The cohort of each proposal, as it was written when the proposal was made.
    accused: BTreeMap<ProposalId, Accused>,
    /// Names of tenants by hash.
    tenants: HashMap<u64, Arc<str>>,
}

/// Cohort and tenant of a proposal.
#[derive(Debug)]
struct Accused {
    cohort: Arc<Cohort>,
    /// The tenant that its rule is for; `None`: for all.
    tenant: Option<Arc<str>>,
}

/// A device to which something happened.
#[derive(Clone, Copy, Debug)]
pub struct Of<'a> {
    pub device: DeviceId,
    pub address: IpAddr,
    pub cohort: &'a Cohort,
    /// `None` where it is not known.
    pub tenant: Option<&'a Arc<str>>,
}

/// A proposal as operators see it.
#[derive(Clone, Debug)]
pub struct Shown {
    pub proposal: Proposal,
    pub cohort: Arc<Cohort>,
    /// The tenant of nearly all events, if there is one.
    pub tenant: Option<Arc<str>>,
    /// The tenant that the rule is for; `None`: for all.
    pub rule_tenant: Option<Arc<str>>,
}

impl CohortBreaker {
    #[must_use]
    pub fn new(mode: Mode) -> Self {
        Self {
            sites: Sites::default(),
            machine: Mutex::new(Machine {
                detector: Detector::default(),
                breaker: Breaker::new(mode),
                named: BTreeMap::new(),
                accused: BTreeMap::new(),
                tenants: HashMap::new(),
            }),
        }
    }

    /// Changes what happens to a bad cohort from now on. Rules in force end at their own times.
    pub fn set_mode(&self, mode: Mode) {
        self.lock().breaker.set_mode(mode);
    }

    /// A session began. Takes no lock.
    pub fn handle_opened(&self, address: IpAddr) {
        self.sites.handle_opened(Network::from(address));
    }

    /// A session that was counted ended.
    pub fn handle_closed(&self, address: IpAddr) {
        self.sites.handle_closed(Network::from(address));
    }

    /// Counts a device's own failure. `sessions`: those of this node.
    pub fn handle_event(&self, kind: EventKind, of: &Of<'_>, is_again: bool, sessions: usize) {
        let tenant = of.tenant.map_or(0, hash);
        let event = Event {
            kind,
            cohort: of.cohort.tag(),
            domain: self.sites.domain(Network::from(of.address), of.device, sessions),
            tenant,
            is_again,
        };
        let mut machine = self.lock();
        if let Some(name) = of.tenant {
            machine.note_tenant(tenant, name);
        }
        machine.detector.handle_event(&event);
    }

    /// Ends a second: every cohort's rates are brought up to date, and proposals are made. Returns what to do. `gates`:
    /// see [`gates`].
    pub fn handle_second(
        &self,
        cohorts: &Cohorts,
        gates: &[BreakerRule],
        elapsed_seconds: f64,
        now: Instant,
    ) -> Vec<Action> {
        let rows = cohorts.rows();
        let mut work: BTreeMap<CohortTag, Work> = BTreeMap::new();
        let mut named = BTreeMap::new();
        for row in &rows {
            let fresh = row.tick(elapsed_seconds);
            if !row.is_rest() {
                work.entry(row.tag()).or_default().add(row, &fresh);
                named.entry(row.tag()).or_insert_with(|| Arc::clone(row));
            }
        }
        let mut machine = self.lock();
        let named_before = std::mem::replace(&mut machine.named, named);
        for (tag, work) in work {
            let done = (work.keys, work.micros, work.messages);
            machine.detector.handle_cohort(tag, work.model, work.sessions, done);
        }
        let findings = machine.detector.handle_second(now);
        let Machine {
            detector,
            breaker,
            named,
            accused,
            ..
        } = &mut *machine;
        let actions = breaker.handle_second(&findings, gates, detector, now, || ProposalId(Uuid::now_v7()));
        for action in &actions {
            if let Action::Opened(id) = action
                && let Some(proposal) = breaker.get(*id)
                // The row of a cohort may be gone since the last second.
                && let Some(cohort) = named.get(&proposal.cohort).or(named_before.get(&proposal.cohort))
            {
                let cohort = Arc::clone(cohort);
                accused.insert(*id, Accused { cohort, tenant: None });
            }
        }
        accused.retain(|id, _| breaker.get(*id).is_some());
        actions
    }

    /// A person wants the rule of an open proposal. False if it is not open, or its rule is being written.
    pub fn begin_apply(&self, id: ProposalId, now: Instant) -> bool {
        self.lock().breaker.begin_apply(id, now)
    }

    /// The rule of a proposal was written.
    pub fn handle_applied(&self, id: ProposalId, rule: RuleId, is_automatic: bool, now: Instant) {
        let Machine { detector, breaker, .. } = &mut *self.lock();
        breaker.handle_applied(id, rule, is_automatic, detector, now);
    }

    /// The rule of a proposal could not be written.
    pub fn handle_failed(&self, id: ProposalId, now: Instant) {
        self.lock().breaker.handle_failed(id, now);
    }

    /// Closes an open proposal. False if it is not open, or its rule is being written.
    pub fn dismiss(&self, id: ProposalId, now: Instant) -> bool {
        self.lock().breaker.handle_dismissed(id, now)
    }

    /// The rule of a proposal is for this tenant alone.
    pub fn narrow(&self, id: ProposalId, tenant: &Arc<str>) {
        if let Some(accused) = self.lock().accused.get_mut(&id) {
            accused.tenant = Some(Arc::clone(tenant));
        }
    }

    /// All proposals, newest first.
    #[must_use]
    pub fn proposals(&self) -> Vec<Shown> {
        let machine = self.lock();
        let shown = machine
            .breaker
            .proposals()
            .filter_map(|proposal| machine.shown(proposal));
        shown.collect()
    }

    #[must_use]
    pub fn proposal(&self, id: ProposalId) -> Option<Shown> {
        let machine = self.lock();
        machine.shown(machine.breaker.get(id)?)
    }

    /// State of a cohort's breaker: `closed`, `proposed` or `open`; and how far the cohort stands out.
    #[must_use]
    pub fn state(&self, cohort: &Cohort) -> (&'static str, f64) {
        if cohort.is_rest() {
            return ("closed", 0.0);
        }
        let machine = self.lock();
        (
            machine.breaker.state(cohort.tag()),
            machine.detector.stands_out(cohort.tag()),
        )
    }

    /// Whether a rule matches devices of this cohort only. A cohort without a model shares its versions with models.
    #[must_use]
    pub fn is_exact(&self, spec: &RuleSpec, cohort: &Cohort) -> bool {
        let mut spec = spec.clone();
        // Cohorts are of all tenants.
        spec.matches.tenant = None;
        let machine = self.lock();
        let mut others = machine.named.iter().filter(|(tag, _)| **tag != cohort.tag());
        others.all(|(_, other)| !spec.is_for(&subject(other)))
    }

    fn lock(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Machine {
    fn note_tenant(&mut self, hash: u64, name: &Arc<str>) {
        if self.tenants.len() >= TENANTS_MAX && !self.tenants.contains_key(&hash) {
            self.tenants.clear();
        }
        self.tenants.entry(hash).or_insert_with(|| Arc::clone(name));
    }

    fn shown(&self, proposal: &Proposal) -> Option<Shown> {
        let tenant = proposal.evidence.tenant.and_then(|hash| self.tenants.get(&hash));
        let accused = self.accused.get(&proposal.id)?;
        Some(Shown {
            proposal: *proposal,
            cohort: Arc::clone(&accused.cohort),
            tenant: tenant.cloned(),
            rule_tenant: accused.tenant.clone(),
        })
    }
}

impl Shown {
    /// The rule that the breaker would make: it admits a tenth of the cohort, or of one tenant's devices in it, for 15
    /// minutes. `None` if no range can match the version.
    #[must_use]
    pub fn rule(&self, wall: WallTime) -> Option<RuleSpec> {
        let cohort = &self.cohort;
        let tenant = self.rule_tenant.as_deref();
        rule_for(cohort.model.as_deref(), cohort.firmware.as_deref(), tenant, wall)
    }
}

/// The rules of the breaker in a set, whichever node made them. Those that a person has changed are left out.
#[must_use]
pub fn gates(rules: &RuleSet, wall: WallTime) -> Vec<BreakerRule> {
    let own = rules.rules().iter().filter_map(|rule| BreakerRule::of(rule, wall));
    own.collect()
}

fn subject(cohort: &Cohort) -> Subject<'_> {
    Subject {
        device: None,
        firmware: cohort.firmware.as_deref(),
        model: cohort.model.as_deref(),
        tenant: None,
    }
}

/// What the rows of one cohort did in a second.
#[derive(Debug, Default)]
struct Work {
    model: u64,
    sessions: usize,
    keys: u32,
    micros: u64,
    messages: u64,
}

impl Work {
    fn add(&mut self, row: &Cohort, fresh: &Totals) {
        self.model = hash(&row.model);
        self.sessions += row.sessions();
        let keys = u32::try_from(fresh.figure(Figure::LookupKeys)).unwrap_or(u32::MAX);
        self.keys = self.keys.saturating_add(keys);
        self.micros += fresh.figure(Figure::LookupMicros);
        self.messages += fresh.figure(Figure::Messages);
    }
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests;
