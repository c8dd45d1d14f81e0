//! The node's tag and the time up to which it may have given session ids, in `session-ids.json` of the data directory.
//!
//! Nothing depends on the file unless the clock is set back between two starts: then ids of the later start would be
//! older without it.

use std::{io, path::Path};

use seawall_proto::{
    epoch::{NodeTag, SessionIds},
    time::WallTime,
};
use serde::{Deserialize, Serialize};

use crate::runtime::data_dir::{read_bounded, write_atomically};

/// The file, in the data directory.
const FILE: &str = "session-ids.json";
/// Maximum length of the file that is read, many times what is written.
const BYTES_MAX: u64 = 4 << 10;

#[derive(Serialize, Deserialize)]
struct Stored {
    node: u16,
    /// Milliseconds of the Unix epoch.
    until_ms: u64,
}

/// Ids above all that this node gave before. Where the file is missing, damaged or years ahead, it draws another tag.
#[must_use]
pub fn load(data_dir: &Path, wall: WallTime) -> SessionIds {
    let path = data_dir.join(FILE);
    let stored = read_bounded(&path, BYTES_MAX)
        .and_then(|bytes| serde_json::from_slice::<Stored>(&bytes).map_err(io::Error::other));
    match stored {
        Ok(Stored { node, until_ms }) if SessionIds::is_usable(WallTime::from_unix_ms(until_ms), wall) => {
            SessionIds::new(NodeTag(node), Some(WallTime::from_unix_ms(until_ms)))
        }
        Ok(_) => {
            tracing::warn!(path = %path.display(), "the clock was far ahead when session-ids.json was written: drawing another node tag");
            SessionIds::new(NodeTag(rand::random()), None)
        }
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(path = %path.display(), %error, "ignoring unreadable session-ids.json: drawing another node tag");
            }
            SessionIds::new(NodeTag(rand::random()), None)
        }
    }
}

/// Stores `until` as the mark for the next start.
///
/// # Errors
/// The file can't be written.
pub fn save(data_dir: &Path, node: NodeTag, until: WallTime) -> io::Result<()> {
    let stored = Stored {
        node: node.0,
        until_ms: until.as_unix_ms(),
    };
    let mut text = serde_json::to_vec(&stored)?;
    text.push(b'\n');
    write_atomically(&data_dir.join(FILE), &text, 0o644)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOON: WallTime = WallTime::from_unix_ms(1_796_000_000_000);

    #[test]
    fn sessions_of_a_later_start_are_newer_although_the_clock_was_set_back() {
        let home = tempfile::tempdir().unwrap();
        let mut before = load(home.path(), NOON);
        let last = before.next(NOON);
        save(home.path(), before.node(), before.mark_due(NOON).unwrap()).unwrap();

        let hour_before = WallTime::from_unix_ms(NOON.as_unix_ms() - 3_600_000);
        let mut after = load(home.path(), hour_before);

        assert_eq!(after.node(), before.node());
        assert!(after.next(hour_before) > last);
    }

    #[test]
    fn a_damaged_file_costs_the_tag_only() {
        let home = tempfile::tempdir().unwrap();
        let years_ahead = r#"{"node":1,"until_ms":4102444800000}"#;
        for content in [
            "",
            "{",
            "[]",
            r#"{"node":70000,"until_ms":1}"#,
            r#"{"node":1}"#,
            years_ahead,
        ] {
            std::fs::write(home.path().join(FILE), content).unwrap();

            let mut ids = load(home.path(), NOON);

            assert_eq!(seawall_proto::epoch::time_of(ids.next(NOON)), NOON, "{content}");
        }
    }
}
