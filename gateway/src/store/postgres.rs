//! PostgreSQL: settings of each kind of connection, and the wait until it is there.

use std::{
    net::IpAddr,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::{
    ConnectOptions, Connection as _, Executor as _, PgConnection, Row as _,
    postgres::{PgConnectOptions, PgSslMode},
};
use tokio::time::{sleep, timeout};

use super::{
    connection::{Connector, Postgres},
    error::StoreError,
    health::Health,
    migrations::{self, Caller},
};
use crate::runtime::config::{DatabaseUrl, InvalidDatabaseUrl};

/// Time between two attempts to reach PostgreSQL at the start.
const RETRY: Duration = Duration::from_millis(500);
/// Time between two attempts to change a table that is in use, such as by a dump. While an attempt waits for its lock,
/// lookups wait behind it.
const RETRY_LOCKED: Duration = Duration::from_secs(10);
/// Maximum time of the migrations at the start. Then they are tried again on a new connection.
const MIGRATE_MAX: Duration = Duration::from_mins(5);

/// Maximum time to open a connection, unless the URL has a `connect_timeout`. It suffices for a server 300 ms away: TLS
/// and SCRAM take eight round trips.
const CONNECT_MAX: Duration = Duration::from_secs(3);

/// A setting that no server or pooler knows.
const MARK: &str = "seawall.connection";
const READ_MARK: &str = "SELECT current_setting('seawall.connection', true)";

/// The purpose of a connection. Each has its own settings, and a name in `pg_stat_activity`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Lookups,
    Ops,
    Rules,
    Polls,
    Import,
    Migrations,
}

impl Purpose {
    const fn application_name(self) -> &'static str {
        match self {
            Self::Lookups => "seawall look-ups",
            Self::Ops => "seawall ops",
            Self::Rules => "seawall rules",
            Self::Polls => "seawall polls",
            Self::Import => "seawall import",
            Self::Migrations => "seawall migrations",
        }
    }

    /// Server settings; times are in milliseconds. The server's timeout ends the statement of a caller that has left:
    /// closing the connection does not.
    const fn settings(self) -> &'static [(&'static str, &'static str)] {
        match self {
            // One generic plan, which the plan guard checks, and no sequential scan if there is an index. Without `jit
            // = off`, the high cost of a remaining sequential scan would make the server compile it.
            Self::Lookups => &[
                ("statement_timeout", "1000"),
                ("lock_timeout", "500"),
                ("idle_in_transaction_session_timeout", "2000"),
                ("default_transaction_read_only", "on"),
                ("plan_cache_mode", "force_generic_plan"),
                ("enable_seqscan", "off"),
                ("jit", "off"),
            ],
            Self::Ops => &[
                ("statement_timeout", "4000"),
                ("lock_timeout", "2000"),
                ("idle_in_transaction_session_timeout", "10000"),
                ("plan_cache_mode", "force_custom_plan"),
                ("jit", "off"),
            ],
            Self::Rules | Self::Polls => &[
                ("statement_timeout", "1500"),
                ("lock_timeout", "1000"),
                ("idle_in_transaction_session_timeout", "2000"),
                ("jit", "off"),
            ],
            Self::Import => &[
                ("statement_timeout", "300000"),
                ("lock_timeout", "5000"),
                ("idle_in_transaction_session_timeout", "60000"),
                ("jit", "off"),
            ],
            Self::Migrations => &[
                // Overrides that of the role or the database: creating an index takes long.
                ("statement_timeout", "0"),
                // Other statements queue behind a waiting lock request, and lookups have 500 ms.
                ("lock_timeout", "300"),
                ("idle_in_transaction_session_timeout", "60000"),
                // No notices about existing tables.
                ("client_min_messages", "warning"),
            ],
        }
    }
}

/// # Errors
/// The driver rejects the URL. Its message is not repeated, since it may hold a part of the password. Or one of the
/// driver's environment variables is not valid, or a file for TLS cannot be read.
pub(super) fn parse(url: &DatabaseUrl) -> Result<PgConnectOptions, StoreError> {
    let variable = |name: &str| std::env::var(name).ok();
    url.check_environment(variable)
        .and_then(|()| url.check_files(variable))
        .map_err(|error| StoreError::Invalid(error.to_string()))?;
    PgConnectOptions::from_str(&url.for_driver())
        .map(ConnectOptions::disable_statement_logging)
        .map_err(|_| StoreError::Invalid(InvalidDatabaseUrl::NotEncoded.to_string()))
}

/// Returns what is missing if the connection to a remote server is not encrypted, or its certificate not verified.
pub(super) fn unverified_server(options: &PgConnectOptions) -> Option<&'static str> {
    let host = options.get_host();
    let is_here = options.get_socket().is_some()
        || host == "localhost"
        || host.starts_with('/')
        || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    match options.get_ssl_mode() {
        _ if is_here => None,
        PgSslMode::VerifyCa | PgSslMode::VerifyFull => None,
        PgSslMode::Require => Some("its certificate is not verified (sslmode=require)"),
        PgSslMode::Allow | PgSslMode::Prefer => {
            Some("the connection may be in clear text, and no certificate is verified (sslmode=prefer is the default)")
        }
        PgSslMode::Disable => Some("the connection is in clear text (sslmode=disable)"),
    }
}

pub(super) fn connector(options: &PgConnectOptions, connect_timeout: Option<Duration>, purpose: Purpose) -> Connector {
    let settings = purpose.settings().iter();
    let begin: String = settings
        .map(|(name, value)| format!("; SET LOCAL {name} = '{value}'"))
        .collect();
    Connector::Postgres(Box::new(Server {
        plain: options
            .clone()
            .application_name(purpose.application_name())
            .extra_float_digits(None),
        settings: purpose.settings(),
        begin: format!("BEGIN{begin}").into(),
        connect_max: connect_timeout.unwrap_or(CONNECT_MAX),
        refuses_options: AtomicBool::new(false),
    }))
}

/// A connector to PostgreSQL for one purpose, directly or through a pooler.
#[derive(Debug)]
pub(super) struct Server {
    /// Options without settings, which every pooler accepts.
    plain: PgConnectOptions,
    settings: &'static [(&'static str, &'static str)],
    /// Statements that begin a transaction with the same settings.
    begin: Arc<str>,
    connect_max: Duration,
    /// Whether a pooler has refused start-up options.
    refuses_options: AtomicBool,
}

impl Server {
    /// Opens a connection, within its maximum time.
    pub async fn connect(&self) -> Result<Postgres, StoreError> {
        let seconds = self.connect_max.as_secs();
        timeout(self.connect_max, self.attempt()).await.unwrap_or_else(|_| {
            Err(StoreError::Unavailable(format!(
                "it accepts no connection within {seconds} s (connect_timeout in its URL)"
            )))
        })
    }

    /// Sends the settings as start-up options, with a mark. A server process that knows the mark serves this connection
    /// alone: its settings are in force, and prepared statements stay. Otherwise a pooler in between has dropped or
    /// refused the options.
    async fn attempt(&self) -> Result<Postgres, StoreError> {
        if self.refuses_options.load(Ordering::Relaxed) {
            return self.pooled().await;
        }
        let mark = format!("{:016x}", rand::random::<u64>());
        let options = self.plain.clone().options(self.settings.iter().copied());
        let options = options.options([(MARK, mark.as_str())]);
        let mut connection = match PgConnection::connect_with(&options).await {
            Ok(connection) => connection,
            Err(error) if is_refused_option(&error) => {
                self.refuses_options.store(true, Ordering::Relaxed);
                return self.pooled().await;
            }
            Err(error) => return Err(error.into()),
        };
        let row = connection.fetch_one(sqlx::raw_sql(READ_MARK)).await?;
        let is_direct = row.try_get::<Option<String>, _>(0)?.is_some_and(|found| found == mark);
        let pooled = (!is_direct).then(|| Arc::clone(&self.begin));
        Ok(Postgres::new(connection, pooled))
    }

    async fn pooled(&self) -> Result<Postgres, StoreError> {
        let connection = PgConnection::connect_with(&self.plain).await?;
        Ok(Postgres::new(connection, Some(Arc::clone(&self.begin))))
    }
}

fn is_refused_option(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Database(error) if is_about_options(error.message()))
}

/// Messages of PgBouncer, with SQLSTATE 08P01 or none, and of Amazon's RDS Proxy, with 0A000.
fn is_about_options(message: &str) -> bool {
    ["startup parameter", "command-line options"]
        .iter()
        .any(|words| message.contains(words))
}

/// Connects and migrates, until it succeeds.
pub(super) async fn prepare(connector: Connector, health: Arc<Health>) {
    loop {
        let outcome = timeout(MIGRATE_MAX, connect_and_migrate(&connector, Caller::Serve))
            .await
            .unwrap_or(Err(StoreError::TimedOut));
        let pause = match outcome {
            Ok(()) => return health.set_ready(),
            Err(error) => {
                health.set_away(&error);
                if matches!(error, StoreError::Locked(_)) {
                    RETRY_LOCKED
                } else {
                    RETRY
                }
            }
        };
        sleep(pause).await;
    }
}

/// Like [`connect_and_migrate`], but waits while a table to be changed is in use.
pub(super) async fn migrate_when_free(connector: &Connector) -> Result<(), StoreError> {
    loop {
        match connect_and_migrate(connector, Caller::Migrate).await {
            Err(StoreError::Locked(cause)) => {
                tracing::warn!(%cause, "migration delayed: a table is in use; next attempt in 10 s");
                sleep(RETRY_LOCKED).await;
            }
            result => return result,
        }
    }
}

async fn connect_and_migrate(connector: &Connector, caller: Caller) -> Result<(), StoreError> {
    let mut connection = connector.connect().await?;
    if connection.is_pooled() && caller == Caller::Serve {
        tracing::info!(
            "PostgreSQL is reached through a pooler that drops start-up options: each statement runs in a transaction of its own"
        );
    }
    migrations::migrate(&mut connection, caller).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn migration_that_waits_for_a_table_gives_up_before_the_look_ups_behind_it_do() {
        let lock_timeout = |purpose: Purpose| -> u32 {
            let setting = purpose.settings().iter().find(|(name, _)| *name == "lock_timeout");
            setting.unwrap().1.parse().unwrap()
        };

        assert!(lock_timeout(Purpose::Migrations) < lock_timeout(Purpose::Lookups));
    }

    #[test]
    fn poolers_that_refuse_start_up_options_are_known_by_their_words() {
        for message in [
            "unsupported startup parameter: options",
            "unsupported startup parameter in options: statement_timeout",
            "Feature not supported: RDS Proxy currently doesn\u{2019}t support command-line options.",
        ] {
            assert!(is_about_options(message), "{message}");
        }
        assert!(!is_about_options("password authentication failed for user \"fleet\""));
    }

    #[test]
    fn unverified_server_elsewhere_is_named() {
        for (url, is_named) in [
            ("postgres://u@db.example/d?sslmode=prefer", true),
            ("postgres://u@db.example/d?sslmode=require", true),
            ("postgres://u@db.example/d?sslmode=verify-full", false),
            ("postgres://u@127.0.0.1/d?sslmode=disable", false),
            ("postgres://u@[::1]:5/d?sslmode=disable", false),
            ("postgres://u@localhost/d?host=10.0.0.1&sslmode=disable", true),
            ("postgres:///d?host=/var/run/postgresql&sslmode=disable", false),
        ] {
            let options = parse(&url.parse().unwrap()).unwrap();

            assert_eq!(unverified_server(&options).is_some(), is_named, "{url}");
        }
    }
}
