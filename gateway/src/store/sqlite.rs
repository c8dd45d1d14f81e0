//! The embedded database: one file, write-ahead log, one writer beside readers.

use std::{
    fs::{self, Metadata, OpenOptions},
    io,
    ops::{Deref, DerefMut},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use sqlx::{
    ConnectOptions, Connection as _, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use tokio::{task::spawn_blocking, time::sleep};

use super::{
    connection::{Connection, Connector, Sql},
    error::{StoreError, in_one_line},
    migrations::{self, Caller, SCHEMA_VERSION},
};

/// Maximum wait for another process's lock: less than the 2 s of a rule write.
const BUSY_MAX: Duration = Duration::from_millis(1_500);
/// Maximum number of connections, each with a thread, above the number that the pools keep. A thread that waits for the
/// disk can't be interrupted. While the disk hangs, further calls must not take further threads.
const CONNECTIONS_MAX: usize = 64;
/// Time between two attempts to open a read-only file for writing.
const RETRY: Duration = Duration::from_secs(1);
/// Instructions of SQLite's virtual machine between two checks whether a statement still has a caller: at most a
/// millisecond.
const CHECK_STEPS: i32 = 10_000;

const VERSION: Sql = Sql::both("SELECT max(version) AS number FROM _sqlx_migrations WHERE success");

/// The file, as it was opened.
#[derive(Debug)]
pub(super) struct File {
    path: PathBuf,
    /// Device and inode, once it is open.
    identity: OnceLock<(u64, u64)>,
    /// The same of its write-ahead log, as of the last check.
    log: Mutex<Option<LogIdentity>>,
    /// Why it can only be read, if so.
    only_read: Mutex<Option<String>>,
    connections: Arc<AtomicUsize>,
    /// Held during a check whether the file is still the same.
    checking: Arc<tokio::sync::Mutex<()>>,
}

/// The way to open the file.
#[derive(Clone, Debug)]
pub(super) struct Opening {
    file: Arc<File>,
    is_reader: bool,
}

impl File {
    pub fn new(path: &Path) -> Arc<Self> {
        Arc::new(Self {
            path: path.to_owned(),
            identity: OnceLock::new(),
            log: Mutex::default(),
            only_read: Mutex::default(),
            connections: Arc::default(),
            checking: Arc::default(),
        })
    }

    /// Reads and writes. A commit is on the disk before it is acknowledged (`synchronous = FULL`).
    pub fn writer(self: &Arc<Self>) -> Connector {
        let file = Arc::clone(self);
        Connector::Sqlite(Opening { file, is_reader: false })
    }

    /// Reads only, beside the writer.
    pub fn reader(self: &Arc<Self>) -> Connector {
        let file = Arc::clone(self);
        Connector::Sqlite(Opening { file, is_reader: true })
    }

    /// Creates or opens the file, and migrates it.
    pub async fn prepare(self: &Arc<Self>) -> Result<(), StoreError> {
        // SQLite reports all of these as "unable to open". The file system has the reason.
        match fs::metadata(&self.path) {
            Ok(metadata) if !metadata.is_file() => return Err(StoreError::Unreadable(None)),
            Ok(_) => {}
            // Created here, so that no other user can read the hashes in it; its additional files get the same mode. If
            // this fails, SQLite fails as well, and says why.
            Err(_) => drop(
                OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&self.path),
            ),
        }
        let mut connection = self.writer().connect().await?;
        migrations::migrate(&mut connection, Caller::Serve).await?;
        self.remember();
        Ok(())
    }

    /// Opens a file that can't be written now, such as on a full disk, for reading. No other process may write it.
    ///
    /// # Errors
    /// It can't be read either, its schema has another version, or its write-ahead log holds more than the file.
    pub async fn open_to_read(self: &Arc<Self>, cause: &StoreError) -> Result<(), StoreError> {
        if fs::metadata(log_of(&self.path)).is_ok_and(|log| log.len() > 0) {
            return Err(StoreError::Unreadable(None));
        }
        self.set_only_read(Some(in_one_line(cause)));
        let version = async {
            let mut connection = self.reader().connect().await?;
            let row = connection.first(VERSION, &[]).await?;
            row.map(|row| row.int("number")).transpose()
        };
        match version.await {
            Ok(Some(Some(SCHEMA_VERSION))) => {
                self.remember();
                Ok(())
            }
            other => {
                self.set_only_read(None);
                Err(other.err().unwrap_or(StoreError::Unreadable(None)))
            }
        }
    }

    /// Tries to open it for writing until that succeeds.
    pub async fn await_writable(self: Arc<Self>) {
        loop {
            sleep(RETRY).await;
            let opening = Opening {
                file: Arc::clone(&self),
                is_reader: false,
            };
            let opened = async {
                let mut connection = Connection::Sqlite(opening.open(None).await?);
                migrations::migrate(&mut connection, Caller::Serve).await
            };
            if opened.await.is_ok() {
                self.set_only_read(None);
                tracing::info!("database can be written again");
                return;
            }
        }
    }

    fn remember(&self) {
        if let Ok(metadata) = fs::metadata(&self.path) {
            let _ = self.identity.set(identity(&metadata));
        }
    }

    /// Whether it is still the file that was opened.
    pub fn check(&self) -> Result<(), StoreError> {
        let Some(opened) = self.identity.get() else {
            return Ok(());
        };
        match fs::metadata(&self.path) {
            Ok(metadata) if identity(&metadata) != *opened => Err(StoreError::FileChanged("replaced")),
            Ok(metadata) if metadata.len() == 0 => Err(StoreError::FileChanged("emptied")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(StoreError::FileChanged("deleted")),
            Ok(_) => self.check_log(),
            // Other errors show when it is used.
            Err(_) => Ok(()),
        }
    }

    /// Whether the write-ahead log is still the one that connections have open. Later connections would create another
    /// one, and each group would only see its own commits.
    ///
    /// The last connection to close deletes the log, so a missing one proves nothing. After any change, the check is
    /// whether the former one is still open.
    fn check_log(&self) -> Result<(), StoreError> {
        let path = log_of(&self.path);
        let found = fs::metadata(&path).ok().as_ref().map(LogIdentity::of);
        let mut known = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        if *known != found {
            if has_open(&path, *known) {
                return Err(StoreError::FileChanged("separated from its write-ahead log (-wal)"));
            }
            *known = found;
        }
        Ok(())
    }

    /// The same on a blocking thread, one check at a time: a file system that hangs takes one thread at most.
    async fn check_aside(self: &Arc<Self>) -> Result<(), StoreError> {
        if self.identity.get().is_none() {
            return Ok(());
        }
        let alone = Arc::clone(&self.checking).lock_owned().await;
        let file = Arc::clone(self);
        let checking = spawn_blocking(move || {
            let _alone = alone;
            file.check()
        });
        // It does not panic, and is cancelled only where the runtime ends.
        checking.await.unwrap_or(Ok(()))
    }

    async fn check_writable(self: &Arc<Self>) -> Result<(), StoreError> {
        self.check_aside().await?;
        match self.only_read() {
            Some(cause) => Err(StoreError::OnlyRead(cause)),
            None => Ok(()),
        }
    }

    fn only_read(&self) -> Option<String> {
        self.only_read.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_only_read(&self, cause: Option<String>) {
        *self.only_read.lock().unwrap_or_else(PoisonError::into_inner) = cause;
    }
}

fn log_of(path: &Path) -> PathBuf {
    let mut log = path.to_owned().into_os_string();
    log.push("-wal");
    log.into()
}

/// Whether this process has a file open that was deleted at this path, or is the known one (proc(5)).
fn has_open(path: &Path, known: Option<LogIdentity>) -> bool {
    let folder = path.parent().and_then(|folder| fs::canonicalize(folder).ok());
    let (Some(folder), Some(name), Ok(open)) = (folder, path.file_name(), fs::read_dir("/proc/self/fd")) else {
        return false;
    };
    let here = folder.join(name);
    let mut deleted = here.clone().into_os_string();
    deleted.push(" (deleted)");
    open.flatten().any(|file| {
        let Ok(target) = fs::read_link(file.path()) else {
            return false;
        };
        // A file in its place was created a moment ago by a new connection.
        let is_known = known.is_some() && fs::metadata(file.path()).ok().as_ref().map(LogIdentity::of) == known;
        target.as_os_str() == deleted || (is_known && target != here)
    })
}

/// Identity of a file. Many file systems reuse an inode number at once, so the number alone is not enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LogIdentity {
    file: (u64, u64),
    /// Time of creation, if the file system has it.
    created: Option<SystemTime>,
}

impl LogIdentity {
    fn of(metadata: &Metadata) -> Self {
        Self {
            file: identity(metadata),
            created: metadata.created().ok(),
        }
    }
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// A connection with its own thread. Dropping it interrupts the running statement, unless that waits for the disk.
#[derive(Debug)]
pub(super) struct Sqlite {
    connection: SqliteConnection,
    /// The thread holds a weak reference.
    _caller: Arc<()>,
}

impl Deref for Sqlite {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        &self.connection
    }
}

impl DerefMut for Sqlite {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.connection
    }
}

impl Opening {
    pub async fn connect(&self) -> Result<Sqlite, StoreError> {
        self.file.check_aside().await?;
        self.open(self.file.only_read()).await
    }

    async fn open(&self, only_read: Option<String>) -> Result<Sqlite, StoreError> {
        let count = Counted::new(&self.file.connections).ok_or_else(|| {
            StoreError::Unavailable(format!(
                "{CONNECTIONS_MAX} connections wait for its disk: check the disk"
            ))
        })?;
        let options = SqliteConnectOptions::new()
            .filename(&self.file.path)
            .busy_timeout(BUSY_MAX)
            .thread_name(|id| format!("sqlite-{id}"))
            .disable_statement_logging();
        let options = if only_read.is_some() {
            // Without the companion files, for which there is no space.
            options.read_only(true).immutable(true)
        } else if self.is_reader {
            options.read_only(true)
        } else {
            options
                .journal_mode(SqliteJournalMode::Wal)
                .synchronous(SqliteSynchronous::Full)
        };
        let mut connection = SqliteConnection::connect_with(&options).await?;
        let caller = Arc::new(());
        let waiting = Arc::downgrade(&caller);
        // The handler and its count are dropped when the connection's thread ends. It interrupts a statement by
        // returning false.
        connection
            .lock_handle()
            .await?
            .set_progress_handler(CHECK_STEPS, move || count.is_there() && waiting.strong_count() > 0);
        Ok(Sqlite {
            connection,
            _caller: caller,
        })
    }

    /// Whether a connection that is opened now must not be kept: it does not see later writes.
    pub fn is_passing(&self) -> bool {
        self.file.only_read().is_some()
    }

    /// Fails if the file is not the one that was opened.
    pub async fn check_writable(&self) -> Result<(), StoreError> {
        self.file.check_writable().await
    }
}

/// One of the connections.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(connections: &Arc<AtomicUsize>) -> Option<Self> {
        let counted = Self(Arc::clone(connections));
        let before = connections.fetch_add(1, Ordering::Relaxed);
        (before < CONNECTIONS_MAX).then_some(counted)
    }

    const fn is_there(&self) -> bool {
        true
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::pool::{Pool, Rank},
        *,
    };

    #[tokio::test]
    async fn file_that_can_only_be_read_is_read_without_companions_and_written_once_that_is_possible() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("seawall.db");
        File::new(&path).prepare().await.unwrap();
        let file = File::new(&path);
        let full = StoreError::DiskFull(sqlx::Error::Io(io::Error::other("no room")));
        let companions = || fs::read_dir(home.path()).unwrap().count() - 1;
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while companions() > 0 {
            assert!(
                std::time::Instant::now() < deadline,
                "the last connection takes them away"
            );
            tokio::task::yield_now().await;
        }

        file.open_to_read(&full).await.unwrap();

        let pool = Pool::new(file.writer(), Rank::Ops, 1, &Arc::default());
        let mut held = pool.take().await.unwrap();
        assert!(held.first(VERSION, &[]).await.unwrap().is_some());
        let refused = held.begin().await.unwrap_err();
        assert!(refused.to_string().contains("no room"), "{refused}");
        held.release();
        assert_eq!(companions(), 0);
        Arc::clone(&file).await_writable().await;
        let mut held = pool.take().await.unwrap();
        held.begin().await.unwrap();
        held.commit().await.unwrap();
    }

    #[tokio::test]
    async fn file_whose_log_holds_more_than_the_file_is_not_read_without_it() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("seawall.db");
        File::new(&path).prepare().await.unwrap();
        fs::write(home.path().join("seawall.db-wal"), "commits").unwrap();

        let opened = File::new(&path).open_to_read(&StoreError::Busy).await;

        assert!(opened.is_err());
    }

    #[tokio::test]
    async fn writer_waits_for_the_disk_at_each_commit() {
        let home = tempfile::tempdir().unwrap();
        let file = File::new(&home.path().join("seawall.db"));
        file.prepare().await.unwrap();

        let mut writer = file.writer().connect().await.unwrap();
        let row = writer.first(Sql::both("PRAGMA synchronous"), &[]).await.unwrap();

        assert_eq!(row.unwrap().int("synchronous").unwrap(), Some(2), "FULL");
    }

    #[tokio::test]
    async fn emptied_file_is_told_from_the_one_that_was_opened() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("seawall.db");
        let file = File::new(&path);
        file.prepare().await.unwrap();
        assert!(file.check().is_ok());
        // The last connection to close writes what is in the log into the file, and removes the log.
        let log = home.path().join("seawall.db-wal");
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while log.exists() {
            assert!(std::time::Instant::now() < deadline);
            tokio::task::yield_now().await;
        }

        fs::write(&path, "").unwrap();

        assert!(matches!(file.check(), Err(StoreError::FileChanged("emptied"))));
    }

    #[tokio::test]
    async fn log_that_is_taken_from_its_connections_is_told_and_no_other_is_made() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("seawall.db");
        let (log, aside) = (log_of(&path), home.path().join("aside"));
        let file = File::new(&path);
        file.prepare().await.unwrap();
        let mut writer = file.writer().connect().await.unwrap();
        writer.begin().await.unwrap();
        writer.commit().await.unwrap();
        assert!(file.check().is_ok());
        let is_told = |outcome| matches!(outcome, Err(StoreError::FileChanged(_)));

        fs::rename(&log, &aside).unwrap();

        assert!(is_told(file.check()) && is_told(file.check_writable().await));
        assert!(is_told(file.reader().connect().await.map(drop)));
        assert!(!log.exists(), "no other log");
        fs::rename(&aside, &log).unwrap();
        assert!(file.check().is_ok());
        fs::remove_file(&log).unwrap();
        assert!(is_told(file.check()) && is_told(file.check()));
        fs::write(&log, "").unwrap();
        assert!(is_told(file.check()));
    }

    #[tokio::test]
    async fn inode_of_a_former_log_that_was_given_to_another_file_is_not_taken_for_the_log() {
        let home = tempfile::tempdir().unwrap();
        let file = File::new(&home.path().join("seawall.db"));
        file.prepare().await.unwrap();
        let other = fs::File::create(home.path().join("other")).unwrap();
        let metadata = other.metadata().unwrap();
        let former = LogIdentity {
            file: identity(&metadata),
            created: Some(SystemTime::UNIX_EPOCH),
        };

        *file.log.lock().unwrap() = Some(former);

        assert!(file.check().is_ok());
    }

    #[tokio::test]
    async fn log_that_the_last_connection_takes_away_is_not_missed() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("seawall.db");
        let file = File::new(&path);
        file.prepare().await.unwrap();

        for _ in 0..50 {
            let connection = file.writer().connect().await.unwrap();
            assert!(file.check().is_ok());
            drop(connection);
            assert!(file.check().is_ok());
        }
    }

    #[tokio::test]
    async fn connections_are_counted_until_their_threads_end_and_are_bounded() {
        let home = tempfile::tempdir().unwrap();
        let file = File::new(&home.path().join("seawall.db"));
        file.prepare().await.unwrap();

        let mut held = Vec::new();
        let refused = loop {
            match file.reader().connect().await {
                Ok(connection) => held.push(connection),
                Err(error) => break error,
            }
        };

        assert!(refused.is_away() && refused.to_string().contains("disk"), "{refused}");
        assert!(
            (CONNECTIONS_MAX - 1..=CONNECTIONS_MAX).contains(&held.len()),
            "{}",
            held.len()
        );
        drop(held);
        all_threads_end(&file).await;
    }

    #[tokio::test]
    async fn statement_whose_caller_has_gone_is_interrupted_and_its_thread_ends() {
        const ENDLESS: Sql =
            Sql::both("WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n) SELECT count(*) FROM n");
        let home = tempfile::tempdir().unwrap();
        let file = File::new(&home.path().join("seawall.db"));
        file.prepare().await.unwrap();
        all_threads_end(&file).await;
        let pool = Pool::new(file.reader(), Rank::Ops, 1, &Arc::default());

        for _ in 0..3 {
            let mut held = pool.take().await.unwrap();
            let call = async move { held.first(ENDLESS, &[]).await.map(|_| held) };
            let ended = tokio::time::timeout(Duration::from_millis(50), call).await;
            assert!(ended.is_err(), "it has no end");
        }

        all_threads_end(&file).await;
    }

    async fn all_threads_end(file: &File) {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while file.connections.load(Ordering::Relaxed) > 0 {
            assert!(std::time::Instant::now() < deadline, "a thread does not end");
            tokio::task::yield_now().await;
        }
    }
}
