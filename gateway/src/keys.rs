//! The keys that this node signs with, in `keys.json` of the data directory: made at the first start, readable by the owner only.
//!
//! Nodes that share the file accept each other's slot tokens. To change a key, put a new one with another id before the old
//! one and restart: tokens of the old one stay good for as long as it is in the file.

use std::{fmt, fs, io, path::Path};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use rand::{TryRngCore, rngs::OsRng};
use seawall_proto::slots::SlotKeys;
use serde::{Deserialize, Serialize};

use crate::data_dir::write_atomically;

/// The file, in the data directory.
const FILE: &str = "keys.json";
/// Most keys in the file: the newest and three older ones.
const KEYS_MAX: usize = 4;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    /// Newest first.
    slots: Vec<Key>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Key {
    /// In every token, so that nodes know which key signed it.
    id: u8,
    /// 32 bytes as base64url.
    secret: String,
}

/// The keys can't be read or made.
#[derive(Debug, thiserror::Error)]
#[error("the keys in {path} can't be used: {source}")]
pub struct KeysError {
    path: String,
    source: io::Error,
}

/// Reads the keys of a data directory; makes them where there are none.
///
/// # Errors
/// The file can't be read or made, or isn't a list of one to four keys with ids of their own.
pub fn open(data_dir: &Path) -> Result<SlotKeys, KeysError> {
    let path = data_dir.join(FILE);
    let keys = match fs::read(&path) {
        Ok(bytes) => parse(&bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(&path),
        Err(error) => Err(error),
    };
    keys.map_err(|source| KeysError {
        path: path.display().to_string(),
        source,
    })
}

fn make(path: &Path) -> io::Result<SlotKeys> {
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
    Ok(SlotKeys::new(1, secret))
}

fn parse(bytes: &[u8]) -> io::Result<SlotKeys> {
    let file: KeyFile = serde_json::from_slice(bytes).map_err(damaged)?;
    let mut keys = Vec::with_capacity(file.slots.len());
    for key in &file.slots {
        let secret = URL_SAFE_NO_PAD.decode(&key.secret).map_err(damaged)?;
        let secret: [u8; 32] = secret.try_into().map_err(|_| damaged("a key has 32 bytes"))?;
        if keys.iter().any(|(id, _)| *id == key.id) {
            return Err(damaged("two keys have one id"));
        }
        keys.push((key.id, secret));
    }
    match keys.as_slice() {
        [(id, secret), older @ ..] if older.len() < KEYS_MAX => {
            // The one given first is the first to be forgotten.
            Ok(older
                .iter()
                .rev()
                .fold(SlotKeys::new(*id, *secret), |keys, (id, secret)| {
                    keys.with_older(*id, *secret)
                }))
        }
        _ => Err(damaged("there are one to four keys")),
    }
}

fn damaged(problem: impl fmt::Display) -> io::Error {
    io::Error::other(format!(
        "{problem}; restore the file, or delete it: devices then lose the slots they hold, nothing else"
    ))
}

#[cfg(test)]
mod tests {
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
