//! Sessions of one node in virtual time, through phases in which the node stands still.
//! States that it publishes about its devices are compared with what the devices do.
//!
//! Production's [`Session`] decides, on the time of production's [`Observer`]. The model is the rest:
//! - a device answers each ping, and sends a heartbeat when it was not pinged for a quarter longer than `heartbeat_ms`;
//! - frames wait in the kernel until the node reads their socket; it reads one socket after the other, at a fixed rate;
//! - a node that stands still does nothing. When it continues, all overdue timers fire before anything is read.
//!   That is the worst order. A task that is woken runs when all sockets that waited before are read;
//! - the group test is left out.
//!
//! The naive server has the same devices, the same kernel and the same rate. It stamps heartbeats when it reads them,
//! and sweeps each second. Start with [`watch`].

use std::{collections::VecDeque, sync::Arc, time::Duration};

use rand::{Rng, SeedableRng, rngs::SmallRng};
use seawall_proto::{
    hello::SessionKind,
    id::SessionId,
    presence::{
        groups::Verdict,
        observer::{HEALTH_LAGGING, Observer, TICK, Tick},
    },
    session::{Action as SessionAction, KernelView, Moment, Session, SessionLimits},
    time::{Instant, Tenths, WallTime},
};

use super::{database::exponential, network::Network, queue::Calendar};
use crate::{
    recorder::presence::{Comparison, End, State},
    report::Presence,
    scenario::{Action, FieldError, Phase, PresenceWatch, Scenario, Trouble, check, problem},
};

/// Time between two sweeps of the naive server.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// A device waits this much longer than a heartbeat for a ping, as a part of the heartbeat, before it sends one itself.
const HEARTBEAT_SLACK: f64 = 0.25;
/// Random draws for a connected device.
const DRAWS_MAX: u32 = 64;
/// A device whose session was ended returns after this time.
const RETURN_AFTER: Duration = Duration::from_secs(1);

/// What publishes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Publisher {
    /// The gateway's sessions.
    Seawall,
    /// A table of stamps.
    Naive { heartbeat: Duration, deadline: Duration },
}

/// Figures of the whole run, and of each phase.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Watched {
    pub total: Presence,
    pub phases: Vec<Presence>,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    PhaseEnd,
    /// The next device connects for the first time.
    Connect,
    /// A device connects.
    Return {
        device: u32,
    },
    /// A timer of the node for this session of a device.
    Timer {
        device: u32,
        session: u32,
    },
    /// A ping reaches its device.
    Pinged {
        device: u32,
        session: u32,
    },
    /// A device sends a heartbeat if it has not spoken for long.
    Heartbeat {
        device: u32,
        session: u32,
    },
    /// Something of a device reaches the node's kernel.
    Arrived {
        device: u32,
        session: u32,
        what: Arrival,
    },
    /// The node reads what has waited longest.
    Read,
    Sweep,
    /// A tick of the node's observer.
    Tick,
    /// A device goes away, chosen at random. `None`: it restarts.
    Away {
        phase: usize,
        end: Option<End>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arrival {
    Frame,
    /// The end of the connection.
    End,
}

#[derive(Debug)]
struct Device {
    /// Counts its sessions: an event of another session is not this one's.
    session: u32,
    /// Whether the device is in a session, by its own record.
    is_alive: bool,
    spoke_at: Instant,
    half_trip: Duration,
    /// When the kernel last got something of it.
    arrived_at: Instant,
    /// The session whose socket waits to be read, and whether its end waits there.
    unread: Option<(u32, bool)>,
    /// What the node has of it.
    held: Option<Held>,
}

#[derive(Debug)]
struct Held {
    session: u32,
    state: Side,
}

#[derive(Debug)]
enum Side {
    Seawall(Box<Session>),
    Naive {
        stamp: Instant,
        next_ping: Instant,
        is_online: bool,
    },
}

struct Node<'a> {
    scenario: &'a Scenario,
    presence: PresenceWatch,
    publisher: Publisher,
    limits: Arc<SessionLimits>,
    now: Instant,
    observer: Observer,
    ticked_at: Instant,
    rng: SmallRng,
    calendar: Calendar<Event>,
    devices: Vec<Device>,
    comparison: Comparison,
    phase: usize,
    connected: usize,
    /// Time to read one socket, while the node runs all the time.
    read_time: Duration,
    /// Devices whose sockets have something to read, in the order of arrival.
    unread: VecDeque<u32>,
    is_reading: bool,
    /// Timers that came due while the node stood still.
    overdue: Vec<Event>,
    is_frozen: bool,
    /// Part of the time in which the node runs, as its inverse.
    slowness: f64,
}

/// Plays a scenario's phases for the devices of one node that reads `reads_per_second` sockets.
///
/// # Errors
/// The scenario has no `[presence]`, or a phase that this model does not know.
pub fn watch(scenario: &Scenario, publisher: Publisher, reads_per_second: f64) -> Result<Watched, FieldError> {
    let presence = scenario
        .presence
        .ok_or_else(|| problem("presence", "there is nothing to compare"))?;
    checked(scenario)?;
    let limits = SessionLimits {
        heartbeat: heartbeat(scenario),
        ..SessionLimits::default()
    };
    let mut rng = SmallRng::seed_from_u64(scenario.seed);
    let network: Network = scenario.simulate.network();
    let device = |rng: &mut SmallRng| Device {
        session: 0,
        is_alive: false,
        spoke_at: Instant::ZERO,
        half_trip: Duration::from_micros(network.draw_half_trip(rng).into()),
        arrived_at: Instant::ZERO,
        unread: None,
        held: None,
    };
    let devices: Vec<Device> = (0..scenario.devices).map(|_| device(&mut rng)).collect();
    let mut node = Node {
        presence,
        publisher,
        limits: Arc::new(limits),
        now: Instant::ZERO,
        observer: Observer::default(),
        ticked_at: Instant::ZERO,
        calendar: Calendar::default(),
        comparison: Comparison::new(devices.len(), presence.limit()),
        devices,
        phase: 0,
        connected: 0,
        read_time: Duration::from_secs_f64(1.0 / reads_per_second),
        unread: VecDeque::new(),
        is_reading: false,
        overdue: Vec::new(),
        is_frozen: false,
        slowness: 1.0,
        rng,
        scenario,
    };
    node.run();
    Ok(Watched {
        total: node.comparison.total(),
        phases: node.comparison.phases(),
    })
}

/// The gateway's `heartbeat_ms`, as the scenario sets it.
fn heartbeat(scenario: &Scenario) -> Duration {
    let set = scenario.gateway.config.get("session");
    let set = set.and_then(|session| session.get("heartbeat_ms"));
    set.and_then(toml::Value::as_integer)
        .and_then(|ms| u64::try_from(ms).ok())
        .map_or(SessionLimits::default().heartbeat, Duration::from_millis)
}

/// # Errors
/// A phase does what this model does not know.
pub fn checked(scenario: &Scenario) -> Result<(), FieldError> {
    for phase in &scenario.phases {
        let is_known = match phase.action {
            Action::Hold | Action::Connect { .. } | Action::Gateway(_) | Action::Database(_) => true,
            Action::DropAll | Action::Drop { .. } | Action::Grow { .. } | Action::Block { .. } | Action::Unblock => {
                false
            }
        };
        check(
            is_known,
            format!("phase.{}.action", phase.name),
            "simulate has no model of presence through this action: leave [presence] out",
        )?;
    }
    Ok(())
}

impl Node<'_> {
    fn run(&mut self) {
        self.calendar.push(self.now, Event::Tick);
        if matches!(self.publisher, Publisher::Naive { .. }) {
            self.calendar.push(self.now, Event::Sweep);
        }
        self.begin_phase();
        while self.phase < self.scenario.phases.len() {
            let Some((at, event)) = self.calendar.pop(|_| {}) else {
                return;
            };
            self.now = at;
            self.handle(event);
        }
        let now = self.since_start();
        self.comparison.finish(now);
    }

    fn since_start(&self) -> Duration {
        self.now.saturating_since(Instant::ZERO)
    }

    fn current(&self) -> Option<&Phase> {
        self.scenario.phases.get(self.phase)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::PhaseEnd => self.end_phase(),
            Event::Connect => self.connect_next(),
            Event::Return { device } => self.connect(device),
            Event::Timer { .. } | Event::Sweep | Event::Tick if self.is_frozen => self.overdue.push(event),
            Event::Tick => self.tick(),
            Event::Timer { device, session } => self.timer(device, session),
            Event::Sweep => self.sweep(),
            Event::Pinged { device, session } => self.pinged(device, session),
            Event::Heartbeat { device, session } => self.heartbeat(device, session),
            Event::Arrived { device, session, what } => self.arrived(device, session, what),
            Event::Read => self.read(),
            Event::Away { phase, end } => self.go_away(phase, end),
        }
    }

    fn begin_phase(&mut self) {
        let Some(phase) = self.current().cloned() else {
            return;
        };
        self.comparison.begin_phase();
        let mut length = phase.time_max();
        if let Action::Connect { per_second } = phase.action {
            self.calendar.push(self.now, Event::Connect);
            let left = self.devices.len() - self.connected;
            let takes = Duration::from_secs_f64(to_f64(left) / per_second) + Duration::from_secs(1);
            if phase.until.is_some() {
                length = length.min(takes);
            }
        }
        let now = self.since_start();
        if let Action::Gateway(trouble) = phase.action {
            self.comparison.disturb(true, now);
            match trouble {
                Trouble::Slow { factor } => self.slowness = factor,
                Trouble::Frozen | Trouble::Killed => self.is_frozen = true,
            }
        }
        for (end, rate) in [
            (Some(End::PowerCut), phase.power_cuts_per_second),
            (Some(End::Closed), phase.closes_per_second),
            (None, phase.churn_per_second),
        ] {
            self.plan(end, rate);
        }
        self.calendar.push(self.now + length, Event::PhaseEnd);
    }

    fn end_phase(&mut self) {
        if matches!(self.current().map(|phase| &phase.action), Some(Action::Gateway(_))) {
            (self.is_frozen, self.slowness) = (false, 1.0);
            let now = self.since_start();
            self.comparison.disturb(false, now);
            for event in std::mem::take(&mut self.overdue) {
                self.handle(event);
            }
            self.read_soon();
        }
        self.phase += 1;
        self.begin_phase();
    }

    /// The next device that goes away so in this phase, if any does.
    fn plan(&mut self, end: Option<End>, rate: f64) {
        if rate > 0.0 {
            let pause = Duration::from_secs_f64(exponential(1.0 / rate, &mut self.rng));
            let phase = self.phase;
            self.calendar.push(self.now + pause, Event::Away { phase, end });
        }
    }

    fn go_away(&mut self, phase: usize, end: Option<End>) {
        let Some(current) = self.current().filter(|_| phase == self.phase) else {
            return; // planned in a phase that is over
        };
        let rate = match end {
            Some(End::PowerCut) => current.power_cuts_per_second,
            Some(End::Closed) => current.closes_per_second,
            Some(End::Dropped) | None => current.churn_per_second,
        };
        self.plan(end, rate);
        let Some(device) = self.draw_alive() else {
            return;
        };
        let now = self.since_start();
        let away = match end {
            Some(_) => self.presence.away(),
            None => Some(Duration::ZERO),
        };
        self.comparison.ended(device as usize, end.unwrap_or(End::Dropped), now);
        let of = &mut self.devices[device as usize];
        of.is_alive = false;
        if end != Some(End::PowerCut) {
            let (session, what) = (of.session, Arrival::End);
            let at = self.now + of.half_trip;
            self.calendar.push(at, Event::Arrived { device, session, what });
        }
        if let Some(away) = away {
            self.calendar.push(self.now + away, Event::Return { device });
        }
    }

    fn draw_alive(&mut self) -> Option<u32> {
        let count = u32::try_from(self.connected).ok().filter(|count| *count > 0)?;
        (0..DRAWS_MAX)
            .map(|_| self.rng.random_range(0..count))
            .find(|device| self.devices[*device as usize].is_alive)
    }

    fn connect_next(&mut self) {
        let Some(Action::Connect { per_second }) = self.current().map(|phase| phase.action.clone()) else {
            return;
        };
        if self.connected == self.devices.len() {
            return;
        }
        let device = u32::try_from(self.connected).unwrap_or(u32::MAX);
        self.connected += 1;
        self.connect(device);
        let at = self.now + Duration::from_secs_f64(1.0 / per_second);
        self.calendar.push(at, Event::Connect);
    }

    /// A device has a session. A node that stands still opens none: the device tries again.
    fn connect(&mut self, device: u32) {
        if self.is_frozen {
            return self.calendar.push(self.now + RETURN_AFTER, Event::Return { device });
        }
        let side = match self.publisher {
            Publisher::Seawall => {
                let mut session = Box::new(Session::open(
                    SessionKind::V1,
                    SessionId(device.into()),
                    None,
                    Arc::clone(&self.limits),
                    self.moment(),
                    WallTime::default(),
                    &mut self.rng,
                ));
                while session.poll_action().is_some() {}
                Side::Seawall(session)
            }
            Publisher::Naive { heartbeat, .. } => Side::Naive {
                stamp: self.now,
                next_ping: self.now + heartbeat,
                is_online: true,
            },
        };
        let now = self.since_start();
        let of = &mut self.devices[device as usize];
        of.session += 1;
        (of.is_alive, of.spoke_at, of.arrived_at) = (true, self.now, self.now);
        let session = of.session;
        // A session that is still held is replaced. The device stays online.
        of.held = Some(Held { session, state: side });
        self.comparison.connected(device as usize, now);
        self.comparison.published(device as usize, State::Online, now);
        self.set_timer(device);
        let due = self.now + self.silence_of_device();
        self.calendar.push(due, Event::Heartbeat { device, session });
    }

    fn silence_of_device(&self) -> Duration {
        let heartbeat = match self.publisher {
            Publisher::Seawall => self.limits.heartbeat,
            Publisher::Naive { heartbeat, .. } => heartbeat,
        };
        heartbeat.mul_f64(1.0 + HEARTBEAT_SLACK)
    }

    fn set_timer(&mut self, device: u32) {
        let Some(held) = &self.devices[device as usize].held else {
            return;
        };
        let due = match &held.state {
            // At the next tick at the soonest.
            Side::Seawall(session) => match session.poll_timeout(self.moment()) {
                Tenths::FAR_FUTURE => Instant::FAR_FUTURE,
                due => due.begin().max(self.now + TICK),
            },
            Side::Naive { next_ping, .. } => *next_ping,
        };
        let session = held.session;
        if due < Instant::FAR_FUTURE {
            self.calendar.push(due.max(self.now), Event::Timer { device, session });
        }
    }

    fn timer(&mut self, device: u32, session: u32) {
        let (now, moment, health) = (self.now, self.moment(), self.observer.health());
        let of = &mut self.devices[device as usize];
        let half_trip = of.half_trip;
        let kernel = KernelView {
            has_unread: of.unread.is_some_and(|(waiting, _)| waiting == session),
            last_data: Some(now.saturating_since(of.arrived_at)),
            round_trip: Some(2 * half_trip),
        };
        let held = of.held.as_mut();
        let Some(held) = held.filter(|held| held.session == session) else {
            return;
        };
        let (mut pings, mut closes) = (false, false);
        match &mut held.state {
            Side::Seawall(machine) => {
                if machine.poll_timeout(moment).begin() <= now {
                    machine.handle_timeout(moment, health);
                }
                while let Some(action) = machine.poll_action() {
                    match action {
                        SessionAction::Ping => pings = true,
                        SessionAction::Close(_) => closes = true,
                        SessionAction::AskKernel => {
                            machine.handle_kernel(kernel, moment.observed);
                        }
                        SessionAction::AskGroups => {
                            let verdict = if health < HEALTH_LAGGING {
                                Verdict::Offline
                            } else {
                                Verdict::Wait
                            };
                            machine.handle_verdict(verdict, moment.observed, &mut self.rng);
                        }
                        SessionAction::Text(_)
                        | SessionAction::Binary(_)
                        | SessionAction::Received(_)
                        | SessionAction::Complained(_)
                        | SessionAction::Acked(_)
                        | SessionAction::RenewToken
                        | SessionAction::Silent
                        | SessionAction::Suspect
                        | SessionAction::HeardAgain => {}
                    }
                }
            }
            Side::Naive { next_ping, .. } => {
                pings = now >= *next_ping;
                if let (true, Publisher::Naive { heartbeat, .. }) = (pings, self.publisher) {
                    *next_ping = now + heartbeat;
                }
            }
        }
        if pings {
            self.calendar.push(now + half_trip, Event::Pinged { device, session });
        }
        if closes {
            self.give_up(device);
        } else {
            self.set_timer(device);
        }
    }

    /// The node takes a device for gone.
    fn give_up(&mut self, device: u32) {
        let now = self.since_start();
        let of = &mut self.devices[device as usize];
        of.held = None;
        self.comparison.published(device as usize, State::Offline, now);
        if of.is_alive {
            of.is_alive = false;
            self.comparison.severed(device as usize, Some(4001), now);
            self.calendar.push(self.now + RETURN_AFTER, Event::Return { device });
        }
    }

    fn pinged(&mut self, device: u32, session: u32) {
        self.speak(device, session);
    }

    fn heartbeat(&mut self, device: u32, session: u32) {
        let of = &self.devices[device as usize];
        if of.session != session || !of.is_alive {
            return;
        }
        let silence = self.silence_of_device();
        if self.now >= of.spoke_at + silence {
            self.speak(device, session);
        }
        let due = self.devices[device as usize].spoke_at + silence;
        self.calendar.push(due, Event::Heartbeat { device, session });
    }

    /// The device sends a frame, if it still can.
    fn speak(&mut self, device: u32, session: u32) {
        let of = &mut self.devices[device as usize];
        if of.session != session || !of.is_alive {
            return;
        }
        of.spoke_at = self.now;
        let (at, what) = (self.now + of.half_trip, Arrival::Frame);
        self.calendar.push(at, Event::Arrived { device, session, what });
    }

    fn arrived(&mut self, device: u32, session: u32, what: Arrival) {
        let now = self.now;
        let of = &mut self.devices[device as usize];
        if of.session == session {
            of.arrived_at = now;
        }
        let is_end = what == Arrival::End;
        match &mut of.unread {
            Some((waiting, ends)) if *waiting == session => *ends |= is_end,
            // A socket of an earlier session that still waits says nothing more than that session's end.
            Some((waiting, ends)) => (*waiting, *ends) = (session, is_end),
            None => {
                of.unread = Some((session, is_end));
                self.unread.push_back(device);
            }
        }
        self.read_soon();
    }

    fn read_soon(&mut self) {
        if !self.is_reading && !self.is_frozen && !self.unread.is_empty() {
            self.is_reading = true;
            self.calendar
                .push(self.now + self.read_time.mul_f64(self.slowness), Event::Read);
        }
    }

    fn read(&mut self) {
        self.is_reading = false;
        if self.is_frozen {
            return;
        }
        if let Some(device) = self.unread.pop_front()
            && let Some((session, is_end)) = self.devices[device as usize].unread.take()
        {
            self.process(device, session, is_end);
        }
        self.read_soon();
    }

    fn process(&mut self, device: u32, session: u32, is_end: bool) {
        let (at, moment, now) = (self.now, self.moment(), self.since_start());
        let of = &mut self.devices[device as usize];
        let Some(held) = of.held.as_mut().filter(|held| held.session == session) else {
            return;
        };
        if is_end {
            let is_told = matches!(held.state, Side::Naive { is_online: false, .. });
            of.held = None;
            if !is_told {
                self.comparison.published(device as usize, State::Offline, now);
            }
            return;
        }
        match &mut held.state {
            Side::Seawall(machine) => {
                machine.handle_control(moment);
                while machine.poll_action().is_some() {}
            }
            Side::Naive { stamp, is_online, .. } => {
                *stamp = at;
                if !*is_online {
                    *is_online = true;
                    self.comparison.published(device as usize, State::Online, now);
                }
            }
        }
    }

    fn moment(&self) -> Moment {
        Moment {
            real: self.now,
            observed: self.observer.now(),
        }
    }

    /// A task that is woken runs when all sockets that waited before are read.
    fn tick(&mut self) {
        let waiting = u32::try_from(self.unread.len()).unwrap_or(u32::MAX);
        self.observer.handle_tick(Tick {
            elapsed: self.now.saturating_since(self.ticked_at),
            loop_lag: self.read_time.mul_f64(self.slowness) * waiting,
            ping_lag: Duration::ZERO,
        });
        self.ticked_at = self.now;
        self.calendar.push(self.now + TICK, Event::Tick);
    }

    fn sweep(&mut self) {
        let Publisher::Naive { deadline, .. } = self.publisher else {
            return;
        };
        let (at, now) = (self.now, self.since_start());
        for (index, device) in self.devices.iter_mut().enumerate() {
            if let Some(Held {
                state: Side::Naive { stamp, is_online, .. },
                ..
            }) = &mut device.held
                && *is_online
                && at.saturating_since(*stamp) > deadline
            {
                *is_online = false;
                self.comparison.published(index, State::Offline, now);
            }
        }
        self.calendar.push(at + SWEEP_EVERY, Event::Sweep);
    }
}

#[expect(clippy::cast_precision_loss, reason = "at most 16,000,000 devices")]
const fn to_f64(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAIVE: Publisher = Publisher::Naive {
        heartbeat: Duration::from_secs(30),
        deadline: Duration::from_secs(90),
    };

    fn scenario(phases: &str) -> Scenario {
        let text = format!(
            "name = \"s\"\nabout = \"\"\ndevices = 1000\ncapacity_per_second = 1\nthresholds = [\"missing == 0\"]\n[presence]\n\
             [[fleet]]\nname = \"f\"\nfirmware = {{ a = 1.0 }}\n\
             [[phase]]\nname = \"connect\"\nseconds = 60\nuntil = \"connected\"\naction = {{ connect = {{ per_second = 100 }} }}\n\
             [[phase]]\nname = \"calm\"\nseconds = 60\n{phases}[[phase]]\nname = \"after\"\nseconds = 120\n"
        );
        toml::from_str(&text).unwrap()
    }

    fn frozen(seconds: u32) -> Scenario {
        scenario(&format!(
            "[[phase]]\nname = \"frozen\"\nseconds = {seconds}\npower_cuts_per_second = 0.2\ncloses_per_second = 0.2\n\
             action = {{ gateway = \"frozen\" }}\n"
        ))
    }

    #[test]
    fn frozen_node_calls_no_living_device_offline_and_finds_the_dead_ones() {
        for seconds in [10, 90, 300] {
            let total = watch(&frozen(seconds), Publisher::Seawall, 2_000.0).unwrap().total;

            assert_eq!(
                (total.false_offline, total.sessions_closed_by_stall),
                (0, 0),
                "{seconds} s"
            );
            assert_eq!(
                (total.true_offline, total.closed_offline),
                (total.power_cuts, total.closes)
            );
            assert_eq!(total.false_online_after, 0);
            assert!(seconds == 10 || total.true_offline_seconds.max.unwrap() > 30.0);
        }
    }

    #[test]
    fn stamps_of_processing_call_living_devices_offline() {
        let short = watch(&frozen(10), NAIVE, 20_000.0).unwrap().total;
        let long = watch(&frozen(120), NAIVE, 20_000.0).unwrap().total;

        assert_eq!(short.false_offline, 0);
        assert!(long.false_offline > 900, "{long:?}");
        assert_eq!(long.sessions_closed_by_stall, 0, "only the status is wrong");
    }

    #[test]
    fn devices_that_leave_and_return_are_told_both_times() {
        let text = "[[phase]]\nname = \"busy\"\nseconds = 400\ncloses_per_second = 1\npower_cuts_per_second = 1\nchurn_per_second = 2\n";
        let mut scenario = scenario(text);
        scenario.presence = Some(PresenceWatch {
            away_seconds: Some(150.0),
            ..PresenceWatch::default()
        });

        let watched = watch(&scenario, Publisher::Seawall, 20_000.0).unwrap();

        let total = &watched.total;
        assert_eq!((total.false_offline, total.false_online_after), (0, 0));
        assert!(
            (330..=470).contains(&total.power_cuts) && (330..=470).contains(&total.closes),
            "{total:?}"
        );
        assert!(total.closed_offline_seconds.max.unwrap() < 1.0, "{total:?}");
        assert_eq!(watched.phases.len(), 4);
    }

    #[test]
    fn storms_have_no_model_of_presence() {
        let storm = scenario("[[phase]]\nname = \"storm\"\nseconds = 9\naction = \"drop-all\"\n");

        let error = watch(&storm, Publisher::Seawall, 20_000.0).unwrap_err();

        assert!(error.to_string().contains("phase.storm.action"), "{error}");
    }
}
