//! Cohorts: devices of one model with one firmware version. Their sessions, attempts and look-up cost, and their metric series.
//!
//! Only an authenticated device makes a cohort; what strangers claim is counted under a cohort that exists, or under [`OTHER`].
//! Memory is bounded by [`COHORTS_MAX`]; cohorts beyond it share one row, `other`.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use seawall_proto::{admission::CohortTag, id::Label, refusal::Code};

mod series;

use self::series::{label, line};

/// Most cohorts with a row of their own. Further ones are counted as `other`.
pub const COHORTS_MAX: usize = 2_000;
/// Most names of tenants that are shared; further ones are each device's own.
pub const TENANTS_MAX: usize = 10_000;
/// So many names that find no room share one look for those that nobody has any more.
const TENANT_MISSES_PER_LOOK: usize = 1_000;
/// Most cohorts with metric series of their own (contract section 9).
pub const SERIES_MAX: usize = 50;
/// A cohort that was named within so many namings is not dropped: whoever named it is about to count there.
const INTERNED_LATELY: u64 = 1_000;
/// The row of everything without a row of its own.
pub const OTHER: &str = "other";
/// Written where a device names no firmware version or no model.
pub const NONE: &str = "(none)";
/// A cohort outside the series takes the place of one inside only with this many times its sessions: series then don't flap.
const HYSTERESIS: f64 = 1.2;

/// Outcomes counted for each cohort: admitted, abandoned, and the codes of refusals.
const OUTCOMES: usize = 2 + Code::ALL.len();

/// A model with a firmware version, and what its devices did.
#[derive(Debug)]
pub struct Cohort {
    pub model: Option<Arc<str>>,
    pub firmware: Option<Arc<str>>,
    /// Where there was no room for a row of its own: the row that counts instead.
    counted_in: Option<Arc<Cohort>>,
    /// The row of everything without a row of its own.
    is_rest: bool,
    sessions: AtomicUsize,
    attempts: [AtomicU64; OUTCOMES],
    /// Sessions of a device that had another session within the last minutes.
    repeats: AtomicU64,
    lookup_keys: AtomicU64,
    lookup_micros: AtomicU64,
    /// Its look-ups cost far more than the others', and are sent apart.
    is_costly: AtomicBool,
    shown: Mutex<Shown>,
    /// When it was named last, in [`Rows::interned`].
    interned: AtomicU64,
}

/// How far a cohort's attempts were shown in metrics. Counters never fall, whichever cohorts have series of their own: what was counted
/// under `other` stays there.
#[derive(Clone, Copy, Debug, Default)]
struct Shown {
    /// Of all attempts, shown somewhere.
    counted: [u64; OUTCOMES],
    /// Of those, shown in the cohort's own series.
    own: [u64; OUTCOMES],
}

/// What became of a connect attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Admitted,
    Abandoned,
    Refused(Code),
}

impl Outcome {
    /// Label `outcome` of `seawall_handshakes_total`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Admitted => "admitted",
            Self::Abandoned => "abandoned",
            Self::Refused(code) => code.as_str(),
        }
    }

    /// Its place among all outcomes: below [`OUTCOMES`].
    pub(crate) fn index(self) -> usize {
        match self {
            Self::Admitted => 0,
            Self::Abandoned => 1,
            Self::Refused(code) => 2 + Code::ALL.iter().position(|other| *other == code).unwrap_or(0),
        }
    }

    /// The outcome of this [`index`](Self::index).
    pub(crate) fn of_index(index: usize) -> Self {
        match index {
            0 => Self::Admitted,
            1 => Self::Abandoned,
            refused => Self::Refused(Code::ALL[(refused - 2).min(Code::ALL.len() - 1)]),
        }
    }

    fn all() -> impl Iterator<Item = Self> {
        [Self::Admitted, Self::Abandoned]
            .into_iter()
            .chain(Code::ALL.iter().map(|code| Self::Refused(*code)))
    }
}

impl Cohort {
    fn new(model: Option<&str>, firmware: Option<&str>, counted_in: Option<Arc<Self>>) -> Self {
        Self {
            model: model.map(Into::into),
            firmware: firmware.map(Into::into),
            counted_in,
            is_rest: false,
            sessions: AtomicUsize::new(0),
            attempts: [const { AtomicU64::new(0) }; OUTCOMES],
            repeats: AtomicU64::new(0),
            lookup_keys: AtomicU64::new(0),
            lookup_micros: AtomicU64::new(0),
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
        format!(
            "{}/{}",
            part(self.model.as_deref(), true),
            part(self.firmware.as_deref(), false)
        )
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

    pub fn repeated(&self) {
        self.row().repeats.fetch_add(1, Ordering::Relaxed);
    }

    /// One device's share of a look-up: it waited `micros` for the database.
    pub fn looked_up(&self, micros: u64) {
        let row = self.row();
        row.lookup_keys.fetch_add(1, Ordering::Relaxed);
        row.lookup_micros.fetch_add(micros, Ordering::Relaxed);
    }

    #[must_use]
    pub fn repeats(&self) -> u64 {
        self.repeats.load(Ordering::Relaxed)
    }

    /// Keys looked up, and the time devices waited for them, in seconds.
    #[must_use]
    pub fn lookup_cost(&self) -> (u64, f64) {
        let micros = self.lookup_micros.load(Ordering::Relaxed);
        (self.lookup_keys.load(Ordering::Relaxed), micros as f64 / 1e6)
    }

    /// Its look-ups cost far more than the others', and are sent apart.
    #[must_use]
    pub fn is_costly(&self) -> bool {
        self.is_costly.load(Ordering::Relaxed)
    }

    /// Notes whether its look-ups are sent apart; true if that is news.
    pub fn set_costly(&self, is_costly: bool) -> bool {
        self.is_costly.swap(is_costly, Ordering::Relaxed) != is_costly
    }

    /// What admission calls it: by what its devices say, which may leave the model to the registry.
    #[must_use]
    pub fn is_tagged(&self, tag: CohortTag) -> bool {
        let firmware = self.firmware.as_deref();
        !self.is_rest && (tag == CohortTag::of(self.model.as_deref(), firmware) || tag == CohortTag::of(None, firmware))
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

    /// The name of a tenant, in memory that all devices of the tenant share: beyond [`TENANTS_MAX`] names those that have devices here come first.
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

    /// The cohort series of `/metrics`: at most 50 cohorts, chosen by sessions with hysteresis, and the rest as `other`.
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

    /// Notes where the attempts since the last time are shown: in the cohort's own series if it has them now, else under `other`,
    /// whose figures these are.
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

    /// Keeps yesterday's choice but for cohorts that lost clearly to one outside.
    fn choose_series(&self, by_size: &[Arc<Cohort>]) -> Vec<Arc<Cohort>> {
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        let mut series = std::mem::take(&mut rows.series);
        series.retain(|cohort| by_size.iter().any(|other| Arc::ptr_eq(cohort, other)));
        for candidate in by_size.iter().filter(|cohort| !Arc::ptr_eq(cohort, &self.other)) {
            if series.iter().any(|chosen| Arc::ptr_eq(chosen, candidate)) {
                continue;
            }
            if series.len() < SERIES_MAX {
                series.push(Arc::clone(candidate));
                continue;
            }
            let Some((index, smallest)) = series
                .iter()
                .enumerate()
                .min_by_key(|(_, chosen)| chosen.sessions())
                .map(|(i, c)| (i, c.sessions()))
            else {
                break;
            };
            if candidate.sessions() as f64 <= smallest as f64 * HYSTERESIS {
                break;
            }
            series[index] = Arc::clone(candidate);
        }
        rows.series.clone_from(&series);
        series
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
    /// Makes room by dropping the cohort that was not named for longest, of those that nobody is connected with. False if there is none.
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
