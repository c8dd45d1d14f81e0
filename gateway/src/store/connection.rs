//! One connection to either database, and the functions that run every statement.
//!
//! The caller owns its [`Connection`]. Dropping it closes it. This happens to a call that is cancelled or takes too
//! long, so the next caller never gets an unfinished query or transaction.

use std::{borrow::Cow, sync::Arc};

use seawall_proto::id::{DeviceId, Label, SecretHash};
use sqlx::{
    Arguments, AssertSqlSafe, Connection as _, Executor, PgConnection, Row as _,
    postgres::{PgArguments, PgRow, PgValueFormat},
    sqlite::{SqliteArguments, SqliteRow},
};
use uuid::Uuid;

use super::{
    error::StoreError,
    postgres::Server,
    sqlite::{Opening, Sqlite},
};

/// A statement in the dialect of each database. Both take `$1`, `$2`, ….
#[derive(Clone, Copy, Debug)]
pub(super) struct Sql {
    pub sqlite: &'static str,
    pub postgres: &'static str,
}

impl Sql {
    /// A statement that is the same in both dialects.
    pub const fn both(text: &'static str) -> Self {
        Self {
            sqlite: text,
            postgres: text,
        }
    }
}

/// A statement's argument. PostgreSQL needs the type of a null as well.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value<'a> {
    Uuid(Uuid),
    /// An array in PostgreSQL, JSON of bare hexadecimal digits in SQLite.
    Keys(&'a [DeviceId]),
    Text(Option<&'a str>),
    Bytes(Option<&'a [u8]>),
    Int(Option<i64>),
    Small(Option<i16>),
}

impl From<DeviceId> for Value<'_> {
    fn from(id: DeviceId) -> Self {
        Self::Uuid(id.as_uuid())
    }
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(Some(text))
    }
}

impl<'a> From<Option<&'a Label>> for Value<'a> {
    fn from(label: Option<&'a Label>) -> Self {
        Self::Text(label.map(Label::as_str))
    }
}

impl<'a> From<&'a SecretHash> for Value<'a> {
    fn from(hash: &'a SecretHash) -> Self {
        Self::Bytes(Some(hash.as_bytes()))
    }
}

impl From<i64> for Value<'_> {
    fn from(number: i64) -> Self {
        Self::Int(Some(number))
    }
}

/// In SQLite, a transaction takes the write lock at once. Otherwise one that reads first could fail at its first write.
const BEGIN: Sql = Sql {
    sqlite: "BEGIN IMMEDIATE",
    postgres: "BEGIN",
};
const COMMIT: Sql = Sql::both("COMMIT");
const ROLLBACK: Sql = Sql::both("ROLLBACK");

/// Opens connections.
#[derive(Debug)]
pub(super) enum Connector {
    Sqlite(Opening),
    Postgres(Box<Server>),
}

impl Connector {
    /// Opens a connection within the time that PostgreSQL may take, or SQLite's busy timeout.
    ///
    /// # Errors
    /// The database can't be reached or opened.
    pub async fn connect(&self) -> Result<Connection, StoreError> {
        Ok(match self {
            Self::Sqlite(opening) => Connection::Sqlite(opening.connect().await?),
            Self::Postgres(server) => Connection::Postgres(server.connect().await?),
        })
    }
}

impl Connector {
    /// Whether a connection that is opened now must not be kept.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Sqlite(opening) => opening.is_passing(),
            Self::Postgres(_) => false,
        }
    }

    /// Checks that the database may be written. Called before a transaction begins, and before it is committed.
    ///
    /// # Errors
    /// It may not be written.
    pub async fn check_writable(&self) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(opening) => opening.check_writable().await,
            Self::Postgres(_) => Ok(()),
        }
    }
}

#[derive(Debug)]
pub(super) enum Connection {
    Sqlite(Sqlite),
    Postgres(Postgres),
}

/// A connection to PostgreSQL.
#[derive(Debug)]
pub(super) struct Postgres {
    pub connection: PgConnection,
    /// The statements that begin a transaction behind a pooler, where every statement needs one. A pooler may run each
    /// transaction on another server connection, with other settings and other prepared statements. `None`: there is no
    /// pooler.
    pub pooled: Option<Arc<str>>,
    is_in_transaction: bool,
}

impl Postgres {
    pub const fn new(connection: PgConnection, pooled: Option<Arc<str>>) -> Self {
        Self {
            connection,
            pooled,
            is_in_transaction: false,
        }
    }

    /// Begins a transaction for one statement, if it needs one. Returns whether it did.
    async fn enter(&mut self) -> Result<bool, sqlx::Error> {
        let Some(begin) = self.pooled.as_ref().filter(|_| !self.is_in_transaction) else {
            return Ok(false);
        };
        // The settings are constants.
        let begin = sqlx::raw_sql(AssertSqlSafe(Arc::clone(begin)));
        self.connection.execute(begin).await?;
        Ok(true)
    }

    async fn leave(&mut self, was_entered: bool) -> Result<(), sqlx::Error> {
        if was_entered {
            self.connection.execute(sqlx::raw_sql(COMMIT.postgres)).await?;
        }
        Ok(())
    }

    async fn all(&mut self, sql: &'static str, arguments: PgArguments) -> Result<Vec<PgRow>, sqlx::Error> {
        let was_entered = self.enter().await?;
        let query = sqlx::query_with(sql, arguments).persistent(self.pooled.is_none());
        let rows = query.fetch_all(&mut self.connection).await?;
        self.leave(was_entered).await?;
        Ok(rows)
    }

    /// The same for a statement whose only argument are keys. Behind a pooler it takes one round trip instead of four:
    /// the keys are a part of the text, since a script has no arguments. Any text of a key is harmless there.
    async fn all_of_keys(&mut self, sql: &'static str, keys: &[DeviceId]) -> Result<Vec<PgRow>, sqlx::Error> {
        let Some(begin) = self.pooled.as_ref().filter(|_| !self.is_in_transaction) else {
            let mut arguments = PgArguments::default();
            arguments.add(uuids(keys)).map_err(sqlx::Error::Encode)?;
            return self.all(sql, arguments).await;
        };
        let script = format!(
            "{begin}; {}; {}",
            sql.replace("$1", &literal_of_keys(keys)),
            COMMIT.postgres
        );
        sqlx::raw_sql(AssertSqlSafe(script))
            .fetch_all(&mut self.connection)
            .await
    }

    async fn run(&mut self, sql: &'static str, arguments: PgArguments) -> Result<u64, sqlx::Error> {
        let was_entered = self.enter().await?;
        let query = sqlx::query_with(sql, arguments).persistent(self.pooled.is_none());
        let done = query.execute(&mut self.connection).await?;
        self.leave(was_entered).await?;
        Ok(done.rows_affected())
    }
}

impl Connection {
    /// Returns every row of `sql`.
    pub async fn all(&mut self, sql: Sql, values: &[Value<'_>]) -> Result<Vec<Row>, StoreError> {
        Ok(match self {
            Self::Sqlite(connection) => {
                let rows = sqlx::query_with(sql.sqlite, sqlite_arguments(values)?).fetch_all(&mut **connection);
                rows.await?.into_iter().map(Row::Sqlite).collect()
            }
            Self::Postgres(postgres) => {
                let rows = match values {
                    [Value::Keys(keys)] => postgres.all_of_keys(sql.postgres, keys).await?,
                    _ => postgres.all(sql.postgres, postgres_arguments(values)?).await?,
                };
                rows.into_iter().map(Row::Postgres).collect()
            }
        })
    }

    /// Returns the first row of `sql`, if there is one.
    pub async fn first(&mut self, sql: Sql, values: &[Value<'_>]) -> Result<Option<Row>, StoreError> {
        Ok(self.all(sql, values).await?.into_iter().next())
    }

    /// Runs `sql`, and returns the number of affected rows.
    pub async fn run(&mut self, sql: Sql, values: &[Value<'_>]) -> Result<u64, StoreError> {
        Ok(match self {
            Self::Sqlite(connection) => {
                let done = sqlx::query_with(sql.sqlite, sqlite_arguments(values)?).execute(&mut **connection);
                done.await?.rows_affected()
            }
            Self::Postgres(postgres) => postgres.run(sql.postgres, postgres_arguments(values)?).await?,
        })
    }

    /// Runs `sql` without arguments, unprepared. Behind a pooler only in a transaction.
    pub async fn control(&mut self, sql: Sql) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(connection) => connection.execute(sqlx::raw_sql(sql.sqlite)).await.map(drop)?,
            Self::Postgres(postgres) => {
                let sql = sqlx::raw_sql(sql.postgres);
                postgres.connection.execute(sql).await.map(drop)?;
            }
        }
        Ok(())
    }

    /// Begins a transaction, unless one is open.
    pub async fn begin(&mut self) -> Result<(), StoreError> {
        if let Self::Postgres(postgres) = self {
            if postgres.is_in_transaction {
                return Ok(());
            }
            if !postgres.enter().await? {
                self.control(BEGIN).await?;
            }
            self.set_in_transaction(true);
            return Ok(());
        }
        self.control(BEGIN).await
    }

    /// Begins a transaction and returns the first row of `sql` in it, which has no arguments. All of it takes one round
    /// trip.
    pub async fn begin_with(&mut self, sql: Sql) -> Result<Option<Row>, StoreError> {
        let script = |begin: &str, sql: &str| sqlx::raw_sql(AssertSqlSafe(format!("{begin}; {sql}")));
        let row = match self {
            Self::Sqlite(connection) => {
                let rows = script(BEGIN.sqlite, sql.sqlite).fetch_all(&mut **connection).await?;
                rows.into_iter().next().map(Row::Sqlite)
            }
            Self::Postgres(postgres) => {
                let begin = postgres.pooled.as_deref().unwrap_or(BEGIN.postgres);
                let rows = script(begin, sql.postgres).fetch_all(&mut postgres.connection).await?;
                postgres.is_in_transaction = true;
                rows.into_iter().next().map(Row::Postgres)
            }
        };
        Ok(row)
    }

    pub async fn commit(&mut self) -> Result<(), StoreError> {
        self.control(COMMIT).await?;
        self.set_in_transaction(false);
        Ok(())
    }

    pub async fn rollback(&mut self) -> Result<(), StoreError> {
        self.control(ROLLBACK).await?;
        self.set_in_transaction(false);
        Ok(())
    }

    const fn set_in_transaction(&mut self, is: bool) {
        if let Self::Postgres(postgres) = self {
            postgres.is_in_transaction = is;
        }
    }

    /// Whether a temporary table may be missing in the next statement, outside a transaction.
    pub const fn is_pooled(&self) -> bool {
        match self {
            Self::Sqlite(_) => false,
            Self::Postgres(postgres) => postgres.pooled.is_some(),
        }
    }

    /// # Errors
    /// The connection is lost.
    pub async fn ping(&mut self) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(connection) => connection.ping().await?,
            Self::Postgres(postgres) => postgres.connection.ping().await?,
        }
        Ok(())
    }
}

/// One row of either database. Columns are read by name.
#[derive(Debug)]
pub(super) enum Row {
    Sqlite(SqliteRow),
    Postgres(PgRow),
}

impl Row {
    pub fn uuid(&self, column: &'static str) -> Result<Uuid, StoreError> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }

    pub fn text(&self, column: &'static str) -> Result<Option<String>, StoreError> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }

    pub fn bytes(&self, column: &'static str) -> Result<Option<Cow<'_, [u8]>>, StoreError> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get::<Option<&[u8]>, _>(column)?.map(Cow::Borrowed),
            // Rows of a script are text.
            Self::Postgres(row) if row.try_get_raw(column)?.format() == PgValueFormat::Text => {
                row.try_get::<Option<Vec<u8>>, _>(column)?.map(Cow::Owned)
            }
            Self::Postgres(row) => row.try_get::<Option<&[u8]>, _>(column)?.map(Cow::Borrowed),
        })
    }

    pub fn int(&self, column: &'static str) -> Result<Option<i64>, StoreError> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }

    pub fn small(&self, column: &'static str) -> Result<i16, StoreError> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }
}

fn sqlite_arguments(values: &[Value<'_>]) -> Result<SqliteArguments, StoreError> {
    let mut arguments = SqliteArguments::default();
    for value in values {
        match *value {
            Value::Uuid(uuid) => arguments.add(uuid),
            Value::Keys(keys) => arguments.add(json_of_keys(keys)),
            Value::Text(text) => arguments.add(text),
            Value::Bytes(bytes) => arguments.add(bytes),
            Value::Int(number) => arguments.add(number),
            Value::Small(number) => arguments.add(number),
        }
        .map_err(sqlx::Error::Encode)?;
    }
    Ok(arguments)
}

fn postgres_arguments(values: &[Value<'_>]) -> Result<PgArguments, StoreError> {
    let mut arguments = PgArguments::default();
    for value in values {
        match *value {
            Value::Uuid(uuid) => arguments.add(uuid),
            Value::Keys(keys) => arguments.add(uuids(keys)),
            Value::Text(text) => arguments.add(text),
            Value::Bytes(bytes) => arguments.add(bytes),
            Value::Int(number) => arguments.add(number),
            Value::Small(number) => arguments.add(number),
        }
        .map_err(sqlx::Error::Encode)?;
    }
    Ok(arguments)
}

fn uuids(keys: &[DeviceId]) -> Vec<Uuid> {
    keys.iter().map(|key| key.as_uuid()).collect()
}

/// `CAST('{9b0c…,…}' AS uuid[])`.
fn literal_of_keys(keys: &[DeviceId]) -> String {
    let mut literal = String::with_capacity(24 + keys.len() * 37);
    literal.push_str("CAST('{");
    let mut text = [0_u8; 36];
    for (index, key) in keys.iter().enumerate() {
        if index > 0 {
            literal.push(',');
        }
        literal.push_str(key.as_uuid().hyphenated().encode_lower(&mut text));
    }
    literal.push_str("}' AS uuid[])");
    literal
}

/// `["9b0c…","…"]`, for `unhex(value)` over `json_each`.
fn json_of_keys(keys: &[DeviceId]) -> String {
    let mut json = String::with_capacity(2 + keys.len() * 35);
    json.push('[');
    let mut hex = [0_u8; 32];
    for (index, key) in keys.iter().enumerate() {
        if index > 0 {
            json.push(',');
        }
        json.push('"');
        json.push_str(key.as_uuid().simple().encode_lower(&mut hex));
        json.push('"');
    }
    json.push(']');
    json
}
