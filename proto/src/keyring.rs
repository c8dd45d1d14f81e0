//! The secret keys that tokens are signed with.

use std::fmt;

use hmac::{Hmac, KeyInit};
use sha2::{Digest, Sha256};

/// Maximum number of older keys that are accepted.
const OLDER_MAX: usize = 3;

/// The newest key, and older ones that are still accepted. Each purpose derives its own keys or MACs from them. Nodes
/// that share a keyring accept each other's tokens.
#[derive(Clone)]
pub struct Keyring {
    newest: (u8, [u8; 32]),
    older: Vec<(u8, [u8; 32])>,
    issuer: Issuer,
}

/// The node that signs, in ten bits: a part of the hash of its name. By it a node tells its own tokens, whose times are
/// of its own clock, from those of others. One name in 1,024 has the same tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Issuer(u16);

impl Issuer {
    const MASK: u16 = 0x3ff;

    fn of(name: &str) -> Self {
        let digest = Sha256::digest(name.as_bytes());
        Self(u16::from_be_bytes([digest[0], digest[1]]) & Self::MASK)
    }

    pub const fn from_bits(bits: u16) -> Self {
        Self(bits & Self::MASK)
    }

    pub const fn bits(self) -> u16 {
        self.0
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyring")
            .field("newest_id", &self.newest.0)
            .finish_non_exhaustive()
    }
}

impl Keyring {
    /// Creates a keyring of a single key. `id` is in every token signed with it.
    #[must_use]
    pub const fn new(id: u8, secret: [u8; 32]) -> Self {
        Self {
            newest: (id, secret),
            older: Vec::new(),
            issuer: Issuer(0),
        }
    }

    /// Accepts tokens signed with an older key as well. Beyond three, the one added first is removed.
    #[must_use]
    pub fn with_older(mut self, id: u8, secret: [u8; 32]) -> Self {
        if self.older.len() == OLDER_MAX {
            self.older.remove(0);
        }
        self.older.push((id, secret));
        self
    }

    /// Sets the name of the node that signs.
    #[must_use]
    pub fn with_issuer(self, name: &str) -> Self {
        Self {
            issuer: Issuer::of(name),
            ..self
        }
    }

    pub(crate) const fn issuer(&self) -> Issuer {
        self.issuer
    }

    pub(crate) const fn newest(&self) -> (u8, &[u8; 32]) {
        (self.newest.0, &self.newest.1)
    }

    pub(crate) fn secret(&self, id: u8) -> Option<&[u8; 32]> {
        let mut all = std::iter::once(&self.newest).chain(&self.older);
        all.find(|(known, _)| *known == id).map(|(_, secret)| secret)
    }
}

pub(crate) fn keyed(secret: &[u8; 32]) -> Hmac<Sha256> {
    Hmac::<Sha256>::new_from_slice(secret).expect("HMAC takes keys of any length")
}
