//! `[identity]`: names of the headers and parameters that carry the identity. They are configurable, because firmware
//! in the field is not.

use serde::{Deserialize, Serialize};
use sha1::{Digest as _, Sha1};
use uuid::Uuid;

use crate::id::{DeviceId, Label};

/// Names of headers (any letter case) and of query parameters (exact). Each setting replaces the default name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IdentityNames {
    /// Device id. Default `Seawall-Device`.
    pub device_header: String,
    /// Device id. Default `device`.
    pub device_query: String,
    /// Firmware version. Default `Seawall-Firmware`.
    pub firmware_header: String,
    /// Firmware version. Default `firmware`.
    pub firmware_query: String,
    /// Model. Default `Seawall-Model`.
    pub model_header: String,
    /// Model. Default `model`.
    pub model_query: String,
    /// Claimed tenant. Default `Seawall-Tenant`.
    pub tenant_header: String,
    /// Claimed tenant. Default `tenant`.
    pub tenant_query: String,
    /// Resume token. Default `Seawall-Resume`.
    pub resume_header: String,
    /// Reconnect slot. Default `Seawall-Slot`.
    pub slot_header: String,
    /// Accepts device ids that are not UUIDs: the device is then the UUIDv5 (RFC 9562 §5.5) of the text in this
    /// namespace. Default: none, so that every id is a UUID.
    pub namespace: Option<Uuid>,
}

/// A device by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedDevice {
    pub id: DeviceId,
    /// The name, if it is not a UUID.
    pub external_id: Option<Label>,
}

impl Default for IdentityNames {
    fn default() -> Self {
        Self {
            device_header: "Seawall-Device".into(),
            device_query: "device".into(),
            firmware_header: "Seawall-Firmware".into(),
            firmware_query: "firmware".into(),
            model_header: "Seawall-Model".into(),
            model_query: "model".into(),
            tenant_header: "Seawall-Tenant".into(),
            tenant_query: "tenant".into(),
            resume_header: "Seawall-Resume".into(),
            slot_header: "Seawall-Slot".into(),
            namespace: None,
        }
    }
}

impl IdentityNames {
    /// Maximum length of a name, in bytes.
    pub const NAME_LEN_MAX: usize = 64;

    /// The device that a text names: a UUID in any of its forms or, with a namespace, 1 to 64 bytes of printable ASCII
    /// in which letter case matters.
    #[must_use]
    pub fn device(&self, text: &str) -> Option<NamedDevice> {
        if let Ok(id) = text.parse() {
            return Some(NamedDevice { id, external_id: None });
        }
        let external_id = Label::parse(text).ok()??;
        let hash = Sha1::new()
            .chain_update(self.namespace?.as_bytes())
            .chain_update(external_id.as_bytes())
            .finalize();
        let (bytes, _) = hash.split_first_chunk()?;
        Some(NamedDevice {
            id: DeviceId::from_uuid(uuid::Builder::from_sha1_bytes(*bytes).into_uuid()),
            external_id: Some(external_id),
        })
    }

    /// Checks that every name is valid and used for one purpose only.
    ///
    /// # Errors
    /// The invalid setting, and the reason.
    pub fn validate(&self) -> Result<(), InvalidName> {
        let headers = [
            ("device_header", &self.device_header),
            ("firmware_header", &self.firmware_header),
            ("model_header", &self.model_header),
            ("tenant_header", &self.tenant_header),
            ("resume_header", &self.resume_header),
            ("slot_header", &self.slot_header),
        ];
        let queries = [
            ("device_query", &self.device_query),
            ("firmware_query", &self.firmware_query),
            ("model_query", &self.model_query),
            ("tenant_query", &self.tenant_query),
        ];
        for (setting, name) in headers {
            if !is_token(name) || name.len() > Self::NAME_LEN_MAX {
                return Err(InvalidName::new(setting, "expected a header name of 1 to 64 bytes"));
            }
            if RESERVED.iter().any(|reserved| reserved.eq_ignore_ascii_case(name)) {
                return Err(InvalidName::new(setting, "this header has a meaning of its own"));
            }
        }
        for (setting, name) in queries {
            if name.is_empty() || name.len() > Self::NAME_LEN_MAX {
                return Err(InvalidName::new(setting, "expected a parameter name of 1 to 64 bytes"));
            }
        }
        first_double(&headers, |a, b| a.eq_ignore_ascii_case(b))?;
        first_double(&queries, |a, b| a == b)
    }
}

fn first_double(names: &[(&'static str, &String)], same: impl Fn(&str, &str) -> bool) -> Result<(), InvalidName> {
    for (at, (setting, name)) in names.iter().enumerate() {
        if names[..at].iter().any(|(_, earlier)| same(earlier, name)) {
            return Err(InvalidName::new(setting, "the same name is used for something else"));
        }
    }
    Ok(())
}

/// An invalid setting of `[identity]`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("identity.{setting}: {reason}")]
pub struct InvalidName {
    pub setting: &'static str,
    pub reason: &'static str,
}

impl InvalidName {
    const fn new(setting: &'static str, reason: &'static str) -> Self {
        Self { setting, reason }
    }
}

/// Headers whose meaning HTTP, WebSocket or authentication define.
const RESERVED: &[&str] = &[
    "Authorization",
    "Connection",
    "Content-Length",
    "Host",
    "Sec-WebSocket-Extensions",
    "Sec-WebSocket-Key",
    "Sec-WebSocket-Protocol",
    "Sec-WebSocket-Version",
    "Transfer-Encoding",
    "Upgrade",
];

/// A token of RFC 9110 §5.6.2, as in header names and sub-protocols.
pub(super) fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_names_are_valid() {
        assert_eq!(IdentityNames::default().validate(), Ok(()));
    }

    #[test]
    fn text_that_is_not_a_uuid_names_the_uuid_v5_of_it_where_there_is_a_namespace() {
        let names = IdentityNames {
            namespace: Some(Uuid::NAMESPACE_DNS),
            ..IdentityNames::default()
        };
        let id = |text: &str| names.device(text).map(|named| named.id.to_string());

        // The example of RFC 9562, appendix A.4.
        assert_eq!(
            id("www.example.com").as_deref(),
            Some("2ed6657d-e927-568b-95e1-2665a8aea6a2")
        );
        assert_eq!(id(" www.example.com "), id("www.example.com"));
        assert_ne!(id("WWW.example.com"), id("www.example.com"));
        let named = names.device("9B0C2E4A11D27F0080000000000000AA").unwrap();
        assert_eq!(named.id.to_string(), "9b0c2e4a-11d2-7f00-8000-0000000000aa");
        assert_eq!(named.external_id, None);
        for bad in ["", "  ", "a\u{e9}", "a\nb", &"x".repeat(65)] {
            assert_eq!(names.device(bad), None, "{bad:?}");
        }
        assert_eq!(IdentityNames::default().device("www.example.com"), None);
    }

    #[test]
    fn name_that_cannot_be_sent_is_named() {
        for (name, setting) in [("", "slot_header"), ("a b", "slot_header"), ("upgrade", "slot_header")] {
            let names = IdentityNames {
                slot_header: name.into(),
                ..IdentityNames::default()
            };

            assert_eq!(names.validate().unwrap_err().setting, setting);
        }
    }

    #[test]
    fn one_name_for_two_things_is_refused() {
        let names = IdentityNames {
            model_header: "seawall-device".into(),
            ..IdentityNames::default()
        };

        assert_eq!(
            names.validate().unwrap_err().to_string(),
            "identity.model_header: the same name is used for something else"
        );
    }
}
