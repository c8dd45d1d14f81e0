//! What a device says when it connects: from the head of an HTTP request to a [`Hello`] (contract section 2).
//!
//! Parsing happens once, here; nothing behind it sees a header again. Start with [`parse`]. Any bytes at all may come in,
//! and none of them ever appear in a refusal.

mod forwarded;
mod identity;
mod names;
mod paths;
mod upgrade;

pub use forwarded::forwarded_for;
pub use names::{IdentityNames, InvalidName, NamedDevice};
pub use paths::{InvalidPath, Paths};

use crate::{
    id::{Credential, DeviceId, Label},
    refusal::Refusal,
    rules::{OwnedSubject, Subject},
};

/// Longest request head and longest target, in bytes (contract section 3). The reader of the socket enforces them.
pub const HEAD_LEN_MAX: usize = 8 * 1024;

/// The sub-protocol whose frames are ours (contract section 4).
pub const SEAWALL_V1: &str = "seawall.v1";

/// The head of a request, as it came off the socket.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    pub method: &'a str,
    /// Path and query, or the absolute form that a proxy sends.
    pub target: &'a str,
    /// 0 or 1: the digit behind `HTTP/1.`.
    pub http_minor: u8,
    pub headers: &'a [(&'a str, &'a [u8])],
}

/// What a request on the device listener asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Connect(Hello),
    /// `GET` or `HEAD` of `/readyz`, from a balancer: answered with a status only.
    Ready,
    /// `GET` or `HEAD` of `/healthz`, likewise.
    Health,
}

/// A device's own claims. Nothing in it is proven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub device: DeviceId,
    /// What the device calls itself, where that is not a UUID.
    pub external_id: Option<Label>,
    /// Its certificate where that names the device, else the secret shown; neither itself is kept.
    pub credential: Option<Credential>,
    pub firmware: Option<Label>,
    pub model: Option<Label>,
    /// The tenant it claims. After the look-up the registry's counts.
    pub tenant: Option<Label>,
    /// A reconnect slot. One that does not count is ignored, never refused.
    pub slot: Option<Box<str>>,
    /// A resume token. One that does not count is ignored, never refused.
    pub resume: Option<Box<str>>,
    pub session_kind: SessionKind,
    /// The sub-protocol to confirm in the 101, exactly as it was offered.
    pub protocol: Option<Box<str>>,
    /// `Sec-WebSocket-Key`, as it was sent: base64 of 16 bytes.
    pub websocket_key: [u8; 24],
}

impl Hello {
    /// The device by its own words, for firmware rules.
    #[must_use]
    pub fn claims(&self) -> Subject<'_> {
        Subject {
            firmware: self.firmware.as_deref(),
            model: self.model.as_deref(),
            tenant: self.tenant.as_deref(),
        }
    }

    /// A copy of the device's claims, to keep while it waits.
    #[must_use]
    pub fn owned_claims(&self) -> OwnedSubject {
        OwnedSubject {
            firmware: self.firmware.clone(),
            model: self.model.clone(),
            tenant: self.tenant.clone(),
        }
    }
}

/// What a client certificate, verified by TLS, says of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certified {
    /// It names one device: certificate and private key are its credential.
    Device { device: DeviceId, credential: Credential },
    /// It names several: nobody can tell whose it is.
    Ambiguous,
}

/// Who speaks first, and what data frames mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SessionKind {
    /// `seawall.v1`: JSON frames of section 4.
    V1,
    /// Anything else: data frames are opaque messages, the gateway sends nothing of its own but pings, pongs and closes.
    Plain,
}

impl SessionKind {
    /// The word in logs and in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V1 => SEAWALL_V1,
            Self::Plain => "plain",
        }
    }
}

/// Reads the form of a request: which resource, whether it is a WebSocket upgrade, and who says to be there. `paths`: where devices
/// connect. `certified`: what the client's certificate says, where TLS has verified one that names a device.
///
/// `Host` is not looked at. RFC 9112 §3.2 asks for 400 where it is missing or given twice; devices in the field leave it out, and
/// nothing here depends on it: there is one host, and one request on a connection.
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

/// The value of a header that may come once at most.
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
