//! What the nodes of a simulation do: requests come in, production decides, statements go out, answers go back.
//!
//! This stands where the gateway's connection tasks, its gate and its look-up workers stand, and is as thin: it carries decisions of
//! [`Admission`](seawall_proto::admission::Admission), of the rules and of `seawall_proto::handshake` to devices and database.

use std::time::Duration;

use rand::Rng;
use seawall_proto::{
    admission::{
        Action, AdmissionState, Arrival, Batch, BatchFailure, CohortTag, Decision, LOOKUP_MAX, Refused, Ticket, Told,
    },
    handshake::{self, Next, Policy},
    hello::{Hello, SessionKind},
    id::{DeviceId, Label, Network, Proof, SecretHash, SessionId},
    record::{DeviceRecord, DeviceState},
    refusal::{Code, Hint, Peers, Refusal},
    resume::{self, Generation, Grant, Judge, Revoked},
};
use uuid::Uuid;

use super::{
    checks::{self, Violation},
    database::{REFUSED_AFTER, StatementId, exponential},
    event::{Content, Event},
    network::Accepted,
    node::{Load, STRANGER, Waiting},
    world::{ANSWERED_WITHIN, World},
};

/// The credential of every simulated device: what it hashes to makes no difference to any decision.
const CREDENTIAL: SecretHash = SecretHash::from_bytes([7; 32]);
/// Nobody guesses at credentials in a simulation: where a device comes from makes no difference to any decision.
const NETWORK: Network = Network::V4(0);
/// No device is revoked in a simulation.
const GENERATION: Generation = Generation(1);

/// What comes before a look-up came to.
enum Way {
    LookUp,
    /// Its resume token counts.
    Session,
    Refused(Refusal),
}

impl World<'_> {
    /// A device's request is complete.
    pub(super) fn request(&mut self, device: u32, attempt: u16, node: u8) -> Result<(), Violation> {
        if !self.is_current(device, attempt) {
            return Ok(()); // it hung up before its head was read
        }
        let index = device as usize;
        self.devices.machines[index].handle_opened(self.now);
        self.devices.enroll(index);
        self.time_out(device, self.now + ANSWERED_WITHIN);
        self.nodes[usize::from(node)].ledger.arrived += 1;
        if self.has_died(node) {
            self.nodes[usize::from(node)].ledger.refused += 1;
            self.send(device, attempt, Content::Reset);
            return Ok(());
        }
        match self.before_look_up(index, node) {
            Way::LookUp => self.enter(device, attempt, node)?,
            Way::Session => self.let_in(device, attempt, node)?,
            Way::Refused(refusal) => self.refuse(device, attempt, node, refusal.code, refusal.hint),
        }
        self.settle(node)
    }

    /// The device wants to be looked up.
    fn enter(&mut self, device: u32, attempt: u16, node: u8) -> Result<(), Violation> {
        let index = device as usize;
        let (id, now, wall) = (self.devices.id(index), self.now, self.wall_at(node));
        let at = &mut self.nodes[usize::from(node)];
        let arrival = Arrival {
            device: id,
            cohort: self.devices.cohort(index).tag,
            slot_token: self.devices.machines[index].slot(),
            arrived: now,
            is_known_absent: false,
            proof: Proof::Secret,
            network: NETWORK,
        };
        match at.admission.attempt(&arrival, now, wall, &mut self.rng) {
            Decision::Queued(ticket) => {
                let waiting = Waiting {
                    device,
                    attempt,
                    arrived: now,
                };
                at.begin_waiting(ticket, waiting);
            }
            Decision::Refused(refused) => self.refuse_with_slot(device, attempt, node, refused)?,
            Decision::KnownAbsent => {
                let refusal = Refusal::unauthorized(&mut self.rng);
                self.refuse(device, attempt, node, refusal.code, refusal.hint);
            }
        }
        Ok(())
    }

    /// Rules on what the device says of itself, then its resume token. Without rules and token there is nothing to decide.
    fn before_look_up(&mut self, device: usize, node: u8) -> Way {
        let is_plain = self.rules.rules().is_empty() && self.devices.machines[device].resume().is_none();
        if is_plain && !self.nodes[usize::from(node)].is_out {
            return Way::LookUp;
        }
        match self.next_step(self.hello(device), node) {
            Ok(Next::Session(_)) => Way::Session,
            Ok(Next::LookUp(_)) => Way::LookUp,
            Ok(Next::Refused(refusal)) | Err(refusal) => Way::Refused(refusal),
        }
    }

    fn next_step(&mut self, hello: Hello, node: u8) -> Result<Next, Refusal> {
        let device = hello.device;
        let wall = self.wall_at(node);
        let policy = Policy {
            rules: &self.rules,
            // As the gateway, which knows of no others.
            draining: self.nodes[usize::from(node)].is_out.then_some(Peers::None),
            wall,
        };
        let judge = Judge {
            keys: &self.resume_keys,
            revoked: &self.revoked,
            is_stale: self.database.has_trouble(),
        };
        let screened = handshake::screen(hello, &policy, &mut self.rng)?;
        let next = handshake::resume(screened, &judge, &self.rules, wall, &mut self.rng).next;
        if let Next::LookUp(unproven) = &next
            && let Some(tenant) = unproven.vouched()
        {
            let at = &mut self.nodes[usize::from(node)];
            at.admission.handle_vouched(device, tenant.as_str());
        }
        Ok(next)
    }

    /// The credential, which is right, and rules by what the registry says.
    fn conclude(&mut self, device: usize, node: u8) -> Result<(), Refusal> {
        if self.rules.rules().is_empty() {
            return Ok(());
        }
        let hello = Hello {
            resume: None,
            ..self.hello(device)
        };
        let unproven = match self.next_step(hello, node)? {
            Next::LookUp(unproven) => unproven,
            Next::Session(_) => return Ok(()),
            Next::Refused(refusal) => return Err(refusal),
        };
        let cohort = self.devices.cohort(device);
        let record = DeviceRecord {
            id: self.devices.id(device),
            tenant: cohort.tenant.clone(),
            model: cohort.model.clone(),
            secret: CREDENTIAL,
            previous_secret: None,
            state: DeviceState::Enabled,
        };
        let (wall, as_of) = (self.wall_at(node), GENERATION);
        handshake::conclude(unproven, Some(&record), as_of, &self.rules, wall, &mut self.rng).map(drop)
    }

    fn hello(&self, device: usize) -> Hello {
        let cohort = self.devices.cohort(device);
        Hello {
            external_id: None,
            device: self.devices.id(device),
            credential: Some(CREDENTIAL.into()),
            firmware: label(self.devices.version_name(cohort.version)),
            model: cohort.model.clone(),
            tenant: Some(cohort.tenant.clone()),
            slot: None,
            resume: self.devices.machines[device].resume().map(Box::from),
            session_kind: SessionKind::V1,
            protocol: None,
            websocket_key: [b'A'; 24],
        }
    }

    fn refuse_with_slot(
        &mut self,
        device: u32,
        attempt: u16,
        node: u8,
        Refused { cause, hint }: Refused,
    ) -> Result<(), Violation> {
        checks::slot_hint(hint.after)?;
        if device != STRANGER {
            let index = device as usize;
            // A device that shows no slot is told what this node remembers; another node may know better.
            let shows_slot = self.devices.machines[index].slot().is_some();
            let promised = self.devices.promised(index).filter(|_| shows_slot);
            checks::slot_kept(promised, self.now + hint.after)?;
            self.devices.set_promised(index, checks::promise(hint.after, self.now));
            let seconds = hint.after.as_secs_f64();
            self.books.gauge(self.now, |_, second| second.add_hint(seconds));
        }
        self.refuse(device, attempt, node, cause.code(), Some(hint));
        Ok(())
    }

    fn refuse(&mut self, device: u32, attempt: u16, node: u8, code: Code, hint: Option<Hint>) {
        self.nodes[usize::from(node)].ledger.refused += 1;
        if device != STRANGER {
            // It reads the hint off a header, in whole milliseconds.
            let told = hint.map(|hint| Hint {
                after: Duration::from_millis(hint.after_ms()),
                slot: hint.slot,
            });
            self.send(device, attempt, Content::Refused(code, told));
        }
    }

    /// Takes those out of a node's queue that the rules in force refuse.
    pub(super) fn screen_waiting(&mut self, node: u8) -> Result<(), Violation> {
        let wall = self.wall_at(node);
        for (ticket, waiting) in self.nodes[usize::from(node)].all_waiting() {
            if waiting.device == STRANGER {
                continue;
            }
            let hello = self.hello(waiting.device as usize);
            if let Some(refusal) = handshake::screen_claims(&hello.claims(), &self.rules, wall, &mut self.rng) {
                let at = &mut self.nodes[usize::from(node)];
                at.end_waiting(ticket, self.now)?;
                at.admission.abandon(ticket, self.now);
                self.refuse(waiting.device, waiting.attempt, node, refusal.code, refusal.hint);
            }
        }
        self.settle(node)
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
        if self.nodes[usize::from(node)].is_out {
            return Ok(());
        }
        let (now, wall) = (self.now, self.wall_at(node));
        let id = DeviceId::from_uuid(Uuid::from_u128(self.rng.random()));
        let at = &mut self.nodes[usize::from(node)];
        at.ledger.arrived += 1;
        let arrival = Arrival {
            device: id,
            cohort: CohortTag::of(None, None),
            slot_token: None,
            arrived: now,
            is_known_absent: false,
            proof: Proof::Secret,
            network: NETWORK,
        };
        match at.admission.attempt(&arrival, now, wall, &mut self.rng) {
            Decision::Queued(ticket) => {
                let waiting = Waiting {
                    device: STRANGER,
                    attempt: 0,
                    arrived: now,
                };
                at.begin_waiting(ticket, waiting);
            }
            Decision::Refused(refused) => self.refuse_with_slot(STRANGER, 0, node, refused)?,
            Decision::KnownAbsent => at.ledger.refused += 1,
        }
        self.settle(node)
    }

    /// Sends what may be sent, answers what is owed, and has the node's deadlines in the calendar. After every event at a node.
    pub(super) fn settle(&mut self, node: u8) -> Result<(), Violation> {
        let (now, wall) = (self.now, self.wall_at(node));
        loop {
            let at = &mut self.nodes[usize::from(node)];
            let before = at.state(now);
            if let Some(batch) = at.admission.poll_batch(now) {
                checks::statement(&batch, &before, at.ledger.statements_in_flight, &at.config)?;
                checks::none_blocked(self.blocked_behind(node, &batch))?;
                self.send_statement(node, &batch);
            } else if let Some(action) = at.admission.poll_action(now, wall, &mut self.rng) {
                self.owed(node, action)?;
            } else {
                break;
            }
        }
        let at = &mut self.nodes[usize::from(node)];
        if let Some(due) = at.arm(now) {
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
        self.books.gauge(self.now, |gauges, second| {
            gauges.in_flight_max = gauges.in_flight_max.max(all.in_flight);
            gauges.limit_max = gauges.limit_max.max(all.limit);
            gauges.queue_max = gauges.queue_max.max(all.queue);
            second.in_flight = second.in_flight.max(all.in_flight as f64);
            second.limit = Some(all.limit as f64);
            second.queue = second.queue.max(all.queue as f64);
        });
    }

    fn owed(&mut self, node: u8, action: Action<()>) -> Result<(), Violation> {
        match action {
            Action::Answer { ticket, .. } => self.answer(node, ticket),
            Action::Refuse { ticket, refused } => {
                let waiting = self.nodes[usize::from(node)].end_waiting(ticket, self.now)?;
                self.refuse_with_slot(waiting.device, waiting.attempt, node, refused)
            }
        }
    }

    fn answer(&mut self, node: u8, ticket: Ticket) -> Result<(), Violation> {
        let at = &mut self.nodes[usize::from(node)];
        let Waiting { device, attempt, .. } = at.end_waiting(ticket, self.now)?;
        if device == STRANGER {
            at.ledger.refused += 1;
            at.admission.handle_wrong_credential(ticket, self.now);
            return Ok(());
        }
        at.admission.handle_right_credential(ticket, self.now);
        let index = device as usize;
        if let Err(refusal) = self.conclude(index, node) {
            self.refuse(device, attempt, node, refusal.code, refusal.hint);
            return Ok(());
        }
        self.let_in(device, attempt, node)
    }

    /// The device was authenticated. It gets its 101 and its welcome, with a resume token where the scenario has it hold one.
    fn let_in(&mut self, device: u32, attempt: u16, node: u8) -> Result<(), Violation> {
        let index = device as usize;
        checks::admitted_once(self.books.is_connected(index), index)?;
        let at = &mut self.nodes[usize::from(node)];
        at.ledger.admitted += 1;
        let id = self.devices.id(index);
        let tenant = &self.devices.cohort(index).tenant;
        at.admission.handle_admitted(id, tenant.as_str());
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
            credential: CREDENTIAL.into(),
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

    fn send_statement(&mut self, node: u8, batch: &Batch) {
        self.statement_counter += 1;
        let id = StatementId(self.statement_counter);
        self.nodes[usize::from(node)].begin_statement(id, batch);
        self.statements.insert(id, node);
        self.books.gauge(self.now, |gauges, second| {
            gauges.statements += 1;
            second.statements += 1.0;
        });
        if self.database.is_killed() {
            self.calendar
                .push(self.now + REFUSED_AFTER, Event::StatementFailed { statement: id.0 });
            return;
        }
        let scans = if batch.is_probe { 0 } else { self.scans(node, batch) };
        let keys = u32::try_from(batch.keys.len()).unwrap_or(u32::MAX);
        let scan = f64::from(scans) * self.scenario.simulate.database.scan_ms / 1_000.0;
        self.database.start(id, keys, scan, self.now, &mut self.rng);
        self.calendar
            .push(self.now + LOOKUP_MAX, Event::StatementLate { statement: id.0 });
        self.forecast();
    }

    /// Devices behind a statement that the rules in force refuse by what they say of themselves.
    fn blocked_behind(&self, node: u8, batch: &Batch) -> usize {
        if self.rules.rules().is_empty() {
            return 0;
        }
        let wall = self.wall_at(node);
        let is_blocked = |device: &u32| {
            let hello = self.hello(*device as usize);
            self.rules.evaluate(&hello.claims(), wall).is_some()
        };
        let at = &self.nodes[usize::from(node)];
        at.waiting_for(&batch.keys, &self.devices).filter(is_blocked).count()
    }

    /// Keys of devices whose look-up scans the table.
    fn scans(&mut self, node: u8, batch: &Batch) -> u32 {
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
        let scans = at
            .waiting_for(&batch.keys, devices)
            .filter(|device| is_slow(*device))
            .count();
        self.books
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
        let at = &mut self.nodes[usize::from(node)];
        let Some(sent) = at.end_statement(id) else {
            return Ok(());
        };
        at.admission
            .handle_batch_done(sent.batch, outcome.map(|()| |_| Told::Found(())), self.now);
        self.settle(node)
    }
}

/// What every node knows of revocations: that there are none.
pub(super) fn none_revoked() -> Revoked {
    Revoked::of(GENERATION, Generation::default(), [])
}

fn label(text: &str) -> Option<Label> {
    Label::parse(text).ok().flatten()
}
