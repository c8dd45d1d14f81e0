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
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;

pub use self::{
    audit::Change,
    counts::{CountedNode, RuleCheck},
    error::StoreError,
    failures::{Operation, Trouble},
    health::{DatabaseState, DatabaseStatus},
    import::{BadLine, Import, ImportLine, ImportReport, ImportRow, LINES_MAX, OnOtherCredential},
    lookup::{Answer, KEYS_MAX, LookupWorker},
    migrations::SCHEMA_VERSION,
    model::{
        Audit, AuditRecord, DEFAULT_TENANT, DeviceChange, DeviceFilter, DeviceRow, NewDevice, NewToken, PAGE_MAX, Page,
        Role, Rotation, TokenRow, UNKNOWN_ROLE,
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
    lane::Lane,
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
/// Longest that [`Store::probe`] takes, connecting included.
const PROBE_MAX: Duration = Duration::from_secs(5);
/// Connections for the ops API: more callers wait, at most 2 s.
const OPS_CONNECTIONS_MAX: usize = 4;

const PING: Sql = Sql::both("SELECT 1 AS one");

/// A handle on the database; cloning it is cheap.
#[derive(Clone, Debug)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    lookups: Arc<Connector>,
    imports: Connector,
    reads: Arc<Lane>,
    writes: Arc<Lane>,
    /// Rules are read and written here, never behind anything else; in SQLite a write waits for the one other writer, at most 1.5 s.
    rules: Arc<Lane>,
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
            Some(path) => Self::open_sqlite(&path).await,
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
                Ok(options) => postgres::connect_and_migrate(&postgres::connector(&options, Purpose::Migrations)).await,
                Err(error) => Err(error),
            },
        };
        migrated.map_err(|error| in_database(url, error))
    }

    /// Connects and asks for a sign of life, for at most [`PROBE_MAX`]. Changes nothing, the schema included.
    ///
    /// # Errors
    /// The database can't be reached or used.
    pub async fn probe(url: &DatabaseUrl) -> Result<(), StoreError> {
        let probe = async {
            let connector = match url.sqlite_path() {
                Some(path) => sqlite::File::new(&path).reader(),
                None => postgres::connector(&postgres::parse(url)?, Purpose::Ops),
            };
            connector.connect().await?.first(PING, &[]).await.map(drop)
        };
        let probed = timeout(PROBE_MAX, probe).await.unwrap_or(Err(StoreError::TimedOut));
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

    async fn open_sqlite(path: &std::path::Path) -> Result<Self, StoreError> {
        let file = sqlite::File::new(path);
        let preparing = match file.prepare().await {
            Ok(()) => None,
            Err(error) if error.is_unwritable() && file.open_to_read(&error).await.is_ok() => {
                tracing::warn!(error = in_one_line(&error), "the database can only be read for now");
                Some(AbortOnDropHandle::new(tokio::spawn(Arc::clone(&file).await_writable())))
            }
            Err(error) => return Err(error),
        };
        let health = Health::new();
        health.set_ready();
        Ok(Self(Arc::new(Inner {
            lookups: Arc::new(file.reader()),
            imports: file.writer(),
            reads: Lane::new(file.reader(), OPS_CONNECTIONS_MAX),
            writes: Lane::new(file.writer(), 1),
            rules: Lane::new(file.writer(), 1),
            import_permit: Arc::new(Semaphore::new(1)),
            health: Arc::new(health),
            failures: Arc::default(),
            file: Some(file),
            _preparing: preparing,
        })))
    }

    fn open_postgres(url: &DatabaseUrl) -> Result<Self, StoreError> {
        let options = postgres::parse(url)?;
        let health = Arc::new(Health::new());
        let migrations = postgres::connector(&options, Purpose::Migrations);
        let preparing = tokio::spawn(postgres::prepare(migrations, Arc::clone(&health)));
        let ops = Lane::new(postgres::connector(&options, Purpose::Ops), OPS_CONNECTIONS_MAX);
        Ok(Self(Arc::new(Inner {
            lookups: Arc::new(postgres::connector(&options, Purpose::Lookups)),
            imports: postgres::connector(&options, Purpose::Import),
            reads: Arc::clone(&ops),
            writes: ops,
            rules: Lane::new(postgres::connector(&options, Purpose::Rules), 1),
            import_permit: Arc::new(Semaphore::new(1)),
            health,
            failures: Arc::default(),
            file: None,
            _preparing: Some(AbortOnDropHandle::new(preparing)),
        })))
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

    /// Calls of this kind that failed since the start.
    #[must_use]
    pub fn failed(&self, operation: Operation) -> u64 {
        self.0.failures.of(operation)
    }

    /// What calls have met within the last minute, in one line; `None` where they have not.
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
        let ping = async {
            let mut held = self.reads().take().await?;
            held.first(PING, &[]).await?;
            held.give_back();
            Ok(())
        };
        self.observed(Operation::Read, PING_MAX, ping).await
    }

    /// Runs a call within [`CALL_MAX`].
    async fn bounded<T>(
        &self,
        operation: Operation,
        work: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        self.observed(operation, CALL_MAX, work).await
    }

    async fn observed<T>(
        &self,
        operation: Operation,
        limit: Duration,
        work: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let outcome = timeout(limit, work).await.unwrap_or(Err(StoreError::TimedOut));
        self.0.health.observe(operation, &outcome);
        self.0.failures.observe(operation, &outcome);
        outcome
    }

    fn failures(&self) -> &Arc<Failures> {
        &self.0.failures
    }

    fn lookups(&self) -> &Arc<Connector> {
        &self.0.lookups
    }

    fn reads(&self) -> &Arc<Lane> {
        &self.0.reads
    }

    fn imports(&self) -> &Connector {
        &self.0.imports
    }

    fn import_permit(&self) -> Result<OwnedSemaphorePermit, TryAcquireError> {
        Arc::clone(&self.0.import_permit).try_acquire_owned()
    }

    fn rules_lane(&self) -> &Arc<Lane> {
        &self.0.rules
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
