//! Cohorts: devices of one model with one firmware version. Their sessions, attempts and look-up cost, and their metric series.
//!
//! Only an authenticated device makes a cohort; what strangers claim is counted under a cohort that exists, or under [`OTHER`].
//! Memory is bounded by [`COHORTS_MAX`]; cohorts beyond it share one row, `other`.

use std::{
    collections::HashMap,
    fmt::Write as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use seawall_proto::{admission::CohortTag, refusal::Code};

/// Most cohorts with a row of their own. Further ones are counted as `other`.
pub const COHORTS_MAX: usize = 2_000;
/// Most cohorts with metric series of their own (contract section 9).
pub const SERIES_MAX: usize = 50;
/// The row of everything without a row of its own.
pub const OTHER: &str = "other";
/// Written where a device names no firmware version or no model.
pub const NONE: &str = "(none)";
/// A cohort outside the series takes the place of one inside only with this many times its sessions: series then don't flap.
const HYSTERESIS: f64 = 1.2;
/// Longest value of the label `cohort`, in bytes.
const LABEL_LEN_MAX: usize = 64;

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

    fn index(self) -> usize {
        match self {
            Self::Admitted => 0,
            Self::Abandoned => 1,
            Self::Refused(code) => 2 + Code::ALL.iter().position(|other| *other == code).unwrap_or(0),
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
            self.model.as_deref().unwrap_or(NONE),
            self.firmware.as_deref().unwrap_or(NONE)
        )
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
        Outcome::all()
            .map(|outcome| (outcome.as_str(), self.attempts[outcome.index()].load(Ordering::Relaxed)))
            .filter(|(_, n)| *n > 0)
            .collect()
    }
}

/// All cohorts of this node.
#[derive(Debug)]
pub struct Cohorts {
    rows: Mutex<Rows>,
    other: Arc<Cohort>,
}

/// Model and firmware version, as the device or the registry names them.
type Name = (Option<Box<str>>, Option<Box<str>>);

#[derive(Debug, Default)]
struct Rows {
    by_name: HashMap<Name, Arc<Cohort>>,
    series: Vec<Arc<Cohort>>,
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
        }
    }

    /// The cohort of an authenticated device; with a row of its own if there is room, else counted in `other`.
    pub fn intern(&self, model: Option<&str>, firmware: Option<&str>) -> Arc<Cohort> {
        let name: Name = (model.map(Into::into), firmware.map(Into::into));
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cohort) = rows.by_name.get(&name) {
            return Arc::clone(cohort);
        }
        if rows.by_name.len() >= COHORTS_MAX && !rows.forget_idle() {
            return Arc::new(Cohort::new(model, firmware, Some(Arc::clone(&self.other))));
        }
        let cohort = Arc::new(Cohort::new(model, firmware, None));
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
        let mut rest_sessions = 0;
        let mut rest_attempts: Vec<(&'static str, u64)> = Outcome::all().map(|outcome| (outcome.as_str(), 0)).collect();
        for cohort in all
            .iter()
            .filter(|cohort| !series.iter().any(|other| Arc::ptr_eq(cohort, other)))
        {
            rest_sessions += cohort.sessions();
            for (outcome, n) in cohort.attempts() {
                if let Some(slot) = rest_attempts.iter_mut().find(|(name, _)| *name == outcome) {
                    slot.1 += n;
                }
            }
        }

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
            for (outcome, n) in cohort.attempts() {
                line(&mut text, "seawall_cohort_handshakes_total", &name, Some(outcome), n);
            }
        }
        for (outcome, n) in rest_attempts.into_iter().filter(|(_, n)| *n > 0) {
            line(&mut text, "seawall_cohort_handshakes_total", OTHER, Some(outcome), n);
        }
        text.push('\n');
        text
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

impl Rows {
    /// Makes room by dropping a cohort that nobody is connected with. False if there is none.
    fn forget_idle(&mut self) -> bool {
        let idle = self
            .by_name
            .iter()
            .find(|(_, cohort)| cohort.sessions() == 0)
            .map(|(name, _)| name.clone());
        idle.is_some_and(|name| self.by_name.remove(&name).is_some())
    }
}

fn line(text: &mut String, metric: &str, cohort: &str, outcome: Option<&str>, figure: u64) {
    let written = match outcome {
        None => writeln!(text, "{metric}{{cohort=\"{cohort}\"}} {figure}"),
        Some(outcome) => writeln!(text, "{metric}{{cohort=\"{cohort}\",outcome=\"{outcome}\"}} {figure}"),
    };
    debug_assert!(written.is_ok(), "writing to a string does not fail");
}

/// Escaped for the exposition format, and cut to 64 bytes between characters and escapes.
fn label(name: &str) -> String {
    let mut escaped = String::new();
    for character in name.chars() {
        let piece: &str = match character {
            '\\' => "\\\\",
            '"' => "\\\"",
            '\n' => "\\n",
            other => &String::from(other),
        };
        if escaped.len() + piece.len() > LABEL_LEN_MAX {
            break;
        }
        escaped.push_str(piece);
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_cannot_make_a_cohort() {
        let cohorts = Cohorts::new();

        cohorts
            .known(None, Some("evil"))
            .attempted(Outcome::Refused(Code::Unauthorized));

        assert_eq!(cohorts.rows().len(), 1);
        assert!(
            cohorts
                .render()
                .contains("cohort=\"other\",outcome=\"unauthorized\"} 1")
        );
    }

    #[test]
    fn series_are_bounded_and_do_not_flap() {
        let cohorts = Cohorts::new();
        for n in 0..60 {
            let cohort = cohorts.intern(Some("m"), Some(&format!("1.{n}")));
            (0..100).for_each(|_| cohort.session_opened());
        }
        let first = cohorts.render();

        cohorts.intern(Some("m"), Some("1.59")).session_opened();
        let second = cohorts.render();
        (0..50).for_each(|_| cohorts.intern(Some("m"), Some("1.59")).session_opened());
        let third = cohorts.render();

        assert_eq!(first.matches("seawall_cohort_sessions{").count(), SERIES_MAX + 1);
        let names = |text: &str| text.lines().filter(|l| l.starts_with("seawall_cohort_s")).count();
        assert_eq!(names(&second), names(&first));
        assert!(!second.contains("m/1.59"), "one session more is not enough");
        assert!(third.contains("m/1.59"), "half as many more is");
    }

    #[test]
    fn rows_are_bounded_and_idle_ones_make_room() {
        let cohorts = Cohorts::new();
        for n in 0..COHORTS_MAX {
            cohorts.intern(None, Some(&n.to_string())).session_opened();
        }

        let beyond = cohorts.intern(None, Some("beyond"));
        beyond.session_opened();
        assert_eq!(
            beyond.firmware.as_deref(),
            Some("beyond"),
            "rules still see the version"
        );
        assert_eq!(cohorts.rows().last().unwrap().sessions(), 1);
        beyond.session_closed();
        cohorts.known(None, Some("7")).session_closed();

        assert_eq!(cohorts.intern(None, Some("beyond")).name(), "(none)/beyond");
        assert!(cohorts.known(None, Some("7")).firmware.is_none(), "its row went");
        assert_eq!(cohorts.rows().len(), COHORTS_MAX + 1);
    }

    #[test]
    fn labels_are_escaped_and_short() {
        assert_eq!(label("a\"b\\c"), "a\\\"b\\\\c");
        assert_eq!(label(&"\"".repeat(100)).len(), LABEL_LEN_MAX);
    }
}
