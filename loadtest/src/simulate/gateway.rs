//! What the nodes of a simulation do: requests come in, production decides, statements go out, answers go back.
//!
//! This stands where the gateway's connection tasks, its look-up service and its workers stand, and is as thin: it
//! carries what [`Connect`](seawall_proto::connect::Connect) decides to devices and database.

use std::time::Duration;

use rand::{Rng, rngs::SmallRng};
use seawall_proto::{
    admission::{AdmissionState, BatchFailure, LOOKUP_MAX},
    connect::{Attempt, Conclusion, Conditions, Decision, Output, Row, Statement, Step, screen},
    id::{DeviceId, Network, SessionId},
    refusal::{Hint, Peers, Refusal},
    resume::{self, Generation, Grant, Revoked, Verifier},
    rules::Ruling,
    time::Instant,
};
use uuid::Uuid;

use super::{
    checks::{self, Violation},
    database::{REFUSED_AFTER, StatementId, exponential},
    devices::{CREDENTIAL, Devices},
    event::{Content, Event},
    network::Accepted,
    node::{Load, Node, STRANGER, Waiting},
    world::{ANSWERED_WITHIN, World},
};

/// Nobody guesses at credentials in a simulation: where a device comes from makes no difference to any decision.
const NETWORK: Network = Network::V4(0);
/// No device is revoked in a simulation.
const GENERATION: Generation = Generation(1);

impl World<'_> {
    /// A device's request is complete.
    pub(super) fn request(&mut self, device: u32, attempt: u16, node: u8) -> Result<(), Violation> {
        if !self.is_current(device, attempt) {
            return Ok(()); // it hung up before its head was read
        }
        let index = device as usize;
        self.devices.machines[index].handle_opened(self.now);
        self.devices.note_presence(index);
        self.time_out(device, self.now + ANSWERED_WITHIN);
        if self.nodes[usize::from(node)].is_dead() {
            let ledger = &mut self.nodes[usize::from(node)].ledger;
            ledger.arrived += 1;
            ledger.refused += 1;
            self.send(device, attempt, Content::Reset);
            return Ok(());
        }
        self.connect_device(device, attempt, node)
    }

    fn connect_device(&mut self, device: u32, attempt: u16, node: u8) -> Result<(), Violation> {
        let now = self.now;
        let waiting = Waiting {
            device,
            attempt,
            arrived: now,
        };
        let unknown = (device == STRANGER).then(|| DeviceId::from_uuid(Uuid::from_u128(self.rng.random())));
        let step = self.at_node(node, |at, devices, conditions, rng| {
            at.ledger.arrived += 1;
            let attempt = match unknown {
                Some(id) => attempt_of_nobody(id, now),
                None => attempt_of(devices, device as usize, now),
            };
            let known_tenant = |attempt: &Attempt<'_>| at.connect.claimed_tenant(attempt, now);
            match screen(attempt, conditions, known_tenant, rng).next {
                Ok(screened) => at.connect.handle_screened(screened, || waiting, conditions, rng),
                Err(conclusion) => Step::Concluded(conclusion),
            }
        });
        match step {
            Step::Waiting(ticket) => self.nodes[usize::from(node)].begin_waiting(ticket, waiting),
            Step::Concluded(conclusion) => self.answer(waiting, node, conclusion)?,
        }
        self.settle(node)
    }

    /// Does something at a node, by what it decides by now.
    fn at_node<T>(
        &mut self,
        node: u8,
        work: impl FnOnce(&mut Node, &Devices, &Conditions<'_>, &mut SmallRng) -> T,
    ) -> T {
        let (now, wall) = (self.now, self.wall_at(node));
        let at = &mut self.nodes[usize::from(node)];
        let conditions = Conditions {
            rules: &self.rules,
            verifier: Verifier {
                keys: &self.resume_keys,
                revoked: &self.revoked,
                is_stale: self.database.has_trouble(),
            },
            // As the gateway, which knows of no others.
            draining: at.is_out.then_some(Peers::None),
            sessions: 0,
            now,
            wall,
        };
        work(at, &self.devices, &conditions, &mut self.rng)
    }

    fn answer(&mut self, waiting: Waiting, node: u8, conclusion: Conclusion) -> Result<(), Violation> {
        match conclusion.decision {
            Decision::Admitted(_) => self.let_in(waiting.device, waiting.attempt, node),
            // A simulated device has no use for an update.
            Decision::Restricted(restriction) => self.refuse(waiting, node, restriction.refusal),
            Decision::Refused(refusal) => self.refuse(waiting, node, refusal),
        }
    }

    fn refuse(&mut self, waiting: Waiting, node: u8, refusal: Refusal) -> Result<(), Violation> {
        let Waiting { device, attempt, .. } = waiting;
        if let Some(hint) = refusal.hint.as_ref().filter(|hint| hint.slot.is_some()) {
            self.check_slot(device, hint)?;
        }
        self.nodes[usize::from(node)].ledger.refused += 1;
        if device != STRANGER {
            // It reads the hint off a header, in whole milliseconds.
            let told = refusal.hint.map(|hint| Hint {
                after: Duration::from_millis(hint.after_ms()),
                slot: hint.slot,
            });
            self.send(device, attempt, Content::Refused(refusal.code, told));
        }
        Ok(())
    }

    fn check_slot(&mut self, device: u32, hint: &Hint) -> Result<(), Violation> {
        checks::slot_hint(hint.after)?;
        if device != STRANGER {
            let index = device as usize;
            // A device that shows no slot is told what this node remembers; another node may know better.
            let shows_slot = self.devices.machines[index].slot().is_some();
            let promised = self.devices.promised(index).filter(|_| shows_slot);
            checks::slot_kept(promised, self.now + hint.after)?;
            self.devices.set_promised(index, checks::promise(hint.after, self.now));
            let seconds = hint.after.as_secs_f64();
            self.recorder.gauge(self.now, |_, second| second.add_hint(seconds));
        }
        Ok(())
    }

    /// The node learns that a device has gone.
    pub(super) fn hang_up(&mut self, device: u32, attempt: u16, node: u8) -> Result<(), Violation> {
        self.nodes[usize::from(node)].abandon(device, attempt, self.now);
        self.settle(node)
    }

    /// Someone comes with an id that nobody has registered.
    pub(super) fn stranger(&mut self) {
        if let Some(node) = self.draw_node()
            && let Accepted::At(at) = self.nodes[usize::from(node)].edge.accept(0, self.now)
        {
            self.calendar.push(at, Event::StrangerRequest { node });
        }
        let pause = 1.0 / self.scenario.simulate.strangers_per_second;
        let next = self.now + Duration::from_secs_f64(exponential(pause, &mut self.rng));
        self.calendar.push(next, Event::Stranger);
    }

    pub(super) fn stranger_request(&mut self, node: u8) -> Result<(), Violation> {
        if self.nodes[usize::from(node)].is_dead() {
            return Ok(());
        }
        self.connect_device(STRANGER, 0, node)
    }

    /// Sends what may be sent, answers what is owed, and has the node's deadlines in the calendar. After every event at
    /// a node.
    pub(super) fn settle(&mut self, node: u8) -> Result<(), Violation> {
        let (now, place) = (self.now, usize::from(node));
        let due = loop {
            let before = self.nodes[place].state(now);
            match self.at_node(node, |at, _, conditions, rng| at.connect.poll_output(conditions, rng)) {
                Output::Send(statement) => {
                    let at = &self.nodes[place];
                    let running = at.ledger.statements_in_flight;
                    checks::statement(&statement.batch, &before, running, &at.config)?;
                    checks::none_blocked(self.blocked_behind(node, &statement))?;
                    self.send_statement(node, statement);
                }
                Output::Conclusion { caller, conclusion, .. } => {
                    self.nodes[place].end_waiting(caller, now)?;
                    self.answer(caller, node, conclusion)?;
                }
                // This registry loses nobody.
                Output::CountRegistry => {}
                Output::Wait(due) => break due,
            }
        };
        let at = &mut self.nodes[place];
        if let Some(due) = due.and_then(|due| at.arm(due, now)) {
            self.calendar.push(due, Event::Node { node });
        }
        let state = at.check(now)?;
        self.gauge(node, &state);
        Ok(())
    }

    /// What all nodes have together, after this one has changed.
    pub(super) fn gauge(&mut self, node: u8, state: &AdmissionState) {
        let load = Load {
            in_flight: u64::from(state.in_flight),
            limit: u64::from(state.limit),
            queue: state.queue as u64,
        };
        let before = std::mem::replace(&mut self.nodes[usize::from(node)].load, load);
        self.load = self.load.changed(&before, &load);
        let all = self.load;
        self.recorder.gauge(self.now, |gauges, second| {
            gauges.in_flight_max = gauges.in_flight_max.max(all.in_flight);
            gauges.limit_max = gauges.limit_max.max(all.limit);
            gauges.queue_max = gauges.queue_max.max(all.queue);
            second.in_flight = second.in_flight.max(all.in_flight as f64);
            second.limit = Some(all.limit as f64);
            second.queue = second.queue.max(all.queue as f64);
        });
    }

    /// The device was authenticated. It gets its 101 and its welcome, with a resume token where the scenario has it
    /// hold one.
    fn let_in(&mut self, device: u32, attempt: u16, node: u8) -> Result<(), Violation> {
        let index = device as usize;
        checks::admitted_once(self.recorder.is_connected(index), index)?;
        self.nodes[usize::from(node)].ledger.admitted += 1;
        self.devices.set_home(index, node);
        self.send(device, attempt, Content::Connected);
        Ok(())
    }

    /// The resume token that a device's welcome brings.
    pub(super) fn mint(&self, device: usize) -> Option<Box<str>> {
        let cohort = self.devices.cohort(device);
        if !cohort.resumes {
            return None;
        }
        let grant = Grant {
            device: self.devices.id(device),
            credential: CREDENTIAL,
            tenant: cohort.tenant.clone(),
            model: cohort.model.clone(),
            generation: GENERATION,
            credential_until: None,
        };
        let session = SessionId(self.events);
        let wall = self.wall_at(self.devices.home(device));
        let minted = grant.mint(&self.resume_keys, session, resume::LIFE, wall)?;
        Some(minted.text)
    }

    fn send_statement(&mut self, node: u8, statement: Statement) {
        self.statement_counter += 1;
        let id = StatementId(self.statement_counter);
        let batch = &statement.batch;
        let scans = if batch.is_probe {
            0
        } else {
            self.scans(node, &batch.keys)
        };
        let keys = u32::try_from(batch.keys.len()).unwrap_or(u32::MAX);
        self.nodes[usize::from(node)].begin_statement(id, statement, self.now);
        self.statements.insert(id, node);
        self.recorder.gauge(self.now, |gauges, second| {
            gauges.statements += 1;
            second.statements += 1.0;
        });
        if self.database.is_killed() {
            self.calendar
                .push(self.now + REFUSED_AFTER, Event::StatementFailed { statement: id.0 });
            return;
        }
        let scan = f64::from(scans) * self.scenario.simulate.database.scan_ms / 1_000.0;
        self.database.start(id, keys, scan, self.now, &mut self.rng);
        self.calendar
            .push(self.now + LOOKUP_MAX, Event::StatementLate { statement: id.0 });
        self.forecast();
    }

    /// Devices behind a statement that the rules in force refuse by what they say of themselves.
    fn blocked_behind(&self, node: u8, statement: &Statement) -> usize {
        if self.rules.rules().is_empty() {
            return 0;
        }
        let wall = self.wall_at(node);
        let is_blocked = |device: &u32| {
            let attempt = attempt_of(&self.devices, *device as usize, self.now);
            let at = &self.nodes[usize::from(node)];
            let tenant = at.connect.claimed_tenant(&attempt, self.now);
            let enforced = self.rules.verdict(&attempt.claims(tenant, &self.rules), wall).enforced;
            matches!(enforced, Some(Ruling::Block(_)))
        };
        let at = &self.nodes[usize::from(node)];
        at.waiting_for(&statement.batch.keys, &self.devices)
            .filter(is_blocked)
            .count()
    }

    /// Keys of devices whose look-up scans the table.
    fn scans(&mut self, node: u8, keys: &[DeviceId]) -> u32 {
        let slow = &self.scenario.database.slow_firmware;
        if slow.is_empty() {
            return 0;
        }
        let at = &self.nodes[usize::from(node)];
        let devices = &self.devices;
        let is_slow = |device: u32| {
            device != STRANGER
                && slow
                    .iter()
                    .any(|version| version == devices.version_name(devices.cohort(device as usize).version))
        };
        let scans = at.waiting_for(keys, devices).filter(|device| is_slow(*device)).count();
        self.recorder
            .gauge(self.now, |gauges, _| gauges.slow_lookups += scans as u64);
        u32::try_from(scans).unwrap_or(u32::MAX)
    }

    /// Has the end of the database's next statement in the calendar.
    pub(super) fn forecast(&mut self) {
        if let Some(at) = self.database.poll_timeout() {
            let version = self.database.version();
            self.calendar.push(at, Event::Database { version });
        }
    }

    pub(super) fn database_due(&mut self, version: u32) -> Result<(), Violation> {
        if self.database.version() != version {
            return Ok(());
        }
        while let Some(id) = self.database.poll_done(self.now) {
            self.end_statement(id, Ok(()))?;
        }
        self.forecast();
        Ok(())
    }

    pub(super) fn statement_late(&mut self, id: StatementId) -> Result<(), Violation> {
        if !self.statements.contains_key(&id) {
            return Ok(());
        }
        self.database.cancel(id, self.now);
        self.end_statement(id, Err(BatchFailure::TimedOut))?;
        self.forecast();
        Ok(())
    }

    pub(super) fn statement_failed(&mut self, id: StatementId) -> Result<(), Violation> {
        self.end_statement(id, Err(BatchFailure::Failed))
    }

    fn end_statement(&mut self, id: StatementId, outcome: Result<(), BatchFailure>) -> Result<(), Violation> {
        let Some(node) = self.statements.remove(&id) else {
            return Ok(());
        };
        let Some((statement, took)) = self.nodes[usize::from(node)].end_statement(id, self.now) else {
            return Ok(());
        };
        self.at_node(node, |at, devices, conditions, rng| {
            let now = conditions.now;
            let row = |device| devices.record(device).map_or(Row::Missing, Row::Found);
            match outcome {
                Ok(()) => at.connect.handle_answered(&statement, row, took, now, rng),
                Err(failure) => at.connect.handle_failed(&statement, failure, now),
            }
        });
        self.settle(node)
    }
}

/// What a device says when it connects.
fn attempt_of(devices: &Devices, device: usize, now: Instant) -> Attempt<'_> {
    let cohort = devices.cohort(device);
    let machine = &devices.machines[device];
    Attempt {
        firmware: cohort.firmware.as_ref(),
        model: cohort.model.as_ref(),
        tenant: Some(&cohort.tenant),
        slot: machine.slot(),
        resume: machine.resume(),
        ..attempt_of_nobody(devices.id(device), now)
    }
}

/// A credential, and no more.
const fn attempt_of_nobody<'a>(device: DeviceId, now: Instant) -> Attempt<'a> {
    Attempt {
        device,
        credential: Some(CREDENTIAL),
        firmware: None,
        model: None,
        tenant: None,
        slot: None,
        resume: None,
        network: NETWORK,
        arrived: now,
    }
}

/// What every node knows of revocations: that there are none.
pub(super) fn none_revoked() -> Revoked {
    Revoked::of(GENERATION, Generation::default(), [])
}
