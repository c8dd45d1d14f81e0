//! Cohorts: devices of one model with one firmware version. Their sessions, attempts and look-up cost, and their metric
//! series.
//!
//! Only an authenticated device creates a cohort. Claims of unknown devices are counted under a cohort that exists, or
//! under [`OTHER`]. Memory is bounded by [`COHORTS_MAX`]; cohorts beyond it share one row, `other`.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

pub use seawall_proto::cohorts::Outcome;
use seawall_proto::{
    cohort::{CohortTag, Kind, choose},
    cohorts::{Figure, Rates, STATEMENT_PARTS, Totals},
    id::Label,
};

mod series;

use self::series::{label, line};

/// Most cohorts with a row of their own. Further ones are counted as `other`.
pub const COHORTS_MAX: usize = 2_000;
/// Most names of tenants that are shared; further ones are each device's own.
pub const TENANTS_MAX: usize = 10_000;
/// So many names that find no room share one look for those that nobody has any more.
const TENANT_MISSES_PER_LOOK: usize = 1_000;
/// Most cohorts with metric series of their own.
pub const SERIES_MAX: usize = 50;
/// A cohort that was named within this many namings is not dropped: its device is about to be counted there.
const INTERNED_LATELY: u64 = 1_000;
/// The row of everything without a row of its own.
pub const OTHER: &str = "other";
/// Written where a device names no firmware version or no model.
pub const NONE: &str = "(none)";

const OUTCOMES: usize = Outcome::COUNT;

/// A model with a firmware version, and what its devices did.
#[derive(Debug)]
pub struct Cohort {
    pub model: Option<Arc<str>>,
    pub firmware: Option<Arc<str>>,
    tag: CohortTag,
    kind: Kind,
    /// Whether some of its devices name their model, by which admission tells them apart.
    names_model: AtomicBool,
    /// Whether some of its devices leave their model to the registry.
    leaves_model: AtomicBool,
    /// Where there was no room for a row of its own: the row that counts instead.
    counted_in: Option<Arc<Cohort>>,
    /// The row of everything without a row of its own.
    is_rest: bool,
    sessions: AtomicUsize,
    attempts: [AtomicU64; OUTCOMES],
    figures: [AtomicU64; Figure::ALL.len()],
    paced: Mutex<Paced>,
    /// Its look-ups cost far more than the others', and are sent apart.
    is_costly: AtomicBool,
    shown: Mutex<Shown>,
    /// When it was named last, in [`Rows::interned`].
    interned: AtomicU64,
}

/// Rates, and the totals that they are of.
#[derive(Debug, Default)]
struct Paced {
    totals: Totals,
    rates: Rates,
}

/// How far a cohort's attempts were shown in metrics. Counters never fall, whichever cohorts have series of their own:
/// what was counted under `other` stays there.
#[derive(Clone, Copy, Debug, Default)]
struct Shown {
    /// Of all attempts, shown somewhere.
    counted: [u64; OUTCOMES],
    /// Of those, shown in the cohort's own series.
    own: [u64; OUTCOMES],
}

impl Cohort {
    fn new(model: Option<&str>, firmware: Option<&str>, counted_in: Option<Arc<Self>>) -> Self {
        Self {
            model: model.map(Into::into),
            firmware: firmware.map(Into::into),
            tag: CohortTag::confirmed(model, firmware),
            kind: Kind::of(model, firmware),
            names_model: AtomicBool::new(false),
            leaves_model: AtomicBool::new(false),
            counted_in,
            is_rest: false,
            sessions: AtomicUsize::new(0),
            attempts: [const { AtomicU64::new(0) }; OUTCOMES],
            figures: [const { AtomicU64::new(0) }; Figure::ALL.len()],
            paced: Mutex::default(),
            is_costly: AtomicBool::new(false),
            shown: Mutex::default(),
            interned: AtomicU64::new(0),
        }
    }

    fn row(&self) -> &Self {
        self.counted_in.as_deref().unwrap_or(self)
    }

    /// `model/version`, as operators read it.
    #[must_use]
    pub fn name(&self) -> String {
        if self.is_rest {
            return OTHER.to_owned();
        }
        name_of(self.model.as_deref(), self.firmware.as_deref())
    }

    /// Hands out the attempts that were not shown yet, and notes them as shown: in series of its own, or elsewhere.
    fn show(&self, in_own_series: bool) -> [u64; OUTCOMES] {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let mut fresh = [0; OUTCOMES];
        for (index, attempts) in self.attempts.iter().enumerate() {
            let counted = attempts.load(Ordering::Relaxed);
            fresh[index] = counted - shown.counted[index];
            shown.counted[index] = counted;
            if in_own_series {
                shown.own[index] += fresh[index];
            }
        }
        fresh
    }

    /// Attempts shown in series of its own, by outcome; those that never happened left out.
    fn own_series(&self) -> Vec<(&'static str, u64)> {
        let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        named(&shown.own)
    }

    pub fn session_opened(&self) {
        self.row().sessions.fetch_add(1, Ordering::Relaxed);
    }

    pub fn session_closed(&self) {
        self.row().sessions.fetch_sub(1, Ordering::Relaxed);
    }

    #[must_use]
    pub fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }

    pub fn attempted(&self, outcome: Outcome) {
        self.row().attempts[outcome.index()].fetch_add(1, Ordering::Relaxed);
    }

    /// Adds to a figure.
    pub fn count(&self, figure: Figure, count: u64) {
        self.row().figures[figure as usize].fetch_add(count, Ordering::Relaxed);
    }

    /// One device's share of a look-up: it waited `micros` for the database, and its statement had this many keys.
    pub fn looked_up(&self, micros: u64, keys: u32) {
        self.count(Figure::LookupKeys, 1);
        self.count(Figure::LookupMicros, micros);
        self.count(Figure::StatementParts, STATEMENT_PARTS / u64::from(keys.max(1)));
    }

    /// Total of a figure since the cohort is known.
    #[must_use]
    pub fn figure(&self, figure: Figure) -> u64 {
        self.figures[figure as usize].load(Ordering::Relaxed)
    }

    /// Keys looked up, the time devices waited for them, in seconds, and the statements.
    #[must_use]
    pub fn lookup_cost(&self) -> (u64, f64, f64) {
        let micros = self.figure(Figure::LookupMicros);
        let statements = self.figure(Figure::StatementParts) as f64 / STATEMENT_PARTS as f64;
        (self.figure(Figure::LookupKeys), micros as f64 / 1e6, statements)
    }

    /// Brings the rates up to date, `seconds` after the last time, and returns what happened since.
    pub(super) fn tick(&self, seconds: f64) -> Totals {
        let attempts = |outcome: Outcome| self.attempts[outcome.index()].load(Ordering::Relaxed);
        let totals = Totals::of(attempts, |figure| self.figure(figure));
        let mut paced = self.paced.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = totals.since(&paced.totals);
        paced.totals = totals;
        paced.rates.handle(&fresh, seconds);
        fresh
    }

    /// Its rates, at most a second old.
    #[must_use]
    pub fn rates(&self) -> Rates {
        self.paced.lock().unwrap_or_else(PoisonError::into_inner).rates
    }

    /// The row of everything without a row of its own.
    #[must_use]
    pub const fn is_rest(&self) -> bool {
        self.is_rest
    }

    /// Its look-ups cost far more than the others', and are sent apart.
    #[must_use]
    pub fn is_costly(&self) -> bool {
        self.is_costly.load(Ordering::Relaxed)
    }

    /// Notes whether its look-ups are sent apart.
    pub fn set_costly(&self, is_costly: bool) {
        self.is_costly.store(is_costly, Ordering::Relaxed);
    }

    /// Tag of its model and version: versions that are written differently may share it.
    #[must_use]
    pub const fn tag(&self) -> CohortTag {
        self.tag
    }

    /// The cohort for comparisons between versions.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Notes that one of its devices was looked up under `claimed`.
    pub fn claimed_as(&self, claimed: CohortTag) {
        let is_named = claimed == self.tag.claimed();
        let noted = if is_named {
            &self.names_model
        } else {
            &self.leaves_model
        };
        noted.store(true, Ordering::Relaxed);
    }

    /// Whether admission looks some of its devices up under `claimed`.
    #[must_use]
    pub fn is_claimed_as(&self, claimed: CohortTag) -> bool {
        let is_noted = |noted: &AtomicBool| noted.load(Ordering::Relaxed);
        (is_noted(&self.names_model) && claimed == self.tag.claimed())
            || (is_noted(&self.leaves_model) && claimed == self.kind.unnamed)
    }

    /// Attempts by outcome, those that never happened left out.
    #[must_use]
    pub fn attempts(&self) -> Vec<(&'static str, u64)> {
        named(&std::array::from_fn(|index| {
            self.attempts[index].load(Ordering::Relaxed)
        }))
    }
}

/// All cohorts of this node.
#[derive(Debug)]
pub struct Cohorts {
    rows: Mutex<Rows>,
    other: Arc<Cohort>,
    tenants: Mutex<Tenants>,
}

/// Names of tenants that their devices share.
#[derive(Debug, Default)]
struct Tenants {
    names: HashSet<Arc<str>>,
    /// Names that found no room since the last look for those that nobody has any more.
    missed: usize,
}

/// Model and firmware version, as the device or the registry names them.
type Name = (Option<Box<str>>, Option<Box<str>>);

#[derive(Debug, Default)]
struct Rows {
    by_name: HashMap<Name, Arc<Cohort>>,
    series: Vec<Arc<Cohort>>,
    /// How often authenticated devices named a cohort.
    interned: u64,
    /// Attempts shown under `other`.
    other: [u64; OUTCOMES],
}

impl Default for Cohorts {
    fn default() -> Self {
        Self::new()
    }
}

impl Cohorts {
    #[must_use]
    pub fn new() -> Self {
        Self {
            rows: Mutex::default(),
            other: Arc::new(Cohort {
                is_rest: true,
                ..Cohort::new(None, None, None)
            }),
            tenants: Mutex::default(),
        }
    }

    /// The name of a tenant, in memory that all devices of the tenant share: beyond [`TENANTS_MAX`] names those that
    /// have devices here come first.
    pub fn tenant(&self, name: &Label) -> Arc<str> {
        self.tenants
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .share(name.as_arc())
    }

    /// The cohort of an authenticated device; with a row of its own if there is room, else counted in `other`.
    pub fn intern(&self, model: Option<&str>, firmware: Option<&str>) -> Arc<Cohort> {
        let name: Name = (model.map(Into::into), firmware.map(Into::into));
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        rows.interned += 1;
        if let Some(cohort) = rows.by_name.get(&name) {
            cohort.interned.store(rows.interned, Ordering::Relaxed);
            return Arc::clone(cohort);
        }
        if rows.by_name.len() >= COHORTS_MAX && !rows.forget_idle() {
            return Arc::new(Cohort::new(model, firmware, Some(Arc::clone(&self.other))));
        }
        let cohort = Arc::new(Cohort::new(model, firmware, None));
        cohort.interned.store(rows.interned, Ordering::Relaxed);
        rows.by_name.insert(name, Arc::clone(&cohort));
        cohort
    }

    /// The cohort that a claim names, if authenticated devices made it; else `other`. For counting attempts.
    #[must_use]
    pub fn known(&self, model: Option<&str>, firmware: Option<&str>) -> Arc<Cohort> {
        let name: Name = (model.map(Into::into), firmware.map(Into::into));
        let rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(rows.by_name.get(&name).unwrap_or(&self.other))
    }

    /// Every cohort, largest first, and `other` last.
    #[must_use]
    pub fn rows(&self) -> Vec<Arc<Cohort>> {
        let rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = rows.by_name.values().cloned().collect();
        drop(rows);
        all.sort_by_cached_key(|cohort| (std::cmp::Reverse(cohort.sessions()), cohort.name()));
        all.push(Arc::clone(&self.other));
        all
    }

    /// The cohort series of `/metrics`: at most 50 cohorts, chosen by sessions with hysteresis, and the rest as
    /// `other`.
    #[must_use]
    pub fn render(&self) -> String {
        let all = self.rows();
        let series = self.choose_series(&all);
        let other = self.settle(&all);
        let is_in = |cohort: &Arc<Cohort>| series.iter().any(|chosen| Arc::ptr_eq(cohort, chosen));
        let rest_sessions: usize = all
            .iter()
            .filter(|cohort| !is_in(cohort))
            .map(|cohort| cohort.sessions())
            .sum();

        let mut text = String::from("# HELP seawall_cohort_sessions Live sessions by cohort (model/version).\n");
        text.push_str("# TYPE seawall_cohort_sessions gauge\n");
        for cohort in &series {
            line(
                &mut text,
                "seawall_cohort_sessions",
                &label(&cohort.name()),
                None,
                cohort.sessions() as u64,
            );
        }
        line(&mut text, "seawall_cohort_sessions", OTHER, None, rest_sessions as u64);
        text.push_str("\n# HELP seawall_cohort_handshakes_total Connect attempts by cohort and outcome.\n");
        text.push_str("# TYPE seawall_cohort_handshakes_total counter\n");
        for cohort in &series {
            let name = label(&cohort.name());
            for (outcome, n) in cohort.own_series() {
                line(&mut text, "seawall_cohort_handshakes_total", &name, Some(outcome), n);
            }
        }
        for (outcome, n) in named(&other) {
            line(&mut text, "seawall_cohort_handshakes_total", OTHER, Some(outcome), n);
        }
        text.push('\n');
        text
    }

    /// Notes where the attempts since the last time are shown: in the cohort's own series if it has them now, else
    /// under `other`, whose figures these are.
    fn settle(&self, all: &[Arc<Cohort>]) -> [u64; OUTCOMES] {
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        for cohort in all {
            let has_series = rows.series.iter().any(|chosen| Arc::ptr_eq(cohort, chosen));
            let fresh = cohort.show(has_series);
            if !has_series {
                rows.add_to_other(&fresh);
            }
        }
        rows.other
    }

    /// The cohorts with series of their own from now on.
    fn choose_series(&self, by_size: &[Arc<Cohort>]) -> Vec<Arc<Cohort>> {
        // `other` is the last.
        let named = by_size.split_last().map_or(by_size, |(_, named)| named);
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        let chosen = std::mem::take(&mut rows.series);
        rows.series = choose(chosen, named, SERIES_MAX, |cohort| cohort.sessions(), Arc::ptr_eq);
        rows.series.clone()
    }
}

impl Tenants {
    fn share(&mut self, name: &Arc<str>) -> Arc<str> {
        if let Some(tenant) = self.names.get(name) {
            return Arc::clone(tenant);
        }
        if self.names.len() >= TENANTS_MAX {
            // Each look goes through all of them: so one look for many names that find no room.
            if self.missed.is_multiple_of(TENANT_MISSES_PER_LOOK) {
                self.names.retain(|tenant| Arc::strong_count(tenant) > 1);
            }
            self.missed = self.missed.wrapping_add(1);
        }
        if self.names.len() < TENANTS_MAX {
            self.names.insert(Arc::clone(name));
            self.missed = 0;
        }
        Arc::clone(name)
    }
}

impl Rows {
    /// Makes room by dropping the cohort that was not named for longest, of those that nobody is connected with. False
    /// if there is none.
    fn forget_idle(&mut self) -> bool {
        let named = |cohort: &Cohort| cohort.interned.load(Ordering::Relaxed);
        let idle = self
            .by_name
            .iter()
            .filter(|(_, cohort)| cohort.sessions() == 0 && named(cohort) + INTERNED_LATELY < self.interned)
            .min_by_key(|(_, cohort)| named(cohort))
            .map(|(name, _)| name.clone());
        let Some(forgotten) = idle.and_then(|name| self.by_name.remove(&name)) else {
            return false;
        };
        self.add_to_other(&forgotten.show(false));
        true
    }

    fn add_to_other(&mut self, attempts: &[u64; OUTCOMES]) {
        for (other, fresh) in self.other.iter_mut().zip(attempts) {
            *other += fresh;
        }
    }
}

/// By outcome; those that never happened left out.
fn named(attempts: &[u64; OUTCOMES]) -> Vec<(&'static str, u64)> {
    Outcome::all()
        .map(|outcome| (outcome.as_str(), attempts[outcome.index()]))
        .filter(|(_, n)| *n > 0)
        .collect()
}

/// `model/version`, as operators read it.
#[must_use]
pub fn name_of(model: Option<&str>, firmware: Option<&str>) -> String {
    format!("{}/{}", part(model, true), part(firmware, false))
}

/// A model or a version within a cohort's name: what would make two cohorts look alike is percent-encoded.
fn part(text: Option<&str>, is_model: bool) -> Cow<'_, str> {
    match text {
        None => NONE.into(),
        Some(NONE) => "%28none%29".into(),
        // The first slash parts model and version, so that a version may have some.
        Some(text) if is_model && text.contains(['/', '%']) => text.replace('%', "%25").replace('/', "%2F").into(),
        Some(text) if text.starts_with("%28") => text.replace('%', "%25").into(),
        Some(text) => text.into(),
    }
}

#[cfg(test)]
mod tests;
