//! `[identity]`: where this fleet puts its identity. Firmware in the field can't be changed, so the names can.

use serde::{Deserialize, Serialize};

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
        }
    }
}

impl IdentityNames {
    /// Longest name, in bytes.
    pub const NAME_LEN_MAX: usize = 64;

    /// Says whether every name can be sent, and means one thing only.
    ///
    /// # Errors
    /// The setting that is wrong, and why.
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

/// A setting of `[identity]` that can't work.
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

/// Headers that HTTP, WebSocket or authentication give a meaning to.
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

/// A token of RFC 9110 §5.6.2: header names and sub-protocols.
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
