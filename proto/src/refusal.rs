//! The answer that a refused device gets: always HTTP, always before the upgrade, always problem+json (RFC 9457).
//!
//! A [`Refusal`] carries its own labels: the status line, the body, the metric and the log line all derive from it. It
//! never holds what the device sent.

use std::{borrow::Cow, ops::RangeInclusive, time::Duration};

mod crush;
mod limit;

use rand::Rng;
use serde::Serialize;

pub use self::{crush::Crush, limit::Limit};
pub use crate::hint::{Hint, Peers};
use crate::{hint, id::RuleId};

crate::labels! {
    /// Why a device is refused. A closed set: clients, metrics and the API rely on these values.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub enum Code {
        BadRequest = "bad_request",
        Unauthorized = "unauthorized",
        FirmwareBlocked = "firmware_blocked",
        DeviceDisabled = "device_disabled",
        NotFound = "not_found",
        MethodNotAllowed = "method_not_allowed",
        UpgradeRequired = "upgrade_required",
        RequestTimeout = "request_timeout",
        UriTooLong = "uri_too_long",
        HeadersTooLarge = "headers_too_large",
        Throttled = "throttled",
        Overloaded = "overloaded",
        RegistryUnavailable = "registry_unavailable",
        Draining = "draining",
    }
}

/// The part of an answer that all refusals of a code share.
struct Spec {
    status: u16,
    reason_phrase: &'static str,
    title: &'static str,
    header_lines: &'static str,
}

const fn spec(status: u16, reason_phrase: &'static str, title: &'static str) -> Spec {
    Spec {
        status,
        reason_phrase,
        title,
        header_lines: "",
    }
}

impl Code {
    const fn spec(self) -> Spec {
        const UNAVAILABLE: &str = "Service Unavailable";
        match self {
            Self::BadRequest => spec(400, "Bad Request", "The request is malformed"),
            Self::Unauthorized => Spec {
                header_lines: "WWW-Authenticate: Bearer realm=\"seawall\"\r\nWWW-Authenticate: Basic realm=\"seawall\"\r\n",
                ..spec(401, "Unauthorized", "The device could not be authenticated")
            },
            Self::FirmwareBlocked => spec(403, "Forbidden", "This firmware is blocked"),
            Self::DeviceDisabled => spec(403, "Forbidden", "This device is disabled"),
            Self::NotFound => spec(404, "Not Found", "Nothing here"),
            Self::MethodNotAllowed => Spec {
                header_lines: "Allow: GET\r\n",
                ..spec(405, "Method Not Allowed", "Only GET is allowed here")
            },
            Self::UpgradeRequired => Spec {
                // `Upgrade` is a hop-by-hop header, so `Connection` must name it (RFC 9110 §7.8). On a line of its own,
                // which means the same, so that the first line is `close` in every refusal.
                header_lines: "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
                ..spec(426, "Upgrade Required", "A WebSocket upgrade is required")
            },
            Self::RequestTimeout => spec(408, "Request Timeout", "The request took too long"),
            Self::UriTooLong => spec(414, "URI Too Long", "The request target is too long"),
            Self::HeadersTooLarge => spec(431, "Request Header Fields Too Large", "The request head is too large"),
            Self::Throttled => spec(503, UNAVAILABLE, "Too many attempts"),
            Self::Overloaded => spec(503, UNAVAILABLE, "The gateway is busy"),
            Self::RegistryUnavailable => spec(503, UNAVAILABLE, "The device registry is unavailable"),
            Self::Draining => spec(503, UNAVAILABLE, "This node is leaving"),
        }
    }

    /// The HTTP status. Never 429: clients in the field treat it as final.
    #[must_use]
    pub const fn status(self) -> u16 {
        self.spec().status
    }

    /// The same for all refusals of a code (RFC 9457 §3.1.3).
    #[must_use]
    pub const fn title(self) -> &'static str {
        self.spec().title
    }
}

/// A refused attempt: everything that the device is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: Code,
    /// Set if the code is `throttled`; `detail` describes it for the device.
    pub limit: Option<Limit>,
    /// For people who debug a device. A fixed text or an operator's public reason; never what the device sent.
    pub detail: Cow<'static, str>,
    pub hint: Option<Hint>,
    pub rule: Option<RuleId>,
}

impl Refusal {
    /// A refusal without a hint.
    #[must_use]
    pub const fn plain(code: Code, detail: &'static str) -> Self {
        Self {
            code,
            limit: None,
            detail: Cow::Borrowed(detail),
            hint: None,
            rule: None,
        }
    }

    const fn hinted(code: Code, detail: &'static str, hint: Hint) -> Self {
        Self {
            code,
            limit: None,
            detail: Cow::Borrowed(detail),
            hint: Some(hint),
            rule: None,
        }
    }

    /// 400.
    #[must_use]
    pub const fn bad_request(detail: &'static str) -> Self {
        Self::plain(Code::BadRequest, detail)
    }

    /// 401: the same answer for an unknown device, a wrong credential and a missing one.
    pub fn unauthorized(rng: &mut impl Rng) -> Self {
        let hint = Hint::draw(hint::UNAUTHORIZED, rng);
        Self::hinted(
            Code::Unauthorized,
            "unknown device, or wrong or missing credential",
            hint,
        )
    }

    /// 403 by a rule. `reason` is public; the hint is between `retry_after` and twice that.
    pub fn firmware_blocked(rule: RuleId, reason: &str, retry_after: Duration, rng: &mut impl Rng) -> Self {
        let detail = match reason {
            "" => Cow::Borrowed("an operator has blocked this firmware"),
            reason => Cow::Owned(reason.to_owned()),
        };
        Self {
            code: Code::FirmwareBlocked,
            limit: None,
            detail,
            hint: Some(Hint::draw(hint::up_to_twice(retry_after), rng)),
            rule: Some(rule),
        }
    }

    /// 403: the credential was right, the device is disabled.
    pub fn device_disabled(rng: &mut impl Rng) -> Self {
        let hint = Hint::draw(hint::DISABLED, rng);
        Self::hinted(Code::DeviceDisabled, "an operator has disabled this device", hint)
    }

    /// 404.
    #[must_use]
    pub const fn not_found() -> Self {
        Self::plain(Code::NotFound, "no device connects at this path")
    }

    /// 405.
    #[must_use]
    pub const fn method_not_allowed() -> Self {
        Self::plain(Code::MethodNotAllowed, "this resource answers GET only")
    }

    /// 426.
    #[must_use]
    pub const fn upgrade_required(detail: &'static str) -> Self {
        Self::plain(Code::UpgradeRequired, detail)
    }

    /// 408.
    #[must_use]
    pub const fn request_timeout() -> Self {
        Self::plain(Code::RequestTimeout, "the request head did not arrive in time")
    }

    /// 414.
    #[must_use]
    pub const fn uri_too_long() -> Self {
        Self::plain(
            Code::UriTooLong,
            "the request target is over the limit, 8 KiB unless configured",
        )
    }

    /// 431.
    #[must_use]
    pub const fn headers_too_large() -> Self {
        Self::plain(
            Code::HeadersTooLarge,
            "the request head is over the limit, 8 KiB unless configured",
        )
    }

    /// 503 by a limit on this address. It has no slot: slots are for devices that kept to the limits.
    pub fn throttled(limit: Limit, rng: &mut impl Rng) -> Self {
        Self::throttled_until(limit, Hint::draw(hint::THROTTLED, rng))
    }

    /// 503: the address holds too many handshakes while others wait. `hint` comes from [`Crush::hint_range`].
    pub fn crowded_out(hint: RangeInclusive<Duration>, rng: &mut impl Rng) -> Self {
        Self::throttled_until(Limit::AddressHandshakes, Hint::draw(hint, rng))
    }

    /// 503 by a limit on this address, device id or rule.
    #[must_use]
    pub const fn throttled_until(limit: Limit, hint: Hint) -> Self {
        Self {
            code: Code::Throttled,
            limit: Some(limit),
            detail: Cow::Borrowed(limit.detail()),
            hint: Some(hint),
            rule: None,
        }
    }

    /// 503 by a rule with effect `throttle`: `reason` is public.
    #[must_use]
    pub fn throttled_by(rule: RuleId, reason: &str, after: Duration) -> Self {
        let hint = Hint { after, slot: None };
        let refusal = Self::throttled_until(Limit::Rule, hint);
        Self {
            rule: Some(rule),
            detail: match reason {
                "" => refusal.detail,
                reason => Cow::Owned(reason.to_owned()),
            },
            ..refusal
        }
    }

    /// 503 by admission.
    #[must_use]
    pub const fn overloaded(hint: Hint) -> Self {
        Self::hinted(
            Code::Overloaded,
            "more devices connect than can be looked up: return at the given time",
            hint,
        )
    }

    /// 503: the firmware version is new to the fleet, and few of its devices are admitted until it has proved itself.
    #[must_use]
    pub const fn unproven(hint: Hint) -> Self {
        Self::hinted(
            Code::Overloaded,
            "this firmware version is new here, and few devices with it are admitted: return at the given time",
            hint,
        )
    }

    /// 503: no device can be verified now.
    #[must_use]
    pub const fn registry_unavailable(hint: Hint) -> Self {
        Self::hinted(
            Code::RegistryUnavailable,
            "the device registry can't be reached: return at the given time",
            hint,
        )
    }

    /// 503: this node is draining.
    pub fn draining(peers: Peers, rng: &mut impl Rng) -> Self {
        Self::hinted(
            Code::Draining,
            "this node is leaving",
            Hint::draw(peers.hint_range(), rng),
        )
    }

    /// Appends the whole HTTP/1.1 answer: status line, headers, body. The caller closes the connection after it.
    pub fn write_response(&self, out: &mut Vec<u8>) {
        let body = self.body();
        self.write_head(&body, out);
        out.extend_from_slice(&body);
    }

    /// Appends the answer to a HEAD request: the answer to GET without its body (RFC 9110 §9.3.2).
    pub fn write_response_to_head(&self, out: &mut Vec<u8>) {
        self.write_head(&self.body(), out);
    }

    fn write_head(&self, body: &[u8], out: &mut Vec<u8>) {
        let hint_lines = self.hint.as_ref().map(hint_lines).unwrap_or_default();
        out.reserve(HEAD_LEN_TYPICAL + hint_lines.len() + body.len());
        let Spec {
            status,
            reason_phrase,
            header_lines,
            ..
        } = self.code.spec();
        out.extend_from_slice(
            format!(
                "HTTP/1.1 {status} {reason_phrase}\r\nContent-Type: application/problem+json\r\nContent-Length: {}\r\nConnection: close\r\nCache-Control: no-store\r\n{header_lines}{hint_lines}\r\n",
                body.len(),
            )
            .as_bytes(),
        );
    }

    fn body(&self) -> Vec<u8> {
        let problem = Problem {
            problem_type: format!("urn:seawall:problem:{}", self.code.as_str()),
            title: self.code.title(),
            status: self.code.status(),
            code: self.code.as_str(),
            detail: &self.detail,
            retry_after_ms: self.hint.as_ref().map(Hint::after_ms),
            rule: self.rule,
        };
        serde_json::to_vec(&problem).expect("a struct of texts and numbers always has a JSON form")
    }
}

/// Typical length of status line and headers, so that one allocation suffices.
const HEAD_LEN_TYPICAL: usize = 256;

/// `Retry-After` has whole seconds only, and is rounded up: a device that returns too early is worse than one that is
/// late.
fn hint_lines(hint: &Hint) -> String {
    let after_ms = hint.after_ms();
    let seconds = after_ms.div_ceil(1000);
    match &hint.slot {
        Some(slot) => {
            debug_assert!(
                slot.bytes().all(|byte| byte.is_ascii_graphic()),
                "slot tokens are base64url"
            );
            format!("Retry-After: {seconds}\r\nSeawall-Retry-After-Ms: {after_ms}\r\nSeawall-Slot: {slot}\r\n")
        }
        None => format!("Retry-After: {seconds}\r\nSeawall-Retry-After-Ms: {after_ms}\r\n"),
    }
}

#[derive(Serialize)]
struct Problem<'a> {
    #[serde(rename = "type")]
    problem_type: String,
    title: &'static str,
    status: u16,
    code: &'static str,
    detail: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<RuleId>,
}

#[cfg(test)]
mod tests;
