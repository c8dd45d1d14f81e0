//! PostgreSQL: settings of each kind of connection, and the wait until it is there.

use std::{net::IpAddr, str::FromStr, sync::Arc, time::Duration};

use sqlx::{
    ConnectOptions,
    postgres::{PgConnectOptions, PgSslMode},
};
use tokio::time::{sleep, timeout};

use super::{connection::Connector, error::StoreError, health::Health, lane, migrations};
use crate::config::{DatabaseUrl, InvalidDatabaseUrl};

/// Time between two attempts to reach a PostgreSQL that was away at start.
const RETRY: Duration = Duration::from_millis(500);
/// Longest that the migrations at start may take before they are tried again on a new connection.
const MIGRATE_MAX: Duration = Duration::from_mins(5);

/// What a connection is for. Each has settings that fit, and a name in `pg_stat_activity`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Lookups,
    Ops,
    Rules,
    Import,
    Migrations,
}

impl Purpose {
    const fn application_name(self) -> &'static str {
        match self {
            Self::Lookups => "seawall look-ups",
            Self::Ops => "seawall ops",
            Self::Rules => "seawall rules",
            Self::Import => "seawall import",
            Self::Migrations => "seawall migrations",
        }
    }

    /// Server settings, milliseconds where they are times. The server's own bound on a statement is what ends the work of a caller
    /// that has gone: closing a connection does not.
    const fn settings(self) -> &'static [(&'static str, &'static str)] {
        match self {
            // One generic plan, the one that the plan guard reads, and never a sequential scan where an index will do. Without `jit = off`
            // the price put on sequential scans would have the server compile whatever scans all the same.
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
            Self::Rules => &[
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
                ("lock_timeout", "10000"),
                ("idle_in_transaction_session_timeout", "60000"),
                // Without the notices that a table is there already.
                ("client_min_messages", "warning"),
            ],
        }
    }
}

/// # Errors
/// The driver does not take the URL. What the driver says is not repeated: it may hold a part of the password.
pub(super) fn parse(url: &DatabaseUrl) -> Result<PgConnectOptions, StoreError> {
    PgConnectOptions::from_str(&url.for_driver())
        .map(ConnectOptions::disable_statement_logging)
        .map_err(|_| StoreError::Invalid(InvalidDatabaseUrl::NotEncoded.to_string()))
}

/// Whether the way to a server elsewhere is encrypted and its certificate is verified, in words where it is not.
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

pub(super) fn connector(options: &PgConnectOptions, purpose: Purpose) -> Connector {
    let options = options
        .clone()
        .application_name(purpose.application_name())
        .options(purpose.settings().iter().copied());
    Connector::Postgres(Box::new(options))
}

/// Connects and migrates, until it has succeeded once.
pub(super) async fn prepare(connector: Connector, health: Arc<Health>) {
    loop {
        let outcome = timeout(MIGRATE_MAX, connect_and_migrate(&connector))
            .await
            .unwrap_or(Err(StoreError::TimedOut));
        match outcome {
            Ok(()) => return health.set_ready(),
            Err(error) => health.set_away(&error),
        }
        sleep(RETRY).await;
    }
}

pub(super) async fn connect_and_migrate(connector: &Connector) -> Result<(), StoreError> {
    let mut connection = lane::connect(connector).await?;
    migrations::migrate(&mut connection).await
}

#[cfg(test)]
mod tests {
    use super::*;

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
