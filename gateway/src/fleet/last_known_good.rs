//! The capacity of the database as measured by an earlier process of this node, in `known-good.json` of the data
//! directory. Slots are issued at this rate until this process has measured its own.
//!
//! Nothing depends on the file. If it is missing, damaged or cannot be written, devices need one more attempt in the
//! first storm.

use std::{io, path::Path};

use serde::{Deserialize, Serialize};

use crate::runtime::data_dir::{read_bounded, write_atomically};

/// Name of the file in the data directory.
pub const FILE: &str = "known-good.json";
/// Maximum length of the file, many times the usual one, in bytes.
const BYTES_MAX: u64 = 4 << 10;
/// Maximum accepted rate, in keys per second: the maximum that can be configured.
const RATE_MAX: f64 = 1e6;

#[derive(Serialize, Deserialize)]
struct LastKnownGood {
    /// The best rate at which the database answered keys while devices waited.
    keys_per_second: f64,
}

/// Reads the rate, in keys per second; `None` if there is none. A file that cannot be read is logged, and ignored.
#[must_use]
pub fn load(data_dir: &Path) -> Option<f64> {
    let path = data_dir.join(FILE);
    match read(&path) {
        Ok(rate) => Some(rate),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(path = %path.display(), error = %error, "measured capacity on disk not readable: ignored");
            None
        }
    }
}

fn read(path: &Path) -> io::Result<f64> {
    let kept: LastKnownGood = serde_json::from_slice(&read_bounded(path, BYTES_MAX)?).map_err(io::Error::other)?;
    if kept.keys_per_second > 0.0 && kept.keys_per_second <= RATE_MAX {
        Ok(kept.keys_per_second)
    } else {
        Err(io::Error::other(format!("{} is not a rate", kept.keys_per_second)))
    }
}

pub(crate) fn save(data_dir: &Path, keys_per_second: f64) -> io::Result<()> {
    let mut text = serde_json::to_vec(&LastKnownGood { keys_per_second }).map_err(io::Error::other)?;
    text.push(b'\n');
    write_atomically(&data_dir.join(FILE), &text, 0o644)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_was_kept_is_read_back() {
        let home = tempfile::tempdir().unwrap();
        assert_eq!(load(home.path()), None);

        save(home.path(), 2_000.5).unwrap();
        save(home.path(), 1_500.0).unwrap();

        assert_eq!(load(home.path()), Some(1_500.0));
    }

    #[test]
    fn file_that_holds_no_rate_counts_as_none() {
        let home = tempfile::tempdir().unwrap();
        for content in [
            "",
            "{",
            "[]",
            "{\"keys_per_second\":-1}",
            "{\"keys_per_second\":0}",
            "{\"keys_per_second\":null}",
            "{\"keys_per_second\":1e300}",
        ] {
            fs::write(home.path().join(FILE), content).unwrap();
            assert_eq!(load(home.path()), None, "{content}");
        }
    }
}
