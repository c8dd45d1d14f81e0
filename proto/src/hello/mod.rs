//! What a device says when it connects: from the head of an HTTP request to a [`Hello`] (docs/PROTOCOL.md,
//! "Connecting").
//!
//! Parsing happens once, here; later steps never see a header. Start with [`parse`]. It accepts any bytes as input, and
//! no part of the input ever appears in a refusal.

mod forwarded;
mod identity;
mod names;
mod paths;
mod upgrade;

pub use forwarded::forwarded_for;
pub use names::{IdentityNames, InvalidName, NamedDevice};
pub use paths::{InvalidPath, Paths};

use crate::{
    connect::Attempt,
    id::{Credential, DeviceId, Label, Network},
    refusal::Refusal,
    time::Instant,
};

/// Maximum length of a request head, and of a target, in bytes. The reader of the socket enforces both.
pub const HEAD_LEN_MAX: usize = 8 * 1024;

/// The sub-protocol with Seawall's own frames.
pub const SEAWALL_V1: &str = "seawall.v1";

/// The head of a request as read from the socket.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    pub method: &'a str,
    /// Path and query, or the absolute form that a proxy sends.
    pub target: &'a str,
    /// 0 or 1: the digit after `HTTP/1.`.
    pub http_minor: u8,
    pub headers: &'a [(&'a str, &'a [u8])],
}

/// What a request on the device listener asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Connect(Hello),
    /// `GET` or `HEAD` of `/readyz`, from a load balancer. The answer is a status only.
    Ready,
    /// `GET` or `HEAD` of `/healthz`. The answer is a status only.
    Health,
}

/// The device's own claims, none of them verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub device: DeviceId,
    /// The name that the device uses for itself, if it is not a UUID.
    pub external_id: Option<Label>,
    /// Its certificate if that names the device, otherwise the secret it showed, both as a hash.
    pub credential: Option<Credential>,
    pub firmware: Option<Label>,
    pub model: Option<Label>,
    /// The claimed tenant. After the lookup the registry's tenant is used.
    pub tenant: Option<Label>,
    /// A reconnect slot. An invalid one is ignored, never refused.
    pub slot: Option<Box<str>>,
    /// A resume token. An invalid one is ignored, never refused.
    pub resume: Option<Box<str>>,
    pub session_kind: SessionKind,
    /// The sub-protocol to confirm in the 101, exactly as it was offered.
    pub protocol: Option<Box<str>>,
    /// `Sec-WebSocket-Key`, as it was sent: base64 of 16 bytes.
    pub websocket_key: [u8; 24],
}

impl Hello {
    /// The fields that the decision needs.
    #[must_use]
    pub fn attempt(&self, network: Network, arrived: Instant) -> Attempt<'_> {
        Attempt {
            device: self.device,
            credential: self.credential,
            firmware: self.firmware.as_ref(),
            model: self.model.as_ref(),
            tenant: self.tenant.as_ref(),
            slot: self.slot.as_deref(),
            resume: self.resume.as_deref(),
            network,
            arrived,
        }
    }
}

/// The devices that a client certificate names, verified by TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certified {
    /// It names one device: certificate and private key are its credential.
    Device { device: DeviceId, credential: Credential },
    /// It names several devices, so it is not known which one uses it.
    Ambiguous,
}

/// Which side may send first, and what data frames mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SessionKind {
    /// `seawall.v1`: JSON frames.
    V1,
    /// Anything else: data frames are opaque messages, and the gateway sends only pings, pongs and closes.
    Plain,
}

impl SessionKind {
    /// Value in logs and in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V1 => SEAWALL_V1,
            Self::Plain => "plain",
        }
    }
}

/// Parses a request: the resource, whether it is a WebSocket upgrade, and the claimed identity. `paths`: where devices
/// connect. `certified`: the devices that the client's certificate names, if TLS has verified one.
///
/// `Host` is ignored. RFC 9112 §3.2 requires 400 if it is missing or given twice, but devices in the field leave it
/// out. Nothing depends on it: there is one host, and one request per connection.
///
/// # Errors
/// The refusal to answer with: `not_found`, `method_not_allowed`, `bad_request` or `upgrade_required`.
pub fn parse(
    head: &Head<'_>,
    paths: &Paths,
    names: &IdentityNames,
    certified: Option<Certified>,
) -> Result<Request, Refusal> {
    let (path, query) = split_target(head.target);
    let probe = match path {
        "/readyz" => Some(Request::Ready),
        "/healthz" => Some(Request::Health),
        _ => None,
    };
    if let Some(probe) = probe {
        return if matches!(head.method, "GET" | "HEAD") {
            Ok(probe)
        } else {
            Err(Refusal::method_not_allowed())
        };
    }
    let in_path = paths.find(path).ok_or(Refusal::not_found())?;
    if head.method != "GET" {
        return Err(Refusal::method_not_allowed());
    }
    let upgrade = upgrade::parse(head)?;
    let places = identity::Places {
        headers: head.headers,
        path: in_path,
        query,
    };
    let identity = identity::parse(places, names, certified)?;
    Ok(Request::Connect(Hello {
        device: identity.device,
        external_id: identity.external_id,
        credential: identity.credential,
        firmware: identity.firmware,
        model: identity.model,
        tenant: identity.tenant,
        slot: identity.slot,
        resume: identity.resume,
        session_kind: upgrade.session_kind,
        protocol: upgrade.protocol,
        websocket_key: upgrade.websocket_key,
    }))
}

/// Path and query of origin form or absolute form (RFC 9112 §3.2).
fn split_target(target: &str) -> (&str, &str) {
    let origin = match target.split_once("://") {
        Some((scheme, rest)) if !scheme.contains(['/', '?']) => rest.find(['/', '?']).map_or("/", |at| &rest[at..]),
        Some(_) | None => target,
    };
    origin.split_once('?').unwrap_or((origin, ""))
}

/// The values of every header called `name`, in order.
fn values<'a>(headers: &'a [(&'a str, &'a [u8])], name: &'a str) -> impl Iterator<Item = &'a [u8]> {
    headers
        .iter()
        .filter(move |(header, _)| header.eq_ignore_ascii_case(name))
        .map(|(_, value)| *value)
}

/// The value of a header that may occur at most once.
fn single<'a>(
    headers: &'a [(&'a str, &'a [u8])],
    name: &'a str,
    detail: &'static str,
) -> Result<Option<&'a [u8]>, Refusal> {
    let mut values = values(headers, name);
    let first = values.next();
    match values.next() {
        Some(_) => Err(Refusal::bad_request(detail)),
        None => Ok(first),
    }
}

#[cfg(test)]
mod tests;
