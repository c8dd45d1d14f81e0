//! The claims of a device: the upgrade request and its headers (docs/PROTOCOL.md, "Connecting").

use base64::{Engine, prelude::BASE64_STANDARD};
use seawall_proto::id::DeviceId;
use tokio_tungstenite::tungstenite::{
    handshake::client::{Request, generate_key},
    http::{HeaderMap, HeaderName, HeaderValue, header},
};

use super::OpenError;
use crate::target::Target;

/// How a device proves who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// `Authorization: Bearer SECRET`.
    Bearer(Box<str>),
    /// `Authorization: Basic base64(UUID:SECRET)`; no `Seawall-Device` header.
    Basic(Box<str>),
    /// None at all.
    Missing,
}

/// Claims of a device in one attempt.
#[derive(Clone, Debug)]
pub(crate) struct Hello<'a> {
    pub(crate) device: DeviceId,
    /// What the device calls itself instead of its id.
    pub(crate) external_id: Option<&'a str>,
    pub(crate) credential: &'a Credential,
    pub(crate) firmware: Option<&'a str>,
    pub(crate) model: Option<&'a str>,
    pub(crate) tenant: Option<&'a str>,
    pub(crate) slot: Option<&'a str>,
    pub(crate) resume: Option<&'a str>,
    pub(crate) protocols: Option<&'a str>,
}

impl Hello<'_> {
    pub(crate) fn request(&self, target: &Target) -> Result<Request, OpenError> {
        let mut request = Request::new(());
        let name = self.name();
        *request.uri_mut() = target.uri_of(&name).map_err(|_| OpenError::BadHello)?;
        let authority = target.uri().authority().map_or("", |authority| authority.as_str());
        let headers = request.headers_mut();
        for (name, value) in [
            (header::HOST, authority),
            (header::CONNECTION, "Upgrade"),
            (header::UPGRADE, "websocket"),
            (header::SEC_WEBSOCKET_VERSION, "13"),
            (header::SEC_WEBSOCKET_KEY, generate_key().as_str()),
        ] {
            headers.insert(name, value_of(value)?);
        }
        self.credentials(&name, target, headers)?;
        for (name, value) in [
            ("seawall-firmware", self.firmware),
            ("seawall-model", self.model),
            ("seawall-tenant", self.tenant),
            ("seawall-slot", self.slot),
            ("seawall-resume", self.resume),
            ("sec-websocket-protocol", self.protocols),
        ] {
            if let Some(value) = value {
                headers.insert(HeaderName::from_static(name), value_of(value)?);
            }
        }
        Ok(request)
    }

    /// What the device calls itself.
    fn name(&self) -> String {
        self.external_id.map_or_else(|| self.device.to_string(), str::to_owned)
    }

    fn credentials(&self, name: &str, target: &Target, headers: &mut HeaderMap) -> Result<(), OpenError> {
        let authorization = match self.credential {
            Credential::Bearer(secret) => Some(format!("Bearer {secret}")),
            Credential::Basic(secret) => {
                let pair = BASE64_STANDARD.encode(format!("{name}:{secret}"));
                Some(format!("Basic {pair}"))
            }
            Credential::Missing => None,
        };
        if let Some(authorization) = authorization {
            headers.insert(header::AUTHORIZATION, value_of(&authorization)?);
        }
        if !matches!(self.credential, Credential::Basic(_)) && !target.names_device() {
            let id = HeaderName::from_static("seawall-device");
            headers.insert(id, value_of(name)?);
        }
        Ok(())
    }
}

fn value_of(text: &str) -> Result<HeaderValue, OpenError> {
    HeaderValue::from_str(text).map_err(|_| OpenError::BadHello)
}
