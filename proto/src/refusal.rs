//! The answer a refused device gets: always HTTP, always before the upgrade, always problem+json (RFC 9457).
//!
//! A [`Refusal`] is a value that carries its own labels: the status line, the body, the metric and the log line all come
//! from it. It never holds what the device sent.

use std::{borrow::Cow, ops::RangeInclusive, time::Duration};

mod crush;
mod hints;
mod limit;

use rand::Rng;
use serde::Serialize;

pub use self::{crush::Crush, hints::Peers, limit::Limit};
use crate::id::RuleId;

/// Why a device is refused. Closed: clients, metrics and the API know these words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Code {
    BadRequest,
    Unauthorized,
    FirmwareBlocked,
    DeviceDisabled,
    NotFound,
    MethodNotAllowed,
    UpgradeRequired,
    RequestTimeout,
    UriTooLong,
    HeadersTooLarge,
    Throttled,
    Overloaded,
    RegistryUnavailable,
    Draining,
}

impl Code {
    /// Every code, in the order of the enum.
    pub const ALL: [Self; 14] = [
        Self::BadRequest,
        Self::Unauthorized,
        Self::FirmwareBlocked,
        Self::DeviceDisabled,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::UpgradeRequired,
        Self::RequestTimeout,
        Self::UriTooLong,
        Self::HeadersTooLarge,
        Self::Throttled,
        Self::Overloaded,
        Self::RegistryUnavailable,
        Self::Draining,
    ];

    /// The HTTP status. Never 429: clients in the field treat it as final.
    #[must_use]
    pub const fn status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthorized => 401,
            Self::FirmwareBlocked | Self::DeviceDisabled => 403,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::RequestTimeout => 408,
            Self::UriTooLong => 414,
            Self::UpgradeRequired => 426,
            Self::HeadersTooLarge => 431,
            Self::Throttled | Self::Overloaded | Self::RegistryUnavailable | Self::Draining => 503,
        }
    }

    /// The word in the body, in metrics and in logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::Unauthorized => "unauthorized",
            Self::FirmwareBlocked => "firmware_blocked",
            Self::DeviceDisabled => "device_disabled",
            Self::NotFound => "not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::UpgradeRequired => "upgrade_required",
            Self::RequestTimeout => "request_timeout",
            Self::UriTooLong => "uri_too_long",
            Self::HeadersTooLarge => "headers_too_large",
            Self::Throttled => "throttled",
            Self::Overloaded => "overloaded",
            Self::RegistryUnavailable => "registry_unavailable",
            Self::Draining => "draining",
        }
    }

    /// The same for every refusal of this code (RFC 9457 §3.1.3).
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::BadRequest => "The request is malformed",
            Self::Unauthorized => "The device could not be authenticated",
            Self::FirmwareBlocked => "This firmware is blocked",
            Self::DeviceDisabled => "This device is disabled",
            Self::NotFound => "Nothing here",
            Self::MethodNotAllowed => "Only GET is allowed here",
            Self::UpgradeRequired => "A WebSocket upgrade is required",
            Self::RequestTimeout => "The request took too long",
            Self::UriTooLong => "The request target is too long",
            Self::HeadersTooLarge => "The request head is too large",
            Self::Throttled => "Too many attempts",
            Self::Overloaded => "The gateway is busy",
            Self::RegistryUnavailable => "The device registry is unavailable",
            Self::Draining => "This node is leaving",
        }
    }

    const fn reason_phrase(self) -> &'static str {
        match self {
            Self::BadRequest => "Bad Request",
            Self::Unauthorized => "Unauthorized",
            Self::FirmwareBlocked | Self::DeviceDisabled => "Forbidden",
            Self::NotFound => "Not Found",
            Self::MethodNotAllowed => "Method Not Allowed",
            Self::RequestTimeout => "Request Timeout",
            Self::UriTooLong => "URI Too Long",
            Self::UpgradeRequired => "Upgrade Required",
            Self::HeadersTooLarge => "Request Header Fields Too Large",
            Self::Throttled | Self::Overloaded | Self::RegistryUnavailable | Self::Draining => "Service Unavailable",
        }
    }

    /// Header lines that belong to the code itself.
    const fn header_lines(self) -> &'static str {
        match self {
            Self::Unauthorized => {
                "WWW-Authenticate: Bearer realm=\"seawall\"\r\nWWW-Authenticate: Basic realm=\"seawall\"\r\n"
            }
            Self::MethodNotAllowed => "Allow: GET\r\n",
            Self::UpgradeRequired => "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
            Self::BadRequest
            | Self::FirmwareBlocked
            | Self::DeviceDisabled
            | Self::NotFound
            | Self::RequestTimeout
            | Self::UriTooLong
            | Self::HeadersTooLarge
            | Self::Throttled
            | Self::Overloaded
            | Self::RegistryUnavailable
            | Self::Draining => "",
        }
    }

    /// The `Connection` header: an upgrade offered by 426 is hop by hop, and must be named in it (RFC 9110 §7.8).
    const fn connection(self) -> &'static str {
        match self {
            Self::UpgradeRequired => "upgrade, close",
            Self::BadRequest
            | Self::Unauthorized
            | Self::FirmwareBlocked
            | Self::DeviceDisabled
            | Self::NotFound
            | Self::MethodNotAllowed
            | Self::RequestTimeout
            | Self::UriTooLong
            | Self::HeadersTooLarge
            | Self::Throttled
            | Self::Overloaded
            | Self::RegistryUnavailable
            | Self::Draining => "close",
        }
    }
}

/// When to come back, and what to show then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hint {
    /// From now. Told in whole milliseconds.
    pub after: Duration,
    /// A slot token: gives priority at that time.
    pub slot: Option<Box<str>>,
}

impl Hint {
    /// A hint without a slot, drawn uniformly, to the millisecond, so that devices refused together don't return together.
    pub fn draw(between: RangeInclusive<Duration>, rng: &mut impl Rng) -> Self {
        Self {
            after: draw(between, rng),
            slot: None,
        }
    }

    /// The hint in whole milliseconds.
    #[must_use]
    pub fn after_ms(&self) -> u64 {
        millis(self.after)
    }
}

/// A uniform draw in whole milliseconds; the bounds are included.
pub(crate) fn draw(between: RangeInclusive<Duration>, rng: &mut impl Rng) -> Duration {
    let from = millis(*between.start());
    let to = millis(*between.end()).max(from);
    Duration::from_millis(rng.random_range(from..=to))
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// A refused attempt: everything the device is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: Code,
    /// Where the code is `throttled`; the device reads it in `detail`.
    pub limit: Option<Limit>,
    /// For the people who debug a device. Fixed texts, or an operator's public reason; never what the device sent.
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

    /// 401: the one answer for an unknown device, a wrong credential and none.
    pub fn unauthorized(rng: &mut impl Rng) -> Self {
        let hint = Hint::draw(hints::UNAUTHORIZED, rng);
        Self::hinted(
            Code::Unauthorized,
            "unknown device, or wrong or missing credential",
            hint,
        )
    }

    /// 403 by a rule: `reason` is public, and the hint lies between `retry_after` and twice that.
    pub fn firmware_blocked(rule: RuleId, reason: &str, retry_after: Duration, rng: &mut impl Rng) -> Self {
        let detail = match reason {
            "" => Cow::Borrowed("an operator has blocked this firmware"),
            reason => Cow::Owned(reason.to_owned()),
        };
        Self {
            code: Code::FirmwareBlocked,
            limit: None,
            detail,
            hint: Some(Hint::draw(retry_after..=retry_after.saturating_mul(2), rng)),
            rule: Some(rule),
        }
    }

    /// 403: the credential was right, the device is disabled.
    pub fn device_disabled(rng: &mut impl Rng) -> Self {
        let hint = Hint::draw(hints::DISABLED, rng);
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
            "the request head is over the limit, 8 KiB unless configured, or has over 64 headers",
        )
    }

    /// 503 by a limit on this address. Without a slot: priority is for devices that kept to the rules.
    pub fn throttled(limit: Limit, rng: &mut impl Rng) -> Self {
        Self::throttled_until(limit, Hint::draw(hints::THROTTLED, rng))
    }

    /// 503: its address holds too many handshakes while others wait. `hint` is what the [`Crush`] says.
    pub fn crowded_out(hint: RangeInclusive<Duration>, rng: &mut impl Rng) -> Self {
        Self::throttled_until(Limit::AddressHandshakes, Hint::draw(hint, rng))
    }

    /// 503 by a limit on this tenant, address, cohort or id.
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

    /// 503 by admission.
    #[must_use]
    pub const fn overloaded(hint: Hint) -> Self {
        Self::hinted(
            Code::Overloaded,
            "more devices connect than can be looked up: come back at the time given",
            hint,
        )
    }

    /// 503: nobody can be verified now.
    #[must_use]
    pub const fn registry_unavailable(hint: Hint) -> Self {
        Self::hinted(
            Code::RegistryUnavailable,
            "the device registry can't be reached: come back at the time given",
            hint,
        )
    }

    /// 503: this node is leaving.
    pub fn draining(peers: Peers, rng: &mut impl Rng) -> Self {
        Self::hinted(
            Code::Draining,
            "this node is leaving",
            Hint::draw(peers.hint_range(), rng),
        )
    }

    /// Appends the whole HTTP/1.1 answer: status line, headers, body. The connection is to be closed behind it.
    pub fn write_response(&self, out: &mut Vec<u8>) {
        let body = self.body();
        self.write_head(&body, out);
        out.extend_from_slice(&body);
    }

    /// Appends the answer to a HEAD request: that to GET without its body (RFC 9110 §9.3.2).
    pub fn write_response_to_head(&self, out: &mut Vec<u8>) {
        self.write_head(&self.body(), out);
    }

    fn write_head(&self, body: &[u8], out: &mut Vec<u8>) {
        let hint_lines = self.hint.as_ref().map(hint_lines).unwrap_or_default();
        out.reserve(HEAD_LEN_TYPICAL + hint_lines.len() + body.len());
        out.extend_from_slice(
            format!(
                "HTTP/1.1 {} {}\r\nContent-Type: application/problem+json\r\nContent-Length: {}\r\nConnection: {}\r\nCache-Control: no-store\r\n{}{hint_lines}\r\n",
                self.code.status(),
                self.code.reason_phrase(),
                body.len(),
                self.code.connection(),
                self.code.header_lines(),
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

/// Room for status line and headers in one allocation.
const HEAD_LEN_TYPICAL: usize = 256;

/// `Retry-After` knows whole seconds only, and is rounded up: early is worse than late.
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
