//! Errors of the database, by what the caller can do: whether to try again, and what a person should do.

use std::error::Error as _;

use rustls::pki_types::pem;
use sqlx::{error::BoxDynError, migrate::MigrateError};

use super::failures::Trouble;

/// A failed call to the store. The text says what to do, if anything can be done.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Opening failed; names the database, without its password.
    #[error("database {database}: {}", in_one_line(.error))]
    Open { database: String, error: Box<StoreError> },
    /// The database can't be reached, or refuses connections for now.
    #[error("the database is unavailable: {0}")]
    Unavailable(String),
    /// Reading or writing SQLite's file failed: the disk, or a companion file that was taken away.
    #[error("reading or writing the database file failed: {0}")]
    FileFailed(#[source] sqlx::Error),
    /// The server accepts no more connections, of this role or of any.
    #[error("the database has no connection to spare: {0}")]
    NoConnectionFree(String),
    /// A standby, or a server that accepts no writes for another reason.
    #[error("the database is read-only: point the gateway at the primary")]
    ReadOnlyServer,
    /// No answer before the deadline. Whether a write was done is not known.
    #[error("the database did not answer in time")]
    TimedOut,
    /// Every connection for this purpose is in use, and none was released in time.
    #[error("too many calls to the database at once: try again")]
    Busy,
    /// Another process or transaction holds a lock.
    #[error("the database is locked by another process or a long transaction: end it, or wait and try again")]
    Locked(#[source] sqlx::Error),
    #[error("the disk is full: free space on the database's disk; the gateway then recovers on its own")]
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
    /// The database answers, and can't run a statement of the gateway: rights, tables or columns are missing, a
    /// constraint or a trigger refuses it, or its files are damaged.
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
    /// The database URL or the caller's request is not valid.
    #[error("{0}")]
    Invalid(String),
    /// The object exists already, or has changed since it was read.
    #[error("{0}")]
    Conflict(String),
    /// A value does not have the type of its column.
    #[error("a row can't be read: {0}")]
    Undecodable(#[source] sqlx::Error),
    /// The rule has this revision, which is not the one that the change was decided on.
    #[error("the rule was changed meanwhile: look at it again")]
    OtherRevision(u64),
    /// Other rules were written since the check.
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
    /// The driver could not send a statement, or not understand its answer.
    #[error("a statement failed in the driver: {0}")]
    Unexpected(#[source] sqlx::Error),
}

impl StoreError {
    /// Whether the same call may succeed later.
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
            | Self::OtherRevision(_)
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

    /// Whether the database or the connection is at fault, and not the caller's request.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        !matches!(
            self,
            Self::Invalid(_) | Self::Conflict(_) | Self::OtherRevision(_) | Self::Outdated
        )
    }

    /// Whether the database gave no answer: it is unavailable, frozen or too slow.
    #[must_use]
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::FileFailed(_) | Self::TimedOut)
    }

    /// Whether a change of a rule that failed so can wait in the node's journal: the database does not take it now, and
    /// may take it later.
    #[must_use]
    pub fn is_for_journal(&self) -> bool {
        self.is_retryable() || matches!(self, Self::OnlyRead(_)) || self.trouble() == Some(Trouble::Refuses)
    }

    /// Whether SQLite's file, or a companion of it, could not be written. The file may still be readable.
    pub(super) fn is_unwritable(&self) -> bool {
        matches!(
            self,
            Self::DiskFull(_) | Self::ReadOnly(_) | Self::Unreadable(Some(_)) | Self::FileFailed(_)
        )
    }

    /// The lasting problem behind the failed call, if there is one: it lasts until a person repairs it.
    pub(super) fn trouble(&self) -> Option<Trouble> {
        match self {
            Self::Open { error, .. } => error.trouble(),
            Self::DiskFull(_) => Some(Trouble::DiskFull),
            // Every write meets it; the disk is checked elsewhere.
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
            // Both have their own reasons.
            Self::NoConnectionFree(_) | Self::ReadOnlyServer => None,
            Self::Unavailable(_)
            | Self::TimedOut
            | Self::Busy
            | Self::Locked(_)
            | Self::Invalid(_)
            | Self::Conflict(_)
            | Self::OtherRevision(_)
            | Self::Outdated => None,
        }
    }

    /// Whether the configuration is at fault, and not the database's state.
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
            Self::Conflict(_) | Self::OtherRevision(_) | Self::Outdated => "conflict",
            Self::Undecodable(_) | Self::Corrupt { .. } => "corrupt",
            Self::Unusable(_) => "unusable",
            Self::FileChanged(_) => "file_changed",
            Self::OnlyRead(_) => "read_only",
            Self::Migration(_) => "migration",
            Self::Unexpected(_) => "unexpected",
        }
    }
}

/// Returns the error with its causes, each once.
pub(super) fn in_one_line(error: &StoreError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let driver = error.downcast_ref::<sqlx::Error>();
        let words = driver.map_or_else(|| error.to_string(), said);
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        // The source of the driver's error repeats its text.
        cause = error.source().filter(|_| driver.is_none());
    }
    text
}

/// Returns the database's message. The driver adds a line number of the server's source code, which does not help here.
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
        if let sqlx::Error::Configuration(cause) | sqlx::Error::Tls(cause) = &error {
            return Self::Unavailable(not_secured(cause));
        }
        if matches!(
            error,
            sqlx::Error::Io(_)
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

/// The error of a connection that can't be encrypted or authenticated as configured, without a byte of a file.
///
/// The driver's message repeats a damaged key, and a certificate that is given as text instead of as a file. So only
/// errors of the TLS library itself are repeated, and messages that the driver has as constants.
fn not_secured(cause: &BoxDynError) -> String {
    const FORM: &str = "as a PEM file with its line ends, that the gateway's user may read";
    if cause.is::<rustls::Error>() {
        return format!("TLS: {cause}");
    }
    if cause.is::<pem::Error>() {
        return format!("TLS: the client's certificate can't be read: name it in sslcert or PGSSLCERT, {FORM}");
    }
    match cause.to_string().as_str() {
        text @ "server does not support TLS" => format!("TLS: {text}: turn it on there, or change sslmode"),
        "user auth key and certs must be given together" => {
            "TLS: the client's certificate and its key are both needed: sslcert and sslkey, or PGSSLCERT and PGSSLKEY"
                .into()
        }
        text if text.starts_with("Invalid certificate") => format!(
            "TLS: the certificates of the server's authority can't be read: name them in sslrootcert or PGSSLROOTCERT, {FORM}"
        ),
        text if text.starts_with("Failed to saslprep") => {
            "user or password has characters that SCRAM does not allow (RFC 4013)".into()
        }
        _ => format!(
            "TLS: the client's key can't be read: name it in sslkey or PGSSLKEY, {FORM}. \
             Check sslcert and sslrootcert as well"
        ),
    }
}

impl From<MigrateError> for StoreError {
    fn from(error: MigrateError) -> Self {
        if let MigrateError::Execute(cause) | MigrateError::ExecuteMigration(cause, _) = error {
            let error = Self::from(cause);
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
        // The statements are constants, so a table or a column is missing.
        (_, 1) => StoreError::Unusable(error.to_string()),
        (_, 5 | 6) => StoreError::Locked(error),
        (_, 3 | 14) => StoreError::Unreadable(Some(error)),
        (_, 8) => StoreError::ReadOnly(error),
        (_, 10) => StoreError::FileFailed(error),
        (_, 11) => StoreError::Damaged(error),
        (_, 13) => StoreError::DiskFull(error),
        (_, 26) => StoreError::NotADatabase(error),
        // A constraint or a trigger that somebody added, among others.
        _ => StoreError::Unusable(said(&error)),
    }
}

/// SQLSTATEs: <https://www.postgresql.org/docs/current/errcodes-appendix.html>.
fn from_postgres(code: &str, message: String, error: sqlx::Error) -> StoreError {
    match code {
        "23505" => StoreError::Conflict("it is already there".into()),
        // Cancelled by statement_timeout, which is as long as the caller's deadline.
        "57014" => StoreError::TimedOut,
        "55P03" | "40001" | "40P01" => StoreError::Locked(error),
        "53100" => StoreError::DiskFull(error),
        "25006" => StoreError::ReadOnlyServer,
        "53300" => StoreError::NoConnectionFree(message),
        "3D000" => StoreError::Unavailable(format!("{message}: create it")),
        "42P01" | "42703" => StoreError::Unusable(format!(
            "{message}: the migrations have not run, or the schema was changed"
        )),
        "42501" => StoreError::Unusable(format!("{message}: grant it to the role that the gateway uses")),
        _ => match code.get(..2) {
            Some("28") => StoreError::Unavailable(format!("{message}: check user and password")),
            // Connection exceptions, insufficient resources, operator intervention.
            Some("08" | "53" | "57") => StoreError::Unavailable(message),
            // Features, schema and rights, system errors, damage; constraints and triggers that somebody added.
            Some(_) | None => StoreError::Unusable(message),
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

    /// A private key whose line ends were lost, as text and as the numbers of a byte string.
    const KEY: &str = "-----BEGIN PRIVATE KEY-----Zm9vYmFyYmF6cXV4-----END PRIVATE KEY-----";

    #[test]
    fn driver_s_error_about_a_damaged_key_or_certificate_is_never_repeated() {
        use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

        let key = PrivateKeyDer::from_pem_slice(KEY.as_bytes()).unwrap_err();
        let certificate = CertificateDer::from_pem_slice(KEY.as_bytes()).unwrap_err();
        assert!(key.to_string().contains("45, 45, 45"), "{key}");
        let bytes = |text: &str| text.contains("45, 45") || text.contains("Zm9v") || text.contains("90, 109");
        for (error, named) in [
            (sqlx::Error::Configuration(key.to_string().into()), "PGSSLKEY"),
            (sqlx::Error::Configuration("no keys found pem file".into()), "PGSSLKEY"),
            (sqlx::Error::Configuration(KEY.into()), "PGSSLKEY"),
            (sqlx::Error::Tls(certificate.into()), "PGSSLCERT"),
            (
                sqlx::Error::Tls(format!("Invalid certificate {KEY}").into()),
                "PGSSLROOTCERT",
            ),
            (sqlx::Error::Tls(KEY.into()), "PGSSLKEY"),
            (
                sqlx::Error::Configuration(format!("Failed to saslprep password: {KEY}").into()),
                "password",
            ),
            (sqlx::Error::Tls("server does not support TLS".into()), "sslmode"),
            (sqlx::Error::Tls(rustls::Error::EncryptError.into()), "cannot encrypt"),
        ] {
            let error = StoreError::from(error);

            let shown = format!("{} {error:?}", in_one_line(&error));
            assert!(shown.contains(named) && !bytes(&shown), "{named}: {shown}");
            assert!(error.is_away() && error.is_retryable(), "{shown}");
        }
    }

    #[test]
    fn statement_that_the_schema_refuses_is_a_lasting_trouble_with_its_cause() {
        // NOT NULL, CHECK, RAISE, a value out of range, a missing schema; SQLITE_CONSTRAINT_CHECK and _TRIGGER.
        for code in ["23502", "23514", "P0001", "22003", "3F000", "275", "1811"] {
            let error = StoreError::from(sqlx::Error::Database(Box::new(Said(code))));

            assert!(matches!(error, StoreError::Unusable(_)), "{code}: {error:?}");
            assert_eq!(error.trouble(), Some(Trouble::Refuses));
            assert!(in_one_line(&error).contains("its own words"), "{code}");
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
