//! The WebSocket part of the head: upgrade, version, key, sub-protocol (RFC 6455 §4.2.1).

use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};

use super::{Head, SEAWALL_V1, SessionKind, names::is_token, single, values};
use crate::refusal::Refusal;

pub(super) struct Upgrade {
    pub(super) session_kind: SessionKind,
    pub(super) protocol: Option<Box<str>>,
    pub(super) websocket_key: [u8; 24],
}

pub(super) fn parse(head: &Head<'_>) -> Result<Upgrade, Refusal> {
    refuse_body(head)?;
    require_upgrade(head)?;
    let websocket_key = websocket_key(head)?;
    let (session_kind, protocol) = protocol(head)?;
    Ok(Upgrade {
        session_kind,
        protocol,
        websocket_key,
    })
}

/// A body after the head would be read as frames.
fn refuse_body(head: &Head<'_>) -> Result<(), Refusal> {
    let has_body = values(head.headers, "Transfer-Encoding").next().is_some()
        || values(head.headers, "Content-Length").any(|length| length.trim_ascii() != b"0");
    if has_body {
        return Err(Refusal::bad_request("a request to connect has no body"));
    }
    Ok(())
}

fn require_upgrade(head: &Head<'_>) -> Result<(), Refusal> {
    // An HTTP/1.0 request cannot upgrade, whatever its headers say (RFC 9110 §7.8).
    let is_upgrade = head.http_minor >= 1
        && lists(head, "Connection", |token| token.eq_ignore_ascii_case(b"upgrade"))
        && lists(head, "Upgrade", |token| token.eq_ignore_ascii_case(b"websocket"));
    if !is_upgrade {
        return Err(Refusal::upgrade_required(
            "devices connect with a WebSocket upgrade over HTTP/1.1",
        ));
    }
    let version = single(
        head.headers,
        "Sec-WebSocket-Version",
        "Sec-WebSocket-Version is given twice",
    )?;
    if version.map(<[u8]>::trim_ascii) != Some(b"13") {
        return Err(Refusal::upgrade_required("only WebSocket version 13 is spoken here"));
    }
    Ok(())
}

/// Whether `is_wanted` accepts an element of a comma-separated header, which may be spread over several lines.
fn lists(head: &Head<'_>, name: &str, is_wanted: impl Fn(&[u8]) -> bool) -> bool {
    values(head.headers, name)
        .flat_map(|value| value.split(|&byte| byte == b','))
        .any(|token| is_wanted(token.trim_ascii()))
}

/// Unused bits in the last character are accepted: some firmware draws 22 random characters.
const KEY_BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::RequireCanonical),
);

fn websocket_key(head: &Head<'_>) -> Result<[u8; 24], Refusal> {
    let value = single(head.headers, "Sec-WebSocket-Key", "Sec-WebSocket-Key is given twice")?
        .ok_or(Refusal::bad_request("Sec-WebSocket-Key is missing"))?;
    <[u8; 24]>::try_from(value.trim_ascii())
        .ok()
        .filter(|key| {
            // The decoder's estimate of the length counts padding as data.
            let mut decoded = [0; 18];
            KEY_BASE64.decode_slice(key, &mut decoded) == Ok(16)
        })
        .ok_or(Refusal::bad_request("Sec-WebSocket-Key is not base64 of 16 bytes"))
}

/// `seawall.v1` wins at any position; otherwise the first offer is confirmed.
fn protocol(head: &Head<'_>) -> Result<(SessionKind, Option<Box<str>>), Refusal> {
    let mut first = None;
    let mut is_v1 = false;
    let offers = values(head.headers, "Sec-WebSocket-Protocol")
        .flat_map(|value| value.split(|&byte| byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|offer| !offer.is_empty());
    for offer in offers {
        let offer = std::str::from_utf8(offer)
            .ok()
            .filter(|offer| is_token(offer))
            .ok_or(Refusal::bad_request(
                "Sec-WebSocket-Protocol has an element that is not a token",
            ))?;
        is_v1 |= offer == SEAWALL_V1;
        first.get_or_insert(offer);
    }
    Ok(if is_v1 {
        (SessionKind::V1, Some(SEAWALL_V1.into()))
    } else {
        (SessionKind::Plain, first.map(Box::from))
    })
}
