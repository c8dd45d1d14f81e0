//! Identifiers and short texts from outside: devices, rules, sessions, credentials, addresses, labels. They are parsed
//! once, on arrival.

use std::{fmt, net::IpAddr, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use uuid::Uuid;

/// A device's id: any UUID of any version. Written in lower case with dashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct DeviceId(Uuid);

impl DeviceId {
    /// Maximum length of its text, dashes included.
    const TEXT_LEN_MAX: usize = 64;

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

/// Any letter case, with dashes anywhere or none; without braces and `urn:`.
impl FromStr for DeviceId {
    type Err = InvalidDeviceId;

    fn from_str(text: &str) -> Result<Self, InvalidDeviceId> {
        // The usual forms.
        if matches!(text.len(), 32 | 36)
            && let Ok(id) = Uuid::try_parse(text)
        {
            return Ok(Self(id));
        }
        let mut id = 0_u128;
        let mut digits = 0;
        for byte in text.bytes().filter(|byte| *byte != b'-') {
            let digit = char::from(byte).to_digit(16).ok_or(InvalidDeviceId)?;
            id = id << 4 | u128::from(digit);
            digits += 1;
            if digits > 32 {
                return Err(InvalidDeviceId);
            }
        }
        if digits == 32 && text.len() <= Self::TEXT_LEN_MAX {
            Ok(Self(Uuid::from_u128(id)))
        } else {
            Err(InvalidDeviceId)
        }
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
#[error("not a UUID: expected 32 hexadecimal digits, with or without dashes")]
pub struct InvalidDeviceId;

/// A firmware rule's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RuleId(pub Uuid);

impl fmt::Display for RuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

/// Id of a WebSocket session, and the epoch that fences it: of two sessions of a device, the greater is newer.
/// [`SessionIds`](crate::epoch::SessionIds) issues them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// SHA-256 of a credential. Issued secrets have 256 random bits, so a plain hash is as strong as a slow one.
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

/// The proof of a device's identity. Only hashes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credential {
    /// A secret: the registry has its hash.
    Secret(SecretHash),
    /// Hash of a client certificate that names the device and that TLS has verified.
    Certificate(SecretHash),
}

/// A part of a credential's hash that a session keeps: 31 bits, and one bit for its kind. It shows that a secret was
/// replaced or a certificate revoked, and proves nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CredentialTag(u32);

/// The bit that is set in the tag of a secret.
const OF_SECRET: u32 = 1;

impl CredentialTag {
    /// Whether it may be the tag of this secret. True for every certificate.
    #[must_use]
    pub fn may_be(self, secret: &SecretHash) -> bool {
        self.certificate().is_some() || self == Self::from(&Credential::Secret(*secret))
    }

    /// The kind of proof.
    #[must_use]
    pub const fn proof(self) -> Proof {
        if self.0 & OF_SECRET == 0 {
            Proof::Certificate
        } else {
            Proof::Secret
        }
    }

    /// The certificate's tag; `None` for a secret.
    #[must_use]
    pub fn certificate(self) -> Option<CertificateTag> {
        (self.0 & OF_SECRET == 0).then_some(CertificateTag(self.0))
    }
}

impl From<&Credential> for CredentialTag {
    fn from(credential: &Credential) -> Self {
        let SecretHash([a, b, c, d, ..]) = *credential.hash();
        let bits = u32::from_be_bytes([a, b, c, d]);
        match credential {
            Credential::Secret(_) => Self(bits | OF_SECRET),
            Credential::Certificate(_) => Self(bits & !OF_SECRET),
        }
    }
}

/// Hash of a certificate's issuer and serial number, by which revocation lists identify it. 31 bits: another
/// certificate has the same tag once in two billion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CertificateTag(u32);

impl CertificateTag {
    /// `issuer` as DER, `serial` as a big-endian number without leading zeros.
    #[must_use]
    pub fn of(issuer: &[u8], serial: &[u8]) -> Self {
        let hash = Sha256::new().chain_update(issuer).chain_update(serial).finalize();
        let [a, b, c, d, ..] = <[u8; 32]>::from(hash);
        Self(u32::from_be_bytes([a, b, c, d]) & !OF_SECRET)
    }
}

/// Separates the hash of a certificate from that of any secret, which is at most 128 bytes of visible ASCII.
const CERTIFICATE_DOMAIN: &[u8] = b"seawall client certificate\0";

impl Credential {
    /// The credential of a certificate, given as DER. Its hash begins with the tag, so that a session's
    /// [`CredentialTag`] contains it.
    #[must_use]
    pub fn of_certificate(der: &[u8], tag: CertificateTag) -> Self {
        let hash = Sha256::new()
            .chain_update(CERTIFICATE_DOMAIN)
            .chain_update(der)
            .finalize();
        let mut hash = <[u8; 32]>::from(hash);
        hash[..4].copy_from_slice(&tag.0.to_be_bytes());
        Self::Certificate(SecretHash(hash))
    }

    /// The kind of proof.
    #[must_use]
    pub const fn proof(&self) -> Proof {
        match self {
            Self::Secret(_) => Proof::Secret,
            Self::Certificate(_) => Proof::Certificate,
        }
    }

    /// The hash that a resume token is bound to.
    #[must_use]
    pub const fn hash(&self) -> &SecretHash {
        match self {
            Self::Secret(hash) | Self::Certificate(hash) => hash,
        }
    }
}

/// An address as limits count it: IPv4, or the upper half of IPv6. IPv4-mapped IPv6 is handled as IPv4.
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
    /// The network of one customer of a provider: an IPv4 address, or an IPv6 /48. Wrong credentials are counted by it,
    /// because a customer can change the /64 at no cost.
    #[must_use]
    pub const fn site(self) -> Self {
        match self {
            Self::V4(_) => self,
            Self::V6(upper) => Self::V6(upper & !0xffff),
        }
    }
}

/// Evidence for a claimed device id, before the lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Proof {
    /// A secret: any client can send one, and only the registry can verify it.
    Secret,
    /// A client certificate that names the device, verified by TLS: the client has the device's private key.
    Certificate,
}

impl From<SecretHash> for Credential {
    fn from(hash: SecretHash) -> Self {
        Self::Secret(hash)
    }
}

/// A short text from a device: its firmware version, model or tenant. 1 to 64 bytes of printable ASCII, trimmed; spaces
/// inside are allowed.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Label(Arc<str>);

impl Label {
    /// Maximum length of a label, in bytes.
    pub const LEN_MAX: usize = 64;

    /// Trims `text`. Returns `Ok(None)` if nothing remains.
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

    /// The text, to be shared.
    #[must_use]
    pub const fn as_arc(&self) -> &Arc<str> {
        &self.0
    }

    /// Shares the memory of `text` if it is the same text.
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

/// The text is empty, over 64 bytes, or has bytes outside printable ASCII.
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
        assert_eq!(id, "9b0c2e4a-11d27f008000-0000000000aa".parse().unwrap());
        assert_eq!(id, "9b0c2e4a1-1d2-7f00-8000-0000000000aa".parse().unwrap());
        assert_eq!(id.to_string(), "9b0c2e4a-11d2-7f00-8000-0000000000aa");
    }

    #[test]
    fn device_id_refuses_braces_urn_and_other_numbers_of_digits() {
        for text in [
            "",
            "9b0c2e4a",
            "{9b0c2e4a-11d2-7f00-8000-0000000000aa}",
            "urn:uuid:9b0c2e4a-11d2-7f00-8000-0000000000aa",
            "9b0c2e4a-11d2-7f00-8000-0000000000a",
            "-".repeat(36).as_str(),
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
