//! Slot tokens: a slot that the device carries itself, so that any node with the keys knows it, even after a restart.
//!
//! A token gives priority at a time, to one device. It never authenticates. 39 bytes, 52 characters of base64url:
//! `version and issuer 1 | key id 1 | issuer and slot, unix ms 6 | issued, unix s 4 | sealed 11 | MAC 16`. The issuer
//! is a tag of the node: its low four bits, and its high six bits. The sealed part is `first refusal,
//! unix s 4 | refusals 1 | tenant 6`; the tenant of an unknown device is zero. The MAC (HMAC-SHA-256, truncated) covers
//! the plain text and the device's id, which is not in the token. It is also the nonce of the seal (a synthetic nonce,
//! as in RFC 5297). Anybody can get a token for any id, and must not learn from it whether the id is registered, or its
//! tenant.
//!
//! Version 1 had all fields in clear, and a flag for a known device. Its tokens are read, and no longer issued.

use std::num::NonZeroU64;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

use crate::{
    id::DeviceId,
    keyring::{Issuer, Keyring, keyed},
    time::WallTime,
};

/// Version of the tokens that are issued, in the high half of the first byte.
const VERSION: u8 = 2;
/// Version that is still accepted: a token of the previous release is valid until its slot is past.
const VERSION_CLEAR: u8 = 1;
/// Bits of the time of a slot, in milliseconds: enough until 2109. Above them are bits of the issuer.
const SLOT_BITS: u32 = 42;
/// Bits of the issuer in the first byte.
const ISSUER_LOW_BITS: u32 = 4;
/// Flag of version 1: the device had been seen authenticated when the token was issued.
const FLAG_KNOWN: u8 = 1;
const BODY_LEN: usize = 23;
/// The sealed part of the body.
const SEALED: std::ops::Range<usize> = 12..BODY_LEN;
const MAC_LEN: usize = 16;
const TOKEN_LEN: usize = BODY_LEN + MAC_LEN;
/// Length of every slot token, in characters.
pub const TOKEN_TEXT_LEN: usize = 52;
/// Separates this MAC from others made with keys of the same root.
const MAC_DOMAIN: &[u8] = b"seawall slot 2";
/// The MAC of version 1.
const CLEAR_MAC_DOMAIN: &[u8] = b"seawall slot 1";
/// Separates the seal from all MACs.
const SEAL_DOMAIN: &[u8] = b"seawall seal 2";
/// Separates the key of [`Keyring::memory_key`] from all MACs.
const MEMORY_DOMAIN: &[u8] = b"seawall memory 1";
impl Keyring {
    /// Key of the hash maps in memory: it is secret, so that ids cannot be chosen to collide.
    pub(super) fn memory_key(&self) -> [u8; 16] {
        let (_, secret) = self.newest();
        let mut mac = keyed(secret);
        mac.update(MEMORY_DOMAIN);
        let mut key = [0; 16];
        key.copy_from_slice(&mac.finalize().into_bytes()[..16]);
        key
    }

    pub(super) fn sign_slot(&self, device: DeviceId, claims: &Claims) -> Box<str> {
        let (key_id, secret) = self.newest();
        let mut token = [0; TOKEN_LEN];
        let issuer = u64::from(self.issuer().bits());
        let [.., low] = (issuer & 0xf).to_be_bytes();
        token[0] = VERSION << 4 | low;
        token[1] = key_id;
        let slot = claims.slot.as_unix_ms() & ((1 << SLOT_BITS) - 1);
        token[2..8].copy_from_slice(&low_bytes(issuer >> ISSUER_LOW_BITS << SLOT_BITS | slot));
        token[8..12].copy_from_slice(&claims.issued_unix_s.to_be_bytes());
        token[12..16].copy_from_slice(&claims.first_unix_s.to_be_bytes());
        token[16] = claims.refusals;
        token[17..23].copy_from_slice(&low_bytes(claims.tenant.map_or(0, TenantTag::as_u64)));
        let mac = mac(secret, MAC_DOMAIN, device, &token[..BODY_LEN])
            .finalize()
            .into_bytes();
        token[BODY_LEN..].copy_from_slice(&mac[..MAC_LEN]);
        apply_seal(secret, &mut token);
        URL_SAFE_NO_PAD.encode(token).into()
    }

    /// Returns the content of the token if one of the keys signed it for this device. The caller decides whether its
    /// time is past.
    pub(super) fn verify_slot(&self, device: DeviceId, text: &str) -> Option<Claims> {
        if text.len() != TOKEN_TEXT_LEN {
            return None;
        }
        let mut token = [0; TOKEN_LEN];
        let len = URL_SAFE_NO_PAD.decode_slice(text, &mut token).ok()?;
        if len != TOKEN_LEN {
            return None;
        }
        let secret = self.secret(token[1])?;
        let domain = match token[0] >> 4 {
            VERSION => {
                apply_seal(secret, &mut token);
                MAC_DOMAIN
            }
            VERSION_CLEAR => CLEAR_MAC_DOMAIN,
            _ => return None,
        };
        mac(secret, domain, device, &token[..BODY_LEN])
            .verify_truncated_left(&token[BODY_LEN..])
            .ok()?;
        Some(if domain == MAC_DOMAIN {
            let slot = number(&token[2..8]);
            let issuer = u16::try_from(slot >> SLOT_BITS).unwrap_or_default();
            Claims {
                is_own: Issuer::from_bits(issuer << ISSUER_LOW_BITS | u16::from(token[0] & 0xf)) == self.issuer(),
                slot: WallTime::from_unix_ms(slot & ((1 << SLOT_BITS) - 1)),
                issued_unix_s: u32::from_be_bytes([token[8], token[9], token[10], token[11]]),
                first_unix_s: u32::from_be_bytes([token[12], token[13], token[14], token[15]]),
                refusals: token[16],
                tenant: TenantTag::from_u64(number(&token[17..23])),
            }
        } else {
            let known = token[0] & FLAG_KNOWN != 0;
            Claims {
                is_own: false,
                slot: WallTime::from_unix_ms(number(&token[2..8])),
                first_unix_s: u32::from_be_bytes([token[8], token[9], token[10], token[11]]),
                refusals: token[12],
                tenant: known.then(|| TenantTag::from_u64(number(&token[13..19]))).flatten(),
                issued_unix_s: u32::from_be_bytes([token[19], token[20], token[21], token[22]]),
            }
        })
    }
}

/// Seals the plain text of a token that has its MAC, or opens a sealed one.
fn apply_seal(secret: &[u8; 32], token: &mut [u8; TOKEN_LEN]) {
    let mut pad = keyed(secret);
    pad.update(SEAL_DOMAIN);
    pad.update(&token[BODY_LEN..]);
    for (byte, pad) in token[SEALED].iter_mut().zip(pad.finalize().into_bytes()) {
        *byte ^= pad;
    }
}

/// Content of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Claims {
    /// This node issued it. Signing sets it.
    pub is_own: bool,
    pub slot: WallTime,
    pub first_unix_s: u32,
    pub refusals: u8,
    /// Tenant of a known device; `None` for an unknown one.
    pub tenant: Option<TenantTag>,
    pub issued_unix_s: u32,
}

/// A tenant in six bytes: the beginning of the SHA-256 of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TenantTag(NonZeroU64);

impl TenantTag {
    #[must_use]
    pub fn of(name: &str) -> Self {
        let digest = Sha256::digest(name.as_bytes());
        Self::from_u64(number(&digest[..6])).unwrap_or(Self(NonZeroU64::MIN))
    }

    pub(super) const fn as_u64(self) -> u64 {
        self.0.get()
    }

    pub(super) fn from_u64(tag: u64) -> Option<Self> {
        NonZeroU64::new(tag).map(Self)
    }
}

fn mac(secret: &[u8; 32], domain: &[u8], device: DeviceId, body: &[u8]) -> Hmac<Sha256> {
    let mut mac = keyed(secret);
    mac.update(domain);
    mac.update(device.as_bytes());
    mac.update(body);
    mac
}

/// The six low bytes, the highest first.
fn low_bytes(number: u64) -> [u8; 6] {
    let [_, _, bytes @ ..] = number.to_be_bytes();
    bytes
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn device(n: u128) -> DeviceId {
        DeviceId::from_uuid(uuid::Uuid::from_u128(n))
    }

    fn claims() -> Claims {
        Claims {
            is_own: true,
            slot: WallTime::from_unix_ms(1_800_000_012_345),
            first_unix_s: 1_800_000_000,
            refusals: 3,
            tenant: Some(TenantTag::of("acme")),
            issued_unix_s: 1_800_000_001,
        }
    }

    #[test]
    fn token_says_what_was_signed_and_fits_a_close_reason() {
        let keys = Keyring::new(7, [1; 32]);

        let token = keys.sign_slot(device(1), &claims());

        assert_eq!(token.len(), TOKEN_TEXT_LEN);
        assert_eq!(keys.verify_slot(device(1), &token), Some(claims()));
    }

    #[test]
    fn bearer_cannot_tell_an_unknown_device_from_a_registered_one_nor_one_tenant_from_another() {
        let keys = Keyring::new(7, [1; 32]);
        let decoded = |n: u128, tenant: Option<&str>| {
            let claims = Claims {
                tenant: tenant.map(TenantTag::of),
                ..claims()
            };
            URL_SAFE_NO_PAD.decode(&*keys.sign_slot(device(n), &claims)).unwrap()
        };

        // Over many devices each bit of the sealed part is set as often as not, whatever the content.
        for tenant in [None, Some("acme"), Some("default")] {
            for at in SEALED {
                for bit in 0..8 {
                    let set = (0..256).filter(|n| decoded(*n, tenant)[at] >> bit & 1 == 1).count();
                    assert!((64..192).contains(&set), "{tenant:?} {at} {bit}: {set}");
                }
            }
        }
        // The rest is the same for all of them.
        assert_eq!(
            decoded(1, None)[..SEALED.start],
            decoded(1, Some("acme"))[..SEALED.start]
        );
        assert_eq!(
            decoded(1, Some("a"))[..SEALED.start],
            decoded(2, Some("b"))[..SEALED.start]
        );
        // Two tokens that differ only in the tenant share no pad, which would reveal the difference.
        let (one, other) = (decoded(1, None), decoded(1, Some("acme")));
        assert_ne!(
            one[SEALED.start..SEALED.start + 5],
            other[SEALED.start..SEALED.start + 5]
        );
    }

    #[test]
    fn token_of_the_previous_release_is_read() {
        let keys = Keyring::new(7, [1; 32]);
        let claims = claims();
        for tenant in [claims.tenant, None] {
            let mut token = [0; TOKEN_LEN];
            token[0] = VERSION_CLEAR << 4 | u8::from(tenant.is_some());
            token[1] = 7;
            token[2..8].copy_from_slice(&low_bytes(claims.slot.as_unix_ms()));
            token[8..12].copy_from_slice(&claims.first_unix_s.to_be_bytes());
            token[12] = claims.refusals;
            token[13..19].copy_from_slice(&low_bytes(tenant.map_or(0, TenantTag::as_u64)));
            token[19..23].copy_from_slice(&claims.issued_unix_s.to_be_bytes());
            let mac = mac(&[1; 32], CLEAR_MAC_DOMAIN, device(1), &token[..BODY_LEN])
                .finalize()
                .into_bytes();
            token[BODY_LEN..].copy_from_slice(&mac[..MAC_LEN]);

            let read = keys.verify_slot(device(1), &URL_SAFE_NO_PAD.encode(token));

            let is_own = false;
            assert_eq!(
                read,
                Some(Claims {
                    is_own,
                    tenant,
                    ..claims
                })
            );
            token[0] = VERSION << 4;
            assert_eq!(keys.verify_slot(device(1), &URL_SAFE_NO_PAD.encode(token)), None);
        }
    }

    #[test]
    fn token_of_another_device_or_key_or_with_any_changed_character_does_not_count() {
        let keys = Keyring::new(7, [1; 32]);
        let token = keys.sign_slot(device(1), &claims());

        assert_eq!(keys.verify_slot(device(2), &token), None);
        assert_eq!(Keyring::new(7, [2; 32]).verify_slot(device(1), &token), None);
        assert_eq!(Keyring::new(8, [1; 32]).verify_slot(device(1), &token), None);
        for at in 0..token.len() {
            let mut forged = token.as_bytes().to_vec();
            forged[at] = if forged[at] == b'A' { b'B' } else { b'A' };
            assert_eq!(keys.verify_slot(device(1), std::str::from_utf8(&forged).unwrap()), None);
        }
        for text in ["", "x", &"=".repeat(52), &"\u{e9}".repeat(26), &token[..51]] {
            assert_eq!(keys.verify_slot(device(1), text), None);
        }
    }

    proptest! {
        #[test]
        fn no_text_but_the_token_itself_counts(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<char>(), 0_u8..3), 1..4),
        ) {
            let keys = Keyring::new(7, [1; 32]);
            let token = keys.sign_slot(device(1), &claims());
            let mut forged: Vec<char> = token.chars().collect();
            for (at, character, way) in changes {
                let at = at.index(forged.len() + 1);
                match way {
                    0 => forged.insert(at, character),
                    1 if at < forged.len() => forged[at] = character,
                    _ => drop(forged.drain(at..)),
                }
            }
            let forged: String = forged.into_iter().collect();

            prop_assert_eq!(keys.verify_slot(device(1), &forged).is_some(), *forged == *token, "{}", forged);
        }
    }

    #[test]
    fn node_tells_its_own_tokens_by_its_name_and_accepts_those_of_others() {
        let keys = Keyring::new(7, [1; 32]);
        let is_own = |signer: &str, reader: &str| {
            let token = keys.clone().with_issuer(signer).sign_slot(device(1), &claims());
            let read = keys.clone().with_issuer(reader).verify_slot(device(1), &token).unwrap();
            assert_eq!(Claims { is_own: true, ..read }, claims());
            read.is_own
        };

        for name in ["a", "gw-1", "gw-2", "x.example"] {
            assert!(is_own(name, name), "{name}");
        }
        assert!(!is_own("gw-1", "gw-2") && !is_own("gw-2", "gw-1"));
    }

    #[test]
    fn rotated_keys_accept_older_tokens() {
        let token = Keyring::new(1, [1; 32]).sign_slot(device(1), &claims());
        let rotated = Keyring::new(2, [2; 32]).with_older(1, [1; 32]);

        assert_eq!(rotated.verify_slot(device(1), &token), Some(claims()));
    }
}
