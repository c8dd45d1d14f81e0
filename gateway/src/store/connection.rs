//! One connection to either database, and the few verbs that every statement is run with.
//!
//! A [`Connection`] is owned by whoever uses it. Dropping it closes it: that is what happens to a call that is
//! cancelled or takes too long, so that no half-done query or transaction can ever be handed to the next caller.

use seawall_proto::id::{DeviceId, Label, SecretHash};
use sqlx::{
    Arguments, Connection as _, Executor, PgConnection, Row as _, SqliteConnection,
    postgres::{PgArguments, PgConnectOptions, PgRow},
    sqlite::{SqliteArguments, SqliteRow},
};
use uuid::Uuid;

use super::{error::StoreError, sqlite::Opening};

/// A statement in the words of each database. Both take `$1`, `$2`, ….
#[derive(Clone, Copy, Debug)]
pub(super) struct Sql {
    pub sqlite: &'static str,
    pub postgres: &'static str,
}

impl Sql {
    /// A statement that both databases read alike.
    pub const fn both(text: &'static str) -> Self {
        Self {
            sqlite: text,
            postgres: text,
        }
    }
}

/// A statement's argument. `Option`s say their type, which PostgreSQL wants to know of a null too.
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

/// How to make a connection.
#[derive(Clone, Debug)]
pub(super) enum Connector {
    Sqlite(Opening),
    Postgres(Box<PgConnectOptions>),
}

impl Connector {
    /// # Errors
    /// The database can't be reached or opened. The caller bounds the time.
    pub async fn connect(&self) -> Result<Connection, StoreError> {
        Ok(match self {
            Self::Sqlite(opening) => Connection::Sqlite(opening.connect().await?),
            Self::Postgres(options) => Connection::Postgres(PgConnection::connect_with(options).await?),
        })
    }
}

impl Connector {
    /// A connection made now must not be kept when its work is done.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Sqlite(opening) => opening.is_passing(),
            Self::Postgres(_) => false,
        }
    }

    /// To be asked before a transaction begins, and before it is committed.
    ///
    /// # Errors
    /// Nothing may be written.
    pub fn check_writable(&self) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(opening) => opening.check_writable(),
            Self::Postgres(_) => Ok(()),
        }
    }
}

#[derive(Debug)]
pub(super) enum Connection {
    Sqlite(SqliteConnection),
    Postgres(PgConnection),
}

impl Connection {
    /// Every row of `sql`.
    pub async fn all(&mut self, sql: Sql, values: &[Value<'_>]) -> Result<Vec<Row>, StoreError> {
        Ok(match self {
            Self::Sqlite(connection) => {
                let rows = sqlx::query_with(sql.sqlite, sqlite_arguments(values)?).fetch_all(connection);
                rows.await?.into_iter().map(Row::Sqlite).collect()
            }
            Self::Postgres(connection) => {
                let rows = sqlx::query_with(sql.postgres, postgres_arguments(values)?).fetch_all(connection);
                rows.await?.into_iter().map(Row::Postgres).collect()
            }
        })
    }

    /// The first row of `sql`, if there is one.
    pub async fn first(&mut self, sql: Sql, values: &[Value<'_>]) -> Result<Option<Row>, StoreError> {
        Ok(self.all(sql, values).await?.into_iter().next())
    }

    /// Runs `sql`; the number of rows it touched.
    pub async fn run(&mut self, sql: Sql, values: &[Value<'_>]) -> Result<u64, StoreError> {
        Ok(match self {
            Self::Sqlite(connection) => {
                let done = sqlx::query_with(sql.sqlite, sqlite_arguments(values)?).execute(connection);
                done.await?.rows_affected()
            }
            Self::Postgres(connection) => {
                let done = sqlx::query_with(sql.postgres, postgres_arguments(values)?).execute(connection);
                done.await?.rows_affected()
            }
        })
    }

    /// Runs text without arguments, unprepared: `BEGIN`, `COMMIT`, set-up.
    pub async fn control(&mut self, sql: Sql) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(connection) => connection.execute(sqlx::raw_sql(sql.sqlite)).await.map(drop)?,
            Self::Postgres(connection) => connection.execute(sqlx::raw_sql(sql.postgres)).await.map(drop)?,
        }
        Ok(())
    }

    /// # Errors
    /// The other side is gone.
    pub async fn ping(&mut self) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(connection) => connection.ping().await?,
            Self::Postgres(connection) => connection.ping().await?,
        }
        Ok(())
    }
}

/// One row of either database. Columns are named, so that the order of a statement's columns means nothing.
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

    pub fn bytes(&self, column: &'static str) -> Result<Option<&[u8]>, StoreError> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
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
            Value::Keys(keys) => arguments.add(keys.iter().map(|key| key.as_uuid()).collect::<Vec<_>>()),
            Value::Text(text) => arguments.add(text),
            Value::Bytes(bytes) => arguments.add(bytes),
            Value::Int(number) => arguments.add(number),
            Value::Small(number) => arguments.add(number),
        }
        .map_err(sqlx::Error::Encode)?;
    }
    Ok(arguments)
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
