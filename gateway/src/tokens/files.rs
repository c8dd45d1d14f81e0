//! The two files of tokens in the data directory: `admin.token`, and `tokens.json`, the copy of the database's tokens.
//! Both have mode 0600. The copy has hashes only.

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

use super::{Kept, Token};
use crate::{
    runtime::data_dir::{read_bounded, write_atomically},
    store::Role,
};

/// Maximum size of the copy, in bytes: three times [`TOKENS_MAX`](crate::store::TOKENS_MAX) tokens with the longest
/// names.
const COPY_BYTES_MAX: u64 = 1 << 20;
/// Maximum length of an admin token, in bytes: many times that of a generated one.
const ADMIN_TOKEN_BYTES_MAX: u64 = 4 << 10;
/// Random bytes of a generated secret: 256 bits.
const SECRET_BYTES: usize = 32;
/// Minimum length of an admin token, in bytes. A shorter one is an incomplete file.
const ADMIN_TOKEN_LEN_MIN: usize = 32;

/// Returns 256 random bits of the operating system, as 43 characters that need no escaping in a URL.
///
/// # Panics
/// The operating system has no random numbers. Then no secret can be generated.
#[must_use]
pub fn random_secret() -> String {
    let mut bytes = [0; SECRET_BYTES];
    OsRng
        .try_fill_bytes(&mut bytes)
        .expect("the operating system gives random numbers");
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Creates a file. Fails if it exists.
pub(super) fn make_admin_token(path: &Path) -> io::Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    let written = writeln!(file, "{}", random_secret()).and_then(|()| file.sync_all());
    if written.is_err() {
        // An incomplete token on a full disk would stop the next start. The first error is reported.
        let _ = fs::remove_file(path);
    }
    written
}

/// Reads the admin token. `Ok(None)`: there is no file, or no token in it.
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
        tracing::warn!(path = %path.display(), "admin token readable by other users: run chmod 600 on it");
    }
}

fn read_text(path: &Path, bytes_max: u64) -> io::Result<String> {
    String::from_utf8(read_bounded(path, bytes_max)?)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
}

pub(super) fn read_copy(path: &Path) -> io::Result<Kept> {
    let text = match read_text(path, COPY_BYTES_MAX) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Kept::default()),
        Err(error) => return Err(error),
    };
    // The text of the parser's error would repeat a hash.
    let copy: CopyFile = serde_json::from_str(&text).map_err(|error| {
        let problem = format!("line {}: not the expected JSON", error.line());
        io::Error::new(io::ErrorKind::InvalidData, problem)
    })?;
    Ok(Kept {
        tokens: copy.tokens.into_iter().filter_map(CopiedToken::into_token).collect(),
        revoked: copy.revoked,
    })
}

/// Writes the copy durably: after a power cut, a revoked token must not be valid again through the previous copy.
pub(super) fn write_copy(path: &Path, kept: &Kept) -> io::Result<()> {
    let copy = CopyFile {
        tokens: kept.tokens.iter().map(CopiedToken::of).collect(),
        revoked: kept.revoked.clone(),
    };
    write_atomically(path, &serde_json::to_vec(&copy)?, 0o600)
}

/// The copy. A later version may have written it: unknown fields are ignored, and a token with an unknown role permits
/// nothing. The next read of the database replaces it.
#[derive(Serialize, Deserialize)]
struct CopyFile {
    tokens: Vec<CopiedToken>,
    /// Ids of revoked tokens; earlier versions did not write them.
    #[serde(default)]
    revoked: Vec<Uuid>,
}

#[derive(Serialize, Deserialize)]
struct CopiedToken {
    id: Uuid,
    name: String,
    role: String,
    /// Hash of the token, in base64url.
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
