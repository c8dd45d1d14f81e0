//! One gateway node of the simulation: production's admission, and what its adapters would hold around it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use seawall_proto::{
    admission::{Admission, AdmissionConfig, AdmissionState, Batch, BatchId, Ticket},
    drain::{Homecoming, Pacing},
    id::DeviceId,
    slots::{Roster, SlotKeys},
    time::{Instant, WallTime},
};

use super::{
    checks::{self, Ledger, Violation},
    database::StatementId,
    devices::Devices,
    network::Edge,
    settings::{Edge as EdgeSettings, Settings},
};

/// How often a node keeps on disk what its database can do. As the gateway.
const KEEP_EVERY: Duration = Duration::from_secs(60);

/// Whoever asked with an id of nobody's.
pub const STRANGER: u32 = u32::MAX;

/// A request that waits for its answer.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    pub device: u32,
    pub attempt: u16,
    pub arrived: Instant,
}

/// A statement under way.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    pub batch: BatchId,
    keys: usize,
}

/// Sessions that a rule or a drain ends, one after the other.
#[derive(Debug)]
pub struct Eviction {
    pub pacing: Pacing,
    pub left: Vec<u32>,
}

/// What a node does at a moment; of all nodes, the sums.
#[derive(Clone, Copy, Debug, Default)]
pub struct Load {
    pub in_flight: u64,
    pub limit: u64,
    pub queue: u64,
}

impl Load {
    /// The sum, after one part of it has changed.
    #[must_use]
    pub const fn changed(&self, before: &Self, after: &Self) -> Self {
        Self {
            in_flight: self.in_flight + after.in_flight - before.in_flight,
            limit: self.limit + after.limit - before.limit,
            queue: self.queue + after.queue - before.queue,
        }
    }
}

#[derive(Debug)]
pub struct Node {
    pub admission: Admission<()>,
    pub edge: Edge,
    pub config: AdmissionConfig,
    pub ledger: Ledger,
    pub eviction: Option<Eviction>,
    pub drain: Option<Eviction>,
    /// When those come back that the drain sends away.
    pub homecoming: Option<Homecoming>,
    /// No new connection comes here: it is dead, or drains.
    pub is_out: bool,
    /// What its wall clock is wrong by, in milliseconds.
    pub clock_error_ms: i64,
    /// As the books saw it last.
    pub load: Load,
    waiting: BTreeMap<Ticket, Waiting>,
    /// Tickets by device and attempt.
    tickets: BTreeMap<(u32, u16), Ticket>,
    sent: BTreeMap<StatementId, Sent>,
    /// When the calendar has it look after its deadlines.
    armed: Instant,
    keys: SlotKeys,
    edge_settings: EdgeSettings,
    /// What is on its disk: keys a second, 0 for none, and when it was kept.
    known_good: f64,
    kept_at: Instant,
    /// On its disk, too.
    roster: Arc<Roster>,
}

impl Node {
    /// All nodes share the keys that slots are signed with.
    #[must_use]
    pub fn new(config: &AdmissionConfig, settings: &Settings, roster: Arc<Roster>, seed: u64) -> Self {
        let mut secret = [0; 32];
        secret[..8].copy_from_slice(&seed.to_be_bytes());
        let keys = SlotKeys::new(1, secret);
        let known_good = settings.last_known_good_per_second;
        Self::start(config, settings.edge, keys, known_good, roster, Instant::ZERO)
    }

    fn start(
        config: &AdmissionConfig,
        edge_settings: EdgeSettings,
        keys: SlotKeys,
        known_good: f64,
        roster: Arc<Roster>,
        now: Instant,
    ) -> Self {
        let mut admission = Admission::<()>::new(config.clone(), keys.clone(), now);
        if known_good > 0.0 {
            admission.set_last_known_good(known_good);
        }
        admission.set_roster(Arc::clone(&roster));
        Self {
            admission,
            edge: Edge::new(&edge_settings),
            config: config.clone(),
            ledger: Ledger::default(),
            eviction: None,
            drain: None,
            homecoming: None,
            is_out: false,
            clock_error_ms: 0,
            load: Load::default(),
            waiting: BTreeMap::new(),
            tickets: BTreeMap::new(),
            sent: BTreeMap::new(),
            armed: Instant::FAR_FUTURE,
            keys,
            edge_settings,
            known_good,
            kept_at: now,
            roster,
        }
    }

    /// It dies, and begins a new life with what is on its disk. Whoever waited here: nobody answers them.
    pub fn crash(&mut self, now: Instant) -> Vec<Waiting> {
        let mut next = Self::start(
            &self.config,
            self.edge_settings,
            self.keys.clone(),
            self.known_good,
            Arc::clone(&self.roster),
            now,
        );
        (next.load, next.clock_error_ms, next.is_out) = (self.load, self.clock_error_ms, true);
        let before = std::mem::replace(self, next);
        before.waiting.into_values().collect()
    }

    /// What its wall clock shows at this true time.
    #[must_use]
    pub const fn wall(&self, truth: WallTime) -> WallTime {
        WallTime::from_unix_ms(truth.as_unix_ms().saturating_add_signed(self.clock_error_ms))
    }

    #[must_use]
    pub fn state(&self, now: Instant) -> AdmissionState {
        self.admission.state(now)
    }

    pub fn begin_waiting(&mut self, ticket: Ticket, waiting: Waiting) {
        self.waiting.insert(ticket, waiting);
        if waiting.device != STRANGER {
            self.tickets.insert((waiting.device, waiting.attempt), ticket);
        }
    }

    /// # Errors
    /// It did not wait, or has waited too long.
    pub fn end_waiting(&mut self, ticket: Ticket, now: Instant) -> Result<Waiting, Violation> {
        let waiting = checks::answered_once(self.waiting.remove(&ticket), &ticket)?;
        self.tickets.remove(&(waiting.device, waiting.attempt));
        checks::answer(waiting.arrived, now)?;
        Ok(waiting)
    }

    /// All requests that wait here.
    pub fn all_waiting(&self) -> Vec<(Ticket, Waiting)> {
        self.waiting
            .iter()
            .map(|(ticket, waiting)| (*ticket, *waiting))
            .collect()
    }

    /// The devices behind these keys.
    pub fn waiting_for(&self, keys: &[DeviceId], devices: &Devices) -> impl Iterator<Item = u32> {
        let keys: BTreeSet<DeviceId> = keys.iter().copied().collect();
        self.waiting
            .values()
            .map(|waiting| waiting.device)
            .filter(move |device| *device != STRANGER && keys.contains(&devices.id(*device as usize)))
    }

    /// Does this attempt of the device wait here?
    #[must_use]
    pub fn is_waiting(&self, device: u32, attempt: u16) -> bool {
        self.tickets.contains_key(&(device, attempt))
    }

    /// The device has hung up, if it still waits.
    pub fn abandon(&mut self, device: u32, attempt: u16, now: Instant) {
        let Some(ticket) = self.tickets.remove(&(device, attempt)) else {
            return;
        };
        if self.waiting.remove(&ticket).is_some() {
            self.admission.abandon(ticket, now);
            self.ledger.abandoned += 1;
        }
    }

    pub fn begin_statement(&mut self, id: StatementId, batch: &Batch) {
        let keys = batch.keys.len();
        self.ledger.in_flight += keys;
        self.ledger.statements_in_flight += 1;
        if !batch.is_probe {
            self.ledger.keys_this_second += keys as u64;
        }
        self.sent.insert(id, Sent { batch: batch.id, keys });
    }

    /// `None` where it has ended before.
    pub fn end_statement(&mut self, id: StatementId) -> Option<Sent> {
        let sent = self.sent.remove(&id)?;
        self.ledger.in_flight -= sent.keys;
        self.ledger.statements_in_flight -= 1;
        Some(sent)
    }

    /// When the calendar must have it look after its deadlines, if it does not yet.
    pub fn arm(&mut self, now: Instant) -> Option<Instant> {
        let due = self.admission.poll_timeout(now)?.max(now);
        if due >= self.armed {
            return None;
        }
        self.armed = due;
        Some(due)
    }

    /// The calendar has it look after its deadlines. False where that was for an earlier arrangement.
    pub fn is_armed(&mut self, now: Instant) -> bool {
        let is_now = self.armed == now;
        if is_now {
            self.armed = Instant::FAR_FUTURE;
        }
        is_now
    }

    /// # Errors
    /// A claim on the node that fails.
    pub fn check(&self, now: Instant) -> Result<AdmissionState, Violation> {
        let state = self.state(now);
        self.ledger.check(self.waiting.len(), &state, &self.config)?;
        Ok(state)
    }

    /// Once a second; each minute it keeps on disk what its database can do.
    ///
    /// # Errors
    /// A request waits too long, or the ceiling was not kept.
    pub fn check_second(&mut self, now: Instant) -> Result<(), Violation> {
        if self.kept_at + KEEP_EVERY <= now {
            self.kept_at = now;
            self.known_good = self.admission.take_last_known_good(now).unwrap_or(self.known_good);
        }
        if let Some((_, oldest)) = self.waiting.first_key_value() {
            checks::answer(oldest.arrived, now)?;
        }
        self.ledger.check_second(&self.config)
    }
}
