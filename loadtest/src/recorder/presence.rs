//! What a server publishes about devices, compared with what the devices do: the fleet's own record is the truth.
//!
//! Times are since the start of the run, so that real runs and simulated ones use the same code. Ages of ended sessions
//! exclude the time in which the test disturbs the server ([`Comparison::disturb`]).

use std::{collections::BTreeSet, time::Duration};

use crate::report::{Presence, Spread};

/// Longest time from a device's return until the end of its previous session is read: the reader of events may be late.
const RETURN_GRACE: Duration = Duration::from_secs(10);
/// Close code of a session that the gateway gave up for silence.
const CLOSE_HEARTBEAT_MISSED: u16 = 4001;

/// A published state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Online,
    Offline,
    Unknown,
}

/// How a device's session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The device closed it with a close frame.
    Closed,
    /// The device lost its power or its network: its connection still looks open.
    PowerCut,
    /// The connection was reset, and the device returns.
    Dropped,
}

/// Published numbers of devices by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub online: u64,
    pub offline: u64,
    pub unknown: u64,
}

/// The comparison of one run.
#[derive(Debug)]
pub struct Comparison {
    devices: Vec<Device>,
    /// Age of an ended session above which its device may no longer be called online.
    limit: Duration,
    clock: UndisturbedClock,
    /// Figures of each phase, and the last one's number.
    phases: Vec<Tally>,
}

#[derive(Clone, Copy, Debug)]
struct Device {
    life: Life,
    /// The last end, until an `offline` tells it. The time is undisturbed.
    untold: Option<(End, Duration)>,
    /// An `offline` is true though the device is back: it is about the session before.
    has_ended: bool,
    told: Option<State>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Life {
    /// It has no session of its own making: it never connected, or it left.
    Away,
    Connected {
        since: Duration,
    },
    /// It is well, but the server ended its session.
    Severed,
}

/// Time without the stretches in which the server was disturbed.
#[derive(Debug, Default)]
struct UndisturbedClock {
    before: Duration,
    disturbed_since: Option<Duration>,
    lost: Duration,
}

/// Counts of one phase.
#[derive(Clone, Debug, Default)]
struct Tally {
    false_offline: u64,
    counted_false_offline: u64,
    false_online_after: u64,
    sessions_closed_by_stall: u64,
    unknown: u64,
    groups: u64,
    missed: u64,
    power_cuts: u64,
    closes: u64,
    /// Undisturbed ages, in seconds.
    silent_ages: Vec<f64>,
    closed_ages: Vec<f64>,
}

impl UndisturbedClock {
    fn disturb(&mut self, is_disturbed: bool, now: Duration) {
        match (self.disturbed_since, is_disturbed) {
            (None, true) => self.disturbed_since = Some(now),
            (Some(since), false) => {
                self.lost += now.saturating_sub(since);
                self.disturbed_since = None;
            }
            (None, false) | (Some(_), true) => {}
        }
    }

    fn read(&mut self, now: Duration) -> Duration {
        let until = self.disturbed_since.unwrap_or(now);
        self.before = self.before.max(until.saturating_sub(self.lost));
        self.before
    }
}

impl Comparison {
    /// `limit`: the server's deadline for silent devices, and its grace.
    #[must_use]
    pub fn new(devices: usize, limit: Duration) -> Self {
        let device = Device {
            life: Life::Away,
            untold: None,
            has_ended: false,
            told: None,
        };
        Self {
            devices: vec![device; devices],
            limit,
            clock: UndisturbedClock::default(),
            phases: vec![Tally::default()],
        }
    }

    /// Begins the next phase. A published state belongs to the phase in which it is read.
    pub fn begin_phase(&mut self) {
        self.phases.push(Tally::default());
    }

    /// The test begins or ends a disturbance of the server.
    pub fn disturb(&mut self, is_disturbed: bool, now: Duration) {
        self.clock.disturb(is_disturbed, now);
    }

    /// A device has a session.
    pub fn connected(&mut self, index: usize, now: Duration) {
        let limit = self.limit;
        let undisturbed = self.clock.read(now);
        let (Some(device), Some(tally)) = (self.devices.get_mut(index), self.phases.last_mut()) else {
            return;
        };
        tally.false_online_after += u64::from(device.is_late(undisturbed, limit));
        device.untold = None;
        device.life = Life::Connected { since: now };
    }

    /// A device's session ends by the device's own doing, or by the test's.
    pub fn ended(&mut self, index: usize, end: End, now: Duration) {
        let undisturbed = self.clock.read(now);
        let (Some(device), Some(tally)) = (self.devices.get_mut(index), self.phases.last_mut()) else {
            return;
        };
        if !matches!(device.life, Life::Connected { .. }) {
            return;
        }
        match end {
            End::Closed => tally.closes += 1,
            End::PowerCut => tally.power_cuts += 1,
            End::Dropped => {}
        }
        device.life = Life::Away;
        device.has_ended = true;
        device.untold = Some((end, undisturbed));
    }

    /// The server ended the session of a device that is well, with this close code if there was one.
    pub fn severed(&mut self, index: usize, code: Option<u16>, now: Duration) {
        if !matches!(code, None | Some(CLOSE_HEARTBEAT_MISSED)) {
            // The server says why, so its `offline` is true.
            return self.ended(index, End::Dropped, now);
        }
        let (Some(device), Some(tally)) = (self.devices.get_mut(index), self.phases.last_mut()) else {
            return;
        };
        if matches!(device.life, Life::Connected { .. }) {
            device.life = Life::Severed;
            tally.sessions_closed_by_stall += 1;
        }
    }

    /// The server publishes a device's state.
    pub fn published(&mut self, index: usize, state: State, now: Duration) {
        let limit = self.limit;
        let undisturbed = self.clock.read(now);
        let (Some(device), Some(tally)) = (self.devices.get_mut(index), self.phases.last_mut()) else {
            return;
        };
        match state {
            State::Online => {}
            State::Unknown => tally.unknown += 1,
            State::Offline => {
                let is_well = match device.life {
                    Life::Away => false,
                    Life::Severed => true,
                    Life::Connected { since } => !device.has_ended || now.saturating_sub(since) > RETURN_GRACE,
                };
                tally.false_offline += u64::from(is_well);
                tally.false_online_after += u64::from(device.is_late(undisturbed, limit));
                if let Some((end, at)) = device.untold.take() {
                    let age = undisturbed.saturating_sub(at).as_secs_f64();
                    match end {
                        End::Closed => tally.closed_ages.push(age),
                        End::PowerCut => tally.silent_ages.push(age),
                        End::Dropped => {}
                    }
                }
                device.has_ended = false;
            }
        }
        device.told = Some(state);
    }

    /// One event stands for those of many devices that went silent together, or were heard again. `unknown`: the devices
    /// that the server lists as unknown since then. `is_held`: they went silent.
    pub fn group_published(&mut self, is_held: bool, unknown: &BTreeSet<usize>, now: Duration) {
        self.tally(|tally| tally.groups += u64::from(is_held));
        for index in 0..self.devices.len() {
            let was_unknown = self.devices[index].told == Some(State::Unknown);
            match (was_unknown, unknown.contains(&index)) {
                (false, true) => self.published(index, State::Unknown, now),
                (true, false) => self.published(index, State::Online, now),
                (true, true) | (false, false) => {}
            }
        }
    }

    /// The server says that it has no longer all events.
    pub fn missed(&mut self) {
        self.tally(|tally| tally.missed += 1);
    }

    /// The server publishes counts over exactly these devices. Returns how many more it calls online than there are.
    /// Devices whose end it may still find out are among them.
    pub fn counted(&mut self, counts: Counts, now: Duration) -> f64 {
        let (mut well, mut away, mut returned, mut undetected) = (0_u64, 0_u64, 0_u64, 0_u64);
        for device in &self.devices {
            match device.life {
                Life::Away => {
                    away += 1;
                    undetected += u64::from(device.untold.is_some() && device.told == Some(State::Online));
                }
                Life::Severed => well += 1,
                Life::Connected { since } => {
                    well += 1;
                    returned += u64::from(now.saturating_sub(since) <= RETURN_GRACE);
                }
            }
        }
        let excess = counts.offline.saturating_sub(away + returned);
        self.tally(|tally| tally.counted_false_offline = tally.counted_false_offline.max(excess));
        #[expect(clippy::cast_precision_loss, reason = "counts of devices are far below 2^52")]
        let difference = counts.online as f64 - (well + undetected) as f64;
        difference
    }

    /// Ends the run: devices that are still called online too late are counted in the last phase.
    pub fn finish(&mut self, now: Duration) {
        let undisturbed = self.clock.read(now);
        let late = self
            .devices
            .iter()
            .filter(|device| device.is_late(undisturbed, self.limit));
        let late = u64::try_from(late.count()).unwrap_or(u64::MAX);
        for device in &mut self.devices {
            device.untold = None;
        }
        self.tally(|tally| tally.false_online_after += late);
    }

    /// Figures of each phase, in order.
    #[must_use]
    pub fn phases(&self) -> Vec<Presence> {
        self.phases.iter().skip(1).map(Tally::figures).collect()
    }

    /// Figures of the whole run.
    #[must_use]
    pub fn total(&self) -> Presence {
        let mut total = Tally::default();
        for phase in &self.phases {
            total.add(phase);
        }
        total.figures()
    }

    fn tally(&mut self, change: impl FnOnce(&mut Tally)) {
        if let Some(tally) = self.phases.last_mut() {
            change(tally);
        }
    }
}

impl Device {
    /// Whether it is called online although its session ended longer ago than `limit`.
    fn is_late(&self, undisturbed: Duration, limit: Duration) -> bool {
        let age = self.untold.map(|(_, at)| undisturbed.saturating_sub(at));
        self.told == Some(State::Online) && age.is_some_and(|age| age > limit)
    }
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.false_offline += other.false_offline;
        self.counted_false_offline = self.counted_false_offline.max(other.counted_false_offline);
        self.false_online_after += other.false_online_after;
        self.sessions_closed_by_stall += other.sessions_closed_by_stall;
        self.unknown += other.unknown;
        self.groups += other.groups;
        self.missed += other.missed;
        self.power_cuts += other.power_cuts;
        self.closes += other.closes;
        self.silent_ages.extend(&other.silent_ages);
        self.closed_ages.extend(&other.closed_ages);
    }

    fn figures(&self) -> Presence {
        Presence {
            false_offline: self.false_offline,
            counted_false_offline: self.counted_false_offline,
            false_online_after: self.false_online_after,
            sessions_closed_by_stall: self.sessions_closed_by_stall,
            unknown: self.unknown,
            groups: self.groups,
            missed: self.missed,
            power_cuts: self.power_cuts,
            closes: self.closes,
            true_offline: len(&self.silent_ages),
            closed_offline: len(&self.closed_ages),
            true_offline_seconds: Spread::of(&self.silent_ages),
            closed_offline_seconds: Spread::of(&self.closed_ages),
        }
    }
}

fn len(ages: &[f64]) -> u64 {
    u64::try_from(ages.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = secs(80);

    const fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Devices that are connected and called online from the start.
    fn online(devices: usize) -> Comparison {
        let mut comparison = Comparison::new(devices, LIMIT);
        comparison.begin_phase();
        for index in 0..devices {
            comparison.connected(index, secs(0));
            comparison.published(index, State::Online, secs(0));
        }
        comparison
    }

    #[test]
    fn offline_of_a_connected_device_is_false_whether_or_not_its_session_is_closed_with_it() {
        let mut comparison = online(2);

        comparison.published(0, State::Offline, secs(100));
        comparison.severed(1, Some(CLOSE_HEARTBEAT_MISSED), secs(100));
        comparison.connected(1, secs(101));
        comparison.published(1, State::Offline, secs(102));

        let total = comparison.total();
        assert_eq!((total.false_offline, total.sessions_closed_by_stall), (2, 1));
        assert_eq!((total.true_offline, total.closed_offline), (0, 0));
    }

    #[test]
    fn offline_of_a_device_that_died_or_left_is_true_and_its_age_is_known() {
        let mut comparison = online(2);

        comparison.ended(0, End::PowerCut, secs(10));
        comparison.ended(1, End::Closed, secs(10));
        comparison.published(1, State::Offline, secs(11));
        comparison.published(0, State::Offline, secs(85));
        comparison.finish(secs(200));

        let total = comparison.total();
        assert_eq!((total.false_offline, total.false_online_after), (0, 0));
        assert_eq!((total.power_cuts, total.closes), (1, 1));
        assert_eq!(total.true_offline_seconds.max, Some(75.0));
        assert_eq!(total.closed_offline_seconds.max, Some(1.0));
    }

    #[test]
    fn server_that_says_nothing_of_a_dead_device_calls_it_online_too_long() {
        let mut comparison = online(3);
        for index in 0..3 {
            comparison.ended(index, End::PowerCut, secs(10));
        }

        comparison.published(0, State::Offline, secs(91)); // a second late
        comparison.published(1, State::Unknown, secs(60)); // not online, and that is no lie
        comparison.finish(secs(200));

        assert_eq!(comparison.total().false_online_after, 2);
    }

    #[test]
    fn time_in_which_the_test_stopped_the_server_does_not_count_against_it() {
        let mut comparison = online(1);

        comparison.disturb(true, secs(5));
        comparison.ended(0, End::PowerCut, secs(100));
        comparison.disturb(false, secs(305));
        comparison.published(0, State::Offline, secs(375));

        let total = comparison.total();
        assert_eq!(total.false_online_after, 0);
        assert_eq!(total.true_offline_seconds.max, Some(70.0));
    }

    #[test]
    fn late_word_of_an_earlier_session_is_no_false_offline_but_a_second_one_is() {
        let mut comparison = online(1);

        comparison.ended(0, End::Dropped, secs(10));
        comparison.connected(0, secs(11));
        comparison.published(0, State::Offline, secs(12));
        assert_eq!(comparison.total().false_offline, 0);
        comparison.published(0, State::Offline, secs(13));
        comparison.published(0, State::Offline, secs(60));

        assert_eq!(comparison.total().false_offline, 2);
    }

    #[test]
    fn close_with_a_reason_is_no_stall() {
        let mut comparison = online(1);

        comparison.severed(0, Some(4000), secs(10));
        comparison.published(0, State::Offline, secs(10));

        let total = comparison.total();
        assert_eq!((total.sessions_closed_by_stall, total.false_offline), (0, 0));
    }

    #[test]
    fn counts_that_call_more_devices_offline_than_have_left_are_false() {
        let mut comparison = online(10);
        comparison.ended(0, End::PowerCut, secs(100));
        let counts = |online, offline| Counts {
            online,
            offline,
            unknown: 0,
        };

        // The dead one is not found out yet.
        assert_eq!(comparison.counted(counts(10, 0), secs(110)), 0.0);
        comparison.published(0, State::Offline, secs(160));
        assert_eq!(comparison.counted(counts(9, 1), secs(161)), 0.0);
        assert_eq!(comparison.total().counted_false_offline, 0);
        assert_eq!(comparison.counted(counts(6, 4), secs(162)), -3.0);

        assert_eq!(comparison.total().counted_false_offline, 3);
    }

    #[test]
    fn figures_belong_to_the_phase_in_which_they_are_published() {
        let mut comparison = online(2);
        comparison.ended(0, End::PowerCut, secs(10));
        comparison.begin_phase();
        comparison.published(0, State::Offline, secs(80));
        comparison.published(1, State::Offline, secs(80));

        let phases = comparison.phases();

        assert_eq!((phases[0].power_cuts, phases[0].true_offline), (1, 0));
        assert_eq!((phases[1].true_offline, phases[1].false_offline), (1, 1));
    }
}
