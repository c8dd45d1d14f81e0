//! Stops a run at the first sign that it harms a gateway that runs already.
//!
//! [`Watch`] looks at the gateway each second, and [`Rule`] decides. docs/SCENARIOS.md states the rule.

use std::{
    collections::VecDeque,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::{Ops, State},
    recorder::Recorder,
};

/// How often the gateway is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A gateway that gives no good answer for this long has been harmed: a single late answer is none.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Time for which other devices must be missing: a single one may leave and return at any time.
const MISSING_FOR: Duration = Duration::from_secs(5);
/// Part of the sessions of other devices that may be missing, and their number that may.
const MISSING_PART_MAX: f64 = 0.05;
const MISSING_MAX: u64 = 4;
/// Time over which attempts are averaged.
const RATE_OVER: Duration = Duration::from_secs(5);
/// The alarm that a scenario raises on purpose, with devices of a bad version.
const ALARM_EXPECTED: &str = "bad_cohort";

/// Looks until it is dropped.
#[derive(Debug)]
pub struct Watch {
    reason: Arc<OnceLock<String>>,
    ends: Arc<AtomicBool>,
}

/// One look.
#[derive(Clone, Debug)]
struct Look {
    at: Instant,
    /// `None`: no answer, or none of success.
    state: Option<State>,
    /// Devices of the load test that are connected, as far as they know.
    connected: u64,
    /// Attempts that they have made so far.
    attempts: u64,
}

/// The rule, and what it remembers.
#[derive(Debug)]
struct Rule {
    /// Before the first device of ours.
    first: State,
    per_second_max: Option<f64>,
    answered_at: Instant,
    missing_since: Option<Instant>,
    /// Time and attempts of the looks within [`RATE_OVER`], and the last one before.
    attempts: VecDeque<(Instant, u64)>,
}

impl Watch {
    /// Looks once, before the devices of the load test are there, and then on a thread of its own. It cancels `stop` if
    /// there is a reason.
    ///
    /// # Errors
    /// The gateway does not tell how it is.
    pub async fn start(
        ops: &Ops,
        recorder: &Arc<Recorder>,
        per_second_max: Option<f64>,
        stop: &CancellationToken,
    ) -> Result<Self> {
        let first = tokio::task::spawn_blocking({
            let ops = ops.clone();
            move || ops.state()
        })
        .await
        .context("the task that asks")?
        .context("looking at the gateway before the run")?;
        let watch = Self {
            reason: Arc::new(OnceLock::new()),
            ends: Arc::new(AtomicBool::new(false)),
        };
        let (reason, ends) = (Arc::clone(&watch.reason), Arc::clone(&watch.ends));
        let (ops, recorder, stop) = (ops.clone(), Arc::clone(recorder), stop.clone());
        let mut rule = Rule::new(first, per_second_max, Instant::now());
        std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK_EVERY);
                // The count of ours comes first: a session that ends in between is not missed.
                let (connected, attempts) = (recorder.standing().connected, recorder.attempts());
                let state = ops.state().ok();
                let at = Instant::now();
                let connected = connected.min(recorder.standing().connected);
                let look = Look {
                    at,
                    state,
                    connected,
                    attempts,
                };
                if let Some(harm) = rule.judge(&look) {
                    let _ = reason.set(harm); // the first reason stays
                    stop.cancel();
                    return;
                }
            }
        });
        Ok(watch)
    }

    /// Why the run must stop.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
    }
}

impl Rule {
    fn new(first: State, per_second_max: Option<f64>, now: Instant) -> Self {
        Self {
            first,
            per_second_max,
            answered_at: now,
            missing_since: None,
            attempts: VecDeque::from([(now, 0)]),
        }
    }

    fn judge(&mut self, look: &Look) -> Option<String> {
        if let Some(harm) = self.too_many_attempts(look) {
            return Some(harm);
        }
        let Some(state) = &look.state else {
            let silence = look.at.saturating_duration_since(self.answered_at);
            return (silence >= SILENCE_MAX).then(|| {
                format!(
                    "its API has given no good answer for {} s (allowed: {} s)",
                    silence.as_secs(),
                    SILENCE_MAX.as_secs()
                )
            });
        };
        self.answered_at = look.at;
        let is_new =
            |alarm: &&String| !self.first.critical_alarms.contains(alarm) && !alarm.starts_with(ALARM_EXPECTED);
        if let Some(alarm) = state.critical_alarms.iter().find(is_new) {
            return Some(format!("it raised the critical alarm {alarm}"));
        }
        let (before, now) = (self.first.sessions, state.sessions.saturating_sub(look.connected));
        let missing = before.saturating_sub(now);
        #[expect(clippy::cast_precision_loss, reason = "sessions of a gateway are far below 2^52")]
        let is_much = missing as f64 > MISSING_PART_MAX * before as f64;
        if missing <= MISSING_MAX || !is_much {
            self.missing_since = None;
            return None;
        }
        let since = *self.missing_since.get_or_insert(look.at);
        (look.at.saturating_duration_since(since) >= MISSING_FOR).then(|| {
            format!(
                "{missing} of the {before} devices that were connected before the run have lost their sessions for {} s",
                MISSING_FOR.as_secs()
            )
        })
    }

    fn too_many_attempts(&mut self, look: &Look) -> Option<String> {
        self.attempts.push_back((look.at, look.attempts));
        let is_old = |at: &Instant| look.at.saturating_duration_since(*at) >= RATE_OVER;
        // The oldest that is kept is the one from which the average begins.
        while self.attempts.get(1).is_some_and(|(at, _)| is_old(at)) {
            self.attempts.pop_front();
        }
        let (at, attempts) = self.attempts.front().copied().filter(|(at, _)| is_old(at))?;
        #[expect(clippy::cast_precision_loss, reason = "attempts of a load test are far below 2^52")]
        let made = look.attempts.saturating_sub(attempts) as f64;
        let rate = made / look.at.saturating_duration_since(at).as_secs_f64();
        let most = self.per_second_max.filter(|most| rate > *most)?;
        Some(format!(
            "the devices made {rate:.0} attempts per second over {} s, and at most {most} are allowed (--max-per-second)",
            RATE_OVER.as_secs()
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Script {
        rule: Rule,
        now: Instant,
        attempts: u64,
    }

    impl Script {
        fn new(sessions: u64, alarms: &[&str], per_second_max: Option<f64>) -> Self {
            let now = Instant::now();
            Self {
                rule: Rule::new(state(sessions, alarms), per_second_max, now),
                now,
                attempts: 0,
            }
        }

        /// A look a second later.
        fn look(&mut self, state: Option<State>, connected: u64, attempts: u64) -> Option<String> {
            self.now += LOOK_EVERY;
            self.attempts += attempts;
            self.rule.judge(&Look {
                at: self.now,
                state,
                connected,
                attempts: self.attempts,
            })
        }
    }

    fn state(sessions: u64, alarms: &[&str]) -> State {
        State {
            sessions,
            critical_alarms: alarms.iter().map(|alarm| (*alarm).to_owned()).collect(),
        }
    }

    #[test]
    fn storm_of_the_load_tests_own_devices_harms_nobody() {
        let mut script = Script::new(100, &["disk_full (node)"], None);

        for (sessions, connected) in [
            (100, 0),
            (600, 500),
            (1_100, 1_000),
            (1_100, 0),
            (100, 0),
            (98, 0),
            (1_099, 1_000),
        ] {
            for _ in 0..10 {
                let now = state(sessions, &["disk_full (node)", "bad_cohort (display/3.8.0-b3)"]);
                assert_eq!(script.look(Some(now), connected, 5_000), None);
            }
        }
    }

    #[test]
    fn lasting_loss_of_other_sessions_stops_the_run() {
        let mut script = Script::new(100, &[], None);

        // A moment is none, and neither are five of a hundred.
        assert_eq!(script.look(Some(state(1_040, &[])), 1_000, 0), None);
        for _ in 0..20 {
            assert_eq!(script.look(Some(state(1_095, &[])), 1_000, 0), None);
        }
        let mut looks = (0..20).map(|_| script.look(Some(state(1_094, &[])), 1_000, 0));
        let harm = looks.find_map(|harm| harm).unwrap();

        assert!(harm.contains("6 of the 100 devices"), "{harm}");
        let mut few = Script::new(4, &[], None);
        assert!(
            (0..20).all(|_| few.look(Some(state(0, &[])), 0, 0).is_none()),
            "four are too few to tell"
        );
    }

    #[test]
    fn silent_api_and_new_critical_alarms_stop_the_run() {
        let mut script = Script::new(0, &["disk_full (node)"], None);

        let silent: Vec<_> = (0..10).map(|_| script.look(None, 0, 0)).collect();
        assert!(
            silent[..9].iter().all(Option::is_none) && silent[9].as_ref().unwrap().contains("10 s"),
            "{silent:?}"
        );
        assert_eq!(script.look(Some(state(0, &[])), 0, 0), None);
        assert_eq!(script.look(None, 0, 0), None);
        let harm = script.look(Some(state(0, &["memory_short (node)"])), 0, 0).unwrap();
        assert!(harm.contains("memory_short (node)"), "{harm}");
    }

    #[test]
    fn attempts_are_bounded_on_average_over_five_seconds() {
        let mut script = Script::new(0, &[], Some(100.0));

        for _ in 0..4 {
            // A drop of all is a moment.
            assert_eq!(script.look(Some(state(0, &[])), 0, 400), None);
            for _ in 0..4 {
                assert_eq!(script.look(Some(state(0, &[])), 0, 0), None);
            }
        }
        let mut looks = (0..5).map(|_| script.look(Some(state(0, &[])), 0, 150));
        assert!(looks.find_map(|harm| harm).unwrap().contains("--max-per-second"));
    }
}
