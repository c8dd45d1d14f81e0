//! One gateway node of the simulation: production's connect machine, and what its adapters would hold around it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use seawall_proto::{
    admission::{AdmissionConfig, AdmissionState, Ticket},
    connect::{Connect, Statement},
    departures::{Departures, DrainState},
    id::DeviceId,
    slots::{RegistryIndex, SlotKeys},
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

/// An attempt with an unregistered id.
pub const STRANGER: u32 = u32::MAX;

/// A request that waits for its answer.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    pub device: u32,
    pub attempt: u16,
    pub arrived: Instant,
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
    pub connect: Connect<Waiting>,
    pub edge: Edge,
    pub config: AdmissionConfig,
    pub ledger: Ledger,
    pub departures: Departures<u32>,
    /// When the calendar calls [`departures`](Self::departures).
    pub departs_at: Instant,
    /// The balancer sends no new connection here: the node is dead or drains.
    pub is_out: bool,
    /// What its wall clock is wrong by, in milliseconds.
    pub clock_error_ms: i64,
    /// As the recorder saw it last.
    pub load: Load,
    /// Tickets by device and attempt.
    tickets: BTreeMap<(u32, u16), Ticket>,
    /// Statements under way, and when each was sent.
    sent: BTreeMap<StatementId, (Statement, Instant)>,
    /// When the calendar calls the node for its deadlines.
    armed: Instant,
    keys: SlotKeys,
    edge_settings: EdgeSettings,
    /// Content of its disk: keys per second, 0 for none, and when it was kept.
    known_good: f64,
    kept_at: Instant,
    /// On its disk as well.
    registry_index: Arc<RegistryIndex>,
}

impl Node {
    /// All nodes share the keys that slots are signed with.
    #[must_use]
    pub fn new(config: &AdmissionConfig, settings: &Settings, registry_index: Arc<RegistryIndex>, seed: u64) -> Self {
        let mut secret = [0; 32];
        secret[..8].copy_from_slice(&seed.to_be_bytes());
        let keys = SlotKeys::new(1, secret);
        let known_good = settings.last_known_good_per_second;
        Self::start(config, settings.edge, keys, known_good, registry_index, Instant::ZERO)
    }

    fn start(
        config: &AdmissionConfig,
        edge_settings: EdgeSettings,
        keys: SlotKeys,
        known_good: f64,
        registry_index: Arc<RegistryIndex>,
        now: Instant,
    ) -> Self {
        let mut connect = Connect::new(config.clone(), keys.clone(), now);
        if known_good > 0.0 {
            connect.set_last_known_good(known_good);
        }
        connect.set_registry_index(Arc::clone(&registry_index));
        Self {
            connect,
            edge: Edge::new(&edge_settings),
            config: config.clone(),
            ledger: Ledger::default(),
            departures: Departures::new(None, now),
            departs_at: Instant::FAR_FUTURE,
            is_out: false,
            clock_error_ms: 0,
            load: Load::default(),
            tickets: BTreeMap::new(),
            sent: BTreeMap::new(),
            armed: Instant::FAR_FUTURE,
            keys,
            edge_settings,
            known_good,
            kept_at: now,
            registry_index,
        }
    }

    /// It dies, and begins a new life with what is on its disk. Devices that waited here get no answer.
    pub fn crash(&mut self, now: Instant) -> Vec<Waiting> {
        let mut next = Self::start(
            &self.config,
            self.edge_settings,
            self.keys.clone(),
            self.known_good,
            Arc::clone(&self.registry_index),
            now,
        );
        (next.load, next.clock_error_ms, next.is_out) = (self.load, self.clock_error_ms, true);
        let before = std::mem::replace(self, next);
        before.connect.waiting().copied().collect()
    }

    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.is_out && self.departures.drain_status().state == DrainState::Idle
    }

    /// What its wall clock shows at this true time.
    #[must_use]
    pub const fn wall(&self, truth: WallTime) -> WallTime {
        WallTime::from_unix_ms(truth.as_unix_ms().saturating_add_signed(self.clock_error_ms))
    }

    #[must_use]
    pub fn state(&self, now: Instant) -> AdmissionState {
        self.connect.state(now)
    }

    pub fn begin_waiting(&mut self, ticket: Ticket, waiting: Waiting) {
        self.ledger.waiting += 1;
        if waiting.device != STRANGER {
            self.tickets.insert((waiting.device, waiting.attempt), ticket);
        }
    }

    /// # Errors
    /// It did not wait, or has waited too long.
    pub fn end_waiting(&mut self, waiting: Waiting, now: Instant) -> Result<(), Violation> {
        let request = (waiting.device, waiting.attempt);
        self.ledger.waiting = checks::answered_once(self.ledger.waiting.checked_sub(1), &request)?;
        if waiting.device != STRANGER {
            checks::answered_once(self.tickets.remove(&request), &request)?;
        }
        checks::answer(waiting.arrived, now)
    }

    /// The devices behind these keys.
    pub fn waiting_for(&self, keys: &[DeviceId], devices: &Devices) -> impl Iterator<Item = u32> {
        let keys: BTreeSet<DeviceId> = keys.iter().copied().collect();
        self.connect
            .waiting()
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
        if self.connect.handle_gone(ticket, now).is_some() {
            self.ledger.waiting -= 1;
            self.ledger.abandoned += 1;
        }
    }

    pub fn begin_statement(&mut self, id: StatementId, statement: Statement, now: Instant) {
        let keys = statement.batch.keys.len();
        self.ledger.in_flight += keys;
        self.ledger.statements_in_flight += 1;
        if !statement.batch.is_probe {
            self.ledger.keys_this_second += keys as u64;
        }
        self.sent.insert(id, (statement, now));
    }

    /// The statement and the time that it took; `None` where it has ended before.
    pub fn end_statement(&mut self, id: StatementId, now: Instant) -> Option<(Statement, Duration)> {
        let (statement, sent_at) = self.sent.remove(&id)?;
        self.ledger.in_flight -= statement.batch.keys.len();
        self.ledger.statements_in_flight -= 1;
        Some((statement, now.saturating_since(sent_at)))
    }

    /// When the calendar must call the node for a deadline; `None` if it will.
    pub fn arm(&mut self, due: Instant, now: Instant) -> Option<Instant> {
        let due = due.max(now);
        if due >= self.armed {
            return None;
        }
        self.armed = due;
        Some(due)
    }

    /// Takes a call of the calendar. False if it is out of date.
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
        self.ledger.check(&state, &self.config)?;
        Ok(state)
    }

    /// Once a second; each minute it keeps on disk what its database can do.
    ///
    /// # Errors
    /// A request waits too long, or the ceiling was not kept.
    pub fn check_second(&mut self, now: Instant) -> Result<(), Violation> {
        if self.kept_at + KEEP_EVERY <= now {
            self.kept_at = now;
            self.known_good = self.connect.take_last_known_good(now).unwrap_or(self.known_good);
        }
        if let Some(oldest) = self.connect.waiting().next() {
            checks::answer(oldest.arrived, now)?;
        }
        self.ledger.check_second(&self.config)
    }
}
