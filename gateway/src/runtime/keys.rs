//! The secrets from which this node's keys are derived, in `keys.json` of the data directory. The file is created at
//! the first start, readable by its owner only.
//!
//! Nodes that share the file accept each other's slot and resume tokens. Each purpose has its own keys, derived from
//! the same secrets; those of resume tokens rotate weekly on their own. To change a secret, put a new one with another
//! id before the old one and restart. Tokens of the old one stay valid while it is in the file.

use std::{fmt, io, path::Path};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use rand::{TryRngCore, rngs::OsRng};
use seawall_proto::{resume::ResumeKeys, slots::SlotKeys};
use serde::{Deserialize, Serialize};

use crate::runtime::data_dir::{read_bounded, write_atomically};

/// Name of the file in the data directory.
const FILE: &str = "keys.json";
/// Maximum length of the file, many times that of four keys, in bytes.
const BYTES_MAX: u64 = 64 << 10;
/// Maximum number of keys in the file: the newest and three older ones.
const KEYS_MAX: usize = 4;

/// Fields of later versions are ignored, and stay in the file, which is not rewritten.
#[derive(Serialize, Deserialize)]
struct KeyFile {
    /// Newest first. Named after their first purpose.
    slots: Vec<Key>,
}

#[derive(Serialize, Deserialize)]
struct Key {
    /// Included in every token, to identify the key that signed it.
    id: u8,
    /// 32 bytes as base64url.
    secret: String,
}

/// The keys of this node.
#[derive(Debug)]
pub struct Keys {
    pub slots: SlotKeys,
    pub resume: ResumeKeys,
}

/// The keys cannot be read or created.
#[derive(Debug, thiserror::Error)]
#[error("the keys in {path} can't be used: {source}")]
pub struct KeysError {
    path: String,
    source: io::Error,
}

/// Reads the keys of a data directory. Creates them if there are none.
///
/// # Errors
/// The file cannot be read or created, or is not a list of one to four keys with distinct ids.
pub fn open(data_dir: &Path) -> Result<Keys, KeysError> {
    let path = data_dir.join(FILE);
    let keys = match read_bounded(&path, BYTES_MAX) {
        Ok(bytes) => parse(&bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(&path),
        Err(error) => Err(error),
    };
    keys.map_err(|source| KeysError {
        path: path.display().to_string(),
        source,
    })
}

/// Whether a gateway has started in this directory before.
#[must_use]
pub fn are_in(data_dir: &Path) -> bool {
    data_dir.join(FILE).exists()
}

impl Keys {
    fn of((id, secret): (u8, [u8; 32]), older: &[(u8, [u8; 32])]) -> Self {
        let newest = Self {
            slots: SlotKeys::new(id, secret),
            resume: ResumeKeys::new(id, secret),
        };
        // The keyring forgets the one that was added first.
        older.iter().rev().fold(newest, |keys, (id, secret)| Self {
            slots: keys.slots.with_older(*id, *secret),
            resume: keys.resume.with_older(*id, *secret),
        })
    }
}

fn make(path: &Path) -> io::Result<Keys> {
    let mut secret = [0; 32];
    OsRng.try_fill_bytes(&mut secret).map_err(io::Error::other)?;
    let file = KeyFile {
        slots: vec![Key {
            id: 1,
            secret: URL_SAFE_NO_PAD.encode(secret),
        }],
    };
    let mut text = serde_json::to_vec(&file).map_err(io::Error::other)?;
    text.push(b'\n');
    write_atomically(path, &text, 0o600)?;
    Ok(Keys::of((1, secret), &[]))
}

fn parse(bytes: &[u8]) -> io::Result<Keys> {
    // The text of the parser's error would repeat the secret.
    let file: KeyFile = serde_json::from_slice(bytes)
        .map_err(|error| damaged(format_args!("line {}: not the JSON that is expected", error.line())))?;
    let mut keys = Vec::with_capacity(file.slots.len());
    for key in &file.slots {
        let secret = URL_SAFE_NO_PAD
            .decode(&key.secret)
            .map_err(|_| damaged("a secret is not base64url without padding"))?;
        let secret: [u8; 32] = secret.try_into().map_err(|_| damaged("a key has 32 bytes"))?;
        if keys.iter().any(|(id, _)| *id == key.id) {
            return Err(damaged("two keys have one id"));
        }
        keys.push((key.id, secret));
    }
    match keys.as_slice() {
        [(id, secret), older @ ..] if older.len() < KEYS_MAX => Ok(Keys::of((*id, *secret), older)),
        _ => Err(damaged("there are one to four keys")),
    }
}

fn damaged(problem: impl fmt::Display) -> io::Error {
    io::Error::other(format!(
        "{problem}; restore the file, or delete it: devices then lose the slots they hold, and are looked up when they return"
    ))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn keys_are_made_once_and_for_the_owner_only() {
        let home = tempfile::tempdir().unwrap();

        open(home.path()).unwrap();
        let made = fs::read(home.path().join(FILE)).unwrap();
        open(home.path()).unwrap();

        assert_eq!(fs::read(home.path().join(FILE)).unwrap(), made);
        assert_eq!(
            fs::metadata(home.path().join(FILE)).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn keys_with_fields_of_a_later_version_are_taken_and_stay_as_they_are() {
        let secret = URL_SAFE_NO_PAD.encode([7; 32]);
        let text = format!(r#"{{"slots":[{{"id":1,"secret":"{secret}","made_at":5}}],"cluster":{{"id":1}}}}"#);
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join(FILE), &text).unwrap();

        open(home.path()).unwrap();

        assert_eq!(fs::read_to_string(home.path().join(FILE)).unwrap(), text);
    }

    #[test]
    fn damaged_keys_are_refused_with_advice() {
        let secret = URL_SAFE_NO_PAD.encode([7; 32]);
        let twice = format!(r#"{{"slots":[{{"id":1,"secret":"{secret}"}},{{"id":1,"secret":"{secret}"}}]}}"#);
        for text in [
            "",
            "{}",
            r#"{"slots":[]}"#,
            r#"{"slots":[{"id":1,"secret":"short"}]}"#,
            &twice,
        ] {
            let home = tempfile::tempdir().unwrap();
            fs::write(home.path().join(FILE), text).unwrap();

            let error = open(home.path()).unwrap_err();

            assert!(error.to_string().contains("delete it"), "{error}");
        }
    }
}
