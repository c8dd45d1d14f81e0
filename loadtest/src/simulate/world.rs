//! The world of a simulation: devices, the way to the nodes, the nodes, their database, and the one loop that moves them.
//!
//! [`World::run`] takes the next event, hands it to its target, and checks what must hold. What devices do is here; what nodes do is
//! in `gateway`, what the scenario does to both in `script`.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use firmware_sim::{
    device::{Action, CloseFrame, State},
    profile::Profile,
};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use seawall_proto::{
    admission::{ANSWER_WITHIN, AdmissionConfig},
    close::Close,
    frame::ServerFrame,
    resume::{ResumeKeys, Revoked},
    rules::RuleSet,
    slots::RegistryIndex,
    time::{Instant, WallTime},
};

use super::{
    checks::{self, Violation},
    database::{Database, StatementId},
    devices::Devices,
    event::{Content, Event, Letter, Letters},
    gateway::none_revoked,
    network::{Accepted, Network, ROUND_TRIP_MAX},
    node::{Load, Node},
    queue::Calendar,
    recorder::{Observation, Recorder},
    script::Agenda,
    settings,
};
use crate::scenario::{FieldError, GROUP_ALL, Scenario};

/// Wall time at the start, in milliseconds: 2027.
const WALL_START_MS: u64 = 1_800_000_000_000;
/// The gateway's defaults, as its welcome says them.
const HEARTBEAT_MS: u64 = 30_000;
const BACKOFF_CAP_MS: u64 = 60_000;
/// Maximum number of device machines that a sweep checks, each virtual second. The next sweep continues from there.
pub(super) const SWEEP_MAX: usize = 131_072;

pub(super) struct World<'a> {
    pub scenario: &'a Scenario,
    pub now: Instant,
    pub calendar: Calendar<Event>,
    pub rng: SmallRng,
    pub network: Network,
    pub devices: Devices,
    pub nodes: Vec<Node>,
    /// Of all nodes.
    pub load: Load,
    pub database: Database,
    /// Which node sent a statement.
    pub statements: BTreeMap<StatementId, u8>,
    pub statement_counter: u32,
    pub rules: Arc<RuleSet>,
    pub revision: u64,
    pub resume_keys: ResumeKeys,
    pub revoked: Revoked,
    pub recorder: Recorder,
    pub agenda: Agenda,
    /// Devices that have been told to connect; those behind have not.
    pub begun: usize,
    pub events: u64,
    letters: Letters,
    /// The first frame for devices without a resume token.
    welcome: String,
    swept: usize,
    trace: DefaultHasher,
}

/// A request that is complete has its answer at the device within this.
pub(super) const ANSWERED_WITHIN: Duration = ANSWER_WITHIN.saturating_add(ROUND_TRIP_MAX);

/// Where and when an invariant broke.
#[derive(Debug, thiserror::Error)]
#[error("invariant violated at {at_us} us of virtual time, seed {seed}, event {number} ({event}): {violation}")]
pub struct Broken {
    pub seed: u64,
    pub at_us: u64,
    pub number: u64,
    pub event: String,
    pub violation: Violation,
}

/// The gateway's first frame.
fn welcome(resume: Option<&str>) -> String {
    ServerFrame::Welcome {
        session: "0000000000000001".into(),
        heartbeat_ms: HEARTBEAT_MS,
        backoff_cap_ms: BACKOFF_CAP_MS,
        resume: resume.map(Into::into),
        server_time: "2027-01-15T08:00:00Z".into(),
    }
    .to_json()
}

impl<'a> World<'a> {
    /// # Errors
    /// The gateway's settings in the scenario are none.
    pub fn new(scenario: &'a Scenario) -> Result<Self, FieldError> {
        let config: AdmissionConfig = settings::admission(scenario)?;
        let assumed = &scenario.simulate;
        let mut rng = SmallRng::seed_from_u64(scenario.seed);
        let network = assumed.network();
        let mut devices = Devices::new(scenario, &network, &mut rng)?;
        let group_names: Vec<String> = scenario.group_names().map(str::to_owned).collect();
        let mut groups_of: Vec<Vec<usize>> = Vec::new();
        for version in scenario.versions() {
            let number = devices.version(version);
            let in_group = |name: &String| {
                scenario
                    .groups
                    .get(name)
                    .is_some_and(|of| of.iter().any(|v| v == version))
            };
            let groups = (0..group_names.len())
                .filter(|group| group_names[*group] == GROUP_ALL || in_group(&group_names[*group]));
            groups_of.resize(groups_of.len().max(number + 1), Vec::new());
            groups_of[number] = groups.collect();
        }
        let recorder = Recorder::new(
            (0..devices.len()).map(|device| devices.cohort(device).version),
            groups_of,
            group_names,
        );
        let registry_index = Arc::new(devices.registry_index());
        let registry_index_of = |node: u8| {
            if node < assumed.nodes_without_registry_index {
                Arc::new(RegistryIndex::empty())
            } else {
                Arc::clone(&registry_index)
            }
        };
        Ok(Self {
            now: Instant::ZERO,
            calendar: Calendar::default(),
            nodes: (0..assumed.nodes)
                .map(|node| Node::new(&config, assumed, registry_index_of(node), scenario.seed))
                .collect(),
            load: Load::default(),
            database: Database::new(settings::curve(scenario, &config)),
            statements: BTreeMap::new(),
            statement_counter: 0,
            rules: Arc::new(RuleSet::empty()),
            revision: 0,
            resume_keys: ResumeKeys::new(1, [1; 32]),
            revoked: none_revoked(),
            recorder,
            agenda: Agenda::default(),
            begun: 0,
            events: 0,
            letters: Letters::default(),
            welcome: welcome(None),
            swept: 0,
            trace: DefaultHasher::new(),
            scenario,
            rng,
            network,
            devices,
        })
    }

    /// Runs the scenario to its end. `look` is called ten times a virtual second.
    ///
    /// # Errors
    /// A claim that fails ends the run.
    pub fn run(&mut self, mut look: impl FnMut(&Self)) -> Result<(), Broken> {
        let begun = self.begin_first_phase();
        begun.map_err(|violation| self.broken(violation, "start"))?;
        while !self.agenda.is_over {
            let (devices, recorder, letters) = (&self.devices, &self.recorder, &self.letters);
            let announce = |event: &Event| {
                if let Some(device) = event.device(letters) {
                    devices.fetch(device as usize);
                    recorder.fetch(device as usize);
                }
            };
            let Some((at, event)) = self.calendar.pop(announce) else {
                return Ok(());
            };
            self.events += 1;
            let done = checks::time(self.now, at).and_then(|()| {
                self.now = at;
                (at, event).hash(&mut self.trace);
                self.handle(event)
            });
            done.map_err(|violation| self.broken(violation, event))?;
            if matches!(event, Event::Look { .. }) {
                look(self);
            }
        }
        Ok(())
    }

    fn broken(&self, violation: Violation, event: impl std::fmt::Debug) -> Broken {
        Broken {
            seed: self.scenario.seed,
            at_us: self.now.as_micros(),
            number: self.events,
            event: format!("{event:?}"),
            violation,
        }
    }

    /// A hash of every event and its time: two runs with the same are the same.
    #[must_use]
    pub fn trace(&self) -> u64 {
        self.trace.finish()
    }

    #[must_use]
    pub fn wall(&self) -> WallTime {
        WallTime::from_unix_ms(WALL_START_MS + self.now.as_micros() / 1_000)
    }

    /// What a node takes the time to be.
    #[must_use]
    pub fn wall_at(&self, node: u8) -> WallTime {
        self.nodes[usize::from(node)].wall(self.wall())
    }

    fn handle(&mut self, event: Event) -> Result<(), Violation> {
        match event {
            Event::Wake { device } => return self.wake(device),
            Event::Syn { device, attempt, tries } => self.syn(device, attempt, tries),
            Event::Request { device, attempt, node } => return self.request(device, attempt, node),
            Event::Letter { number } => return self.deliver(number),
            Event::Hangup { device, attempt, node } => return self.hang_up(device, attempt, node),
            Event::Database { version } => return self.database_due(version),
            Event::StatementLate { statement } => return self.statement_late(StatementId(statement)),
            Event::StatementFailed { statement } => return self.statement_failed(StatementId(statement)),
            Event::Node { node } => {
                if self.nodes[usize::from(node)].is_armed(self.now) {
                    return self.settle(node);
                }
            }
            Event::Stranger => self.stranger(),
            Event::StrangerRequest { node } => return self.stranger_request(node),
            Event::Act { phase } => return self.act_of_phase(phase),
            Event::PhaseEnd { phase } => return self.phase_over(phase),
            Event::Look { phase } => return self.look_at_phase(phase),
            Event::Finish => return self.finish(),
            Event::Depart { node } => self.departures_due(node),
            Event::Incident { number } => return self.incident(number),
            Event::Back { node } => self.nodes[usize::from(node)].is_out = false,
        }
        Ok(())
    }

    /// Handles a device's timer: calls the machine as its driver does, and records what it did.
    fn wake(&mut self, device: u32) -> Result<(), Violation> {
        let index = device as usize;
        let machine = &mut self.devices.machines[index];
        if machine.poll_timeout().is_none_or(|due| due > self.now) {
            return Ok(()); // for an earlier wait; the current one has its own timer
        }
        let before = machine.state();
        machine.handle_timeout(self.now, &mut self.rng);
        match (before, machine.state()) {
            (State::Connecting, State::Waiting) => self.recorder.handle(index, Observation::Failed, self.now),
            (State::Online, State::Waiting) => {
                // A flapping or half-open device ended its session on its own: it is not lost.
                self.recorder.due(index, self.now, false);
            }
            (State::Waiting | State::Connecting | State::Online | State::Stopped { .. }, _) => {}
        }
        self.act(device)
    }

    /// After every event at a device: carries out the actions of its machine, schedules its timer, and checks the
    /// recorder.
    pub(super) fn act(&mut self, device: u32) -> Result<(), Violation> {
        let index = device as usize;
        while let Some(action) = self.devices.machines[index].poll_action() {
            match action {
                Action::Connect => self.connect(device),
                Action::Abort => self.abort(device),
                // The session is not simulated: pings are answered, and nothing is sent.
                Action::SendHeartbeat | Action::SendAck { .. } | Action::Update { .. } => {}
            }
        }
        let machine = &self.devices.machines[index];
        let is_timed = match machine.state() {
            State::Waiting => true,
            State::Online => matches!(machine.profile(), Profile::Flapping | Profile::HalfOpen),
            State::Connecting | State::Stopped { .. } => false,
        };
        if let Some(due) = machine.poll_timeout().filter(|_| is_timed) {
            let at = due.max(self.now) + self.network.draw_noise(&mut self.rng);
            self.calendar.push(at, Event::Wake { device });
        }
        let is_online = self.devices.note_presence(index);
        checks::recorder_agrees(index, is_online, self.recorder.is_connected(index))
    }

    fn connect(&mut self, device: u32) {
        let index = device as usize;
        self.recorder.handle(index, Observation::Attempt, self.now);
        let attempt = self.devices.count_attempt(index);
        let at = self.now + self.devices.half_trip(index);
        let tries = 0;
        self.calendar.push(at, Event::Syn { device, attempt, tries });
        self.time_out(device, at);
    }

    /// The attempt has no news before this time, if ever: then the machine's patience may end first, which only now needs its timer.
    pub(super) fn time_out(&mut self, device: u32, news_at: Instant) {
        if let Some(due) = self.devices.machines[device as usize]
            .poll_timeout()
            .filter(|due| *due <= news_at)
        {
            self.calendar.push(due.max(self.now), Event::Wake { device });
        }
    }

    /// Whatever the device had of a connection is gone; the node that it asked last learns of it.
    pub(super) fn abort(&mut self, device: u32) {
        let index = device as usize;
        let (attempt, node) = (self.devices.attempt(index), self.devices.home(index));
        if !self.nodes[usize::from(node)].is_waiting(device, attempt) {
            return; // a request that is still on its way finds the device gone
        }
        let at = self.now + self.devices.half_trip(index);
        self.calendar.push(at, Event::Hangup { device, attempt, node });
    }

    /// Is this still the attempt that the device makes?
    pub(super) fn is_current(&self, device: u32, attempt: u16) -> bool {
        let index = device as usize;
        self.devices.attempt(index) == attempt && self.devices.machines[index].state() == State::Connecting
    }

    fn syn(&mut self, device: u32, attempt: u16, tries: u8) {
        if !self.is_current(device, attempt) {
            return;
        }
        let Some(node) = self.draw_node() else {
            self.send(device, attempt, Content::Reset);
            return;
        };
        match self.nodes[usize::from(node)].edge.accept(tries, self.now) {
            Accepted::At(at) => {
                self.devices.set_home(device as usize, node);
                self.calendar.push(at, Event::Request { device, attempt, node });
                self.time_out(device, at);
            }
            Accepted::Again(after) => {
                let (at, tries) = (self.now + after, tries + 1);
                self.calendar.push(at, Event::Syn { device, attempt, tries });
                self.time_out(device, at);
            }
            Accepted::Lost => self.time_out(device, Instant::FAR_FUTURE),
            Accepted::Reset => self.send(device, attempt, Content::Reset),
        }
    }

    /// Node that the load balancer chooses for the next connection; `None` if there is none.
    pub(super) fn draw_node(&mut self) -> Option<u8> {
        let shares = &self.scenario.simulate.node_shares;
        let count = self.scenario.simulate.nodes;
        if shares.is_empty() && self.nodes.iter().all(|node| !node.is_out) {
            return Some(if count == 1 { 0 } else { self.rng.random_range(0..count) });
        }
        let share = |node: u8| {
            if self.nodes[usize::from(node)].is_out {
                return 0.0;
            }
            shares.get(usize::from(node)).copied().unwrap_or(1.0)
        };
        let all: f64 = (0..count).map(share).sum();
        let mut left = self.rng.random::<f64>() * all;
        let mut drawn = None;
        for node in (0..count).filter(|node| share(*node) > 0.0) {
            drawn = Some(node);
            left -= share(node);
            if left < 0.0 {
                break;
            }
        }
        drawn
    }

    /// Something goes to a device, and is there half a round trip from now.
    pub(super) fn send(&mut self, device: u32, attempt: u16, content: Content) {
        let at = self.now + self.devices.half_trip(device as usize);
        let number = self.letters.put(Letter {
            device,
            attempt,
            content,
        });
        self.calendar.push(at, Event::Letter { number });
    }

    fn deliver(&mut self, number: u32) -> Result<(), Violation> {
        let Some(letter) = self.letters.take(number) else {
            return Ok(());
        };
        let (device, index, now) = (letter.device, letter.device as usize, self.now);
        let is_current = self.is_current(device, letter.attempt);
        let node = self.devices.home(index);
        let is_dead = self.nodes[usize::from(node)].is_dead();
        let machine = &mut self.devices.machines[index];
        match letter.content {
            Content::Connected if is_current && is_dead => {
                machine.handle_failed(now, &mut self.rng);
                self.recorder.handle(index, Observation::Failed, now);
            }
            Content::Connected if is_current => {
                machine.handle_connected(now, &mut self.rng);
                match self.mint(index) {
                    None => self.devices.machines[index].handle_text(&self.welcome, now),
                    token => self.devices.machines[index].handle_text(&welcome(token.as_deref()), now),
                }
                self.recorder.handle(index, Observation::Connected, now);
                self.devices.set_promised(index, None);
                self.registered(device, node);
            }
            Content::Refused(code, hint) if is_current => {
                machine.handle_refused(hint, now, &mut self.rng);
                self.recorder.handle(index, Observation::Refused(code), now);
            }
            Content::Reset if is_current => {
                machine.handle_failed(now, &mut self.rng);
                self.recorder.handle(index, Observation::Failed, now);
            }
            Content::Closed(close)
                if machine.state() == State::Online && self.devices.attempt(index) == letter.attempt =>
            {
                let machine = &mut self.devices.machines[index];
                let reason = close.reason();
                let frame = CloseFrame {
                    code: close.code(),
                    reason: &reason,
                };
                machine.handle_closed(Some(frame), now, &mut self.rng);
                if matches!(close, Close::Restart { .. }) {
                    self.recorder.due(index, now, true);
                } else {
                    self.recorder.handle(index, Observation::Evicted, now);
                }
            }
            Content::Connected | Content::Refused(..) | Content::Reset | Content::Closed(_) => return Ok(()),
        }
        self.act(device)
    }

    /// Checks all nodes, all devices in the presence bitmap and the recorder, and up to `machines_max` machines, in
    /// turn.
    pub(super) fn sweep(&mut self, machines_max: usize) -> Result<(), Violation> {
        for node in &mut self.nodes {
            node.check_second(self.now)?;
        }
        let (presence, connected) = (self.devices.presence(), self.recorder.connected());
        checks::none_forgotten(presence.overdue(self.network.wake_noise, self.now))?;
        if let Some(device) = presence.online().difference(connected) {
            checks::recorder_agrees(device, presence.online().get(device), connected.get(device))?;
        }
        checks::counts_add_up(self.recorder.standing().connected, connected.count())?;
        let all = self.devices.len();
        for _ in 0..all.min(machines_max) {
            checks::unchanged(self.swept, self.devices.is_as_noted(self.swept))?;
            self.swept = (self.swept + 1) % all;
        }
        Ok(())
    }
}
