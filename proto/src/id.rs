//! Names of things that the outside hands us: devices, rules, sessions, tenants, texts. Parsed once, at the edge.

use std::{fmt, net::IpAddr, num::NonZeroU32, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use uuid::Uuid;

/// A device's identity: any UUID, whatever its version. Written in lower case with dashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct DeviceId(Uuid);

impl DeviceId {
    #[must_use]
    pub const fn from_uuid(uuid: Uuid) -> Self {
        Self(uuid)
    }

    #[must_use]
    pub const fn as_uuid(self) -> Uuid {
        self.0
    }

    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }
}

/// Any letter case, with all four dashes or none; no braces, no `urn:`.
impl FromStr for DeviceId {
    type Err = InvalidDeviceId;

    fn from_str(text: &str) -> Result<Self, InvalidDeviceId> {
        if !matches!(text.len(), 32 | 36) {
            return Err(InvalidDeviceId);
        }
        Uuid::try_parse(text).map(Self).map_err(|_| InvalidDeviceId)
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

impl<'de> Deserialize<'de> for DeviceId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The text is not a UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a UUID: expected 32 hexadecimal digits, with dashes as 8-4-4-4-12 or without")]
pub struct InvalidDeviceId;

/// A firmware rule's identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RuleId(pub Uuid);

impl fmt::Display for RuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

/// One WebSocket session. Its counter is also the epoch that fences it: of two sessions of a device, the greater is the newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// SHA-256 of a credential. Secrets of ours are 256 random bits, so that a plain hash is as strong as a slow one.
#[derive(Clone, Copy)]
pub struct SecretHash([u8; 32]);

impl SecretHash {
    #[must_use]
    pub fn of(secret: &[u8]) -> Self {
        Self(Sha256::digest(secret).into())
    }

    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// In constant time.
impl PartialEq for SecretHash {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for SecretHash {}

impl fmt::Debug for SecretHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretHash(..)")
    }
}

/// How a device proves who it is. Neither is kept as it was shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credential {
    /// A secret: the registry has its hash.
    Secret(SecretHash),
    /// A client certificate that names the device, and that TLS has verified; its hash.
    Certificate(SecretHash),
}

/// The first 4 bytes of a secret's hash, for a session to keep: enough to see that its secret was replaced, and no proof of anything. Nothing of
/// a certificate, which does not depend on the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CredentialTag(Option<NonZeroU32>);

impl CredentialTag {
    /// Whether it is of this secret, or of a certificate.
    #[must_use]
    pub fn may_be(self, secret: &SecretHash) -> bool {
        self.0.is_none() || self == Self::from(&Credential::Secret(*secret))
    }
}

impl From<&Credential> for CredentialTag {
    fn from(credential: &Credential) -> Self {
        let Credential::Secret(SecretHash([a, b, c, d, ..])) = *credential else {
            return Self(None);
        };
        Self(Some(NonZeroU32::MIN | u32::from_be_bytes([a, b, c, d])))
    }
}

/// Keeps the hash of a certificate apart from that of any secret, which is at most 128 bytes of visible ASCII.
const CERTIFICATE_DOMAIN: &[u8] = b"seawall client certificate\0";

impl Credential {
    /// Of a certificate, as DER.
    #[must_use]
    pub fn of_certificate(der: &[u8]) -> Self {
        let hash = Sha256::new()
            .chain_update(CERTIFICATE_DOMAIN)
            .chain_update(der)
            .finalize();
        Self::Certificate(SecretHash(hash.into()))
    }

    /// What it says for itself.
    #[must_use]
    pub const fn proof(&self) -> Proof {
        match self {
            Self::Secret(_) => Proof::Secret,
            Self::Certificate(_) => Proof::Certificate,
        }
    }

    /// What a resume token is bound to.
    #[must_use]
    pub const fn hash(&self) -> &SecretHash {
        match self {
            Self::Secret(hash) | Self::Certificate(hash) => hash,
        }
    }
}

/// An address as limits see it: IPv4, or the upper half of IPv6. IPv4 in IPv6 is IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Network {
    V4(u32),
    V6(u64),
}

impl From<IpAddr> for Network {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address.to_bits()),
            IpAddr::V6(address) => {
                let [a, b, c, d, e, f, g, h, ..] = address.octets();
                Self::V6(u64::from_be_bytes([a, b, c, d, e, f, g, h]))
            }
        }
    }
}

impl Network {
    /// What one customer of a provider may hold at most: an IPv4 address, or an IPv6 /48. Guesses are counted by this, since changing the /64
    /// costs a customer nothing.
    #[must_use]
    pub const fn site(self) -> Self {
        match self {
            Self::V4(_) => self,
            Self::V6(upper) => Self::V6(upper & !0xffff),
        }
    }
}

/// What stands behind a claim to be a device, before the registry was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Proof {
    /// A secret: anybody can send one, and only the registry knows whether it is right.
    Secret,
    /// A client certificate that names the device. TLS has verified it: whoever shows it is the device, or has stolen its key.
    Certificate,
}

impl From<SecretHash> for Credential {
    fn from(hash: SecretHash) -> Self {
        Self::Secret(hash)
    }
}

/// A short text that a device says of itself (firmware version, model, tenant): 1 to 64 bytes of printable ASCII, spaces inside allowed, trimmed.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Label(Arc<str>);

impl Label {
    /// Longest label, in bytes.
    pub const LEN_MAX: usize = 64;

    /// Trims `text`; `Ok(None)` where nothing is left of it.
    ///
    /// # Errors
    /// Longer than 64 bytes after trimming, or a byte outside printable ASCII.
    pub fn parse(text: &str) -> Result<Option<Self>, InvalidLabel> {
        let text = text.trim_matches([' ', '\t']);
        if text.len() > Self::LEN_MAX || !text.bytes().all(|byte| (0x20..=0x7e).contains(&byte)) {
            return Err(InvalidLabel);
        }
        Ok((!text.is_empty()).then(|| Self(text.into())))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The text itself, to be shared.
    #[must_use]
    pub const fn as_arc(&self) -> &Arc<str> {
        &self.0
    }

    /// Uses the memory of `text`, where it is the same text.
    pub fn share(&mut self, text: &Arc<str>) {
        if self.0 == *text {
            self.0 = Arc::clone(text);
        }
    }
}

impl std::ops::Deref for Label {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Label {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        match Self::parse(&text) {
            Ok(Some(label)) => Ok(label),
            Ok(None) | Err(InvalidLabel) => Err(serde::de::Error::custom(InvalidLabel)),
        }
    }
}

/// The text is empty, too long, or has bytes outside printable ASCII.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected 1 to 64 bytes of printable ASCII")]
pub struct InvalidLabel;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_networks_of_a_customer_are_one_site() {
        let site = |text: &str| Network::from(text.parse::<IpAddr>().unwrap()).site();

        assert_eq!(site("2001:db8:1:1::1"), site("2001:db8:1:ffff::2"));
        assert_ne!(site("2001:db8:1::1"), site("2001:db8:2::1"));
        assert_ne!(site("192.0.2.1"), site("192.0.2.2"));
    }

    #[test]
    fn device_id_takes_any_case_with_or_without_dashes() {
        let id: DeviceId = "9B0C2E4A-11d2-7f00-8000-0000000000AA".parse().unwrap();

        assert_eq!(id, "9b0c2e4a11d27f0080000000000000aa".parse().unwrap());
        assert_eq!(id.to_string(), "9b0c2e4a-11d2-7f00-8000-0000000000aa");
    }

    #[test]
    fn device_id_refuses_braces_urn_and_misplaced_dashes() {
        for text in [
            "",
            "9b0c2e4a",
            "{9b0c2e4a-11d2-7f00-8000-0000000000aa}",
            "urn:uuid:9b0c2e4a-11d2-7f00-8000-0000000000aa",
            "9b0c2e4a1-1d2-7f00-8000-0000000000aa",
            "zb0c2e4a-11d2-7f00-8000-0000000000aa",
            "9b0c2e4a-11d27f00-8000-0000000000aa0",
        ] {
            assert_eq!(text.parse::<DeviceId>(), Err(InvalidDeviceId), "{text}");
        }
    }

    #[test]
    fn label_is_trimmed_and_bounded() {
        assert_eq!(Label::parse("  a b ").unwrap().unwrap().as_str(), "a b");
        assert_eq!(Label::parse("   "), Ok(None));
        assert!(Label::parse(&"x".repeat(64)).is_ok());
        assert_eq!(Label::parse(&"x".repeat(65)), Err(InvalidLabel));
        assert_eq!(Label::parse("a\u{e9}"), Err(InvalidLabel));
        assert_eq!(Label::parse("a\nb"), Err(InvalidLabel));
    }
}
