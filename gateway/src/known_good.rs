//! The capacity of the database as measured by an earlier life of this node, in `known-good.json` of the data directory: slots go by it
//! until this life has measured its own.
//!
//! Nothing depends on the file. One that is missing, damaged or can't be written costs devices an attempt more in the first storm.

use std::{io, path::Path, time::Duration};

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::{
    data_dir::{read_bounded, write_atomically},
    state::Shared,
};

/// The file, in the data directory.
pub const FILE: &str = "known-good.json";
/// How often what was measured is kept. overload.md section 1.
const KEEP_INTERVAL: Duration = Duration::from_secs(60);
/// Longest file that is read, many times what is written.
const BYTES_MAX: u64 = 4 << 10;
/// Greatest rate believed, in keys a second: the greatest that can be configured.
const RATE_MAX: f64 = 1e6;

#[derive(Serialize, Deserialize)]
struct KnownGood {
    /// The best rate at which the database answered keys while devices waited.
    keys_per_second: f64,
}

/// The rate that was kept, in keys a second; `None` where none was. What can't be read is logged here, and counts as none.
#[must_use]
pub fn load(data_dir: &Path) -> Option<f64> {
    let path = data_dir.join(FILE);
    match read(&path) {
        Ok(rate) => Some(rate),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(path = %path.display(), error = %error, "the capacity measured earlier can't be read: starting without");
            None
        }
    }
}

fn read(path: &Path) -> io::Result<f64> {
    let kept: KnownGood = serde_json::from_slice(&read_bounded(path, BYTES_MAX)?).map_err(io::Error::other)?;
    if kept.keys_per_second > 0.0 && kept.keys_per_second <= RATE_MAX {
        Ok(kept.keys_per_second)
    } else {
        Err(io::Error::other(format!("{} is no rate", kept.keys_per_second)))
    }
}

fn save(data_dir: &Path, keys_per_second: f64) -> io::Result<()> {
    let mut text = serde_json::to_vec(&KnownGood { keys_per_second }).map_err(io::Error::other)?;
    text.push(b'\n');
    write_atomically(&data_dir.join(FILE), &text, 0o644)
}

/// Keeps what is measured, each minute in which something was, and once more at `stop`.
pub async fn keep(state: Shared, stop: CancellationToken) {
    let mut is_failing = false;
    loop {
        let is_last = tokio::time::timeout(KEEP_INTERVAL, stop.cancelled()).await.is_ok();
        if let Some(rate) = state.gate.take_last_known_good() {
            let data_dir = state.config.server.data_dir.clone();
            let saved = tokio::task::spawn_blocking(move || save(&data_dir, rate)).await;
            let saved = saved.unwrap_or_else(|panicked| Err(io::Error::other(panicked)));
            if let Err(error) = &saved
                && !is_failing
            {
                tracing::warn!(error = %error, "the capacity measured can't be kept on disk");
            }
            is_failing = saved.is_err();
        }
        if is_last {
            return;
        }
    }
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
