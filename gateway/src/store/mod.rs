//! Everything that is kept: devices, rules, tokens, the audit log; in SQLite (embedded) or PostgreSQL.
//!
//! All SQL of the gateway is here, and nothing else is: no policy, no caches. Each statement is a constant that names the
//! index it relies on, in the words of both databases; the code around it is written once, over [`connection::Connection`].
//! Every call is bounded in time, and a connection whose call failed, was cancelled or took too long is closed, not reused.
//!
//! Start with [`Store`]; the connect path uses [`LookupWorker`] only.

mod audit;
mod connection;
mod counts;
mod devices;
mod error;
mod failures;
mod health;
mod import;
mod lane;
mod lookup;
mod migrations;
mod model;
mod plan;
mod postgres;
mod revocations;
mod roster;
mod rules;
mod sqlite;
mod tokens;

use std::{future::Future, sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, watch},
    time::{Instant, timeout, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;

pub use self::{
    audit::{AUDIT_PRUNE_MAX, Change},
    counts::{CountedNode, RuleCheck},
    error::StoreError,
    failures::{Operation, Trouble},
    health::{DatabaseState, DatabaseStatus},
    import::{BadLine, Import, ImportLine, ImportReport, ImportRow, LINES_MAX, OnOtherCredential},
    lookup::{Answer, KEYS_MAX, LookupWorker},
    migrations::SCHEMA_VERSION,
    model::{
        Audit, AuditRecord, DEFAULT_TENANT, DeviceChange, DeviceFilter, DeviceRow, NewDevice, NewToken, PAGE_MAX, Page,
        Role, Rotated, Rotation, TokenRow, UNKNOWN_ROLE,
    },
    plan::PlanReport,
    revocations::StoredRevocations,
    roster::RosterRow,
    rules::{Consent, RULES_MAX, StoredRules},
    tokens::TOKENS_MAX,
};
use self::{
    connection::{Connector, Sql},
    error::in_one_line,
    failures::Failures,
    health::Health,
    lane::{Held, Lane, Rank, Scarcity},
    postgres::Purpose,
};
use crate::config::{DatabaseKind, DatabaseUrl};

/// Longest that any call takes, but for rules (2 s), look-ups (the caller says) and imports.
const CALL_MAX: Duration = Duration::from_secs(5);
/// Longest that a call about rules takes.
const RULES_TIME_MAX: Duration = Duration::from_secs(2);
/// Longest that a change of the rules takes: it is to be in force and answered within 2 s.
const RULES_WRITE_TIME_MAX: Duration = Duration::from_millis(1_800);
/// Longest that [`Store::ping`] takes.
const PING_MAX: Duration = Duration::from_secs(1);
/// Longest that [`Store::probe`] takes, a `connect_timeout` of the URL aside.
const PROBE_MAX: Duration = Duration::from_secs(5);
/// Connections for the ops API: more callers wait, at most 2 s.
const OPS_CONNECTIONS_MAX: usize = 4;
/// Connections for look-ups: more than there are workers, so that none waits for another's. No more are made than are used at a time.
const LOOKUP_CONNECTIONS_MAX: usize = 16;

const PING: Sql = Sql::both("SELECT 1 AS one");
const PROBE: Sql = Sql {
    sqlite: "SELECT 'off' AS read_only",
    postgres: "SELECT current_setting('transaction_read_only') AS read_only",
};

/// What [`Store::probe`] found of a database that answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// A pooler is between that does not pass start-up options on: each statement takes three round trips more.
    pub is_pooled: bool,
    /// It takes no writes.
    pub is_read_only: bool,
}

/// A handle on the database; cloning it is cheap.
#[derive(Clone, Debug)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    lookups: Arc<Lane>,
    imports: Arc<Lane>,
    /// Connections like the look-ups' own, one at a time, never kept.
    plans: Arc<Lane>,
    reads: Arc<Lane>,
    writes: Arc<Lane>,
    /// Rules and revocations are written here, never behind anything else; in SQLite a write waits for the one other writer, at most 1.5 s.
    rules: Arc<Lane>,
    /// Rules and revocations are polled here, never behind a write. It is the sign of life: only a poll or a ping that fails calls the
    /// database away.
    polls: Arc<Lane>,
    scarcity: Arc<Scarcity>,
    /// One import at a time.
    import_permit: Arc<Semaphore>,
    health: Arc<Health>,
    failures: Arc<Failures>,
    /// SQLite's.
    file: Option<Arc<sqlite::File>>,
    /// Waits for PostgreSQL, or until SQLite's file can be written; ends with the store.
    _preparing: Option<AbortOnDropHandle<()>>,
}

impl Store {
    /// Opens the database. SQLite is created and migrated before this returns. PostgreSQL is not waited for: a task of
    /// the store's own migrates it as soon as it is reached, and [`Store::is_ready`] says when.
    ///
    /// # Errors
    /// SQLite: the file can't be used; the text says why, and what to do. PostgreSQL: the URL is malformed.
    pub async fn open(url: &DatabaseUrl) -> Result<Self, StoreError> {
        let opened = match url.sqlite_path() {
            Some(path) => Self::open_sqlite(url, &path).await,
            None => Self::open_postgres(url),
        };
        opened.map_err(|error| in_database(url, error))
    }

    /// Brings the schema up to [`SCHEMA_VERSION`] and does nothing else.
    ///
    /// # Errors
    /// The database can't be reached or used.
    pub async fn migrate(url: &DatabaseUrl) -> Result<(), StoreError> {
        let migrated = match url.sqlite_path() {
            Some(path) => sqlite::File::new(&path).prepare().await,
            None => match postgres::parse(url) {
                Ok(options) => {
                    let server = postgres::connector(&options, url.connect_timeout(), Purpose::Migrations);
                    postgres::migrate_when_free(&server).await
                }
                Err(error) => Err(error),
            },
        };
        migrated.map_err(|error| in_database(url, error))
    }

    /// Connects and asks for a sign of life. Changes nothing, the schema included.
    ///
    /// # Errors
    /// The database can't be reached or used.
    pub async fn probe(url: &DatabaseUrl) -> Result<Probe, StoreError> {
        let probe = async {
            let connector = match url.sqlite_path() {
                Some(path) => sqlite::File::new(&path).reader(),
                None => postgres::connector(&postgres::parse(url)?, url.connect_timeout(), Purpose::Ops),
            };
            let mut connection = connector.connect().await?;
            let row = connection.first(PROBE, &[]).await?;
            let read_only = row.map(|row| row.text("read_only")).transpose()?.flatten();
            Ok(Probe {
                is_pooled: connection.is_pooled(),
                is_read_only: read_only.as_deref() == Some("on"),
            })
        };
        let limit = PROBE_MAX + url.connect_timeout().unwrap_or_default();
        let probed = timeout(limit, probe).await.unwrap_or(Err(StoreError::TimedOut));
        probed.map_err(|error| in_database(url, error))
    }

    /// What is not safe about the way to the database, if anything.
    #[must_use]
    pub fn unverified_server(url: &DatabaseUrl) -> Option<&'static str> {
        match url.kind() {
            DatabaseKind::Sqlite => None,
            DatabaseKind::Postgres => postgres::unverified_server(&postgres::parse(url).ok()?),
        }
    }

    async fn open_sqlite(url: &DatabaseUrl, path: &std::path::Path) -> Result<Self, StoreError> {
        let file = sqlite::File::new(path);
        let preparing = match file.prepare().await {
            Ok(()) => None,
            Err(error) if error.is_unwritable() && file.open_to_read(&error).await.is_ok() => {
                tracing::warn!(error = in_one_line(&error), "the database can only be read for now");
                Some(AbortOnDropHandle::new(tokio::spawn(Arc::clone(&file).await_writable())))
            }
            Err(error) => return Err(error),
        };
        let health = Health::new(url.to_string());
        health.set_ready();
        let connectors = |purpose| match purpose {
            Purpose::Lookups | Purpose::Polls => file.reader(),
            Purpose::Ops | Purpose::Rules | Purpose::Import | Purpose::Migrations => file.writer(),
        };
        Ok(Self::new(connectors, Some(&file), Arc::new(health), preparing))
    }

    fn open_postgres(url: &DatabaseUrl) -> Result<Self, StoreError> {
        let options = postgres::parse(url)?;
        let health = Arc::new(Health::new(url.to_string()));
        let connectors = |purpose| postgres::connector(&options, url.connect_timeout(), purpose);
        let preparing = tokio::spawn(postgres::prepare(connectors(Purpose::Migrations), Arc::clone(&health)));
        let preparing = AbortOnDropHandle::new(preparing);
        Ok(Self::new(connectors, None, health, Some(preparing)))
    }

    /// `file` is SQLite's, which has one writer: its reads have connections of their own.
    fn new(
        connectors: impl Fn(Purpose) -> Connector,
        file: Option<&Arc<sqlite::File>>,
        health: Arc<Health>,
        preparing: Option<AbortOnDropHandle<()>>,
    ) -> Self {
        let scarcity = Arc::new(Scarcity::default());
        let lane = |connector, rank, connections_max| Lane::new(connector, rank, connections_max, &scarcity);
        let one = |purpose, rank| lane(connectors(purpose), rank, 1);
        let (reads, writes) = match file {
            Some(file) => {
                let reads = lane(file.reader(), Rank::Ops, OPS_CONNECTIONS_MAX);
                (reads, one(Purpose::Ops, Rank::Ops))
            }
            None => {
                let ops = lane(connectors(Purpose::Ops), Rank::Ops, OPS_CONNECTIONS_MAX);
                (Arc::clone(&ops), ops)
            }
        };
        Self(Arc::new(Inner {
            lookups: lane(connectors(Purpose::Lookups), Rank::Lookups, LOOKUP_CONNECTIONS_MAX),
            imports: one(Purpose::Import, Rank::Spare),
            plans: one(Purpose::Lookups, Rank::Spare),
            reads,
            writes,
            rules: one(Purpose::Rules, Rank::Rules),
            polls: one(Purpose::Polls, Rank::Rules),
            scarcity,
            import_permit: Arc::new(Semaphore::new(1)),
            health,
            failures: Arc::default(),
            file: file.cloned(),
            _preparing: preparing,
        }))
    }

    /// The schema was there at least once since the start.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.0.health.is_ready()
    }

    /// Waits until [`Store::is_ready`].
    ///
    /// # Cancel safety
    /// Waiting changes nothing.
    pub async fn ready(&self) {
        self.0.health.ready().await;
    }

    /// Whether the database answers, as of the last call, and since when.
    #[must_use]
    pub fn state(&self) -> DatabaseState {
        self.0.health.state()
    }

    /// The same, with a notice of each change and of each call that finds the database away.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<DatabaseState> {
        self.0.health.subscribe()
    }

    /// Why the database refuses further connections, if it did lately.
    #[must_use]
    pub fn scarce_connections(&self) -> Option<String> {
        self.0.scarcity.reason()
    }

    /// Calls of this kind that failed since the start.
    #[must_use]
    pub fn failed(&self, operation: Operation) -> u64 {
        self.0.failures.of(operation)
    }

    /// What calls have met lately, in one line; `None` where they have not.
    #[must_use]
    pub fn trouble(&self, trouble: Trouble) -> Option<String> {
        self.0.failures.trouble(trouble)
    }

    /// Looks whether SQLite's file is still the one that was opened: [`Trouble::FileChanged`] where it is not.
    pub fn look_at_file(&self) {
        if let Some(Err(error)) = self.0.file.as_ref().map(|file| file.check()) {
            self.0.failures.note_error(&error);
        }
    }

    /// Asks the database for a sign of life, for at most 1 s.
    ///
    /// # Errors
    /// It gave none.
    #[tracing::instrument(name = "db.ping", level = "debug", skip_all)]
    pub async fn ping(&self) -> Result<(), StoreError> {
        let ping = async |mut held: Held| {
            held.first(PING, &[]).await?;
            held.give_back();
            Ok(())
        };
        self.polled(Operation::Read, PING_MAX, ping).await
    }

    /// Runs a call within [`CALL_MAX`].
    async fn bounded<T>(
        &self,
        operation: Operation,
        work: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        self.observed(operation, CALL_MAX, work).await
    }

    /// Runs a poll over a connection of its own kind: what comes of it says whether the database answers. Other calls say nothing about
    /// that: they may wait for a lock, or for one another. A poll that gets no connection in time while they are scarce says nothing either.
    async fn polled<T>(
        &self,
        operation: Operation,
        limit: Duration,
        work: impl AsyncFnOnce(Held) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let deadline = Instant::now() + limit;
        let outcome = match timeout_at(deadline, self.polls().take()).await {
            Ok(Ok(held)) => timeout_at(deadline, work(held))
                .await
                .unwrap_or(Err(StoreError::TimedOut)),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(self
                .scarce_connections()
                .map_or(StoreError::TimedOut, StoreError::NoConnectionFree)),
        };
        self.observe(operation, &outcome);
        self.0.health.observe(&outcome);
        outcome
    }

    fn observe<T>(&self, operation: Operation, outcome: &Result<T, StoreError>) {
        if self.is_ready() {
            self.0.failures.observe(operation, outcome);
        } else {
            // Tables are missing until the schema is made. What hinders that is in [`Store::state`].
            self.0.failures.count(operation, outcome);
        }
    }

    async fn observed<T>(
        &self,
        operation: Operation,
        limit: Duration,
        work: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let outcome = timeout(limit, work).await.unwrap_or(Err(StoreError::TimedOut));
        self.observe(operation, &outcome);
        outcome
    }

    fn health(&self) -> &Health {
        &self.0.health
    }

    fn failures(&self) -> &Arc<Failures> {
        &self.0.failures
    }

    fn lookups(&self) -> &Arc<Lane> {
        &self.0.lookups
    }

    fn reads(&self) -> &Arc<Lane> {
        &self.0.reads
    }

    fn imports(&self) -> &Arc<Lane> {
        &self.0.imports
    }

    fn plans(&self) -> &Arc<Lane> {
        &self.0.plans
    }

    fn polls(&self) -> &Arc<Lane> {
        &self.0.polls
    }

    fn import_permit(&self) -> Result<OwnedSemaphorePermit, TryAcquireError> {
        Arc::clone(&self.0.import_permit).try_acquire_owned()
    }

    fn rules_lane(&self) -> &Arc<Lane> {
        &self.0.rules
    }

    /// A connection to write a rule over. Where making it took too long for the write to end in time, it is kept for the next write: the
    /// server is far away, and a write that is cut off would lose the connection each time.
    async fn rules_connection(&self) -> Result<Held, StoreError> {
        let begun = Instant::now();
        let held = self.rules_lane().take().await?;
        // A connection takes 8 round trips, the first write over it 11.
        if !held.is_reused() && begun.elapsed() > RULES_WRITE_TIME_MAX * 8 / 19 {
            held.give_back();
            return Err(StoreError::TimedOut);
        }
        Ok(held)
    }

    fn writes(&self) -> &Arc<Lane> {
        &self.0.writes
    }
}

fn in_database(url: &DatabaseUrl, error: StoreError) -> StoreError {
    StoreError::Open {
        database: url.to_string(),
        error: Box::new(error),
    }
}
