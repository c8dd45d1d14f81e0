//! The PostgreSQL that a load test keeps its registry in: a private one, or a database of its own on a server that runs already.
//!
//! The one type to read is [`Storage`].

use std::{fmt, future::Future, str::FromStr, time::Duration};

use anyhow::{Context, Result};
use sqlx::{AssertSqlSafe, Connection, PgConnection, postgres::PgConnectOptions};
use tokio::time::timeout;
use uuid::Uuid;

use crate::{postgres::Postgres, slow};

/// Time for a server that runs already to make a database, or to drop one.
const SERVER_TIME_MAX: Duration = Duration::from_secs(30);
/// How the names of our databases on such a server begin.
const NAME_PREFIX: &str = "seawall_loadtest_";

/// The address of a server that runs already. No log and no error shows it: it may hold a password.
#[derive(Clone)]
pub struct ServerUrl(String);

/// The text is not such an address. It is not repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected postgres://USER:PASSWORD@HOST:PORT/NAME, and no `dbname` behind it")]
pub struct InvalidServerUrl;

/// A PostgreSQL for one load test.
#[derive(Debug)]
pub enum Storage {
    /// A server of ours.
    Private(Postgres),
    /// A database of ours, on a server that isn't.
    Lent(Lent),
}

/// A database of our own on a server that runs already. Dropped by [`Storage::stop`]; where this process is killed, it stays.
pub struct Lent {
    server: PgConnectOptions,
    url: String,
    name: String,
}

impl FromStr for ServerUrl {
    type Err = InvalidServerUrl;

    fn from_str(text: &str) -> Result<Self, InvalidServerUrl> {
        let is_postgres = text.starts_with("postgres://") || text.starts_with("postgresql://");
        // It would win over the name in the path, which becomes ours.
        let names_database = text.contains("dbname=");
        if !is_postgres || names_database || text.parse::<PgConnectOptions>().is_err() {
            return Err(InvalidServerUrl);
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerUrl")
    }
}

impl ServerUrl {
    /// The address of another database on the same server.
    fn with_database(&self, name: &str) -> String {
        let authority = self.0.find("://").map_or(0, |at| at + 3);
        let end = |from: usize, marks: &[char]| {
            let rest = self.0.get(from..).unwrap_or_default();
            rest.find(marks).map_or(self.0.len(), |at| from + at)
        };
        let path = end(authority, &['/', '?', '#']);
        let (server, rest) = (self.0.get(..path), self.0.get(end(path, &['?', '#'])..));
        format!("{}/{name}{}", server.unwrap_or_default(), rest.unwrap_or_default())
    }
}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lent").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Lent {
    async fn create(url: &ServerUrl) -> Result<Self> {
        let lent = Self {
            server: url.0.parse().map_err(|_| InvalidServerUrl)?,
            name: format!("{NAME_PREFIX}{}", Uuid::new_v4().simple()),
            url: String::new(),
        };
        let lent = Self {
            url: url.with_database(&lent.name),
            ..lent
        };
        // Of template0 nobody else can be using anything.
        lent.tell_server(format!("CREATE DATABASE {} TEMPLATE template0", lent.name))
            .await
            .context("creating a database on the server of --database, which takes an account with CREATEDB")?;
        Ok(lent)
    }

    async fn drop_database(&self) -> Result<()> {
        self.tell_server(format!("DROP DATABASE {} WITH (FORCE)", self.name))
            .await
    }

    async fn tell_server(&self, statement: String) -> Result<()> {
        within(async {
            let mut connection = PgConnection::connect_with(&self.server).await?;
            sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await?;
            connection.close().await
        })
        .await
    }
}

async fn within(work: impl Future<Output = sqlx::Result<()>>) -> Result<()> {
    timeout(SERVER_TIME_MAX, work)
        .await
        .context("the server took too long")?
        .map_err(Into::into)
}

impl Storage {
    /// Starts a server. `cores`: of this machine, that it runs on at most. None: all.
    ///
    /// # Errors
    /// PostgreSQL's programs are missing, or it does not start.
    pub async fn private(cores: Option<u32>) -> Result<Self> {
        Ok(Self::Private(Postgres::start(cores).await?))
    }

    /// Creates a database on a server that runs already.
    ///
    /// # Errors
    /// It can't be reached, or the account may create none.
    pub async fn lent(url: &ServerUrl) -> Result<Self> {
        Lent::create(url).await.map(Self::Lent)
    }

    /// Its address, password included: for a server's environment only.
    #[must_use]
    pub fn url(&self) -> String {
        match self {
            Self::Private(postgres) => postgres.url(),
            Self::Lent(lent) => lent.url.clone(),
        }
    }

    #[must_use]
    pub fn options(&self) -> PgConnectOptions {
        match self {
            Self::Private(postgres) => postgres.options(),
            Self::Lent(lent) => lent.server.clone().database(&lent.name),
        }
    }

    /// The server, where it is ours: it can be hurt then.
    pub fn process(&mut self) -> Option<&mut Postgres> {
        match self {
            Self::Private(postgres) => Some(postgres),
            Self::Lent(_) => None,
        }
    }

    /// Slow look-ups so far. None: they are counted in the log of a server that isn't ours.
    ///
    /// # Errors
    /// The log can't be read.
    pub fn slow_lookups(&self) -> Result<Option<u64>> {
        match self {
            Self::Private(postgres) => slow::count(postgres).map(Some),
            Self::Lent(_) => Ok(None),
        }
    }

    /// Ends what is ours.
    ///
    /// # Errors
    /// The database can't be dropped, and is still there: the text names it.
    pub async fn stop(self) -> Result<()> {
        match self {
            Self::Private(postgres) => {
                postgres.stop().await;
                Ok(())
            }
            Self::Lent(lent) => lent
                .drop_database()
                .await
                .with_context(|| format!("the database {} is still there: it can't be dropped", lent.name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_keeps_everything_but_the_name_of_the_database() {
        for (url, other) in [
            ("postgres://u:p@h:1/db", "postgres://u:p@h:1/ours"),
            ("postgresql://h", "postgresql://h/ours"),
            ("postgres://h/?sslmode=require", "postgres://h/ours?sslmode=require"),
            (
                "postgres:///db?host=/run/postgresql",
                "postgres:///ours?host=/run/postgresql",
            ),
            ("postgres://h?user=u#x", "postgres://h/ours?user=u#x"),
        ] {
            assert_eq!(url.parse::<ServerUrl>().unwrap().with_database("ours"), other);
        }
    }

    #[test]
    fn address_is_never_shown() {
        let url: ServerUrl = "postgres://u:hidden@h/db".parse().unwrap();

        assert_eq!(format!("{url:?}"), "ServerUrl");
        for wrong in [
            "",
            "sqlite:x",
            "mysql://u:hidden@h",
            "postgres://h/db?dbname=x",
            "postgres://h:p/d",
        ] {
            assert_eq!(wrong.parse::<ServerUrl>().unwrap_err(), InvalidServerUrl, "{wrong}");
        }
    }
}
