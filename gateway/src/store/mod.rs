//! The database: devices, rules, tokens, the audit log; in SQLite (embedded) or PostgreSQL.
//!
//! All SQL of the gateway is here, without policy or caches. Each statement is a constant in the dialects of both
//! databases, and names the index it relies on. The code around it is written once, over [`connection::Connection`].
//! Every call has a maximum time. A connection is closed, not reused, if its call failed, was cancelled or took too
//! long.
//!
//! Start with [`Store`]. The connect path only uses [`LookupWorker`].

mod audit;
mod connection;
mod counts;
mod devices;
mod error;
mod failures;
mod health;
mod import;
mod lookup;
mod migrations;
mod model;
mod plan;
mod pool;
mod postgres;
mod presence;
mod presence_words;
mod registry_index;
mod revocations;
mod rollouts;
mod rule_journal;
mod rules;
mod sqlite;
mod tokens;
mod versions;

use std::{future::Future, sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, watch},
    time::{Instant, timeout, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;

pub use self::{
    audit::{AUDIT_PRUNE_MAX, AuditEntry, Change},
    counts::{CountedNode, RuleCheck},
    error::StoreError,
    failures::{Operation, Trouble},
    health::{DatabaseState, DatabaseStatus},
    import::{BadLine, Import, ImportLine, ImportReport, ImportRow, LINES_MAX, OnOtherCredential},
    lookup::{Answer, KEYS_MAX, LookupWorker},
    migrations::SCHEMA_VERSION,
    model::{
        Audit, AuditRecord, DEFAULT_TENANT, DEVICE_KINDS_MAX, DeviceChange, DeviceFilter, DeviceKind, DeviceKinds,
        DeviceRow, DeviceRows, NewDevice, NewToken, PAGE_MAX, Page, Role, Rotated, Rotation, TokenRow, UNKNOWN_ROLE,
    },
    plan::PlanReport,
    presence::{
        PRESENCE_HISTORY_MAX, PRESENCE_PRUNE_MAX, PRESENCE_WRITE_MAX, PresenceNode, PresencePage, PresenceWrite,
        StoredPresence, StoredTransition,
    },
    presence_words::{EvidenceText, PresenceState, Reason, cause_of},
    registry_index::IndexRow,
    revocations::StoredRevocations,
    rollouts::{ROLLOUTS_OPEN_MAX, RolloutWrite, StoredRollout},
    rule_journal::{Seen, Settled},
    rules::{Consent, RULES_MAX, StoredRules},
    tokens::TOKENS_MAX,
    versions::{StoredVersion, StoredVersions, VersionName},
};
use self::{
    connection::{Connector, Sql},
    error::in_one_line,
    failures::Failures,
    health::Health,
    pool::{Held, Pool, Rank, Scarcity},
    postgres::Purpose,
};
use crate::runtime::{
    clock::Clock,
    config::{DatabaseKind, DatabaseUrl},
};

/// Default maximum time of a call. Exceptions: rules (2 s), lookups (set by the caller) and imports.
const CALL_MAX: Duration = Duration::from_secs(5);
/// Maximum time of a call about rules.
const RULES_TIME_MAX: Duration = Duration::from_secs(2);
/// Maximum time of a change of the rules. It must be in force and answered within 2 s. If the database does not take
/// it, it must be in the journal by then.
const RULES_WRITE_TIME_MAX: Duration = Duration::from_millis(1_700);
/// Maximum time of [`Store::ping`].
const PING_MAX: Duration = Duration::from_secs(1);
/// Maximum time of [`Store::probe`], in addition to a `connect_timeout` of the URL.
const PROBE_MAX: Duration = Duration::from_secs(5);
/// Maximum number of connections for the ops API. More callers wait, at most 2 s.
const OPS_CONNECTIONS_MAX: usize = 4;
/// Maximum number of connections for lookups: more than there are workers, so that none waits. They are opened on
/// demand.
const LOOKUP_CONNECTIONS_MAX: usize = 16;

const PING: Sql = Sql::both("SELECT 1 AS one");
const PROBE: Sql = Sql {
    sqlite: "SELECT 'off' AS read_only, NULL AS now",
    postgres: "SELECT current_setting('transaction_read_only') AS read_only, \
               CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) AS now",
};

/// The result of [`Store::probe`] for a database that answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// A pooler in between does not pass start-up options: each statement takes up to three more round trips, and a
    /// lookup none.
    pub is_pooled: bool,
    /// It accepts no writes.
    pub is_read_only: bool,
    /// Difference between this machine's clock and the server's, including the round trip. `None` for SQLite.
    pub clock_offset: Option<Duration>,
    /// Time of one round trip, or less.
    pub round_trip: Duration,
}

/// A handle to the database. Cloning it is cheap.
#[derive(Clone, Debug)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    lookups: Arc<Pool>,
    imports: Arc<Pool>,
    /// Connections with the settings of lookups, one at a time, never kept.
    plans: Arc<Pool>,
    reads: Arc<Pool>,
    writes: Arc<Pool>,
    /// Writes of rules and revocations, never behind anything else. In SQLite a write waits for the other writer, at
    /// most 1.5 s.
    rules: Arc<Pool>,
    /// Polls of rules and revocations, never behind a write. Only a failed poll or ping makes the database unavailable.
    polls: Arc<Pool>,
    /// Writes of presence, one at a time: they may be slow, and nobody waits for them.
    presence: Arc<Pool>,
    scarcity: Arc<Scarcity>,
    /// One import at a time.
    import_permit: Arc<Semaphore>,
    health: Arc<Health>,
    failures: Arc<Failures>,
    /// The file of SQLite.
    file: Option<Arc<sqlite::File>>,
    /// Waits for PostgreSQL, or until SQLite's file can be written. Ends with the store.
    _preparing: Option<AbortOnDropHandle<()>>,
}

impl Store {
    /// Opens the database. SQLite is created and migrated before this returns. For PostgreSQL, a task migrates it as
    /// soon as it is reached, and [`Store::is_ready`] says when.
    ///
    /// # Errors
    /// SQLite: the file can't be used. PostgreSQL: the URL is malformed.
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

    /// Connects, and runs one query. Changes nothing, not even the schema.
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
            let here = Clock::start().wall();
            let pinged = Instant::now();
            connection.ping().await?;
            let round_trip = pinged.elapsed();
            let there = row
                .as_ref()
                .map(|row| row.int("now"))
                .transpose()?
                .flatten()
                .map(model::from_ms);
            let read_only = row.map(|row| row.text("read_only")).transpose()?.flatten();
            Ok(Probe {
                is_pooled: connection.is_pooled(),
                is_read_only: read_only.as_deref() == Some("on"),
                clock_offset: there.map(|there| here.saturating_since(there).max(there.saturating_since(here))),
                round_trip,
            })
        };
        let limit = PROBE_MAX + url.connect_timeout().unwrap_or_default();
        let probed = timeout(limit, probe).await.unwrap_or(Err(StoreError::TimedOut));
        probed.map_err(|error| in_database(url, error))
    }

    /// Returns what is not secure about the connection to the database.
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
                tracing::warn!(error = in_one_line(&error), "database can only be read for now");
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

    /// `file` is that of SQLite, which has one writer. So its reads have their own connections.
    fn new(
        connectors: impl Fn(Purpose) -> Connector,
        file: Option<&Arc<sqlite::File>>,
        health: Arc<Health>,
        preparing: Option<AbortOnDropHandle<()>>,
    ) -> Self {
        let scarcity = Arc::new(Scarcity::default());
        let pool = |connector, rank, connections_max| Pool::new(connector, rank, connections_max, &scarcity);
        let one = |purpose, rank| pool(connectors(purpose), rank, 1);
        let (reads, writes) = match file {
            Some(file) => {
                let reads = pool(file.reader(), Rank::Ops, OPS_CONNECTIONS_MAX);
                (reads, one(Purpose::Ops, Rank::Ops))
            }
            None => {
                let ops = pool(connectors(Purpose::Ops), Rank::Ops, OPS_CONNECTIONS_MAX);
                (Arc::clone(&ops), ops)
            }
        };
        Self(Arc::new(Inner {
            lookups: pool(connectors(Purpose::Lookups), Rank::Lookups, LOOKUP_CONNECTIONS_MAX),
            imports: one(Purpose::Import, Rank::Spare),
            plans: one(Purpose::Lookups, Rank::Spare),
            reads,
            writes,
            rules: one(Purpose::Rules, Rank::Rules),
            polls: one(Purpose::Polls, Rank::Rules),
            presence: one(Purpose::Ops, Rank::Spare),
            scarcity,
            import_permit: Arc::new(Semaphore::new(1)),
            health,
            failures: Arc::default(),
            file: file.cloned(),
            _preparing: preparing,
        }))
    }

    /// Whether the schema existed at least once since the start.
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

    /// Returns whether the database answers, as of the last call, and since when.
    #[must_use]
    pub fn state(&self) -> DatabaseState {
        self.0.health.state()
    }

    /// The same, as a receiver that is notified of each change, and of each call that finds the database unavailable.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<DatabaseState> {
        self.0.health.subscribe()
    }

    /// Whether a server does not answer polls, so that other calls would wait in vain. Never with SQLite, whose file
    /// answers each call for itself.
    #[must_use]
    pub fn is_away(&self) -> bool {
        self.0.file.is_none() && !self.state().status.is_answering()
    }

    /// Returns why the database has recently refused connections, if it did.
    #[must_use]
    pub fn scarce_connections(&self) -> Option<String> {
        self.0.scarcity.reason()
    }

    /// Returns the number of failed calls of this kind since the start.
    #[must_use]
    pub fn failed(&self, operation: Operation) -> u64 {
        self.0.failures.of(operation)
    }

    /// Returns the last error with this problem, in one line, if it is recent.
    #[must_use]
    pub fn trouble(&self, trouble: Trouble) -> Option<String> {
        self.0.failures.trouble(trouble)
    }

    /// Checks whether SQLite's file is still the one that was opened. If not, records [`Trouble::FileChanged`].
    pub fn check_file(&self) {
        if let Some(Err(error)) = self.0.file.as_ref().map(|file| file.check()) {
            self.0.failures.note_error(&error);
        }
    }

    /// Pings the database, for at most 1 s.
    ///
    /// # Errors
    /// It did not answer.
    #[tracing::instrument(name = "db.ping", level = "debug", skip_all)]
    pub async fn ping(&self) -> Result<(), StoreError> {
        let ping = async |mut held: Held| {
            held.first(PING, &[]).await?;
            held.release();
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

    /// Runs a poll over a connection for polls. Its outcome decides whether the database is available. Other calls may
    /// wait for a lock or for one another, so they decide nothing. Nor does a poll that gets no connection while they
    /// are scarce.
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
            // Tables are missing until the schema exists. [`Store::state`] has the reason.
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

    fn lookups(&self) -> &Arc<Pool> {
        &self.0.lookups
    }

    fn reads(&self) -> &Arc<Pool> {
        &self.0.reads
    }

    fn imports(&self) -> &Arc<Pool> {
        &self.0.imports
    }

    fn plans(&self) -> &Arc<Pool> {
        &self.0.plans
    }

    fn polls(&self) -> &Arc<Pool> {
        &self.0.polls
    }

    fn presence_pool(&self) -> &Arc<Pool> {
        &self.0.presence
    }

    fn import_permit(&self) -> Result<OwnedSemaphorePermit, TryAcquireError> {
        Arc::clone(&self.0.import_permit).try_acquire_owned()
    }

    fn rules_pool(&self) -> &Arc<Pool> {
        &self.0.rules
    }

    /// Returns a connection for a write of rules.
    async fn rules_connection(&self) -> Result<Held, StoreError> {
        // A connection takes 8 round trips, the first write over it at most 7.
        self.rules_pool().take_within(RULES_WRITE_TIME_MAX * 8 / 15).await
    }

    fn writes(&self) -> &Arc<Pool> {
        &self.0.writes
    }
}

fn in_database(url: &DatabaseUrl, error: StoreError) -> StoreError {
    StoreError::Open {
        database: url.to_string(),
        error: Box::new(error),
    }
}
