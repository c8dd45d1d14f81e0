//! Resume tokens: layout, MAC and keys.
//!
//! `version 1 | root id 1 | epoch 1 | flags 1 | issued, unix s 4 | expires, unix s 4 | device 16 | session 8 |
//! generation 4 | tenant's length 1 and name | model's length 1 and name | MAC 16`, all of it in base64url. Tenant and
//! model are included because rules match on them. The MAC (HMAC-SHA-256, truncated) also covers the hash of the
//! credential, which is not in the token. Before the MAC is verified, only the first three bytes are read. They select
//! the key.
//!
//! Keys rotate on their own: each [`EPOCH`] has its own, derived from a root. Nodes that share the root need no other
//! coordination.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, Mac};
use sha2::Sha256;

use super::{AHEAD_MAX, Generation};
use crate::{
    id::{DeviceId, Label, SecretHash, SessionId},
    keyring::{Keyring, keyed},
    time::WallTime,
};

/// Time for which a key signs. It is accepted for as long again, which exceeds any token's validity and grace.
pub const EPOCH: Duration = Duration::from_hours(7 * 24);

const VERSION: u8 = 1;
/// The token ends with a credential that was replaced, and has no grace.
const FLAG_FINAL: u8 = 1;
/// Length of the part before the names.
const HEAD_LEN: usize = 40;
const MAC_LEN: usize = 16;
const TOKEN_LEN_MIN: usize = HEAD_LEN + 2 + MAC_LEN;
const TOKEN_LEN_MAX: usize = TOKEN_LEN_MIN + 2 * Label::LEN_MAX;
/// Maximum length of a token, in characters.
pub const TOKEN_TEXT_LEN_MAX: usize = TOKEN_LEN_MAX.div_ceil(3) * 4;
/// Separates the keys from others derived from the same root.
const KEY_PURPOSE: &[u8] = b"seawall resume key 1";
const MAC_DOMAIN: &[u8] = b"seawall resume 1";
/// Content of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claims {
    pub device: DeviceId,
    pub issued: WallTime,
    pub expires: WallTime,
    pub is_final: bool,
    pub session: SessionId,
    pub generation: Generation,
    pub tenant: Label,
    pub model: Option<Label>,
}

impl Keyring {
    /// Signs with the key of the current epoch.
    pub(super) fn sign_resume(&self, credential: &SecretHash, claims: &Claims, wall: WallTime) -> Box<str> {
        let (root_id, secret) = self.newest();
        let epoch = epoch(wall);
        let mut token = Vec::with_capacity(TOKEN_LEN_MAX);
        token.extend_from_slice(&[VERSION, root_id, low_byte(epoch)]);
        token.push(if claims.is_final { FLAG_FINAL } else { 0 });
        token.extend_from_slice(&seconds(claims.issued).to_be_bytes());
        token.extend_from_slice(&seconds(claims.expires).to_be_bytes());
        token.extend_from_slice(claims.device.as_bytes());
        token.extend_from_slice(&claims.session.0.to_be_bytes());
        token.extend_from_slice(&claims.generation.0.to_be_bytes());
        for name in [Some(&claims.tenant), claims.model.as_ref()] {
            let name = name.map_or("", |label| label.as_str());
            // At most `Label::LEN_MAX`.
            token.push(u8::try_from(name.len()).unwrap_or_default());
            token.extend_from_slice(name.as_bytes());
        }
        let mac = mac(secret, epoch, credential, &token).finalize().into_bytes();
        token.extend_from_slice(&mac[..MAC_LEN]);
        URL_SAFE_NO_PAD.encode(token).into()
    }

    /// Returns the content of the token if one of the keys signed it for this credential. The caller decides whether it
    /// is still valid.
    pub(super) fn verify_resume(&self, credential: &SecretHash, text: &str, wall: WallTime) -> Option<Claims> {
        if text.len() > TOKEN_TEXT_LEN_MAX {
            return None;
        }
        let mut buffer = [0; TOKEN_TEXT_LEN_MAX];
        let len = URL_SAFE_NO_PAD.decode_slice(text, &mut buffer).ok()?;
        let token = buffer.get(..len)?;
        let (body, presented) = token.split_at_checked(len.checked_sub(MAC_LEN)?)?;
        let [version, root_id, epoch_byte, ..] = *body else {
            return None;
        };
        if version != VERSION || body.len() < HEAD_LEN {
            return None;
        }
        let secret = self.secret(root_id)?;
        let epoch = accepted(wall)
            .into_iter()
            .find(|epoch| low_byte(*epoch) == epoch_byte)?;
        mac(secret, epoch, credential, body)
            .verify_truncated_left(presented)
            .ok()?;
        parse(body)
    }
}

/// Parses a body whose MAC is valid.
fn parse(body: &[u8]) -> Option<Claims> {
    let (head, names) = body.split_at_checked(HEAD_LEN)?;
    let (tenant, rest) = name(names)?;
    let (model, rest) = name(rest)?;
    let device: [u8; 16] = head.get(12..28)?.try_into().ok()?;
    rest.is_empty().then_some(())?;
    Some(Claims {
        device: DeviceId::from_uuid(uuid::Uuid::from_bytes(device)),
        issued: from_seconds(u32::from_be_bytes(head.get(4..8)?.try_into().ok()?)),
        expires: from_seconds(u32::from_be_bytes(head.get(8..12)?.try_into().ok()?)),
        is_final: head.get(3)? & FLAG_FINAL != 0,
        session: SessionId(u64::from_be_bytes(head.get(28..36)?.try_into().ok()?)),
        generation: Generation(u32::from_be_bytes(head.get(36..40)?.try_into().ok()?)),
        tenant: tenant?,
        model,
    })
}

/// Parses a name. Returns it with the remaining bytes.
fn name(bytes: &[u8]) -> Option<(Option<Label>, &[u8])> {
    let (len, rest) = bytes.split_first()?;
    let (name, rest) = rest.split_at_checked(usize::from(*len))?;
    let label = Label::parse(std::str::from_utf8(name).ok()?).ok()?;
    Some((label, rest))
}

fn mac(root: &[u8; 32], epoch: u64, credential: &SecretHash, body: &[u8]) -> Hmac<Sha256> {
    let mut derive = keyed(root);
    derive.update(KEY_PURPOSE);
    derive.update(&epoch.to_be_bytes());
    let mut mac = keyed(&derive.finalize().into_bytes().into());
    mac.update(MAC_DOMAIN);
    mac.update(credential.as_bytes());
    mac.update(body);
    mac
}

/// The epochs whose keys are accepted: the current and the previous one, and the next one because another node's clock
/// may be ahead.
fn accepted(wall: WallTime) -> [u64; 3] {
    let now = epoch(wall);
    [now, now.saturating_sub(1), epoch(wall + AHEAD_MAX)]
}

fn epoch(wall: WallTime) -> u64 {
    wall.as_unix_ms() / 1_000 / EPOCH.as_secs()
}

fn low_byte(epoch: u64) -> u8 {
    let [.., low] = epoch.to_be_bytes();
    low
}

/// Rounded down. The times of a token saturate in 2106.
fn seconds(wall: WallTime) -> u32 {
    u32::try_from(wall.as_unix_ms() / 1_000).unwrap_or(u32::MAX)
}

fn from_seconds(seconds: u32) -> WallTime {
    WallTime::from_unix_ms(u64::from(seconds) * 1_000)
}
