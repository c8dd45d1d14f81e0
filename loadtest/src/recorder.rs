//! The books of one run: what happened to which device, by phase and by group.
//!
//! Latency counts from the time at which a device should have been connected ([`Recorder::due`]), not from its last attempt, and
//! belongs to the phase of that time: a server that makes devices wait can't hide it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use seawall_proto::refusal::Code;

use crate::report::{Group, Latency, Second, histogram};

/// Close code of a session that a rule evicts, and the close codes that tell of a paced goodbye: such an end is no loss.
const CLOSE_EVICTED: u16 = 4000;

/// What a device tells of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It begins to connect.
    Attempt,
    /// The upgrade is done.
    Connected,
    /// The server answered with a refusal. None: by a code that the contract does not know.
    Refused(Option<Code>),
    /// There was no answer: no TCP connection, a reset, silence, or no HTTP.
    Failed,
    /// A session ended; the close code where there was one.
    Closed(Option<u16>),
}

/// Shared by all devices of a run. Each call takes `now`, so that tests own the clock.
#[derive(Debug)]
pub struct Recorder {
    books: Mutex<Books>,
}

#[derive(Debug)]
struct Books {
    started: Instant,
    devices: Vec<Device>,
    /// Groups each version belongs to; the first group, `all`, always.
    groups_of: BTreeMap<String, Vec<usize>>,
    group_names: Vec<String>,
    phases: Vec<Phase>,
    seconds: Vec<Second>,
    connected: u64,
}

#[derive(Debug)]
struct Device {
    groups: Vec<usize>,
    is_connected: bool,
    /// Dropped by the test: the end of this session is no loss.
    is_leaving: bool,
    /// A rule refuses it: nobody waits for it.
    is_blocked: bool,
    /// Since when, and from which phase on, it should be connected, and is not.
    due: Option<Due>,
    /// The phase that counts its return and its attempts.
    wanted_in: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
struct Due {
    at: Instant,
    phase: usize,
}

#[derive(Debug)]
struct Phase {
    started: Instant,
    ended: Option<Instant>,
    wanted: u64,
    wanted_attempts: u64,
    returned: Vec<Duration>,
    lost_sessions: u64,
    missing: u64,
    /// At its start and at its end.
    counters: (Counters, Counters),
    groups: Vec<GroupBook>,
}

#[derive(Debug)]
struct GroupBook {
    devices: u64,
    connected: u64,
    attempts: u64,
    admitted: u64,
    refused: BTreeMap<&'static str, u64>,
    failed: u64,
    latency: Histogram<u64>,
}

/// What one phase came to.
#[derive(Clone, Debug)]
pub struct PhaseFigures {
    pub starts_seconds: f64,
    pub seconds: f64,
    pub wanted: u64,
    pub t99_seconds: Option<f64>,
    pub t100_seconds: Option<f64>,
    pub attempts_per_device: Option<f64>,
    pub lost_sessions: u64,
    pub missing: u64,
    /// What was counted in it.
    pub counters: Counters,
    pub groups: BTreeMap<String, Group>,
}

/// Counters outside of the devices, read where one phase ends and the next begins.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Look-up statements that the server has sent.
    pub statements: f64,
    /// Look-ups of slow devices that the database has seen.
    pub slow_lookups: u64,
}

/// How things stand now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    pub connected: u64,
    /// Should be connected, and are not.
    pub missing: u64,
    pub blocked: u64,
    pub lost_sessions: u64,
}

impl Counters {
    fn since(self, earlier: Self) -> Self {
        Self {
            statements: (self.statements - earlier.statements).max(0.0),
            slow_lookups: self.slow_lookups.saturating_sub(earlier.slow_lookups),
        }
    }
}

impl Recorder {
    /// `versions`: the version of each device, in order. `groups`: versions of each group, `all` apart.
    #[must_use]
    pub fn new(versions: &[&str], groups: &BTreeMap<String, Vec<String>>, now: Instant) -> Self {
        let group_names: Vec<String> = std::iter::once(crate::scenario::GROUP_ALL.to_owned())
            .chain(groups.keys().cloned())
            .collect();
        let mut groups_of: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (index, versions) in groups.values().enumerate() {
            for version in versions {
                groups_of
                    .entry(version.clone())
                    .or_insert_with(|| vec![0])
                    .push(index + 1);
            }
        }
        let devices = versions
            .iter()
            .map(|version| Device::new(groups_of.get(*version)))
            .collect();
        let books = Books {
            started: now,
            devices,
            groups_of,
            group_names,
            phases: Vec::new(),
            seconds: Vec::new(),
            connected: 0,
        };
        Self {
            books: Mutex::new(books),
        }
    }

    /// Begins the next phase, and ends the one before. `counters`: as they stand now.
    pub fn begin_phase(&self, now: Instant, counters: Counters) {
        let mut books = self.books();
        books.end_phase(now, counters);
        let groups = books.group_names.iter().map(|_| GroupBook::new()).collect();
        books.phases.push(Phase {
            started: now,
            ended: None,
            wanted: 0,
            wanted_attempts: 0,
            returned: Vec::new(),
            lost_sessions: 0,
            missing: 0,
            counters: (counters, counters),
            groups,
        });
    }

    /// Device `index` should be connected from `at` on: it was dropped then, or is to connect first. `counts`: its return is one
    /// that the phase waits for.
    pub fn due(&self, index: usize, at: Instant, counts: bool) {
        self.books().due(index, at, counts);
    }

    /// Device `index` runs another version now.
    pub fn upgraded(&self, index: usize, version: &str) {
        let mut books = self.books();
        let groups = books.groups_of.get(version).cloned();
        if let Some(device) = books.devices.get_mut(index) {
            device.groups = groups.unwrap_or_else(|| vec![0]);
        }
    }

    pub fn handle(&self, index: usize, event: Event, now: Instant) {
        self.books().handle(index, event, now);
    }

    #[must_use]
    pub fn standing(&self) -> Standing {
        self.books().standing()
    }

    /// The same, noted for the second that `now` is in.
    pub fn tick(&self, now: Instant) -> Standing {
        let mut books = self.books();
        let standing = books.standing();
        let started = books.started;
        second(&mut books.seconds, started, now).connected = standing.connected;
        standing
    }

    /// Is the device connected, as far as it told?
    #[must_use]
    pub fn is_connected(&self, index: usize) -> bool {
        self.books()
            .devices
            .get(index)
            .is_some_and(|device| device.is_connected)
    }

    /// Does it belong to this group now?
    #[must_use]
    pub fn is_in(&self, index: usize, group: &str) -> bool {
        let books = self.books();
        let Some(group) = books.group_names.iter().position(|name| name == group) else {
            return false;
        };
        books
            .devices
            .get(index)
            .is_some_and(|device| device.groups.contains(&group))
    }

    /// Ends the run: devices that still wait count with the time they have waited.
    #[must_use]
    pub fn finish(&self, now: Instant, counters: Counters) -> (Vec<PhaseFigures>, Vec<Second>) {
        let mut books = self.books();
        books.end_phase(now, counters);
        books.count_waiting(now);
        let started = books.started;
        let names = books.group_names.clone();
        let phases = books
            .phases
            .iter()
            .map(|phase| phase.figures(started, &names))
            .collect();
        (phases, std::mem::take(&mut books.seconds))
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Books {
    fn due(&mut self, index: usize, at: Instant, counts: bool) {
        let Some(current) = self.phases.len().checked_sub(1) else {
            debug_assert!(false, "devices are driven within phases only");
            return;
        };
        let Some(device) = self.devices.get_mut(index) else {
            return;
        };
        device.is_leaving = device.is_connected;
        if device.is_connected {
            device.is_connected = false;
            self.connected -= 1;
        }
        // One that waits already goes on waiting from when it first did.
        device.due.get_or_insert(Due { at, phase: current });
        if counts && device.wanted_in != Some(current) {
            device.wanted_in = Some(current);
            if let Some(phase) = self.phases.get_mut(current) {
                phase.wanted += 1;
            }
        }
    }

    fn handle(&mut self, index: usize, event: Event, now: Instant) {
        let Some(current) = self.phases.len().checked_sub(1) else {
            return;
        };
        let (Some(device), Some(phase)) = (self.devices.get_mut(index), self.phases.get_mut(current)) else {
            return;
        };
        let groups = device.groups.clone();
        let mut count = |change: &mut dyn FnMut(&mut GroupBook)| {
            for group in &groups {
                if let Some(book) = phase.groups.get_mut(*group) {
                    change(book);
                }
            }
        };
        let second = second(&mut self.seconds, self.started, now);
        match event {
            Event::Attempt => {
                count(&mut |book| book.attempts += 1);
                second.attempts += 1;
                if let Some(wanted) = device.wanted_in.and_then(|wanted| self.phases.get_mut(wanted)) {
                    wanted.wanted_attempts += 1;
                }
            }
            Event::Connected => {
                count(&mut |book| book.admitted += 1);
                second.admitted += 1;
                device.is_blocked = false;
                device.is_leaving = false;
                if !device.is_connected {
                    device.is_connected = true;
                    self.connected += 1;
                }
                let due = device.due.take();
                let wanted = device.wanted_in.take();
                if let Some(phase) = wanted.and_then(|wanted| self.phases.get_mut(wanted)) {
                    phase.returned.push(now.saturating_duration_since(phase.started));
                }
                if let Some(due) = due {
                    self.record(&groups, due, now);
                }
            }
            Event::Refused(code) => {
                let name = code.map_or("unknown", Code::as_str);
                count(&mut |book| *book.refused.entry(name).or_default() += 1);
                second.refused += 1;
                if matches!(code, Some(Code::FirmwareBlocked | Code::DeviceDisabled)) {
                    self.excuse(index);
                }
            }
            Event::Failed => {
                count(&mut |book| book.failed += 1);
                second.failed += 1;
            }
            Event::Closed(code) => {
                if !device.is_connected {
                    return; // dropped by the test, which has said so
                }
                device.is_connected = false;
                self.connected -= 1;
                if code == Some(CLOSE_EVICTED) {
                    self.excuse(index);
                } else {
                    phase.lost_sessions += 1;
                    device.due = Some(Due {
                        at: now,
                        phase: current,
                    });
                }
            }
        }
    }

    /// A rule refuses it: it is not missing, and no phase waits for it.
    fn excuse(&mut self, index: usize) {
        let Some(device) = self.devices.get_mut(index) else {
            return;
        };
        device.is_blocked = true;
        device.due = None;
        if let Some(phase) = device.wanted_in.take().and_then(|wanted| self.phases.get_mut(wanted)) {
            phase.wanted -= 1;
        }
    }

    fn record(&mut self, groups: &[usize], due: Due, now: Instant) {
        let us = u64::try_from(now.saturating_duration_since(due.at).as_micros()).unwrap_or(u64::MAX);
        if let Some(phase) = self.phases.get_mut(due.phase) {
            for group in groups {
                if let Some(book) = phase.groups.get_mut(*group) {
                    book.latency.saturating_record(us.max(1));
                }
            }
        }
    }

    fn standing(&self) -> Standing {
        Standing {
            connected: self.connected,
            missing: self.missing(),
            blocked: self.devices.iter().map(|device| u64::from(device.is_blocked)).sum(),
            lost_sessions: self.phases.iter().map(|phase| phase.lost_sessions).sum(),
        }
    }

    fn missing(&self) -> u64 {
        self.devices.iter().map(|device| u64::from(device.due.is_some())).sum()
    }

    fn end_phase(&mut self, now: Instant, counters: Counters) {
        let missing = self.missing();
        let Some(phase) = self.phases.last_mut().filter(|phase| phase.ended.is_none()) else {
            return;
        };
        phase.ended = Some(now);
        phase.missing = missing;
        phase.counters.1 = counters;
        for device in &self.devices {
            for group in &device.groups {
                if let Some(book) = phase.groups.get_mut(*group) {
                    book.devices += 1;
                    book.connected += u64::from(device.is_connected);
                }
            }
        }
    }

    fn count_waiting(&mut self, now: Instant) {
        let waiting: Vec<(Vec<usize>, Due)> = self
            .devices
            .iter_mut()
            .filter_map(|device| Some((device.groups.clone(), device.due.take()?)))
            .collect();
        for (groups, due) in waiting {
            self.record(&groups, due, now);
        }
    }
}

impl Device {
    fn new(groups: Option<&Vec<usize>>) -> Self {
        Self {
            groups: groups.cloned().unwrap_or_else(|| vec![0]),
            is_connected: false,
            is_leaving: false,
            is_blocked: false,
            due: None,
            wanted_in: None,
        }
    }
}

impl GroupBook {
    fn new() -> Self {
        Self {
            devices: 0,
            connected: 0,
            attempts: 0,
            admitted: 0,
            refused: BTreeMap::new(),
            failed: 0,
            latency: histogram(),
        }
    }
}

impl Phase {
    fn figures(&self, run_started: Instant, names: &[String]) -> PhaseFigures {
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
            .map(|(name, book)| {
                let group = Group {
                    devices: book.devices,
                    connected: book.connected,
                    attempts: book.attempts,
                    admitted: book.admitted,
                    refused: book.refused.clone(),
                    failed: book.failed,
                    latency: Latency::of(&book.latency),
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
            groups,
        }
    }
}

fn second(seconds: &mut Vec<Second>, started: Instant, now: Instant) -> &mut Second {
    let index = usize::try_from(now.saturating_duration_since(started).as_secs()).unwrap_or(0);
    while seconds.len() <= index {
        #[expect(clippy::cast_precision_loss, reason = "seconds of a load test are far below 2^52")]
        let at_seconds = seconds.len() as f64;
        seconds.push(Second {
            at_seconds,
            ..Second::default()
        });
    }
    &mut seconds[index]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn return_times_count_from_the_drop_and_attempts_are_averaged() {
        let (recorder, t0) = connected(100);

        recorder.begin_phase(after(t0, 10.0), Counters::default());
        for index in 0..100 {
            recorder.due(index, after(t0, 10.0), true);
        }
        for index in 0..100 {
            recorder.handle(index, Event::Attempt, after(t0, 10.5));
            recorder.handle(index, Event::Refused(Some(Code::Overloaded)), after(t0, 10.5));
            recorder.handle(index, Event::Attempt, after(t0, 11.0));
            let back = if index == 99 { 20.0 } else { 11.0 };
            recorder.handle(index, Event::Connected, after(t0, back));
        }
        let (phases, seconds) = recorder.finish(after(t0, 30.0), Counters::default());

        assert_eq!(phases[1].t99_seconds, Some(1.0));
        assert_eq!(phases[1].t100_seconds, Some(10.0));
        assert_eq!(phases[1].attempts_per_device, Some(2.0));
        assert_eq!(phases[1].lost_sessions, 0);
        let all = &phases[1].groups["all"];
        assert_eq!(
            (all.connected, all.refused["overloaded"], all.latency.count),
            (100, 100, 100)
        );
        assert_eq!(seconds[10].refused, 100);
    }

    #[test]
    fn devices_that_never_return_count_with_the_time_they_waited() {
        let (recorder, t0) = connected(2);

        recorder.begin_phase(after(t0, 1.0), Counters::default());
        recorder.due(0, after(t0, 1.0), true);
        recorder.due(1, after(t0, 1.0), true);
        recorder.handle(1, Event::Connected, after(t0, 2.0));
        recorder.begin_phase(after(t0, 5.0), Counters::default());
        assert_eq!(
            recorder.standing(),
            Standing {
                connected: 1,
                missing: 1,
                ..Standing::default()
            }
        );
        let (phases, _) = recorder.finish(after(t0, 61.0), Counters::default());

        assert_eq!(phases[1].t100_seconds, None);
        assert_eq!((phases[1].missing, phases[2].missing), (1, 1));
        let max_ms = phases[1].groups["all"].latency.max_ms.unwrap();
        assert!((max_ms - 60_000.0).abs() < 100.0, "{max_ms}");
        assert_eq!(phases[2].groups["all"].latency.count, 0);
    }

    #[test]
    fn blocked_devices_are_not_waited_for() {
        let (recorder, t0) = connected(2);

        recorder.begin_phase(after(t0, 1.0), Counters::default());
        recorder.due(0, after(t0, 1.0), true);
        recorder.handle(0, Event::Refused(Some(Code::FirmwareBlocked)), after(t0, 1.1));
        recorder.handle(1, Event::Closed(Some(CLOSE_EVICTED)), after(t0, 1.2));

        assert_eq!(
            recorder.standing(),
            Standing {
                blocked: 2,
                ..Standing::default()
            }
        );
        let (phases, _) = recorder.finish(after(t0, 2.0), Counters::default());
        assert_eq!(
            (phases[1].wanted, phases[1].lost_sessions, phases[1].missing),
            (0, 0, 0)
        );
    }

    #[test]
    fn a_session_that_ends_by_itself_is_lost() {
        let (recorder, t0) = connected(1);

        recorder.handle(0, Event::Closed(Some(1012)), after(t0, 1.0));
        recorder.handle(0, Event::Closed(None), after(t0, 1.0));

        assert_eq!(
            recorder.standing(),
            Standing {
                missing: 1,
                lost_sessions: 1,
                ..Standing::default()
            }
        );
    }

    #[test]
    fn devices_are_counted_in_the_group_of_their_version() {
        let groups = BTreeMap::from([("marked".to_owned(), vec!["b3".to_owned()])]);
        let t0 = Instant::now();
        let recorder = Recorder::new(&["b2", "b3"], &groups, t0);
        recorder.begin_phase(t0, Counters::default());

        assert!(recorder.is_in(1, "marked") && !recorder.is_in(0, "marked"));
        recorder.upgraded(0, "b3");
        recorder.handle(0, Event::Attempt, t0);
        let (phases, _) = recorder.finish(t0, Counters::default());

        assert_eq!(phases[0].groups["marked"].attempts, 1);
        assert_eq!(phases[0].groups["marked"].devices, 2);
        assert_eq!(phases[0].groups["all"].attempts, 1);
    }

    fn connected(count: usize) -> (Recorder, Instant) {
        let t0 = Instant::now();
        let recorder = Recorder::new(&vec!["b2"; count], &BTreeMap::new(), t0);
        recorder.begin_phase(t0, Counters::default());
        for index in 0..count {
            recorder.due(index, t0, true);
            recorder.handle(index, Event::Attempt, t0);
            recorder.handle(index, Event::Connected, t0);
        }
        (recorder, t0)
    }

    fn after(t0: Instant, seconds: f64) -> Instant {
        t0 + Duration::from_secs_f64(seconds)
    }
}
