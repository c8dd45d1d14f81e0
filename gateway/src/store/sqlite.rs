//! The embedded database: one file, write-ahead log, one writer beside readers.

use std::{fs::OpenOptions, os::unix::fs::OpenOptionsExt, path::Path, time::Duration};

use sqlx::{
    ConnectOptions,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};

use super::{connection::Connector, error::StoreError, migrations};

/// Longest wait for another process's lock, below the 2 s in which a rule write is answered.
const BUSY_MAX: Duration = Duration::from_millis(1_500);

/// Reads and writes. `synchronous = NORMAL` may lose the last commits when the machine (not the process) dies, never the file.
pub(super) fn writer(path: &Path) -> Connector {
    let options = base(path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Normal)
        .create_if_missing(true);
    Connector::Sqlite(Box::new(options))
}

/// Reads only, beside the writer.
pub(super) fn reader(path: &Path) -> Connector {
    Connector::Sqlite(Box::new(base(path).read_only(true)))
}

fn base(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .busy_timeout(BUSY_MAX)
        .thread_name(|id| format!("sqlite-{id}"))
        .disable_statement_logging()
}

/// Creates or opens the file, and migrates it.
pub(super) async fn prepare(path: &Path) -> Result<(), StoreError> {
    // SQLite answers "unable to open" to all of these; the file system knows better.
    match std::fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => return Err(StoreError::Unreadable(None)),
        Ok(_) => {}
        // Made here, so that nobody else can read the hashes in it; its companion files get the same mode. Where this fails,
        // so does SQLite, and says why.
        Err(_) => drop(OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)),
    }
    let mut connection = writer(path).connect().await?;
    migrations::migrate(&mut connection, migrations::Caller::Serve).await
}
