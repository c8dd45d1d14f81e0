//! The data directory: created if missing, locked for one gateway, and written so that a reader never sees half a file.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// Name of the file that a running gateway holds locked, in addition to the directory itself: the file may be deleted,
/// and some file systems cannot lock directories.
const LOCK: &str = "lock";
/// Maximum length of `addresses.json`, many times the usual one, in bytes.
const ADDRESSES_BYTES_MAX: u64 = 4 << 10;
/// Name of the file with the addresses in use.
pub const ADDRESSES: &str = "addresses.json";

/// A data directory that this process has locked. Dropping it releases the lock.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _folder: File,
    _lock: Option<File>,
}

/// The addresses in use, as in `addresses.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// Address for devices.
    pub devices: SocketAddr,
    /// Address of the API.
    pub ops: SocketAddr,
}

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// Another gateway runs on it.
    #[error("server.data_dir: another gateway is using {}", path.display())]
    InUse { path: PathBuf },
    /// It is not a directory, or files cannot be created in it.
    #[error("the data directory {} can't be used: {source}", path.display())]
    Unusable { path: PathBuf, source: io::Error },
}

impl DataDir {
    /// Creates the directory if it is missing (mode 0700), and locks it.
    ///
    /// # Errors
    /// Another gateway has locked it, or files cannot be created in it.
    pub fn open(path: &Path) -> Result<Self, DataDirError> {
        let unusable = |source| DataDirError::Unusable {
            path: path.to_owned(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(unusable)?;
        let mode = fs::metadata(path).map_err(unusable)?.permissions().mode();
        if mode & 0o002 != 0 {
            tracing::warn!(path = %path.display(), "data directory can be written by everyone on this machine");
        }
        let in_use = || DataDirError::InUse { path: path.to_owned() };
        let folder = File::open(path).map_err(unusable)?;
        let is_folder_held = match folder.try_lock() {
            Ok(()) => true,
            Err(TryLockError::WouldBlock) => return Err(in_use()),
            Err(TryLockError::Error(_)) => false,
        };
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let lock = match options.open(path.join(LOCK)) {
            Ok(lock) => lock,
            // The disk is full or read-only: the existing files can be used.
            Err(error) if is_folder_held && is_unwritable(&error) => {
                return Ok(Self {
                    path: path.to_owned(),
                    _folder: folder,
                    _lock: None,
                });
            }
            Err(error) => return Err(unusable(error)),
        };
        match lock.try_lock() {
            Ok(()) => Ok(Self {
                path: path.to_owned(),
                _folder: folder,
                _lock: Some(lock),
            }),
            Err(TryLockError::WouldBlock) => Err(in_use()),
            Err(TryLockError::Error(source)) => Err(unusable(source)),
        }
    }

    /// Path of the directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the addresses: the gateway no longer listens there.
    pub fn remove_addresses(&self) {
        // The next start replaces a file that is left behind.
        let _ = fs::remove_file(self.path.join(ADDRESSES));
    }
}

fn is_unwritable(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(error.kind(), QuotaExceeded | ReadOnlyFilesystem | StorageFull)
}

/// Publishes the addresses in use.
///
/// # Errors
/// The file cannot be written.
pub fn write_addresses(path: &Path, addresses: Addresses) -> io::Result<()> {
    let mut text = serde_json::to_string(&addresses).map_err(io::Error::other)?;
    text.push('\n');
    write_atomically(&path.join(ADDRESSES), text.as_bytes(), 0o644)
}

/// Reads a file of the data directory, if it is not longer than any that is written.
///
/// # Errors
/// It cannot be read, or is longer than `bytes_max`.
pub fn read_bounded(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(bytes_max.saturating_add(1))
        .read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len > bytes_max) {
        return Err(io::Error::other(format!(
            "it is longer than {bytes_max} bytes, the maximum of this file"
        )));
    }
    Ok(bytes)
}

/// Whether a gateway has locked the directory now.
///
/// # Errors
/// The lock file cannot be opened.
pub fn is_in_use(path: &Path) -> io::Result<bool> {
    if let Ok(folder) = File::open(path)
        && matches!(folder.try_lock_shared(), Err(TryLockError::WouldBlock))
    {
        return Ok(true);
    }
    let lock = match File::open(path.join(LOCK)) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    match lock.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Addresses of the gateway that runs on a directory, or was killed on it. `None` if there is no such file.
///
/// # Errors
/// The file cannot be read, or is not valid.
pub fn read_addresses(path: &Path) -> io::Result<Option<Addresses>> {
    match read_bounded(&path.join(ADDRESSES), ADDRESSES_BYTES_MAX) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Replaces a file atomically: a reader sees the old content or the new. Once this has returned, the new content
/// survives a power failure.
///
/// # Errors
/// The file cannot be written, and the old one is unchanged. Or its directory cannot be synced: then a power failure
/// may revert it.
pub fn write_atomically(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&temporary)?;
        // An earlier crash may have left the file with another mode.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        // The directory holds the new name.
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    };
    write().inspect_err(|_| drop(fs::remove_file(&temporary)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_holder_is_refused_until_the_first_leaves() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("data");

        let first = DataDir::open(&path).unwrap();

        assert!(matches!(DataDir::open(&path), Err(DataDirError::InUse { .. })));
        assert!(is_in_use(&path).unwrap());
        drop(first);
        assert!(!is_in_use(&path).unwrap());
        assert!(DataDir::open(&path).is_ok());
    }

    #[test]
    fn second_holder_is_refused_although_the_lock_file_was_deleted() {
        let home = tempfile::tempdir().unwrap();
        let _first = DataDir::open(home.path()).unwrap();

        fs::remove_file(home.path().join(LOCK)).unwrap();

        assert!(matches!(DataDir::open(home.path()), Err(DataDirError::InUse { .. })));
        assert!(is_in_use(home.path()).unwrap());
    }

    #[test]
    fn file_that_is_longer_than_its_bound_is_not_read() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("file");
        fs::write(&path, "12345").unwrap();

        assert_eq!(read_bounded(&path, 5).unwrap(), b"12345");
        let error = read_bounded(&path, 4).unwrap_err();
        assert!(error.to_string().contains("longer than 4 bytes"), "{error}");
    }

    #[test]
    fn file_in_the_way_makes_it_unusable() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("data");
        fs::write(&path, "").unwrap();

        assert!(matches!(DataDir::open(&path), Err(DataDirError::Unusable { .. })));
    }

    #[test]
    fn addresses_are_read_back() {
        let home = tempfile::tempdir().unwrap();
        let directory = DataDir::open(home.path()).unwrap();
        let addresses = Addresses {
            devices: "127.0.0.1:1".parse().unwrap(),
            ops: "[::1]:2".parse().unwrap(),
        };

        write_addresses(home.path(), addresses).unwrap();

        assert_eq!(read_addresses(home.path()).unwrap(), Some(addresses));
        directory.remove_addresses();
        assert_eq!(read_addresses(home.path()).unwrap(), None);
    }
}
