//! The two files of tokens in the data directory: `admin.token`, and `tokens.json`, the copy of what the database has.
//! Both are mode 0600; the copy holds hashes only.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rand::{TryRngCore as _, rngs::OsRng};
use seawall_proto::id::SecretHash;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Token;
use crate::{
    data_dir::{read_bounded, write_atomically},
    store::Role,
};

/// Greatest copy that is read: [`TOKENS_MAX`](crate::store::TOKENS_MAX) tokens with the longest names need a third of it.
const COPY_BYTES_MAX: u64 = 1 << 20;
/// Longest admin token that is read, many times the longest that is made.
const ADMIN_TOKEN_BYTES_MAX: u64 = 4 << 10;
/// Bytes of chance in a secret of ours: 256 bits.
const SECRET_BYTES: usize = 32;
/// Shortest admin token that is believed: a shorter one is a half-written file.
const ADMIN_TOKEN_LEN_MIN: usize = 32;

/// 256 bits from the operating system, as 43 characters that need no escaping in a URL.
///
/// # Panics
/// The operating system has no random numbers to give; then no secret can be made at all.
#[must_use]
pub fn random_secret() -> String {
    let mut bytes = [0; SECRET_BYTES];
    OsRng
        .try_fill_bytes(&mut bytes)
        .expect("the operating system gives random numbers");
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Fails where the file is there already.
pub(super) fn make_admin_token(path: &Path) -> io::Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    let written = writeln!(file, "{}", random_secret()).and_then(|()| file.sync_all());
    if written.is_err() {
        // Half a token on a full disk would stop the next start. The first error is the one to tell.
        let _ = fs::remove_file(path);
    }
    written
}

/// `Ok(None)`: there is no file, or no token in it.
pub(super) fn read_admin_token(path: &Path) -> io::Result<Option<SecretHash>> {
    match read_text(path, ADMIN_TOKEN_BYTES_MAX) {
        Ok(text) => {
            let token = text.trim();
            Ok((token.len() >= ADMIN_TOKEN_LEN_MIN).then(|| SecretHash::of(token.as_bytes())))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn warn_if_open_to_others(path: &Path) {
    if let Ok(metadata) = fs::metadata(path)
        && metadata.permissions().mode() & 0o077 != 0
    {
        tracing::warn!(path = %path.display(), "the admin token can be read by other users: run chmod 600 on it");
    }
}

fn read_text(path: &Path, bytes_max: u64) -> io::Result<String> {
    String::from_utf8(read_bounded(path, bytes_max)?)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
}

pub(super) fn read_copy(path: &Path) -> io::Result<Vec<Token>> {
    let text = match read_text(path, COPY_BYTES_MAX) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    // The text of the parser's error would repeat a hash.
    let copy: CopyFile = serde_json::from_str(&text).map_err(|error| {
        let problem = format!("line {}: not the JSON that is expected", error.line());
        io::Error::new(io::ErrorKind::InvalidData, problem)
    })?;
    Ok(copy.tokens.into_iter().filter_map(CopiedToken::into_token).collect())
}

/// A revoked token must not come back with the copy of before, whenever the power fails.
pub(super) fn write_copy(path: &Path, tokens: &[Token]) -> io::Result<()> {
    let copy = CopyFile {
        tokens: tokens.iter().map(CopiedToken::of).collect(),
    };
    write_atomically(path, &serde_json::to_vec(&copy)?, 0o600)
}

/// A later version may have written it: unknown fields are ignored, and a token whose role is unknown opens nothing. The next
/// reading of the database brings all of them again.
#[derive(Serialize, Deserialize)]
struct CopyFile {
    tokens: Vec<CopiedToken>,
}

#[derive(Serialize, Deserialize)]
struct CopiedToken {
    id: Uuid,
    name: String,
    role: String,
    /// Of the token, base64url.
    sha256: String,
}

impl CopiedToken {
    fn of(token: &Token) -> Self {
        Self {
            id: token.id,
            name: token.name.to_string(),
            role: token.role.as_str().to_owned(),
            sha256: URL_SAFE_NO_PAD.encode(token.hash.as_bytes()),
        }
    }

    fn into_token(self) -> Option<Token> {
        let bytes = URL_SAFE_NO_PAD.decode(self.sha256).ok()?;
        Some(Token {
            id: self.id,
            name: self.name.into(),
            role: Role::parse(&self.role)?,
            hash: SecretHash::from_bytes(bytes.try_into().ok()?),
        })
    }
}
