//! What can go wrong with the database, said from the caller's side: is it worth another try, and what should a person do.

use std::error::Error as _;

use sqlx::migrate::MigrateError;

use super::failures::Trouble;

/// A failed call to the store. The text says what to do where something can be done.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Opening failed; names the database, without its password.
    #[error("database {database}: {}", in_one_line(.error))]
    Open { database: String, error: Box<StoreError> },
    /// The database can't be reached, or refuses connections for now. The text is all that is known.
    #[error("the database is unavailable: {0}")]
    Unavailable(String),
    /// Reading or writing SQLite's file failed: the disk, or a companion file that was taken away.
    #[error("reading or writing the database file failed: {0}")]
    FileFailed(#[source] sqlx::Error),
    /// The server takes no more connections, of this role or of anybody.
    #[error("the database has no connection to spare: {0}")]
    NoConnectionFree(String),
    /// A standby, or a server that takes no writes for another reason.
    #[error("the database is read-only: point the gateway at the primary")]
    ReadOnlyServer,
    /// No answer in the time the caller gave. Whether a write was done is not known.
    #[error("the database did not answer in time")]
    TimedOut,
    /// Every connection of the kind that is needed is in use, and none came free in time.
    #[error("too many calls to the database at once: try again")]
    Busy,
    /// Another process or transaction holds a lock.
    #[error("the database is locked by another process or a long transaction: end it, or wait and try again")]
    Locked(#[source] sqlx::Error),
    #[error("the disk is full: free space on the database's disk, the gateway then goes on by itself")]
    DiskFull(#[source] sqlx::Error),
    #[error(
        "the file can't be opened: check that it is a file, that its folder exists, and that the gateway's user may read and write both"
    )]
    Unreadable(#[source] Option<sqlx::Error>),
    #[error("the file can't be written: give the gateway's user write permission to it and to its folder")]
    ReadOnly(#[source] sqlx::Error),
    #[error("the file is not an SQLite database: name another one, or move it away to start with an empty one")]
    NotADatabase(#[source] sqlx::Error),
    #[error("the database file is damaged: restore it from a backup")]
    Damaged(#[source] sqlx::Error),
    /// The database answers, and what it answers is that a statement of ours can't be run: rights, tables or columns are missing, or its
    /// files are damaged. The text is all that is known.
    #[error("the database can't be used: {0}")]
    Unusable(String),
    /// SQLite's file can be read, and could not be opened for writing at the start.
    #[error("the database can only be read until its disk can be written: {0}")]
    OnlyRead(String),
    /// SQLite's file is no longer the one that was opened.
    #[error(
        "the database file was {0} while the gateway runs: nothing is written any more. Put the file back, or stop the gateway, restore a backup and start it again"
    )]
    FileChanged(&'static str),
    /// The database URL, or what a caller asked for, is not acceptable.
    #[error("{0}")]
    Invalid(String),
    /// What is to be made is already there, or has changed since it was read.
    #[error("{0}")]
    Conflict(String),
    /// A value that is not of the type that the schema gives it.
    #[error("a row can't be read: {0}")]
    Undecodable(#[source] sqlx::Error),
    /// Rules were written since what is to be written was checked.
    #[error("other rules were written at this moment: try again")]
    Outdated,
    /// A row that this version does not understand.
    #[error("unexpected data in {table}.{column}: {detail}")]
    Corrupt {
        table: &'static str,
        column: &'static str,
        detail: String,
    },
    #[error("migrating the schema failed: {0}")]
    Migration(String),
    /// A statement failed for a reason that no rule above names.
    #[error("the database refused a statement")]
    Unexpected(#[source] sqlx::Error),
}

impl StoreError {
    /// The same call may succeed later without anybody changing it.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Open { error, .. } => error.is_retryable(),
            Self::Unavailable(_)
            | Self::FileFailed(_)
            | Self::NoConnectionFree(_)
            | Self::ReadOnlyServer
            | Self::TimedOut
            | Self::Busy
            | Self::Locked(_)
            | Self::DiskFull(_) => true,
            Self::Unreadable(_)
            | Self::ReadOnly(_)
            | Self::NotADatabase(_)
            | Self::Damaged(_)
            | Self::Invalid(_)
            | Self::Conflict(_)
            | Self::Undecodable(_)
            | Self::Outdated
            | Self::Corrupt { .. }
            | Self::Unusable(_)
            | Self::FileChanged(_)
            | Self::OnlyRead(_)
            | Self::Migration(_)
            | Self::Unexpected(_) => false,
        }
    }

    /// Something is wrong with the database, or with the way to it; not with what the caller asked for.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        !matches!(self, Self::Invalid(_) | Self::Conflict(_) | Self::Outdated)
    }

    /// The database gave no answer at all: it is away, frozen or too slow.
    #[must_use]
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::FileFailed(_) | Self::TimedOut)
    }

    /// SQLite's file, or its companions, could not be written: the same file may be readable.
    pub(super) fn is_unwritable(&self) -> bool {
        matches!(
            self,
            Self::DiskFull(_) | Self::ReadOnly(_) | Self::Unreadable(Some(_)) | Self::FileFailed(_)
        )
    }

    /// What it is a sign of beside the failed call itself: something that lasts until somebody mends it.
    pub(super) fn trouble(&self) -> Option<Trouble> {
        match self {
            Self::Open { error, .. } => error.trouble(),
            Self::DiskFull(_) => Some(Trouble::DiskFull),
            // Met by every write; the disk is looked at elsewhere.
            Self::OnlyRead(_) => None,
            Self::ReadOnly(_)
            | Self::FileFailed(_)
            | Self::Unreadable(_)
            | Self::NotADatabase(_)
            | Self::Damaged(_)
            | Self::Unusable(_)
            | Self::Migration(_)
            | Self::Unexpected(_) => Some(Trouble::Refuses),
            Self::FileChanged(_) => Some(Trouble::FileChanged),
            Self::Undecodable(_) | Self::Corrupt { .. } => Some(Trouble::Unreadable),
            // Both have reasons of their own.
            Self::NoConnectionFree(_) | Self::ReadOnlyServer => None,
            Self::Unavailable(_)
            | Self::TimedOut
            | Self::Busy
            | Self::Locked(_)
            | Self::Invalid(_)
            | Self::Conflict(_)
            | Self::Outdated => None,
        }
    }

    /// Somebody configured what can't work: not a matter of the database's state.
    #[must_use]
    pub fn is_bad_setting(&self) -> bool {
        if let Self::Open { error, .. } = self {
            return error.is_bad_setting();
        }
        matches!(self, Self::Invalid(_))
    }

    /// A closed set, for metrics and logs.
    #[must_use]
    pub fn metric_label(&self) -> &'static str {
        match self {
            Self::Open { error, .. } => error.metric_label(),
            Self::Unavailable(_) | Self::FileFailed(_) => "unavailable",
            Self::NoConnectionFree(_) => "no_connection_free",
            Self::TimedOut => "timed_out",
            Self::Busy => "busy",
            Self::Locked(_) => "locked",
            Self::DiskFull(_) => "disk_full",
            Self::Unreadable(_) => "unreadable",
            Self::ReadOnly(_) | Self::ReadOnlyServer => "read_only",
            Self::NotADatabase(_) => "not_a_database",
            Self::Damaged(_) => "damaged",
            Self::Invalid(_) => "invalid",
            Self::Conflict(_) | Self::Outdated => "conflict",
            Self::Undecodable(_) | Self::Corrupt { .. } => "corrupt",
            Self::Unusable(_) => "unusable",
            Self::FileChanged(_) => "file_changed",
            Self::OnlyRead(_) => "read_only",
            Self::Migration(_) => "migration",
            Self::Unexpected(_) => "unexpected",
        }
    }
}

/// The error with its causes, each said once.
pub(super) fn in_one_line(error: &StoreError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let driver = error.downcast_ref::<sqlx::Error>();
        let words = driver.map_or_else(|| error.to_string(), said);
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        // What the driver's error rests on repeats its words.
        cause = error.source().filter(|_| driver.is_none());
    }
    text
}

/// A database's own words. The driver adds a line number of the server's source code, which helps nobody here.
fn said(error: &sqlx::Error) -> String {
    error
        .as_database_error()
        .map_or_else(|| error.to_string(), |error| error.message().to_owned())
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        if let sqlx::Error::Database(database) = &error {
            let code = database.code().unwrap_or_default().into_owned();
            let message = database.message().to_owned();
            return match code.parse::<i32>() {
                // SQLSTATEs have five characters; SQLite's extended result codes have at most four digits.
                Ok(number) if code.len() < 5 => from_sqlite(number, error),
                Ok(_) | Err(_) => from_postgres(&code, message, error),
            };
        }
        if matches!(
            error,
            sqlx::Error::Io(_)
                | sqlx::Error::Tls(_)
                | sqlx::Error::Protocol(_)
                | sqlx::Error::PoolTimedOut
                | sqlx::Error::PoolClosed
                | sqlx::Error::WorkerCrashed
        ) {
            return Self::Unavailable(error.to_string());
        }
        if matches!(
            error,
            sqlx::Error::ColumnDecode { .. }
                | sqlx::Error::Decode(_)
                | sqlx::Error::TypeNotFound { .. }
                | sqlx::Error::ColumnNotFound(_)
        ) {
            return Self::Undecodable(error);
        }
        Self::Unexpected(error)
    }
}

impl From<MigrateError> for StoreError {
    fn from(error: MigrateError) -> Self {
        if let MigrateError::Execute(cause) | MigrateError::ExecuteMigration(cause, _) = error {
            let error = Self::from(cause);
            if let Self::Unexpected(cause) = error {
                return Self::Migration(said(&cause));
            }
            if let Self::Unusable(cause) = error {
                return Self::Migration(cause);
            }
            return error;
        }
        Self::Migration(error.to_string())
    }
}

/// Primary result codes of SQLite: <https://www.sqlite.org/rescode.html>.
fn from_sqlite(extended: i32, error: sqlx::Error) -> StoreError {
    const CONSTRAINT_PRIMARY_KEY: i32 = 1555;
    const CONSTRAINT_UNIQUE: i32 = 2067;
    match (extended, extended & 0xff) {
        (CONSTRAINT_PRIMARY_KEY | CONSTRAINT_UNIQUE, _) => StoreError::Conflict("it is already there".into()),
        // Of statements that are fixed: a table or a column is not there.
        (_, 1) => StoreError::Unusable(error.to_string()),
        (_, 5 | 6) => StoreError::Locked(error),
        (_, 3 | 14) => StoreError::Unreadable(Some(error)),
        (_, 8) => StoreError::ReadOnly(error),
        (_, 10) => StoreError::FileFailed(error),
        (_, 11) => StoreError::Damaged(error),
        (_, 13) => StoreError::DiskFull(error),
        (_, 26) => StoreError::NotADatabase(error),
        _ => StoreError::Unexpected(error),
    }
}

/// SQLSTATEs: <https://www.postgresql.org/docs/current/errcodes-appendix.html>.
fn from_postgres(code: &str, message: String, error: sqlx::Error) -> StoreError {
    match code {
        "23505" => StoreError::Conflict("it is already there".into()),
        // Cancelled by statement_timeout: ours is as long as the caller's patience.
        "57014" => StoreError::TimedOut,
        "55P03" | "40001" | "40P01" => StoreError::Locked(error),
        "53100" => StoreError::DiskFull(error),
        "25006" => StoreError::ReadOnlyServer,
        "53300" => StoreError::NoConnectionFree(message),
        "3D000" => StoreError::Unavailable(format!("{message}: create it")),
        "42P01" | "42703" => StoreError::Unusable(format!(
            "{message}: the migrations have not run, or somebody changed the schema"
        )),
        "42501" => StoreError::Unusable(format!("{message}: grant it to the role that the gateway uses")),
        _ => match code.get(..2) {
            Some("28") => StoreError::Unavailable(format!("{message}: check user and password")),
            // Connection exceptions, insufficient resources, operator intervention.
            Some("08" | "53" | "57") => StoreError::Unavailable(message),
            // Features, schema and rights, system errors, damage.
            Some("0A" | "42" | "58" | "F0" | "XX") => StoreError::Unusable(message),
            Some(_) | None => StoreError::Unexpected(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::{borrow::Cow, error::Error, fmt};

    use sqlx::error::{DatabaseError, ErrorKind};

    use super::*;

    /// What a database says, by its code.
    #[derive(Debug)]
    struct Said(&'static str);

    impl fmt::Display for Said {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.message())
        }
    }

    impl Error for Said {}

    impl DatabaseError for Said {
        fn message(&self) -> &'static str {
            "its own words"
        }

        fn code(&self) -> Option<Cow<'_, str>> {
            Some(self.0.into())
        }

        fn as_error(&self) -> &(dyn Error + Send + Sync + 'static) {
            self
        }

        fn as_error_mut(&mut self) -> &mut (dyn Error + Send + Sync + 'static) {
            self
        }

        fn into_error(self: Box<Self>) -> Box<dyn Error + Send + Sync + 'static> {
            self
        }

        fn kind(&self) -> ErrorKind {
            ErrorKind::Other
        }
    }

    #[test]
    fn file_that_can_not_be_read_or_written_is_away_and_a_trouble_that_is_told() {
        // SQLITE_IOERR, and its forms for a short read, a failed write and a failed fsync.
        for code in ["10", "522", "778", "1034"] {
            let error = StoreError::from(sqlx::Error::Database(Box::new(Said(code))));

            assert!(matches!(error, StoreError::FileFailed(_)), "{code}: {error:?}");
            assert!(error.is_away() && error.is_retryable() && error.is_unwritable());
            assert_eq!(error.trouble(), Some(Trouble::Refuses));
            assert!(
                in_one_line(&error).ends_with("its own words"),
                "{}",
                in_one_line(&error)
            );
        }
    }
}
