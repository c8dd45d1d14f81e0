//! The index of registered devices: read from the registry at intervals, and kept in `roster.bin` of the data
//! directory. With it this node tells devices from unknown ids, and tenants from each other, from its first connection.
//!
//! Only positions in the queue depend on it. If the file is missing, damaged or old, devices that this node has not
//! seen lose their positions until the registry is read. Reading never delays lookups. Start with [`load`].

use std::{io, path::Path, sync::Arc};

use seawall_proto::slots::{REGISTRY_INDEX_BYTES_MAX, RegistryIndex};
use tokio::sync::Notify;

use crate::runtime::data_dir::{read_bounded, write_atomically};

/// Name of the file in the data directory: eight bytes per device. It is valid for any node of the same registry.
pub const FILE: &str = "roster.bin";

/// Requests to read the registry. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Wanted(pub(crate) Arc<Notify>);

impl Wanted {
    /// Many devices were registered, or may have been.
    pub fn ask(&self) {
        self.0.notify_one();
    }
}

/// The index that an earlier process kept; empty if there is none. An unreadable file is logged here, and ignored.
#[must_use]
pub fn load(data_dir: &Path) -> RegistryIndex {
    let path = data_dir.join(FILE);
    match read_file(&path, REGISTRY_INDEX_BYTES_MAX) {
        Ok(registry_index) => return registry_index,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "registry index not readable: devices that this node has not seen are unknown until the registry is read");
        }
    }
    RegistryIndex::empty()
}

/// Reads a file that is not longer than any registry index.
fn read_file(path: &Path, bytes_max: u64) -> io::Result<RegistryIndex> {
    RegistryIndex::from_bytes(&read_bounded(path, bytes_max)?).map_err(io::Error::other)
}

pub(crate) fn keep(data_dir: &Path, registry_index: &RegistryIndex) -> io::Result<()> {
    write_atomically(&data_dir.join(FILE), &registry_index.to_bytes(), 0o600)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use seawall_proto::{
        id::DeviceId,
        slots::{RegistryIndexBuilder, TenantTag},
        time::WallTime,
    };

    use super::*;

    const WALL: WallTime = WallTime::from_unix_ms(1_800_000_000_000);

    fn device() -> DeviceId {
        DeviceId::from_uuid(uuid::Uuid::from_u128(1))
    }

    fn registry_index() -> RegistryIndex {
        let mut builder = RegistryIndexBuilder::new([1; 16]);
        assert!(builder.add(device(), "acme"));
        builder.finish(WALL)
    }

    #[test]
    fn what_was_kept_is_read_back() {
        let home = tempfile::tempdir().unwrap();
        assert!(load(home.path()).is_empty());

        keep(home.path(), &RegistryIndex::empty()).unwrap();
        keep(home.path(), &registry_index()).unwrap();

        let loaded = load(home.path());
        assert_eq!(loaded.tenant_of(device()), Some(TenantTag::of("acme")));
        assert_eq!(loaded.as_of(), WALL);
    }

    #[test]
    fn file_that_holds_no_registry_index_counts_as_none() {
        let home = tempfile::tempdir().unwrap();
        let whole = registry_index().to_bytes();
        for content in [&[][..], b"roster", &whole[..whole.len() - 1], &[0; 4_096]] {
            fs::write(home.path().join(FILE), content).unwrap();

            assert!(load(home.path()).is_empty());
        }
    }

    #[test]
    fn file_that_is_longer_than_any_registry_index_is_not_read() {
        let home = tempfile::tempdir().unwrap();
        keep(home.path(), &registry_index()).unwrap();
        let path = home.path().join(FILE);
        let len = fs::metadata(&path).unwrap().len();

        assert_eq!(read_file(&path, len).unwrap().len(), 1);
        assert!(read_file(&path, len - 1).is_err());
    }
}
