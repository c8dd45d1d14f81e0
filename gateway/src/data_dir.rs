//! The data directory: made where it is missing, locked for one gateway, and written so that a reader never sees half a file.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Write},
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// Name of the file that a running gateway holds locked.
const LOCK: &str = "lock";
/// Name of the file with the addresses in use.
pub const ADDRESSES: &str = "addresses.json";

/// A data directory that this process holds; dropping it lets the next gateway in.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: File,
}

/// The addresses in use, as `addresses.json` tells them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// Where devices connect.
    pub devices: SocketAddr,
    /// Where the API is.
    pub ops: SocketAddr,
}

/// Why a data directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// Another gateway runs on it.
    #[error("server.data_dir: another gateway is using {}", path.display())]
    InUse { path: PathBuf },
    /// It is no directory, or files can't be made in it.
    #[error("the data directory {} can't be used: {source}", path.display())]
    Unusable { path: PathBuf, source: io::Error },
}

impl DataDir {
    /// Makes the directory where it is missing (mode 0700), and locks it.
    ///
    /// # Errors
    /// Another gateway holds it, or files can't be made in it.
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
        let options = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .clone();
        let lock = options.open(path.join(LOCK)).map_err(unusable)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self {
                path: path.to_owned(),
                _lock: lock,
            }),
            Err(TryLockError::WouldBlock) => Err(DataDirError::InUse { path: path.to_owned() }),
            Err(TryLockError::Error(source)) => Err(unusable(source)),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tells the addresses in use to whoever started this gateway.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn write_addresses(&self, addresses: Addresses) -> io::Result<()> {
        let mut text = serde_json::to_string(&addresses).map_err(io::Error::other)?;
        text.push('\n');
        write_atomically(&self.path.join(ADDRESSES), text.as_bytes(), 0o644)
    }

    /// Takes the addresses away: nobody listens there any more.
    pub fn remove_addresses(&self) {
        // A file that is left behind is written anew by the next start.
        let _ = fs::remove_file(self.path.join(ADDRESSES));
    }
}

/// Whether a gateway holds the directory now.
///
/// # Errors
/// The lock file can't be opened.
pub fn is_in_use(path: &Path) -> io::Result<bool> {
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

/// The addresses of the gateway that runs on a directory, or ran on it and was killed; `None` where there is no such file.
///
/// # Errors
/// The file can't be read, or isn't ours.
pub fn read_addresses(path: &Path) -> io::Result<Option<Addresses>> {
    match fs::read(path.join(ADDRESSES)) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes a file so that a reader sees the old content or the new, whatever happens in between; and the new, once this has returned,
/// also after the power has failed.
///
/// # Errors
/// The file can't be written, and the old one is as it was; or its folder can't: then the new one may be gone after a loss of power.
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
        // The new name is the folder's, not the file's.
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

        directory.write_addresses(addresses).unwrap();

        assert_eq!(read_addresses(home.path()).unwrap(), Some(addresses));
        directory.remove_addresses();
        assert_eq!(read_addresses(home.path()).unwrap(), None);
    }
}
